# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""From a libvirt domain to the qemu-server.conf of an archive, as qm.conf(5) and C(qmrestore) have it. No I/O.

Whatever the VM that C(qmrestore) makes of it has otherwise than the domain, or not at all, is said in words.
"""

from __future__ import annotations

import base64
import dataclasses
import re
import typing as t

from ..vma.errors import RequestError
from . import drives, nics
from .domain import Disk, Domain
from .guest_names import comment, dns_name, os_type, vmid_of

NVRAM = "nvram"
"""How the UEFI variables are called where disks are named; their drive is C(efidisk0)."""
TPM = "tpm"
"""How the TPM's state is called where disks are named; its drive is C(tpmstate0)."""
TPM_STATE_SIZE = 4 << 20
"""The size in bytes of a TPM's state on Proxmox VE."""

_MIB = 1 << 20
_MIN_MEMORY = 16
_EFI_TYPES = {131072: "2m", 540672: "4m"}
_MAX_NICS = 32
_MAX_SERIALS = 4
_SMBIOS_LIMIT = 512

_STORAGE = re.compile(r"[A-Za-z][A-Za-z0-9._-]*[A-Za-z0-9]")
_VALUE = re.compile(r"[\x21-\x7e]+(?: [\x21-\x7e]+)*")

_CPU_MODELS = """
    486 Broadwell Broadwell-IBRS Broadwell-noTSX Broadwell-noTSX-IBRS Cascadelake-Server Cascadelake-Server-noTSX
    Conroe Cooperlake EPYC EPYC-Genoa EPYC-IBPB EPYC-Milan EPYC-Rome GraniteRapids Haswell Haswell-IBRS Haswell-noTSX
    Haswell-noTSX-IBRS Icelake-Server Icelake-Server-noTSX IvyBridge IvyBridge-IBRS KnightsMill Nehalem Nehalem-IBRS
    Opteron_G1 Opteron_G2 Opteron_G3 Opteron_G4 Opteron_G5 Penryn SandyBridge SandyBridge-IBRS SapphireRapids
    Skylake-Client Skylake-Client-IBRS Skylake-Client-noTSX-IBRS Skylake-Server Skylake-Server-IBRS
    Skylake-Server-noTSX-IBRS Westmere Westmere-IBRS athlon core2duo coreduo kvm32 kvm64 max pentium pentium2 pentium3
    phenom qemu32 qemu64 a64fx cortex-a35 cortex-a53 cortex-a55 cortex-a57 cortex-a72 cortex-a76 neoverse-n1
    neoverse-v1
"""
_ANY_HOST_CPU = {"x86_64": "x86-64-v2-AES", "i686": "x86-64-v2-AES", "aarch64": "max"}
"""The CPU that every host of the last ten years can offer."""

_SCSI_CONTROLLERS = {
    "lsilogic": "lsi",
    "lsisas1078": "megasas",
    "virtio-non-transitional": "virtio-scsi-pci",
    "virtio-scsi": "virtio-scsi-pci",
    "virtio-transitional": "virtio-scsi-pci",
    "vmpvscsi": "pvscsi",
}
_DISPLAYS = {"vga": "std", "bochs": "std", "cirrus": "cirrus", "virtio": "virtio", "vmvga": "vmware", "none": "none"}
_SOUNDS = {"ac97": "AC97", "ich6": "intel-hda", "ich9": "ich9-intel-hda"}
_WATCHDOGS = frozenset(("i6300esb", "ib700"))
_WATCHDOG_ACTIONS = frozenset(("none", "pause", "poweroff", "reset", "shutdown"))
_RNG_SOURCES = frozenset(("/dev/hwrng", "/dev/random", "/dev/urandom"))
_SMBIOS_ENTRIES = frozenset(("family", "manufacturer", "product", "serial", "sku", "version"))


@dataclasses.dataclass(frozen=True)
class Device:
    """What an archive holds of a disk.

    C(name) is the device's name in the archive, C(disk) the target that the domain has for it, or C(nvram), C(tpm).
    C(size) is in bytes, None where it was not given.
    """

    name: str
    disk: str
    size: int | None


@dataclasses.dataclass(frozen=True)
class GuestConfig:
    """A qemu-server.conf, and what belongs to it.

    C(devices) has for each drive what the archive must hold: C(qmrestore) refuses an archive that lacks one, or has
    one more. C(unmapped) says what the restored VM has otherwise than the domain, a sentence each.
    """

    text: str
    devices: t.Mapping[str, Device]
    unmapped: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Options:
    """What the domain does not tell.

    C(disk_sizes) has sizes in bytes by target, and by C(nvram). C(exclude) names disks that the archive lacks, by
    target or drive. C(bridges) has Proxmox VE's bridge for the domain's networks, bridges and devices, C(bridge) is
    for those that have none. C(tpm_state) says that the archive holds the TPM's state as Proxmox VE keeps it.
    """

    disk_sizes: t.Mapping[str, int] = dataclasses.field(default_factory=dict)
    exclude: t.Collection[str] = ()
    storage: str = "local-lvm"
    bridge: str = "vmbr0"
    bridges: t.Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: str = ""
    onboot: bool = False
    tpm_state: bool = False


def guest_config(domain: Domain, vmid: int | None = None, options: Options | None = None) -> GuestConfig:
    """The configuration for a domain. By default its VMID is made of its UUID.

    Raises: RequestError for a VMID, storage or bridge that Proxmox VE does not take, for more disks than it has
    drives, and for the exclusion of a disk that the domain does not have.
    """
    return _Writer(domain, vmid_of(domain.uuid) if vmid is None else vmid, options or Options()).write()


class _Writer:
    """One configuration while it is being written."""

    def __init__(self, domain: Domain, vmid: int, options: Options) -> None:
        if not 100 <= vmid <= 999_999_999:
            raise RequestError(f"the VMID is {vmid}: Proxmox VE takes 100 to 999999999")
        if not _STORAGE.fullmatch(options.storage):
            raise RequestError(f"{options.storage!r} is no name of a storage of Proxmox VE")
        self._domain = domain
        self._vmid = vmid
        self._options = options
        self._settings: dict[str, str] = {}
        self._devices: dict[str, Device] = {}
        self._unmapped: list[str] = []
        self._boot: list[tuple[int, str]] = []
        self._drives = drives.assign(domain.disks)

    def write(self) -> GuestConfig:
        self._identity()
        self._memory()
        self._processor()
        self._machine()
        self._disks()
        self._uefi()
        self._tpm()
        self._networks()
        self._boot_order()
        self._display()
        self._minor_devices()
        for words in self._domain.extras:
            self._say(f"not in the configuration: {words}")
        return GuestConfig(self._text(), dict(self._devices), tuple(dict.fromkeys(self._unmapped)))

    def _say(self, sentence: str) -> None:
        self._unmapped.append("".join(c if c.isprintable() else " " for c in sentence))

    def _set(self, key: str, value: object) -> None:
        text = str(value)
        # The last gate: whatever a domain holds, a setting stays one line
        if not _VALUE.fullmatch(text):
            raise RequestError(f"the domain leads to a value that Proxmox VE cannot have: {key}: {text!r}")
        self._settings[key] = text

    def _text(self) -> str:
        texts = (self._domain.title, self._domain.description, self._options.notes)
        lines = ["#" + comment(line) for text in texts if text for line in text.strip("\n").split("\n")]
        lines += [f"{key}: {value}" for key, value in sorted(self._settings.items())]
        lines += [
            f"#qmdump#map:{drive}:{device.name}:{self._options.storage}:raw:" for drive, device in self._devices.items()
        ]
        return "\n".join(lines) + "\n"

    def _identity(self) -> None:
        domain = self._domain
        name = dns_name(domain.name) or f"vm-{self._vmid}"
        if name != domain.name:
            self._say(f"the name is {name}: Proxmox VE takes names of DNS only, and {domain.name} is none")
        self._set("name", name)
        ostype = os_type(domain)
        self._set("ostype", ostype)
        if domain.os_id is None:
            self._say(f"the ostype is {ostype}: the domain does not tell its operating system")
        entries = {key: value for key, value in domain.smbios.items() if key in _SMBIOS_ENTRIES}
        smbios = f"uuid={domain.uuid}" + "".join(
            f",{key}={base64.b64encode(value.encode()).decode()}" for key, value in sorted(entries.items())
        )
        if len(smbios) + len(",base64=1") > _SMBIOS_LIMIT:
            self._say("the SMBIOS entries are longer than Proxmox VE takes, and left out")
            entries = {}
            smbios = f"uuid={domain.uuid}"
        self._set("smbios1", smbios + (",base64=1" if entries else ""))
        if domain.genid is not None:
            self._set("vmgenid", domain.genid if _is_uuid(domain.genid) else "1")
        if self._options.onboot:
            self._set("onboot", 1)

    def _memory(self) -> None:
        memory, current = (-(-size // _MIB) for size in (self._domain.memory, self._domain.current_memory))
        self._set("memory", max(_MIN_MEMORY, memory))
        if not self._domain.balloon:
            self._set("balloon", 0)
        elif 0 < current < memory:
            self._set("balloon", max(_MIN_MEMORY, current))

    def _processor(self) -> None:
        domain = self._domain
        if domain.topology is None:
            sockets, cores = domain.vcpus, 1
        else:
            sockets, cores = domain.topology.sockets, domain.topology.cores * domain.topology.threads
            if domain.topology.threads > 1:
                self._say(f"{domain.topology.threads} threads of a core are cores: Proxmox VE has no threads")
        self._set("sockets", sockets)
        self._set("cores", cores)
        if domain.current_vcpus < sockets * cores:
            self._set("vcpus", domain.current_vcpus)
        self._set("cpu", self._cpu_model())
        if domain.cpu.mode != "host-passthrough" and domain.cpu.features:
            features = " ".join(domain.cpu.features)
            self._say(f"not in the configuration: the CPU's features {features}")

    def _cpu_model(self) -> str:
        cpu = self._domain.cpu
        anywhere = _ANY_HOST_CPU.get(self._domain.arch, "max")
        if cpu.mode in ("host-passthrough", "maximum"):
            return "host"
        if cpu.mode == "host-model":
            self._say("the CPU is host: Proxmox VE has no host-model")
            return "host"
        if cpu.model is None:
            return anywhere
        if cpu.model in _CPU_MODELS.split():
            return cpu.model
        self._say(f"the CPU is {anywhere}: Proxmox VE does not know {cpu.model}")
        return anywhere

    def _machine(self) -> None:
        domain = self._domain
        machine = domain.machine or "pc"
        kind = "q35" if "q35" in machine else "virt" if machine.split("-")[0] == "virt" else "pc"
        if kind != "pc":
            self._set("machine", kind)
        is_plain = machine == kind or (kind, machine) == ("pc", "i440fx")
        if kind == "pc" and not is_plain and not machine.startswith(("pc-i440fx", "pc-0", "pc-1")):
            self._say(f"the machine is pc: Proxmox VE has no {machine}")
        elif not is_plain:
            self._say(f"the machine is {kind} of the restoring host's version: {machine} may be missing there")
        if domain.arch == "aarch64":
            self._set("arch", "aarch64")
        elif domain.arch not in ("x86_64", "i686"):
            self._say(f"the guest is for {domain.arch}, which Proxmox VE does not run")
        if not domain.acpi:
            self._set("acpi", 0)
        is_local, is_windows = domain.clock not in ("utc", "absolute"), os_type(domain).startswith("w")
        if is_local != is_windows:
            self._set("localtime", int(is_local))

    def _volume(self) -> str:
        return f"{self._options.storage}:vm-{self._vmid}-disk-{len(self._devices)}"

    def _disks(self) -> None:
        domain, options = self._domain, self._options
        assigned = self._drives
        names = {name for drive, disk in assigned.items() for name in (drive, disk.target)}
        names |= {NVRAM, "efidisk0", TPM, "tpmstate0", *(disk.target for disk in domain.disks)}
        unknown = sorted(set(options.exclude) - names)
        if unknown:
            raise RequestError(
                f"domain {domain.name} has no disk {', '.join(unknown)} to exclude; it has "
                + ", ".join(f"{disk.target} ({drive})" for drive, disk in assigned.items()),
            )
        for drive, disk in assigned.items():
            if disk.device == "cdrom":
                self._cdrom(drive, disk)
            elif self._is_excluded(drive, disk.target):
                self._say(f"disk {disk.target} ({drive}) was excluded and is not in the archive")
            else:
                self._disk(drive, disk)
        for disk in domain.disks:
            if disk not in assigned.values():
                why = disk.obstacle if disk.device != "cdrom" else "Proxmox VE has no drive left for it"
                self._say(f"disk {disk.target} is not in the archive: {why}")
        self._scsi_controller(assigned)

    def _is_excluded(self, *names: str) -> bool:
        return any(name in self._options.exclude for name in names)

    def _cdrom(self, drive: str, disk: Disk) -> None:
        self._set(drive, "none,media=cdrom")
        self._may_boot(disk.boot_order, drive)
        if drive.rstrip("0123456789") != disk.bus:
            self._say(
                f"CD-ROM {disk.target} is {drive}: Proxmox VE has no room for it on bus {disk.bus}, or no such bus"
            )
        if disk.source is not None:
            self._say(f"the medium {disk.source.location} in {disk.target} is not in the archive: {drive} is empty")

    def _disk(self, drive: str, disk: Disk) -> None:
        size = self._options.disk_sizes.get(disk.target)
        self._set(drive, drives.setting(drive, disk, self._volume(), size, self._say))
        self._devices[drive] = Device(f"drive-{drive}", disk.target, size)
        self._may_boot(disk.boot_order, drive)

    def _scsi_controller(self, assigned: t.Mapping[str, Disk]) -> None:
        on_scsi = [disk for drive, disk in assigned.items() if drive.startswith("scsi")]
        if not on_scsi:
            return
        if not any(disk.bus == "scsi" for disk in on_scsi):
            self._set("scsihw", "virtio-scsi-pci")
            return
        models = list(dict.fromkeys(self._domain.scsi_controllers)) or [None]
        first = models[0]
        # without a model libvirt takes lsilogic
        controller = "lsi" if first in (None, "auto") else _SCSI_CONTROLLERS.get(first or "")
        if controller is None:
            controller = "lsi"
            self._say(f"the SCSI controller is {controller}: Proxmox VE has no {first}")
        if len(models) > 1:
            self._say(f"all disks on SCSI have one controller, {controller}, instead of several kinds")
        self._set("scsihw", controller)

    def _uefi(self) -> None:
        firmware = self._domain.firmware
        if firmware.kind != "uefi":
            return
        self._set("bios", "ovmf")
        if firmware.nvram is None or firmware.nvram.path is None or self._is_excluded(NVRAM, "efidisk0"):
            self._say("the UEFI variables are not in the archive: add an EFI disk to the restored VM before its start")
            return
        size = self._options.disk_sizes.get(NVRAM)
        efi_type = _EFI_TYPES.get(size or 540672, "4m")
        if self._domain.arch != "aarch64" and size is not None and size not in _EFI_TYPES:
            self._say(
                f"the UEFI variables have {size} bytes: Proxmox VE's firmware, which has 540672, may start afresh"
            )
        parts = [self._volume(), f"efitype={efi_type}"]
        if firmware.enrolled_keys and efi_type == "4m":
            parts.append("pre-enrolled-keys=1")
        if size is not None:
            parts.append(f"size={drives.format_size(size)}")
        self._set("efidisk0", ",".join(parts))
        self._devices["efidisk0"] = Device("drive-efidisk0", NVRAM, size)

    def _tpm(self) -> None:
        tpm = self._domain.tpm
        if tpm is None:
            return
        reason = None
        if tpm.backend != "emulator":
            reason = f"the TPM is one of the host ({tpm.backend})"
        elif tpm.encrypted:
            reason = "the TPM's state is encrypted with a key of the host"
        elif not self._options.tpm_state or self._is_excluded(TPM, "tpmstate0"):
            reason = "the TPM's state is not in the archive"
        if reason is not None:
            self._say(f"{reason}: add a new TPM after the restore, and have the recovery keys of BitLocker at hand")
            return
        version = "v1.2" if tpm.version == "1.2" else "v2.0"
        self._set("tpmstate0", f"{self._volume()},size={drives.format_size(TPM_STATE_SIZE)},version={version}")
        self._devices["tpmstate0"] = Device("drive-tpmstate0-backup", TPM, TPM_STATE_SIZE)

    def _networks(self) -> None:
        bridges = nics.Bridges(self._options.bridges, self._options.bridge)
        count = 0
        for nic in self._domain.nics:
            if nic.kind == "hostdev" or count == _MAX_NICS:
                self._say(f"not in the configuration: network interface {nic.mac} of type {nic.kind}")
                continue
            key = f"net{count}"
            self._set(key, nics.setting(key, nic, bridges, self._say))
            self._may_boot(nic.boot_order, key)
            count += 1

    def _may_boot(self, order: int | None, key: str) -> None:
        if order is not None:
            self._boot.append((order, key))

    def _boot_order(self) -> None:
        order = [key for _order, key in sorted(self._boot)]
        if not order:
            order = [key for kind in self._domain.boot or ("hd",) for key in self._first(kind)]
        if order:
            self._set("boot", f"order={';'.join(dict.fromkeys(order))}")
        else:
            self._say("the configuration has no boot order: none of the devices that the domain boots from is in it")

    def _first(self, kind: str) -> list[str]:
        """The first device of a kind, as the firmware takes it, if it is in the configuration."""
        if kind == "network":
            keys = ["net0"]
        else:
            kinds = {"hd": ("disk", "lun"), "cdrom": ("cdrom",)}.get(kind, ())
            first = next((disk for disk in self._domain.disks if disk.device in kinds), None)
            keys = [drive for drive, disk in self._drives.items() if disk == first]
        return [key for key in keys if key in self._settings]

    def _display(self) -> None:
        domain = self._domain
        for number in range(min(domain.serials, _MAX_SERIALS)):
            self._set(f"serial{number}", "socket")
        if domain.serials > _MAX_SERIALS:
            self._say(f"not in the configuration: {domain.serials - _MAX_SERIALS} of {domain.serials} serial ports")
        video = domain.videos[0] if domain.videos else None
        if video is None or video.model == "none":
            self._set("vga", "serial0" if domain.serials else "none")
            return
        display = _DISPLAYS.get(video.model)
        if video.model == "qxl":
            heads = max(1, min(4, max(video.heads, len(domain.videos))))
            display = "qxl" if heads == 1 else f"qxl{heads}"
        elif video.model == "virtio" and video.accelerated:
            display = "virtio-gl"
        if display is None:
            display = "std"
            self._say(f"the display is std: Proxmox VE has no {video.model}")
        if len(domain.videos) > 1 and video.model != "qxl":
            self._say(f"not in the configuration: {len(domain.videos) - 1} of {len(domain.videos)} displays")
        self._set("vga", display)

    def _minor_devices(self) -> None:
        domain = self._domain
        if domain.agent:
            self._set("agent", 1)
        if not domain.tablet:
            self._set("tablet", 0)
        self._sound()
        self._rng()
        self._watchdog()

    def _sound(self) -> None:
        sounds = self._domain.sounds
        known = [sound for sound in sounds if sound in _SOUNDS]
        if known:
            driver = "spice" if "spice" in self._domain.graphics else "none"
            self._set("audio0", f"device={_SOUNDS[known[0]]},driver={driver}")
        for sound in [sound for sound in sounds if sound not in _SOUNDS] + known[1:]:
            self._say(f"not in the configuration: sound {sound}")

    def _rng(self) -> None:
        if not self._domain.rngs:
            return
        rng = self._domain.rngs[0]
        source = rng.path if rng.path in _RNG_SOURCES else "/dev/urandom"
        parts = [f"source={source}"]
        parts += [f"max_bytes={rng.max_bytes}"] if rng.max_bytes is not None else []
        parts += [f"period={rng.period}"] if rng.period is not None else []
        self._set("rng0", ",".join(parts))
        if rng.backend == "egd" or (rng.path is not None and rng.path != source):
            self._say(f"the random numbers come from {source}, not from {rng.path or rng.backend}")
        if len(self._domain.rngs) > 1:
            self._say("not in the configuration: random number generators beyond the first")

    def _watchdog(self) -> None:
        # Every q35 machine has the watchdog itco
        watchdogs = [watchdog for watchdog in self._domain.watchdogs if watchdog.model != "itco"]
        known = [w for w in watchdogs if w.model in _WATCHDOGS and w.action in _WATCHDOG_ACTIONS]
        if known:
            self._set("watchdog", f"model={known[0].model},action={known[0].action}")
        for watchdog in [w for w in watchdogs if w not in known[:1]]:
            self._say(f"not in the configuration: watchdog {watchdog.model} with action {watchdog.action}")


def _is_uuid(text: str) -> bool:
    return re.fullmatch(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", text) is not None


__all__ = ("NVRAM", "TPM", "TPM_STATE_SIZE", "Device", "GuestConfig", "Options", "guest_config")
