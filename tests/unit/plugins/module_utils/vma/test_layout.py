# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The bytes of headers and extents, against bytes that are put together by hand."""

from __future__ import annotations

import hashlib
import struct
import typing as t

import pytest

from ansible_collections.vmbackup.vma.plugins.module_utils.vma import errors, layout
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.vma import helpers
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.vma.helpers import BLOCK, CLUSTER, UUID

MIB = 1 << 20


def _collect(data: bytes) -> tuple[layout.Header, list[errors.Problem]]:
    problems: list[errors.Problem] = []
    return layout.parse_header(data, problems.append), problems


# --- header -----------------------------------------------------------------------------------------------------------


def test_header_byte_for_byte() -> None:
    blobs = (
        b"\x00"  # offset 0 means none
        b"\x07\x00a.conf\x00"
        b"\x05\x00text\n"
        b"\x0c\x00drive-scsi0\x00"
        b"\x05\x00disk\x00"
    )
    header = bytearray(12288) + blobs
    struct.pack_into(">4sI16sQ", header, 0, b"VMA\x00", 1, UUID, 1700000000)
    struct.pack_into(">III", header, 48, 12288, len(blobs), 12800)
    struct.pack_into(">I", header, 2044, 1)
    struct.pack_into(">I", header, 3068, 10)
    struct.pack_into(">IIQ", header, 4096 + 32, 17, 0, 8 * MIB)
    struct.pack_into(">IIQ", header, 4096 + 64, 31, 0, 512)
    header = header.ljust(12800, b"\x00")
    helpers.seal_header(header)

    devices = (layout.Device(1, "drive-scsi0", 8 * MIB), layout.Device(2, "disk", 512))
    configs = (layout.Config("a.conf", b"text\n"),)
    assert layout.build_header(UUID, 1700000000, devices, configs) == bytes(header)
    parsed, problems = _collect(bytes(header))
    assert problems == []
    assert parsed == layout.Header(UUID, 1700000000, devices, configs, 12800, 1)
    assert parsed.uuid_text == helpers.UUID_TEXT


@pytest.mark.parametrize(
    ("devices", "configs"),
    [
        pytest.param([], [], id="empty"),
        pytest.param([], [layout.Config("c", b"")], id="a config without a byte"),
        pytest.param([layout.Device(1, "d", 1)], [], id="the smallest device"),
        pytest.param([layout.Device(1, "d", layout.DEVICE_SIZE_LIMIT)], [], id="the largest device, 256 TiB"),
        pytest.param([layout.Device(254, "last", 512)], [], id="the highest device id"),
        pytest.param([layout.Device(n, f"d{n}", n * 512) for n in range(1, 255)], [], id="254 devices"),
        pytest.param([], [layout.Config(f"c{n}", bytes([n])) for n in range(256)], id="256 configs"),
        pytest.param([], [layout.Config("big", b"x" * 65535)], id="the largest config"),
        pytest.param([layout.Device(1, "ü" * 127, 512)], [], id="a name in UTF-8 of 254 bytes"),
        pytest.param([], [layout.Config("binary", bytes(range(256)))], id="every byte"),
    ],
)
def test_header_round_trip(devices: list[layout.Device], configs: list[layout.Config]) -> None:
    data = layout.build_header(UUID, 1, devices, configs)
    header, problems = _collect(data)
    assert problems == []
    assert (list(header.devices), list(header.configs)) == (devices, configs)
    assert len(data) % 512 == 0
    assert header.size == len(data) == layout.parse_header_size(data[:12288])


@pytest.mark.parametrize(
    ("devices", "configs", "message"),
    [
        ([layout.Device(n, f"d{n}", 512) for n in range(1, 256)], [], "at most 254 devices, 255"),
        ([], [layout.Config(f"c{n}", b"") for n in range(257)], "at most 256 configs, 257"),
        ([], [layout.Config("big", b"x" * 65536)], "65536 bytes; the format allows 65535"),
        ([], [layout.Config(f"c{n}", b"x" * 65535) for n in range(8)], "readers allow 524288"),
        ([layout.Device(1, "d", 0)], [], "'d' has 0 bytes"),
        ([layout.Device(1, "d", layout.DEVICE_SIZE_LIMIT + 1)], [], "the format allows 1 to"),
        ([layout.Device(1, "d", 512), layout.Device(2, "d", 512)], [], "two devices have the name 'd'"),
        ([], [layout.Config("c", b""), layout.Config("c", b"")], "two configs have the name 'c'"),
        ([layout.Device(1, "a b", 512)], [], "white space"),
        ([], [layout.Config("../c", b"")], "slash"),
    ],
)
def test_header_beyond_the_format_is_not_built(
    devices: list[layout.Device], configs: list[layout.Config], message: str
) -> None:
    with pytest.raises(errors.RequestError, match=message):
        layout.build_header(UUID, 1, devices, configs)


@pytest.mark.parametrize("ctime", [-1, 1 << 63])
def test_ctime_beyond_the_format_is_not_built(ctime: int) -> None:
    with pytest.raises(errors.RequestError, match="creation time"):
        layout.build_header(UUID, ctime, [], [])


def test_header_of_exactly_the_limit_is_built() -> None:
    # 7 configs of the largest size, and one that fills the rest to the byte
    configs = [layout.Config(f"c{n}", b"x" * 65535) for n in range(7)]
    used = 1 + 7 * (2 + 3 + 2 + 65535)
    configs.append(layout.Config("c7", b"x" * (524288 - 12288 - used - 2 - 3 - 2)))
    assert len(layout.build_header(UUID, 1, [], configs)) == 524288
    configs[-1] = layout.Config("c7", configs[-1].data + b"x")
    with pytest.raises(errors.RequestError, match="readers allow 524288"):
        layout.build_header(UUID, 1, [], configs)


def test_a_larger_header_than_we_write_is_read() -> None:
    header = bytearray(layout.build_header(UUID, 1, [layout.Device(1, "d", 512)], []))
    struct.pack_into(">I", header, 56, 1 << 20)
    header = header.ljust(1 << 20, b"\x00")
    helpers.seal_header(header)
    parsed, problems = _collect(bytes(header))
    assert problems == []
    assert parsed.size == 1 << 20


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("drive-scsi0", None),
        ("qemu-server.conf", None),
        ("...", None),
        ("ü", None),
        ("x" * 255, None),
        ("", "empty"),
        (".", "folder"),
        ("..", "folder"),
        ("../x", "slash"),
        ("/etc/passwd", "slash"),
        ("a\\b", "backslash"),
        ("a b", "white space"),
        ("a\tb", "white space"),
        ("a\nb", "white space"),
        ("a\u00a0b", "white space"),
        ("a\x1b[31m", "unprintable"),
        ("a\u202eb", "unprintable"),
        ("\ud800", "unprintable"),
        ("x" * 256, "longer than 255"),
        ("ü" * 128, "longer than 255"),
    ],
)
def test_names(name: str, fault: str | None) -> None:
    told = layout.name_fault(name)
    assert told is None if fault is None else told is not None and fault in told


def test_a_name_that_is_no_utf8_is_shown_and_unsafe() -> None:
    header = bytearray(layout.build_header(UUID, 1, [layout.Device(1, "abc", 512)], []))
    at = header.index(b"abc\x00")
    header[at + 1] = 0xFF
    helpers.seal_header(header)
    parsed, problems = _collect(bytes(header))
    assert parsed.devices[0].name == r"a\xffc"
    assert [problem.kind for problem in problems] == ["unsafe_name"]


def test_a_name_that_is_too_long_is_cut_and_unsafe() -> None:
    config = layout.Config("a.conf", b"\xff" * 60000 + b"\x00")
    header = bytearray(layout.build_header(UUID, 1, [layout.Device(1, "abc", 512)], [config]))
    (long_at,) = struct.unpack_from(">I", header, 3068)
    struct.pack_into(">I", header, 4096 + 32, long_at)
    helpers.seal_header(header)
    parsed, problems = _collect(bytes(header))
    assert parsed.devices[0].name == r"\xff" * 256
    assert [(problem.kind, problem.offset) for problem in problems] == [("unsafe_name", 4096 + 32)]
    assert len(problems[0].message) < 4000


# --- extents ----------------------------------------------------------------------------------------------------------


def test_extent_header_byte_for_byte() -> None:
    slots = [(0x0003, 1, 0), (0, 1, 1), (0xFFFF, 2, 7)]
    expected = bytearray(struct.pack(">4sHH16s16x", b"VMAE", 0, 18, UUID))
    for mask, dev_id, cluster in slots:
        expected += struct.pack(">HBBI", mask, 0, dev_id, cluster)
    expected = expected.ljust(512, b"\x00")
    stored = 0x0003 | 0 << 16 | 0xFFFF << 32
    header = layout.build_extent(UUID, [(1, 0, 2), (2, 7, 1)], stored)
    assert header == expected

    layout.seal_extent(header, None)
    expected[24:40] = hashlib.md5(expected).digest()
    assert header == expected


def test_digest_stands_where_the_design_says() -> None:
    data = b"\xc3" * 3 * BLOCK
    blank = layout.build_extent(UUID, [(1, 5, 59)], 0b111)
    digest = hashlib.sha256(bytes(blank) + data).digest()
    assert layout.extent_digest(bytes(blank) + data) == digest

    sealed = bytearray(blank)
    layout.seal_extent(sealed, digest)
    # byte i of the digest is the reserved byte of slot i; that of slot 32 is 1
    assert bytes(sealed[40 + 8 * slot + 2] for slot in range(32)) == digest
    assert [sealed[40 + 8 * slot + 2] for slot in range(32, 59)] == [1] + [0] * 26
    # the MD5 covers the digest
    without_md5 = bytes(sealed[:24]) + bytes(16) + bytes(sealed[40:])
    assert bytes(sealed[24:40]) == hashlib.md5(without_md5).digest()
    # nothing else changed
    different = [at for at in range(512) if sealed[at] != blank[at] and not 24 <= at < 40]
    assert {at % 8 for at in different} == {2}

    extent = layout.parse_extent(sealed, UUID, 0)
    assert extent.digest == digest
    assert extent.blank == bytes(blank)
    assert extent.data_size == len(data)


@pytest.mark.parametrize("mark", [0, 2, 255])
def test_without_its_mark_there_is_no_digest(mark: int) -> None:
    header = layout.build_extent(UUID, [(1, 0, 1)], 0)
    for slot in range(32):
        header[42 + 8 * slot] = slot
    header[42 + 8 * 32] = mark
    header[24:40] = hashlib.md5(header).digest()
    assert layout.parse_extent(header, UUID, 0).digest is None


def _parsed(slots: t.Sequence[tuple[int, int, int]]) -> layout.Extent:
    """The extent of these slots: mask, device, cluster."""
    header = bytearray(512)
    count = sum(bin(mask).count("1") for mask, dev_id, _cluster in slots if dev_id)
    struct.pack_into(">4sHH16s", header, 0, b"VMAE", 0, count, UUID)
    for at, (mask, dev_id, cluster) in enumerate(slots):
        struct.pack_into(">HBBI", header, 40 + 8 * at, mask, 0, dev_id, cluster)
    helpers.seal(header, digest=False)
    return layout.parse_extent(header, UUID, 0)


@pytest.mark.parametrize(
    ("slots", "runs"),
    [
        pytest.param([], [], id="nothing"),
        pytest.param([(0, 1, 0)], [(1, 0, 1, 0)], id="one"),
        pytest.param([(7, 1, n) for n in range(59)], [(1, 0, 59, 7)], id="all slots one run"),
        pytest.param([(0, 1, 4), (0, 1, 6)], [(1, 4, 1, 0), (1, 6, 1, 0)], id="a gap"),
        pytest.param([(0, 1, 4), (0, 1, 3)], [(1, 4, 1, 0), (1, 3, 1, 0)], id="backwards"),
        pytest.param([(0, 1, 4), (0, 1, 4)], [(1, 4, 1, 0), (1, 4, 1, 0)], id="twice"),
        pytest.param([(0, 1, 0), (1, 1, 1)], [(1, 0, 1, 0), (1, 1, 1, 1)], id="another mask"),
        pytest.param([(0, 1, 0), (0, 2, 1)], [(1, 0, 1, 0), (2, 1, 1, 0)], id="another device"),
        pytest.param([(0, 0, 0), (0, 1, 0)], [(1, 0, 1, 0)], id="the first slot unused"),
        pytest.param([(0, 1, 0), (0, 0, 0), (0, 1, 1)], [(1, 0, 1, 0), (1, 1, 1, 0)], id="a slot unused between"),
        pytest.param([(0xFFFF, 0, 3), (1, 1, 0)], [(1, 0, 1, 1)], id="an unused slot has leftovers"),
        pytest.param(
            [(3, 1, 0xFFFFFFFF), (3, 2, 0)],
            [(1, 0xFFFFFFFF, 1, 3), (2, 0, 1, 3)],
            id="from the last cluster to the next device",
        ),
        pytest.param(
            [(3, 255, 0xFFFFFFFF), (4, 0, 0)], [(255, 0xFFFFFFFF, 1, 3)], id="from the last cluster to an unused slot"
        ),
        pytest.param(
            [(3, 1, 0xFFFFFFFE), (3, 1, 0xFFFFFFFF), (3, 2, 0), (3, 2, 1)],
            [(1, 0xFFFFFFFE, 2, 3), (2, 0, 2, 3)],
            id="runs on both sides of the wrap",
        ),
    ],
)
def test_runs(slots: list[tuple[int, int, int]], runs: list[tuple[int, int, int, int]]) -> None:
    assert _parsed(slots).runs == [layout.Run(*run) for run in runs]


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        pytest.param([], [], id="nothing"),
        pytest.param([(1, 0, 1, 0)], [(1, 0, CLUSTER, None)], id="zeros"),
        pytest.param([(1, 2, 3, 0xFFFF)], [(1, 2 * CLUSTER, 3 * CLUSTER, 0)], id="a full run is one stretch"),
        pytest.param(
            [(1, 0, 1, 0x0001)], [(1, 0, BLOCK, 0), (1, BLOCK, 15 * BLOCK, None)], id="the first block is bit 0"
        ),
        pytest.param(
            [(1, 0, 1, 0x8000)], [(1, 0, 15 * BLOCK, None), (1, 15 * BLOCK, BLOCK, 0)], id="the last block is bit 15"
        ),
        pytest.param(
            [(1, 0, 2, 0x8001)],
            [
                (1, 0, BLOCK, 0),
                (1, BLOCK, 14 * BLOCK, None),
                (1, 15 * BLOCK, 2 * BLOCK, BLOCK),
                (1, 17 * BLOCK, 14 * BLOCK, None),
                (1, 31 * BLOCK, BLOCK, 3 * BLOCK),
            ],
            id="blocks of neighbours join",
        ),
        pytest.param(
            [(1, 0, 1, 0xFFFF), (2, 1, 1, 0xFFFF)],
            [(1, 0, CLUSTER, 0), (2, CLUSTER, CLUSTER, CLUSTER)],
            id="devices do not join",
        ),
        pytest.param(
            [(1, 1, 1, 0xFFFF), (1, 0, 1, 0xFFFF)],
            [(1, CLUSTER, CLUSTER, 0), (1, 0, CLUSTER, CLUSTER)],
            id="data comes in the order of the slots",
        ),
        pytest.param(
            [(1, 0xFFFFFFFF, 1, 0)], [(1, 0xFFFFFFFF * CLUSTER, CLUSTER, None)], id="the last cluster of 256 TiB"
        ),
    ],
)
def test_segments(runs: list[tuple[int, int, int, int]], expected: list[tuple[int, int, int, int | None]]) -> None:
    assert layout.segments(layout.Run(*run) for run in runs) == [layout.Segment(*item) for item in expected]


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        pytest.param(lambda header: header.__setitem__(3, 0), "extent_magic", id="magic"),
        pytest.param(lambda header: header.__setitem__(5, 1), "extent_checksum", id="a reserved byte"),
        pytest.param(lambda header: header.__setitem__(24, header[24] ^ 1), "extent_checksum", id="the MD5 itself"),
        pytest.param(lambda header: header.__setitem__(511, 1), "extent_checksum", id="the last byte"),
    ],
)
def test_extent_faults(change: t.Callable[[bytearray], None], kind: str) -> None:
    header = layout.build_extent(UUID, [(1, 0, 59)], 0)
    layout.seal_extent(header, None)
    change(header)
    with pytest.raises(errors.ArchiveError) as caught:
        layout.parse_extent(header, UUID, 4711)
    assert (caught.value.problem.kind, caught.value.problem.offset) == (kind, 4711)
    assert not layout.is_extent(header, UUID)


def test_extent_of_another_archive() -> None:
    header = layout.build_extent(b"\xff" * 16, [(1, 0, 59)], 0)
    layout.seal_extent(header, None)
    with pytest.raises(errors.ArchiveError, match=helpers.UUID_TEXT) as caught:
        layout.parse_extent(header, UUID, 0)
    assert caught.value.problem.kind == "extent_uuid"


@pytest.mark.parametrize("count", [0, 2, 65535])
def test_block_count_must_be_that_of_the_masks(count: int) -> None:
    header = layout.build_extent(UUID, [(1, 0, 1)], 1)
    struct.pack_into(">H", header, 6, count)
    layout.seal_extent(header, None)
    with pytest.raises(errors.ArchiveError, match=f"expected 1 blocks by the masks, found {count}") as caught:
        layout.parse_extent(header, UUID, 0)
    assert caught.value.problem.kind == "extent_block_count"


def test_constants() -> None:
    assert (layout.BLOCK_SIZE, layout.CLUSTER_SIZE, layout.SLOTS) == (4096, 65536, 59)
    assert layout.EXTENT_DATA_SIZE == 59 * 65536
    assert layout.DEVICE_SIZE_LIMIT == 256 << 40
