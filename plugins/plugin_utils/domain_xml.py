# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""From the VM of an archive to a libvirt domain, as https://libvirt.org/formatdomain.html has it. Pure: no I/O.

Whatever the domain has otherwise than the VM, or not at all, is said in words.
"""

from __future__ import annotations

import dataclasses
import typing as t
import xml.etree.ElementTree as ET

from ansible_collections.vmbackup.vma.plugins.module_utils.vma.errors import RequestError

from .guest import Drive, Guest, Nic

AGENT = "org.qemu.guest_agent.0"
_PREFIXES = {"virtio": "vd", "scsi": "sd", "sata": "sd", "ide": "hd"}
_SCSI_CONTROLLERS = {
    "lsi": "lsilogic",
    "lsi53c810": "lsilogic",
    "megasas": "lsisas1078",
    "pvscsi": "vmpvscsi",
    "virtio-scsi-pci": "virtio-scsi",
    "virtio-scsi-single": "virtio-scsi",
}
_VIDEOS = {"std": "vga", "cirrus": "cirrus", "qxl": "qxl", "virtio": "virtio", "vmware": "vmvga"}
_CACHES = ("directsync", "none", "unsafe", "writeback", "writethrough")
_SMBIOS = ("manufacturer", "product", "version", "serial", "sku", "family")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclasses.dataclass(frozen=True)
class Target:
    """Where a device of the archive was restored to."""

    path: str
    format: str = "raw"

    @property
    def is_block(self) -> bool:
        """Whether it is a block device, as its path tells."""
        return self.path.startswith("/dev/")


@dataclasses.dataclass(frozen=True)
class Options:
    """What the archive does not tell.

    C(networks) has libvirt's network for bridges of the configuration; a bridge without one is the host's own of that
    name. Without C(keep_identity) the domain gets a UUID and MAC addresses of its own. C(hypervisor) is C(kvm), or
    C(qemu) for an emulation.
    """

    name: str | None = None
    networks: t.Mapping[str, str] = dataclasses.field(default_factory=dict)
    keep_identity: bool = True
    hypervisor: str = "kvm"


@dataclasses.dataclass(frozen=True)
class DomainXml:
    """A domain's definition, its C(name) and C(uuid), and what it has otherwise than the VM, a sentence each."""

    xml: str
    name: str
    uuid: str | None
    unmapped: tuple[str, ...]


def domain_xml(guest: Guest, targets: t.Mapping[str, Target], options: Options) -> DomainXml:
    """The domain for a VM. C(targets) are by the name of the device.

    Raises: RequestError where the VM has no name, or is of a kind that is not defined here.
    """
    name = options.name or guest.name
    if not name:
        raise RequestError("the configuration has no name for the VM", remedy="Give one.")
    if "/" in name or not name.isprintable():
        raise RequestError(f"{name!r} cannot be the name of a domain", remedy="Give another one.")
    if guest.arch != "x86_64":
        raise RequestError(f"the VM is for {guest.arch}, and only those for x86_64 are defined")
    return _Writer(guest, targets, options, name).write()


class _Writer:
    """One definition while it is being written."""

    def __init__(self, guest: Guest, targets: t.Mapping[str, Target], options: Options, name: str) -> None:
        self._guest = guest
        self._targets = targets
        self._options = options
        self._name = name
        self._uuid = guest.uuid if options.keep_identity else None
        self._unmapped = list(guest.missing)
        self._is_q35 = "q35" in guest.machine
        self._root = ET.Element("domain", type=options.hypervisor)
        self._names: set[str] = set()

    def write(self) -> DomainXml:
        self._identity()
        self._system()
        devices = ET.SubElement(self._root, "devices")
        for drive in self._guest.drives:
            self._drive(devices, drive)
        if any(self._bus(drive) == "scsi" for drive in self._guest.drives):
            self._scsi_controller(devices)
        for nic in self._guest.nics:
            self._nic(devices, nic)
        self._consoles(devices)
        ET.indent(self._root)
        text = ET.tostring(self._root, encoding="unicode") + "\n"
        return DomainXml(text, self._name, self._uuid, tuple(dict.fromkeys(self._unmapped)))

    def _identity(self) -> None:
        guest = self._guest
        _add(self._root, "name", self._name)
        if self._uuid is not None:
            _add(self._root, "uuid", self._uuid)
        if guest.description:
            # The XML that libvirt reads cannot hold all that a description can.
            _add(self._root, "description", "".join(c for c in guest.description if c.isprintable() or c == "\n"))
        _add(self._root, "memory", str(guest.memory), unit="MiB")
        _add(self._root, "vcpu", str(guest.cores))
        entries = {key: value for key, value in guest.smbios.items() if key in _SMBIOS}
        if entries:
            system = ET.SubElement(ET.SubElement(self._root, "sysinfo", type="smbios"), "system")
            for key, value in entries.items():
                _add(system, "entry", value, name=key)

    def _system(self) -> None:
        guest = self._guest
        system = ET.SubElement(self._root, "os")
        _add(system, "type", "hvm", arch="x86_64", machine="q35" if self._is_q35 else "pc")
        if guest.machine not in ("pc", "q35"):
            self._unmapped.append(f"the machine is the host's newest: {guest.machine} may be missing there")
        if guest.is_uefi:
            system.set("firmware", "efi")
            if guest.efi is not None:
                _add(system, "nvram", self._targets[guest.efi].path)
            else:
                self._unmapped.append("the UEFI variables start afresh: the archive does not hold them")
        if any(key in _SMBIOS for key in guest.smbios):
            ET.SubElement(system, "smbios", mode="sysinfo")
        features = ET.SubElement(self._root, "features")
        for feature in ("acpi", "apic"):
            ET.SubElement(features, feature)
        if self._options.hypervisor == "kvm":
            ET.SubElement(self._root, "cpu", mode="host-passthrough" if guest.cpu == "host" else "host-model")
            if guest.cpu not in (None, "host"):
                self._unmapped.append(f"the CPU is the host's model, not {guest.cpu}")
        ET.SubElement(self._root, "clock", offset="localtime" if guest.local_time else "utc")

    def _bus(self, drive: Drive) -> str:
        # A q35 has no IDE in libvirt, and guests that find the one find the other.
        return "sata" if drive.bus == "ide" and self._is_q35 else drive.bus

    def _drive(self, devices: ET.Element, drive: Drive) -> None:
        target = None if drive.device is None else self._targets.get(drive.device)
        if target is None and not drive.is_cdrom:
            if drive.device is not None:
                self._unmapped.append(f"{drive.name} is not in the domain: it was not restored")
            return
        bus = self._bus(drive)
        if bus != drive.bus:
            self._unmapped.append(f"{drive.name} is on bus {bus}: libvirt has no {drive.bus} on a q35")
        kind = "block" if target is not None and target.is_block else "file"
        disk = ET.SubElement(devices, "disk", type=kind, device="cdrom" if drive.is_cdrom else "disk")
        cache = drive.options.get("cache")
        driver = ET.SubElement(disk, "driver", name="qemu", type="raw" if target is None else target.format)
        if cache in _CACHES:
            driver.set("cache", cache or "")
        if drive.options.get("discard") == "on":
            driver.set("discard", "unmap")
        if target is not None:
            ET.SubElement(disk, "source", {"dev" if target.is_block else "file": target.path})
        ET.SubElement(disk, "target", dev=self._target_name(bus, drive.name), bus=bus)
        if "serial" in drive.options:
            _add(disk, "serial", drive.options["serial"])
        if drive.is_cdrom:
            ET.SubElement(disk, "readonly")
        self._boot(disk, drive.name)

    def _target_name(self, bus: str, drive: str) -> str:
        """The target with the letter of the drive's number, so that the guest finds its disks in their order."""
        number = int(drive.lstrip("abcdefghijklmnopqrstuvwxyz"))
        names = (f"{_PREFIXES[bus]}{_letters(i)}" for i in (number, *range(64)))
        name = next(name for name in names if name not in self._names)
        self._names.add(name)
        return name

    def _boot(self, element: ET.Element, name: str) -> None:
        if name in self._guest.boot:
            ET.SubElement(element, "boot", order=str(self._guest.boot.index(name) + 1))

    def _scsi_controller(self, devices: ET.Element) -> None:
        wanted = self._guest.scsi_controller
        model = _SCSI_CONTROLLERS.get(wanted, "lsilogic")
        if wanted not in _SCSI_CONTROLLERS or wanted == "lsi53c810":
            self._unmapped.append(f"the SCSI controller is {model}: libvirt has no {wanted}")
        ET.SubElement(devices, "controller", type="scsi", index="0", model=model)

    def _nic(self, devices: ET.Element, nic: Nic) -> None:
        bridge = nic.bridge or "default"
        network = self._options.networks.get(bridge)
        kind, source = ("bridge", bridge) if network is None and nic.bridge else ("network", network or "default")
        interface = ET.SubElement(devices, "interface", type=kind)
        if nic.mac and self._options.keep_identity:
            ET.SubElement(interface, "mac", address=nic.mac.lower())
        ET.SubElement(interface, "source", {kind: source})
        ET.SubElement(interface, "model", type=nic.model)
        if nic.link_down:
            ET.SubElement(interface, "link", state="down")
        if nic.tag is not None:
            self._unmapped.append(f"{nic.name} is not in VLAN {nic.tag}: connect it to a bridge that is")
        self._boot(interface, nic.name)

    def _consoles(self, devices: ET.Element) -> None:
        guest = self._guest
        for port in range(max(1, guest.serials)):
            serial = ET.SubElement(devices, "serial", type="pty")
            ET.SubElement(serial, "target", port=str(port))
        console = ET.SubElement(devices, "console", type="pty")
        ET.SubElement(console, "target", type="serial", port="0")
        if guest.agent:
            channel = ET.SubElement(devices, "channel", type="unix")
            ET.SubElement(channel, "target", type="virtio", name=AGENT)
        if guest.vga == "none" or (guest.vga or "").startswith("serial"):
            return
        ET.SubElement(devices, "input", type="tablet", bus="usb")
        ET.SubElement(devices, "graphics", type="vnc", autoport="yes", listen="127.0.0.1")
        video = ET.SubElement(devices, "video")
        ET.SubElement(video, "model", type=_VIDEOS.get(guest.vga or "std", "vga"))


def _letters(number: int) -> str:
    """0 is C(a), 25 is C(z), 26 is C(aa)."""
    return (_LETTERS[number // 26 - 1] if number >= 26 else "") + _LETTERS[number % 26]


def _add(parent: ET.Element, tag: str, text: str, **attributes: str) -> None:
    ET.SubElement(parent, tag, attributes).text = text


__all__ = ("AGENT", "DomainXml", "Options", "Target", "domain_xml")
