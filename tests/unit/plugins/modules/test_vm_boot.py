# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The module vm_boot: what it promises around the booting, and that nothing is left whatever ends it."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import typing as t

import pytest
import yaml

from ansible_collections.vmbackup.vma.plugins.module_utils.host import boot_failure
from ansible_collections.vmbackup.vma.plugins.module_utils.host.boot_scratch import PID_FILE, PREFIX
from ansible_collections.vmbackup.vma.plugins.modules import vm_boot
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.host import boot_disks
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.vma import victim
from ansible_collections.vmbackup.vma.tests.unit.plugins.modules.helpers import Run

SECONDS = 180
ALIVE = "alive and well"
_MODULE = """
import signal
import sys
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
sys.path[:] = {path!r}
from ansible_collections.vmbackup.vma.plugins.modules import vm_boot
from ansible_collections.vmbackup.vma.tests.unit.plugins.modules import conftest
with conftest.patch_module_args({options!r}):
    vm_boot.main()
"""


@pytest.fixture
def scratch(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "scratch"
    path.mkdir()
    return path


@pytest.fixture
def options(scratch: pathlib.Path, tmp_path: pathlib.Path) -> dict[str, t.Any]:
    """A guest that comes up."""
    disk = {"path": str(boot_disks.make_tiny_disk(tmp_path / "disk.raw", ALIVE))}
    return {"disks": [disk], "expect": ALIVE, "memory": 64, "timeout": SECONDS, "scratch_dir": str(scratch)}


def test_a_guest_comes_up(run: Run, options: dict[str, t.Any], scratch: pathlib.Path, tmp_path: pathlib.Path) -> None:
    picture = tmp_path / "screen.png"
    result = run(vm_boot, **options, screenshot=str(picture), console_lines=2)
    assert (result["booted"], result["changed"], result["match"]) == (True, True, ALIVE)
    assert result["seconds"] == result["signs"]["expect"]
    assert len(result["console"].splitlines()) == 2
    assert (result["machine"], result["memory"], result["cores"], result["firmware"]) == ("pc", 64, 1, None)
    assert result["accelerator"] in ("kvm", "tcg")
    assert "error" not in result.data
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert os.listdir(scratch) == []


def test_a_guest_that_does_not_fails_the_task(run: Run, options: dict[str, t.Any], scratch: pathlib.Path) -> None:
    disk = options["disks"][0]["path"]
    boot_disks.zero(pathlib.Path(disk), 0, 512)
    result = run(vm_boot, fails=True, **options)
    assert (result["booted"], result["changed"], result["match"], result["signs"]) == (False, False, None, {})
    assert result["error"]["kind"] == "no_boot_device"
    assert result["msg"].startswith(f"{disk} does not boot: the firmware found nothing to boot from")
    assert result["msg"].endswith(result["error"]["remedy"])
    assert "No bootable device" in result["console"]
    assert os.listdir(scratch) == []


def test_the_hosts_failure_is_not_the_guests(run: Run, options: dict[str, t.Any], tmp_path: pathlib.Path) -> None:
    qemu = shutil.which("qemu-system-x86_64")
    fake = tmp_path / "tools"
    fake.mkdir()
    (fake / "qemu-system-x86_64").write_text(f'#!/bin/sh\nexec {qemu} "$@" -device no-such-device\n')
    (fake / "qemu-system-x86_64").chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{fake}:{os.environ['PATH']}")
        result = run(vm_boot, fails=True, **options)
    assert result["error"]["kind"] == "qemu_failed"
    assert "no-such-device" in result["error"]["message"]
    assert "cannot be booted here" in result["msg"]


def test_check_mode_starts_nothing(
    run: Run, options: dict[str, t.Any], scratch: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("qemu-system-x86_64", "qemu-img"):
        (tools / name).write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    result = run(vm_boot, check=True, **options, cores=1 << 20)
    assert result["changed"] is False
    assert result["adjusted"] == [f"cores is {result['cores']} instead of {1 << 20}"]
    assert (result["machine"], result["memory"]) == ("pc", 64)
    assert "booted" not in result.data
    assert run(vm_boot, check=True, **options, screenshot=str(tmp_path / "x.png"))["changed"] is True
    assert not (tmp_path / "started").exists()
    assert os.listdir(scratch) == []


def test_check_mode_finds_what_is_missing(run: Run, options: dict[str, t.Any]) -> None:
    result = run(vm_boot, check=True, fails=True, **{**options, "disks": [{"path": "/nonexistent/disk"}]})
    assert (result["error"]["kind"], result["error"]["file"]) == ("source", "/nonexistent/disk")


def test_the_console_can_be_kept_out(run: Run, options: dict[str, t.Any]) -> None:
    result = run(vm_boot, **options, console_lines=0)
    assert result["console"] == ""


def test_the_documentation_names_each_kind_and_choice() -> None:
    documented = yaml.safe_load(vm_boot.DOCUMENTATION)["options"]
    assert documented.keys() == vm_boot.ARGUMENT_SPEC.keys()
    for name, spec in vm_boot.ARGUMENT_SPEC.items():
        assert documented[name].get("choices") == spec.get("choices"), name
        assert documented[name].get("default") == spec.get("default"), name
    kinds = " ".join(yaml.safe_load(vm_boot.RETURN)["error"]["contains"]["kind"]["description"])
    assert [kind for kind in boot_failure.KINDS if f"V({kind})" not in kinds] == []


# --- nothing is left --------------------------------------------------------------------------------------------------


def _start(options: dict[str, t.Any], **environment: str) -> subprocess.Popen[str]:
    code = _MODULE.format(path=sys.path, options={"_ansible_remote_tmp": "/tmp", **options})
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, **environment},
    )


def _wait_for_guest(process: subprocess.Popen[str], scratch: pathlib.Path) -> int:
    """Wait until QEMU has told its process id, which is after it opened its disks. Returns that."""
    deadline = time.monotonic() + SECONDS
    while True:
        for path in scratch.glob(f"{PREFIX}*/{PID_FILE}"):
            text = path.read_text(encoding="ascii")
            if text.endswith("\n"):
                return int(text)
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def endless(options: dict[str, t.Any]) -> dict[str, t.Any]:
    """A guest whose sign of life never comes."""
    return {**options, "expect": "never"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
@pytest.mark.parametrize("whole_job", [False, True])
def test_a_signal(endless: dict[str, t.Any], scratch: pathlib.Path, number: signal.Signals, whole_job: bool) -> None:
    process = _start(endless)
    _wait_for_guest(process, scratch)
    # A terminal sends its signals to all processes of a job, so to QEMU as well.
    (os.killpg if whole_job else os.kill)(process.pid, number)
    out, said = process.communicate(timeout=SECONDS)
    victim.wait_for_end_of(process.pid)
    assert said == ""
    result = json.loads(out)
    assert result["failed"] is True
    if not (whole_job and result["error"]["kind"] == "qemu_failed"):
        assert result["error"]["kind"] == "interrupted"
        assert number.name in result["msg"]
    assert os.listdir(scratch) == []


def test_a_killed_module_leaves_no_qemu_and_the_next_run_its_folder_neither(
    run: Run, endless: dict[str, t.Any], options: dict[str, t.Any], scratch: pathlib.Path
) -> None:
    if shutil.which("setpriv") is None:
        pytest.skip("the tool setpriv is not installed (package util-linux)")
    process = _start(endless)
    _wait_for_guest(process, scratch)
    process.kill()
    process.communicate()
    victim.wait_for_end_of(process.pid)
    assert len(os.listdir(scratch)) == 1
    assert run(vm_boot, **options)["booted"]
    assert os.listdir(scratch) == []


def test_without_setpriv_the_next_run_ends_qemu(
    run: Run, endless: dict[str, t.Any], options: dict[str, t.Any], scratch: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("qemu-system-x86_64", "qemu-img"):
        (tools / name).symlink_to(shutil.which(name) or "")
    process = _start(endless, PATH=str(tools))
    qemu = _wait_for_guest(process, scratch)
    process.kill()
    process.communicate()
    assert victim.processes_of(process.pid) != []
    os.kill(qemu, 0)
    assert run(vm_boot, **options)["booted"]
    assert victim.processes_of(process.pid) == []
    assert os.listdir(scratch) == []


def test_two_runs_do_not_disturb_each_other(run: Run, endless: dict[str, t.Any], scratch: pathlib.Path) -> None:
    """The folder of a run that lives is no leftover, though it looks like one."""
    process = _start(endless)
    try:
        qemu = _wait_for_guest(process, scratch)
        before = os.listdir(scratch)
        run(vm_boot, fails=True, **{**endless, "timeout": 1})
        os.kill(qemu, 0)
        assert os.listdir(scratch) == before
    finally:
        process.terminate()
        process.communicate()
    assert os.listdir(scratch) == []


def test_a_folder_of_somebody_else_is_left_alone(run: Run, endless: dict[str, t.Any], scratch: pathlib.Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("giving a folder away needs root")
    other = scratch / f"{PREFIX}0123456789abcdef"
    other.mkdir()
    os.chown(other, 65534, 65534)
    (other / PID_FILE).write_text(f"{os.getpid()}\n")
    run(vm_boot, fails=True, **{**endless, "timeout": 1})
    assert os.listdir(scratch) == [other.name]


def test_a_process_that_only_has_the_number_is_left_alone(
    run: Run, endless: dict[str, t.Any], scratch: pathlib.Path
) -> None:
    left = scratch / f"{PREFIX}0123456789abcdef"
    left.mkdir()
    with subprocess.Popen(["sleep", "60"]) as innocent:
        (left / PID_FILE).write_text(f"{innocent.pid}\n")
        run(vm_boot, fails=True, **{**endless, "timeout": 1})
        assert innocent.poll() is None
        innocent.kill()
    assert os.listdir(scratch) == []
