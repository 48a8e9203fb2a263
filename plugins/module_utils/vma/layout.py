# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The bytes of a VMA archive: header, blob buffer, extent header. Parse and build; every constant.

No I/O: these functions take bytes and return values, or values and return bytes. docs/format.md explains the
format, its traps, and the digests that this collection adds to it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import operator
import struct
import typing as t
import uuid as uuid_module

from .errors import ArchiveError, Problem, Report, RequestError

BLOCK_SIZE = 4096
"""Bytes in a block, the unit that an archive stores or leaves out."""
BLOCKS_PER_CLUSTER = 16
CLUSTER_SIZE = BLOCK_SIZE * BLOCKS_PER_CLUSTER
"""Bytes in a cluster, the unit that an archive numbers."""
SLOTS = 59
"""Clusters that an extent can describe."""
SECTOR_SIZE = 512
"""Sizes of devices, and of all headers, are multiples of this many bytes."""
EXTENT_HEADER_SIZE = 512
EXTENT_DATA_SIZE = SLOTS * CLUSTER_SIZE
"""The most bytes of data that one extent can hold."""
FULL_MASK = 0xFFFF
"""The mask of a cluster of which every block is stored."""

HEADER_FIXED_SIZE = 12288
"""Bytes before the blob buffer."""
HEADER_WRITE_LIMIT = 524288
"""A larger header is refused by Proxmox VE, so none is written."""
HEADER_READ_LIMIT = 16 << 20
"""A larger header is refused here: no known writer makes one, and the memory would be the archive's to command."""
BLOB_LIMIT = 65535
CONFIG_LIMIT = 256
DEVICE_LIMIT = 254
"""Devices have the numbers 1 to 254; 0 marks an unused slot, and readers stop at 254."""
DEVICE_SIZE_LIMIT = CLUSTER_SIZE << 32
"""Bytes: cluster numbers have 32 bits."""
NAME_LIMIT = 255
VMSTATE = "vmstate"
"""The name of the device that holds a guest's RAM: a stream of clusters in order, not bound by its size."""

MAGIC = b"VMA\x00"
EXTENT_MAGIC = b"VMAE"
VERSION = 1

_FIXED = struct.Struct(">4sI16sQ16sIII")
_TABLE = struct.Struct(">256I")
_DEVICE = struct.Struct(">I4xQ16x")
_EXTENT = struct.Struct(">4s2xH16s16s")
_SLOTS = struct.Struct(f">{SLOTS}Q")
_CONFIG_NAMES_AT = 2044
_CONFIG_DATA_AT = 3068
_DEVICES_AT = 4096
_MD5_AT = 32
_EXTENT_MD5 = slice(24, 40)
_SLOTS_AT = 40
_SLOT_SIZE = 8

# One byte of each slot is reserved, and every known reader ignores it. The digest stands there.
_RESERVED = slice(_SLOTS_AT + 2, EXTENT_HEADER_SIZE, _SLOT_SIZE)
_DIGEST = slice(_SLOTS_AT + 2, _SLOTS_AT + 2 + 32 * _SLOT_SIZE, _SLOT_SIZE)
_DIGEST_MARK_AT = _SLOTS_AT + 2 + 32 * _SLOT_SIZE
_NO_RESERVED = bytes(SLOTS)
_EACH_SLOT = int.from_bytes(_SLOTS.pack(*[1] * SLOTS), "big")
_ONE_MORE_EACH = int.from_bytes(_SLOTS.pack(*range(SLOTS)), "big")
_NO_MD5 = bytes(16)

Buffer = t.Union[bytes, bytearray, memoryview]


@dataclasses.dataclass(frozen=True)
class Device:
    """A disk in an archive: its number in the extents, its name, its size in bytes."""

    dev_id: int
    name: str
    size: int

    @property
    def clusters(self) -> int:
        """How many clusters the device's size takes."""
        return -(-self.size // CLUSTER_SIZE)


@dataclasses.dataclass(frozen=True)
class Config:
    """A configuration file in an archive."""

    name: str
    data: bytes


@dataclasses.dataclass(frozen=True)
class Header:
    """What an archive says of itself before its first extent. C(ctime) is in seconds since the epoch."""

    uuid: bytes
    ctime: int
    devices: tuple[Device, ...]
    configs: tuple[Config, ...]
    size: int
    version: int = VERSION

    @property
    def uuid_text(self) -> str:
        """The UUID in its usual notation."""
        return str(uuid_module.UUID(bytes=self.uuid))


def md5(data: Buffer) -> bytes:
    """The format's checksum. It guards against accidents, so hosts in FIPS mode may compute it."""
    return hashlib.md5(data, usedforsecurity=False).digest()


def name_fault(name: str) -> str | None:
    """Why C(name) must not become part of a path or of a line of output; None where it may."""
    if not name:
        return "it is empty"
    if name in (".", ".."):
        return "it names a folder"
    if "/" in name:
        return "it contains a slash"
    if "\\" in name:
        return "it contains a backslash, or bytes that are not UTF-8"
    if len(name.encode("utf-8", "surrogatepass")) > NAME_LIMIT:
        return f"it is longer than {NAME_LIMIT} bytes"
    if not name.isprintable() or any(char.isspace() for char in name):
        return "it contains white space or unprintable characters"
    return None


# --- header -----------------------------------------------------------------------------------------------------------


def parse_header_size(fixed: Buffer) -> int:
    """How many bytes the header has, told by its first HEADER_FIXED_SIZE bytes (fewer, where the file is shorter).

    Raises: ArchiveError of the kinds not_vma, truncated, header_invalid.
    """
    if bytes(fixed[:4]) != MAGIC:
        found = bytes(fixed[:4]).hex(" ") or "an empty file"
        raise ArchiveError(Problem("not_vma", f"expected the magic bytes {MAGIC.hex(' ')}, found {found}", 0))
    if len(fixed) < HEADER_FIXED_SIZE:
        raise ArchiveError(
            Problem("truncated", f"expected {HEADER_FIXED_SIZE} bytes of header, found {len(fixed)}", len(fixed))
        )
    _magic, version, _uuid, _ctime, _md5, _blob_at, _blob_size, size = _FIXED.unpack_from(fixed)
    if version != VERSION:
        raise ArchiveError(Problem("header_invalid", f"expected format version {VERSION}, found {version}", 4))
    if size < HEADER_FIXED_SIZE or size % SECTOR_SIZE:
        raise ArchiveError(
            Problem(
                "header_invalid",
                f"expected a header size of at least {HEADER_FIXED_SIZE} and a multiple of {SECTOR_SIZE}, found {size}",
                56,
            )
        )
    if size > HEADER_READ_LIMIT:
        raise ArchiveError(
            Problem("header_invalid", f"expected a header of at most {HEADER_READ_LIMIT} bytes, found {size}", 56)
        )
    return int(size)


class _Blobs:
    """Bounds-checked access to the blob buffer of a header."""

    def __init__(self, header: Buffer, start: int, size: int) -> None:
        self._header = header
        self._start = start
        self._size = size

    def get(self, at: int) -> bytes:
        """The blob at offset C(at) of the buffer. Raises: ValueError with what is wrong."""
        if at + 2 > self._size:
            raise ValueError(f"its blob starts at {at}, outside the blob buffer of {self._size} bytes")
        length = int.from_bytes(self._header[self._start + at : self._start + at + 2], "little")
        if at + 2 + length > self._size:
            raise ValueError(f"its blob of {length} bytes at {at} ends outside the blob buffer of {self._size} bytes")
        return bytes(self._header[self._start + at + 2 : self._start + at + 2 + length])

    def get_name(self, at: int) -> str:
        """The name at offset C(at). Bytes that are not UTF-8 come as backslash escapes. Raises: ValueError.

        Of a name that is too long, so much comes as shows that: it is repeated in every problem of its device.
        """
        blob = self.get(at)
        if not blob.endswith(b"\x00"):
            raise ValueError("its name does not end in NUL")
        return blob[:-1][: NAME_LIMIT + 1].decode("utf-8", "backslashreplace")


def parse_header(data: Buffer, report: Report) -> Header:
    """The header in C(data), which holds exactly as many bytes as parse_header_size() says.

    Problems that leave the rest readable go to C(report): header_checksum, header_invalid, unsafe_name.
    Raises: ArchiveError like parse_header_size().
    """
    size = parse_header_size(data)
    _magic, version, uuid, ctime, checksum, blob_at, blob_size, _size = _FIXED.unpack_from(data)
    blank = bytearray(data)
    blank[_MD5_AT : _MD5_AT + 16] = _NO_MD5
    actual = md5(blank)
    if actual != checksum:
        report(Problem("header_checksum", f"expected the MD5 {checksum.hex()}, found {actual.hex()}", _MD5_AT))
    if blob_at < HEADER_FIXED_SIZE or blob_at + blob_size > size:
        report(
            Problem(
                "header_invalid",
                f"expected the blob buffer from {HEADER_FIXED_SIZE} to {size}, found {blob_size} bytes at {blob_at}",
                48,
            )
        )
        blob_size = 0
    blobs = _Blobs(data, blob_at, blob_size)
    devices = _parse_devices(data, blobs, report)
    configs = _parse_configs(data, blobs, report)
    return Header(uuid, ctime, devices, configs, size, version)


def _parse_configs(data: Buffer, blobs: _Blobs, report: Report) -> tuple[Config, ...]:
    configs: list[Config] = []
    names_at = _TABLE.unpack_from(data, _CONFIG_NAMES_AT)
    data_at = _TABLE.unpack_from(data, _CONFIG_DATA_AT)
    for index, (name_at, content_at) in enumerate(zip(names_at, data_at)):
        if not name_at and not content_at:
            continue
        offset = _CONFIG_NAMES_AT + 4 * index
        try:
            if not name_at or not content_at:
                raise ValueError("it has a name or data, but not both")
            config = Config(blobs.get_name(name_at), blobs.get(content_at))
        except ValueError as error:
            report(Problem("header_invalid", f"config {index} cannot be read: {error}", offset))
            continue
        _check_name("config", config.name, {other.name for other in configs}, offset, report)
        configs.append(config)
    return tuple(configs)


def _parse_devices(data: Buffer, blobs: _Blobs, report: Report) -> tuple[Device, ...]:
    devices: list[Device] = []
    for dev_id, (name_at, size) in enumerate(_DEVICE.iter_unpack(data[_DEVICES_AT:HEADER_FIXED_SIZE])):
        if not name_at and not size:
            continue
        offset = _DEVICES_AT + _DEVICE.size * dev_id
        try:
            if not 1 <= dev_id <= DEVICE_LIMIT:
                raise ValueError(f"expected device ids from 1 to {DEVICE_LIMIT}")
            if not name_at:
                raise ValueError("it has a size and no name")
            if not 0 < size <= DEVICE_SIZE_LIMIT:
                raise ValueError(f"expected a size from 1 to {DEVICE_SIZE_LIMIT} bytes, found {size}")
            device = Device(dev_id, blobs.get_name(name_at), size)
        except ValueError as error:
            report(Problem("header_invalid", f"device {dev_id} cannot be read: {error}", offset))
            continue
        _check_name("device", device.name, {other.name for other in devices}, offset, report)
        devices.append(device)
    return tuple(devices)


def _check_name(what: str, name: str, others: set[str], offset: int, report: Report) -> None:
    fault = name_fault(name)
    if fault is not None:
        report(Problem("unsafe_name", f"the {what} name {name!r} is unsafe: {fault}", offset))
    if name in others:
        report(Problem("header_invalid", f"two {what}s have the name {name!r}", offset))


def build_header(uuid: bytes, ctime: int, devices: t.Sequence[Device], configs: t.Sequence[Config]) -> bytes:
    """The bytes of a header, padded and with its checksum.

    Raises: RequestError where a name is unsafe or taken twice, or something is larger than the format allows.
    """
    if len(configs) > CONFIG_LIMIT:
        raise RequestError(f"an archive holds at most {CONFIG_LIMIT} configs, {len(configs)} were given")
    if len(devices) > DEVICE_LIMIT:
        raise RequestError(f"an archive holds at most {DEVICE_LIMIT} devices, {len(devices)} were given")
    if not 0 <= ctime < 1 << 63:
        raise RequestError(f"the creation time must be from 0 to 2^63 - 1 seconds, {ctime} was given")
    blobs = bytearray(1)  # readers take offset 0 as "none", so the first blob stands at 1
    header = bytearray(HEADER_FIXED_SIZE)

    def add(blob: bytes, what: str) -> int:
        if len(blob) > BLOB_LIMIT:
            raise RequestError(f"{what} has {len(blob)} bytes; the format allows {BLOB_LIMIT}")
        at = len(blobs)
        blobs.extend(len(blob).to_bytes(2, "little") + blob)
        return at

    def add_name(what: str, name: str, others: t.Sequence[str]) -> int:
        fault = name_fault(name)
        if fault is not None:
            raise RequestError(f"the {what} name {name!r} cannot be used: {fault}")
        if name in others:
            raise RequestError(f"two {what}s have the name {name!r}")
        return add(name.encode() + b"\x00", f"the {what} name {name!r}")

    for index, config in enumerate(configs):
        name_at = add_name("config", config.name, [other.name for other in configs[:index]])
        data_at = add(config.data, f"the config {config.name!r}")
        struct.pack_into(">I", header, _CONFIG_NAMES_AT + 4 * index, name_at)
        struct.pack_into(">I", header, _CONFIG_DATA_AT + 4 * index, data_at)
    for index, device in enumerate(devices):
        if not 0 < device.size <= DEVICE_SIZE_LIMIT:
            raise RequestError(
                f"the device {device.name!r} has {device.size} bytes; the format allows 1 to {DEVICE_SIZE_LIMIT}"
            )
        name_at = add_name("device", device.name, [other.name for other in devices[:index]])
        _DEVICE.pack_into(header, _DEVICES_AT + _DEVICE.size * device.dev_id, name_at, device.size)
    size = -(-(HEADER_FIXED_SIZE + len(blobs)) // SECTOR_SIZE) * SECTOR_SIZE
    if size > HEADER_WRITE_LIMIT:
        raise RequestError(f"the configs make a header of {size} bytes; readers allow {HEADER_WRITE_LIMIT}")
    _FIXED.pack_into(header, 0, MAGIC, VERSION, uuid, ctime, _NO_MD5, HEADER_FIXED_SIZE, len(blobs), size)
    whole = (header + blobs).ljust(size, b"\x00")
    whole[_MD5_AT : _MD5_AT + 16] = md5(whole)
    return bytes(whole)


# --- extents ----------------------------------------------------------------------------------------------------------


class Run(t.NamedTuple):
    """Neighbouring slots that hold consecutive clusters of one device, all with one mask."""

    dev_id: int
    cluster: int
    clusters: int
    mask: int


class Segment(t.NamedTuple):
    """A stretch of a device, in bytes. C(data_at) is its place in the extent's data, None where it is all zero."""

    dev_id: int
    start: int
    length: int
    data_at: int | None


class Extent(t.NamedTuple):
    """An extent header that can be trusted.

    C(blank) is the header as the digest covers it, C(digest) None in an extent that carries none.
    """

    runs: list[Run]
    data_size: int
    digest: Buffer | None
    blank: Buffer


def parse_extent(header: Buffer, uuid: bytes, offset: int) -> Extent:
    """The extent header in C(header), which was read at C(offset) of the archive with this UUID.

    Raises: ArchiveError of the kinds truncated, extent_magic, extent_checksum, extent_uuid, extent_block_count.
    """
    if len(header) < EXTENT_HEADER_SIZE:
        message = f"expected an extent header of {EXTENT_HEADER_SIZE} bytes, found {len(header)}"
        raise ArchiveError(Problem("truncated", message, offset))
    magic, block_count, found_uuid, checksum = _EXTENT.unpack_from(header)
    if magic != EXTENT_MAGIC:
        raise ArchiveError(Problem("extent_magic", f"expected {EXTENT_MAGIC.hex(' ')}, found {magic.hex(' ')}", offset))
    blank = bytearray(header)
    blank[_EXTENT_MD5] = _NO_MD5
    actual = md5(blank)
    if actual != checksum:
        raise ArchiveError(
            Problem("extent_checksum", f"expected the MD5 {checksum.hex()}, found {actual.hex()}", offset)
        )
    if found_uuid != uuid:
        expected = uuid_module.UUID(bytes=uuid)
        raise ArchiveError(
            Problem("extent_uuid", f"expected {expected}, found {uuid_module.UUID(bytes=found_uuid)}", offset)
        )
    digest = blank[_DIGEST] if blank[_DIGEST_MARK_AT] == 1 else None
    blank[_RESERVED] = _NO_RESERVED
    runs = _parse_runs(blank)
    stored = 0
    for run in runs:
        stored += _count_bits(run.mask) * run.clusters
    if stored != block_count:
        raise ArchiveError(
            Problem(
                "extent_block_count", f"expected {stored} blocks by the masks, found {block_count} by the count", offset
            )
        )
    return Extent(runs, stored * BLOCK_SIZE, digest, blank)


def _parse_runs(blank: Buffer) -> list[Run]:
    # A slot is mask, 0, dev_id, number: as one integer, the next cluster of a device with the same mask is one more.
    # Most extents are one run, which one comparison of all slots as one integer tells in a fifth of the time.
    slots: t.Sequence[int]
    together = int.from_bytes(blank[_SLOTS_AT:EXTENT_HEADER_SIZE], "big")
    first_slot = together >> 64 * (SLOTS - 1)
    if together == first_slot * _EACH_SLOT + _ONE_MORE_EACH:
        slots = (first_slot,)
        bounds = [0, SLOTS]
    else:
        slots = _SLOTS.unpack_from(blank, _SLOTS_AT)
        steps = map(operator.sub, slots[1:], slots)
        bounds = [0, *[at for at, step in enumerate(steps, 1) if step != 1], SLOTS]
    runs = []
    for start, end in zip(bounds, bounds[1:]):
        slot = slots[start]
        dev_id = slot >> 32 & 0xFF
        cluster = slot & 0xFFFFFFFF
        first = min(end - start, (1 << 32) - cluster)
        if dev_id:
            runs.append(Run(dev_id, cluster, first, slot >> 48))
        if first < end - start:  # the highest number of one device, and 0 of the next, also are one apart
            runs.append(Run(dev_id + 1, 0, end - start - first, slot >> 48))
    return runs


@functools.lru_cache(maxsize=4096)
def _stretches(mask: int) -> tuple[tuple[int, int, bool], ...]:
    """The cluster's stretches of blocks alike: first block, count, whether they are stored."""
    stretches = []
    first = 0
    for block in range(1, BLOCKS_PER_CLUSTER + 1):
        stored = bool(mask >> first & 1)
        if block == BLOCKS_PER_CLUSTER or bool(mask >> block & 1) != stored:
            stretches.append((first, block - first, stored))
            first = block
    return tuple(stretches)


def segments(runs: t.Iterable[Run]) -> list[Segment]:
    """The stretches of devices that C(runs) describe, in the order of the extent's data, neighbours merged.

    The last one of a device may reach past the device's end, to the end of its cluster.
    """
    found: list[Segment] = []
    data_at = begin_at = 0
    dev_id = begin = end = 0  # the segment that may still grow; it has no device before the first one
    is_stored = False
    for run in runs:
        if run.mask in (0, FULL_MASK):
            parts: t.Iterable[tuple[int, int, bool]] = (
                (run.cluster * CLUSTER_SIZE, run.clusters * CLUSTER_SIZE, run.mask != 0),
            )
        else:
            stretches = _stretches(run.mask)
            parts = [
                (cluster * CLUSTER_SIZE + first * BLOCK_SIZE, count * BLOCK_SIZE, stored)
                for cluster in range(run.cluster, run.cluster + run.clusters)
                for first, count, stored in stretches
            ]
        for start, length, stored in parts:
            if start != end or stored != is_stored or run.dev_id != dev_id:
                if dev_id:
                    found.append(Segment(dev_id, begin, end - begin, begin_at if is_stored else None))
                dev_id, begin, is_stored, begin_at = run.dev_id, start, stored, data_at
            end = start + length
            if stored:
                data_at += length
    if dev_id:
        found.append(Segment(dev_id, begin, end - begin, begin_at if is_stored else None))
    return found


def build_extent(uuid: bytes, runs: t.Iterable[tuple[int, int, int]], stored: int) -> bytearray:
    """An extent header without digest and checksum, as the digest covers it.

    C(runs) are dev_id, first cluster and count; C(stored) has a bit for each block, from bit 0, in the slots' order.
    """
    slots: list[int] = []
    for dev_id, first, count in runs:
        slots.extend(range(dev_id << 32 | first, (dev_id << 32 | first) + count))
    slots.extend([0] * (SLOTS - len(slots)))
    header = bytearray(EXTENT_HEADER_SIZE)
    _EXTENT.pack_into(header, 0, EXTENT_MAGIC, _count_bits(stored), uuid, _NO_MD5)
    _SLOTS.pack_into(header, _SLOTS_AT, *slots)
    masks = stored.to_bytes(2 * SLOTS, "little")
    header[_SLOTS_AT::_SLOT_SIZE] = masks[1::2]
    header[_SLOTS_AT + 1 :: _SLOT_SIZE] = masks[0::2]
    return header


def _count_bits(number: int) -> int:
    return bin(number).count("1")


def extent_digest(whole: Buffer) -> bytes:
    """The SHA-256 of a whole extent: its blank header, then its data."""
    return hashlib.sha256(whole).digest()


def is_extent(header: Buffer, uuid: bytes) -> bool:
    """Whether C(header) is a sound extent header of the archive with this UUID."""
    if header[8:24] != uuid:  # a checksum for every four bytes that look like a magic would take hours
        return False
    try:
        parse_extent(header, uuid, 0)
    except ArchiveError:
        return False
    return True


def seal_extent(header: bytearray, digest: bytes | None) -> None:
    """Put the digest, where there is one, and the checksum into a header that build_extent() made."""
    if digest is not None:
        header[_DIGEST] = digest
        header[_DIGEST_MARK_AT] = 1
    header[_EXTENT_MD5] = md5(header)


__all__ = (
    "BLOCKS_PER_CLUSTER",
    "BLOCK_SIZE",
    "CLUSTER_SIZE",
    "CONFIG_LIMIT",
    "DEVICE_LIMIT",
    "DEVICE_SIZE_LIMIT",
    "EXTENT_DATA_SIZE",
    "EXTENT_HEADER_SIZE",
    "EXTENT_MAGIC",
    "FULL_MASK",
    "HEADER_FIXED_SIZE",
    "HEADER_READ_LIMIT",
    "HEADER_WRITE_LIMIT",
    "MAGIC",
    "SECTOR_SIZE",
    "SLOTS",
    "VMSTATE",
    "Buffer",
    "Config",
    "Device",
    "Extent",
    "Header",
    "Run",
    "Segment",
    "build_extent",
    "build_header",
    "extent_digest",
    "is_extent",
    "md5",
    "name_fault",
    "parse_extent",
    "parse_header",
    "parse_header_size",
    "seal_extent",
    "segments",
)
