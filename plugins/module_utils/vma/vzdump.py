# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Proxmox VE's conventions around archives: file names, the notes and the protection beside them, qemu-server.conf."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import time
import typing as t
import urllib.parse

CONFIG_NAME = "qemu-server.conf"
"""The config that qmrestore reads; an archive without it does not restore there."""
NOTES_SUFFIX = ".notes"
PROTECTED_SUFFIX = ".protected"
SIDECAR_SUFFIXES = (NOTES_SUFFIX, PROTECTED_SUFFIX, ".log")
"""What the files beside an archive end in."""
_NOTES_LIMIT = 64 << 10

_STANDARD = re.compile(
    r"vzdump-qemu-(?P<vmid>[0-9]{3,9})-(?P<time>[0-9]{4}_[0-9]{2}_[0-9]{2}-[0-9]{2}_[0-9]{2}_[0-9]{2})"
    r"\.vma(?:\.(?:gz|lzo|zst|bz2))?"
)
_ARCHIVE = re.compile(r"[^.].*\.vma(?:\.(?:gz|lzo|zst|bz2))?")
# No field holds a colon; a pattern that allowed for one would take hours for a line of many.
_MAP = re.compile(r"#qmdump#map:([^\s:]+):([^\s:]+):([^\s:]*):([^\s:]*):")
_SETTING = re.compile(r"([a-z][a-z_]*[0-9]*):\s*(\S.*)")
_NUMBERS = ("memory", "cores", "sockets", "vcpus", "balloon")
_TEXTS = ("name", "ostype", "bios", "machine", "cpu", "scsihw", "boot", "agent")
_DRIVE = re.compile(r"(?:ide|sata|scsi|virtio|efidisk|tpmstate)[0-9]+")


@dataclasses.dataclass(frozen=True)
class StandardName:
    """What a standard archive name tells. C(timestamp) is in seconds since the epoch; the name has local time."""

    vmid: int
    timestamp: int


def parse_name(path: str) -> StandardName | None:
    """The VM and time in a standard name; None for other names, which Proxmox VE neither groups nor prunes."""
    match = _STANDARD.fullmatch(os.path.basename(path))
    if match is None:
        return None
    try:
        local = time.strptime(match["time"], "%Y_%m_%d-%H_%M_%S")
        return StandardName(int(match["vmid"]), int(time.mktime(local)))
    except (ValueError, OverflowError):
        return None


def is_archive_name(name: str) -> bool:
    """Whether a file of this name is meant to be an archive."""
    return _ARCHIVE.fullmatch(name) is not None


def read_notes(path: str) -> str | None:
    """The notes that stand beside the archive, without the newline at their end; None where there are none."""
    try:
        with open(path + NOTES_SUFFIX, "rb") as file:
            return file.read(_NOTES_LIMIT).decode("utf-8", "replace").rstrip("\n")
    except OSError:
        return None


def is_protected(path: str) -> bool:
    """Whether the archive is protected from removal."""
    return os.path.lexists(path + PROTECTED_SUFFIX)


def parse_config(data: bytes) -> dict[str, t.Any]:
    """The VM that a qemu-server.conf describes, as far as C(vm) in results tells of it.

    C(disks) has for each drive its setting and, from its map line, the device of the archive, storage and format.
    Sections, which hold snapshots and pending changes, are not the VM's present state and are passed over.
    """
    settings: dict[str, str] = {}
    description: list[str] = []
    maps: dict[str, dict[str, str]] = {}
    for line in data.decode("utf-8", "replace").splitlines():
        if line.startswith("["):
            break
        mapped = _MAP.fullmatch(line.strip())
        setting = _SETTING.fullmatch(line.rstrip())
        if mapped is not None:
            drive, device, storage, image_format = mapped.groups()
            maps[drive] = {"device": device, "storage": storage or "local", "format": image_format or "raw"}
        elif line.startswith("#"):
            description.append(urllib.parse.unquote(line[1:]))
        elif setting is not None:
            settings[setting[1]] = setting[2]
    vm: dict[str, t.Any] = {key: settings.get(key) for key in _TEXTS}
    for key in _NUMBERS:
        vm[key] = None
        with contextlib.suppress(KeyError, ValueError):
            vm[key] = int(settings[key])
    vm["description"] = "\n".join(description) or None
    vm["disks"] = [
        {"drive": drive, "setting": settings.get(drive), **maps.get(drive, {})}
        for drive in sorted({key for key in settings if _DRIVE.fullmatch(key)} | set(maps))
    ]
    return vm


__all__ = (
    "CONFIG_NAME",
    "NOTES_SUFFIX",
    "PROTECTED_SUFFIX",
    "SIDECAR_SUFFIXES",
    "StandardName",
    "is_archive_name",
    "is_protected",
    "parse_config",
    "parse_name",
    "read_notes",
)
