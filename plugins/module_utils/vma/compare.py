# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""An archive beside disk images: which of them hold exactly what the archive's devices hold."""

from __future__ import annotations

import threading
import typing as t

from .archive_file import usable_cpus
from .image import Image
from .layout import SECTOR_SIZE, VMSTATE, Segment
from .reader import Reader


class _AllDiffer(Exception):
    """Reading on would tell nothing new."""


def differing(
    reader: Reader,
    images: t.Mapping[int, Image],
    *,
    threads: int | None = None,
    bytes_per_second: int | None = None,
) -> dict[int, int]:
    """The devices whose images differ from what the archive holds: dev_id to the offset of the first difference found.

    An image of another size differs, unless it is a larger block device, or lacks only the end of its last sector.
    The scan ends early where all images differ; otherwise the archive was read to its end, and every cluster of the
    compared devices is there once.

    Raises: ArchiveError by the reader's report; SourceError where an image cannot be read.
    """
    found: dict[int, int] = {}
    lock = threading.Lock()

    def note(dev_id: int, offset: int) -> None:
        with lock:
            found[dev_id] = min(offset, found.get(dev_id, offset))
            if len(found) == len(images):
                raise _AllDiffer

    def visit(data: memoryview, segments: list[Segment]) -> None:
        for segment in segments:
            image = images.get(segment.dev_id)
            if image is not None and segment.dev_id not in found:
                offset = _first_difference(image, segment, data)
                if offset is not None:
                    note(segment.dev_id, offset)

    if not images:
        return found
    try:
        for device in reader.header.devices:
            image = images.get(device.dev_id)
            if image is not None and device.name != VMSTATE and not _has_size(image, device.size):
                note(device.dev_id, min(image.size, device.size))
        reader.scan(visit, threads=threads or usable_cpus(), wanted=images, bytes_per_second=bytes_per_second)
        for device in reader.header.devices:
            image = images.get(device.dev_id)
            if image is not None and device.name == VMSTATE and not _has_size(image, reader.size_of(device)):
                note(device.dev_id, min(image.size, reader.size_of(device)))
    except _AllDiffer:
        return found
    return found


def _first_difference(image: Image, segment: Segment, data: memoryview) -> int | None:
    length = max(0, min(segment.length, image.size - segment.start))
    if segment.data_at is None:
        return image.first_nonzero(segment.start, length)
    stored = data[segment.data_at : segment.data_at + length]
    difference = next(image.differences(stored, segment.start), None)
    if difference is not None:
        return segment.start + difference[0]
    # What lies behind the image's end stands for the zeros that would fill its last sector.
    behind = data[segment.data_at + length : segment.data_at + segment.length]
    return image.size if any(behind) else None


def _has_size(image: Image, size: int) -> bool:
    """Whether the image has this size, or would have once it is filled up to a whole sector."""
    return size - SECTOR_SIZE < image.size <= size or (image.is_block and image.size > size)


__all__ = ("differing",)
