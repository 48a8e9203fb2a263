# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Modules in processes of their own that get a signal midway: one clear message, no file, no process."""

from __future__ import annotations

import json
import os
import pathlib
import random
import select
import shutil
import signal
import subprocess
import sys
import time
import types
import typing as t

import pytest

from ansible_collections.vmbackup.vma.plugins.module_utils.vma import create, verify, zstd
from ansible_collections.vmbackup.vma.plugins.module_utils.vma.create import SourceDevice
from ansible_collections.vmbackup.vma.plugins.module_utils.vma.layout import Config
from ansible_collections.vmbackup.vma.plugins.modules import vma_create, vma_extract
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.vma import victim
from ansible_collections.vmbackup.vma.tests.unit.plugins.modules import conftest

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
SECONDS = 60
MIB = 1 << 20
MOMENTS = int(os.environ.get("VMA_TEST_MOMENTS", "60"))
"""At how many calls into the system a signal is tried, at most; 1000 is more than any operation here makes."""

# What started the tests may ignore signals, as nohup does, and the module would rightly go on ignoring them.
_MODULE = """
import signal
import sys
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
sys.path[:] = {path!r}
from ansible_collections.vmbackup.vma.plugins.module_utils.vma import zstd
from ansible_collections.vmbackup.vma.plugins.modules import {module}
from ansible_collections.vmbackup.vma.tests.unit.plugins.modules import conftest
if {without_libzstd!r}:
    zstd.is_available = lambda: False
with conftest.patch_module_args({options!r}):
    {module}.main()
"""


def _start(module: str, options: dict[str, t.Any], *, without_libzstd: bool = False) -> subprocess.Popen[str]:
    options = {"_ansible_remote_tmp": "/tmp", "bandwidth_limit": "256K", **options}
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
    """Wait until a hidden file is there to be written. It takes most of a minute, however busy the machine is."""
    deadline = time.monotonic() + SECONDS
    while not list(folder.glob(".*.vma-part")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _check_end(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """The process has been told to end: see how it does."""
    out, said = process.communicate(timeout=SECONDS)
    assert (said, process.returncode) == ("", 1)
    result = json.loads(out)  # one result and not a word more
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
    path.write_bytes(random.Random(1).randbytes(12 * MIB))
    return str(path)


def _need_zstd(way: str) -> bool:
    """Whether this way is that of a host without libzstd; the test is skipped without the command."""
    if way != "zstd's command":
        return False
    if shutil.which("zstd") is None:
        pytest.skip("the tool zstd is not installed")
    return True


ENDINGS = {"plain": ".vma", "gzip": ".vma.gz", "zstd": ".vma.zst", "zstd's command": ".vma.zst"}


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("way", list(ENDINGS))
def test_create(way: str, number: signal.Signals, disk: str, folder: pathlib.Path) -> None:
    path = folder / f"a{ENDINGS[way]}"
    path.write_bytes(b"old")
    options = {"dest": str(path), "devices": [{"name": "disk", "path": disk}], "overwrite": "always"}
    process = _start("vma_create", options, without_libzstd=_need_zstd(way))
    _wait_for_work(process, folder)
    process.send_signal(number)
    _check_end(process, number)
    assert os.listdir(folder) == [path.name]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("way", list(ENDINGS))
def test_extract(way: str, number: signal.Signals, disk: str, folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    without_libzstd = _need_zstd(way)
    archive = tmp_path / f"archive{ENDINGS[way]}"
    create.create(str(archive), [SourceDevice("disk", disk)], level=None if way == "plain" else 1)
    path = folder / "disk-disk.raw"
    path.write_bytes(b"old")
    options = {"src": str(archive), "dest": str(folder), "overwrite": "always"}
    process = _start("vma_extract", options, without_libzstd=without_libzstd)
    _wait_for_work(process, folder)
    process.send_signal(number)
    _check_end(process, number)
    assert os.listdir(folder) == [path.name]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("way", list(ENDINGS))
def test_create_together_with_its_helpers(way: str, number: signal.Signals, disk: str, folder: pathlib.Path) -> None:
    """A terminal sends its signals to all processes of a job, so to the compressor as well."""
    options = {"dest": str(folder / f"a{ENDINGS[way]}"), "devices": [{"name": "disk", "path": disk}]}
    process = _start("vma_create", options, without_libzstd=_need_zstd(way))
    _wait_for_work(process, folder)
    os.killpg(process.pid, number)
    _check_end(process, number)
    assert os.listdir(folder) == []


def test_a_second_signal_does_not_end_the_cleaning_up(disk: str, folder: pathlib.Path) -> None:
    options = {"dest": str(folder / "a.vma"), "devices": [{"name": "disk", "path": disk}]}
    process = _start("vma_create", options)
    _wait_for_work(process, folder)
    process.send_signal(signal.SIGTERM)
    # As long as it lives: also while what is unfinished is removed, and told
    while process.poll() is None:
        process.send_signal(signal.SIGTERM)
    _check_end(process, signal.SIGTERM)
    assert os.listdir(folder) == []


def test_signals_that_come_at_once(disk: str, folder: pathlib.Path) -> None:
    options = {"dest": str(folder / "a.vma"), "devices": [{"name": "disk", "path": disk}]}
    process = _start("vma_create", options)
    _wait_for_work(process, folder)
    for number in (signal.SIGSTOP, *SIGNALS, signal.SIGCONT):
        process.send_signal(number)
    # The lowest, as Python looks through them by their numbers
    _check_end(process, signal.SIGHUP)
    assert os.listdir(folder) == []


def test_a_closed_pipe(disk: str, folder: pathlib.Path) -> None:
    """Nobody is there any more to hear the result, as after a lost connection: the work is done all the same."""
    path = folder / "a.vma"
    options = {"dest": str(path), "devices": [{"name": "disk", "path": disk}], "bandwidth_limit": "4M"}
    process = _start("vma_create", options)
    _wait_for_work(process, folder)
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    process.communicate(timeout=SECONDS)
    assert process.returncode != 0
    assert os.listdir(folder) == [path.name]
    assert verify.verify(str(path)).verification.ok
    victim.wait_for_end_of(process.pid)


def test_a_view_of_another_format_goes_as_well(disk: str, folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    tool = shutil.which("qemu-img")
    if tool is None or shutil.which("qemu-storage-daemon") is None:
        pytest.skip("the tools qemu-img and qemu-storage-daemon are not installed")
    source = tmp_path / "disk.qcow2"
    subprocess.run([tool, "convert", "-O", "qcow2", disk, str(source)], check=True)
    device = {"name": "disk", "path": str(source), "format": "qcow2"}
    process = _start("vma_create", {"dest": str(folder / "a.vma"), "devices": [device]})
    _wait_for_work(process, folder)
    process.send_signal(signal.SIGTERM)
    _check_end(process, signal.SIGTERM)
    assert os.listdir(folder) == []
    with open("/proc/self/mountinfo", encoding="utf-8") as mounts:
        assert str(folder) not in mounts.read()


# --- at every single moment -------------------------------------------------------------------------------------------


class Moments:
    """Counts the calls into the system that are made while the module minds signals, and sends one before one of them.

    Only the main thread counts: it is the one that a signal interrupts.
    """

    def __init__(self, moment: int | None = None) -> None:
        self.count = 0
        self.place = ""
        self._moment = moment

    def __enter__(self) -> Moments:
        sys.setprofile(self._see)
        return self

    def __exit__(self, *_exception: object) -> None:
        sys.setprofile(None)

    def _see(self, frame: types.FrameType, event: str, function: t.Any) -> None:
        if event not in ("c_call", "c_return") or getattr(function, "__module__", None) not in ("posix", "fcntl"):
            return
        if signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, signal.SIG_IGN):
            self.count += 1
            if self.count == self._moment:
                when = "before" if event == "c_call" else "after"
                self.place = (
                    f"{when} {function.__name__}, {os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
                )
                os.kill(os.getpid(), signal.SIGTERM)


def _contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _run_forked(module: types.ModuleType, options: dict[str, t.Any], moment: int) -> tuple[dict[str, t.Any], str]:
    """Run a module in a copy of this process. Returns its result, and where the signal came."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        moments = Moments(moment)
        patched = vars(conftest)["patch_module_args"]({"_ansible_remote_tmp": "/tmp", **options})
        with open(writing, "w", encoding="utf-8") as sys.stdout:
            try:
                with patched, moments:
                    module.main()
            except SystemExit:
                print(json.dumps([moments.count, moments.place]))
            except BaseException as error:  # noqa: BLE001 what would be a traceback
                print(json.dumps({"traceback": repr(error)}), json.dumps([moments.count, moments.place]), sep="\n")
        os._exit(0)
    os.close(writing)
    with open(reading, encoding="utf-8") as pipe:
        if not select.select([pipe], [], [], SECONDS)[0]:
            os.kill(child, signal.SIGKILL)
        lines = [json.loads(line) for line in pipe if line.strip()]
    os.waitpid(child, 0)
    result, (count, place) = lines
    return {"count": count, **result}, place


def _check_every_moment(module: types.ModuleType, options: dict[str, t.Any], folder: pathlib.Path) -> None:
    """A signal may not be told of once all is done; until then, it leaves each file as it was or whole."""
    old = _contents(folder)
    undisturbed, _place = _run_forked(module, options, 0)
    new = _contents(folder)
    assert new != old
    assert undisturbed["count"] > 20
    faults = []
    for moment in range(1, undisturbed["count"] + 1, 1 + undisturbed["count"] // MOMENTS):
        for path in folder.iterdir():
            path.unlink()
        for name, content in old.items():
            (folder / name).write_bytes(content)
        result, place = _run_forked(module, options, moment)
        left = _contents(folder)
        if left.keys() - new.keys():
            faults.append(f"{place}: {sorted(left.keys() - new.keys())} is left")
        for name in new:
            if left.get(name) not in (old.get(name), new[name]):
                faults.append(f"{place}: {name} is a mixture")
        if "traceback" in result:
            faults.append(f"{place}: {result['traceback']}")
        elif result.get("failed") and result["error"]["kind"] != "interrupted":
            faults.append(f"{place}: {result['msg']}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("way", list(ENDINGS))
def test_create_at_any_moment(way: str, folder: pathlib.Path, image: pathlib.Path) -> None:
    path = folder / f"a{ENDINGS[way]}"
    path.write_bytes(b"old")
    options = {
        "dest": str(path),
        "devices": [{"name": "disk", "path": str(image)}],
        "uuid": "5d6417dd-461f-44a9-8553-14f8d37622f8",
        "ctime": 7,
        "threads": 2,
    }
    with pytest.MonkeyPatch.context() as patch:
        if _need_zstd(way):
            patch.setattr(zstd, "is_available", lambda: False)
        _check_every_moment(vma_create, options, folder)


def test_extract_at_any_moment(folder: pathlib.Path, tmp_path: pathlib.Path, image: pathlib.Path) -> None:
    archive = tmp_path / "a.vma"
    config = Config("qemu-server.conf", b"name: new\n")
    create.create(str(archive), [SourceDevice("a", str(image)), SourceDevice("b", str(image))], [config])
    (folder / "disk-a.raw").write_bytes(b"old")
    _check_every_moment(vma_extract, {"src": str(archive), "dest": str(folder), "threads": 2}, folder)
