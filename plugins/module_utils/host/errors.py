# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What can go wrong on a hypervisor besides the codec's own errors, as values."""

from __future__ import annotations

from ..vma.errors import VmaError


class SnapshotError(VmaError):
    """The disks of a VM cannot be frozen, or a snapshot was lost or cannot be removed."""

    kind = "snapshot"


class GuestError(VmaError):
    """The guest, or what runs it, does not answer as it should."""

    kind = "guest"


__all__ = ("GuestError", "SnapshotError")
