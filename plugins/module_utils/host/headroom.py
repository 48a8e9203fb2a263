# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""How much room a snapshot must find before it is taken: for what the guest overwrites while it is held. No I/O."""

from __future__ import annotations

import typing as t

from ..vma.errors import SpaceError

LEAST_PERCENT = 5
"""Percent of what a disk takes up that the guest must be able to overwrite while its snapshot is held."""


def required_room(sizes: t.Iterable[int]) -> int:
    """The bytes that snapshots of disks with these sizes need at least."""
    return sum(size * LEAST_PERCENT // 100 for size in sizes)


def check_room(where: str, sizes: t.Iterable[int], free: int) -> None:
    """Refuse snapshots for which there is no room. C(where) names the store, all numbers are bytes.

    Raises: SpaceError.
    """
    needed = required_room(sizes)
    if free < needed:
        raise SpaceError(
            f"snapshots need {format_mib(needed)} in {where}, {format_mib(free)} are free",
            remedy="Make room there, or back up fewer disks at a time.",
        )


def format_mib(size: int) -> str:
    """Bytes as people read them; room that is there is rounded down."""
    return f"{size >> 20} MiB"


__all__ = ("LEAST_PERCENT", "check_room", "format_mib", "required_room")
