# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Who has files or block devices open, told by /proc."""

from __future__ import annotations

import contextlib
import os
import stat
import typing as t

_GUESTS = ("qemu-system", "qemu-kvm", "kvm")
"""How the processes are called that run guests: these have images open without reading a snapshot."""


def has_readers(paths: t.Sequence[str]) -> bool:
    """Whether another process than this one, and than a running guest, has any of the files or block devices open.

    What an ordinary user may not see is taken as not open.
    """
    wanted = {identity for identity in map(_identity, paths) if identity is not None}
    return any(_has_open(pid, wanted) for pid in os.listdir("/proc") if pid.isdigit() and int(pid) != os.getpid())


def has_open(pid: int, path: str) -> bool:
    """Whether a certain process has a file or block device open. False where the process or the file is gone."""
    identity = _identity(path)
    return identity is not None and _has_open(str(pid), {identity})


def _has_open(pid: str, wanted: set[tuple[int, int, int]]) -> bool:
    with contextlib.suppress(OSError):
        folder = f"/proc/{pid}/fd"
        if any(_identity(f"{folder}/{fd}") in wanted for fd in os.listdir(folder)):
            with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as comm:
                return not comm.read().startswith(_GUESTS)
    return False


def _identity(path: str) -> tuple[int, int, int] | None:
    """What tells a file or a block device from all others, whatever its path."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    if stat.S_ISBLK(status.st_mode):
        return 0, 0, status.st_rdev
    return status.st_dev, status.st_ino, 0


__all__ = ("has_open", "has_readers")
