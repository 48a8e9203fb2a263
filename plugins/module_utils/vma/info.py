# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Archives described: what a header, a file's name and the files beside it tell, as plain values for results."""

from __future__ import annotations

import glob
import os
import typing as t

from . import vzdump
from .errors import RequestError
from .layout import Header
from .reader import Reader


def describe(
    path: str,
    header: Header | None,
    compression: str | None,
    *,
    integrity: str | None = None,
    with_content: bool = True,
) -> dict[str, t.Any]:
    """The archive at C(path) as results show it. Without C(with_content) configs, which may hold secrets, have none."""
    standard = vzdump.parse_name(path)
    configs = () if header is None else header.configs
    conf = next((config.data for config in configs if config.name == vzdump.CONFIG_NAME), None)
    return {
        "path": path,
        "size": _size_of(path),
        "compression": compression,
        "version": None if header is None else header.version,
        "uuid": None if header is None else header.uuid_text,
        "ctime": None if header is None else header.ctime,
        "header_size": None if header is None else header.size,
        "integrity": integrity,
        "devices": [
            {"dev_id": device.dev_id, "name": device.name, "size": device.size}
            for device in (() if header is None else header.devices)
        ],
        "configs": [
            {
                "name": config.name,
                "size": len(config.data),
                "content": config.data.decode("utf-8", "replace") if with_content else None,
            }
            for config in configs
        ],
        "vmid": None if standard is None else standard.vmid,
        "timestamp": None if standard is None else standard.timestamp,
        "vm": None if conf is None else vzdump.parse_config(conf),
        "notes": vzdump.read_notes(path),
        "protected": vzdump.is_protected(path),
    }


def _size_of(path: str) -> int | None:
    """None where the archive is gone by now, as after a pruning."""
    try:
        return os.stat(path).st_size
    except OSError:
        return None


def read_info(path: str, *, integrity: str | None = None, with_content: bool = True) -> dict[str, t.Any]:
    """Describe the archive at C(path) by its header alone, however large it is.

    Raises: ArchiveError where it has no sound header; RequestError, ToolError.
    """
    with Reader(path) as reader:
        compression = reader.stream.compression
        return describe(path, reader.header, compression, integrity=integrity, with_content=with_content)


def find_archives(paths: t.Iterable[str]) -> list[str]:
    """The archives that paths, globs and folders name: each once. In a folder, file names tell what is an archive.

    A folder without archives, and a glob that matches nothing, name none.

    Raises: RequestError for a path that does not exist, and for a folder that cannot be read.
    """
    found: dict[str, None] = {}
    for path in paths:
        if os.path.isdir(path):
            matches = [os.path.join(path, name) for name in _list_folder(path) if vzdump.is_archive_name(name)]
        elif os.path.lexists(path):
            matches = [path]
        elif glob.has_magic(path):
            matches = [match for match in sorted(glob.glob(path)) if _may_be_archive(match)]
        else:
            raise RequestError("there is no such file or folder", file=path, remedy="Check the path.")
        found.update(dict.fromkeys(matches))
    return list(found)


def _may_be_archive(path: str) -> bool:
    """Whether a pattern that matches this path means an archive, and not a folder or a file beside an archive."""
    return not os.path.isdir(path) and not path.endswith(vzdump.SIDECAR_SUFFIXES)


def _list_folder(path: str) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except OSError as error:
        raise RequestError(f"the folder cannot be read: {error.strerror}", file=path) from error


__all__ = ("describe", "find_archives", "read_info")
