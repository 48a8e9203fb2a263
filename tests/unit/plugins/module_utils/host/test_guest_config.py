# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The qemu-server.conf of a domain: what Proxmox VE reads in it, and what it is told to be otherwise."""

from __future__ import annotations

import dataclasses
import re
import typing as t
import xml.sax.saxutils

import pytest
from hypothesis import example, given
from hypothesis import settings as run
from hypothesis import strategies as st

from ansible_collections.vmbackup.vma.plugins.module_utils.host.domain import Cpu, Disk, Domain, Nic, Source
from ansible_collections.vmbackup.vma.plugins.module_utils.host.guest_config import (
    Device,
    GuestConfig,
    Options,
    guest_config,
)
from ansible_collections.vmbackup.vma.plugins.module_utils.vma import vzdump
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

_B64 = r"[A-Za-z0-9+/]+={0,2}"
_DRIVE = (
    r"(?:none,media=cdrom|[A-Za-z][\w.-]*:vm-\d+-disk-\d+(?:,(?:cache=[a-z]+|discard=on|iothread=1|ro=1|ssd=1"
    r"|serial=(?:[\w.~-]|%[0-9A-F]{2}){1,60}|size=\d+[KMGT]?|wwn=0x[0-9a-f]{16}))*)"
)
_MAC = r"[0-9A-F]{2}(?::[0-9A-F]{2}){5}"
_NIC_OPTIONS = r"(?:,(?:bridge=[\w.-]+|link_down=1|mtu=\d+|queues=\d+|tag=\d+|trunks=\d+(?:;\d+)*))*"
_SYNTAX = {
    r"acpi|tablet": "0",
    r"agent|onboot": "1",
    r"arch": "aarch64",
    r"audio0": r"device=(?:ich9-intel-hda|intel-hda|AC97),driver=(?:spice|none)",
    r"balloon|cores|memory|sockets|vcpus": r"\d+",
    r"bios": "ovmf",
    r"boot": r"order=(?:(?:ide|sata|scsi|virtio|net)\d+)(?:;(?:ide|sata|scsi|virtio|net)\d+)*",
    r"cpu": r"[A-Za-z0-9_-]+",
    r"efidisk0": r"[\w.-]+:vm-\d+-disk-\d+,efitype=[24]m(?:,pre-enrolled-keys=1)?(?:,size=\d+[KMGT]?)?",
    r"localtime": "[01]",
    r"machine": "q35|virt",
    r"name": r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?\.)*[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?",
    r"net(?:\d|[12]\d|3[01])": rf"[a-z0-9_-]+(?:={_MAC})?{_NIC_OPTIONS}",
    r"ostype": "other|wxp|w2k|w2k3|w2k8|wvista|win7|win8|win10|win11|l26|solaris",
    r"rng0": r"source=/dev/(?:u?random|hwrng)(?:,max_bytes=\d+)?(?:,period=\d+)?",
    r"(?:ide[0-3]|sata[0-5]|scsi(?:\d|[12]\d|30)|virtio(?:\d|1[0-5]))": _DRIVE,
    r"scsihw": "lsi|megasas|pvscsi|virtio-scsi-pci",
    r"serial[0-3]": "socket",
    r"smbios1": rf"uuid=[0-9a-f-]{{36}}(?:(?:,[a-z]+={_B64})+,base64=1)?",
    r"tpmstate0": r"[\w.-]+:vm-\d+-disk-\d+,size=4M,version=v(?:1\.2|2\.0)",
    r"vga": "cirrus|qxl[234]?|none|serial0|std|virtio|virtio-gl|vmware",
    r"vmgenid": "1|[0-9a-fA-F-]{36}",
    r"watchdog": "model=(?:i6300esb|ib700),action=(?:reset|shutdown|poweroff|pause|none)",
}
"""What the schemas of Proxmox VE's qemu-server take, of the settings that occur here."""

NO_TPM_STATE = (
    "the TPM's state is not in the archive: add a new TPM after the restore, and have the recovery keys of BitLocker"
    " at hand"
)


def settings(config: GuestConfig) -> dict[str, str]:
    """The settings of a configuration, once it is sure that Proxmox VE and qmrestore take each line of it."""
    found: dict[str, str] = {}
    drives: dict[str, str] = {}
    for line in config.text.removesuffix("\n").split("\n"):
        mapped = re.fullmatch(r"#qmdump#map:(\S+):(\S+):(\S*):(\S*):", line)
        if mapped is not None:
            drives[mapped[1]] = mapped[2]
            assert mapped[4] == "raw"
        elif not line.startswith("#"):
            key, value = line.split(": ", 1)
            (syntax,) = [syntax for keys, syntax in _SYNTAX.items() if re.fullmatch(keys, key)]
            assert re.fullmatch(syntax, value), line
            assert key not in found
            found[key] = value
        else:
            assert re.fullmatch(r"#[ -~]*", line)
            assert not line.startswith(("#qmdump#", "#vzdump#"))
    # A disk without its device would point at the source's volume, a device without its disk fails the restore
    volumes = {key: value.split(",")[0] for key, value in found.items() if ":vm-" in value}
    assert set(volumes) == set(drives) == set(config.devices)
    assert len(set(volumes.values())) == len(volumes)
    assert drives == {drive: device.name for drive, device in config.devices.items()}
    parsed = vzdump.parse_config(config.text.encode())
    assert parsed["name"] == found["name"]
    assert {entry["drive"]: entry["device"] for entry in parsed["disks"] if "device" in entry} == drives
    return found


def convert(xml: str, vmid: int = 100, **options: t.Any) -> tuple[dict[str, str], tuple[str, ...]]:
    config = guest_config(Domain.parse(xml), vmid, Options(**options))
    return settings(config), config.unmapped


def test_debian_with_secure_boot() -> None:
    config = guest_config(Domain.parse(DEBIAN), 120, Options(disk_sizes={"vda": 8 << 30, "nvram": 540672}))
    settings(config)
    assert config.text.splitlines() == [
        "#Web server",
        "#Serves the shop.",
        "#Ask%3A ops@example.com, 100%25 theirs",
        "agent: 1",
        "audio0: device=ich9-intel-hda,driver=spice",
        "balloon: 2048",
        "bios: ovmf",
        "boot: order=virtio0",
        "cores: 1",
        "cpu: host",
        "efidisk0: local-lvm:vm-120-disk-1,efitype=4m,pre-enrolled-keys=1,size=528K",
        "machine: q35",
        "memory: 4096",
        "name: web",
        "net0: virtio=52:54:00:6D:90:01,bridge=br0,tag=42",
        "net1: virtio=52:54:00:6D:90:02,bridge=vmbr0,link_down=1",
        "ostype: l26",
        "rng0: source=/dev/urandom",
        "sata0: none,media=cdrom",
        "serial0: socket",
        f"smbios1: uuid={UUID}",
        "sockets: 4",
        "vga: virtio",
        "virtio0: local-lvm:vm-120-disk-0,cache=none,discard=on,serial=web%20root%2F1,size=8G",
        "#qmdump#map:virtio0:drive-virtio0:local-lvm:raw:",
        "#qmdump#map:efidisk0:drive-efidisk0:local-lvm:raw:",
    ]
    assert config.devices == {
        "virtio0": Device("drive-virtio0", "vda", 8 << 30),
        "efidisk0": Device("drive-efidisk0", "nvram", 540672),
    }
    assert config.unmapped == (
        "the machine is q35 of the restoring host's version: pc-q35-7.2 may be missing there",
        "the medium /srv/iso/debian-12.iso in sda is not in the archive: sata0 is empty",
        NO_TPM_STATE,
        "net1 is on bridge vmbr0: it was on network default, which is no bridge",
        "not in the configuration: redirdev spicevmc (2 times)",
    )


def test_windows_on_virtio_scsi() -> None:
    found, unmapped = convert(WINDOWS, disk_sizes={"sda": 1 << 40})
    assert found == {
        "balloon": "0",
        "boot": "order=sata1;scsi0;net0",
        "cores": "8",
        "cpu": "host",
        "machine": "q35",
        "memory": "8192",
        "name": "DC-01-prod",
        "net0": "e1000e=52:54:00:6D:90:03,bridge=vmbr1",
        "ostype": "win10",
        "sata1": "none,media=cdrom",
        "scsi0": "local-lvm:vm-100-disk-0,cache=none,size=1T,ssd=1,wwn=0x5000c50015ea71aa",
        "scsihw": "virtio-scsi-pci",
        "smbios1": f"uuid={UUID}",
        "sockets": "1",
        "vcpus": "4",
        "vga": "qxl2",
        "vmgenid": "3e0b0f1e-2222-4333-8444-000000000002",
    }
    assert "the name is DC-01-prod: Proxmox VE takes names of DNS only, and DC_01 (prod) is none" in unmapped
    assert not any("secret" in sentence for sentence in unmapped)


def test_a_guest_of_old() -> None:
    found, unmapped = convert(OLD)
    assert found == {
        "acpi": "0",
        "boot": "order=ide2;ide0;net0",
        "cores": "1",
        "cpu": "x86-64-v2-AES",
        "ide0": "local-lvm:vm-100-disk-0",
        "ide2": "none,media=cdrom",
        "memory": "512",
        "name": "legacy",
        "net0": "rtl8139=52:54:00:6D:90:04",
        "ostype": "other",
        "smbios1": f"uuid={UUID}",
        "sockets": "1",
        "tablet": "0",
        "vga": "cirrus",
    }
    assert "disk fda is not in the archive: it is a floppy drive" in unmapped
    assert "not in the configuration: sound sb16" in unmapped


def test_disks_in_ceph_and_what_belongs_to_the_host() -> None:
    found, unmapped = convert(CEPH)
    assert found["virtio0"] == "local-lvm:vm-100-disk-0"
    assert found["virtio1"] == "local-lvm:vm-100-disk-1"
    assert "virtio2" not in found
    assert found["net0"] == "virtio=52:54:00:6D:90:06,bridge=vmbr0,mtu=9000,queues=4"
    assert (found["cpu"], found["vga"]) == ("Skylake-Server-IBRS", "serial0")
    assert (found["rng0"], found["watchdog"]) == (
        "source=/dev/random,max_bytes=2048,period=500",
        "model=i6300esb,action=poweroff",
    )
    assert {
        "disk vdc is not in the archive: its source of type nvme can be read by its guest alone",
        "not in the configuration: hostdev pci 0000:01:00.0",
        "not in the configuration: hostdev usb 1050:0407",
        "not in the configuration: filesystem /srv/share as share",
        "not in the configuration: network interface 52:54:00:6d:90:05 of type hostdev",
        "not in the configuration: the CPU's features -hle +vmx",
    } < set(unmapped)


@pytest.mark.parametrize("name", ["vda", "virtio0"])
def test_an_excluded_disk_is_left_out_and_the_others_keep_their_drives(name: str) -> None:
    xml = make(disk("vda", "virtio") + disk("vdb", "virtio") + disk("vdc", "virtio"))
    config = guest_config(Domain.parse(xml), 100, Options(exclude=[name]))
    assert list(config.devices) == ["virtio1", "virtio2"]
    assert "virtio0" not in settings(config)
    assert "disk vda (virtio0) was excluded and is not in the archive" in config.unmapped


def test_a_disk_that_is_not_there_cannot_be_excluded() -> None:
    with pytest.raises(RequestError, match=r"domain m has no disk sdz to exclude; it has vda \(virtio0\)"):
        convert(make(disk("vda", "virtio")), exclude=["sdz"])


@pytest.mark.parametrize("name", ["nvram", "efidisk0"])
def test_uefi_variables_that_are_not_archived(name: str) -> None:
    found, unmapped = convert(DEBIAN, exclude=[name])
    assert found["bios"] == "ovmf"
    assert "efidisk0" not in found
    assert any(sentence.startswith("the UEFI variables are not in the archive") for sentence in unmapped)


@pytest.mark.parametrize(
    ("size", "setting"),
    [
        (540672, "efitype=4m,pre-enrolled-keys=1,size=528K"),
        (131072, "efitype=2m,size=128K"),
        (67108864, "efitype=4m,pre-enrolled-keys=1,size=64M"),
        (None, "efitype=4m,pre-enrolled-keys=1"),
    ],
)
def test_uefi_variables(size: int | None, setting: str) -> None:
    found, unmapped = convert(DEBIAN, disk_sizes={} if size is None else {"nvram": size})
    assert found["efidisk0"] == f"local-lvm:vm-100-disk-1,{setting}"
    assert any("UEFI variables have" in sentence for sentence in unmapped) == (size == 67108864)


@pytest.mark.parametrize(
    ("tpm", "setting"),
    [
        ("<backend type='emulator' version='2.0'/>", "local-lvm:vm-100-disk-0,size=4M,version=v2.0"),
        ("<backend type='emulator' version='1.2'/>", "local-lvm:vm-100-disk-0,size=4M,version=v1.2"),
        ("<backend type='emulator'><encryption secret='x'/></backend>", None),
        ("<backend type='passthrough'/>", None),
    ],
)
def test_tpm(tpm: str, setting: str | None) -> None:
    found, unmapped = convert(make(f"<tpm>{tpm}</tpm>"), tpm_state=True)
    assert found.get("tpmstate0") == setting
    assert any("add a new TPM" in sentence for sentence in unmapped) == (setting is None)


def many(bus: str, letters: str, count: int) -> str:
    names = [chr(97 + i) if i < 26 else "a" + chr(97 + i - 26) for i in range(count)]
    return "".join(disk(letters + name, bus) for name in names)


@pytest.mark.parametrize(
    ("bus", "letters", "count", "last"),
    [
        ("virtio", "vd", 16, "virtio15"),
        ("virtio", "vd", 17, "scsi16"),
        ("scsi", "sd", 31, "scsi30"),
        ("scsi", "sd", 32, "virtio0"),
        ("sata", "sd", 7, "ide0"),
        ("ide", "hd", 5, "sata4"),
        ("usb", "sd", 1, "sata0"),
        ("nvme", "nvme", 1, "sata0"),
    ],
)
def test_a_disk_that_finds_no_room_moves(bus: str, letters: str, count: int, last: str) -> None:
    found, unmapped = convert(make(many(bus, letters, count)))
    drives = [key for key, value in found.items() if ":vm-" in value]
    assert len(drives) == count
    assert last in drives
    assert any(f"is {last}: " in sentence for sentence in unmapped) == (not last.startswith(bus))


def test_disks_without_end() -> None:
    assert (
        len([v for v in convert(make(many("virtio", "vd", 52) + disk("sda", "sata")))[0].values() if ":vm-" in v]) == 53
    )
    with pytest.raises(RequestError, match="finds no drive: Proxmox VE has 57 for each VM"):
        convert(make(many("virtio", "vd", 52) + many("sata", "sd", 6)))


def test_two_disks_with_one_target() -> None:
    with pytest.raises(RequestError, match="two disks with the target vda"):
        convert(make(disk("vda", "virtio") * 2))


@pytest.mark.parametrize(
    ("model", "bus", "scsihw"),
    [
        ("<controller type='scsi' model='virtio-scsi'/>", "scsi", "virtio-scsi-pci"),
        ("<controller type='scsi' model='lsilogic'/>", "scsi", "lsi"),
        ("<controller type='scsi' model='lsisas1078'/>", "scsi", "megasas"),
        ("<controller type='scsi' model='vmpvscsi'/>", "scsi", "pvscsi"),
        ("<controller type='scsi' model='buslogic'/>", "scsi", "lsi"),
        ("<controller type='scsi'/>", "scsi", "lsi"),
        ("", "scsi", "lsi"),
        ("<controller type='scsi' model='virtio-scsi'/>", "sata", None),
    ],
)
def test_scsi_controllers(model: str, bus: str, scsihw: str | None) -> None:
    found, unmapped = convert(make(model + disk("sda", bus)))
    assert found.get("scsihw") == scsihw
    assert any("buslogic" in sentence for sentence in unmapped) == ("buslogic" in model)


@pytest.mark.parametrize(
    ("bus", "inside", "options", "said"),
    [
        ("virtio", "<readonly/>", ",ro=1", None),
        ("sata", "<readonly/>", "", "is read-only in the domain and writable here"),
        ("scsi", "<serial>a,b</serial>", ",serial=a%2Cb", None),
        ("scsi", f"<serial>{'x' * 21}</serial>", "", "has no serial number: "),
        ("scsi", "<wwn>5000C50015EA71AA</wwn>", ",wwn=0x5000c50015ea71aa", None),
        ("virtio", "<wwn>5000c50015ea71aa</wwn>", "", "has no WWN: "),
        ("virtio", "<shareable/>", "", "is shared with other VMs"),
        ("virtio", "<transient/>", "", "forgets its changes"),
        ("virtio", "<encryption format='luks'/>", "", "is encrypted by its hypervisor"),
        ("virtio", "<iotune/>", "", "has limits on I/O"),
    ],
)
def test_properties_of_disks(bus: str, inside: str, options: str, said: str | None) -> None:
    found, unmapped = convert(make(disk("sda", bus, inside)))
    assert found[f"{bus}0"] == f"local-lvm:vm-100-disk-0{options}"
    assert [sentence for sentence in unmapped if said and said in sentence] == [
        sentence for sentence in unmapped if sentence.startswith("disk sda ")
    ]


@pytest.mark.parametrize(
    ("interface", "bridges", "setting"),
    [
        ("<interface type='bridge'><source bridge='br0'/></interface>", {}, "rtl8139,bridge=br0"),
        ("<interface type='bridge'><source bridge='br0'/></interface>", {"br0": "vmbr7"}, "rtl8139,bridge=vmbr7"),
        ("<interface type='bridge'><source bridge='a bridge'/></interface>", {}, "rtl8139,bridge=vmbr0"),
        ("<interface type='network'><source network='lan'/></interface>", {"lan": "vmbr2"}, "rtl8139,bridge=vmbr2"),
        ("<interface type='network'><source network='lan' bridge='br1'/></interface>", {}, "rtl8139,bridge=br1"),
        ("<interface type='network'><source network='d' bridge='virbr0'/></interface>", {}, "rtl8139,bridge=vmbr0"),
        ("<interface type='direct'><source dev='eth0'/></interface>", {"eth0": "vmbr3"}, "rtl8139,bridge=vmbr3"),
        ("<interface type='user'><model type='virtio'/></interface>", {}, "virtio"),
        ("<interface type='user'><model type='virtio-transitional'/><mtu size='70000'/></interface>", {}, "virtio"),
        ("<interface type='user'><model type='netvsc'/></interface>", {}, "e1000"),
        ("<interface type='user'><mac address='01:00:5e:00:00:01'/></interface>", {}, "rtl8139"),
        (
            "<interface><vlan><tag id='5' nativeMode='tagged'/><tag id='7'/><tag id='8'/></vlan></interface>",
            {},
            "rtl8139,bridge=vmbr0,tag=5,trunks=7;8",
        ),
        ("<interface type='user'><vlan><tag id='4095'/></vlan></interface>", {}, "rtl8139"),
    ],
)
def test_network_interfaces(interface: str, bridges: dict[str, str], setting: str) -> None:
    assert convert(make(interface), bridges=bridges)[0]["net0"] == setting


def test_more_network_interfaces_than_proxmox_has() -> None:
    found, unmapped = convert(make("<interface type='user'/>" * 33))
    assert "net31" in found
    assert sum("network interface" in sentence for sentence in unmapped) == 1


@pytest.mark.parametrize(
    ("cpu", "arch", "setting", "said"),
    [
        (Cpu("host-passthrough"), "x86_64", "host", False),
        (Cpu("maximum"), "x86_64", "host", False),
        (Cpu("host-model"), "x86_64", "host", True),
        (Cpu(), "x86_64", "x86-64-v2-AES", False),
        (Cpu("custom", "EPYC-Rome"), "x86_64", "EPYC-Rome", False),
        (Cpu("custom", "Dhyana"), "x86_64", "x86-64-v2-AES", True),
        (Cpu("custom", "EPYC-Rome", ("+svm",)), "x86_64", "EPYC-Rome", True),
        (Cpu(), "aarch64", "max", False),
    ],
)
def test_processors(cpu: Cpu, arch: str, setting: str, said: bool) -> None:
    config = guest_config(dataclasses.replace(Domain.parse(make()), cpu=cpu, arch=arch))
    assert settings(config)["cpu"] == setting
    assert any("CPU" in sentence for sentence in config.unmapped) == said


@pytest.mark.parametrize(
    ("machine", "setting", "said"),
    [
        (None, None, None),
        ("pc", None, None),
        ("q35", "q35", None),
        ("pc-q35-9.2", "q35", "the machine is q35 of the restoring host's version"),
        ("pc-i440fx-jammy", None, "the machine is pc of the restoring host's version"),
        ("virt-9.2", "virt", "the machine is virt of the restoring host's version"),
        ("microvm", None, "the machine is pc: Proxmox VE has no microvm"),
    ],
)
def test_machines(machine: str | None, setting: str | None, said: str | None) -> None:
    config = guest_config(dataclasses.replace(Domain.parse(make()), machine=machine))
    assert settings(config).get("machine") == setting
    about = [sentence for sentence in config.unmapped if "machine" in sentence]
    assert len(about) == (said is not None)
    assert all(sentence.startswith(said or "") for sentence in about)


@pytest.mark.parametrize(
    ("devices", "os", "order"),
    [
        (disk("vda", "virtio") + disk("vdb", "virtio"), "", "order=virtio0"),
        (disk("vda", "virtio") + disk("vdb", "virtio", "<boot order='1'/>"), "", "order=virtio1"),
        (disk("vda", "virtio", "<boot order='12'/>") + "<interface type='user'><boot order='2'/></interface>", "",
         "order=net0;virtio0"),
        (disk("vda", "virtio") + disk("sda", "sata", device="cdrom"), "<boot dev='cdrom'/><boot dev='hd'/>",
         "order=sata0;virtio0"),
        ("<interface type='user'/>", "<boot dev='fd'/><boot dev='network'/>", "order=net0"),
        ("", "<boot dev='network'/><boot dev='cdrom'/>", None),
    ],
)  # fmt: skip
def test_boot_order(devices: str, os: str, order: str | None) -> None:
    found, unmapped = convert(make(devices, os=f"<type>hvm</type>{os}"))
    assert found.get("boot") == order
    assert any("no boot order" in sentence for sentence in unmapped) == (order is None)


@pytest.mark.parametrize(
    ("video", "setting"),
    [
        ("", "none"),
        ("<serial type='pty'/>", "serial0"),
        ("<video><model type='vga'/></video>", "std"),
        ("<video><model type='virtio'><acceleration accel3d='yes'/></model></video>", "virtio-gl"),
        ("<video><model type='qxl'/></video>" * 3, "qxl3"),
        ("<video><model type='qxl' heads='9'/></video>", "qxl4"),
        ("<video><model type='gop'/></video>", "std"),
    ],
)
def test_displays(video: str, setting: str) -> None:
    assert convert(make(video))[0]["vga"] == setting


@pytest.mark.parametrize(
    ("devices", "key", "setting", "said"),
    [
        ("<serial/>" * 5, "serial3", "socket", "1 of 5 serial ports"),
        ("<video><model type='vga'/></video>" * 2, "vga", "std", "1 of 2 displays"),
        ("<sound model='ac97'/><sound model='usb'/>", "audio0", "device=AC97,driver=none", "sound usb"),
        ("<watchdog model='i6300esb' action='dump'/>", "watchdog", None, "watchdog i6300esb with action dump"),
        ("<watchdog model='itco'/>", "watchdog", None, None),
        ("<rng><backend model='builtin'/></rng>", "rng0", "source=/dev/urandom", None),
        ("<rng><backend model='egd'/></rng>", "rng0", "source=/dev/urandom", "come from /dev/urandom, not from egd"),
        (
            "<rng><backend>/dev/my</backend></rng>",
            "rng0",
            "source=/dev/urandom",
            "come from /dev/urandom, not from /dev/my",
        ),
        ("<rng/><rng/>", "rng0", "source=/dev/urandom", "random number generators beyond the first"),
        ("<memballoon model='none'/>", "balloon", "0", None),
        ("<input type='tablet'/>", "tablet", None, None),
        (disk("sda", "scsi", device="lun"), "scsi0", "local-lvm:vm-100-disk-0", "was a LUN passed through"),
        (
            "<disk device='cdrom'><target dev='sda' bus='usb'/></disk>",
            "sata0",
            "none,media=cdrom",
            "CD-ROM sda is sata0",
        ),
    ],
)
def test_other_devices(devices: str, key: str, setting: str | None, said: str | None) -> None:
    found, unmapped = convert(make(devices))
    assert found.get(key) == setting
    about = [
        sentence for sentence in unmapped if not sentence.startswith(("the ostype", "the configuration has no boot"))
    ]
    assert len(about) == (0 if said is None else 1)
    assert all(said in sentence for sentence in about if said)


@pytest.mark.parametrize(
    ("clock", "os_id", "localtime"),
    [
        ("<clock offset='utc'/>", "debian.org/debian/12", None),
        ("<clock offset='localtime'/>", "debian.org/debian/12", "1"),
        ("<clock offset='variable' basis='localtime'/>", "debian.org/debian/12", "1"),
        ("<clock offset='variable' basis='utc'/>", "debian.org/debian/12", None),
        ("<clock offset='localtime'/>", "microsoft.com/win/10", None),
        ("", "microsoft.com/win/10", "0"),
    ],
)
def test_clocks(clock: str, os_id: str, localtime: str | None) -> None:
    domain = dataclasses.replace(Domain.parse(make(before=clock)), os_id=f"http://{os_id}")
    assert settings(guest_config(domain)).get("localtime") == localtime


@pytest.mark.parametrize(
    ("arch", "setting", "said"), [("x86_64", None, False), ("aarch64", "aarch64", False), ("s390x", None, True)]
)
def test_architectures(arch: str, setting: str | None, said: bool) -> None:
    config = guest_config(dataclasses.replace(Domain.parse(make()), arch=arch))
    assert settings(config).get("arch") == setting
    assert any("which Proxmox VE does not run" in sentence for sentence in config.unmapped) == said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"storage": "local lvm"}, "'local lvm' is no name of a storage"),
        ({"storage": "a:b"}, "'a:b' is no name of a storage"),
        ({"bridge": "vmbr0,tag=1"}, "'vmbr0,tag=1' is no name of a bridge"),
        ({"bridges": {"lan": "x" * 16}}, "is no name of a bridge"),
    ],
)
def test_options_that_proxmox_does_not_take(options: dict[str, t.Any], message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)):
        convert(make(), **options)


@pytest.mark.parametrize("vmid", [-1, 0, 99, 10**9])
def test_vmids_that_proxmox_does_not_take(vmid: int) -> None:
    with pytest.raises(RequestError, match=f"the VMID is {vmid}"):
        convert(make(), vmid)


def test_smbios() -> None:
    os = "<type>hvm</type><smbios mode='sysinfo'/>"
    entry = (
        "<sysinfo type='smbios'><system><entry name='serial'>{}</entry><entry name='uuid'>x</entry></system></sysinfo>"
    )
    assert convert(make(os=os, before=entry.format("ds=nocloud")))[0]["smbios1"] == (
        f"uuid={UUID},serial=ZHM9bm9jbG91ZA==,base64=1"
    )
    found, unmapped = convert(make(os=os, before=entry.format("x" * 400)))
    assert found["smbios1"] == f"uuid={UUID}"
    assert any("SMBIOS" in sentence for sentence in unmapped)


def test_what_the_caller_adds() -> None:
    config = guest_config(Domain.parse(make()), 100, Options(notes="of Sunday\n[PENDING]\n", onboot=True))
    assert settings(config)["onboot"] == "1"
    assert config.text.startswith("#of Sunday\n#[PENDING]\n")


INJECTION = (
    "a\nargs: -device x\n#qmdump#map:scsi9:drive-scsi9::raw:\n[PENDING]\r\nhookscript: local:x\x0bargs: y\u2028z: 1"
)


@run(deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
@example(text=INJECTION)
def test_nothing_in_texts_becomes_a_line(text: str) -> None:
    domain = dataclasses.replace(
        Domain.parse(DEBIAN),
        name=text,
        title=text,
        description=text,
        machine=text,
        os_id=text,
        genid=text,
        clock=text,
        smbios={"serial": text, text: text},
        cpu=Cpu("custom", text, (text,)),
        disks=(Disk("vda", text, source=Source("file", path=text), format=text, serial=text, wwn=text, cache=text),),
        scsi_controllers=(text,),
        nics=(Nic(text, text, text, bridge=text, network=text, device=text),),
        sounds=(text,),
        extras=(text,),
    )
    config = guest_config(domain, 100, Options(notes=text))
    assert set(settings(config)) <= {
        *settings(guest_config(Domain.parse(DEBIAN), 100)),
        "localtime",
        "scsihw",
        "vmgenid",
    }
    assert not any(character in sentence for sentence in config.unmapped for character in "\n\r\v\u2028")
    wanted = "\n".join(text.strip("\n") for _line in range(3))
    assert (vzdump.parse_config(config.text.encode())["description"] or "") == wanted


def test_a_description_from_xml_does_not_inject() -> None:
    escaped = xml.sax.saxutils.escape(INJECTION.replace("\x0b", ""))
    found, _unmapped = convert(make(before=f"<description>{escaped}</description>"))
    assert not {"args", "hookscript"} & set(found)
