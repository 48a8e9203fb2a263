# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Damage of every kind, done to a sound archive: what verify() must find, where, and that extract() refuses it."""

from __future__ import annotations

import bz2
import errno
import gzip
import hashlib
import os
import pathlib
import random
import struct
import subprocess
import time
import typing as t

import pytest

from ansible_collections.vmbackup.vma.plugins.module_utils.vma import errors, extract, reader, verify, zstd
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.vma import helpers
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.vma.helpers import CLUSTER, Archive, Found, Slot

FLIPS = int(os.environ.get("VMA_TEST_FLIPS", "300"))

DISK, EFI = "drive-scsi0", "drive-efidisk0"
IMAGES = {
    DISK: helpers.make_image(100 * CLUSTER, "disk", zero=0.6, partial=0.4),
    # 27 clusters; the last one has three blocks, the third of which holds one sector
    EFI: helpers.make_image(26 * CLUSTER + 2 * 4096 + 512, "efi", zero=0.6, partial=0.4),
}
# extent 0: clusters 0 to 58 of the disk; 1: 59 to 99, and 0 to 17 of the EFI disk; 2: 18 to 26 of the EFI disk
BASE = helpers.build_archive(IMAGES)
AT = [BASE.offset(number) for number in range(4)]
END = AT[3]
BOTH = {DISK, EFI}


def _lost(number: int) -> list[Found]:
    """The clusters that miss without an extent."""
    return {
        0: [_missing(DISK, 0)],
        1: [_missing(DISK, 59), _missing(EFI, 0)],
        2: [_missing(EFI, 18)],
    }[number]


def _missing(device: str, cluster: int) -> Found:
    return ("cluster_missing", None, device, cluster)


def _slot(archive: Archive, number: int, slot: int, **changes: int) -> None:
    """Change an entry of an extent, and seal the extent again."""
    extent = archive.extents[number]
    mask, _reserved, dev_id, cluster = struct.unpack_from(">HBBI", extent, 40 + 8 * slot)
    struct.pack_into(
        ">HBBI",
        extent,
        40 + 8 * slot,
        changes.get("mask", mask),
        0,
        changes.get("dev_id", dev_id),
        changes.get("cluster", cluster),
    )
    helpers.seal(extent, digest=True)


def _poke(number: int, at: int, *, flip: int = 0x10) -> t.Callable[[Archive], None]:
    """Flip bits of an extent and fix nothing up."""

    def change(archive: Archive) -> None:
        archive.extents[number][at] ^= flip

    return change


def _seal_md5_alone(extent: bytearray) -> None:
    extent[24:40] = bytes(16)
    extent[24:40] = hashlib.md5(extent[:512]).digest()


def _other_uuid(archive: Archive) -> None:
    archive.extents[1][8:24] = b"\xff" * 16
    helpers.seal(archive.extents[1], digest=True)


def _one_block_more(archive: Archive) -> None:
    count = struct.unpack_from(">H", archive.extents[1], 6)[0]
    struct.pack_into(">H", archive.extents[1], 6, count + 1)
    helpers.seal(archive.extents[1], digest=True)


def _masks_swapped(archive: Archive) -> None:
    """As many blocks as before, but stored for other places; the MD5 is made anew, the digest is not."""
    extent = archive.extents[1]
    masks = [struct.unpack_from(">H", extent, 40 + 8 * slot)[0] for slot in range(59)]
    other = next(slot for slot in range(59) if masks[slot] != masks[0])
    struct.pack_into(">H", extent, 40, masks[other])
    struct.pack_into(">H", extent, 40 + 8 * other, masks[0])
    _seal_md5_alone(extent)


def _digest_removed(number: int) -> t.Callable[[Archive], None]:
    def change(archive: Archive) -> None:
        helpers.seal(archive.extents[number], digest=False)

    return change


def _twice(archive: Archive) -> None:
    _slot(archive, 1, 3, cluster=61)  # it was 62


def _last_cluster_unused(archive: Archive) -> None:
    slot = struct.unpack_from(">HBBI", archive.extents[2], 40 + 8 * 8)
    assert slot[2:] == (2, 26)
    # its three blocks stay in the data: the slot is counted without them
    blocks = bin(slot[0]).count("1")
    del archive.extents[2][len(archive.extents[2]) - 4096 * blocks :]
    struct.pack_into(">H", archive.extents[2], 6, struct.unpack_from(">H", archive.extents[2], 6)[0] - blocks)
    archive.extents[2][40 + 8 * 8 : 48 + 8 * 8] = bytes(8)
    helpers.seal(archive.extents[2], digest=True)


def _blocks_past_the_end(archive: Archive) -> None:
    mask = struct.unpack_from(">H", archive.extents[2], 40 + 8 * 8)[0]
    struct.pack_into(">H", archive.extents[2], 6, struct.unpack_from(">H", archive.extents[2], 6)[0] + 1)
    archive.extents[2] += bytes(4096)
    _slot(archive, 2, 8, mask=mask | 1 << 3)


def _cut(length: int) -> t.Callable[[bytes], bytes]:
    return lambda data: data[:length]


def _appended(more: bytes) -> t.Callable[[bytes], bytes]:
    return lambda data: data + more


def _inserted(at: int, more: bytes) -> t.Callable[[bytes], bytes]:
    return lambda data: data[:at] + more + data[at:]


class Case(t.NamedTuple):
    """A damage, and what is found of it without reading the data, and with."""

    name: str
    change: t.Callable[[Archive], None] | None
    cut: t.Callable[[bytes], bytes] | None
    structure: list[Found]
    content: list[Found]
    broken: set[str]


def _case(
    name: str,
    change: t.Callable[[Archive], None] | None = None,
    found: list[Found] | None = None,
    *,
    cut: t.Callable[[bytes], bytes] | None = None,
    more_by_content: list[Found] | None = None,
    broken: set[str] | None = None,
) -> Case:
    structure = found or []
    content = structure + (more_by_content or [])
    return Case(name, change, cut, structure, content, BOTH if broken is None else broken)


CASES = [
    # the faults that other tools fail to notice
    _case("one cluster missing", _last_cluster_unused, [_missing(EFI, 26)], broken={EFI}),
    _case(
        "a bit flipped in the data",
        _poke(1, 512 + 7777),
        more_by_content=[("extent_digest", AT[1], DISK, 59)],
    ),
    _case("cut at an extent's boundary", cut=_cut(AT[2]), found=_lost(2), broken={EFI}),
    _case("header alone, no extent", cut=_cut(AT[0]), found=[_missing(DISK, 0), _missing(EFI, 0)]),
    _case(
        "cut inside an extent's data",
        cut=_cut(AT[1] + 5000),
        found=[("truncated", AT[1], None, None), _missing(DISK, 59), _missing(EFI, 0)],
    ),
    _case(
        "cut inside an extent's header",
        cut=_cut(AT[2] + 511),
        found=[("truncated", AT[2], None, None), *_lost(2)],
        broken={EFI},
    ),
    _case(
        "the last byte cut off",
        cut=_cut(END - 1),
        found=[("truncated", AT[2], None, None), *_lost(2)],
        broken={EFI},
    ),
    _case(
        "a cluster twice",
        _twice,
        [("cluster_duplicate", AT[1], DISK, 61), _missing(DISK, 62)],
        broken={DISK},
    ),
    # extent headers
    _case("magic of the first extent", _poke(0, 0), [("extent_magic", AT[0], None, None), *_lost(0)], broken={DISK}),
    _case("magic of a middle extent", _poke(1, 3), [("extent_magic", AT[1], None, None), *_lost(1)]),
    _case("magic of the last extent", _poke(2, 1), [("extent_magic", AT[2], None, None), *_lost(2)], broken={EFI}),
    _case("an entry flipped", _poke(1, 300), [("extent_checksum", AT[1], None, None), *_lost(1)]),
    _case("the MD5 flipped", _poke(2, 24), [("extent_checksum", AT[2], None, None), *_lost(2)], broken={EFI}),
    _case("an extent of another archive", _other_uuid, [("extent_uuid", AT[1], None, None), *_lost(1)]),
    _case("a wrong count of blocks", _one_block_more, [("extent_block_count", AT[1], None, None), *_lost(1)]),
    # digests
    _case(
        "masks swapped",
        _masks_swapped,
        more_by_content=[("extent_digest", AT[1], DISK, 59)],
    ),
    _case(
        "the last byte of the archive flipped",
        _poke(2, len(BASE.extents[2]) - 1),
        more_by_content=[("extent_digest", AT[2], EFI, 18)],
        broken={EFI},
    ),
    _case("a digest removed", _digest_removed(1), [("extent_digest", AT[1], None, None)]),
    # bytes that have no business there
    _case("one byte more", cut=_appended(b"\x00"), found=[("trailing_data", END, None, None)], broken=set()),
    _case("zeros appended", cut=_appended(bytes(4096)), found=[("trailing_data", END, None, None)], broken=set()),
    _case(
        "another archive appended", cut=_appended(BASE.join()), found=[("trailing_data", END, None, None)], broken=set()
    ),
    _case(
        "an extent once more",
        cut=_appended(bytes(BASE.extents[2])),
        found=[("cluster_duplicate", END, EFI, cluster) for cluster in range(18, 27)],
        broken={EFI},
    ),
    _case(
        "a byte inserted before an extent",
        cut=_inserted(AT[1], b"\x00"),
        found=[("extent_magic", AT[1], None, None)],
        broken=set(),
    ),
    _case(
        "a sector inserted before an extent",
        cut=_inserted(AT[1], bytes(512)),
        found=[("extent_magic", AT[1], None, None)],
        broken=set(),
    ),
    _case(
        "two mebibytes inserted before an extent",
        cut=_inserted(AT[1], bytes(512) + (b"VMAE" + bytes(508)) * 4095),
        found=[("extent_magic", AT[1], None, None)],
        broken=set(),
    ),
    # what the header and the extents say of each other
    _case(
        "a device that the header does not have",
        lambda archive: _slot(archive, 1, 3, dev_id=9),
        [("unknown_device", AT[1], None, 62), _missing(DISK, 62)],
        broken={DISK},
    ),
    _case(
        "a cluster outside its device",
        lambda archive: _slot(archive, 1, 40, cluster=100),
        [("cluster_out_of_range", AT[1], DISK, 100), _missing(DISK, 99)],
        broken={DISK},
    ),
    _case(
        "the highest cluster number",
        lambda archive: _slot(archive, 1, 40, cluster=0xFFFFFFFF),
        [("cluster_out_of_range", AT[1], DISK, 0xFFFFFFFF), _missing(DISK, 99)],
        broken={DISK},
    ),
    _case(
        "a block outside its device",
        _blocks_past_the_end,
        [("cluster_out_of_range", AT[2], EFI, 26)],
        broken={EFI},
    ),
]


def _damaged(case: Case, path: pathlib.Path) -> None:
    archive = BASE.copy()
    if case.change is not None:
        case.change(archive)
    data = archive.join()
    path.write_bytes(data if case.cut is None else case.cut(data))


def _check_refused(path: pathlib.Path, kinds: t.Container[str], folder: pathlib.Path) -> None:
    with pytest.raises(errors.ArchiveError) as caught:
        extract.extract(str(path), str(folder))
    assert caught.value.problem.kind in kinds
    assert caught.value.file == str(path)
    assert helpers.files_below(folder) == []


def test_the_sound_archive_is_sound(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.vma"
    path.write_bytes(BASE.join())
    seen = verify.verify(str(path))
    assert seen.verification.problems == []
    assert seen.integrity == "sha256"
    assert (seen.verification.extents, seen.verification.clusters) == (3, 127)
    assert seen.verification.read_bytes == seen.verification.good_until == END
    assert seen.verification.data_bytes + seen.verification.zero_bytes == 127 * CLUSTER
    assert seen.verification.as_dict()["devices"] == [{"name": DISK, "whole": True}, {"name": EFI, "whole": True}]
    done = extract.extract(str(path), str(tmp_path / "out"))
    assert {device.name: pathlib.Path(device.path).read_bytes() for device in done.devices} == IMAGES


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_damage(case: Case, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.vma"
    _damaged(case, path)
    structure = helpers.look(path, "structure")
    assert helpers.found(structure.problems) == sorted(case.structure, key=repr)
    assert structure.ok == (not case.structure)
    content = helpers.look(path, "content")
    assert helpers.found(content.problems) == sorted(case.content, key=repr)
    assert not content.ok
    assert {name for name, whole in content.whole.items() if not whole} == case.broken
    assert set(content.whole) == BOTH
    offsets = [offset for _kind, offset, _device, _cluster in case.content if offset is not None]
    assert content.good_until == (min(offsets) if offsets else path.stat().st_size)
    assert dict(content.counts) == {
        kind: sum(item[0] == kind for item in case.content) for kind in {item[0] for item in case.content}
    }
    for problem in content.problems:
        assert problem.message
        assert problem.kind in errors.KINDS
    _check_refused(path, {item[0] for item in case.content}, tmp_path / "out")


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_damage_behind_compression(case: Case, tmp_path: pathlib.Path) -> None:
    plain = tmp_path / "a.vma"
    _damaged(case, plain)
    path = tmp_path / "a.vma.gz"
    path.write_bytes(gzip.compress(plain.read_bytes(), 1))
    for level in ("structure", "content"):
        seen = helpers.look(path, level)
        expected = case.content if level == "content" else case.structure
        assert helpers.found(seen.problems) == sorted(expected, key=repr)
    _check_refused(path, {item[0] for item in case.content}, tmp_path / "out")


# --- the header -------------------------------------------------------------------------------------------------------


def _header_case(change: t.Callable[[bytearray], None], found: list[Found], *, reseal: bool = True, name: str) -> t.Any:
    return pytest.param(change, found, reseal, id=name)


def _put(at: int, value: int) -> t.Callable[[bytearray], None]:
    return lambda header: struct.pack_into(">I", header, at, value)


@pytest.mark.parametrize(
    ("change", "found", "reseal"),
    [
        _header_case(
            lambda header: header.__setitem__(24, 1), [("header_checksum", 32, None, None)], reseal=False, name="ctime"
        ),
        _header_case(
            lambda header: header.__setitem__(header.index(b"name: web"), 0x4E),
            [("header_checksum", 32, None, None)],
            reseal=False,
            name="a config",
        ),
        _header_case(
            lambda header: header.__setitem__(len(header) - 1, 1),
            [("header_checksum", 32, None, None)],
            reseal=False,
            name="the padding",
        ),
        _header_case(_put(4, 2), [("header_invalid", 4, None, None)], name="version 2"),
        _header_case(_put(56, 12288 + 1), [("header_invalid", 56, None, None)], name="size no multiple of a sector"),
        _header_case(_put(56, 12288 - 512), [("header_invalid", 56, None, None)], name="size too small"),
        _header_case(_put(56, 0xFFFFFE00), [("header_invalid", 56, None, None)], name="size too large"),
        _header_case(lambda header: header.__setitem__(0, 0), [("not_vma", 0, None, None)], name="magic"),
    ],
)
def test_header(
    change: t.Callable[[bytearray], None], found: list[Found], reseal: bool, tmp_path: pathlib.Path
) -> None:
    archive = BASE.copy()
    change(archive.header)
    if reseal:
        helpers.seal_header(archive.header)
    path = tmp_path / "a.vma"
    path.write_bytes(archive.join())
    seen = helpers.look(path)
    assert helpers.found(seen.problems) == found
    assert seen.good_until == (32 if found[0][0] == "header_checksum" else 0)
    _check_refused(path, {found[0][0]}, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "place", "words"),
    [
        pytest.param(_put(48, 512), 48, "blob buffer", id="the blob buffer begins in the tables"),
        pytest.param(_put(52, 1 << 20), 48, "blob buffer", id="the blob buffer ends outside"),
        pytest.param(_put(2044, 0), 2044, "not both", id="a config without a name"),
        pytest.param(_put(3068, 0), 2044, "not both", id="a config without data"),
        pytest.param(_put(2044, 1 << 20), 2044, "outside the blob buffer", id="a config's name lies outside"),
        pytest.param(_put(4096 + 32, 0), 4096 + 32, "no name", id="a device without a name"),
        pytest.param(_put(4096 + 32, 1 << 31), 4096 + 32, "outside", id="a device's name lies outside"),
        pytest.param(_put(4096 + 32 + 12, 0), 4096 + 32, "found 0", id="a device without a byte"),
        pytest.param(_put(4096 + 32 + 8, 1 << 31), 4096 + 32, "expected a size", id="a device beyond 256 TiB"),
        pytest.param(_put(4096, 1), 4096, "device ids", id="device 0"),
        pytest.param(_put(4096 + 255 * 32, 1), 4096 + 255 * 32, "device ids", id="device 255"),
    ],
)
def test_header_that_contradicts_itself(
    change: t.Callable[[bytearray], None], place: int, words: str, tmp_path: pathlib.Path
) -> None:
    archive = BASE.copy()
    change(archive.header)
    helpers.seal_header(archive.header)
    path = tmp_path / "a.vma"
    path.write_bytes(archive.join())
    seen = helpers.look(path)
    first = seen.problems[0]
    assert (first.kind, first.offset) == ("header_invalid", place)
    assert words in first.message
    # a device that cannot be read has extents all the same
    assert set(seen.counts) <= {"header_invalid", "unknown_device"}
    _check_refused(path, {"header_invalid"}, tmp_path / "out")


def _renamed(archive: Archive, old: bytes, new: bytes) -> None:
    at = archive.header.index(old)
    assert len(old) == len(new)
    archive.header[at : at + len(new)] = new
    helpers.seal_header(archive.header)


@pytest.mark.parametrize(
    ("old", "new", "kind", "place"),
    [
        (b"qemu-server.conf\x00", b"../escaped01.txt\x00", "unsafe_name", 2044),
        (b"qemu-server.conf\x00", b"/etc/cron.d/abcd\x00", "unsafe_name", 2044),
        (b"qemu-server.conf\x00", b"qemu-server.con\n\x00", "unsafe_name", 2044),
        (b"drive-scsi0\x00", b"../../scsi0\x00", "unsafe_name", 4096 + 32),
        (b"drive-scsi0\x00", b"drive scsi0\x00", "unsafe_name", 4096 + 32),
        (b"drive-scsi0\x00", b"drive\x00scsi0\x00", "unsafe_name", 4096 + 32),
        (b"drive-scsi0\x00", b"drive-\xff\xfe\xfd00\x00", "unsafe_name", 4096 + 32),
        (b"drive-scsi0\x00", b"drive-scsi00", "header_invalid", 4096 + 32),
    ],
)
def test_names(old: bytes, new: bytes, kind: str, place: int, tmp_path: pathlib.Path) -> None:
    archive = BASE.copy()
    _renamed(archive, old, new)
    path = tmp_path / "a.vma"
    path.write_bytes(archive.join())
    seen = helpers.look(path)
    assert (seen.problems[0].kind, seen.problems[0].offset) == (kind, place)
    assert seen.counts[kind] == 1
    (tmp_path / "below").mkdir()
    _check_refused(path, {kind}, tmp_path / "below" / "out")
    assert helpers.files_below(tmp_path) == ["a.vma"]


def test_two_devices_of_one_name(tmp_path: pathlib.Path) -> None:
    images = {"drive-scsi0": b"a" * 512, "drive-scsi1": b"b" * 512}
    archive = helpers.build_archive(images)
    _renamed(archive, b"drive-scsi1", b"drive-scsi0")
    path = tmp_path / "a.vma"
    path.write_bytes(archive.join())
    assert helpers.found(helpers.look(path).problems) == [("header_invalid", 4096 + 64, None, None)]
    _check_refused(path, {"header_invalid"}, tmp_path / "out")


def test_two_configs_of_one_name(tmp_path: pathlib.Path) -> None:
    archive = helpers.build_archive(IMAGES, configs={"a.conf": b"name: a\n", "b.conf": b"name: b\n"})
    _renamed(archive, b"b.conf", b"a.conf")
    path = tmp_path / "a.vma"
    path.write_bytes(archive.join())
    assert helpers.found(helpers.look(path).problems) == [("header_invalid", 2044 + 4, None, None)]
    _check_refused(path, {"header_invalid"}, tmp_path / "out")


@pytest.mark.parametrize(
    ("length", "found"),
    [
        (0, ("not_vma", 0, None, None)),
        (3, ("not_vma", 0, None, None)),
        (4, ("truncated", 4, None, None)),
        (12287, ("truncated", 12287, None, None)),
        (12288, ("truncated", 12288, None, None)),
        (AT[0] - 1, ("truncated", AT[0] - 1, None, None)),
    ],
)
def test_header_cut(length: int, found: Found, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.vma"
    path.write_bytes(BASE.join()[:length])
    seen = verify.verify(str(path))
    assert helpers.found(seen.verification.problems) == [found]
    assert (seen.header, seen.verification.whole) == (None, {})
    _check_refused(path, {found[0]}, tmp_path / "out")


@pytest.mark.parametrize(
    "content",
    [b"hello world\n" * 9, b"PK\x03\x04" + bytes(99), b"QFI\xfb" + bytes(99), bytes(20000), gzip.compress(b"not VMA")],
    ids=["text", "zip", "qcow2", "zeros", "another thing compressed"],
)
def test_other_files(content: bytes, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.vma"
    path.write_bytes(content)
    assert helpers.found(helpers.look(path).problems) == [("not_vma", 0, None, None)]


def test_what_cannot_be_opened_is_no_finding(tmp_path: pathlib.Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name in ("absent", ".", "fifo"):
        with pytest.raises(errors.RequestError) as caught:
            verify.verify(str(tmp_path / name))
        assert caught.value.file == str(tmp_path / name)


# --- several damages --------------------------------------------------------------------------------------------------


def test_every_damage_is_found(tmp_path: pathlib.Path) -> None:
    images = {f"d{number}": helpers.make_image(59 * CLUSTER, str(number), zero=0.7) for number in range(1, 9)}
    archive = helpers.build_archive(images)
    at = [archive.offset(number) for number in range(9)]
    archive.extents[0][512 + 100] ^= 1  # digest
    archive.extents[2][0] ^= 1  # magic
    _slot(archive, 3, 10, cluster=11)  # twice
    _slot(archive, 4, 20, dev_id=77)  # unknown
    helpers.seal(archive.extents[5], digest=False)  # no digest
    archive.extents[6][100] ^= 1  # checksum
    path = tmp_path / "a.vma"
    path.write_bytes(archive.join() + b"more")
    expected: list[Found] = [
        ("extent_digest", at[0], "d1", 0),
        ("extent_magic", at[2], None, None),
        ("cluster_missing", None, "d3", 0),
        ("cluster_duplicate", at[3], "d4", 11),
        ("cluster_missing", None, "d4", 10),
        ("unknown_device", at[4], None, 20),
        ("cluster_missing", None, "d5", 20),
        ("extent_digest", at[5], None, None),
        ("extent_checksum", at[6], None, None),
        ("cluster_missing", None, "d7", 0),
        # not all clusters came, so this may be the beginning of an extent
        ("truncated", at[8], None, None),
    ]
    seen = helpers.look(path)
    assert helpers.found(seen.problems) == sorted(expected, key=repr)
    assert seen.whole == {
        "d1": False,
        "d2": True,
        "d3": False,
        "d4": False,
        "d5": False,
        "d6": False,
        "d7": False,
        "d8": True,
    }
    # by offset, then those that are nowhere
    places = [problem.offset for problem in seen.problems]
    known = [place for place in places if place is not None]
    assert places == sorted(known) + [None] * (len(places) - len(known))
    assert seen.good_until == at[0]

    # the header on top: it names the devices, so of none is it known that it is whole
    archive.header[24] ^= 1
    path.write_bytes(archive.join() + b"more")
    seen = helpers.look(path)
    assert helpers.found(seen.problems) == sorted([*expected, ("header_checksum", 32, None, None)], key=repr)
    assert set(seen.whole.values()) == {False}
    assert seen.good_until == 32


def test_an_archive_of_configs_alone(tmp_path: pathlib.Path) -> None:
    archive = helpers.build_archive({}, [[]])
    path = tmp_path / "a.vma"
    path.write_bytes(archive.join())
    assert helpers.look(path).ok
    # without any extent, Proxmox VE takes it for cut short
    path.write_bytes(archive.header)
    assert helpers.found(helpers.look(path).problems) == [("truncated", archive.offset(0), None, None)]
    _check_refused(path, {"truncated"}, tmp_path / "out")


@pytest.mark.parametrize("removed", [1, 511, 512, 4096, 70000])
def test_bytes_lost_inside_an_extent(removed: int, tmp_path: pathlib.Path) -> None:
    images = {f"d{number}": helpers.make_image(59 * CLUSTER, str(number), zero=0.2) for number in range(1, 5)}
    archive = helpers.build_archive(images)
    del archive.extents[1][100000 : 100000 + removed]
    path = tmp_path / "a.vma"
    path.write_bytes(archive.join())
    seen = helpers.look(path)
    # what the extent's data lacks is taken from the next one; from the one after that on, all is found again
    assert ("extent_digest", archive.offset(1), "d2", 0) in helpers.found(seen.problems)
    assert seen.counts["extent_magic"] == 1
    assert seen.whole["d1"]
    assert not seen.whole["d2"]
    assert seen.whole["d4"]
    assert seen.good_until == archive.offset(1)


def test_many_problems_take_no_memory_without_bound(tmp_path: pathlib.Path) -> None:
    archive = helpers.build_archive({"d": bytes(59 * CLUSTER)})
    path = tmp_path / "a.vma"
    path.write_bytes(archive.join() + bytes(archive.extents[0]) * 40)
    seen = helpers.look(path)
    assert len(seen.problems) == verify.PROBLEM_LIMIT
    assert seen.counts == {"cluster_duplicate": 59 * 40}


def test_an_archive_longer_than_its_devices_can_take(tmp_path: pathlib.Path) -> None:
    archive = helpers.build_archive({"d": b"x" * 512})
    empty = helpers.build_extent([], {})
    path = tmp_path / "a.vma"
    path.write_bytes(archive.join() + bytes(empty) * 20000)
    seen = helpers.look(path)
    assert set(seen.counts) == {"trailing_data"}


@pytest.mark.parametrize("damage", ["behind the last extent", "an extent's header"])
def test_a_decompression_bomb_is_stopped(damage: str, tmp_path: pathlib.Path) -> None:
    """300 MiB of zeros in 300 kB: they are not even looked through for another extent."""
    archive = helpers.build_archive({"d": b"x" * 512})
    if damage == "an extent's header":
        archive.extents[0][0] ^= 1
    path = tmp_path / "a.vma.gz"
    path.write_bytes(gzip.compress(archive.join() + bytes(300 << 20), 1))
    began = time.process_time()
    seen = helpers.look(path)
    seconds = time.process_time() - began
    assert "trailing_data" in seen.counts
    place = next(problem.offset for problem in seen.problems if problem.kind == "trailing_data")
    # the device can take one extent of each of its clusters, and some more that are empty
    assert place is not None
    assert place < 8 << 20
    began = time.process_time()
    gzip.decompress(path.read_bytes())
    assert seconds < (time.process_time() - began) / 2
    _check_refused(path, {"trailing_data", "extent_magic"}, tmp_path / "out")


# --- RAM states -------------------------------------------------------------------------------------------------------

STATE = helpers.make_image(20 * CLUSTER, "state", zero=0.0)


@pytest.mark.parametrize(
    ("slots", "size", "found"),
    [
        pytest.param([0, 1, 2, 3], 4 * CLUSTER, [], id="in order"),
        pytest.param([0, 1, 2, 3, 4, 5], 4 * CLUSTER, [], id="longer than its size"),
        pytest.param([0, 1, 2], 4 * CLUSTER, [("cluster_missing", None, "vmstate", 3)], id="shorter than its size"),
        pytest.param([0, 1, 3], 4 * CLUSTER, [("vmstate_order", 0, "vmstate", 3)], id="a gap"),
        pytest.param(
            [1, 0, 2, 3],
            4 * CLUSTER,
            [
                ("vmstate_order", 0, "vmstate", 1),
                ("vmstate_order", 0, "vmstate", 0),
                ("vmstate_order", 0, "vmstate", 2),
            ],
            id="swapped",
        ),
        pytest.param([0, 1, 1, 2, 3], 4 * CLUSTER, [("vmstate_order", 0, "vmstate", 1)], id="twice"),
    ],
)
def test_vmstate_order(slots: list[int], size: int, found: list[Found], tmp_path: pathlib.Path) -> None:
    archive = helpers.build_archive(
        {"vmstate": STATE}, [[helpers.Slot(1, cluster, 0xFFFF) for cluster in slots]], sizes={"vmstate": size}
    )
    path = tmp_path / "a.vma"
    path.write_bytes(archive.join())
    found = [(kind, None if offset is None else archive.offset(0), *rest) for kind, offset, *rest in found]  # type: ignore[misc]
    seen = helpers.look(path)
    assert helpers.found(seen.problems) == sorted(found, key=repr)
    assert seen.whole == {"vmstate": not found}
    if found:
        _check_refused(path, {item[0] for item in found}, tmp_path / "out")


# --- single bits ------------------------------------------------------------------------------------------------------


def _flip(data: bytes, path: pathlib.Path, bit: int) -> None:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    path.write_bytes(changed)


def test_every_flipped_bit_is_found(tmp_path: pathlib.Path) -> None:
    """In an archive with digests: anywhere. VMA_TEST_FLIPS says how many are tried."""
    data = helpers.build_archive(
        {"a": helpers.make_image(5 * CLUSTER + 512, "a"), "b": helpers.make_image(3 * CLUSTER, "b", zero=0.8)},
        [
            [helpers.Slot(1, 2), None, helpers.Slot(2, 0), helpers.Slot(1, 0)],
            [helpers.Slot(2, 2), helpers.Slot(1, 1), helpers.Slot(1, 3)],
            [None, helpers.Slot(1, 4), helpers.Slot(1, 5), helpers.Slot(2, 1)],
        ],
    ).join()
    draw = random.Random("flips")
    path = tmp_path / "a.vma"
    for number in range(FLIPS):
        # half of them in the headers, which are a small part of the bytes
        limit = 13000 if number % 4 == 0 else len(data)
        bit = draw.randrange(8 * limit)
        _flip(data, path, bit)
        assert not helpers.look(path).ok, f"bit {bit}"
        with pytest.raises(errors.ArchiveError):
            extract.extract(str(path), str(tmp_path / "out"))
        assert helpers.files_below(tmp_path / "out") == [], f"bit {bit}"


def test_every_bit_of_an_extent_header_counts(tmp_path: pathlib.Path) -> None:
    archive = helpers.build_archive({"a": helpers.make_image(2 * CLUSTER, "a")})
    data = archive.join()
    path = tmp_path / "a.vma"
    for byte in range(archive.offset(0), archive.offset(0) + 512):
        _flip(data, path, 8 * byte + byte % 8)
        kinds = set(helpers.look(path, "structure").counts)
        assert kinds & {"extent_magic", "extent_checksum"}, f"byte {byte}"


def test_what_is_changed_on_purpose_is_survived(tmp_path: pathlib.Path) -> None:
    """Bytes of headers changed and all checksums made anew: whatever is found, no other error comes, and no file."""
    base = helpers.build_archive(
        {"a": helpers.make_image(4 * CLUSTER + 512, "a"), "vmstate": helpers.make_image(2 * CLUSTER, "b", zero=0)},
        [[Slot(1, 3), Slot(2, 0, 0xFFFF), Slot(1, 0)], [Slot(1, 1), None, Slot(2, 1, 0xFFFF), Slot(1, 4), Slot(1, 2)]],
    )
    draw = random.Random("on purpose")
    path = tmp_path / "a.vma"
    places = [*range(44, 60), *range(2044, 2052), *range(3068, 3076), *range(4096, 4096 + 128), *range(12288, 12420)]
    for number in range(FLIPS):
        archive = base.copy()
        for _change in range(draw.randint(1, 3)):
            if draw.random() < 0.5:
                archive.header[draw.choice(places)] = draw.choice((0, 1, 2, 255, draw.randrange(256)))
            else:
                extent = draw.choice(archive.extents)
                extent[draw.choice((6, 7, *range(40, 104)))] = draw.choice((0, 1, 2, 3, 255, draw.randrange(256)))
        helpers.seal_header(archive.header)
        for extent in archive.extents:
            helpers.seal(extent, digest=True)
        path.write_bytes(archive.join())
        ok = helpers.look(path).ok
        folder = tmp_path / f"out{number}"
        try:
            extract.extract(str(path), str(folder), check_space=False)
        except errors.VmaError:
            assert not ok or not folder.exists(), f"change {number}"
            assert helpers.files_below(folder) == [], f"change {number}"
        else:
            assert ok, f"change {number}"


# --- compressed files -------------------------------------------------------------------------------------------------


def _lzo(data: bytes) -> bytes:
    return subprocess.run([helpers.need_tool("lzop"), "-c"], input=data, stdout=subprocess.PIPE, check=True).stdout


def _zst(data: bytes) -> bytes:
    command = [helpers.need_tool("zstd"), "-q", "-c", "--check"]
    return subprocess.run(command, input=data, stdout=subprocess.PIPE, check=True).stdout


COMPRESSORS: dict[str, t.Callable[[bytes], bytes]] = {
    "gzip": lambda data: gzip.compress(data, 1),
    "zstd": _zst,
    "lzo": _lzo,
    "bzip2": lambda data: bz2.compress(data, 1),
}


@pytest.mark.parametrize("compression", list(COMPRESSORS))
@pytest.mark.parametrize("share", [0.3, 0.7, 0.999])
def test_compressed_and_cut(compression: str, share: float, tmp_path: pathlib.Path) -> None:
    packed = COMPRESSORS[compression](BASE.join())
    path = tmp_path / "a"
    path.write_bytes(packed[: int(len(packed) * share)])
    seen = verify.verify(str(path))
    assert seen.compression in (compression, None)
    assert set(seen.verification.counts) <= {"decompression", "cluster_missing"}
    assert seen.verification.counts["decompression"] == 1
    _check_refused(path, {"decompression"}, tmp_path / "out")


@pytest.mark.parametrize("compression", list(COMPRESSORS))
@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_compressed_and_flipped(compression: str, share: float, tmp_path: pathlib.Path) -> None:
    # without digests, the compression's own checksum has to notice
    packed = bytearray(COMPRESSORS[compression](helpers.build_archive(IMAGES, digest=False).join()))
    packed[int(len(packed) * share)] ^= 4
    path = tmp_path / "a"
    path.write_bytes(packed)
    seen = helpers.look(path)
    # Wrong bytes may come before the checksum behind them is compared: then they are what is found first.
    assert not seen.ok
    if share > 0.9:
        assert seen.counts["decompression"] == 1
    _check_refused(path, errors.KINDS, tmp_path / "out")


@pytest.mark.usefixtures("without_libzstd")
@pytest.mark.parametrize("share", [0.3, 0.999])
def test_zstd_command_and_cut(share: float, tmp_path: pathlib.Path) -> None:
    packed = _zst(BASE.join())
    path = tmp_path / "a"
    path.write_bytes(packed[: int(len(packed) * share)])
    assert helpers.look(path).counts["decompression"] == 1
    _check_refused(path, {"decompression"}, tmp_path / "out")


@pytest.mark.parametrize("compression", ["gzip", "bzip2"])
def test_compressed_with_something_behind(compression: str, tmp_path: pathlib.Path) -> None:
    packed = COMPRESSORS[compression](BASE.join())
    path = tmp_path / "a"
    path.write_bytes(packed + b"something else")
    assert helpers.found(helpers.look(path).problems) == [("trailing_data", END, None, None)]
    # zcat and bzcat put up with zeros, and so does qmrestore
    path.write_bytes(packed + bytes(10000))
    assert helpers.look(path).ok


@pytest.mark.parametrize("compression", ["gzip", "bzip2", "zstd"])
def test_compressed_in_parts(compression: str, tmp_path: pathlib.Path) -> None:
    data = BASE.join()
    path = tmp_path / "a"
    parts = [data[:5], data[5:20000], data[20000 : AT[1] + 77], data[AT[1] + 77 :], b""]
    path.write_bytes(b"".join(map(COMPRESSORS[compression], parts)))
    assert helpers.look(path).ok


def test_zstd_behind_a_skippable_frame(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc" + _zst(BASE.join()))
    assert helpers.look(path).ok


# --- a storage that fails ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 1])
def test_storage_that_cannot_read(number: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.vma"
    path.write_bytes(BASE.join())
    bad = AT[number] + 5000
    real = os.preadv

    def preadv(fd: int, views: t.Sequence[memoryview], offset: int) -> int:
        if os.path.samestat(os.fstat(fd), os.stat(path)) and offset <= bad < offset + sum(map(len, views)):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, views, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    seen = helpers.look(path)
    assert helpers.found(seen.problems) == [("read_error", AT[number] + 512, None, None)]
    assert seen.whole == {DISK: False, EFI: number == 0}
    _check_refused(path, {"read_error"}, tmp_path / "out")


_PAGE = 4096
_FIRST = AT[1] // _PAGE * _PAGE
"""Where the page begins in which the header of extent 1 lies."""


@pytest.mark.parametrize(
    ("stretches", "places", "lost"),
    [
        pytest.param([(0, 1)], [AT[1]], [1], id="one page"),
        pytest.param([(0, 7)], [AT[1]], [1], id="several pages are one place"),
        pytest.param([(0, 1), (2, 4)], [AT[1], _FIRST + 2 * _PAGE], [1], id="two places"),
        pytest.param([(0, 1), (17, 20)], [AT[1], _FIRST + 17 * _PAGE], [1], id="one where a step of the search ends"),
        pytest.param([(0, -(-END // _PAGE))], [AT[1]], [1, 2], id="all the rest"),
    ],
)
def test_storage_that_cannot_read_a_header(
    stretches: list[tuple[int, int]],
    places: list[int],
    lost: list[int],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The next extent is looked for behind. C(stretches) are counted in pages from the one with the header on."""
    path = tmp_path / "a.vma"
    path.write_bytes(BASE.join())
    bad = [(_FIRST + begin * _PAGE, _FIRST + end * _PAGE) for begin, end in stretches]
    real = os.preadv
    failures = 0

    def preadv(fd: int, views: t.Sequence[memoryview], offset: int) -> int:
        nonlocal failures
        if offset < END and any(begin <= offset < end for begin, end in bad):
            failures += 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        room = min([begin - offset for begin, _end in bad if begin > offset], default=1 << 60)
        return real(fd, [views[0][:room]], offset)

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(reader, "_RESYNC_CHUNK", 16 * _PAGE)
    seen = helpers.look(path, "structure")
    expected: list[Found] = [("read_error", place, None, None) for place in places]
    expected += [missing for number in lost for missing in _lost(number)][: 2 if len(lost) > 1 else None]
    assert helpers.found(seen.problems) == sorted(expected, key=repr)
    assert seen.extents == 3 - len(lost)
    assert failures < 20


def test_libzstd_is_what_these_tests_ran() -> None:
    if not zstd.is_available():
        pytest.skip("libzstd.so.1 is not installed: its command did the work")
    assert zstd.is_available()


@pytest.mark.parametrize("digest", [True, False], ids=["digests", "no digests"])
def test_damaged_compression_without_digests_leaves_no_device_whole(tmp_path: pathlib.Path, digest: bool) -> None:
    """Where the compression's checksum is wrong, bytes anywhere before it may be."""
    images = {"d1": helpers.make_image(4 * CLUSTER), "d2": helpers.make_image(200 * CLUSTER, zero=0)}
    packed = gzip.compress(helpers.build_archive(images, digest=digest).join())
    path = tmp_path / "a.vma.gz"
    path.write_bytes(packed[:-8] + bytes(4) + packed[-4:])
    seen = helpers.look(path)
    assert seen.counts["decompression"] == 1
    assert seen.whole["d1"] is digest


def test_extents_without_clusters_are_checked_too(tmp_path: pathlib.Path) -> None:
    archive = helpers.build_archive({})
    archive.extents = [helpers.build_extent([], {})]
    archive.extents[0][298 - 8] ^= 1  # a byte of the digest
    archive.extents[0][24:40] = bytes(16)
    archive.extents[0][24:40] = hashlib.md5(archive.extents[0][:512]).digest()
    path = tmp_path / "a.vma"
    path.write_bytes(archive.join())
    assert helpers.look(path).counts == {"extent_digest": 1}
    with pytest.raises(errors.ArchiveError, match="extent_digest"):
        extract.extract(str(path), str(tmp_path / "out"))


def test_nothing_is_whole_where_the_checksum_at_the_end_was_not_reached(tmp_path: pathlib.Path) -> None:
    """A bit of the first disk is wrong, which the checksum of gzip tells; but junk ends the reading before it."""
    for digest, whole in ((False, False), (True, True)):
        archive = helpers.build_archive(IMAGES, digest=digest)
        path = tmp_path / "a.vma.gz"
        packed = bytearray(gzip.compress(archive.join() + b"junk" * (1 << 18), 0))
        if not digest:
            packed[packed.index(archive.extents[0][512:1536]) + 300] ^= 1
        path.write_bytes(packed)
        seen = helpers.look(path)
        assert {problem.kind for problem in seen.problems} == {"trailing_data"}
        assert seen.whole == {DISK: whole, EFI: whole}
        request = [extract.DeviceRequest(DISK)]
        if whole:
            extract.extract(str(path), str(tmp_path / "whole"), devices=request)
        else:
            with pytest.raises(errors.ArchiveError, match="trailing_data"):
                extract.extract(str(path), str(tmp_path / "out"), devices=request)


def test_what_cannot_be_read_behind_a_disk_that_nothing_vouches_for(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.vma.gz"
    path.write_bytes(gzip.compress(helpers.build_archive(IMAGES, digest=False).join(), 0))
    real = os.read

    def read(fd: int, size: int) -> bytes:
        if os.path.samestat(os.fstat(fd), os.stat(path)) and os.lseek(fd, 0, os.SEEK_CUR) >= AT[2]:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, min(size, 4096))

    monkeypatch.setattr(os, "read", read)
    seen = helpers.look(path)
    assert seen.counts == {"read_error": 1, "cluster_missing": 1}
    assert seen.whole == {DISK: False, EFI: False}
    with pytest.raises(errors.ArchiveError, match="read_error"):
        extract.extract(str(path), str(tmp_path / "out"), devices=[extract.DeviceRequest(DISK)])


def test_an_archive_without_extents_has_no_integrity(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.vma"
    path.write_bytes(BASE.header)
    assert verify.verify(str(path)).integrity is None
