# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Raw views by a real qemu-storage-daemon: what they show, and that they go, alive or dead."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import typing as t

import pytest

from ansible_collections.vmbackup.vma.plugins.module_utils.host import journal, readers, undo, view
from ansible_collections.vmbackup.vma.plugins.module_utils.vma import errors, image
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.host import snapshots
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.vma.helpers import make_image, need_tool

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _views() -> None:
    need_tool("qemu-storage-daemon")
    if not view.can_view() or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("views need FUSE, and the right to use it")


@pytest.fixture
def kept(tmp_path: pathlib.Path) -> t.Iterator[journal.Journal]:
    """A journal whose steps are undone at the end."""
    with snapshots.open_journal(tmp_path / "journals") as found:
        yield found
        undo.release(found, view.KINDS)


@pytest.fixture
def content() -> bytes:
    """8 MiB, with random data in the first, fourth and last."""
    random = make_image(MIB, zero=0, partial=0)
    return random + bytes(2 * MIB) + random + bytes(3 * MIB) + random


@pytest.fixture
def node(tmp_path: pathlib.Path, content: bytes) -> dict[str, t.Any]:
    """A qcow2 image with that."""
    raw, path = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    raw.write_bytes(content)
    assert snapshots.qemu("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(path)).returncode == 0
    return {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}}


def daemons(path: pathlib.Path) -> list[int]:
    found: list[int] = []
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            if f"{path}.pid".encode() in (folder / "cmdline").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def is_mounted(path: pathlib.Path) -> bool:
    done = subprocess.run(["findmnt", "--mountpoint", str(path)], check=False, capture_output=True)
    return done.returncode == 0


def assert_gone(path: pathlib.Path) -> None:
    assert daemons(path) == []
    assert not is_mounted(path)
    assert [name for name in os.listdir(path.parent) if name.startswith(path.name)] == []


def extents(path: pathlib.Path) -> list[tuple[int, int]]:
    """Where the data is, from SEEK_DATA and SEEK_HOLE."""
    found: list[tuple[int, int]] = []
    end = 0
    with open(path, "rb") as file:
        while True:
            try:
                start = file.seek(end, os.SEEK_DATA)
            except OSError:
                return found
            end = file.seek(start, os.SEEK_HOLE)
            found.append((start, end))


def test_it_shows_data_and_holes(
    kept: journal.Journal, node: dict[str, t.Any], content: bytes, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "a view, with a comma and a blank"
    view.open_view(kept, node, str(path))
    assert path.read_bytes() == content
    assert extents(path) == [(0, MIB), (3 * MIB, 4 * MIB), (7 * MIB, 8 * MIB)]
    with pytest.raises(OSError, match=r"denied|Read-only|not permitted"):
        path.write_bytes(b"x")
    (step,) = kept.steps
    assert view.KINDS["view"].health(step.fields) is None
    assert not readers.has_readers([str(path)])
    source = image.SourceImage(str(path))
    try:
        assert source.size == len(content)
    finally:
        source.close()
    assert undo.release(kept, view.KINDS) == [f"the view {path}"]
    assert_gone(path)
    assert view.KINDS["view"].undo(step.fields) is None


def test_it_outlives_whoever_opened_it_and_a_reader_does_not_hold_it(
    kept: journal.Journal, node: dict[str, t.Any], tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "view"
    view.open_view(kept, node, str(path))
    with open(path, "rb") as file:
        reader = subprocess.Popen(["sleep", "600"], stdin=file)
    assert readers.has_readers([str(path)])
    undo.release(kept, view.KINDS)
    assert_gone(path)
    reader.kill()
    reader.wait()


def test_a_dead_one_is_trouble_and_goes_as_well(
    kept: journal.Journal, node: dict[str, t.Any], tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "view"
    view.open_view(kept, node, str(path))
    (pid,) = daemons(path)
    os.kill(pid, signal.SIGKILL)
    snapshots.wait_for(lambda: not snapshots.lives(pid))
    trouble = undo.find_trouble(kept, view.KINDS)
    assert trouble is not None
    assert trouble.startswith(f"the view {path} is gone")
    assert is_mounted(path)
    (step,) = kept.steps
    assert undo.release(kept, view.KINDS) == [f"the view {path}"]
    assert_gone(path)
    assert view.KINDS["view"].undo(step.fields) is None


def test_a_daemon_that_ended_by_itself_is_trouble(
    kept: journal.Journal, node: dict[str, t.Any], tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "view"
    view.open_view(kept, node, str(path))
    (pid,) = daemons(path)
    os.kill(pid, signal.SIGTERM)
    snapshots.wait_for(lambda: not snapshots.lives(pid))
    # what is left is an empty file, which must not be taken for the disk
    assert undo.find_trouble(kept, view.KINDS) == f"the view {path} is gone: its daemon has ended"
    undo.release(kept, view.KINDS)
    assert_gone(path)


_OPENER = """
import json
from ansible_collections.vmbackup.vma.plugins.module_utils.host import journal, view
kept = journal.lock_journal("killed", sys.argv[1])
print("go", flush=True)
view.open_view(kept, json.loads(sys.argv[3]), sys.argv[2])
"""


@pytest.mark.parametrize(
    "moment", ["its step is written", "its file is made", "its daemon is started", "it is mounted"]
)
def test_it_goes_at_whatever_moment_its_maker_is_killed(
    node: dict[str, t.Any], tmp_path: pathlib.Path, moment: str
) -> None:
    path = tmp_path / "view"
    journals = str(tmp_path / "journals")
    come: dict[str, t.Callable[[], object]] = {
        "its step is written": lambda: journal.read_journal("killed", journals)[0],
        "its file is made": path.exists,
        "its daemon is started": lambda: daemons(path),
        "it is mounted": lambda: is_mounted(path),
    }
    opener = snapshots.run_python(_OPENER, journals, str(path), json.dumps(node))
    assert snapshots.read_line(opener) == "go"
    snapshots.wait_for(come[moment])
    snapshots.end(opener)
    with snapshots.open_journal(tmp_path / "journals", "killed") as left:
        undo.release(left, view.KINDS)
        assert left.steps == []
    assert_gone(path)


def test_what_cannot_be_opened_leaves_nothing(kept: journal.Journal, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "view"
    missing = {"driver": "file", "filename": str(tmp_path / "missing")}
    with pytest.raises(errors.ToolError, match="No such file"):
        view.open_view(kept, missing, str(path))
    undo.release(kept, view.KINDS)
    assert_gone(path)


def test_a_file_that_is_there_is_not_covered(
    kept: journal.Journal, node: dict[str, t.Any], tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "view"
    path.write_text("mine", encoding="ascii")
    with pytest.raises(errors.TargetError, match="File exists"):
        view.open_view(kept, node, str(path))
    assert path.read_text(encoding="ascii") == "mine"


def test_without_the_daemon_its_package_is_named(
    kept: journal.Journal, node: dict[str, t.Any], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not view.can_view()
    with pytest.raises(errors.ToolError, match="qemu-storage-daemon") as caught:
        view.open_view(kept, node, str(tmp_path / "view"))
    assert "qemu-system-common" in str(caught.value)
    assert kept.steps == []
