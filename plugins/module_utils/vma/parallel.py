# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Work that several threads share: the first error ends them all. Knows nothing of archives.

Reading, writing, hashing and compressing release the interpreter's lock, so threads use as many cores as there are.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
import typing as t

_ENDING = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def _signals_held_back() -> t.Iterator[None]:
    """Block the signals that ask to end, in threads that are started meanwhile for as long as they live.

    They are for the main thread, which may have to block them itself to end in peace, while others are not gone yet.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Stopped(Exception):
    """Another thread failed, or the run was interrupted: give up quietly."""


class Crew:
    """Threads that all run one function, which shares out the work itself."""

    def __init__(self, interrupt: t.Callable[[], None]) -> None:
        """C(interrupt) ends what a thread may be waiting for; it is called once, when the crew has to stop."""
        self._interrupt = interrupt
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._at_work = 0
        self._changed = threading.Condition()

    def run(self, work: t.Callable[[], None], threads: int) -> None:
        """Run C(work) in so many threads until all of them return. Raises: the first error that one of them raised."""
        if threads <= 1:
            self._guard(work)
        else:
            self._run_threads(work, threads)
        if self._error is not None:
            raise self._error

    def _run_threads(self, work: t.Callable[[], None], threads: int) -> None:
        members = [threading.Thread(target=self._take_part, args=(work,), daemon=True) for _n in range(threads)]
        try:
            with _signals_held_back():
                for member in members:
                    member.start()
            for member in members:
                member.join()
        except BaseException:  # an interrupt by a signal reaches the main thread here
            self.stop()
            # What the threads use must not be let go before they do. join() does not tell: in Python up to 3.12 it
            # takes a thread for ended after an exception came out of it, and it refuses one that is just starting.
            with self._changed:
                while self._at_work:
                    self._changed.wait()
            raise

    def _take_part(self, work: t.Callable[[], None]) -> None:
        with self._changed:
            if self._stop.is_set():
                return
            self._at_work += 1
        try:
            self._guard(work)
        finally:
            with self._changed:
                self._at_work -= 1
                self._changed.notify_all()

    def _guard(self, work: t.Callable[[], None]) -> None:
        try:
            work()
        except Stopped:
            return
        except BaseException as error:  # noqa: BLE001 carried to the caller of run(), whatever it is
            with self._changed:
                if self._error is None and not self._stop.is_set():
                    self._error = error
            self.stop()

    def stop(self) -> None:
        """Tell all threads to give up."""
        with self._changed:
            if self._stop.is_set():
                return
            self._stop.set()
        self._interrupt()

    def check(self) -> None:
        """Raises: Stopped where the crew has to stop."""
        if self._stop.is_set():
            raise Stopped

    def pause(self, seconds: float) -> None:
        """Sleep. Raises: Stopped where the crew has to stop meanwhile."""
        if self._stop.wait(seconds):
            raise Stopped


class Turns:
    """Lets threads through one by one, in the order of their numbers."""

    def __init__(self, crew: Crew) -> None:
        self._crew = crew
        self._next = 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def turn(self, number: int) -> t.Iterator[None]:
        """Wait for the turn of C(number); it lasts as long as the context. Raises: Stopped."""
        with self._changed:
            while self._next != number:
                self._crew.check()
                self._changed.wait()
            self._crew.check()
            yield
            self._next += 1
            self._changed.notify_all()

    def wake(self) -> None:
        """Let all that wait see that the crew has to stop."""
        with self._changed:
            self._changed.notify_all()


class Throttle:
    """Holds a rate of bytes a second over the whole run."""

    def __init__(self, bytes_per_second: int | None, crew: Crew) -> None:
        self._rate = bytes_per_second
        self._crew = crew
        self._lock = threading.Lock()
        self._due = time.monotonic()

    def take(self, count: int) -> None:
        """Wait until C(count) bytes may be moved. Raises: Stopped."""
        if self._rate is None:
            return
        with self._lock:
            now = time.monotonic()
            start = max(self._due, now)
            self._due = start + count / self._rate
        self._crew.pause(max(0.0, start - now))


__all__ = ("Crew", "Stopped", "Throttle", "Turns")
