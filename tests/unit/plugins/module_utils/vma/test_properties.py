# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Round trips and models: whatever the sizes, the zero blocks and the order of the clusters, no byte is lost."""

from __future__ import annotations

import pathlib
import random
import tempfile
import typing as t

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ansible_collections.vmbackup.vma.plugins.module_utils.vma import create, extract, layout, verify
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.vma import helpers
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.vma.helpers import BLOCK, CLUSTER, SLOTS, UUID

NAMES = ("drive-scsi0", "drive-efidisk0", "vmstate", "drive-virtio1")


@st.composite
def _images(draw: st.DrawFn, names: t.Sequence[str], sector: int = 1) -> dict[str, bytes]:
    found = {}
    for name in names:
        size = draw(
            st.integers(1, 5 * CLUSTER // sector).map(lambda number: number * sector)
            | st.sampled_from([512, BLOCK, CLUSTER, CLUSTER + 512, 2 * CLUSTER - 512, 61 * CLUSTER + BLOCK])
        )
        blocks = -(-size // BLOCK)
        # a block is zero, random, or zero up to one byte
        kinds = draw(st.binary(min_size=min(blocks, 48), max_size=min(blocks, 48)))
        content = random.Random(draw(st.integers(0, 1 << 32)))
        data = bytearray()
        for number in range(blocks):
            kind = kinds[number % len(kinds)] % 5
            if kind < 2:
                data += bytes(BLOCK)
            elif kind == 2:
                data += b"\x00" * (BLOCK - 1) + b"\x01"
            elif kind == 3:
                data += b"\x01" + b"\x00" * (BLOCK - 1)
            else:
                data += content.randbytes(BLOCK)
        found[name] = bytes(data[:size])
    return found


@st.composite
def _layouts(draw: st.DrawFn) -> tuple[dict[str, bytes], helpers.Extents]:
    """Images, and their clusters in any order, in extents with any slots unused; a RAM state stays in order."""
    images = draw(_images(NAMES[: draw(st.integers(1, 4))], sector=512))
    shuffle = random.Random(draw(st.integers(0, 1 << 32)))
    slots = [slot for extent in helpers.in_order(images) for slot in extent if slot is not None]
    stream = [slot for slot in slots if NAMES[slot.dev_id - 1] == "vmstate"]
    others = [slot for slot in slots if NAMES[slot.dev_id - 1] != "vmstate"]
    shuffle.shuffle(others)
    mixed = others[:]
    for slot in reversed(stream):
        # from the back to the front, each before the one that follows it
        before = mixed.index(stream[slot.cluster + 1]) if slot is not stream[-1] else len(mixed)
        mixed.insert(shuffle.randint(0, before), slot)
    if shuffle.random() < 0.5:
        # blocks that are zero may be stored all the same
        mixed = [
            slot if slot.mask is not None or shuffle.random() < 0.7 else slot._replace(mask=0xFFFF) for slot in mixed
        ]
    extents: helpers.Extents = []
    while mixed:
        extent: list[helpers.Slot | None] = [None] * SLOTS
        places = sorted(shuffle.sample(range(SLOTS), min(len(mixed), shuffle.randint(1, SLOTS))))
        for place in places:
            extent[place] = mixed.pop(0)
        extents.append(extent)
    return images, extents


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(_layouts(), st.booleans())
def test_any_layout_is_extracted(case: tuple[dict[str, bytes], helpers.Extents], digest: bool) -> None:
    images, extents = case
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        path = folder / "archive.vma"
        path.write_bytes(helpers.build_archive(images, extents, digest=digest).join())
        seen = verify.verify(str(path))
        assert seen.verification.problems == []
        assert seen.integrity == ("sha256" if digest else "none")
        done = extract.extract(str(path), str(folder / "out"))
        assert {device.name: pathlib.Path(device.path).read_bytes() for device in done.devices} == images
        # and over something else, changing only what differs
        for device in done.devices:
            content = bytearray(images[device.name])
            content[len(content) // 2] ^= 0xFF
            pathlib.Path(device.path).write_bytes(content)
        done = extract.extract(str(path), str(folder / "out"), in_place=True)
        assert {device.name: pathlib.Path(device.path).read_bytes() for device in done.devices} == images
        assert all(device.changed and 0 < device.written_bytes <= 1 << 20 for device in done.devices)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(
    st.integers(0, 4).flatmap(lambda count: _images(NAMES[:count])),
    st.sampled_from([".vma", ".vma.gz", ".vma.zst"]),
    st.sampled_from(["sha256", "none"]),
    st.integers(1, 3),
)
def test_create_then_extract(images: dict[str, bytes], ending: str, integrity: str, threads: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for image, content in images.items():
            (folder / image).write_bytes(content)
        sources = [create.SourceDevice(image, str(folder / image)) for image in images]
        path = str(folder / f"archive{ending}")
        given_configs = [layout.Config("a", b"text"), layout.Config("b", b"")]
        made = create.create(path, sources, given_configs, integrity=integrity, threads=threads)
        assert made.changed
        seen = verify.verify(path)
        assert seen.verification.problems == []
        assert seen.integrity == integrity
        assert seen.verification.data_bytes == made.data_bytes
        assert not create.create(path, sources, given_configs, integrity=integrity).changed
        done = extract.extract(path, str(folder / "out"), threads=threads)
        for device in done.devices:
            padded = images[device.name].ljust(-(-len(images[device.name]) // 512) * 512, b"\x00")
            assert pathlib.Path(device.path).read_bytes() == padded
        assert not extract.extract(path, str(folder / "out")).changed


@pytest.mark.parametrize("ending", [".vma", ".vma.gz", ".vma.zst"])
def test_the_same_bytes_whatever_the_threads(ending: str, tmp_path: pathlib.Path) -> None:
    # large enough for several jobs of zstd's threads
    sizes = {"a": 9 << 20, "b": 540672, "c": (5 << 20) + 512}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(helpers.make_image(size, name, zero=0.2))
    sources = [create.SourceDevice(name, str(tmp_path / name)) for name in sizes]
    made = []
    for threads in (1, 2, 5):
        path = tmp_path / f"{threads}{ending}"
        create.create(str(path), sources, uuid=helpers.UUID_TEXT, ctime=1, threads=threads)
        made.append(path.read_bytes())
    assert made[0] == made[1] == made[2]


@given(st.lists(st.sampled_from(["zero", "first", "last", "full"]), max_size=60), st.integers(0, 3))
def test_squeeze_like_a_list(kinds: list[str], before: int) -> None:
    makers = {
        "zero": bytes(BLOCK),
        "first": b"\x01" + bytes(BLOCK - 1),
        "last": bytes(BLOCK - 1) + b"\x01",
        "full": b"\xff" * BLOCK,
    }
    # each block that is not zero gets a number, so that none can be taken for another
    blocks = [
        makers[kind] if kind == "zero" else makers[kind][:100] + number.to_bytes(2, "big") + makers[kind][102:]
        for number, kind in enumerate(kinds)
    ]
    begin = before * BLOCK
    memory = bytearray(b"\xaa" * begin + b"".join(blocks))
    bits, end = create._squeeze(memory, begin, len(blocks) * BLOCK)
    kept = [block for block, kind in zip(blocks, kinds) if kind != "zero"]
    assert bits == sum(1 << number for number, kind in enumerate(kinds) if kind != "zero")
    assert memory[:end] == b"\xaa" * begin + b"".join(kept)


_slots = st.lists(
    st.tuples(
        st.sampled_from([0, 1, 2, 255]),
        st.integers(0, 6) | st.sampled_from([0xFFFFFFFE, 0xFFFFFFFF]),
        st.sampled_from([0, 1, 0x8000, 0x7FFE, 0x5555, 0xFFFF]),
    ),
    max_size=SLOTS,
)


@st.composite
def _runs_of_slots(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    found: list[tuple[int, int, int]] = []
    for dev_id, cluster, mask in draw(_slots):
        for number in range(draw(st.integers(1, 5))):
            found.append((dev_id, min(cluster + number, 0xFFFFFFFF), mask))
    return found[:SLOTS]


@given(_runs_of_slots())
def test_runs_and_segments_like_slot_by_slot(slots: list[tuple[int, int, int]]) -> None:
    used = [slot for slot in slots if slot[0]]
    # By hand: each slot alone, each block alone.
    data_at = 0
    order = []
    for dev_id, cluster, mask in used:
        for block in range(16):
            stored = bool(mask >> block & 1)
            order.append((dev_id, cluster * CLUSTER + block * BLOCK, data_at if stored else None))
            data_at += BLOCK if stored else 0
    stored_bits = 0
    for slot, (dev_id, _cluster, mask) in enumerate(slots):
        stored_bits |= (mask if dev_id else 0) << 16 * slot
    header = layout.build_extent(
        UUID, [(dev_id, cluster if dev_id else 0, 1) for dev_id, cluster, _mask in slots], stored_bits
    )
    layout.seal_extent(header, None)
    extent = layout.parse_extent(header, UUID, 0)
    assert extent.data_size == data_at
    assert [
        (dev_id, first + number, mask) for dev_id, first, count, mask in extent.runs for number in range(count)
    ] == used
    found = [
        (segment.dev_id, segment.start + at, None if segment.data_at is None else segment.data_at + at)
        for segment in layout.segments(extent.runs)
        for at in range(0, segment.length, BLOCK)
    ]
    assert found == order


@given(st.integers(0, 3), _runs_of_slots())
def test_extents_like_those_made_by_hand(seed: int, slots: list[tuple[int, int, int]]) -> None:
    draw = random.Random(seed)
    image = draw.randbytes(8 * CLUSTER)
    chosen = [helpers.Slot(dev_id, cluster % 8, mask) if dev_id else None for dev_id, cluster, mask in slots]
    by_hand = helpers.build_extent(chosen, {1: image, 2: image, 255: image})
    stored = 0
    for number, slot in enumerate(chosen):
        stored |= (0 if slot is None else slot.mask or 0) << 16 * number
    runs = [(0, 0, 1) if slot is None else (slot.dev_id, slot.cluster, 1) for slot in chosen]
    header = layout.build_extent(UUID, runs, stored)
    layout.seal_extent(header, layout.extent_digest(bytes(header) + bytes(by_hand[512:])))
    assert header == by_hand[:512]
