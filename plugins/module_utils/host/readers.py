# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Who has files or block devices open, told by /proc."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import time
import typing as t

_GUESTS = ("qemu-system", "qemu-kvm", "kvm")
"""How the processes are called that run guests: these have images open without reading a snapshot."""

_POLL = 0.1


_REMOTE = ("nfs", "nfs4", "cifs", "smb3", "ceph", "9p", "afs")
"""File systems, besides those of FUSE, whose server may be gone: who asks for a file of theirs then waits for ever."""

if t.TYPE_CHECKING:
    _Identity = tuple[int, int, int]


def has_readers(paths: t.Sequence[str]) -> bool:
    """Whether another process than this one, and than a running guest, has any of the files or block devices open.

    What an ordinary user may not see is taken as not open. Descriptors on a remote file system, or on one of FUSE, are
    not looked at unless one of C(paths) lies on it.
    """
    wanted = {identity for identity in map(_identity, paths) if identity is not None}
    avoided: dict[str, set[str]] = {}
    return any(
        _has_open(pid, wanted, avoided) for pid in os.listdir("/proc") if pid.isdigit() and int(pid) != os.getpid()
    )


def has_open(pid: int, path: str) -> bool:
    """Whether a certain process has a file or block device open. False where the process or the file is gone."""
    identity = _identity(path)
    return identity is not None and _has_open(str(pid), {identity}, {})


def opened_of(pid: int, paths: t.Iterable[str]) -> set[str]:
    """Those of some files and block devices that a process, which may be a running guest, has open. Raises: OSError."""
    folder = f"/proc/{pid}/fd"
    opened = {_identity(f"{folder}/{fd}") for fd in os.listdir(folder)} - {None}
    return {path for path in paths if _identity(path) in opened}


def find_writer(paths: t.Sequence[str]) -> tuple[str, int] | None:
    """One of some block devices that another process, such as a guest, has open for writing, and the process.

    Locks do not tell: they belong to the node in /dev, and guests have a /dev of their own.
    """
    wanted = {identity: path for path in paths if (identity := _identity(path)) is not None}
    avoided: dict[str, set[str]] = {}
    for pid in os.listdir("/proc"):
        if pid.isdigit() and int(pid) != os.getpid():
            for fd, identity in _find_open(pid, set(wanted), avoided):
                if _is_writable(pid, fd):
                    return wanted[identity], int(pid)
    return None


def end_readers(paths: t.Sequence[str], timeout: float = 30.0) -> bool:
    """Ask those to end that has_readers() tells of, and wait. Whether there were some, and all have let go."""
    wanted = {identity for identity in map(_identity, paths) if identity is not None}
    avoided: dict[str, set[str]] = {}
    mine = (1, os.getpid())
    pids = [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and _has_open(pid, wanted, avoided)]
    pids = [pid for pid in pids if pid not in mine]
    for pid in pids:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + timeout
    while any(_has_open(str(pid), wanted, avoided) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL)
    return bool(pids)


def _is_writable(pid: str, fd: str) -> bool:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/fdinfo/{fd}", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            key, _colon, value = line.partition(":")
            if key == "flags":
                return int(value, 8) & os.O_ACCMODE != os.O_RDONLY
    return False


def _has_open(pid: str, wanted: set[_Identity], avoided: dict[str, set[str]]) -> bool:
    with contextlib.suppress(OSError):
        for _fd, _what in _find_open(pid, wanted, avoided):
            with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as comm:
                return not comm.read().startswith(_GUESTS)
    return False


def _find_open(pid: str, wanted: set[_Identity], avoided: dict[str, set[str]]) -> t.Iterator[tuple[str, _Identity]]:
    """The descriptors of a process that are of something wanted. C(avoided) keeps for each namespace of mounts those
    that must not be asked."""
    with contextlib.suppress(OSError):
        folder = f"/proc/{pid}/fd"
        namespace = os.readlink(f"/proc/{pid}/ns/mnt")
        if namespace not in avoided:
            avoided[namespace] = _mounts_to_avoid(pid, wanted)
        mounts = avoided[namespace]
        for fd in os.listdir(folder):
            if mounts and _mount_of(pid, fd) in mounts:
                continue
            identity = _identity(f"{folder}/{fd}")
            if identity is not None and identity in wanted:
                yield fd, identity


def _mounts_to_avoid(pid: str, wanted: set[_Identity]) -> set[str]:
    """The numbers of the mounts that a process sees whose server might not answer, and which hold nothing wanted."""
    mounts = set()
    with open(f"/proc/{pid}/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            mount, _separator, source = line.partition(" - ")
            number, _parent, device = mount.split(" ")[:3]
            kind = source.split(" ")[0]
            major, _colon, minor = device.partition(":")
            is_wanted = any(identity[0] == os.makedev(int(major), int(minor)) for identity in wanted)
            if not is_wanted and (kind in _REMOTE or kind.split(".")[0] == "fuse"):
                mounts.add(number)
    return mounts


def _mount_of(pid: str, fd: str) -> str | None:
    """The number of the mount on which a process has a file open. None where it has been closed by now."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/fdinfo/{fd}", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            key, _colon, value = line.partition(":")
            if key == "mnt_id":
                return value.strip()
    return None


def _identity(path: str) -> _Identity | None:
    """What tells a file or a block device from all others, whatever its path."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    if stat.S_ISBLK(status.st_mode):
        return 0, 0, status.st_rdev
    return status.st_dev, status.st_ino, 0


__all__ = ("end_readers", "find_writer", "has_open", "has_readers", "opened_of")
