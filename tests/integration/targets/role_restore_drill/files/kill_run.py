# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Run a command that boots a guest, kill all of it but the guest as soon as that runs, and tell what lives on."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import secrets
import signal
import subprocess
import sys
import tempfile
import time

PATIENCE = 240
"""Seconds until the guest has to run, on a machine that is busy with other things."""
TIME_TO_END = 20
"""Seconds that the guest gets to notice."""


def find_processes(mark: bytes) -> dict[int, list[str]]:
    """The command lines of the processes that have a mark in their environment."""
    found = {}
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                words = (folder / "cmdline").read_bytes().split(b"\0")
                found[int(folder.name)] = [os.fsdecode(word) for word in words if word]
        except OSError:
            continue
    return found


def is_guest(words: list[str]) -> bool:
    """Whether a command line is that of a QEMU with a machine, not of what starts one or looks for KVM."""
    return bool(words) and "qemu" in os.path.basename(words[0]) and "-pidfile" in words


def kill(pid: int) -> None:
    """Kill a process that may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def main() -> None:
    """Run, kill and tell."""
    name, value = "VMBACKUP_TEST_RUN", secrets.token_hex(8)
    mark = f"{name}={value}".encode()
    with tempfile.TemporaryFile() as output:
        run = subprocess.Popen(
            sys.argv[1:], env={**os.environ, name: value}, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
        deadline = time.monotonic() + PATIENCE
        guests: list[int] = []
        while not guests and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
            guests = [pid for pid, words in find_processes(mark).items() if is_guest(words)]
        kill(run.pid)
        run.wait()
        while others := set(find_processes(mark)) - set(guests):
            for pid in others:
                kill(pid)
        deadline = time.monotonic() + TIME_TO_END
        while find_processes(mark) and time.monotonic() < deadline:
            time.sleep(0.05)
        alive = find_processes(mark)
        for pid in alive:
            kill(pid)
        output.seek(0)
        said = output.read().decode(errors="replace")[-2000:]
    print(json.dumps({"guests": len(guests), "alive": list(alive.values()), "said": said}))


if __name__ == "__main__":
    main()
