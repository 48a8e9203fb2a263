# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Disks that are at rest: read in place, with QEMU's own locks held so that no VM is started onto them."""

from __future__ import annotations

import dataclasses
import os
import stat
import typing as t

from ..vma.errors import SourceError
from .locks import keep_at_rest, lock_image
from .provider import OFFLINE, Disk, Frozen, Provider, Work


class AtRest(Provider):
    """Files and block devices that nothing writes to."""

    name = "none"
    _METHOD = "read in place"

    def __init__(self, disks: t.Sequence[Disk]) -> None:
        # The keeper, which looks for readers, works in another folder.
        self._disks = [dataclasses.replace(disk, path=os.path.abspath(disk.path)) for disk in disks]

    def plan(self) -> Frozen:
        """See Provider."""
        for disk in self._disks:
            os.close(lock_image(disk.path))
        return Frozen([measured(disk) for disk in self._disks], self._METHOD, OFFLINE)

    def freeze(self, work: Work) -> Frozen:
        """See Provider."""
        for disk in self._disks:
            keep_at_rest(work, disk.path)
        return Frozen([measured(disk) for disk in self._disks], self._METHOD, OFFLINE)


def measured(disk: Disk) -> Disk:
    """The disk with its size, as far as it is raw, and with what it takes up. Raises: SourceError."""
    try:
        with open(disk.path, "rb") as image:
            status = os.fstat(image.fileno())
            size = image.seek(0, os.SEEK_END)
    except OSError as error:
        raise SourceError(f"cannot be opened: {error.strerror}", file=disk.path) from error
    allocated = size if stat.S_ISBLK(status.st_mode) else status.st_blocks * 512
    return dataclasses.replace(disk, size=size if disk.format == "raw" else None, allocated=allocated)


__all__ = ("AtRest", "measured")
