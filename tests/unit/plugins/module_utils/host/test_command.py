# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The host's tools: what they said, or an error that tells it."""

from __future__ import annotations

import pathlib
import signal
import time

import pytest

from ansible_collections.vmbackup.vma.plugins.module_utils.host import command
from ansible_collections.vmbackup.vma.plugins.module_utils.vma import errors
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.host import snapshots
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.vma.helpers import need_tool

PURPOSE = "to test"
_VICTIM = """
from ansible_collections.vmbackup.vma.plugins.module_utils.host import command
command.run(["sh", "-c", 'echo $$ > "$0/pid"; mv "$0/pid" "$0/started"; sleep 60', sys.argv[1]], purpose="to test")
"""


def test_what_it_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    assert command.run(["sh", "-c", 'echo "$1 $LC_ALL"; cat', "sh", "a  b"], purpose=PURPOSE) == "a  b C\n"


def test_bytes_that_are_no_text_are_shown() -> None:
    assert command.run(["printf", "a\\377b"], purpose=PURPOSE) == "a\ufffdb"


def test_how_it_failed() -> None:
    with pytest.raises(command.CommandError) as caught:
        command.run(["sh", "-c", "echo first >&2; echo last >&2; exit 3"], purpose=PURPOSE, remedy="Do it again.")
    assert caught.value.message == "sh -c echo first >&2; echo last >&2; exit 3 ended with exit status 3: last"
    assert caught.value.remedy == "Do it again."
    assert caught.value.said == "first\nlast\n"


def test_a_tool_that_was_killed_in_silence() -> None:
    with pytest.raises(command.CommandError, match="ended with signal 9: it said nothing"):
        command.run(["sh", "-c", "kill -9 $$"], purpose=PURPOSE)


def test_a_tool_that_does_not_answer_is_ended(tmp_path: pathlib.Path) -> None:
    began = time.monotonic()
    with pytest.raises(command.CommandError, match=r"ended with no answer within 0\.5 seconds"):
        command.run(["sh", "-c", f"echo $$ > {tmp_path}/pid; exec sleep 60"], purpose=PURPOSE, timeout=0.5)
    assert time.monotonic() - began < 30
    pid = (tmp_path / "pid").read_text(encoding="ascii")
    snapshots.wait_for(lambda: not snapshots.lives(int(pid)))


def test_a_tool_that_is_missing() -> None:
    with pytest.raises(errors.ToolError, match="the tool no-such-tool is needed to test"):
        command.run(["no-such-tool"], purpose=PURPOSE)


def test_a_tool_does_not_outlive_us(tmp_path: pathlib.Path) -> None:
    # or it would do what the keeper has undone already
    need_tool("setpriv")
    victim = snapshots.run_python(_VICTIM, str(tmp_path))
    snapshots.wait_for((tmp_path / "started").exists)
    pid = int((tmp_path / "started").read_text(encoding="ascii"))
    assert snapshots.lives(pid)
    snapshots.end(victim, signal.SIGKILL)
    snapshots.wait_for(lambda: not snapshots.lives(pid))
