# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""QEMU's own locks on images: held by us, they keep a VM from being started onto a disk that is being read."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import struct
import typing as t

from ..vma.errors import SourceError
from ..vma.image import check_unused
from .journal import Fields
from .provider import StepKind, Work
from .readers import find_writer

_FLOCK = struct.Struct("hhqqi4x")
_READS, _FORBIDS_WRITING, _FORBIDS_RESIZING = 100, 201, 203
"""QEMU locks byte 100 + n of an image where it does the thing n, and byte 200 + n where it forbids others the thing n;
the things are reading (0), writing (1), and resizing (3). From QEMU's documentation of the option C(locking)."""


def lock_image(path: str) -> int:
    """Keep every QEMU from writing to the image for as long as the descriptor that is returned is open.

    Raises: SourceError where a QEMU writes to it already, or it cannot be opened.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise SourceError(
            f"cannot be opened: {error.strerror}", file=path, remedy="Check the path and the permissions."
        ) from error
    try:
        if not (stat.S_ISREG(os.fstat(fd).st_mode) or stat.S_ISBLK(os.fstat(fd).st_mode)):
            raise SourceError("expected a file or a block device", file=path)
        for byte in (_READS, _FORBIDS_WRITING, _FORBIDS_RESIZING):
            request = _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0)
            # A file system without locks: QEMU could not see ours either; the check for changes is what is left.
            with contextlib.suppress(OSError):
                fcntl.fcntl(fd, fcntl.F_OFD_SETLK, request)
        # Only now, so that whoever starts meanwhile sees our locks, or is seen here.
        if not check_unused(fd, to_write=False):
            raise SourceError(
                "a running VM writes to this image", file=path, remedy="Take a snapshot of it, or stop the VM."
            )
        writer = find_writer([path]) if stat.S_ISBLK(os.fstat(fd).st_mode) else None
        if writer is not None:
            raise SourceError(
                f"the process {writer[1]} has this device open for writing",
                file=path,
                remedy="Take a snapshot of it, or stop the VM or the process.",
            )
    except BaseException:
        os.close(fd)
        raise
    return fd


def keep_at_rest(work: Work, path: str) -> None:
    """Hold the locks of an image, and watch it where they do not hold, until the snapshot is let go.

    Raises: SourceError where somebody writes to it.
    """
    fd = lock_image(path)
    try:
        if stat.S_ISBLK(os.fstat(fd).st_mode):
            work.journal.add("at-rest", path=path)
        work.hold(fd)
    finally:
        os.close(fd)


def _find_trouble(fields: Fields) -> str | None:
    found = find_writer([fields["path"]])
    return None if found is None else f"the process {found[1]} opened {found[0]} for writing while it was read in place"


KINDS: t.Mapping[str, StepKind] = {"at-rest": StepKind(undo=lambda _fields: None, health=_find_trouble)}

__all__ = ("KINDS", "keep_at_rest", "lock_image")
