# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Which disks a definition of libvirt's names. Pure: no I/O."""

from __future__ import annotations

from xml.etree import ElementTree

_NAMES = ("file", "dev", "volume")
"""How a source names a file, a block device, and a volume of a storage pool."""


def find_disks(definition: str) -> list[str]:
    """The files and block devices that the disks of a domain are. Raises: ValueError for what is no definition."""
    sources = [disk.find("source") for disk in _parse(definition).iter("disk") if disk.get("device", "disk") == "disk"]
    found = [source.get("file") or source.get("dev") for source in sources if source is not None]
    return [path for path in found if path]


def find_sources(definition: str) -> list[str]:
    """All that a domain reads or writes on its host: disks, what they are overlays of, UEFI variables.

    Volumes of storage pools come by their names. Raises: ValueError for what is no definition.
    """
    root = _parse(definition)
    found = [element.get(name) for element in root.iter() if element.tag != "target" for name in _NAMES]
    found += [(nvram.text or "").strip() for nvram in root.iter("nvram")]
    return list(dict.fromkeys(source for source in found if source))


def _parse(definition: str) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(definition)
    except ElementTree.ParseError as error:
        raise ValueError(f"expected the definition of a domain, found no XML: {error}") from error


__all__ = ("find_disks", "find_sources")
