# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Undo what a journal tells, the last step first. What each kind of step means, its provider knows."""

from __future__ import annotations

import contextlib
import typing as t

from ..vma.errors import TargetError, VmaError
from .errors import SnapshotError
from .journal import Journal
from .provider import StepKind


def release(journal: Journal, kinds: t.Mapping[str, StepKind]) -> list[str]:
    """Undo all steps, and return what was removed, in words.

    A step that cannot be undone stays in the journal for the next run; the others are undone nevertheless.

    Raises: SnapshotError that names the steps which could not be undone.
    """
    removed: list[str] = []
    failures: list[str] = []
    for step in reversed(journal.steps):
        try:
            kind = kinds.get(step.kind)
            if kind is None:
                raise SnapshotError(f"a step of the unknown kind {step.kind} was left by another version")
            if kind.is_ground and failures:
                continue
            what = kind.undo(step.fields)
        except VmaError as error:
            failures.append(str(error))
            continue
        except Exception as error:  # noqa: BLE001 (whatever it is, the other steps must be undone)
            failures.append(f"{step.kind}: {error!r}.")
            continue
        if what is not None:
            removed.append(what)
        # Where the journal cannot be written, as a file system is full, later steps may make the room. A step that
        # it tells too many is undone once more, which does no harm.
        with contextlib.suppress(TargetError):
            journal.remove(step)
    journal.note(removed=[*journal.notes.get("removed", []), *removed])
    if failures:
        raise SnapshotError(
            "not everything could be removed: " + " ".join(failures),
            remedy="Mend what is said, then run vm_snapshot with state=absent for this VM; the VM itself goes on.",
        )
    return removed


def find_trouble(journal: Journal, kinds: t.Mapping[str, StepKind]) -> str | None:
    """What is wrong with the snapshot that the journal tells of, in words; None where all is well."""
    for step in journal.steps:
        kind = kinds.get(step.kind)
        if kind is None:
            continue
        try:
            trouble = kind.health(step.fields)
        except VmaError as error:
            trouble = str(error)
        except Exception as error:  # noqa: BLE001 (a snapshot of which nothing is known is in trouble)
            trouble = f"{step.kind}: {error!r}"
        if trouble is not None:
            return trouble
    return None


__all__ = ("find_trouble", "release")
