# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Freezing and letting go, with real disks, keepers and journals."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import signal
import subprocess
import typing as t

import pytest

from ansible_collections.vmbackup.vma.plugins.module_utils.host import (
    folder,
    journal,
    locks,
    snapshot,
    stand_still,
    view,
)
from ansible_collections.vmbackup.vma.plugins.module_utils.host.errors import SnapshotError
from ansible_collections.vmbackup.vma.plugins.module_utils.host.keeper import Limits
from ansible_collections.vmbackup.vma.plugins.module_utils.host.libvirt import LibvirtDomain
from ansible_collections.vmbackup.vma.plugins.module_utils.host.machine import STORAGES
from ansible_collections.vmbackup.vma.plugins.module_utils.host.provider import OFFLINE, Disk
from ansible_collections.vmbackup.vma.plugins.module_utils.host.reflink import ReflinkCopies
from ansible_collections.vmbackup.vma.plugins.module_utils.vma import errors
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.host import domains, snapshots
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.host.snapshots import Libvirt, libvirt
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.vma.conftest import reflinks

__all__ = ("libvirt", "reflinks")

_FREEZER = """
import os, signal
from ansible_collections.vmbackup.vma.plugins.module_utils.host import snapshot
from ansible_collections.vmbackup.vma.plugins.module_utils.host.provider import Disk
disk, journals = sys.argv[1:]
request = snapshot.Request("web", "reflink", (Disk("scsi0", disk),), journals=journals)
print(snapshot.freeze_disks(request).id, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


class Site:
    """A disk, journals, and no libvirt that knows the VM."""

    def __init__(self, disk: pathlib.Path, journals: pathlib.Path) -> None:
        self.disk = disk
        self.disk.write_bytes(os.urandom(1 << 20))
        self.journals = str(journals)
        self.request = snapshot.Request("web", "none", (Disk("scsi0", str(disk)),), journals=self.journals)

    @property
    def notes(self) -> dict[str, t.Any]:
        return journal.read_journal("web", self.journals)[1]

    def freeze(self, **options: t.Any) -> snapshot.Snapshot:
        return snapshot.freeze_disks(dataclasses.replace(self.request, **options))

    def let_go(self, run_id: str | None = None) -> snapshot.Released:
        return snapshot.let_go("web", run_id, self.journals)

    def kill_keeper(self) -> None:
        pid = self.notes["pid"]
        os.kill(pid, signal.SIGKILL)
        snapshots.wait_for(lambda: not snapshots.lives(pid))


@pytest.fixture
def site(tmp_path: pathlib.Path, libvirt: Libvirt) -> t.Iterator[Site]:
    libvirt.answer("list")
    found = Site(tmp_path / "disk.raw", tmp_path / "journals")
    yield found
    found.let_go()


@pytest.fixture
def reflink_site(reflinks: pathlib.Path, tmp_path: pathlib.Path, libvirt: Libvirt) -> t.Iterator[Site]:
    libvirt.answer("list")
    found = Site(reflinks / "disk.raw", tmp_path / "journals")
    found.request = dataclasses.replace(found.request, provider="auto")
    yield found
    found.let_go()


def copies(site: Site) -> list[str]:
    return [name for name in os.listdir(site.disk.parent) if name.startswith(".vmbackup-vma-")]


def test_a_disk_at_rest_is_held_until_it_is_let_go(site: Site) -> None:
    frozen = site.freeze()
    assert (frozen.provider, frozen.frozen.consistency, frozen.cleared) == ("none", OFFLINE, [])
    assert frozen.frozen.disks == [Disk("scsi0", str(site.disk), "raw", 1 << 20, site.disk.stat().st_blocks * 512)]
    assert (frozen.vmid, frozen.config) == (None, None)
    assert "lock" in snapshots.write_by_qemu(site.disk)
    assert site.let_go(frozen.id) == snapshot.Released([], None)
    assert snapshots.write_by_qemu(site.disk) == ""
    assert os.listdir(site.journals) == []
    assert site.let_go() == snapshot.Released([], None)


def test_another_run_is_told_who_has_the_vm(site: Site) -> None:
    frozen = site.freeze(limits=Limits(3600, 1234))
    with pytest.raises(errors.BusyError) as caught:
        site.freeze()
    began = site.notes["began"]
    assert caught.value.message == f"another run has frozen the disks of web, since {began}"
    assert "goes 1234 seconds after the last reading" in str(caught.value)
    assert "name=web and state=absent" in str(caught.value)
    assert site.notes["id"] == frozen.id  # and the first run's snapshot is still there


def test_another_runs_snapshot_is_not_let_go(site: Site) -> None:
    frozen = site.freeze()
    assert site.let_go("ffffffff") == snapshot.Released([], "the snapshot ffffffff is gone: somebody else let it go")
    assert "lock" in snapshots.write_by_qemu(site.disk)
    assert site.let_go(frozen.id).trouble is None
    # whoever comes later with this id had a snapshot that is no more
    assert site.let_go(frozen.id).trouble == f"the snapshot {frozen.id} is gone: somebody else let it go"


def test_a_keeper_that_was_killed_makes_what_was_read_worthless(site: Site) -> None:
    frozen = site.freeze()
    site.kill_keeper()
    assert snapshots.write_by_qemu(site.disk) == ""  # a VM may have been started meanwhile
    assert site.let_go(frozen.id).trouble == "the keeper of the snapshot was killed, so that nobody looked after it"


def test_a_snapshot_that_went_by_itself_is_trouble(site: Site) -> None:
    frozen = site.freeze(limits=Limits(3600, 0))
    snapshots.wait_for(lambda: "trouble" in site.notes)
    released = site.let_go(frozen.id)
    assert released.trouble == "nobody has read the snapshot for 0 seconds"


def test_what_fails_leaves_nothing(site: Site, tmp_path: pathlib.Path) -> None:
    missing = Disk("scsi1", str(tmp_path / "missing"))
    with pytest.raises(errors.SourceError, match="No such file"):
        site.freeze(disks=(*site.request.disks, missing))
    assert os.listdir(site.journals) == []
    assert snapshots.write_by_qemu(site.disk) == ""


def test_a_plan_touches_nothing(reflink_site: Site) -> None:
    site = reflink_site
    planned = snapshot.plan(site.request)
    assert (planned.id, planned.provider, planned.frozen.method) == ("", "reflink", "reflink copy")
    assert [disk.path for disk in planned.frozen.disks] == [str(site.disk)]
    assert os.listdir(site.disk.parent) == ["disk.raw"]
    assert not os.path.exists(site.journals)


def test_reflink_copies_come_and_go(reflink_site: Site) -> None:
    site = reflink_site
    before = site.disk.read_bytes()
    frozen = site.freeze()
    site.disk.write_bytes(bytes(1 << 20))
    (disk,) = frozen.frozen.disks
    assert pathlib.Path(disk.path).read_bytes() == before
    assert snapshot.describe_leftovers("web", None, site.journals) == [f"reflink {disk.path}"]
    assert snapshot.describe_leftovers("web", "ffffffff", site.journals) == []
    assert site.let_go(frozen.id) == snapshot.Released([f"the reflink copy {disk.path}"], None)
    assert copies(site) == []


@pytest.mark.parametrize("by", ["the next run", "absent"])
def test_what_was_killed_with_its_keeper_is_cleared(reflink_site: Site, by: str) -> None:
    site = reflink_site
    freezer = snapshots.run_python(_FREEZER, str(site.disk), site.journals)
    run_id = snapshots.read_line(freezer)
    assert freezer.wait(snapshots.SECONDS) == -signal.SIGKILL
    (left,) = copies(site)
    site.kill_keeper()
    assert copies(site) == [left]
    said = [f"the reflink copy {site.disk.parent / left}"]
    if by == "absent":
        assert site.let_go().removed == said
    else:
        frozen = site.freeze()
        assert frozen.cleared == said
        assert len(copies(site)) == 1
        # the killed run's number lets go of nothing any more
        assert "is gone" in str(site.let_go(run_id).trouble)
        site.let_go(frozen.id)
    assert copies(site) == []
    assert os.listdir(site.journals) == []


def test_a_copy_that_is_lost_is_noticed(reflink_site: Site) -> None:
    site = reflink_site
    frozen = site.freeze()
    os.unlink(frozen.frozen.disks[0].path)
    assert site.let_go(frozen.id).trouble == f"the reflink copy {frozen.frozen.disks[0].path} is gone"


def test_a_keeper_that_is_killed_half_way_leaves_the_undoing_to_the_run(
    reflink_site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = reflink_site
    really = ReflinkCopies.freeze

    def freeze(self: ReflinkCopies, work: t.Any) -> t.Any:
        frozen = really(self, work)
        site.kill_keeper()
        return frozen

    monkeypatch.setattr(ReflinkCopies, "freeze", freeze)
    with pytest.raises(SnapshotError, match="the keeper of the snapshot has died"):
        site.freeze()
    assert copies(site) == []
    assert os.listdir(site.journals) == []


def test_a_number_from_before_a_reboot_is_nobodys_keeper(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    # another run is just clearing what the journal tells, where the number is somebody else's by now
    stranger = subprocess.Popen(["sleep", "600"])
    monkeypatch.setattr(snapshot, "_STARTING", 0.5)
    with snapshots.open_journal(pathlib.Path(site.journals)) as kept:
        kept.begin(id="0badcafe", ready=True, pid=stranger.pid)
        with pytest.raises(errors.BusyError):
            site.let_go()
        kept.delete()
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()


def test_an_overlay_that_a_killed_run_left_is_not_taken_for_the_disk(
    site: Site, libvirt: Libvirt, tmp_path: pathlib.Path
) -> None:
    left = tmp_path / "vmbackup-vma-0badcafe"
    left.mkdir()
    overlay = left / "vda.overlay"
    overlay.touch()
    with snapshots.open_journal(pathlib.Path(site.journals)) as kept:
        kept.begin(id="0badcafe")
        kept.add("folder", path=str(left))
        disks = {"vda": [str(overlay), str(site.disk), "raw"]}
        kept.add("overlays", domain=snapshots.UUID, folder=str(left), disks=disks)
    definition = (
        f"<domain type='kvm'><name>web</name><uuid>{snapshots.UUID}</uuid><memory>1048576</memory><vcpu>1</vcpu>"
        "<os><type arch='x86_64' machine='pc'>hvm</type></os><devices><disk type='file' device='disk'>"
        "<driver name='qemu' type='raw'/><source file='$disk'/><target dev='vda' bus='virtio'/></disk>"
        "</devices></domain>"
    )
    is_on_overlay = f"[ -e {overlay} ] && [ ! -e {tmp_path}/committed ]"
    libvirt.script("dumpxml", f'disk={site.disk}; if {is_on_overlay}; then disk={overlay}; fi; echo "{definition}"')
    libvirt.script("blockcommit", f"touch {tmp_path}/committed")
    libvirt.answer("list", f"{snapshots.UUID} web\n")
    libvirt.answer("domblkinfo", "Capacity: 1048576\nAllocation: 4096\n")
    libvirt.answer("backup-begin", error="unknown command: 'backup-begin'")
    libvirt.answer("backup-dumpxml", error="unknown command: 'backup-dumpxml'")
    frozen = site.freeze(provider="auto", disks=(), scratch=str(tmp_path))
    assert frozen.cleared == [f"the overlays of {snapshots.UUID} on vda", f"the folder {left}"]
    assert [found.path for found in frozen.frozen.disks] == [str(site.disk)]


def test_a_vm_of_which_nothing_is_known(site: Site) -> None:
    with pytest.raises(errors.RequestError, match="libvirt knows no domain web"):
        site.freeze(provider="auto", disks=())
    with pytest.raises(errors.RequestError, match="the disks of web are not known"):
        site.freeze(provider="lvm", disks=())
    with pytest.raises(errors.RequestError, match="no one provider fits"):
        site.freeze(provider="auto", disks=(Disk("scsi0", "/dev/null"),))


def test_a_disk_that_its_guest_alone_can_read_is_refused_and_not_left_out(site: Site, libvirt: Libvirt) -> None:
    nvme = "<disk type='nvme' device='disk'><source type='pci' namespace='1'/><target dev='vdz' bus='virtio'/></disk>"
    libvirt.answer("list", f"{snapshots.UUID} web\n")
    libvirt.answer("dumpxml", domains.DEBIAN.replace("<devices>", f"<devices>{nvme}"))
    libvirt.answer("domblkinfo", "Capacity: 1048576\nAllocation: 4096\n")
    request = dataclasses.replace(site.request, provider="auto", disks=())
    with pytest.raises(errors.RequestError, match="the disk vdz of web cannot be backed up: its source of type nvme"):
        snapshot.plan(request)
    planned = snapshot.plan(dataclasses.replace(request, exclude=("vdz",)))
    assert planned.frozen.disks
    assert planned.config is not None
    assert any("vdz" in sentence for sentence in planned.config.unmapped)


def test_the_storage_of_a_guest_that_runs_is_given_back_and_then_the_guest_goes_on(
    site: Site, libvirt: Libvirt
) -> None:
    libvirt.answer("list", f"{snapshots.UUID} web\n")
    libvirt.answer("dumpxml", domains.DEBIAN)
    frozen = site.freeze(provider="none", disks=(Disk("virtio0", str(site.disk)),))
    libvirt.answer("domstate", "paused (I/O error)\n")
    snapshots.wait_for(lambda: site.notes["pid"] is None)
    released = site.let_go(frozen.id)
    assert released.trouble == "the guest was paused, as a write failed: is its storage full?"
    assert len(libvirt.told("resume")) == 1


def test_no_two_providers_have_a_kind_of_step_in_common() -> None:
    kinds = [folder.KINDS, view.KINDS, stand_still.KINDS, locks.KINDS, LibvirtDomain.kinds]
    kinds += [provider.kinds for provider in STORAGES.values()]
    names = [name for each in kinds for name in each]
    assert sorted(names) == sorted(set(names)) == sorted(snapshot.KINDS)
