# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The VM that the qemu-server.conf of an archive describes, as qm.conf(5) has it, as far as a restore goes by it.

No I/O, and nothing about what becomes of the VM. It is the other direction of module_utils/host/guest_config.py.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import re
import typing as t

from ansible_collections.vmbackup.vma.plugins.module_utils.vma import vzdump

BUSES = ("ide", "scsi", "virtio", "sata")
"""The buses of drives, in the order in which Proxmox VE looks for a drive to boot from."""
_SETTING = re.compile(r"([a-z][a-z_]*[0-9]*):\s*(\S.*)")
_DRIVE = re.compile(rf"({'|'.join(BUSES)})([0-9]+)")
_OWNER = re.compile(rf"{_DRIVE.pattern}|efidisk0|tpmstate0")
"""What a device of an archive can belong to."""
_DEVICE = re.compile(r"drive-([a-z]+[0-9]+)(?:-backup)?")
_VMSTATE = "vmstate"
_TRUE = ("1", "yes", "on", "true")
_DEFAULT_MEMORY = 512
_PASSED_THROUGH = re.compile(r"(?:hostpci|usb|parallel|virtiofs)[0-9]+|args|ivshmem")


@dataclasses.dataclass(frozen=True)
class Drive:
    """A drive. C(name) is Proxmox VE's, such as C(scsi0); C(device) is the archive's, None where it holds none."""

    name: str
    bus: str
    device: str | None = None
    is_cdrom: bool = False
    options: t.Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Nic:
    """A network interface. C(tag) is a VLAN."""

    name: str
    model: str = "virtio"
    mac: str | None = None
    bridge: str | None = None
    tag: int | None = None
    link_down: bool = False


@dataclasses.dataclass(frozen=True)
class Guest:
    """A VM. C(memory) is in MiB.

    C(drives) come in the order in which the firmware tries them; those that it does not try come last. C(boot) names
    drives and network interfaces as the configuration has them. C(efi) and C(tpm) are devices of the archive.
    C(missing) says in words what the configuration has and a restore from the archive cannot give.
    """

    name: str | None = None
    uuid: str | None = None
    description: str | None = None
    arch: str = "x86_64"
    ostype: str = "other"
    cpu: str | None = None
    is_uefi: bool = False
    machine: str = "pc"
    memory: int = _DEFAULT_MEMORY
    cores: int = 1
    scsi_controller: str = "lsi"
    vga: str | None = None
    agent: bool = False
    local_time: bool = False
    serials: int = 0
    drives: tuple[Drive, ...] = ()
    boot: tuple[str, ...] = ()
    nics: tuple[Nic, ...] = ()
    efi: str | None = None
    tpm: str | None = None
    smbios: t.Mapping[str, str] = dataclasses.field(default_factory=dict)
    missing: tuple[str, ...] = ()


def parse(text: str, devices: t.Iterable[str]) -> Guest:
    """The VM of a C(qemu-server.conf), which may be empty, and of the C(devices) of the archive.

    A device without a map line to a drive that there can be belongs to the drive that its name tells, C(drive-scsi0)
    to C(scsi0), and else to the next free drive on C(virtio).
    """
    return _Parser(text, [device for device in devices if device != _VMSTATE]).parse()


class _Parser:
    """One configuration while it is being read."""

    def __init__(self, text: str, devices: t.Sequence[str]) -> None:
        self._settings = _settings(text)
        self._vm = vzdump.parse_config(text.encode())
        self._missing: list[str] = []
        self._devices = self._assign(devices)

    def parse(self) -> Guest:
        get = self._settings.get
        drives = self._drives()
        nics = tuple(self._nics())
        boot = self._boot_order(drives, nics)
        smbios = _smbios(get("smbios1", ""))
        ostype = get("ostype", "other")
        if "tpmstate0" in self._settings or "tpmstate0" in self._devices:
            self._missing.append("the TPM's state is not restored: what is locked by it asks for its recovery key")
        self._missing += [f"{key} is not restored: it is the host's" for key in self._settings if _is_of_host(key)]
        return Guest(
            name=get("name"),
            uuid=smbios.pop("uuid", None),
            description=self._vm["description"],
            arch=get("arch", "x86_64"),
            ostype=ostype,
            cpu=_properties(get("cpu", ""), "cputype").get("cputype"),
            is_uefi=get("bios") == "ovmf",
            machine=_properties(get("machine", ""), "type").get("type", "pc"),
            memory=_integer(_properties(get("memory", ""), "current").get("current"), _DEFAULT_MEMORY),
            cores=self._processors(),
            scsi_controller=get("scsihw", "lsi"),
            vga=_properties(get("vga", ""), "type").get("type"),
            agent=_properties(get("agent", ""), "enabled").get("enabled") in _TRUE,
            local_time=get("localtime", "1" if ostype.startswith("w") else "0") in _TRUE,
            serials=sum(re.fullmatch(r"serial[0-9]", key) is not None for key in self._settings),
            drives=tuple(_sorted_drives(drives, boot)),
            boot=boot,
            nics=nics,
            efi=self._devices.get("efidisk0"),
            tpm=self._devices.get("tpmstate0"),
            smbios=smbios,
            missing=tuple(self._missing),
        )

    def _processors(self) -> int:
        processors = _integer(self._settings.get("sockets"), 1) * _integer(self._settings.get("cores"), 1)
        return max(1, min(processors, _integer(self._settings.get("vcpus"), processors)))

    def _assign(self, devices: t.Sequence[str]) -> dict[str, str]:
        """The archive's device of each drive."""
        mapped = {
            disk["device"]: disk["drive"]
            for disk in self._vm["disks"]
            if "device" in disk and _OWNER.fullmatch(disk["drive"])
        }
        assigned = {mapped[device]: device for device in devices if device in mapped}
        for device in devices:
            match = _DEVICE.fullmatch(device)
            if device in mapped or match is None or not _OWNER.fullmatch(match[1]):
                continue
            if match[1] not in assigned:
                assigned[match[1]] = device
        for device in devices:
            if device not in assigned.values():
                drive = next(name for i in range(len(devices) + 1) if (name := f"virtio{i}") not in assigned)
                assigned[drive] = device
                self._missing.append(f"{device} is taken for {drive}: nothing tells its drive")
        return assigned

    def _drives(self) -> list[Drive]:
        names = {name for name in (*self._settings, *self._devices) if _DRIVE.fullmatch(name)}
        drives = []
        for name in sorted(names, key=_rank):
            options = _properties(self._settings.get(name, ""), "file")
            is_cdrom = options.get("media") == "cdrom"
            device = self._devices.get(name)
            drives.append(Drive(name, name.rstrip("0123456789"), device, is_cdrom, options))
            if device is None and not is_cdrom:
                why = ": it is left out of backups" if options.get("backup") in ("0", "no", "off") else ""
                self._missing.append(f"{name} is not in the archive{why}")
        return drives

    def _nics(self) -> t.Iterator[Nic]:
        for key in sorted((key for key in self._settings if re.fullmatch(r"net[0-9]+", key)), key=_rank):
            options = _properties(self._settings[key], "model")
            # Written as virtio=<MAC>, or as model=virtio,macaddr=<MAC>
            first = self._settings[key].split(",")[0].split("=")[0].strip()
            model = options.get("model", "virtio") if first == "model" or first not in options else first
            mac = options.get("macaddr", options.get(model))
            tag = _integer(options.get("tag"), 0) or None
            yield Nic(key, model, mac, options.get("bridge"), tag, options.get("link_down") in _TRUE)

    def _boot_order(self, drives: t.Sequence[Drive], nics: t.Sequence[Nic]) -> tuple[str, ...]:
        options = _properties(self._settings.get("boot", ""), "legacy")
        disks = [drive.name for drive in drives if not drive.is_cdrom]
        if "order" in options:
            order = [name for name in options["order"].split(";") if name]
        else:
            first = self._settings.get("bootdisk")
            groups = {
                "c": [first] if first in disks else disks[:1],
                "d": [drive.name for drive in drives if drive.is_cdrom],
                "n": [nic.name for nic in nics],
            }
            order = [name for letter in options.get("legacy", "cdn") for name in groups.get(letter, [])]
        here = {drive.name for drive in drives if drive.device is not None}
        if here and order and not here.intersection(order):
            self._missing.append(f"the VM boots from {', '.join(order)}, and the archive holds none of these")
        return tuple(order)


def _settings(text: str) -> dict[str, str]:
    """The VM's present settings: sections hold snapshots and pending changes."""
    settings: dict[str, str] = {}
    for line in text.splitlines():
        if line.startswith("["):
            break
        match = _SETTING.fullmatch(line.rstrip())
        if match is not None:
            settings[match[1]] = match[2]
    return settings


def _properties(setting: str, default_key: str) -> dict[str, str]:
    """The parts of a setting by their keys; the first part without one belongs to C(default_key)."""
    properties: dict[str, str] = {}
    for part in setting.split(","):
        key, equals, value = part.strip().partition("=")
        if equals:
            properties[key] = value
        elif key:
            properties.setdefault(default_key, key)
    return properties


def _smbios(setting: str) -> dict[str, str]:
    entries = _properties(setting, "uuid")
    if entries.pop("base64", "0") in _TRUE:
        for key in entries:
            if key != "uuid":
                try:
                    entries[key] = base64.b64decode(entries[key], validate=True).decode()
                except (binascii.Error, UnicodeDecodeError):
                    entries[key] = ""
    return {key: value for key, value in entries.items() if value}


def _integer(text: str | None, default: int) -> int:
    return int(text) if text is not None and re.fullmatch(r"[0-9]+", text) else default


def _is_of_host(key: str) -> bool:
    return _PASSED_THROUGH.fullmatch(key) is not None


def _rank(name: str) -> tuple[int, int]:
    bus = name.rstrip("0123456789")
    return BUSES.index(bus) if bus in BUSES else len(BUSES), int(name[len(bus) :] or 0)


def _sorted_drives(drives: t.Sequence[Drive], boot: t.Sequence[str]) -> list[Drive]:
    return sorted(drives, key=lambda drive: boot.index(drive.name) if drive.name in boot else len(boot))


__all__ = ("BUSES", "Drive", "Guest", "Nic", "parse")
