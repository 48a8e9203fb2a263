# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Image files on file systems with reflinks (btrfs, xfs): frozen by copies that share their blocks.

A copy is made in one step of the file system, beside its image and hidden; so a relative path to a backing file stays
right. Several files of a VM are frozen only while the guest stands still, or while nobody writes to them.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import errno
import fcntl
import os
import re
import stat
import struct
import typing as t

from ..vma.errors import SourceError, SpaceError
from ..vma.pending_file import target_errors
from .errors import SnapshotError
from .headroom import check_room
from .journal import Fields
from .none import measured
from .provider import CRASH, MARK, OFFLINE, Disk, Frozen, Provider, StepKind, Work, consistency_of
from .scratch_space import find_shortage

_METHOD = "reflink copy"
_FICLONE = 0x40049409
_FS_IOC_GETFLAGS, _FS_IOC_SETFLAGS = 0x80086601, 0x40086602
_FS_NOCOW_FL = 0x00800000
_FLAGS = struct.Struct("i")
_OURS = re.compile(rf"\.{MARK}-[0-9a-f]{{8}}-\d+-.+", re.DOTALL)
_NAME_LIMIT = 255
"""Bytes of a file's name on Linux."""
_REMEDY = "Put the images on btrfs, or on xfs made with reflink=1; or use another provider."


class ReflinkCopies(Provider):
    """Image files, of any format."""

    name = "reflink"
    kinds: t.ClassVar[t.Mapping[str, StepKind]]

    def __init__(self, disks: t.Sequence[Disk]) -> None:
        # A copy has to be beside the image itself, not beside a link to it.
        self._disks = [dataclasses.replace(disk, path=os.path.realpath(disk.path)) for disk in disks]

    @classmethod
    def fits(cls, path: str) -> bool:
        """See Provider."""
        path = os.path.realpath(path)
        return os.path.isfile(path) and _has_reflinks(os.path.dirname(path))

    def plan(self) -> Frozen:
        """See Provider."""
        return Frozen(self._look(), _METHOD, CRASH if self._is_used() else OFFLINE)

    def freeze(self, work: Work) -> Frozen:
        """See Provider."""
        disks = self._look()
        is_used = self._is_used()
        copies = [_name_copy(disk.path, work.run_id, number) for number, disk in enumerate(disks)]
        with work.stand_still(must=is_used and len(disks) > 1) as reached:
            for disk, copy in zip(disks, copies):
                if os.path.lexists(copy):
                    raise SnapshotError("this file is in the way", file=copy, remedy="Remove it, or run again.")
                work.journal.add("reflink", path=copy)
                _clone(disk.path, copy)
        if not is_used and self._is_used():
            raise SnapshotError("an image was opened while the images were being frozen", remedy="Run it again.")
        frozen = [dataclasses.replace(disk, path=copy) for disk, copy in zip(disks, copies)]
        return Frozen(frozen, _METHOD, consistency_of(reached, len(disks), is_used=is_used))

    def _is_used(self) -> bool:
        return any(_is_written(disk.path) for disk in self._disks)

    def _look(self) -> list[Disk]:
        """The disks with their sizes. Raises: SourceError, SnapshotError, SpaceError."""
        disks = [measured(disk) for disk in self._disks]
        folders: dict[str, list[int]] = collections.defaultdict(list)
        for disk in disks:
            if not stat.S_ISREG(os.stat(disk.path).st_mode):
                raise SourceError("expected a file", file=disk.path, remedy="Use the provider of its storage.")
            folders[os.path.dirname(disk.path)].append(disk.allocated or 0)
        for folder, sizes in folders.items():
            if not _has_reflinks(folder):
                raise SnapshotError("this file system has no reflinks", file=folder, remedy=_REMEDY)
            status = os.statvfs(folder)
            check_room(f"the file system at {folder}", sizes, status.f_bavail * status.f_frsize)
            shortage = find_shortage(folder)
            if shortage is not None:
                raise SpaceError(shortage, remedy="Make room there.")
        return disks


def _name_copy(path: str, run_id: str, number: int) -> str:
    folder, name = os.path.split(path)
    prefix = f".{MARK}-{run_id}-{number}-"
    return os.path.join(folder, prefix + os.fsdecode(os.fsencode(name)[: _NAME_LIMIT - len(prefix)]))


def _has_reflinks(folder: str) -> bool:
    """Whether files in this folder can be cloned: tried with two that have neither a name nor content."""
    flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
    with contextlib.ExitStack() as stack:
        try:
            fds = [os.open(folder, flags, 0o600) for _which in range(2)]
        except OSError:
            return False
        for fd in fds:
            stack.callback(os.close, fd)
        try:
            fcntl.ioctl(fds[1], _FICLONE, fds[0])
        except OSError:
            return False
        return True


def _is_written(path: str) -> bool:
    """Whether anybody has the file open for writing: only a file that nobody has can be leased for reading."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError:
        return True  # or the file system knows no leases, and then nothing is known
    finally:
        os.close(fd)
    return False


def _clone(path: str, copy: str) -> None:
    """Make a new file that shares all blocks with C(path). Raises: SourceError, TargetError, SpaceError."""
    try:
        source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise SourceError(f"cannot be opened: {error.strerror}", file=path) from error
    try:
        with target_errors(copy):
            target = os.open(copy, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                _copy_nocow(source, target)
                fcntl.ioctl(target, _FICLONE, source)
            finally:
                os.close(target)
    finally:
        os.close(source)


def _copy_nocow(source: int, target: int) -> None:
    """btrfs shares blocks only among files that all have, or all lack, the attribute C of chattr."""
    with contextlib.suppress(OSError):  # other file systems do not know it
        flags = _FLAGS.unpack(fcntl.ioctl(source, _FS_IOC_GETFLAGS, _FLAGS.pack(0)))[0] & _FS_NOCOW_FL
        present = _FLAGS.unpack(fcntl.ioctl(target, _FS_IOC_GETFLAGS, _FLAGS.pack(0)))[0]
        if flags != present & _FS_NOCOW_FL:
            fcntl.ioctl(target, _FS_IOC_SETFLAGS, _FLAGS.pack(present & ~_FS_NOCOW_FL | flags))


def _remove(fields: Fields) -> str | None:
    path = fields["path"]
    if not _OURS.fullmatch(os.path.basename(path)):
        raise SnapshotError("this name is not one that we give", file=path, remedy="Look whose file it is.")
    try:
        # Else it takes up room until nobody reads it any more
        os.close(os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC))
        os.unlink(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        hint = "Mount it again." if error.errno == errno.EROFS else None
        raise SnapshotError(f"cannot be removed: {error.strerror}", file=path, remedy=hint) from error
    return f"the reflink copy {path}"


def _find_trouble(fields: Fields) -> str | None:
    path = fields["path"]
    if not os.path.lexists(path):
        return f"the reflink copy {path} is gone"
    return find_shortage(os.path.dirname(path))


ReflinkCopies.kinds = {"reflink": StepKind(undo=_remove, health=_find_trouble)}

__all__ = ("ReflinkCopies",)
