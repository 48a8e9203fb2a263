# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Who has files and block devices open."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import typing as t

import pytest

from ansible_collections.vmbackup.vma.plugins.module_utils.host import readers
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.host import snapshots
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.vma.conftest import MakeLoop, make_loop

__all__ = ("make_loop",)


@contextlib.contextmanager
def opened(path: str, command: tuple[str, ...] = ("sleep", "60")) -> t.Iterator[int]:
    """Another process has the file open."""
    with open(path, "rb") as file:
        process = subprocess.Popen(command, stdin=file)
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def file(tmp_path: pathlib.Path) -> str:
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))
    return str(path)


def test_a_file(file: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "link").symlink_to(file)
    other = tmp_path / "other"
    other.touch()
    assert not readers.has_readers([file])
    with opened(file) as pid:
        assert readers.has_readers([str(other), file])
        assert readers.has_readers([str(tmp_path / "link")])
        assert not readers.has_readers([str(other)])
        assert readers.has_open(pid, file)
        assert not readers.has_open(pid, str(other))
    assert not readers.has_readers([file])
    assert not readers.has_open(pid, file)


def test_a_block_device_by_any_of_its_names(make_loop: MakeLoop, tmp_path: pathlib.Path) -> None:
    device, other = make_loop(1 << 20), make_loop(1 << 20)
    alias = tmp_path / "alias"
    os.mknod(alias, 0o600 | 0o060000, os.stat(device).st_rdev)
    # udev looks at new devices for a moment
    snapshots.wait_for(lambda: not readers.has_readers([device, other]))
    with opened(str(alias)):
        assert readers.has_readers([device])
        assert not readers.has_readers([other])


def is_mute(path: str) -> bool:
    try:
        subprocess.run(["test", "-s", path], check=True, timeout=0.5)
    except subprocess.TimeoutExpired:
        return True
    return False


def test_a_file_system_that_answers_nobody_is_not_asked(file: str, tmp_path: pathlib.Path) -> None:
    """As that of a dead file server, or a view whose daemon stands still."""
    tool = shutil.which("qemu-storage-daemon")
    if tool is None or os.geteuid() != 0:
        pytest.skip("needs root and qemu-storage-daemon, to mount a file system that can be stopped")
    mute = tmp_path / "mute"
    mute.touch()
    block = json.dumps({"driver": "null-co", "size": 4096, "node-name": "n"})
    export = json.dumps({"type": "fuse", "id": "e", "node-name": "n", "mountpoint": str(mute)})
    server = subprocess.Popen([tool, "--blockdev", block, "--export", export])
    try:
        snapshots.wait_for(lambda: mute.stat().st_size == 4096)
        with opened(str(mute)) as pid, opened(file), contextlib.ExitStack() as answering:
            assert readers.has_readers([str(mute)])
            server.send_signal(signal.SIGSTOP)
            # The kernel knows for a while what the server said last.
            snapshots.wait_for(lambda: is_mute(f"/proc/{pid}/fd/0"))
            # Even to end, a process that has a file of it open has to wait for its server.
            answering.callback(server.send_signal, signal.SIGCONT)
            code = "import sys; from ansible_collections.vmbackup.vma.plugins.module_utils.host import readers; "
            asked = [sys.executable, "-c", f"{code}print(readers.has_readers(sys.argv[1:]))"]
            found = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
            for path, expected in ((file, "True"), (os.devnull, "True"), (str(tmp_path / "none"), "False")):
                done = subprocess.run([*asked, path], check=True, capture_output=True, text=True, env=found, timeout=30)
                assert done.stdout.strip() == expected
    finally:
        server.kill()
        server.wait()
        subprocess.run(["umount", "--lazy", str(mute)], check=False)


def test_this_process_is_none(file: str) -> None:
    with open(file, "rb"):
        assert not readers.has_readers([file])
        assert readers.has_open(os.getpid(), file)


@pytest.mark.parametrize(("name", "counts"), [("qemu-system-x86_64", False), ("kvm", False), ("qemu-img", True)])
def test_a_running_guest_is_none(file: str, tmp_path: pathlib.Path, name: str, counts: bool) -> None:
    sleep = shutil.which("sleep")
    assert sleep is not None
    shutil.copy(sleep, tmp_path / name)
    with opened(file, (str(tmp_path / name), "60")) as pid:
        comm = pathlib.Path(f"/proc/{pid}/comm")
        snapshots.wait_for(lambda: comm.read_text(encoding="ascii").strip() == name[:15])
        assert readers.has_readers([file]) is counts


def test_what_is_not_there_has_none(tmp_path: pathlib.Path) -> None:
    assert not readers.has_readers([])
    assert not readers.has_readers([str(tmp_path / "missing")])
    assert not readers.has_open(os.getpid(), str(tmp_path / "missing"))


def test_those_who_read_are_asked_to_end(file: str) -> None:
    assert not readers.end_readers([file])
    with opened(file) as pid:
        assert readers.end_readers([file])
        assert not snapshots.lives(pid)
