# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Which archive of each VM is the newest. Pure: no I/O, no clock; the names tell."""

from __future__ import annotations

import os.path
import re
import typing as t

_STANDARD = re.compile(r"(vzdump-qemu-[0-9]{3,9})-([0-9_-]+)\.vma(?:\.(?:gz|lzo|zst|bz2))?")

T = t.TypeVar("T")


def newest(archives: t.Iterable[T], path_of: t.Callable[[T], str]) -> list[T]:
    """The newest of each VM in each folder, by its name, ordered by path.

    An archive whose name is not standard, so that it tells no VM, stands for a VM of its own.
    """
    chosen: dict[str, tuple[str, T]] = {}
    for archive in sorted(archives, key=path_of):
        path = os.path.normpath(path_of(archive))
        match = _STANDARD.fullmatch(os.path.basename(path))
        vm, time = (os.path.join(os.path.dirname(path), match[1]), match[2]) if match else (path, "")
        if vm not in chosen or time >= chosen[vm][0]:
            chosen[vm] = (time, archive)
    return [archive for _time, archive in chosen.values()]


__all__ = ("newest",)
