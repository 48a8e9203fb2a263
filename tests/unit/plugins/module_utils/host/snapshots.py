# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the tests of snapshots share: steps with an effect, processes to be killed, QEMU's tools, a pretended libvirt.

The pretended virsh is for errors that no libvirt can be brought to make, and for hosts without one.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time
import typing as t

import pytest

from ansible_collections.vmbackup.vma.plugins.module_utils.host.errors import SnapshotError
from ansible_collections.vmbackup.vma.plugins.module_utils.host.journal import Fields, Journal, lock_journal
from ansible_collections.vmbackup.vma.plugins.module_utils.host.provider import CRASH, StepKind, Work
from ansible_collections.vmbackup.vma.plugins.module_utils.host.readers import has_readers
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.vma.helpers import need_tool

SECONDS = 60.0
UUID = "6f1c2f0e-1111-4222-8333-000000000001"
RUN_ID = "0badcafe"


def wait_for(what: t.Callable[[], object], message: str = "it did not happen") -> None:
    """Wait until something is so. Raises: AssertionError where it does not come to be."""
    deadline = time.monotonic() + SECONDS
    while not what():
        assert time.monotonic() < deadline, message
        time.sleep(0.01)


def lives(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has waited for does not."""
    try:
        text = pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] not in "ZX"


# --- steps with an effect that can be seen ----------------------------------------------------------------------------


def make_file(journal: Journal, path: pathlib.Path, kind: str = "file") -> None:
    """Write down, and make, a file."""
    journal.add(kind, path=str(path))
    path.write_text("made", encoding="ascii")


def fill(path: pathlib.Path) -> None:
    """Let a file take all the room that its file system has."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def _remove_file(fields: Fields) -> str | None:
    path = pathlib.Path(fields["path"])
    if not path.exists():
        return None
    path.unlink()
    return f"the file {path}"


def _is_sick(fields: Fields) -> str | None:
    return None if os.path.exists(fields["path"]) else f"the file {fields['path']} is gone"


def _refuse(fields: Fields) -> str | None:
    if os.path.exists(fields["path"]):
        raise SnapshotError(f"{fields['path']} does not go")
    return None


def _let_go(fields: Fields) -> str | None:
    if has_readers([fields["path"]]):
        raise SnapshotError(f"{fields['path']} is in use")
    return None


def _crash(fields: Fields) -> str | None:
    return f"{fields['no such field']}"


KINDS: dict[str, StepKind] = {
    "file": StepKind(undo=_remove_file, health=_is_sick),
    "ground": StepKind(undo=_remove_file, is_ground=True),
    "stubborn": StepKind(undo=_refuse),
    "busy": StepKind(undo=_let_go),
    "buggy": StepKind(undo=_crash, health=_crash),
}
"""C(file) is undone by removing it, and sick when it is gone; C(stubborn) cannot be undone while its file is there, and
C(busy) while somebody reads it."""


@contextlib.contextmanager
def open_journal(folder: pathlib.Path, name: str = "web") -> t.Iterator[Journal]:
    """A journal that is let go of at the end."""
    journal = lock_journal(name, str(folder))
    try:
        yield journal
    finally:
        journal.close()


@contextlib.contextmanager
def stand_still(*, must: bool) -> t.Iterator[str]:  # noqa: ARG001 (it is called by this name)
    """A guest that needs no holding."""
    yield CRASH


def work_in(journal: Journal, scratch: pathlib.Path) -> Work:
    """What a provider works with, where nothing is held."""
    return Work(journal, RUN_ID, str(scratch), stand_still, lambda _fd: None)


# --- processes --------------------------------------------------------------------------------------------------------


def run_python(code: str, *arguments: str, **options: t.Any) -> subprocess.Popen[str]:
    """Start Python code that can import the collection, in a session of its own."""
    code = f"import sys; sys.path[:] = {sys.path!r}\n{code}"
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True, **options)


def read_line(process: subprocess.Popen[str]) -> str:
    """The next line that a process says."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def end(process: subprocess.Popen[str], number: signal.Signals = signal.SIGKILL) -> None:
    """End a process, and wait for it."""
    process.send_signal(number)
    process.communicate(timeout=SECONDS)


# --- QEMU's tools -----------------------------------------------------------------------------------------------------


def qemu(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a tool of QEMU to its end, whatever that is."""
    need_tool(command[0])
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=SECONDS)


def write_by_qemu(path: pathlib.Path | str, image_format: str = "raw") -> str:
    """Write to an image as a VM would, with QEMU's locks. Returns what QEMU has against it, if anything."""
    done = qemu("qemu-io", "-f", image_format, "-c", "write -P 7 0 4k", str(path))
    return (done.stderr + done.stdout).strip() if done.returncode else ""


@contextlib.contextmanager
def written_by_qemu(path: pathlib.Path, folder: pathlib.Path) -> t.Iterator[int]:
    """An image that a QEMU has open for writing, as it is while a VM runs. The value is QEMU's number."""
    need_tool("qemu-storage-daemon")
    pid_file = folder / "writer.pid"
    block = f"driver=file,filename={path},node-name=disk,read-only=off"
    server = f"addr.type=unix,addr.path={folder / 'writer.nbd'}"
    command = ["qemu-storage-daemon", "--blockdev", block, "--nbd-server", server]
    command += ["--export", "nbd,id=e,node-name=disk,writable=on", "--pidfile", str(pid_file), "--daemonize"]
    subprocess.run(command, check=True, timeout=SECONDS, stdout=subprocess.DEVNULL)
    pid = int(pid_file.read_text(encoding="ascii"))
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGTERM)
        wait_for(lambda: not lives(pid))


# --- a pretended libvirt ----------------------------------------------------------------------------------------------


class Libvirt:
    """A pretended virsh, first in PATH: what it says to each command, and what it was told."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder
        (folder / "answers").mkdir()
        self._log = folder / "log"
        self._log.touch()
        virsh = folder / "virsh"
        # virsh -q -c URI COMMAND ...
        virsh.write_text(
            f'#!/bin/sh\nshift 3\necho "$*" >> {shlex.quote(str(self._log))}\n'
            f"script={shlex.quote(str(folder / 'answers'))}/$1\n"
            'if [ -e "$script" ]; then . "$script"; else exit 0; fi\n',
            encoding="utf-8",
        )
        virsh.chmod(0o755)

    def path(self, command: str) -> pathlib.Path:
        """The file that holds what it says to a command."""
        return self._folder / f"{command}.text"

    def answer(self, command: str, text: str = "", *, error: str | None = None) -> None:
        """What it says from now on to a command; with an C(error) that is what it says, and it fails."""
        said = self.path(command)
        said.write_text(text if error is None else f"error: {error}\n", encoding="utf-8")
        self.script(command, f"cat {shlex.quote(str(said))}" + ("" if error is None else " >&2; exit 1"))

    def script(self, command: str, shell: str) -> None:
        """What it does from now on at a command."""
        self.script_path(command).write_text(f"{shell}\n", encoding="utf-8")

    def script_path(self, command: str) -> pathlib.Path:
        """The file that holds what it does at a command."""
        return self._folder / "answers" / command

    def told(self, *commands: str) -> list[str]:
        """What it was told so far, of these commands or of all."""
        lines = self._log.read_text(encoding="utf-8").splitlines()
        return [line for line in lines if not commands or line.split()[0] in commands]


@pytest.fixture
def libvirt(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Libvirt:
    """A pretended libvirt with one domain, web, that runs."""
    folder = tmp_path / "pretended"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    found = Libvirt(folder)
    found.answer("list", f"{UUID} web\n")
    found.answer("domstate", "running (booted)\n")
    return found


__all__ = (
    "KINDS",
    "RUN_ID",
    "SECONDS",
    "UUID",
    "Libvirt",
    "end",
    "fill",
    "libvirt",
    "lives",
    "make_file",
    "open_journal",
    "qemu",
    "read_line",
    "run_python",
    "stand_still",
    "wait_for",
    "work_in",
    "write_by_qemu",
    "written_by_qemu",
)
