# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What tests of the codec share: places that need root, and the codec as it is on poorer hosts."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import subprocess
import typing as t

import pytest

from ansible_collections.vmbackup.vma.plugins.module_utils.vma import zstd
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.vma import helpers

MakeTmpfs = t.Callable[[int], pathlib.Path]
MakeLoop = t.Callable[[int], str]


def _run_or_skip(command: list[str], what: str) -> str:
    helpers.need_tool(command[0])
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{what} cannot be made here: {done.stderr.strip()}")
    return done.stdout.strip()


@pytest.fixture
def make_tmpfs(tmp_path: pathlib.Path) -> t.Iterator[MakeTmpfs]:
    """Mount file systems in memory of a given size."""
    if os.geteuid() != 0:
        pytest.skip("a file system in memory needs root")
    with contextlib.ExitStack() as stack:

        def make(size: int) -> pathlib.Path:
            folder = tmp_path / f"tmpfs-{size}"
            folder.mkdir()
            _run_or_skip(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], "a tmpfs")
            stack.callback(subprocess.run, ["umount", "-l", str(folder)], check=True)
            return folder

        yield make


@pytest.fixture
def make_loop(tmp_path: pathlib.Path) -> t.Iterator[MakeLoop]:
    """Make block devices of a given size, full of stale bytes."""
    if os.geteuid() != 0:
        pytest.skip("a loop device needs root")
    with contextlib.ExitStack() as stack:
        count = 0

        def make(size: int) -> str:
            nonlocal count
            count += 1
            backing = tmp_path / f"backing-{count}"
            backing.write_bytes(b"\xee" * size)
            device = _run_or_skip(["losetup", "--find", "--show", str(backing)], "a loop device")
            stack.callback(subprocess.run, ["losetup", "--detach", device], check=True)
            return device

        yield make


@pytest.fixture
def without_libzstd(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that has the zstd command and not its library."""
    helpers.need_tool("zstd")
    monkeypatch.setattr(zstd, "is_available", lambda: False)


@pytest.fixture
def tool_folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A folder that stands first in PATH, for tools that misbehave."""
    folder = tmp_path / "tools"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder) + os.pathsep + os.environ["PATH"])
    return folder


@pytest.fixture
def reflinks(tmp_path: pathlib.Path) -> t.Iterator[pathlib.Path]:
    """A folder on a file system that has reflink copies."""
    if shutil.which("mkfs.btrfs") is None and shutil.which("mkfs.xfs") is None:
        pytest.skip("neither mkfs.btrfs nor mkfs.xfs is installed, so there is no file system with reflinks")
    if os.geteuid() != 0:
        pytest.skip("a file system with reflinks needs root")
    backing = tmp_path / "backing"
    with backing.open("wb") as file:
        file.truncate(512 << 20)
    folder = tmp_path / "reflinks"
    folder.mkdir()
    tool = ["mkfs.btrfs", "-q"] if shutil.which("mkfs.btrfs") else ["mkfs.xfs", "-q", "-m", "reflink=1"]
    _run_or_skip([*tool, str(backing)], "a file system with reflinks")
    _run_or_skip(["mount", "-o", "loop", str(backing), str(folder)], "a mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
