# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A guest stands still for a moment, and goes on whatever happens meanwhile."""

from __future__ import annotations

import pathlib
import typing as t

import pytest

from ansible_collections.vmbackup.vma.plugins.module_utils.host import journal, stand_still, undo, virsh
from ansible_collections.vmbackup.vma.plugins.module_utils.host.errors import SnapshotError
from ansible_collections.vmbackup.vma.plugins.module_utils.host.provider import APPLICATION, CRASH, OFFLINE
from ansible_collections.vmbackup.vma.plugins.module_utils.vma import errors
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.host import snapshots
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.host.snapshots import UUID, Libvirt, libvirt

__all__ = ("libvirt",)

EFFECTS = ("domfsfreeze", "domfsthaw", "suspend", "resume")


@pytest.fixture
def kept(tmp_path: pathlib.Path) -> t.Iterator[journal.Journal]:
    with snapshots.open_journal(tmp_path / "journals") as found:
        yield found


def guest(kept: journal.Journal, quiesce: str = "auto", domain: str | None = UUID) -> stand_still.Guest:
    return stand_still.Guest("web", domain, quiesce, kept)


def effects(libvirt: Libvirt) -> list[str]:
    return [line.split()[0] for line in libvirt.told(*EFFECTS)]


def test_its_file_systems_are_frozen_and_thawed(libvirt: Libvirt, kept: journal.Journal) -> None:
    with guest(kept).quiesced() as consistency:
        assert consistency == APPLICATION
        assert effects(libvirt) == ["domfsfreeze"]
        assert kept.steps == [journal.Step("frozen", {"domain": UUID})]
    assert effects(libvirt) == ["domfsfreeze", "domfsthaw"]
    assert kept.steps == []


def test_it_is_paused_where_it_must(libvirt: Libvirt, kept: journal.Journal) -> None:
    with guest(kept).standing_still(must=True) as consistency:
        assert consistency == APPLICATION
        assert [step.kind for step in kept.steps] == ["frozen", "paused"]
    assert effects(libvirt) == ["domfsfreeze", "suspend", "resume", "domfsthaw"]
    assert kept.steps == []
    with guest(kept, "never").standing_still(must=False) as consistency:
        assert consistency == CRASH
    assert effects(libvirt) == ["domfsfreeze", "suspend", "resume", "domfsthaw"]


def test_it_goes_on_when_the_freezing_of_disks_fails(libvirt: Libvirt, kept: journal.Journal) -> None:
    with pytest.raises(KeyError, match="disk"), guest(kept).standing_still(must=True):
        raise KeyError("disk")
    assert effects(libvirt) == ["domfsfreeze", "suspend", "resume", "domfsthaw"]
    assert kept.steps == []


@pytest.mark.parametrize("quiesce", ["auto", "always"])
def test_a_freeze_that_fails_halfway_is_thawed(libvirt: Libvirt, kept: journal.Journal, quiesce: str) -> None:
    libvirt.answer("domfsfreeze", error="internal error: unable to execute QEMU agent command 'guest-fsfreeze-freeze'")
    if quiesce == "always":
        with pytest.raises(SnapshotError, match=r"could not be quiesced.*guest-fsfreeze-freeze") as caught:
            guest(kept, quiesce).quiesced().__enter__()
        assert "qemu-guest-agent" in str(caught.value)
    else:
        with guest(kept, quiesce).quiesced() as consistency:
            assert consistency == CRASH
        assert kept.steps == []
    assert effects(libvirt) == ["domfsfreeze", "domfsthaw"]


@pytest.mark.parametrize(
    "said",
    [
        "argument unsupported: QEMU guest agent is not configured",
        "Guest agent is not responding: QEMU guest agent is not connected",
        "Guest agent is not responding: guest agent didn't respond to synchronization within '5' seconds",
    ],
)
def test_where_no_agent_was_asked_nothing_is_to_be_thawed(libvirt: Libvirt, kept: journal.Journal, said: str) -> None:
    libvirt.answer("domfsfreeze", error=said)
    with guest(kept).quiesced() as consistency:
        assert consistency == CRASH
        assert kept.steps == []
    assert effects(libvirt) == ["domfsfreeze"]


def test_an_agent_that_hangs_amid_a_freeze_is_asked_again_when_the_snapshot_goes(
    libvirt: Libvirt, kept: journal.Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("domfsfreeze", "domfsthaw"):
        libvirt.script(name, "exec sleep 600")
    monkeypatch.setattr(virsh, "_AGENT_TIMEOUT", 0.5)
    with guest(kept).quiesced() as consistency:
        assert consistency == CRASH
    assert effects(libvirt) == ["domfsfreeze", "domfsthaw"]
    with pytest.raises(SnapshotError, match=rf"could be removed:.*no answer within.*virsh domfsthaw {UUID}"):
        undo.release(kept, stand_still.KINDS)
    libvirt.answer("domfsthaw", "Thawed 1 filesystem(s)\n")
    assert undo.release(kept, stand_still.KINDS) == [f"the freeze of the file systems of {UUID}"]
    assert kept.steps == []


def test_of_a_killed_run_an_agent_that_is_gone_need_not_thaw(libvirt: Libvirt, kept: journal.Journal) -> None:
    kept.add("frozen", domain=UUID)
    libvirt.answer("domfsthaw", error="Guest agent is not responding: QEMU guest agent is not connected")
    assert undo.release(kept, stand_still.KINDS) == []
    assert kept.steps == []


def test_a_thaw_that_fails_is_told_and_tried_again(libvirt: Libvirt, kept: journal.Journal) -> None:
    libvirt.answer("domfsthaw", error="Guest agent is not responding")
    with pytest.raises(errors.ToolError, match=r"domfsthaw.*not responding"), guest(kept).quiesced():
        pass
    assert [step.kind for step in kept.steps] == ["frozen"]
    libvirt.answer("domfsthaw", "Thawed 1 filesystem(s)\n")
    assert undo.release(kept, stand_still.KINDS) == [f"the freeze of the file systems of {UUID}"]


def test_a_resume_that_fails_is_tried_again_and_the_file_systems_are_thawed(
    libvirt: Libvirt, kept: journal.Journal
) -> None:
    libvirt.answer("resume", error="Timed out during operation")
    with pytest.raises(errors.ToolError, match="resume"), guest(kept).standing_still(must=True):
        libvirt.answer("domstate", "paused (user)\n")
    assert effects(libvirt)[-1] == "domfsthaw"
    libvirt.answer("resume")
    assert undo.release(kept, stand_still.KINDS) == [f"the pause of {UUID}"]


def test_one_that_is_off_is_not_touched_and_must_stay_off(libvirt: Libvirt, kept: journal.Journal) -> None:
    libvirt.answer("domstate", "shut off (shutdown)\n")
    with guest(kept, "always").standing_still(must=True) as consistency:
        assert consistency == OFFLINE
    with pytest.raises(SnapshotError, match="web was started while"), guest(kept).quiesced():
        libvirt.answer("domstate", "running (booted)\n")
    assert effects(libvirt) == []


def test_one_that_is_paused_stays_paused(libvirt: Libvirt, kept: journal.Journal) -> None:
    libvirt.answer("domstate", "paused (user)\n")
    with guest(kept).standing_still(must=True) as consistency:
        assert consistency == CRASH
    with pytest.raises(SnapshotError, match="cannot be quiesced"):
        guest(kept, "always").quiesced().__enter__()
    assert effects(libvirt) == []


def test_one_that_libvirt_does_not_know(libvirt: Libvirt, kept: journal.Journal) -> None:
    with guest(kept, domain=None).standing_still(must=False) as consistency:
        assert consistency == CRASH
    with pytest.raises(SnapshotError, match="several volumes"):
        guest(kept, domain=None).standing_still(must=True).__enter__()
    with pytest.raises(SnapshotError, match="cannot be quiesced"):
        guest(kept, "always", domain=None).quiesced().__enter__()
    assert libvirt.told() == []


def test_what_a_killed_run_left_goes_on(libvirt: Libvirt, kept: journal.Journal) -> None:
    kept.add("frozen", domain=UUID)
    kept.add("paused", domain=UUID)
    libvirt.script("resume", f"echo 'running (unpaused)' > {libvirt.path('domstate')}")
    libvirt.answer("domstate", "paused (user)\n")
    removed = undo.release(kept, stand_still.KINDS)
    assert removed == [f"the pause of {UUID}", f"the freeze of the file systems of {UUID}"]
    assert effects(libvirt) == ["resume", "domfsthaw"]


def test_a_guest_that_went_on_by_itself_is_not_resumed(libvirt: Libvirt, kept: journal.Journal) -> None:
    kept.add("paused", domain=UUID)
    kept.add("frozen", domain=UUID)
    libvirt.answer("domstate", error=f"failed to get domain '{UUID}'")
    assert undo.release(kept, stand_still.KINDS) == []
    assert effects(libvirt) == []
