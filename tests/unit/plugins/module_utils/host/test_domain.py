# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What virsh dumpxml prints, as values."""

from __future__ import annotations

import pytest

from ansible_collections.vmbackup.vma.plugins.module_utils.host.domain import (
    Cpu,
    Disk,
    Domain,
    Firmware,
    Host,
    Nic,
    Nvram,
    Rng,
    Source,
    Topology,
    Tpm,
    Video,
    Watchdog,
)
from ansible_collections.vmbackup.vma.plugins.module_utils.vma.errors import RequestError
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.host.domains import (
    CEPH,
    DEBIAN,
    OLD,
    UUID,
    WINDOWS,
    disk,
    make,
)


def test_debian_with_secure_boot() -> None:
    assert Domain.parse(DEBIAN) == Domain(
        name="web",
        uuid=UUID,
        title="Web server",
        description="Serves the shop.\nAsk: ops@example.com, 100% theirs",
        os_id="http://debian.org/debian/12",
        machine="pc-q35-7.2",
        memory=4 << 30,
        current_memory=2 << 30,
        vcpus=4,
        current_vcpus=4,
        cpu=Cpu("host-passthrough"),
        firmware=Firmware(
            kind="uefi",
            secure_boot=True,
            enrolled_keys=True,
            loader="/usr/share/OVMF/OVMF_CODE_4M.ms.fd",
            nvram=Nvram("/var/lib/libvirt/qemu/nvram/web_VARS.fd", "raw", "/usr/share/OVMF/OVMF_VARS_4M.ms.fd"),
        ),
        boot=("hd",),
        disks=(
            Disk(
                "vda",
                "virtio",
                source=Source("file", path="/var/lib/libvirt/images/web.qcow2"),
                format="qcow2",
                serial="web root/1",
                cache="none",
                discard=True,
            ),
            Disk("sda", "sata", "cdrom", source=Source("file", path="/srv/iso/debian-12.iso"), readonly=True),
        ),
        nics=(
            Nic("bridge", "virtio", "52:54:00:6d:90:01", bridge="br0", tags=(42,)),
            Nic("network", "virtio", "52:54:00:6d:90:02", network="default", link_down=True),
        ),
        tpm=Tpm("2.0", "emulator", "tpm-crb"),
        agent=True,
        serials=1,
        videos=(Video("virtio"),),
        graphics=("spice",),
        sounds=("ich9",),
        rngs=(Rng("random", "/dev/urandom"),),
        watchdogs=(Watchdog("itco"),),
        tablet=True,
        extras=("redirdev spicevmc (2 times)",),
    )


def test_windows_on_virtio_scsi() -> None:
    domain = Domain.parse(WINDOWS)
    assert (domain.topology, domain.vcpus, domain.current_vcpus) == (Topology(1, 4, 2), 8, 4)
    assert (domain.cpu, domain.clock, domain.hyperv, domain.balloon) == (Cpu("host-model"), "localtime", True, False)
    assert (domain.firmware, domain.tpm, domain.agent) == (Firmware(), None, False)
    assert (domain.scsi_controllers, domain.videos) == (("virtio-scsi",), (Video("qxl", 2),))
    assert domain.disks == (
        Disk(
            "sda",
            "scsi",
            source=Source("block", path="/dev/vg0/dc01"),
            wwn="5000c50015ea71aa",
            boot_order=2,
            cache="none",
            ssd=True,
        ),
        Disk("sdb", "sata", "cdrom", readonly=True, boot_order=1),
    )


def test_what_a_domain_of_old_lacks_is_what_libvirt_means_by_it() -> None:
    domain = Domain.parse(OLD)
    assert (domain.memory, domain.current_memory) == (512 << 20, 512 << 20)
    assert (domain.cpu, domain.topology, domain.acpi, domain.arch) == (Cpu(), None, False, "i686")
    assert domain.boot == ("cdrom", "hd", "network")
    assert domain.nics == (Nic("user", None, "52:54:00:6d:90:04"),)
    assert [disk.obstacle for disk in domain.disks] == [None, "it is a cdrom drive", "it is a floppy drive"]


def test_disks_of_many_kinds() -> None:
    rbd, volume, nvme = Domain.parse(CEPH).disks
    assert rbd.source == Source(
        "network", protocol="rbd", name="pool/db", hosts=(Host("mon1", 6789), Host("mon2")), user="libvirt"
    )
    assert rbd.source is not None
    assert rbd.source.location == "rbd:pool/db"
    assert volume.source is not None
    assert volume.source.location == "fast/db-log"
    assert nvme.obstacle == "its source of type nvme can be read by its guest alone"


def test_what_has_no_field_is_named() -> None:
    assert Domain.parse(CEPH).extras == (
        "limits and pinning of CPUs (cputune)",
        "memory backing (memoryBacking)",
        "arguments for QEMU (qemu:commandline)",
        "hostdev pci 0000:01:00.0",
        "hostdev usb 1050:0407",
        "filesystem /srv/share as share",
        "vsock virtio",
    )


@pytest.mark.parametrize(
    ("xml", "words"),
    [
        ("<hostdev type='mdev'><source><address uuid='a-b'/></source></hostdev>", "hostdev mdev a-b"),
        ("<hostdev type='scsi'><source><adapter name='scsi_host0'/></source></hostdev>", "hostdev scsi scsi_host0"),
        ("<hostdev type='usb'><source><address bus='1' device='4'/></source></hostdev>", "hostdev usb 1:4"),
        ("<hostdev mode='capabilities'/>", "hostdev"),
        ("<smartcard mode='host'/>", "smartcard host"),
        ("<console><target type='virtio'/></console>", "a console by virtio"),
        ("<panic model='isa'/>", "panic isa"),
        ("<iommu model='intel'/>", "iommu intel"),
        ("<thing-of-2030/>", "thing-of-2030"),
    ],
)
def test_extras(xml: str, words: str) -> None:
    assert Domain.parse(make(xml)).extras == (words,)


@pytest.mark.parametrize(
    ("inside", "expected"),
    [
        ("<readonly/><shareable/><transient/>", {"readonly": True, "shareable": True, "transient": True}),
        ("<encryption format='luks'/>", {"encrypted": True}),
        ("<iotune><total_iops_sec>9</total_iops_sec></iotune>", {"limited": True}),
        ("<boot order='3'/>", {"boot_order": 3}),
    ],
)
def test_properties_of_disks(inside: str, expected: dict[str, object]) -> None:
    (found,) = Domain.parse(make(disk("vda", "virtio", inside))).disks
    assert {name: getattr(found, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("target", "bus"), [("vda", "virtio"), ("hda", "ide"), ("sdb", "scsi"), ("xvda", "xen"), ("fda", "fdc")]
)
def test_a_bus_that_is_not_told(target: str, bus: str) -> None:
    (found,) = Domain.parse(make(f"<disk><source file='/a'/><target dev='{target}'/></disk>")).disks
    assert found.bus == bus


@pytest.mark.parametrize(
    ("source", "kind"), [("", "file"), ("<source/>", "file"), ("<source dev=''/>", "block")], ids=repr
)
def test_a_disk_without_source(source: str, kind: str) -> None:
    (found,) = Domain.parse(make(f"<disk type='{kind}'>{source}<target dev='vda'/></disk>")).disks
    assert found.obstacle == "it has no source"


@pytest.mark.parametrize(
    ("os", "firmware"),
    [
        ("<type>hvm</type>", Firmware()),
        (
            "<type>hvm</type><loader type='rom'>/usr/share/seabios/bios.bin</loader>",
            Firmware(loader="/usr/share/seabios/bios.bin"),
        ),
        (
            "<type>hvm</type><loader type='rom'>/usr/share/ovmf/OVMF.fd</loader>",
            Firmware("uefi", loader="/usr/share/ovmf/OVMF.fd"),
        ),
        ("<type>hvm</type><loader type='pflash'>/fw/CODE.fd</loader>", Firmware("uefi", loader="/fw/CODE.fd")),
        (
            "<type>hvm</type><nvram template='/usr/share/edk2/ovmf/OVMF_VARS.secboot.fd'>/n</nvram>",
            Firmware("uefi", enrolled_keys=True, nvram=Nvram("/n", "raw", "/usr/share/edk2/ovmf/OVMF_VARS.secboot.fd")),
        ),
        (
            "<type>hvm</type><nvram type='file' format='qcow2'><source file='/n.qcow2'/></nvram>",
            Firmware("uefi", nvram=Nvram("/n.qcow2", "qcow2")),
        ),
    ],
)
def test_firmware(os: str, firmware: Firmware) -> None:
    assert Domain.parse(make(os=os)).firmware == firmware


@pytest.mark.parametrize(
    ("interface", "nic"),
    [
        (
            "<interface type='user'><vlan><tag id='1' nativeMode='tagged'/><tag id='7'/></vlan></interface>",
            Nic("user", tags=(1, 7), trunk=True, native_tag=1),
        ),
        (
            "<interface type='network'><source network='lan' bridge='br0'/><bandwidth/><filterref/></interface>",
            Nic("network", network="lan", bridge="br0", limited=True, filtered=True),
        ),
    ],
)
def test_network_interfaces(interface: str, nic: Nic) -> None:
    assert Domain.parse(make(interface)).nics == (nic,)


def test_smbios_entries_count_only_where_the_guest_sees_them() -> None:
    entries = "<sysinfo type='smbios'><system><entry name='serial'>ds=nocloud</entry></system></sysinfo>"
    seen = "<type>hvm</type><smbios mode='sysinfo'/>"
    assert Domain.parse(make(before=entries)).smbios == {}
    assert Domain.parse(make(before=entries, os=seen)).smbios == {"serial": "ds=nocloud"}


@pytest.mark.parametrize(
    ("unit", "size"),
    [("", 1024), (" unit='b'", 1), (" unit='KB'", 1000), (" unit='M'", 1 << 20), (" unit='TiB'", 1 << 40)],
)
def test_units_of_memory(unit: str, size: int) -> None:
    assert Domain.parse(make().replace("<memory>1048576", f"<memory{unit}>3")).memory == 3 * size


@pytest.mark.parametrize(
    ("xml", "message"),
    [
        ("", "cannot be parsed: no element found"),
        ("<domain", "cannot be parsed: unclosed token"),
        ("\ud800", "cannot be parsed"),
        ("error: failed to get domain 'web'", "cannot be parsed: syntax error"),
        ("<network><name>default</name></network>", "expected <domain>, found <network>"),
        ("<!DOCTYPE domain [<!ENTITY a 'b'>]><domain/>", "has a document type"),
        (make(os="<type>exe</type>"), "domain m is no full virtual machine: its os/type is 'exe'"),
        (make(name=" "), "has no name"),
        (make().replace(f"<uuid>{UUID}</uuid>", ""), "has no uuid"),
        (make().replace(UUID, "me"), "the domain's uuid is none: 'me'"),
        (make().replace("<memory>1048576</memory>", ""), "has no memory"),
        (make().replace("1048576", "-1"), "has a memory that is no number: '-1'"),
        (make().replace("1048576", "\u0661"), "has a memory that is no number"),
        (make().replace("<memory>", "<memory unit='pages'>"), "the unit 'pages'"),
        (make(before="<vcpu>many</vcpu>"), "has a vcpu that is no number: 'many'"),
        (make("<disk><source file='/a.img'/></disk>"), "has a disk with source /a.img that has no target"),
        (make("<disk device='cdrom'><target dev=''/></disk>"), "has a cdrom with no source that has no target"),
        (make(disk("vda", "virtio", "<boot order='first'/>")), "has a boot order that is no number: 'first'"),
    ],
)
def test_what_is_no_domain_is_refused(xml: str, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        Domain.parse(xml)
    assert message in caught.value.message
    assert caught.value.remedy
