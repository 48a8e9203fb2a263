# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""An operation of the codec in a process of its own: to be killed, or to run as somebody else."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import types
import typing as t
from unittest import mock

from ansible_collections.vmbackup.vma.plugins.module_utils.vma import create, extract, layout, verify, zstd

UUID = "00010203-0405-0607-0809-0a0b0c0d0e0f"
_START = f"import sys; sys.path[:] = {{path!r}}; import {__name__} as victim; victim.main()"
_SECONDS = 60


@dataclasses.dataclass(frozen=True)
class Task:
    """What to do. C(die_before) is the number of the call into the system that is not made any more.

    C(uid) is who does it, where that is not who runs the tests.
    """

    operation: str
    src: str
    dest: str
    format: str = "raw"
    without_libzstd: bool = False
    die_before: int | None = None
    uid: int | None = None


def run(task: Task) -> None:
    """Do it, in this process. The same task makes the same bytes each time."""
    with mock.patch.object(zstd, "is_available", return_value=False if task.without_libzstd else zstd.is_available()):
        if task.operation == "create":
            device = create.SourceDevice("disk", task.src, task.format)
            config = layout.Config("qemu-server.conf", b"name: victim\n")
            create.create(task.dest, [device], [config], uuid=UUID, ctime=1, threads=2)
        elif task.operation == "extract":
            requests = [extract.DeviceRequest("disk", None, task.format), extract.DeviceRequest("efi")]
            extract.extract(task.src, task.dest, devices=requests, threads=2)
        else:
            found = verify.verify(task.src, threads=2).verification
            if not found.ok:
                raise ValueError(found.problems)


class _Counter:
    """Counts the calls into the system, and ends the process before a certain one."""

    def __init__(self, die_before: int | None) -> None:
        self._die_before = die_before
        self._numbers = itertools.count(1)
        self.count = 0

    def install(self) -> None:
        """Count from now on, in this thread and in those that are still to come."""
        threading.setprofile(self._see)
        sys.setprofile(self._see)

    def _see(self, _frame: types.FrameType, event: str, function: t.Any) -> None:
        if event == "c_call" and getattr(function, "__module__", None) in ("posix", "fcntl"):
            self.count = next(self._numbers)
            if self.count == self._die_before:
                os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Read the task from the command line; tell when it begins, and then how many calls and seconds it took."""
    task = Task(**json.loads(sys.argv[1]))
    if task.uid is not None:
        # after the imports: the interpreter may lie where only root can read it
        os.setgroups([])
        os.setgid(task.uid)
        os.setuid(task.uid)
    counter = _Counter(task.die_before)
    print("ready", flush=True)
    began = time.monotonic()
    counter.install()
    run(task)
    sys.setprofile(None)
    print(json.dumps([counter.count, time.monotonic() - began]), flush=True)


def start(task: Task, **options: t.Any) -> subprocess.Popen[str]:
    """A process, in a session of its own, that is about to begin with the task."""
    code = _START.format(path=sys.path)
    command = [sys.executable, "-c", code, json.dumps(dataclasses.asdict(task))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True, **options)
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        process.kill()
        raise RuntimeError(f"the process ended early: {process.communicate(timeout=_SECONDS)}")
    return process


def measure(task: Task) -> tuple[int, float]:
    """Let the task be done undisturbed. Returns the calls and the seconds that it takes."""
    process = start(task)
    text, _nothing = process.communicate(timeout=_SECONDS)
    assert process.returncode == 0
    count, seconds = json.loads(text)
    return int(count), float(seconds)


def run_until_call(task: Task, number: int) -> bool:
    """Let the task be done up to a call. Returns whether it came that far, and was killed."""
    process = start(dataclasses.replace(task, die_before=number))
    process.communicate(timeout=_SECONDS)
    return process.returncode == -signal.SIGKILL


def run_until_time(task: Task, seconds: float) -> bool:
    """Let the task be done for so many seconds. Returns whether it was killed before it had ended."""
    process = start(task)
    time.sleep(seconds)
    process.kill()
    process.communicate(timeout=_SECONDS)
    return process.returncode == -signal.SIGKILL


def processes_of(session: int) -> list[str]:
    """The command lines of the processes that are left of a session. A dead one that nobody has waited for is none."""
    found = []
    for folder in pathlib.Path("/proc").iterdir():
        try:
            _before, _paren, fields = (folder / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")
            if folder.name.isdigit() and int(fields.split()[3]) == session and fields.split()[0] not in "ZX":
                found.append((folder / "cmdline").read_text(encoding="utf-8", errors="replace").replace("\0", " "))
        except OSError:
            continue  # it has just ended, or is no process
    return found


def wait_for_end_of(session: int) -> None:
    """Wait until no process of the session is left. Raises: AssertionError where one stays."""
    deadline = time.monotonic() + _SECONDS
    while True:
        left = processes_of(session)
        if not left:
            return
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.01)
