# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The playbook restore_vm onto volumes: of LVM and, with VMBACKUP_STORAGE_ZFS=1, of ZFS, on a host with libvirt.

The host is an emulated guest, whose kernel has what the machine's may lack. Onto files it is tested by Molecule.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import random
import shutil
import subprocess
import typing as t

import pytest

from ansible_collections.vmbackup.vma.plugins.module_utils.vma import create
from ansible_collections.vmbackup.vma.plugins.module_utils.vma.layout import Config
from ansible_collections.vmbackup.vma.tests.machines import storage_guest

ROOT = pathlib.Path(__file__).resolve().parents[3]
MIB = 1 << 20
# The second is of no size that volumes have: its last block is cut.
DISKS = {"drive-scsi0": 5 * MIB, "drive-virtio1": 2 * MIB + 512}
CONF = b"""\
boot: order=scsi0
memory: 64
name: web
scsi0: local-lvm:vm-100-disk-0,size=5M
scsihw: virtio-scsi-pci
smbios1: uuid=6f1c2f0e-0000-4000-8000-000000000001
virtio1: local-lvm:vm-100-disk-1,size=2M
#qmdump#map:scsi0:drive-scsi0:local-lvm:raw:
#qmdump#map:virtio1:drive-virtio1:local-lvm:raw:
"""
LEFT_OF_A_DOMAIN = "rm -rf /var/lib/vmbackup-vma/restored /root/archive.vma"

pytestmark = pytest.mark.timeout(1200)


class Storage(t.NamedTuple):
    """Volumes of one kind: how the playbook is told of them, where they are, and how one looks for them."""

    option: str
    folder: str
    make: str
    listing: str
    make_volume: str
    remove_all: str


LVM = Storage(
    option="lvm:guests",
    folder="/dev/guests",
    make="vgcreate -q -y guests /dev/vda",
    listing="lvs --noheadings -o lv_name,lv_uuid guests",
    make_volume="lvcreate -q -y -Wn -L {mib}M -n {name} guests",
    remove_all="lvremove -q -y guests",
)
ZFS = Storage(
    option="zfs:tank/guests",
    folder="/dev/zvol/tank/guests",
    make="zpool create tank /dev/vdb && zfs create tank/guests",
    listing="zfs list -H -r -t volume -o name,guid tank/guests",
    make_volume="zfs create -s -V {mib}M tank/guests/{name} && udevadm settle",
    remove_all="zfs destroy -r tank/guests && zfs create tank/guests",
)
STORAGES = {"lvm": LVM, **({"zfs": ZFS} if os.environ.get("VMBACKUP_STORAGE_ZFS") == "1" else {})}


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> t.Iterator[storage_guest.Guest]:
    """A host with volumes and libvirt."""
    lacking = storage_guest.missing_tools()
    if shutil.which("ansible-playbook") is None:
        lacking.append("ansible-playbook of ansible-core")
    if lacking:
        pytest.skip(f"a host with volumes needs {', '.join(lacking)}")
    folder = tmp_path_factory.mktemp("machine")
    with storage_guest.running(folder / "guest", zfs="zfs" in STORAGES) as guest:
        guest.run("virtlogd -d && libvirtd -d")
        for storage in STORAGES.values():
            guest.run(storage.make)
        yield guest


class Host:
    """The host, and what a user sees and does there."""

    def __init__(self, guest: storage_guest.Guest, storage: Storage, folder: pathlib.Path) -> None:
        self._guest = guest
        self._storage = storage
        self._folder = folder
        self.contents = {name: random.Random(name).randbytes(size) for name, size in DISKS.items()}
        (folder / "ansible_collections/vmbackup").mkdir(parents=True)
        (folder / "ansible_collections/vmbackup/vma").symlink_to(ROOT)

    def run(self, command: str) -> str:
        """What a command says."""
        return self._guest.run(command).stdout.decode()

    def bring_archive(self, *, damaged: bool = False) -> None:
        """Put the archive to be restored on the host."""
        archive = self._folder / "archive.vma"
        devices = []
        for name, content in self.contents.items():
            image = self._folder / f"{name}.raw"
            image.write_bytes(content)
            devices.append(create.SourceDevice(name, str(image)))
        create.create(str(archive), devices, [Config("qemu-server.conf", CONF)])
        packed = bytearray(archive.read_bytes())
        if damaged:
            packed[len(packed) // 2] ^= 1
        self._guest.run("cat >/root/archive.vma", stdin=bytes(packed))

    def restore(self, *options: str, **variables: t.Any) -> subprocess.CompletedProcess[str]:
        """Run the playbook as a user does."""
        asked = {
            "restore_vm_archive": "/root/archive.vma",
            "restore_vm_storage": self._storage.option,
            "restore_vm_hypervisor": "qemu",
            **variables,
        }
        settings = {
            "ANSIBLE_COLLECTIONS_PATH": str(self._folder),
            "ANSIBLE_NOCOLOR": "1",
            # A task is one connection instead of several, and the host's emulated processor has less to do.
            "ANSIBLE_PIPELINING": "1",
            "ANSIBLE_TIMEOUT": "60",
        }
        environment = {**os.environ, **settings}
        inventory = str(self._guest.folder / "inventory.yml")
        playbook = ["ansible-playbook", "vmbackup.vma.restore_vm", "-i", inventory, "-e", json.dumps(asked), *options]
        return subprocess.run(playbook, check=False, capture_output=True, text=True, env=environment)

    def volumes(self) -> dict[str, str]:
        """The volumes: what identifies each, by its name."""
        rows = [line.split() for line in self.run(self._storage.listing).splitlines()]
        return {name.rpartition("/")[2]: identity for name, identity in rows}

    def make_volume(self, name: str, mib: int) -> None:
        """Make a volume that is there before."""
        self.run(self._storage.make_volume.format(name=name, mib=mib))

    def path(self, name: str) -> str:
        """Where a volume is."""
        return f"{self._storage.folder}/{name}"

    def first_bytes(self, name: str, size: int) -> str:
        """The SHA-256 of a volume's first bytes."""
        return self.run(f"head -c {size} {self.path(name)} | sha256sum").split()[0]

    def has_contents(self) -> bool:
        """Whether each volume holds its disk."""
        return all(
            self.first_bytes(name.replace("drive-", "web-"), len(content)) == hashlib.sha256(content).hexdigest()
            for name, content in self.contents.items()
        )

    def domains(self) -> list[str]:
        """The names of all domains."""
        return self.run("virsh -q list --all --name").split()


@pytest.fixture(params=list(STORAGES))
def host(request: pytest.FixtureRequest, machine: storage_guest.Guest, tmp_path: pathlib.Path) -> t.Iterator[Host]:
    """The host without any VM, and afterwards again."""
    storage = STORAGES[request.param]
    there = Host(machine, storage, tmp_path)
    there.bring_archive()
    yield there
    for domain in there.domains():
        with contextlib.suppress(storage_guest.MachineError):
            there.run(f"virsh -q destroy {domain}")
        there.run(f"virsh -q undefine {domain}")
    there.run(f"{LEFT_OF_A_DOMAIN}; {storage.remove_all}")


def test_a_vm_gets_volumes_that_are_only_replaced_when_told_to(host: Host) -> None:
    done = host.restore()
    assert done.returncode == 0, done.stdout
    assert "web is restored to" in done.stdout
    assert host.has_contents()
    assert host.run("virsh -q domblklist web").split()[1::2] == [host.path("web-scsi0"), host.path("web-virtio1")]
    host.run("virsh -q start --paused web")
    assert host.run("virsh -q domstate web").strip() == "paused"

    before = host.volumes()
    assert set(before) == {"web-scsi0", "web-virtio1"}
    host.run("virsh -q destroy web && virsh -q undefine web")
    host.run(f"printf damage | dd of={host.path('web-scsi0')} bs=1 seek=12345 conv=notrunc,fsync status=none")
    refused = host.restore()
    assert refused.returncode != 0
    assert f"{host.path('web-scsi0')}, {host.path('web-virtio1')} would be overwritten" in refused.stdout
    assert not host.has_contents()

    done = host.restore(restore_vm_overwrite=True)
    assert done.returncode == 0, done.stdout
    assert host.has_contents()
    assert (host.volumes(), host.domains()) == (before, ["web"])


def test_what_a_damaged_archive_was_given_goes_and_what_was_there_stays(host: Host) -> None:
    host.make_volume("web-virtio1", 4)
    before = host.volumes()
    host.bring_archive(damaged=True)
    done = host.restore(restore_vm_overwrite=True)
    assert done.returncode != 0
    assert "web is not restored:" in done.stdout
    assert (host.volumes(), host.domains()) == (before, [])


def test_a_volume_of_another_domain_is_not_overwritten(host: Host) -> None:
    host.make_volume("web-scsi0", 8)
    definition = f"""
    <domain type="qemu"><name>other</name><memory unit="MiB">64</memory><os><type arch="x86_64">hvm</type></os>
      <devices><disk type="block" device="disk">
        <source dev="$(realpath {host.path("web-scsi0")})"/><target dev="vda" bus="virtio"/>
      </disk></devices>
    </domain>"""
    host.run(f"cat >/tmp/other.xml <<END\n{definition}\nEND\nvirsh -q define /tmp/other.xml")
    before = host.volumes()
    refused = host.restore(restore_vm_overwrite=True)
    assert refused.returncode != 0
    assert f"{host.path('web-scsi0')} belongs to the domain other" in refused.stdout
    assert (host.volumes(), host.domains()) == (before, ["other"])
