# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A libvirt domain as values: what C(virsh dumpxml) prints, parsed.

No I/O here, and nothing about Proxmox VE. What the domain has and no field tells of stands in words in
C(Domain.extras), so that nobody takes it for absent.
"""

from __future__ import annotations

import collections
import dataclasses
import typing as t
import uuid as uuids
import xml.etree.ElementTree as ET

from ..vma.errors import RequestError
from .domain_devices import (
    Disk,
    Host,
    Nic,
    Rng,
    Source,
    Tpm,
    Video,
    Watchdog,
    parse_disk,
    parse_nic,
    parse_rng,
    parse_tpm,
    parse_video,
)
from .domain_values import REMEDY, attribute, integer, number, required, text_of

_QEMU = "{http://libvirt.org/schemas/domain/qemu/1.0}"
_OSINFO = "{http://libosinfo.org/xmlns/libvirt/domain/1.0}"
_AGENT = "org.qemu.guest_agent.0"

# https://libvirt.org/formatdomain.html#memory-allocation
_UNITS: dict[str, int] = {
    **dict.fromkeys(("b", "bytes"), 1),
    **{prefix + "B": 1000**power for power, prefix in enumerate("KMGTPE", 1)},
    **{prefix + suffix: 1024**power for power, prefix in enumerate("KMGTPE", 1) for suffix in ("", "iB")},
    "k": 1024,
}

_MODELLED_DEVICES = (
    "audio channel console controller disk emulator graphics hub input interface memballoon redirfilter rng serial "
    "sound tpm video watchdog"
)
_UNMODELLED_SETTINGS = {
    "blkiotune": "limits on block I/O (blkiotune)",
    "cpu/numa": "NUMA nodes",
    "cputune": "limits and pinning of CPUs (cputune)",
    "launchSecurity": "memory encryption (launchSecurity)",
    "maxMemory": "memory hotplug (maxMemory)",
    "memoryBacking": "memory backing (memoryBacking)",
    "memtune": "limits on memory (memtune)",
    "numatune": "NUMA placement (numatune)",
    "os/kernel": "direct boot of a kernel of the host (os/kernel)",
    f"{_QEMU}commandline": "arguments for QEMU (qemu:commandline)",
    f"{_QEMU}override": "overridden QEMU properties (qemu:override)",
}


@dataclasses.dataclass(frozen=True)
class Cpu:
    """The processor: C(mode) is None where the hypervisor's default is meant; C(model) is there for mode custom."""

    mode: str | None = None
    model: str | None = None
    features: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Topology:
    """Sockets, cores in each of them (over all dies and clusters), threads in each core."""

    sockets: int = 1
    cores: int = 1
    threads: int = 1


@dataclasses.dataclass(frozen=True)
class Nvram:
    """The file that holds the UEFI variables. C(path) is None where libvirt has not made it yet."""

    path: str | None = None
    format: str = "raw"
    template: str | None = None


@dataclasses.dataclass(frozen=True)
class Firmware:
    """C(kind) is C(bios) or C(uefi). C(enrolled_keys) says that secure boot was set up with its keys."""

    kind: str = "bios"
    secure_boot: bool = False
    enrolled_keys: bool = False
    loader: str | None = None
    nvram: Nvram | None = None


@dataclasses.dataclass(frozen=True)
class Domain:
    """A virtual machine as libvirt defines it. Sizes are in bytes.

    C(vcpus) is how many processors there may be, C(current_vcpus) how many there are at start. C(boot) has the
    devices of C(<os>) in order: C(hd), C(cdrom), C(network), C(fd). C(os_id) is libosinfo's. C(smbios) has entries
    of the system that the guest sees. C(extras) names in words what no field tells of.
    """

    name: str
    uuid: str
    title: str | None = None
    description: str | None = None
    hypervisor: str = "kvm"
    os_id: str | None = None
    arch: str = "x86_64"
    machine: str | None = None
    memory: int = 0
    current_memory: int = 0
    balloon: bool = True
    vcpus: int = 1
    current_vcpus: int = 1
    topology: Topology | None = None
    cpu: Cpu = dataclasses.field(default_factory=Cpu)
    firmware: Firmware = dataclasses.field(default_factory=Firmware)
    boot: tuple[str, ...] = ()
    acpi: bool = True
    hyperv: bool = False
    clock: str = "utc"
    genid: str | None = None
    smbios: t.Mapping[str, str] = dataclasses.field(default_factory=dict)
    disks: tuple[Disk, ...] = ()
    scsi_controllers: tuple[str | None, ...] = ()
    nics: tuple[Nic, ...] = ()
    tpm: Tpm | None = None
    agent: bool = False
    serials: int = 0
    videos: tuple[Video, ...] = ()
    graphics: tuple[str, ...] = ()
    sounds: tuple[str, ...] = ()
    rngs: tuple[Rng, ...] = ()
    watchdogs: tuple[Watchdog, ...] = ()
    tablet: bool = False
    extras: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Domain:
        """The domain that C(virsh dumpxml) printed.

        Raises: RequestError where the text is not the XML of a virtual machine, or lacks what libvirt always tells.
        """
        root = _root(text)
        memory = _memory(root.find("memory"), "memory")
        vcpu = root.find("vcpu")
        vcpus = 1 if vcpu is None else integer(text_of(vcpu) or "1", "vcpu")
        current = root.find("currentMemory")
        return cls(
            name=required(root.findtext("name"), "name"),
            uuid=_uuid(root.findtext("uuid")),
            title=text_of(root.find("title")),
            description=text_of(root.find("description")),
            hypervisor=root.get("type", "kvm"),
            os_id=attribute(root, f"metadata/{_OSINFO}libosinfo/{_OSINFO}os", "id"),
            arch=attribute(root, "os/type", "arch") or "x86_64",
            machine=attribute(root, "os/type", "machine"),
            memory=memory,
            current_memory=memory if current is None else _memory(current, "currentMemory"),
            balloon=attribute(root, "devices/memballoon", "model") != "none",
            vcpus=vcpus,
            current_vcpus=vcpus if vcpu is None else number(vcpu, "current") or vcpus,
            topology=_topology(root.find("cpu/topology")),
            cpu=_cpu(root.find("cpu")),
            firmware=_firmware(root),
            boot=tuple(boot.get("dev", "") for boot in root.iterfind("os/boot")),
            acpi=root.find("features/acpi") is not None,
            hyperv=root.find("features/hyperv") is not None,
            clock=_clock(root.find("clock")),
            genid=None if root.find("genid") is None else root.findtext("genid", "").strip(),
            smbios=_smbios(root),
            disks=tuple(map(parse_disk, root.iterfind("devices/disk"))),
            scsi_controllers=tuple(
                controller.get("model") for controller in root.iterfind("devices/controller[@type='scsi']")
            ),
            nics=tuple(map(parse_nic, root.iterfind("devices/interface"))),
            tpm=parse_tpm(root.find("devices/tpm")),
            agent=root.find(f"devices/channel/target[@name='{_AGENT}']") is not None,
            serials=len(root.findall("devices/serial")),
            videos=tuple(map(parse_video, root.iterfind("devices/video/model"))),
            graphics=tuple(graphics.get("type", "") for graphics in root.iterfind("devices/graphics")),
            sounds=tuple(sound.get("model", "") for sound in root.iterfind("devices/sound")),
            rngs=tuple(map(parse_rng, root.iterfind("devices/rng"))),
            watchdogs=tuple(
                Watchdog(watchdog.get("model", ""), watchdog.get("action", "reset"))
                for watchdog in root.iterfind("devices/watchdog")
            ),
            tablet=root.find("devices/input[@type='tablet']") is not None,
            extras=_extras(root),
        )


def _root(text: str) -> ET.Element:
    # libvirt prints none; without them no entity can grow beyond what was given
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise RequestError("the domain's XML has a document type, which libvirt never writes", remedy=REMEDY)
    try:
        root = ET.fromstring(text)
    except (ET.ParseError, ValueError) as error:
        raise RequestError(f"the domain's XML cannot be parsed: {error}", remedy=REMEDY) from error
    if root.tag != "domain":
        raise RequestError(f"this is not a domain's XML: expected <domain>, found <{root.tag}>", remedy=REMEDY)
    kind = root.findtext("os/type", "hvm").strip()
    if kind != "hvm":
        raise RequestError(
            f"domain {root.findtext('name', '')} is no full virtual machine: its os/type is {kind!r}, not 'hvm'",
            remedy="Containers and paravirtual guests do not run from a disk alone: back them up by other means.",
        )
    return root


def _uuid(value: str | None) -> str:
    text = required(value, "uuid")
    try:
        return str(uuids.UUID(text))
    except ValueError as error:
        raise RequestError(f"the domain's uuid is none: {text!r}", remedy=REMEDY) from error


def _memory(element: ET.Element | None, what: str) -> int:
    if element is None:
        raise RequestError(f"the domain's XML has no {what}", remedy=REMEDY)
    unit = element.get("unit", "KiB")
    if unit not in _UNITS:
        raise RequestError(f"the domain's {what} has the unit {unit!r}, which libvirt does not know", remedy=REMEDY)
    return integer(text_of(element) or "", what) * _UNITS[unit]


def _topology(element: ET.Element | None) -> Topology | None:
    if element is None:
        return None
    counts = {name: number(element, name) or 1 for name in ("sockets", "dies", "clusters", "cores", "threads")}
    return Topology(counts["sockets"], counts["dies"] * counts["clusters"] * counts["cores"], counts["threads"])


def _cpu(element: ET.Element | None) -> Cpu:
    if element is None:
        return Cpu()
    model = text_of(element.find("model"))
    features = tuple(
        ("-" if feature.get("policy") in ("disable", "forbid") else "+") + feature.get("name", "")
        for feature in element.iterfind("feature")
    )
    return Cpu(element.get("mode") or ("custom" if model else None), model, features)


def _firmware(root: ET.Element) -> Firmware:
    loader = root.find("os/loader")
    path = text_of(loader)
    nvram = root.find("os/nvram")
    features = {
        feature.get("name"): feature.get("enabled") == "yes" for feature in root.iterfind("os/firmware/feature")
    }
    is_uefi = (
        attribute(root, "os", "firmware") == "efi"
        or attribute(root, "os/loader", "type") == "pflash"
        or nvram is not None
        or any(word in (path or "").lower() for word in ("ovmf", "aavmf", "edk2"))
    )
    if not is_uefi:
        return Firmware(loader=path)
    template = None if nvram is None else nvram.get("template")
    hints = f"{path or ''} {template or ''}".lower()
    return Firmware(
        kind="uefi",
        secure_boot=(loader is not None and loader.get("secure") == "yes") or features.get("secure-boot", False),
        enrolled_keys=features.get("enrolled-keys", ".ms." in hints or "vars.secboot" in hints),
        loader=path,
        nvram=None if nvram is None else _nvram(nvram, template),
    )


def _nvram(element: ET.Element, template: str | None) -> Nvram:
    source = element.find("source")
    path = text_of(element) if source is None else source.get("file") or source.get("dev")
    return Nvram(path, element.get("format", "raw"), template)


def _clock(element: ET.Element | None) -> str:
    if element is None:
        return "utc"
    offset = element.get("offset", "utc")
    return element.get("basis", "utc") if offset == "variable" else offset


def _smbios(root: ET.Element) -> dict[str, str]:
    if attribute(root, "os/smbios", "mode") != "sysinfo":
        return {}
    entries = root.iterfind("sysinfo[@type='smbios']/system/entry")
    return {entry.get("name", ""): entry.text for entry in entries if entry.text}


def _extras(root: ET.Element) -> tuple[str, ...]:
    """What no field tells of, in words; several of a kind are counted."""
    found = [words for path, words in _UNMODELLED_SETTINGS.items() if root.find(path) is not None]
    for device in root.iterfind("devices/*"):
        if device.tag not in _MODELLED_DEVICES.split():
            found.append(_describe(device))
    if root.find("devices/console/target[@type='virtio']") is not None:
        found.append("a console by virtio")
    counts = collections.Counter(found)
    return tuple(words if count == 1 else f"{words} ({count} times)" for words, count in counts.items())


def _describe(device: ET.Element) -> str:
    """A device in a few words: what it is, and which one."""
    if device.tag == "hostdev":
        return " ".join(filter(None, ("hostdev", device.get("type", ""), _host_device(device.find("source")))))
    if device.tag == "filesystem":
        source = device.find("source")
        shared = "" if source is None else next(iter(source.attrib.values()), "")
        return f"filesystem {shared} as {attribute(device, 'target', 'dir') or ''}"
    kind = device.get("model") or device.get("type") or device.get("bus") or device.get("mode")
    return device.tag if kind is None else f"{device.tag} {kind}"


def _host_device(source: ET.Element | None) -> str:
    if source is None:
        return ""
    address = source.find("address")
    vendor, product = attribute(source, "vendor", "id"), attribute(source, "product", "id")
    if vendor and product:
        return f"{vendor.replace('0x', '')}:{product.replace('0x', '')}"
    if address is None:
        return attribute(source, "adapter", "name") or source.get("wwpn") or ""
    if "slot" in address.attrib:
        widths = (("domain", 4), ("bus", 2), ("slot", 2), ("function", 1))
        parts = [address.get(name, "0").replace("0x", "").zfill(width) for name, width in widths]
        return f"{parts[0]}:{parts[1]}:{parts[2]}.{parts[3]}"
    return address.get("uuid") or ":".join(address.attrib.values())


__all__ = (
    "Cpu",
    "Disk",
    "Domain",
    "Firmware",
    "Host",
    "Nic",
    "Nvram",
    "Rng",
    "Source",
    "Topology",
    "Tpm",
    "Video",
    "Watchdog",
)
