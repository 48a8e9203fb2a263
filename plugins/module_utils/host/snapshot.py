# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Freeze the disks of a VM, and let go of them: from the request to the places where the disks can be read.

How each kind of storage does it stands in a file of its own; what holds between two calls is the keeper's and the
journal's.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import secrets
import time

from ..vma.errors import BusyError, VmaError
from . import folder, locks, stand_still, view
from .errors import SnapshotError
from .folder import make_folder
from .guest_config import GuestConfig
from .journal import FOLDER, Journal, find_lock, lock_journal, read_journal
from .keeper import ask, start_keeper
from .libvirt import LibvirtDomain
from .machine import PROVIDERS, STORAGES, Machine, Request
from .nvram import copy_nvram
from .provider import Disk, Frozen, StepKind, Work
from .stand_still import Guest
from .tpm import DRIVE as TPM_DRIVE
from .tpm import copy_tpm
from .undo import release

KINDS: dict[str, StepKind] = {
    **folder.KINDS,
    **view.KINDS,
    **stand_still.KINDS,
    **locks.KINDS,
    **LibvirtDomain.kinds,
}
for _provider in STORAGES.values():
    KINDS.update(_provider.kinds)

_STARTING = 60.0
"""Seconds for which absent() waits for a run that is only just freezing the disks."""
_POLL = 0.1


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """Frozen disks. C(id) lets go of exactly these. C(cleared) names what an earlier, killed run had left."""

    id: str
    provider: str
    frozen: Frozen
    vmid: int | None
    config: GuestConfig | None
    cleared: list[str]


@dataclasses.dataclass(frozen=True)
class Released:
    """What absent() removed, in words; and what befell the snapshot before, so that what was read is worth nothing."""

    removed: list[str]
    trouble: str | None


def plan(request: Request) -> Snapshot:
    """What freeze_disks() would do, found out without touching anything. Raises: VmaError where it would fail."""
    machine = Machine(request)
    frozen = machine.provider.plan()
    frozen = dataclasses.replace(frozen, disks=[*frozen.disks, *machine.small_state])
    return Snapshot("", machine.provider.name, frozen, machine.vmid, machine.configure(frozen.disks), [])


def freeze_disks(request: Request) -> Snapshot:
    """Freeze all disks of a VM at one instant, after clearing what a killed run has left of it.

    The snapshot lasts until let_go(), or until its keeper finds it in trouble or unused.

    Raises: BusyError where another run has the VM; SnapshotError, RequestError, ToolError, SpaceError. Then nothing is
    left, or the error says what.
    """
    machine = Machine(request)
    journal = _lock(request.name, request.journals)
    try:
        cleared = release(journal, KINDS)
        if cleared:
            machine = Machine(request)  # an overlay that was committed is no disk of the domain any more
        run_id = secrets.token_hex(4)
        began = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        journal.begin(id=run_id, name=request.name, began=began, idle_timeout=request.limits.idle)
        keeper = start_keeper(journal, KINDS, request.limits)
        try:
            guest = Guest(request.name, machine.uuid, request.quiesce, journal)
            work = Work(journal, run_id, os.path.abspath(request.scratch), guest.standing_still, keeper.hold)
            if machine.provider.name != LibvirtDomain.name:
                guest.watch()
            frozen = machine.provider.freeze(work)
            frozen = dataclasses.replace(frozen, disks=[*frozen.disks, *_copy_small_state(machine, work)])
            config = machine.configure(frozen.disks)
            journal.note(disks=[disk.as_dict() for disk in frozen.disks], ready=True)
            keeper.ready()
        except BaseException as error:
            keeper.abandon()
            _clear(journal, error)
            raise
        return Snapshot(run_id, machine.provider.name, frozen, machine.vmid, config, cleared)
    finally:
        journal.close()


def _copy_small_state(machine: Machine, work: Work) -> list[Disk]:
    if not machine.small_state:
        return []
    own = make_folder(work.journal, work.scratch, f"{work.run_id}-state")
    return [
        copy_tpm(disk.path, own) if disk.name == TPM_DRIVE else copy_nvram(disk, own) for disk in machine.small_state
    ]


def _clear(journal: Journal, error: BaseException) -> None:
    """Undo what the keeper could not, or did not as it was killed; and forget what nobody was told of."""
    if not journal.is_current():
        return  # the keeper has left nothing, and the next run may be at work
    journal.reload()
    try:
        release(journal, KINDS)
    except SnapshotError as left:
        if isinstance(error, VmaError):
            raise SnapshotError(f"{error.message}; besides, {left.message}", file=error.file) from error
        raise
    journal.delete()


def _lock(name: str, journals: str) -> Journal:
    try:
        return lock_journal(name, journals)
    except BusyError as error:
        _steps, notes = read_journal(name, journals)
        raise BusyError(
            f"another run has frozen the disks of {name}, since {notes.get('began', 'just now')}",
            remedy=f"Wait for it. If it was killed, its snapshot goes {notes.get('idle_timeout', 0):g} seconds after"
            f" the last reading, or at once by vm_snapshot with name={name} and state=absent.",
        ) from error


def let_go(name: str, run_id: str | None = None, journals: str = FOLDER) -> Released:
    """Let go of a VM's disks: of the snapshot C(run_id), or of whatever is there. Idempotent.

    Raises: BusyError where another run is just freezing; SnapshotError where something could not be removed.
    """
    deadline = time.monotonic() + _STARTING
    while True:
        _steps, notes = read_journal(name, journals)
        if run_id is not None and notes.get("id") != run_id:
            return Released([], f"the snapshot {run_id} is gone: somebody else let it go")
        if not notes:
            return Released([], None)
        try:
            journal = lock_journal(name, journals)
        except BusyError:
            # The keeper undoes everything before it gives up the lock, however long that takes.
            is_kept = "ready" in notes and notes.get("pid") is not None
            if not (is_kept and ask(notes["pid"], find_lock(name, journals))) and time.monotonic() > deadline:
                raise
            time.sleep(_POLL)
            continue
        try:
            if journal.notes.get("id") == notes.get("id"):
                return _release(journal)
        finally:
            journal.close()


def _release(journal: Journal) -> Released:
    trouble = journal.notes.get("trouble")
    if trouble is None and journal.notes.get("pid") is not None:
        trouble = "the keeper of the snapshot was killed, so that nobody looked after it"
    release(journal, KINDS)
    removed = journal.notes.get("removed", [])
    journal.delete()
    return Released(removed, trouble)


def describe_leftovers(name: str, run_id: str | None = None, journals: str = FOLDER) -> list[str]:
    """What let_go() would undo, in words."""
    steps, notes = read_journal(name, journals)
    if run_id is not None and notes.get("id") != run_id:
        return []
    return [f"{step.kind} {step.fields.get('path') or step.fields.get('domain') or ''}".strip() for step in steps]


__all__ = (
    "KINDS",
    "PROVIDERS",
    "Released",
    "Request",
    "Snapshot",
    "describe_leftovers",
    "freeze_disks",
    "let_go",
    "plan",
)
