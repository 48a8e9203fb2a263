# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Overlays, and the way of a libvirt domain to them: real images, with a pretended libvirt where one would not fail."""

from __future__ import annotations

import os
import pathlib
import typing as t
from xml.etree import ElementTree

import pytest

from ansible_collections.vmbackup.vma.plugins.module_utils.host import backup_job, journal, overlay, undo, view, virsh
from ansible_collections.vmbackup.vma.plugins.module_utils.host import folder as run_folder
from ansible_collections.vmbackup.vma.plugins.module_utils.host.domain import Domain
from ansible_collections.vmbackup.vma.plugins.module_utils.host.errors import SnapshotError
from ansible_collections.vmbackup.vma.plugins.module_utils.host.libvirt import LibvirtDomain
from ansible_collections.vmbackup.vma.plugins.module_utils.host.provider import CRASH, Disk
from ansible_collections.vmbackup.vma.plugins.module_utils.vma import errors
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.host import snapshots
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.host.snapshots import UUID, Libvirt, libvirt

__all__ = ("libvirt",)

UNDO, HEALTH = overlay.KINDS["overlays"].undo, overlay.KINDS["overlays"].health
_XML = """<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>web</name><uuid>{uuid}</uuid><memory unit='KiB'>1048576</memory><vcpu>1</vcpu>
  <os><type arch='x86_64' machine='pc'>hvm</type></os>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='{format}' discard='unmap'/>
      <source file='{path}'/>
      {backing}
      <target dev='vda' bus='virtio'/>
    </disk>
    <graphics type='vnc' {password}/>
  </devices>
  <qemu:commandline><qemu:arg value='-S'/></qemu:commandline>
</domain>
"""


def pivots(libvirt: Libvirt, to: pathlib.Path) -> None:
    """A commit lets the guest go over to a disk."""
    after = libvirt.path("after")
    after.write_text(xml(to), encoding="utf-8")
    libvirt.script("blockcommit", f"cp {after} {libvirt.path('dumpxml')}")


def xml(path: pathlib.Path | str, image_format: str = "raw", backing: str = "", password: str = "") -> str:
    return _XML.format(uuid=UUID, path=path, format=image_format, backing=backing, password=password)


class Site:
    """A disk with an overlay on it, into which the guest wrote; and what the journal tells of it."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder / "vmbackup-vma-0badcafe"
        self.folder.mkdir()
        self.base, self.overlay = folder / "disk.raw", self.folder / "vda.overlay"
        self.base.write_bytes(bytes(1 << 20))
        made = snapshots.qemu(
            *("qemu-img", "create", "-q", "-f", "qcow2", "-b", str(self.base), "-F", "raw", str(self.overlay))
        )
        assert made.returncode == 0, made.stderr
        assert snapshots.write_by_qemu(self.overlay, "qcow2") == ""
        disks = {"vda": [str(self.overlay), str(self.base), "raw"]}
        self.fields = {"domain": UUID, "folder": str(self.folder), "disks": disks}

    @property
    def on_overlay(self) -> str:
        backing = f"<backingStore type='file'><source file='{self.base}'/></backingStore>"
        return xml(self.overlay, "qcow2", backing)


@pytest.fixture
def site(tmp_path: pathlib.Path) -> Site:
    return Site(tmp_path)


@pytest.fixture
def kept(tmp_path: pathlib.Path) -> t.Iterator[journal.Journal]:
    with snapshots.open_journal(tmp_path / "journals") as found:
        yield found


def test_of_a_guest_that_runs_libvirt_commits_it(site: Site, libvirt: Libvirt) -> None:
    libvirt.answer("dumpxml", site.on_overlay)
    libvirt.answer("blockjob", error="No active block job 'vda'")
    pivots(libvirt, site.base)
    assert UNDO(site.fields) == f"the overlays of {UUID} on vda"
    (line,) = libvirt.told("blockcommit")
    assert line == f"blockcommit --domain {UUID} --path vda --shallow --active --pivot --wait"
    assert not site.overlay.exists()
    assert UNDO(site.fields) is None


def test_a_commit_that_ends_on_another_disk_keeps_the_overlay(site: Site, libvirt: Libvirt) -> None:
    libvirt.answer("dumpxml", site.on_overlay)
    pivots(libvirt, site.base.with_name("golden.raw"))
    with pytest.raises(SnapshotError, match=r"its disk vda is now .*golden\.raw, not .*disk\.raw"):
        UNDO(site.fields)
    assert site.overlay.exists()


def test_an_overlay_that_libvirt_is_only_just_putting_on_stays(
    site: Site, libvirt: Libvirt, monkeypatch: pytest.MonkeyPatch
) -> None:
    libvirt.answer("dumpxml", xml(site.base))
    libvirt.answer("dommemstat", error="cannot acquire state change lock")
    with pytest.raises(errors.ToolError, match="state change lock"):
        UNDO(site.fields)
    libvirt.answer("dommemstat")
    monkeypatch.setattr(virsh, "get_process", lambda _name: os.getpid())
    with site.overlay.open("rb"), pytest.raises(SnapshotError, match="its QEMU has our overlay on it open"):
        UNDO(site.fields)
    assert site.overlay.exists()
    assert UNDO(site.fields) is None
    assert not site.overlay.exists()


def test_a_commit_that_fails_keeps_the_overlay(site: Site, libvirt: Libvirt, kept: journal.Journal) -> None:
    libvirt.answer("dumpxml", site.on_overlay)
    libvirt.answer("blockcommit", error="No space left on device")
    kept.add("folder", path=str(site.folder))
    kept.add("overlays", **site.fields)
    with pytest.raises(SnapshotError, match="No space left"):
        undo.release(kept, {**overlay.KINDS, **run_folder.KINDS})
    assert site.overlay.exists()
    assert len(kept.steps) == 2


def test_of_a_guest_that_was_shut_off_qemu_commits_it(site: Site, libvirt: Libvirt, tmp_path: pathlib.Path) -> None:
    libvirt.answer("domstate", "shut off (shutdown)\n")
    libvirt.answer("dumpxml", site.on_overlay)
    secret = tmp_path / "secret.xml"
    secret.write_text(site.on_overlay.replace("type='vnc'", "type='vnc' passwd='open sesame'"), encoding="utf-8")
    libvirt.script("dumpxml", f'case "$*" in *--security-info*) cat {secret};; *) cat {libvirt.path("dumpxml")};; esac')
    libvirt.script("define", f'cp "$2" {tmp_path}/defined.xml')
    assert UNDO(site.fields) == f"the overlays of {UUID} on vda"
    assert site.base.read_bytes() == b"\7" * 4096 + bytes((1 << 20) - 4096)
    assert not site.overlay.exists()
    defined = ElementTree.parse(tmp_path / "defined.xml").getroot()
    (disk,) = defined.iterfind("./devices/disk")
    assert (disk.get("type"), disk.find("backingStore")) == ("file", None)
    assert {child.tag: child.attrib for child in disk} == {
        "driver": {"name": "qemu", "type": "raw", "discard": "unmap"},
        "source": {"file": str(site.base)},
        "target": {"dev": "vda", "bus": "virtio"},
    }
    graphics = defined.find("./devices/graphics")
    assert graphics is not None
    assert graphics.get("passwd") == "open sesame"
    assert defined.find("{http://libvirt.org/schemas/domain/qemu/1.0}commandline") is not None


@pytest.mark.parametrize("which", ["overlay", "base"])
def test_a_guest_that_libvirt_has_lost_is_told_of_and_left_alone(
    site: Site, libvirt: Libvirt, tmp_path: pathlib.Path, which: str
) -> None:
    libvirt.answer("domstate", "shut off (unknown)\n")
    libvirt.answer("dumpxml", site.on_overlay)
    disk: pathlib.Path = getattr(site, which)
    before = disk.read_bytes()
    with snapshots.written_by_qemu(disk, tmp_path), pytest.raises(SnapshotError, match="libvirt has lost") as caught:
        UNDO(site.fields)
    assert caught.value.file == str(disk)
    assert "Do not start the domain" in str(caught.value)
    assert disk.read_bytes() == before
    assert site.overlay.exists()


def test_a_guest_that_libvirt_has_lost_amid_its_way_to_the_base_keeps_what_it_wrote_since(
    site: Site, libvirt: Libvirt, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    libvirt.answer("domstate", "shut off (unknown)\n")
    libvirt.answer("dumpxml", site.on_overlay)
    libvirt.script("define", f'cp "$2" {tmp_path}/defined.xml')
    before = site.base.read_bytes()
    with snapshots.written_by_qemu(site.base, tmp_path) as pid:
        monkeypatch.setattr(virsh, "get_process", lambda _name: pid)
        assert UNDO(site.fields) == f"the overlays of {UUID} on vda"
    assert site.base.read_bytes() == before
    assert not site.overlay.exists()
    (source,) = ElementTree.parse(tmp_path / "defined.xml").getroot().iterfind("./devices/disk/source")
    assert source.attrib == {"file": str(site.base)}


def test_a_domain_that_is_gone_leaves_the_overlay_and_says_so(site: Site, libvirt: Libvirt) -> None:
    libvirt.answer("domstate", error=f"failed to get domain '{UUID}'")
    with pytest.raises(SnapshotError, match="but is gone") as caught:
        UNDO(site.fields)
    assert caught.value.file == str(site.overlay)
    assert "commit it by hand" in str(caught.value)
    assert site.overlay.exists()


def test_a_domain_that_uses_another_disk_by_now_leaves_it_as_well(site: Site, libvirt: Libvirt) -> None:
    libvirt.answer("dumpxml", xml("/somewhere/else.raw"))
    with pytest.raises(SnapshotError, match=r"but /somewhere/else\.raw"):
        UNDO(site.fields)
    assert site.overlay.exists()


def test_an_overlay_that_never_came_into_use_goes(site: Site, libvirt: Libvirt) -> None:
    libvirt.answer("dumpxml", xml(site.base))
    assert UNDO(site.fields) is None
    assert not site.overlay.exists()
    assert libvirt.told("blockcommit", "define") == []


def test_a_guest_that_was_starved_goes_on(site: Site, libvirt: Libvirt) -> None:
    libvirt.answer("domstate", "paused (I/O error)\n")
    libvirt.answer("dumpxml", site.on_overlay)
    pivots(libvirt, site.base)
    said = HEALTH(site.fields)
    assert said == f"the guest was paused, as a write failed: was {site.folder} full?"
    UNDO(site.fields)
    assert [line.split()[0] for line in libvirt.told()][-1] == "resume"


def test_a_libvirt_that_restarts_is_no_trouble(site: Site, libvirt: Libvirt) -> None:
    assert HEALTH(site.fields) is None
    libvirt.answer("domstate", error="failed to connect to the hypervisor")
    assert HEALTH(site.fields) is None


def test_a_libvirt_that_refuses_is_told(site: Site, libvirt: Libvirt, kept: journal.Journal) -> None:
    libvirt.answer("snapshot-create-as", error="internal error: Permission denied")
    work = snapshots.work_in(kept, site.folder.parent)
    with pytest.raises(SnapshotError, match="Permission denied") as caught:
        overlay.put(work, UUID, str(site.folder), {"vda": overlay.Base(str(site.base), "raw")}, [])
    assert "AppArmor" in str(caught.value)
    assert kept.steps == [journal.Step("overlays", site.fields)]


# --- the choice between backup job and overlays -----------------------------------------------------------------------


@pytest.fixture
def domain(site: Site, libvirt: Libvirt) -> LibvirtDomain:
    if not view.can_view():
        pytest.skip("backup jobs need qemu-storage-daemon and FUSE")
    site.overlay.unlink()
    site.folder.rmdir()
    libvirt.answer("domblkinfo", "Capacity: 1048576\nAllocation: 4096\n")
    libvirt.answer("backup-dumpxml", error="no domain backup job present")
    return LibvirtDomain(Domain.parse(xml(site.base)), {"vda": "virtio0"})


@pytest.mark.parametrize(
    "said",
    [
        "Operation not supported: incremental backup is not supported yet",
        "unknown command: 'backup-begin'",
        "unsupported configuration: disk vda",
    ],
)
def test_where_there_are_no_backup_jobs_overlays_are_put(
    site: Site, libvirt: Libvirt, domain: LibvirtDomain, kept: journal.Journal, said: str
) -> None:
    libvirt.answer("backup-begin", error=said)
    frozen = domain.freeze(snapshots.work_in(kept, site.folder.parent))
    assert (frozen.method, frozen.consistency) == ("external snapshot", CRASH)
    assert frozen.disks == [Disk("virtio0", str(site.base), "raw", 1 << 20, 4096)]
    assert [step.kind for step in kept.steps] == ["folder", "overlays"]
    assert libvirt.told("domjobabort") == []


def test_a_backup_job_that_fails_otherwise_is_an_error(
    site: Site, libvirt: Libvirt, domain: LibvirtDomain, kept: journal.Journal
) -> None:
    libvirt.answer("backup-begin", error="internal error: Permission denied")
    with pytest.raises(SnapshotError, match=r"did not start the backup job.*Permission denied"):
        domain.freeze(snapshots.work_in(kept, site.folder.parent))
    assert [step.kind for step in kept.steps] == ["folder", "backup-job"]
    assert undo.release(kept, {**backup_job.KINDS, **run_folder.KINDS}) == [f"the folder {site.folder}"]
    assert libvirt.told("domjobabort", "snapshot-create-as") == []


def test_a_lun_is_not_frozen_while_its_guest_runs(site: Site, libvirt: Libvirt, kept: journal.Journal) -> None:
    libvirt.answer("domblkinfo", "Capacity: 1048576\nAllocation: 4096\n")
    definition = xml("/dev/sdx").replace("type='file' device='disk'", "type='block' device='lun'")
    definition = definition.replace("source file", "source dev")
    domain = LibvirtDomain(Domain.parse(definition), {"vda": "scsi0"})
    for attempt in (domain.plan, lambda: domain.freeze(snapshots.work_in(kept, site.folder.parent))):
        with pytest.raises(errors.RequestError, match="vda of web is a LUN that is passed through"):
            attempt()
    assert libvirt.told("backup-begin", "snapshot-create-as") == []
    assert kept.steps == []


def test_another_programs_backup_job_is_never_ended(
    site: Site, libvirt: Libvirt, domain: LibvirtDomain, kept: journal.Journal
) -> None:
    theirs = "<domainbackup mode='pull'><server transport='unix' socket='/their/socket'/></domainbackup>"
    libvirt.answer("backup-dumpxml", theirs)
    with pytest.raises(SnapshotError, match="another program has a backup job"):
        domain.freeze(snapshots.work_in(kept, site.folder.parent))
    kept.add("backup-job", domain=UUID, folder=str(site.folder))
    undo.release(kept, {**backup_job.KINDS, **run_folder.KINDS})
    assert libvirt.told("domjobabort") == []


def test_our_own_backup_job_is_ended_and_a_starved_guest_goes_on(libvirt: Libvirt, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / 'R&D "scratch"'
    folder.mkdir()
    libvirt.answer("backup-dumpxml", backup_job._describe(str(folder), ["vda"]).decode())
    fields = {"domain": UUID, "folder": str(folder)}
    kind = backup_job.KINDS["backup-job"]
    assert kind.health(fields) is None
    libvirt.answer("domstate", "paused (I/O error)\n")
    assert kind.health(fields) == f"the guest was paused, as a write failed: was {folder} full?"
    libvirt.answer("dommemstat", error="cannot acquire state change lock")
    with pytest.raises(errors.ToolError, match="state change lock"):
        kind.undo(fields)
    libvirt.answer("dommemstat")
    gone = "echo 'error: no domain backup job present' >&2; exit 1"
    libvirt.script("domjobabort", f"echo \"{gone}\" > '{libvirt.script_path('backup-dumpxml')}'")
    assert kind.undo(fields) == f"the backup job of {UUID}"
    assert [line.split()[0] for line in libvirt.told()][-1] == "resume"
    libvirt.answer("domstate", "running (unpaused)\n")
    assert kind.health(fields) == "the backup job is gone: did the guest end, or somebody abort it?"
    libvirt.answer("domstate", error="failed to connect to the hypervisor")
    assert kind.health(fields) is None


def test_what_a_backup_job_is_asked_for(tmp_path: pathlib.Path) -> None:
    root = ElementTree.fromstring(backup_job._describe(str(tmp_path), ["vda", "sdb"]))
    assert (root.tag, root.attrib) == ("domainbackup", {"mode": "pull"})
    server = root.find("server")
    assert server is not None
    assert server.attrib == {"transport": "unix", "socket": str(tmp_path / "nbd")}
    disks = list(root.iterfind("./disks/disk"))
    assert [disk.get("name") for disk in disks] == [disk.get("exportname") for disk in disks] == ["vda", "sdb"]
    assert [disk.find("scratch").get("file") for disk in disks] == [  # type: ignore[union-attr]
        str(tmp_path / "vda.scratch"),
        str(tmp_path / "sdb.scratch"),
    ]
