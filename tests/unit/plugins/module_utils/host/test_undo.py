# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Undoing what a journal tells: the last step first, and as much as can be undone."""

from __future__ import annotations

import os
import pathlib

import pytest

from ansible_collections.vmbackup.vma.plugins.module_utils.host import journal, undo
from ansible_collections.vmbackup.vma.plugins.module_utils.host.errors import SnapshotError
from ansible_collections.vmbackup.vma.plugins.module_utils.host.provider import StepKind
from ansible_collections.vmbackup.vma.plugins.module_utils.vma import errors
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.host import snapshots
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.host.snapshots import KINDS, make_file
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.vma.conftest import MakeTmpfs, make_tmpfs

__all__ = ("make_tmpfs",)


@pytest.fixture
def journals(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "journals"


def test_the_last_step_goes_first(tmp_path: pathlib.Path, journals: pathlib.Path) -> None:
    with snapshots.open_journal(journals) as kept:
        for name in "abc":
            make_file(kept, tmp_path / name)
        removed = undo.release(kept, KINDS)
        assert removed == [f"the file {tmp_path / name}" for name in "cba"]
        assert undo.release(kept, KINDS) == []
        assert kept.notes["removed"] == removed
    assert journal.read_journal("web", str(journals))[0] == []
    assert not any((tmp_path / name).exists() for name in "abc")


def test_a_step_that_was_not_done_is_not_told(tmp_path: pathlib.Path, journals: pathlib.Path) -> None:
    with snapshots.open_journal(journals) as kept:
        kept.add("file", path=str(tmp_path / "never"))
        assert undo.release(kept, KINDS) == []
        assert kept.steps == []


def test_what_fails_stays_with_the_ground_below_it_and_the_others_go(
    tmp_path: pathlib.Path, journals: pathlib.Path
) -> None:
    kinds_of = {"below": "ground", "a": "file", "b": "stubborn", "c": "buggy", "d": "strange", "e": "file"}
    with snapshots.open_journal(journals) as kept:
        for name, kind in kinds_of.items():
            make_file(kept, tmp_path / name, kind)
        with pytest.raises(SnapshotError) as caught:
            undo.release(kept, KINDS)
        assert [step.kind for step in kept.steps] == ["ground", "stubborn", "buggy", "strange"]
        assert kept.notes["removed"] == [f"the file {tmp_path / name}" for name in "ea"]
    for reason in (f"{tmp_path / 'b'} does not go.", "buggy: KeyError", "unknown kind strange"):
        assert reason in caught.value.message
    assert "state=absent" in str(caught.value)
    assert (tmp_path / "below").exists()
    assert not (tmp_path / "a").exists()
    # what hindered it is mended: the next run, which knows the kinds, undoes the rest
    (tmp_path / "b").unlink()
    with snapshots.open_journal(journals) as kept:
        more = {**KINDS, "buggy": KINDS["file"], "strange": KINDS["file"]}
        assert undo.release(kept, more) == [f"the file {tmp_path / name}" for name in ("d", "c", "below")]
        assert kept.steps == []


def test_a_full_file_system_under_the_journal_hinders_nothing(make_tmpfs: MakeTmpfs) -> None:
    folder = make_tmpfs(256 << 10)
    with snapshots.open_journal(folder / "journals") as kept:
        kept.add("ground", path=str(folder / "below"))
        kept.add("file", path=str(folder / "filling"))
        (folder / "below").touch()
        snapshots.fill(folder / "filling")
        with pytest.raises(errors.SpaceError):
            kept.note(trouble="some")
        assert undo.release(kept, KINDS) == [f"the file {folder / name}" for name in ("filling", "below")]
        assert kept.steps == []
    assert journal.read_journal("web", str(folder / "journals"))[0] == []


def test_trouble_is_found(tmp_path: pathlib.Path, journals: pathlib.Path) -> None:
    def raising(_fields: journal.Fields) -> str | None:
        raise SnapshotError("nobody answers", remedy="Ask again.")

    kinds = {**KINDS, "mute": StepKind(undo=KINDS["file"].undo, health=raising)}
    with snapshots.open_journal(journals) as kept:
        make_file(kept, tmp_path / "a")
        make_file(kept, tmp_path / "b", "ground")
        kept.add("strange")
        assert undo.find_trouble(kept, kinds) is None
        os.unlink(tmp_path / "a")
        assert undo.find_trouble(kept, kinds) == f"the file {tmp_path / 'a'} is gone"
    with snapshots.open_journal(journals, "mute") as kept:
        make_file(kept, tmp_path / "c", "mute")
        assert undo.find_trouble(kept, kinds) == "nobody answers. Ask again."
    with snapshots.open_journal(journals, "buggy") as kept:
        make_file(kept, tmp_path / "d", "buggy")
        assert undo.find_trouble(kept, kinds) == "buggy: KeyError('no such field')"
