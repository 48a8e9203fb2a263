# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Tools that must not outlive the process that started them, whenever that is killed."""

from __future__ import annotations

import errno
import os
import pathlib
import subprocess
import sys
import tempfile

import pytest

from ansible_collections.vmbackup.vma.plugins.module_utils.vma import errors, tools
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.vma import helpers, victim

_START_AND_DIE = f"""
import os, signal, sys
sys.path[:] = {sys.path!r}
from {tools.__name__} import bound_to_us, start_tool
os.environ["STARTER"] = str(os.getpid())
process = start_tool(bound_to_us(sys.argv[2:]))
while sys.argv[1] == "later" and not os.path.exists(sys.argv[-1]):
    pass
os.kill(os.getpid(), signal.SIGKILL)
"""


def _start_and_die(when: str, *command: str) -> int:
    """Let a process start a command, and kill it. Returns the session of both."""
    arguments = [sys.executable, "-c", _START_AND_DIE, when, *command]
    process = subprocess.Popen(arguments, start_new_session=True)
    process.wait()
    return process.pid


def test_a_tool_ends_when_we_are_killed(tmp_path: pathlib.Path) -> None:
    helpers.need_tool("setpriv")
    marker = tmp_path / "it runs"
    session = _start_and_die("later", "sh", "-c", '> "$0"; exec sleep 1000', str(marker))
    assert marker.exists()
    victim.wait_for_end_of(session)


def test_a_tool_does_not_begin_after_we_were_killed(tmp_path: pathlib.Path, tool_folder: pathlib.Path) -> None:
    """The kernel is asked to end the tool with its parent, when that is dead already."""
    setpriv = helpers.need_tool("setpriv")
    late = tool_folder / "setpriv"
    late.write_text(f'#!/bin/sh\nwhile kill -0 "$STARTER"; do sleep 0.01; done 2>/dev/null\nexec {setpriv} "$@"\n')
    late.chmod(0o755)
    marker = tmp_path / "it runs"
    session = _start_and_die("at once", "touch", str(marker))
    victim.wait_for_end_of(session)
    assert not marker.exists()


def test_the_exit_status_and_the_number_are_those_of_the_tool() -> None:
    command = tools.bound_to_us(["sh", "-c", "echo $$; exit 7"])
    process = tools.start_tool(command, stdout=subprocess.PIPE)
    out, _nothing = process.communicate()
    assert (int(out), process.returncode) == (process.pid, 7)


def test_no_room_for_what_a_tool_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "TemporaryFile", fail)
    with pytest.raises(errors.ToolError, match=r"no temporary file can be made: No space left.*TMPDIR"):
        tools.open_scratch()
