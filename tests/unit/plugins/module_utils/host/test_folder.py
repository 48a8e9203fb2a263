# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The folder of a run, and the room in it."""

from __future__ import annotations

import os
import pathlib
import stat

import pytest

from ansible_collections.vmbackup.vma.plugins.module_utils.host import folder, scratch_space
from ansible_collections.vmbackup.vma.plugins.module_utils.vma import errors
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.host import snapshots
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.vma.conftest import MakeTmpfs, make_tmpfs

__all__ = ("make_tmpfs",)
UNDO = folder.KINDS["folder"].undo


@pytest.fixture
def scratch(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "scratch"
    path.mkdir()
    return path


def test_it_is_made_for_its_owner_and_goes_with_its_content(tmp_path: pathlib.Path, scratch: pathlib.Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("giving a folder to another user needs root")
    with snapshots.open_journal(tmp_path / "journals") as kept:
        path = pathlib.Path(folder.make_folder(kept, str(scratch), "0badcafe", owner=1234))
        (step,) = kept.steps
    assert path == scratch / "vmbackup-vma-0badcafe"
    assert (stat.S_IMODE(path.stat().st_mode), path.stat().st_uid) == (0o700, 1234)
    (path / "below").mkdir()
    (path / "below" / "file").touch()
    assert UNDO(step.fields) == f"the folder {path}"
    assert os.listdir(scratch) == []
    assert UNDO(step.fields) is None


def test_its_path_has_no_links(tmp_path: pathlib.Path, scratch: pathlib.Path) -> None:
    # the kernel's list of mounts, in which views are looked up, has none either
    (tmp_path / "link").symlink_to(scratch)
    with snapshots.open_journal(tmp_path / "journals") as kept:
        assert folder.make_folder(kept, str(tmp_path / "link"), "0badcafe") == str(scratch / "vmbackup-vma-0badcafe")


def test_it_is_written_down_before_it_is_made(tmp_path: pathlib.Path, scratch: pathlib.Path) -> None:
    (scratch / "vmbackup-vma-0badcafe").touch()
    with snapshots.open_journal(tmp_path / "journals") as kept:
        with pytest.raises(errors.TargetError, match="File exists"):
            folder.make_folder(kept, str(scratch), "0badcafe")
        assert len(kept.steps) == 1


def test_the_folder_for_it_must_be_there(tmp_path: pathlib.Path) -> None:
    with snapshots.open_journal(tmp_path / "journals") as kept:
        with pytest.raises(errors.RequestError) as caught:
            folder.make_folder(kept, str(tmp_path / "missing"), "0badcafe")
        assert kept.steps == []
    assert caught.value.file == str(tmp_path / "missing")


def test_a_folder_without_our_mark_is_left_alone(scratch: pathlib.Path) -> None:
    assert UNDO({"path": str(scratch)}) is None
    assert scratch.is_dir()


def test_little_room_is_trouble(make_tmpfs: MakeTmpfs, tmp_path: pathlib.Path) -> None:
    assert scratch_space.find_shortage(str(make_tmpfs(65 << 20))) is None
    small = make_tmpfs(63 << 20)
    said = scratch_space.find_shortage(str(small))
    assert said == f"the scratch file system at {small} is nearly full: 63 MiB are free, 64 are needed"
    missing = tmp_path / "missing"
    assert scratch_space.find_shortage(str(missing)) == f"{missing}: No such file or directory"
