# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a way to take snapshots has to offer, and what it gives back. No way in particular lives here."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import typing as t

from .errors import SnapshotError
from .journal import Fields, Journal

MARK = "vmbackup-vma"
"""Stands in the name of everything that is made on a host, and of nothing else: by it the next run knows its own."""

APPLICATION, CRASH, OFFLINE = "application", "crash", "offline"
"""How consistent frozen disks are: the guest's file systems were quiesced; as after a power failure; the VM is off."""


def consistency_of(reached: str, count: int, *, is_used: bool) -> str:
    """How consistent so many volumes are that were frozen one after another, while the guest stood still as told.

    C(is_used) says that somebody, on any host, writes to them. Raises: SnapshotError where that is not the guest.
    """
    if not is_used:
        return OFFLINE
    if reached == OFFLINE and count > 1:
        raise SnapshotError(
            f"the VM is shut off here, and yet its {count} volumes are in use: they cannot be frozen at one instant",
            remedy="Back the VM up on the host where it runs, or end whoever uses the volumes.",
        )
    return CRASH if reached == OFFLINE else reached


def device_name(drive: str) -> str:
    """The name that a drive's device has in an archive for Proxmox VE."""
    return f"drive-{drive}-backup" if drive.startswith("tpmstate") else f"drive-{drive}"


@dataclasses.dataclass(frozen=True)
class Disk:
    """A disk of a VM. C(name) is its drive, as C(scsi0). C(size) and C(allocated) are bytes of the virtual disk and of
    what it takes up at most in an archive; None where that cannot be told beforehand."""

    name: str
    path: str
    format: str = "raw"
    size: int | None = None
    allocated: int | None = None

    def as_dict(self) -> dict[str, t.Any]:
        """The disk as vm_snapshot returns it."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Frozen:
    """Disks at one instant: where to read them, how they were frozen in words, and how consistent they are."""

    disks: list[Disk]
    method: str
    consistency: str


class StandStill(t.Protocol):
    """Makes the guest stand still for as long as its context lasts, where that can be done."""

    def __call__(self, *, must: bool) -> contextlib.AbstractContextManager[str]:
        """The context, whose value is the consistency that is reached.

        A provider that cannot freeze several disks at once says that it is a C(must): then the entering raises
        SnapshotError where the guest cannot be held.
        """


@dataclasses.dataclass(frozen=True)
class StepKind:
    """How a step of the journal is undone, and how it is known to be well.

    C(undo) returns what was removed, in words, or None where nothing was there. It may be called again, after a crash
    or a reboot, with what is left of the step, and touches only what bears our marks.
    C(health) returns what is wrong with the snapshot, in words, or None. It is called every other second.
    Both raise VmaError where they cannot do their work. C(is_ground) says that later steps stand on this one: it is
    undone only when all of those are.
    """

    undo: t.Callable[[Fields], str | None]
    health: t.Callable[[Fields], str | None] = lambda _fields: None
    is_ground: bool = False


@dataclasses.dataclass(frozen=True)
class Work:
    """What a provider works with while it freezes disks.

    C(run_id), 8 hexadecimal digits, belongs into the names of what is made. C(scratch) is an existing folder, with an
    absolute path, for what is needed for a while: see folder.py. C(hold) keeps an open file open, and so its locks,
    until the snapshot is let go.
    """

    journal: Journal
    run_id: str
    scratch: str
    stand_still: StandStill
    hold: t.Callable[[int], None]


class Provider(abc.ABC):
    """A way to freeze the disks of a VM."""

    name: t.ClassVar[str]
    kinds: t.ClassVar[t.Mapping[str, StepKind]] = {}
    """The steps that this provider writes into journals."""

    @classmethod
    def fits(cls, _path: str) -> bool:
        """Whether the provider is for the storage that this path lies on, so that it may be chosen by itself."""
        return False

    @abc.abstractmethod
    def plan(self) -> Frozen:
        """What freeze() would do, found out without touching anything: the disks with sizes, the expected consistency.

        Raises: RequestError, SnapshotError, ToolError where it would fail.
        """

    @abc.abstractmethod
    def freeze(self, work: Work) -> Frozen:
        """Freeze all disks at one instant. Each effect is written into the journal before it is caused.

        On an error, what was done is left to the journal. Raises: SnapshotError, SpaceError, ToolError.
        """


__all__ = (
    "APPLICATION",
    "CRASH",
    "MARK",
    "OFFLINE",
    "Disk",
    "Frozen",
    "Provider",
    "StandStill",
    "StepKind",
    "Work",
    "consistency_of",
    "device_name",
)
