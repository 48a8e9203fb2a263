# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Room for what a guest overwrites while a snapshot is held: where it ends, QEMU pauses the guest."""

from __future__ import annotations

import os

_RESERVE = 64 << 20
"""Bytes that must stay free, so that a snapshot is let go before a guest is paused."""


def find_shortage(folder: str) -> str | None:
    """What is wrong with the room in the file system of C(folder), in words; None where there is enough."""
    try:
        status = os.statvfs(folder)
    except OSError as error:
        return f"{folder}: {error.strerror}"
    free = status.f_bavail * status.f_frsize
    if free >= _RESERVE:
        return None
    return f"the scratch file system at {folder} is nearly full: {free >> 20} MiB are free, {_RESERVE >> 20} are needed"


__all__ = ("find_shortage",)
