# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Which drive of Proxmox VE a domain's disk becomes, and how the drive's setting reads. No I/O.

A disk keeps its drive when other disks come, go, or are left out, as far as there is room: the number is told by the
letters of its target.
"""

from __future__ import annotations

import re
import typing as t
import urllib.parse

from ..vma.errors import RequestError
from .domain import Disk

LIMITS = {"ide": 4, "sata": 6, "scsi": 31, "virtio": 16}
"""How many drives Proxmox VE has on each bus."""

_ROOM: dict[str, tuple[str, ...]] = {
    "virtio": ("virtio", "scsi", "sata", "ide"),
    "scsi": ("scsi", "virtio", "sata", "ide"),
    "sata": ("sata", "ide", "scsi", "virtio"),
    "ide": ("ide", "sata", "scsi", "virtio"),
}
"""Where a disk goes: its own bus, then those whose driver its guest most likely has."""
_OTHER_BUS = _ROOM["sata"]
_CACHES = frozenset(("directsync", "none", "unsafe", "writeback", "writethrough"))
_WWN = re.compile(r"(?:0x)?([0-9a-fA-F]{16})")
_SERIAL_LIMIT = 20

Say = t.Callable[[str], None]
"""Takes a sentence about something that is otherwise in the archive than in the domain."""


def assign(disks: t.Iterable[Disk]) -> dict[str, Disk]:
    """The drive of every disk that a backup holds and of every CD-ROM, such as C(scsi0): disks first, in their order.

    Raises: RequestError where Proxmox VE has not so many drives, or two disks have the same target.
    """
    drives: dict[str, Disk] = {}
    targets: set[str] = set()
    for disk in sorted(disks, key=lambda disk: disk.device == "cdrom"):
        if disk.target in targets:
            raise RequestError(f"the domain has two disks with the target {disk.target}")
        targets.add(disk.target)
        is_cdrom = disk.device == "cdrom"
        if not is_cdrom and disk.obstacle is not None:
            continue
        buses = [bus for bus in _ROOM.get(disk.bus, _OTHER_BUS) if not (is_cdrom and bus == "virtio")]
        drive = next(filter(None, (_free(bus, disk.target, drives) for bus in buses)), None)
        if drive is not None:
            drives[drive] = disk
        elif not is_cdrom:
            raise RequestError(
                f"disk {disk.target} finds no drive: Proxmox VE has {sum(LIMITS.values())} for each VM",
                remedy="Exclude disks that need no backup by taking them from the domain's XML.",
            )
    return drives


def _free(bus: str, target: str, taken: t.Container[str]) -> str | None:
    """The drive on the bus that the target's letters tell, else the first that is free; None where all are taken."""
    candidates = [_position(target), *range(LIMITS[bus])]
    return next((f"{bus}{i}" for i in candidates if i < LIMITS[bus] and f"{bus}{i}" not in taken), None)


def _position(target: str) -> int:
    """C(vda) is 0, C(vdz) 25, C(vdaa) 26."""
    match = re.fullmatch(r"(?:[hsvfu][db]|xvd)([a-z]{1,3})", target)
    if match is None:
        return 0
    position = 0
    for letter in match[1]:
        position = position * 26 + ord(letter) - ord("a") + 1
    return position - 1


def setting(drive: str, disk: Disk, volume: str, size: int | None, say: Say) -> str:
    """The drive's setting for a disk that Proxmox VE restores to the volume. C(size) is in bytes."""
    bus = drive.rstrip("0123456789")
    if bus != disk.bus:
        say(f"disk {disk.target} is {drive}: Proxmox VE has no room for it on bus {disk.bus}, or no such bus")
    options = {
        "cache": disk.cache if disk.cache in _CACHES else None,
        "discard": "on" if disk.discard else None,
        "iothread": "1" if disk.iothread and bus == "virtio" else None,
        "ro": "1" if disk.readonly and bus in ("scsi", "virtio") else None,
        "serial": _serial(disk, say),
        "size": None if size is None else format_size(size),
        "ssd": "1" if disk.ssd and bus != "virtio" else None,
        "wwn": _wwn(disk, bus, say),
    }
    _say_differences(disk, bus, say)
    return ",".join([volume, *(f"{key}={value}" for key, value in options.items() if value is not None)])


def _serial(disk: Disk, say: Say) -> str | None:
    if disk.serial is None:
        return None
    if len(disk.serial.encode()) > _SERIAL_LIMIT:
        say(f"disk {disk.target} has no serial number: {disk.serial} is longer than {_SERIAL_LIMIT} bytes")
        return None
    return urllib.parse.quote(disk.serial, safe="")


def _wwn(disk: Disk, bus: str, say: Say) -> str | None:
    if disk.wwn is None:
        return None
    match = _WWN.fullmatch(disk.wwn)
    if match is None or bus == "virtio":
        say(f"disk {disk.target} has no WWN: {disk.wwn} has no place on bus {bus}")
        return None
    return f"0x{match[1].lower()}"


def _say_differences(disk: Disk, bus: str, say: Say) -> None:
    differences = {
        "is encrypted by its hypervisor, and Proxmox VE does not decrypt it": disk.encrypted,
        "has limits on I/O, which are not in the configuration": disk.limited,
        "is read-only in the domain and writable here": disk.readonly and bus not in ("scsi", "virtio"),
        "is shared with other VMs, which the restored one is not part of": disk.shareable,
        "forgets its changes in the domain and keeps them here": disk.transient,
        "was a LUN passed through and is an ordinary disk here": disk.device == "lun",
    }
    for words, holds in differences.items():
        if holds:
            say(f"disk {disk.target} {words}")


def format_size(size: int) -> str:
    """A size as Proxmox VE writes it: in the largest unit that leaves no rest."""
    units = ["", "K", "M", "G", "T"]
    while size and size % 1024 == 0 and len(units) > 1:
        size //= 1024
        units.pop(0)
    return f"{size}{units[0]}"


__all__ = ("LIMITS", "Say", "assign", "format_size", "setting")
