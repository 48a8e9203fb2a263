# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A copy of the UEFI variables, which are no disk to libvirt and so in no snapshot of it."""

from __future__ import annotations

import os
import shutil

from ..vma.errors import SourceError
from ..vma.pending_file import target_errors
from .command import run
from .domain import Domain
from .provider import Disk

DRIVE = "efidisk0"
_ATTEMPTS = 5
_LIMIT = 64 << 20
"""Bytes; OVMF has half a megabyte, other firmware up to 64 MiB."""


def find_nvram(domain: Domain) -> Disk | None:
    """The file with the UEFI variables, where the domain has one that libvirt has made already."""
    nvram = domain.firmware.nvram
    if nvram is None or nvram.path is None or not os.path.exists(nvram.path):
        return None
    size = os.path.getsize(nvram.path)
    return Disk(DRIVE, nvram.path, nvram.format, size if nvram.format == "raw" else None, size)


def copy_nvram(found: Disk, folder: str) -> Disk:
    """Copy the variables of a guest, which may be running, into the folder, as a raw image.

    Raises: SourceError where they cannot be read, or change again and again; ToolError; TargetError.
    """
    first = _read(found.path)
    for _attempt in range(_ATTEMPTS):
        second = _read(found.path)
        if second == first:
            break
        first = second
    else:
        raise SourceError("the UEFI variables change while they are being copied", file=found.path, remedy="Try again.")
    copy = os.path.join(folder, DRIVE)
    with target_errors(copy), open(copy, "wb") as file:
        file.write(first)
    if found.format != "raw":
        converted = f"{copy}.raw"
        run(["qemu-img", "convert", "-f", found.format, "-O", "raw", copy, converted], purpose="to read UEFI variables")
        shutil.move(converted, copy)
    size = os.path.getsize(copy)
    return Disk(DRIVE, copy, "raw", size, size)


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(_LIMIT + 1)
    except OSError as error:
        raise SourceError(f"the UEFI variables cannot be read: {error.strerror}", file=path) from error
    if len(data) > _LIMIT:
        raise SourceError(f"expected at most {_LIMIT} bytes of UEFI variables", file=path)
    return data


__all__ = ("DRIVE", "copy_nvram", "find_nvram")
