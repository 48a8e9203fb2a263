# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Modules in processes of their own that get a signal midway: one clear message, no file, no process."""

from __future__ import annotations

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
import typing as t

import pytest

from ansible_collections.vmbackup.vma.plugins.module_utils.vma import create, zstd
from ansible_collections.vmbackup.vma.plugins.module_utils.vma.create import SourceDevice
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.vma import victim

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
SECONDS = 60
MIB = 1 << 20

_MODULE = """
import contextlib, json, sys
sys.path[:] = {path!r}
from ansible_collections.vmbackup.vma.plugins.module_utils.vma import zstd
from ansible_collections.vmbackup.vma.plugins.modules import {module}
from ansible_collections.vmbackup.vma.tests.unit.plugins.modules.conftest import patch_module_args
if {without_libzstd!r}:
    zstd.is_available = lambda: False
with patch_module_args({options!r}):
    {module}.main()
"""


def _start(module: str, options: dict[str, t.Any], *, without_libzstd: bool = False) -> subprocess.Popen[str]:
    options = {"_ansible_remote_tmp": "/tmp", "bandwidth_limit": "2M", **options}
    code = _MODULE.format(path=sys.path, module=module, options=options, without_libzstd=without_libzstd)
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _wait_for_work(process: subprocess.Popen[str], folder: pathlib.Path) -> None:
    """Wait until something of a hidden file is written. At two mebibytes a second much is left to do then."""
    deadline = time.monotonic() + SECONDS
    while not any(path.stat().st_blocks for path in folder.glob(".*.vma-part")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _check(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """The process has been told to end: see how it does."""
    out, said = process.communicate(timeout=SECONDS)
    result = json.loads(out)  # one result and not a word more
    assert said == ""
    assert process.returncode == 1
    assert result["failed"] is True
    assert result["msg"] == f"interrupted by {number.name}; files that were not finished were removed"
    assert result["error"] == {"kind": "interrupted", "message": result["msg"]}
    victim.wait_for_end_of(process.pid)


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "out"
    path.mkdir()
    return path


@pytest.fixture
def disk(tmp_path: pathlib.Path) -> str:
    path = tmp_path / "disk.raw"
    path.write_bytes(random.Random(1).randbytes(32 * MIB))
    return str(path)


def _archive(disk: str, folder: pathlib.Path, ending: str = ".vma") -> str:
    path = str(folder.parent / f"archive{ending}")
    create.create(path, [SourceDevice("disk", disk)], compression_level_of(ending))
    return path


def compression_level_of(_ending: str) -> t.Any:
    return ()


WAYS = [(".vma", False), (".vma.gz", False), (".vma.zst", False), (".vma.zst", True)]
WAY_NAMES = ["plain", "gzip", "zstd", "zstd's command"]
