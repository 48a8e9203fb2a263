# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The process that keeps a snapshot while others read it, and undoes everything when nobody needs it any more.

It is forked before anything is touched, so that a module that is killed half-way leaves no guest frozen. It holds the
VM's lock, and the locks of images that are read in place. Only the journal tells it what there is to undo.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import time
import typing as t

from ..vma.errors import VmaError
from .errors import SnapshotError
from .journal import Journal
from .provider import StepKind
from .readers import end_readers, has_open, has_readers
from .undo import find_trouble, release

_HOLD, _READY = b"h", b"r"
_POLL = 2.0
"""Seconds between two looks at the snapshot's health. A guest that was paused waits no longer than this."""
_ASK = signal.SIGUSR1
"""Asks the keeper to let go. The other signals end it as well, but nobody who needs the snapshot sends those."""
_ENDING = (_ASK, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Limits(t.NamedTuple):
    """How long a snapshot is kept at most, and how long while nobody has its disks open; both in seconds."""

    total: float
    idle: float


class Keeper:
    """The keeper as the process sees it that started it."""

    def __init__(self, pid: int, channel: socket.socket) -> None:
        """For start_keeper() alone."""
        self._pid = pid
        self._channel = channel
        self._is_told = False

    def hold(self, fd: int) -> None:
        """Give the keeper a descriptor, whose locks it holds until the end. Raises: SnapshotError."""
        try:
            socket.send_fds(self._channel, [_HOLD], [fd])
        except OSError as error:
            raise SnapshotError(f"the keeper of the snapshot has died: {error.strerror}") from error

    def ready(self) -> None:
        """Say that all is frozen, and leave the snapshot to the keeper. Raises: SnapshotError."""
        self._is_told = True
        try:
            self._channel.sendall(_READY)
            # The answer says that it took over; without it, a keeper that just died would be trusted with a snapshot.
            if self._channel.recv(1) != _READY:
                raise OSError(0, "it closed its end")
        except OSError as error:
            raise SnapshotError(f"the keeper of the snapshot has died: {error.strerror}") from error
        self._channel.close()

    def abandon(self) -> None:
        """Let the keeper undo everything, and wait until it has, or has died."""
        if self._is_told:
            os.kill(self._pid, _ASK)
        self._channel.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._pid, 0)


def start_keeper(journal: Journal, kinds: t.Mapping[str, StepKind], limits: Limits) -> Keeper:
    """Fork the keeper, which holds the journal's lock from now on. Returns in the process that called."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid:
        theirs.close()
        journal.note(pid=pid)
        return Keeper(pid, ours)
    # Nothing may get from here into the caller's code, whatever happens.
    status = 1
    try:
        ours.close()
        _detach(keep=(journal.lock, theirs.fileno()))
        _keep(journal, kinds, limits, theirs)
        status = 0
    finally:
        os._exit(status)


def ask(pid: int, lock: str) -> bool:
    """Ask a keeper to let go. False where the process, which must have the lock open, is none, or is no more."""
    # The number in a journal may be from before a reboot, and somebody else's by now.
    if not has_open(pid, lock):
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, _ASK)
    return True


def _detach(keep: tuple[int, ...]) -> None:
    os.setsid()
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    for fd in sorted(int(entry) for entry in os.listdir("/proc/self/fd")):
        if fd > 2 and fd not in keep:
            with contextlib.suppress(OSError):
                os.close(fd)
    sys.stdin = sys.stdout = sys.stderr = open(os.devnull, "r+", encoding="utf-8")  # noqa: SIM115 (as long as we live)


def _keep(journal: Journal, kinds: t.Mapping[str, StepKind], limits: Limits, channel: socket.socket) -> None:
    came: list[int] = []
    for number in _ENDING:
        signal.signal(number, lambda number, _frame: came.append(number))
    held: list[int] = []
    trouble: str | None = None
    try:
        is_ready = _wait_until_ready(channel, held)
        journal.reload()
        if is_ready:
            trouble = _watch(journal, kinds, limits, came)
        elif journal.steps:
            trouble = "vm_snapshot ended before the snapshot was ready"
    except Exception as error:  # noqa: BLE001 (whatever it is, no guest may be left frozen)
        trouble = f"the keeper of the snapshot failed: {error!r}"
    # What is removed now must not be interrupted; a kill leaves the rest to the next run.
    for number in _ENDING:
        signal.signal(number, signal.SIG_IGN)
    if trouble is not None:
        # The journal's file system may be full, and what is removed now may be what fills it.
        with contextlib.suppress(VmaError):
            journal.note(trouble=trouble)
    try:
        _release(journal, kinds, by_force=trouble is not None)
    except VmaError as error:
        journal.note(trouble=str(error) if trouble is None else f"{trouble}; {error}")
    finally:
        for fd in held:
            os.close(fd)
        journal.note(pid=None)
        if not journal.steps and "ready" not in journal.notes:
            journal.delete()  # nobody was ever told of this snapshot, so nobody will ask what became of it
        journal.close()
        channel.close()


def _release(journal: Journal, kinds: t.Mapping[str, StepKind], *, by_force: bool) -> None:
    """Undo everything. C(by_force) ends those who keep it from being undone by reading what is of no use any more.

    Until they let go, what fills the guests' storage goes on to fill it.
    """
    try:
        release(journal, kinds)
    except VmaError:
        if not (by_force and end_readers(_paths(journal))):
            raise
        release(journal, kinds)


def _paths(journal: Journal) -> list[str]:
    return [disk["path"] for disk in journal.notes.get("disks", [])]


def _wait_until_ready(channel: socket.socket, held: list[int]) -> bool:
    """Take descriptors until the starter is ready. False where it gave up or died."""
    while True:
        try:
            message, fds, _flags, _address = socket.recv_fds(channel, 1, 1)
        except InterruptedError:
            continue
        except OSError:
            return False
        held.extend(fds)
        if message == _READY:
            channel.sendall(_READY)
            channel.close()
            return True
        if message != _HOLD:
            return False


def _watch(journal: Journal, kinds: t.Mapping[str, StepKind], limits: Limits, came: t.Sequence[int]) -> str | None:
    """Return when the snapshot is to go: None if it was asked for, else why. C(came) are the signals so far."""
    paths = _paths(journal)
    now = time.monotonic()
    deadline, last_used = now + limits.total, now
    while not came:
        trouble = find_trouble(journal, kinds)
        if trouble is not None:
            return trouble
        now = time.monotonic()
        if now > deadline:
            return f"the snapshot was kept for {limits.total:g} seconds, which is as long as was allowed"
        if has_readers(paths):
            last_used = now
        elif now - last_used > limits.idle:
            return f"nobody has read the snapshot for {limits.idle:g} seconds"
        # A signal ends the wait early: Python takes up select() again, so the wait is cut into pieces.
        for _piece in range(20):
            if came:
                break
            select.select([], [], [], _POLL / 20)
    # What happened since the last look makes what was read as worthless as what happened before it.
    trouble = find_trouble(journal, kinds)
    if trouble is None and _ASK not in came:
        return f"{signal.Signals(came[0]).name} ended the keeper of the snapshot before it was let go"
    return trouble


__all__ = ("Keeper", "Limits", "ask", "start_keeper")
