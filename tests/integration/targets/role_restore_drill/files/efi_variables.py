# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""EFI variables as a VM has them whose system is installed: with a boot entry that names a program on its disk.

The layout is EDK II's (MdeModulePkg, Include/Guid/VariableFormat.h), that of the entry the UEFI specification's.
"""

from __future__ import annotations

import struct
import uuid

_VOLUME_HEADER_SIZE = 72
_STORE_HEADER_SIZE = 28
_VARIABLE = struct.Struct("<HBBIQ16sIII16s")
"""Mark, state, attributes, name size and data size are what counts here; and the vendor, a GUID."""
_MARK, _ADDED = 0x55AA, 0x3F
_LASTS_AND_IS_SEEN = 0x7
_GLOBAL = uuid.UUID("8be4df61-93ca-11d2-aa0d-00e098032b8c")
_END_OF_PATH = bytes.fromhex("7fff0400")


def with_boot_entry(empty: bytes, partition: uuid.UUID, first_sector: int, sectors: int, program: str) -> bytes:
    """Empty variables of OVMF, and in them an entry for a program on the first partition of a disk with a GPT."""
    variables = _variable("Boot0000", _boot_entry(partition, first_sector, sectors, program))
    variables += _variable("BootOrder", struct.pack("<H", 0))
    start = _VOLUME_HEADER_SIZE + _STORE_HEADER_SIZE
    end = start + len(variables)
    if set(empty[start:end]) != {0xFF}:
        raise ValueError("there are variables already")
    return empty[:start] + variables + empty[end:]


def _variable(name: str, data: bytes) -> bytes:
    text = _text(name)
    sizes = 0, len(text), len(data)
    header = _VARIABLE.pack(_MARK, _ADDED, 0, _LASTS_AND_IS_SEEN, 0, bytes(16), *sizes, _GLOBAL.bytes_le)
    whole = header + text + data
    return whole + b"\xff" * (-len(whole) % 4)


def _boot_entry(partition: uuid.UUID, first_sector: int, sectors: int, program: str) -> bytes:
    gpt, by_guid = 2, 2
    disk = struct.pack("<IQQ16sBB", 1, first_sector, sectors, partition.bytes_le, gpt, by_guid)
    path = _path_node(4, 1, disk) + _path_node(4, 4, _text(program)) + _END_OF_PATH
    return struct.pack("<IH", 1, len(path)) + _text("drill") + path


def _path_node(kind: int, subkind: int, content: bytes) -> bytes:
    return struct.pack("<BBH", kind, subkind, 4 + len(content)) + content


def _text(text: str) -> bytes:
    return (text + "\0").encode("utf-16-le")
