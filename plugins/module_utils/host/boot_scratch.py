# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The folder in which everything lies that a booted guest needs: it vanishes with the guest, whatever ends it.

The folder is locked as long as its maker lives. The next run clears those whose maker was killed, and ends a QEMU that
outlived it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import signal
import time
import typing as t

from ..vma.errors import RequestError
from ..vma.pending_file import target_errors, unfinished

PREFIX = ".vma-boot-"
PID_FILE = "pid"
"""Where in the folder QEMU writes its process id."""
_PATIENCE = 5.0
"""Seconds that a killed QEMU gets to be gone; more than it needs, unless its storage hangs."""


@contextlib.contextmanager
def scratch_folder(parent: str) -> t.Iterator[str]:
    """A folder below C(parent), readable by its maker alone.

    Raises: RequestError where the parent is no folder; TargetError, SpaceError.
    """
    if not os.path.isdir(parent):
        raise RequestError("this folder for scratch files does not exist", file=parent, remedy="Make it first.")
    with target_errors(parent):
        for entry in os.listdir(parent):
            if entry.startswith(PREFIX):
                _remove_leftover(os.path.join(parent, entry))
        folder, fd = _make(parent)
    try:
        yield folder
    finally:
        _clear(folder)
        unfinished.pop(folder, None)
        os.close(fd)


def _make(parent: str) -> tuple[str, int]:
    while True:
        folder = os.path.join(os.path.realpath(parent), PREFIX + secrets.token_hex(8))
        unfinished[folder] = _clear
        os.mkdir(folder, 0o700)
        # Another run may take the folder for a leftover before it is locked, and then it is gone.
        with contextlib.suppress(FileNotFoundError, BlockingIOError):
            fd = _lock(folder)
            if os.path.exists(folder):
                return folder, fd
            os.close(fd)
        unfinished.pop(folder, None)


def _lock(folder: str) -> int:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _remove_leftover(folder: str) -> None:
    with contextlib.suppress(OSError):
        fd = _lock(folder)
        try:
            # In a folder that all may write to, others can make what looks like ours.
            if os.fstat(fd).st_uid == os.geteuid():
                _clear(folder)
        finally:
            os.close(fd)


def _clear(folder: str) -> None:
    """Remove a folder, and first end a QEMU that still works in it."""
    _end_qemu(folder)
    shutil.rmtree(folder, ignore_errors=True)


def _end_qemu(folder: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        with open(os.path.join(folder, PID_FILE), encoding="ascii") as file:
            pid = int(file.read())
        deadline = time.monotonic() + _PATIENCE
        # The number may be another process's by now; the folder's name stands in the command line of ours alone.
        while os.fsencode(os.path.basename(folder)) in _command_line(pid) and time.monotonic() < deadline:
            os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)


def _command_line(pid: int) -> bytes:
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        return file.read()


__all__ = ("PID_FILE", "PREFIX", "scratch_folder")
