# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the tests of the modules share: running a module in this process, and an image."""

from __future__ import annotations

import contextlib
import json
import pathlib
import signal
import types
import typing as t
from unittest import mock

import pytest
from ansible.module_utils import basic

from ansible_collections.vmbackup.vma.tests.unit.plugins.modules.helpers import Result, Run

try:
    from ansible.module_utils.testing import patch_module_args
except ImportError:  # ansible-core before 2.19

    @contextlib.contextmanager
    def patch_module_args(args: dict[str, t.Any] | None = None) -> t.Iterator[None]:
        """Hand arguments to the modules that are run in this context."""
        text = json.dumps({"ANSIBLE_MODULE_ARGS": args or {}}).encode()
        with mock.patch.object(basic, "_ANSIBLE_ARGS", text):
            yield


@pytest.fixture(scope="session", autouse=True)
def heed_signals() -> None:
    """Undo what nohup, or a shell's background job, has left: modules go on ignoring signals that they find ignored."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a module as Ansible would, and returns its result. C(fails) says how it is to end."""
    logged: list[str] = []

    def log(_module: basic.AnsibleModule, msg: str, log_args: dict[str, str] | None = None) -> None:
        logged.append(f"{msg} {log_args}")

    monkeypatch.setattr(basic.AnsibleModule, "log", log)

    def run_module(
        module: types.ModuleType, *, check: bool = False, diff: bool = False, fails: bool = False, **options: t.Any
    ) -> Result:
        logged.clear()
        args = {"_ansible_check_mode": check, "_ansible_diff": diff, **options}
        with patch_module_args(args), pytest.raises(SystemExit) as ended:
            module.main()
        text = capsys.readouterr().out
        data = json.loads(text)
        assert bool(data.get("failed")) is fails, data.get("msg")
        assert bool(ended.value.code) is fails
        return Result(text, "\n".join(logged), data)

    return run_module


@pytest.fixture
def image(tmp_path: pathlib.Path) -> pathlib.Path:
    """A disk of three clusters: the first and a part of the last hold something."""
    path = tmp_path / "disk.raw"
    path.write_bytes(b"boot" * 16384 + bytes(65536) + b"data" * 1024 + bytes(61440))
    return path
