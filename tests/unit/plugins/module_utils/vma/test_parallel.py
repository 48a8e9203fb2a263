# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Threads that share work: the first error wins, nobody waits for ever, and the rate holds."""

from __future__ import annotations

import os
import signal
import threading
import time
import types
import typing as t

import pytest

from ansible_collections.vmbackup.vma.plugins.module_utils.vma import parallel

PATIENCE = 30
"""Seconds until a test gives up on a thread that should have ended long ago."""


def _nothing() -> None:
    """There is nothing to interrupt."""


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_all_run_the_same(threads: int) -> None:
    seen: list[int] = []
    parallel.Crew(_nothing).run(lambda: seen.append(threading.get_ident()), threads)
    assert len(seen) == max(1, threads)


def test_the_first_error_ends_all() -> None:
    interrupted: list[int] = []
    first = threading.Event()
    started = threading.Barrier(3)
    order: list[int] = []

    def interrupt() -> None:
        interrupted.append(1)
        first.set()

    crew = parallel.Crew(interrupt)

    def work() -> None:
        number = started.wait(PATIENCE)
        if number == 0:
            raise ValueError("the first")
        # these two wait until the first has failed
        assert first.wait(PATIENCE)
        order.append(number)
        if number == 1:
            raise KeyError("a later one")
        crew.check()
        raise AssertionError("check() let a stopped thread go on")

    with pytest.raises(ValueError, match="the first"):
        crew.run(work, 3)
    assert interrupted == [1]
    assert sorted(order) == [1, 2]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError, ValueError])
def test_any_error_is_carried(error: type[BaseException]) -> None:
    def work() -> None:
        raise error

    with pytest.raises(error):
        parallel.Crew(_nothing).run(work, 2)


def test_a_pause_ends_with_the_crew() -> None:
    crew = parallel.Crew(_nothing)
    paused = threading.Event()
    ended: list[bool] = []
    roles = iter(("sleeps", "fails"))

    def work() -> None:
        if next(roles) == "fails":
            assert paused.wait(PATIENCE)
            raise ValueError("enough")
        paused.set()
        try:
            crew.pause(3600)
        except parallel.Stopped:
            ended.append(True)
            raise

    began = time.monotonic()
    with pytest.raises(ValueError, match="enough"):
        crew.run(work, 2)
    assert ended == [True]
    assert time.monotonic() - began < 3600


class _Interrupted(BaseException):
    """What a handler of a signal raises."""


@pytest.fixture
def interruptible() -> t.Iterator[None]:
    """The first SIGUSR1 raises _Interrupted in the main thread."""

    def interrupt(number: int, _frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)
        raise _Interrupted

    previous = signal.signal(signal.SIGUSR1, interrupt)
    yield
    signal.signal(signal.SIGUSR1, previous)


def _interrupt(crew: parallel.Crew) -> None:
    """Send the signal until it is heard: Python hears none that comes just before it begins to wait for a lock."""
    give_up = time.monotonic() + PATIENCE
    while not crew._stop.wait(0.1):
        assert time.monotonic() < give_up
        os.kill(os.getpid(), signal.SIGUSR1)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_waits_for_what_the_threads_are_doing() -> None:
    """Who calls run() frees what they use as soon as it is left."""
    members: list[threading.Thread] = []
    working = threading.Barrier(3, action=lambda: members.extend(threading.enumerate()[-3:]))
    done: list[int] = []
    enough = threading.Event()
    # As long as a call of the system or of a library may still take
    crew = parallel.Crew(threading.Timer(0.2, enough.set).start)

    def work() -> None:
        if working.wait(PATIENCE) == 0:
            _interrupt(crew)
        # The first is the one that the main thread waits for as the signal comes
        if threading.current_thread() is members[0]:
            assert enough.wait(PATIENCE)
        done.append(1)

    with pytest.raises(_Interrupted):
        crew.run(work, 3)
    assert len(done) == 3


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_while_a_thread_is_starting(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is alive already, and does not say so yet."""
    done: list[int] = []
    crew = parallel.Crew(_nothing)
    set_ident = vars(threading.Thread)["_set_ident"]

    def starting(thread: threading.Thread) -> None:
        set_ident(thread)
        _interrupt(crew)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "_set_ident", starting)
        with pytest.raises(_Interrupted):
            crew.run(lambda: done.append(1), 2)
    assert not done


def test_stop_is_told_once() -> None:
    interrupted: list[int] = []
    crew = parallel.Crew(lambda: interrupted.append(1))
    crew.check()
    crew.stop()
    crew.stop()
    assert interrupted == [1]
    with pytest.raises(parallel.Stopped):
        crew.check()
    with pytest.raises(parallel.Stopped):
        crew.pause(0)


def test_turns_come_in_order() -> None:
    crew = parallel.Crew(_nothing)
    turns = parallel.Turns(crew)
    numbers = iter(range(200))
    choosing = threading.Lock()
    seen: list[int] = []

    def work() -> None:
        while True:
            with choosing:
                number = next(numbers, None)
            if number is None:
                return
            with turns.turn(number):
                seen.append(number)

    crew.run(work, 5)
    assert seen == list(range(200))


def test_who_waits_for_a_turn_that_never_comes_is_let_go() -> None:
    turns: list[parallel.Turns] = []

    def interrupt() -> None:
        turns[0].wake()

    crew = parallel.Crew(interrupt)
    turns.append(parallel.Turns(crew))
    roles = iter((2, 1, 0))

    def work() -> None:
        number = next(roles)
        with turns[0].turn(number):
            raise ValueError(f"turn {number}")

    with pytest.raises(ValueError, match="turn 0"):
        crew.run(work, 3)


class _Clock:
    """A clock that goes on only where somebody pauses."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 50.0
        monkeypatch.setattr(parallel, "time", types.SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(parallel.Crew, "pause", lambda _crew, seconds: self.go_on(seconds))

    def go_on(self, seconds: float) -> None:
        assert seconds >= 0
        self.now += seconds


@pytest.mark.parametrize("counts", [[100] * 10, [1] * 1000, [1000], [900, 100], [0, 500, 500]])
def test_throttle(counts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _Clock(monkeypatch)
    throttle = parallel.Throttle(100, parallel.Crew(_nothing))
    for count in counts:
        throttle.take(count)
    # each waits for those before it
    assert clock.now - 50 == pytest.approx(sum(counts[:-1]) / 100)


def test_throttle_gives_no_credit_for_time_that_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _Clock(monkeypatch)
    throttle = parallel.Throttle(100, parallel.Crew(_nothing))
    throttle.take(100)
    clock.go_on(1000)
    before = clock.now
    for _number in range(3):
        throttle.take(100)
    assert clock.now - before == pytest.approx(2)


def test_without_a_limit_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    def pause(*_args: object) -> t.NoReturn:
        raise AssertionError("there is nothing to wait for")

    monkeypatch.setattr(parallel.Crew, "pause", pause)
    throttle = parallel.Throttle(None, parallel.Crew(_nothing))
    throttle.take(1 << 60)
