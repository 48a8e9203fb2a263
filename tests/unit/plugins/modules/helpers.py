# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the tests of the modules share: results, and archives that are damaged in a certain way."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import pathlib
import typing as t

VECTORS = pathlib.Path(__file__).resolve().parents[2] / "vectors"
SECRET = "cipassword: open\nsesame\n"


@dataclasses.dataclass(frozen=True)
class Result:
    """What a module printed, as text and as data, and what it wrote to the system's log."""

    text: str
    log: str
    data: dict[str, t.Any]

    def __getitem__(self, key: str) -> t.Any:
        return self.data[key]


Run = t.Callable[..., Result]


def flip(path: pathlib.Path, offset: int) -> None:
    """Change a bit."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def unpack(name: str, path: pathlib.Path) -> pathlib.Path:
    """Write one of the vectors that Proxmox VE's own tool made, uncompressed, to C(path)."""
    path.write_bytes(gzip.decompress((VECTORS / f"{name}.vma.gz").read_bytes()))
    return path


def rename_in_header(path: pathlib.Path, old: bytes, new: bytes) -> None:
    """Replace a name in an uncompressed archive by one of the same length, as an attacker would."""
    data = path.read_bytes()
    size = int.from_bytes(data[56:60], "big")
    header = bytearray(data[:size])
    assert len(old) == len(new)
    assert header.count(old + b"\x00") == 1
    header = header.replace(old + b"\x00", new + b"\x00")
    header[32:48] = bytes(16)
    header[32:48] = hashlib.md5(header).digest()
    path.write_bytes(header + data[size:])


__all__ = ("SECRET", "VECTORS", "Result", "Run", "flip", "rename_in_header", "unpack")
