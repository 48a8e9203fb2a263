# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What can be wrong, as values: problems of an archive, and errors of the operations.

No I/O here and no bytes: every other room of the codec raises or reports what is defined in this one.
"""

from __future__ import annotations

import dataclasses
import typing as t

REMEDIES: dict[str, str] = {
    "not_vma": "Name a file that Proxmox VE or vma_create made; other archive formats are not read.",
    "header_checksum": "The header changed after it was written: use another archive, check the storage.",
    "header_invalid": "The program that wrote this archive, or its storage, is at fault: use another archive.",
    "unsafe_name": "Do not let any tool build a path from this name. Extract the device to a path that you name.",
    "extent_magic": "Bytes were overwritten, lost or inserted before this: use another archive, check the storage.",
    "extent_checksum": "The extent's header changed after it was written: use another archive, check the storage.",
    "extent_uuid": "This extent belongs to another archive: the file was put together from several.",
    "extent_block_count": "The program that wrote this archive is at fault, or archives were mixed: use another one.",
    "extent_digest": "The data changed after the archive was written: use another archive, check the storage.",
    "truncated": "The copy or the backup was cut short: copy the archive again, or use another one.",
    "trailing_data": "Something was appended: other readers refuse this archive. Compare it with its origin.",
    "unknown_device": "The header and the extents do not belong together: use another archive.",
    "cluster_out_of_range": "The header and the extents do not belong together: use another archive.",
    "cluster_duplicate": "Which of the two holds the right data is not known: use another archive.",
    "cluster_missing": "The device cannot be restored in full: use another archive.",
    "vmstate_order": "The saved RAM state cannot be used; the disks beside it may still be whole.",
    "decompression": "The compressed file is damaged or cut short: copy the archive again, or use another one.",
    "read_error": "The storage cannot deliver the bytes: see the kernel's log (dmesg) for the device behind it.",
}
"""Every kind of problem that an archive can have, and what to do about it."""

KINDS: tuple[str, ...] = tuple(REMEDIES)


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing that is wrong with an archive.

    C(offset) counts bytes from the start of the uncompressed archive. C(device) is a device's name,
    C(cluster) a cluster number of that device.
    """

    kind: str
    message: str
    offset: int | None = None
    device: str | None = None
    cluster: int | None = None

    def as_dict(self) -> dict[str, t.Any]:
        """The problem as modules return it: C(kind), C(message), and the place as far as it is known."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}

    def __str__(self) -> str:
        where = "" if self.offset is None else f" at offset {self.offset}"
        return f"{self.kind}{where}: {self.message}"


Report = t.Callable[[Problem], None]
"""Takes a problem: keeps it and lets the reader go on, or raises ArchiveError to end the reading."""


class VmaError(Exception):
    """The base of all errors that the codec raises: where, what, and what to do about it.

    C(kind) is what results call an error of the class that is no problem of an archive.
    """

    kind: t.ClassVar[str] = "error"

    def __init__(self, message: str, *, file: str | None = None, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.file = file
        self.remedy = remedy

    def __str__(self) -> str:
        text = self.message if self.file is None else f"{self.file}: {self.message}"
        if not text.endswith((".", "!", "?")):
            text += "."
        return text if self.remedy is None else f"{text} {self.remedy}"


class ArchiveError(VmaError):
    """An archive that is being read has a problem, so that the operation cannot go on."""

    def __init__(self, problem: Problem, *, file: str | None = None) -> None:
        super().__init__(str(problem), file=file, remedy=REMEDIES[problem.kind])
        self.problem = problem


class RequestError(VmaError):
    """What was asked for cannot be done: a name, a size or a combination of options."""

    kind = "request"


class SourceError(VmaError):
    """A disk image that is being backed up cannot be read, or changed while it was read."""

    kind = "source"


class TargetError(VmaError):
    """A file or block device cannot be written."""

    kind = "target"


class SpaceError(TargetError):
    """The target's file system has not enough room."""

    kind = "space"


class BusyError(TargetError):
    """Another run is writing the same target."""

    kind = "busy"


class ToolError(VmaError):
    """A tool that is needed is missing or failed."""

    kind = "tool"


def refuse(problem: Problem) -> None:
    """The strict report: the first problem ends the operation.

    Raises: ArchiveError, always.
    """
    raise ArchiveError(problem)


__all__ = (
    "KINDS",
    "REMEDIES",
    "ArchiveError",
    "BusyError",
    "Problem",
    "Report",
    "RequestError",
    "SourceError",
    "SpaceError",
    "TargetError",
    "ToolError",
    "VmaError",
    "refuse",
)
