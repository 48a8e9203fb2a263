# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a qemu-server.conf says of a VM, and what is made of it: the options of vm_boot, and a libvirt domain."""

from __future__ import annotations

import pathlib
import typing as t

import pytest

from ansible_collections.vmbackup.vma.plugins.module_utils.host import guest_config
from ansible_collections.vmbackup.vma.plugins.module_utils.host.domain import Domain
from ansible_collections.vmbackup.vma.plugins.module_utils.vma.errors import RequestError
from ansible_collections.vmbackup.vma.plugins.plugin_utils import guest
from ansible_collections.vmbackup.vma.plugins.plugin_utils.boot_options import Image, boot_options
from ansible_collections.vmbackup.vma.plugins.plugin_utils.domain_xml import Options, Target, domain_xml

VECTOR = (pathlib.Path(__file__).resolve().parents[2] / "vectors/qemu-server.conf").read_text(encoding="utf-8")

FULL = """\
# a description%3A of two words
agent: enabled=1,fstrim_cloned_disks=1
bios: ovmf
boot: order=virtio1;scsi0;ide2;net0
cores: 4
cpu: host
efidisk0: local-lvm:vm-100-disk-2,efitype=4m,size=528K
hostpci0: 0000:01:00.0
ide2: none,media=cdrom
localtime: 1
machine: pc-q35-8.1+pve0
memory: 4096
name: full
net0: e1000=BC:24:11:00:00:01,bridge=vmbr0,tag=20,link_down=1
net1: model=virtio,macaddr=BC:24:11:00:00:02,bridge=vmbr1
ostype: l26
scsi0: local-lvm:vm-100-disk-0,size=8G,discard=on,cache=writeback
scsi2: local-lvm:vm-100-disk-3,backup=0,size=1T
scsihw: virtio-scsi-single
serial0: socket
smbios1: uuid=6f1c2f0e-0000-4000-8000-000000000001,base64=1,manufacturer=QUNNRQ==
sockets: 2
tpmstate0: local-lvm:vm-100-disk-4,version=v2.0
vcpus: 6
virtio1: local-lvm:vm-100-disk-1,size=8G
#qmdump#map:scsi0:drive-scsi0:local-lvm:raw:
#qmdump#map:virtio1:drive-virtio1:local-lvm:raw:
#qmdump#map:efidisk0:drive-efidisk0:local-lvm:raw:
#qmdump#map:tpmstate0:drive-tpmstate0-backup:local-lvm:raw:

[snapshot]
memory: 1
scsi3: local-lvm:vm-100-disk-9
"""
DEVICES = ["drive-scsi0", "drive-virtio1", "drive-efidisk0", "drive-tpmstate0-backup", "vmstate"]


def images(*names: str) -> dict[str, Image]:
    return {name: Image(f"/scratch/{name}.raw") for name in names}


def paths(options: dict[str, t.Any]) -> list[tuple[str, str]]:
    return [(disk["path"].rsplit("/", 1)[1], disk["bus"]) for disk in options["disks"]]


def test_what_proxmox_wrote() -> None:
    vm = guest.parse(VECTOR, ["drive-scsi0"])
    assert (vm.name, vm.memory, vm.cores, vm.agent, vm.is_uefi) == ("vector-vm", 2048, 2, True, False)
    assert vm.nics == (guest.Nic("net0", "virtio", "BC:24:11:00:00:01", "vmbr0"),)
    options = boot_options(vm, images("drive-scsi0"))
    assert paths(options) == [("drive-scsi0.raw", "scsi")]
    assert (options["firmware"], options["machine"], options["scsi_controller"]) == ("bios", "pc", "virtio-scsi-single")
    assert options["notes"] == []


def test_every_setting_counts() -> None:
    options = boot_options(guest.parse(FULL, DEVICES), images(*DEVICES[:4]))
    # The first to boot comes first; no disk of a section, and none that is left out of backups
    assert paths(options) == [("drive-virtio1.raw", "virtio"), ("drive-scsi0.raw", "scsi")]
    assert options["firmware"] == "uefi"
    assert options["efi_vars"] == "/scratch/drive-efidisk0.raw"
    assert options["machine"] == "pc-q35-8.1+pve0"
    assert (options["memory"], options["cores"], options["agent"]) == (4096, 6, True)
    assert options["network_card"] == "e1000"
    assert options["notes"] == [
        "scsi2 is not in the archive: it is left out of backups",
        "the TPM's state is not restored: what is locked by it asks for its recovery key",
        "hostpci0 is not restored: it is the host's",
    ]


@pytest.mark.parametrize(
    ("boot", "first"),
    [
        ("boot: order=virtio0;scsi1", ["virtio0", "scsi1"]),
        ("boot: order=net0;sata0", ["sata0"]),
        ("boot: cdn\nbootdisk: scsi1", ["scsi1"]),
        ("boot: c\nbootdisk: virtio0", ["virtio0"]),
        ("boot: legacy=dc\nbootdisk: sata0", ["sata0"]),
        ("bootdisk: sata0", ["sata0"]),
        # A disk that is not there any more, and none at all: the first in Proxmox VE's own order
        ("boot: cdn\nbootdisk: scsi7", ["ide0"]),
        ("", ["ide0"]),
        ("boot: order=", []),
    ],
)
def test_the_disks_come_in_the_order_in_which_they_boot(boot: str, first: list[str]) -> None:
    drives = ["ide0", "scsi1", "scsi2", "scsi10", "virtio0", "sata0"]
    settings = [f"{drive}: local:vm-{drive}" for drive in sorted(drives)]
    text = "\n".join([boot, *settings, "net0: virtio,bridge=vmbr0"])
    names = [drive.name for drive in guest.parse(text, [f"drive-{drive}" for drive in drives]).drives]
    assert names == first + [drive for drive in drives if drive not in first]


@pytest.mark.parametrize(
    ("boot", "tried"),
    [
        ("boot: order=scsi1;net0", ["drive-scsi1"]),
        ("boot: order=scsi1;scsi0", ["drive-scsi1", "drive-scsi0"]),
        ("", ["drive-scsi0"]),
        # Nothing that the archive holds is named: the VM would not boot at all
        ("boot: order=scsi2", ["drive-scsi0", "drive-scsi1"]),
    ],
)
def test_only_what_the_vm_boots_from_is_tried(boot: str, tried: list[str]) -> None:
    devices = ["drive-scsi0", "drive-scsi1"]
    options = boot_options(guest.parse(f"{boot}\nscsi0: a:b\nscsi1: a:c", devices), images(*devices))
    assert [disk["path"] for disk in options["disks"] if disk["boot"]] == [f"/scratch/{name}.raw" for name in tried]
    assert len(options["disks"]) == len(devices)


def test_a_boot_disk_that_is_not_in_the_archive_is_named() -> None:
    vm = guest.parse("boot: order=scsi0\nscsi0: a:b,backup=0\nscsi1: a:c", ["drive-scsi1"])
    assert "the VM boots from scsi0, and the archive holds none of these" in vm.missing


def test_efi_variables_that_are_not_in_the_archive() -> None:
    text = "bios: ovmf\nscsi0: local:1"
    for devices in (["drive-efidisk0", "drive-scsi0"], ["drive-scsi0"]):
        options = boot_options(guest.parse(text, devices), images(*devices))
        assert options["firmware"] == "uefi"
        assert bool(options["efi_vars"]) is (options["notes"] == []) is ("drive-efidisk0" in devices)
    assert options["notes"] == [
        "the EFI variables are empty, the VM's own boot entries among them: the archive has none"
    ]


def test_without_a_configuration_the_devices_tell() -> None:
    options = boot_options(guest.parse("", ["drive-sata1", "web-root"]), images("drive-sata1", "web-root"))
    assert paths(options) == [("web-root.raw", "virtio"), ("drive-sata1.raw", "sata")]
    assert options["notes"] == ["web-root is taken for virtio0: nothing tells its drive"]
    assert options["memory"] == 512


@pytest.mark.parametrize(
    ("text", "device"),
    [
        ("", "drive-data1"),
        ("#qmdump#map:data1:drive-data1:local:raw:", "drive-data1"),
        ("#qmdump#map:unused0:disk:local:raw:", "disk"),
    ],
)
def test_a_disk_whose_drive_cannot_be_is_not_lost(text: str, device: str) -> None:
    options = boot_options(guest.parse(f"scsi0: a:b\n{text}", ["drive-scsi0", device]), images("drive-scsi0", device))
    assert paths(options) == [("drive-scsi0.raw", "scsi"), (f"{device}.raw", "virtio")]
    assert options["notes"] == [f"{device} is taken for virtio0: nothing tells its drive"]


@pytest.mark.parametrize(
    ("line", "key", "expected"),
    [
        ("memory: current=3072", "memory", 3072),
        ("machine: type=q35,viommu=virtio", "machine", "q35"),
        ("machine: viommu=virtio", "machine", "pc"),
        ("agent: 0", "agent", False),
        ("agent: enabled=0", "agent", False),
        ("scsihw: unheard-of", "scsi_controller", "lsi"),
        ("net0: ne2k_pci=BC:24:11:00:00:01", "network_card", "e1000"),
        ("vcpus: 0", "cores", 1),
    ],
)
def test_single_settings(line: str, key: str, expected: object) -> None:
    assert boot_options(guest.parse(line, ["drive-scsi0"]), images("drive-scsi0"))[key] == expected


@pytest.mark.parametrize(
    ("text", "devices", "message"),
    [("arch: aarch64", ["drive-scsi0"], "the VM is for aarch64"), ("memory: 512", ["vmstate"], "holds no disk")],
)
def test_what_is_not_booted(text: str, devices: list[str], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        boot_options(guest.parse(text, devices), images(*devices))


# --- domains --------------------------------------------------------------------------------------------------------


def test_a_domain_leads_back_to_its_configuration() -> None:
    targets = {name: Target(f"/dev/vg0/{name}") for name in DEVICES[:2]}
    targets["drive-efidisk0"] = Target("/var/lib/libvirt/qemu/nvram/full_VARS.fd")
    result = domain_xml(guest.parse(FULL, DEVICES[:3]), targets, Options(networks={"vmbr1": "lan"}))
    domain = Domain.parse(result.xml)
    back = guest.parse(guest_config.guest_config(domain, 100).text, DEVICES[:3])
    there = guest.parse(FULL, DEVICES[:3])
    for field in (
        "name",
        "uuid",
        "memory",
        "cores",
        "is_uefi",
        "agent",
        "local_time",
        "serials",
        "cpu",
        "efi",
        "smbios",
    ):
        assert getattr(back, field) == getattr(there, field), field
    # libvirt counts disks on virtio from their letters, and has no IDE on a q35
    assert [drive.name for drive in back.drives if drive.device] == ["virtio1", "scsi0"]
    assert back.boot == ("virtio1", "scsi0", "sata2", "net0")
    assert [(nic.model, nic.mac) for nic in back.nics] == [(nic.model, nic.mac) for nic in there.nics]
    assert [(nic.bridge, nic.network) for nic in domain.nics] == [("vmbr0", None), (None, "lan")]
    disk = domain.disks[1]
    assert disk.source is not None
    assert (disk.source.kind, disk.source.path, disk.discard, disk.cache) == (
        "block",
        "/dev/vg0/drive-scsi0",
        True,
        "writeback",
    )
    assert {
        "net0 is not in VLAN 20: connect it to a bridge that is",
        "ide2 is on bus sata: libvirt has no ide on a q35",
        "the machine is the host's newest: pc-q35-8.1+pve0 may be missing there",
    } <= set(result.unmapped)


def test_a_copy_has_an_identity_of_its_own() -> None:
    vm = guest.parse(VECTOR, ["drive-scsi0"])
    targets = {"drive-scsi0": Target("/images/web.qcow2", "qcow2")}
    xml = domain_xml(vm, targets, Options(name="copy", keep_identity=False, hypervisor="qemu")).xml
    assert "<name>copy</name>" in xml
    assert "uuid" not in xml
    assert "mac address" not in xml
    assert '<domain type="qemu">' in xml
    assert "<cpu" not in xml
    assert 'type="qcow2"' in xml


def test_two_buses_with_the_same_letters_share_them() -> None:
    vm = guest.parse("name: a\nscsi0: a:b\nsata0: a:c\nscsi30: a:d", ["drive-scsi0", "drive-sata0", "drive-scsi30"])
    targets = {name: Target(f"/images/{name}") for name in ("drive-scsi0", "drive-sata0", "drive-scsi30")}
    disks = Domain.parse(
        domain_xml(vm, targets, Options(keep_identity=False)).xml.replace(
            "<memory", "<uuid>6f1c2f0e-0000-4000-8000-000000000001</uuid><memory"
        )
    ).disks
    assert {(disk.target, disk.bus) for disk in disks} == {("sda", "scsi"), ("sdae", "scsi"), ("sdb", "sata")}


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "has no name"), ("name: a/b", "cannot be the name"), ("name: a\narch: aarch64", "for aarch64")],
)
def test_what_is_not_defined(text: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        domain_xml(guest.parse(text, []), {}, Options())


def test_texts_are_escaped() -> None:
    vm = guest.parse("# a </description> & \x07bell\nname: web", [])
    assert (
        Domain.parse(
            domain_xml(vm, {}, Options()).xml.replace(
                "<memory", "<uuid>6f1c2f0e-0000-4000-8000-000000000001</uuid><memory"
            )
        ).description
        == "a </description> & bell"
    )
