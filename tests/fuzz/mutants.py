# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Damaged and hostile archives, made from sound ones by a sequence of choices.

Most changes are followed by new checksums, so that they reach the parser behind them. Who makes the choices, a seeded
generator or a coverage-guided fuzzer, is not this room's concern.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import random
import struct
import typing as t

from ansible_collections.vmbackup.vma.plugins.module_utils.vma import layout, zstd

INTERESTING = (
    0, 1, 2, 15, 16, 58, 59, 60, 253, 254, 255, 256, 511, 512, 513, 4095, 4096, 12287, 12288, 12289, 65535, 65536,
    524288, 524289,
    (16 << 20) - 512, 16 << 20, (16 << 20) + 512, (1 << 31) - 1, 1 << 31, (1 << 32) - 512, (1 << 32) - 1,
    1 << 32, 1 << 40, (1 << 48) - 1, 1 << 48, (1 << 48) + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1,
)  # fmt: skip
NAMES = (
    b"../escaped",
    b"/etc/escaped",
    b"a\x00b",
    b"a\nb",
    b"",
    b".",
    b"..",
    b"\xff\xfe",
    b"x" * 300,
    b"vmstate",
    b"a b",
)


class Choices(t.Protocol):
    """Where the decisions come from."""

    def below(self, limit: int) -> int:
        """A number from 0 to C(limit) - 1."""

    def take(self, count: int) -> bytes:
        """So many bytes."""


class SeededChoices:
    """Choices of a seeded generator: the same seed makes the same mutant."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def below(self, limit: int) -> int:
        """See Choices."""
        return self._random.randrange(limit)

    def take(self, count: int) -> bytes:
        """See Choices."""
        return self._random.randbytes(count)


class Parts:
    """A sound archive, taken apart."""

    def __init__(self, header: bytes | bytearray, extents: t.Sequence[bytes | bytearray]) -> None:
        self.header = bytearray(header)
        self.extents = [bytearray(extent) for extent in extents]

    def copy(self) -> Parts:
        """The same once more, so that a mutant's changes do not stay."""
        return Parts(self.header, self.extents)

    def join(self) -> bytearray:
        """The archive's bytes."""
        return self.header + b"".join(self.extents)


def _sound(seed: int, sizes: t.Mapping[str, int], slots: int, digests: bool) -> Parts:
    rng = random.Random(seed)
    devices = [layout.Device(number, name, size) for number, (name, size) in enumerate(sizes.items(), 1)]
    configs = [layout.Config("qemu-server.conf", b"name: fuzz\n"), layout.Config("qemu-server.fw", b"[OPTIONS]\n")]
    uuid = rng.randbytes(16)
    clusters = [(device, cluster) for device in devices for cluster in range(device.clusters)]
    extents = []
    for first in range(0, max(len(clusters), 1), slots):
        group = clusters[first : first + slots]
        stored = 0
        for slot, (device, _cluster) in enumerate(group):
            mask = 0xFFFF if device.name == "vmstate" else rng.choice((0, 1, 0x8001, 0x11))
            if device.size < 65536:
                mask &= 1
            stored |= mask << 16 * slot
        header = layout.build_extent(uuid, [(device.dev_id, cluster, 1) for device, cluster in group], stored)
        data = rng.randbytes(4096 * bin(stored).count("1"))
        layout.seal_extent(header, layout.extent_digest(header + data) if digests else None)
        extents.append(bytes(header) + data)
    return Parts(layout.build_header(uuid, 1_700_000_000, devices, configs), extents)


BASES: tuple[Parts, ...] = (
    _sound(1, {"drive-scsi0": 5 << 16, "drive-scsi1": 3 << 16}, 59, True),
    _sound(2, {"drive-scsi0": 5 << 16, "drive-scsi1": 3 << 16}, 59, False),
    _sound(3, {"drive-scsi0": 6 << 16, "drive-efidisk0": 4096}, 2, True),
    _sound(4, {"drive-scsi0": 2 << 16, "vmstate": 2 << 16}, 3, True),
    _sound(5, {"drive-scsi0": 512}, 59, False),
    _sound(6, {}, 59, True),
)


def seal_header(header: bytearray) -> None:
    """Make the header's checksum right for whatever it holds now."""
    if len(header) >= 60:
        size = min(len(header), int.from_bytes(header[56:60], "big"))
        header[32:48] = bytes(16)
        header[32:48] = hashlib.md5(header[:size]).digest()


def seal_extent(extent: bytearray, choices: Choices) -> None:
    """Make the extent's digest, where one is to be there, and its checksum right."""
    if len(extent) < 512:
        return
    keep = choices.below(8) == 0
    with_digest = extent[298] == 1
    extent[24:40] = bytes(16)
    if not keep:
        extent[42:512:8] = bytes(59)
        if with_digest:
            digest = hashlib.sha256(extent).digest()
            extent[42:298:8] = digest
            extent[298] = 1
    extent[24:40] = hashlib.md5(extent[:512]).digest()


def _number(choices: Choices, size: int) -> bytes:
    if choices.below(3):
        value = INTERESTING[choices.below(len(INTERESTING))]
    else:
        value = int.from_bytes(choices.take(size), "big")
    return (value & ((1 << 8 * size) - 1)).to_bytes(size, "big")


def _change_header(parts: Parts, choices: Choices) -> None:
    header = parts.header
    fields = (
        (4, 4), (8, 8), (24, 8), (48, 4), (52, 4), (56, 4),
        (2044 + 4 * choices.below(256), 4), (2044, 4), (2048, 4), (3068, 4), (3072, 4),
        (4096 + 32 * choices.below(256), 4), (4096 + 32 + 8, 8), (4096 + 64 + 8, 8), (4096 + 32, 4), (4096 + 64, 4),
    )  # fmt: skip
    at, size = fields[choices.below(len(fields))]
    if at + size <= len(header):
        header[at : at + size] = _number(choices, size)


def _change_blob(parts: Parts, choices: Choices) -> None:
    header = parts.header
    tables = [2044, 2048, 3068, 3072, 4096 + 32, 4096 + 64]
    at = tables[choices.below(len(tables))]
    if len(header) < 12290:
        return
    blob = 12288 + struct.unpack_from(">I", header, at)[0]
    if blob + 2 > len(header):
        return
    if choices.below(2):
        header[blob : blob + 2] = (int.from_bytes(_number(choices, 2), "big")).to_bytes(2, "little")
        return
    name = NAMES[choices.below(len(NAMES))] + b"\x00"
    end = min(len(header), 12289 + int.from_bytes(header[52:56], "big"))
    new = len(header)
    header += len(name).to_bytes(2, "little") + name
    header += bytes(-len(header) % 512)
    if end <= len(header):
        struct.pack_into(">I", header, at, new - 12288)
        struct.pack_into(">I", header, 52, len(header) - 12288)
        struct.pack_into(">I", header, 56, len(header))


def _change_extent(parts: Parts, choices: Choices) -> None:
    if not parts.extents:
        return
    extent = parts.extents[choices.below(len(parts.extents))]
    if len(extent) < 512:
        return
    slot = 40 + 8 * (choices.below(8) if choices.below(2) else choices.below(59))
    fields = ((0, 4), (4, 2), (6, 2), (8, 8), (slot, 2), (slot + 2, 1), (slot + 3, 1), (slot + 4, 4), (slot, 8))
    at, size = fields[choices.below(len(fields))]
    extent[at : at + size] = _number(choices, size)
    if choices.below(2):  # let the count agree with the masks again
        masks = extent[40:512:8] + extent[41:512:8]
        count = sum(bin(byte).count("1") for byte in masks)
        extent[6:8] = min(count, 65535).to_bytes(2, "big")
        if choices.below(2):
            extent[512:] = bytes(extent[512:]).ljust(count * 4096, b"\x5a")[: count * 4096]
    seal_extent(extent, choices)


def _rearrange(parts: Parts, choices: Choices) -> None:
    if not parts.extents:
        return
    number = choices.below(len(parts.extents))
    what = choices.below(4)
    if what == 0:
        del parts.extents[number]
    elif what == 1:
        parts.extents.insert(choices.below(len(parts.extents) + 1), bytearray(parts.extents[number]))
    elif what == 2:
        parts.extents.insert(number, bytearray(BASES[choices.below(len(BASES))].extents[0]))
    else:
        other = choices.below(len(parts.extents))
        parts.extents[number], parts.extents[other] = parts.extents[other], parts.extents[number]


def _change_bytes(data: bytearray, choices: Choices) -> bytearray:
    if not data:
        return data
    at = choices.below(len(data))
    what = choices.below(6)
    if what == 0:
        data[at] ^= 1 << choices.below(8)
    elif what == 1:
        del data[at:]
    elif what == 2:
        del data[at - at % 512 :]
    elif what == 3:
        data += choices.take(1 + choices.below(1024))
    elif what == 4:
        data[at:at] = choices.take(1 + choices.below(600))
    else:
        del data[at : at + 1 + choices.below(600)]
    return data


def _compress(data: bytes, choices: Choices) -> bytearray:
    what = choices.below(3)
    if what == 0:
        return bytearray(gzip.compress(data, 1, mtime=0))
    if what == 1:
        return bytearray(bz2.compress(data, 1))
    pieces: list[bytes] = []
    compressor = zstd.Compressor(lambda piece: pieces.append(bytes(piece)), 1, 0)
    compressor.write(bytearray(data))
    compressor.finish()
    compressor.close()
    return bytearray(b"".join(pieces))


def make_mutant(choices: Choices) -> bytes:
    """A mutant: a sound archive after one to four changes."""
    parts = BASES[choices.below(len(BASES))].copy()
    raw_changes = 0
    for _n in range(1 + choices.below(4)):
        kind = choices.below(10)
        if kind < 3:
            _change_header(parts, choices)
        elif kind < 5:
            _change_blob(parts, choices)
        elif kind < 8:
            _change_extent(parts, choices)
        elif kind == 8:
            _rearrange(parts, choices)
        else:
            raw_changes += 1
    if choices.below(16):
        seal_header(parts.header)
    data = parts.join()
    for _n in range(raw_changes):
        data = _change_bytes(data, choices)
    if choices.below(12) == 0:
        data = _compress(bytes(data), choices)
        if choices.below(2):
            data = _change_bytes(data, choices)
    return bytes(data)
