# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Archives that are damaged, or odd, given to this collection and to another reader: where do they differ, and why?

The table of docs/differential.md is made of what stands here. A row that is not true any more fails.
"""

from __future__ import annotations

import gzip
import io
import pathlib
import struct
import typing as t

import pytest

from ansible_collections.vmbackup.vma.plugins.module_utils.vma import errors, extract
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.vma import helpers, test_verify
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.vma.helpers import CLUSTER, Archive, Slot
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.vma.test_verify import BASE, DISK, EFI, IMAGES

vma = pytest.importorskip("dissect.archive.vma", reason="dissect.archive is not installed")

PAGE = pathlib.Path(__file__).resolve().parents[5] / "docs" / "differential.md"
CONFIGS = {"qemu-server.conf": helpers.CONF}


class Sample(t.NamedTuple):
    """An archive, and what a reader ought to find in it."""

    data: bytes
    images: dict[str, bytes]
    configs: dict[str, bytes]


class Row(t.NamedTuple):
    """What the two make of an archive, and why they differ."""

    name: str
    ours: str
    theirs: str
    reason: str


# --- the archives -----------------------------------------------------------------------------------------------------


def _damaged(case: test_verify.Case) -> Sample:
    archive = BASE.copy()
    if case.change is not None:
        case.change(archive)
    data = archive.join()
    return Sample(data if case.cut is None else case.cut(data), IMAGES, CONFIGS)


def _of(archive: Archive, images: dict[str, bytes] | None = None, configs: dict[str, bytes] | None = None) -> Sample:
    return Sample(archive.join(), IMAGES if images is None else images, CONFIGS if configs is None else configs)


def _flipped_without_digests() -> Sample:
    archive = helpers.build_archive(IMAGES, digest=False)
    archive.extents[1][512 + 7777] ^= 1
    return _of(archive)


def _shuffled() -> Sample:
    slots: list[Slot | None] = [slot for extent in helpers.in_order(IMAGES) for slot in extent]
    slots.reverse()
    return _of(helpers.build_archive(IMAGES, [slots[at : at + 59] for at in range(0, len(slots), 59)]))


def _unused_slots() -> Sample:
    slots: list[Slot | None] = [slot for extent in helpers.in_order(IMAGES) for slot in extent]
    spread: helpers.Extents = [
        [None, *slots[at : at + 20], None, *slots[at + 20 : at + 40]] for at in range(0, len(slots), 40)
    ]
    return _of(helpers.build_archive(IMAGES, spread))


def _zeros_stored() -> Sample:
    images = {DISK: bytes(5 * CLUSTER)}
    return _of(helpers.build_archive(images, [[Slot(1, cluster, 0xFFFF) for cluster in range(5)]]), images)


def _header(change: t.Callable[[bytearray], None], *, sealed: bool = True) -> Sample:
    archive = BASE.copy()
    change(archive.header)
    if sealed:
        helpers.seal_header(archive.header)
    return _of(archive)


def _set(at: int, value: bytes) -> t.Callable[[bytearray], None]:
    def change(header: bytearray) -> None:
        header[at : at + len(value)] = value

    return change


def _config_that_escapes() -> Sample:
    archive = helpers.build_archive(IMAGES, configs={"xx-escaped.txt": b"gotcha"})
    at = archive.header.index(b"xx-escaped.txt\0")
    archive.header[at : at + 3] = b"../"
    helpers.seal_header(archive.header)
    return _of(archive, configs={"../escaped.txt": b"gotcha"})


def _device_that_escapes() -> Sample:
    archive = BASE.copy()
    at = archive.header.index(DISK.encode() + b"\0")
    archive.header[at : at + 3] = b"../"
    helpers.seal_header(archive.header)
    return _of(archive, {"../" + DISK[3:]: IMAGES[DISK], EFI: IMAGES[EFI]})


def _two_of_one_name() -> Sample:
    images = {"drive-scsi0": IMAGES[EFI], "drive-scsi1": IMAGES[EFI]}
    archive = helpers.build_archive(images)
    at = archive.header.index(b"drive-scsi1\0")
    archive.header[at : at + 11] = b"drive-scsi0"
    helpers.seal_header(archive.header)
    return _of(archive, {"drive-scsi0": IMAGES[EFI]})


def _ram_state(*, clusters: t.Sequence[int] = (0, 1, 2), size: int = 3) -> Sample:
    images = {"vmstate": bytes(CLUSTER) + helpers.make_image(2 * CLUSTER, "ram", zero=0, partial=0)}
    slots: list[Slot | None] = [Slot(1, cluster, 0xFFFF if cluster else 0) for cluster in clusters]
    return _of(helpers.build_archive(images, [slots], sizes={"vmstate": size * CLUSTER}), images)


def _odd_size() -> Sample:
    archive = BASE.copy()
    size = len(IMAGES[EFI]) - 100
    archive.header[4096 + 64 + 8 : 4096 + 64 + 16] = struct.pack(">Q", size)
    helpers.seal_header(archive.header)
    return _of(archive, {**IMAGES, EFI: IMAGES[EFI][:size]})


def _samples() -> dict[str, Sample]:
    found = {case.name: _damaged(case) for case in test_verify.CASES}
    size = len(BASE.header)
    return {
        "sound": _of(BASE),
        "sound, without digests": _of(helpers.build_archive(IMAGES, digest=False)),
        "sound, clusters in reverse": _shuffled(),
        "sound, unused slots between used ones": _unused_slots(),
        "sound, zeros stored": _zeros_stored(),
        "sound, of configs alone": _of(helpers.build_archive({}, [[]]), {}),
        "sound, RAM state longer than its header says": _ram_state(size=1),
        "sound, gzip": Sample(gzip.compress(BASE.join(), 1), IMAGES, CONFIGS),
        **found,
        "a bit flipped in the data, without digests": _flipped_without_digests(),
        "RAM state out of order": _ram_state(clusters=(1, 0, 2)),
        "magic of the header": _header(_set(0, b"VMX\0"), sealed=False),
        "a bit flipped in the header": _header(_set(5000, b"\x01"), sealed=False),
        "version 2": _header(_set(4, struct.pack(">I", 2))),
        "cut inside the header": Sample(BASE.join()[: size - 512], IMAGES, CONFIGS),
        "config named `../escaped.txt`": _config_that_escapes(),
        "device named `../ve-scsi0`": _device_that_escapes(),
        "two devices of one name": _two_of_one_name(),
        "device of size 0": _header(_set(4096 + 64 + 8, bytes(8))),
        "device's size no multiple of 512": _odd_size(),
        "device's size of 2^63": _header(_set(4096 + 64 + 8, struct.pack(">Q", 1 << 63))),
        "device without a name": _header(_set(4096 + 64, bytes(4))),
        "config without content": _header(_set(3068, bytes(4))),
        "an empty file": Sample(b"", IMAGES, CONFIGS),
    }


# --- the readers ------------------------------------------------------------------------------------------------------


def _ours(sample: Sample, folder: pathlib.Path) -> str:
    (folder / "archive").write_bytes(sample.data)
    out = folder / "out"
    try:
        done = extract.extract(str(folder / "archive"), str(out))
    except errors.ArchiveError as error:
        return f"refuses: {error.problem.kind}"
    images = {device.name: pathlib.Path(device.path).read_bytes() for device in done.devices}
    configs = {config.name: pathlib.Path(config.path).read_bytes() for config in done.configs}
    return "right bytes" if (images, configs) == (sample.images, sample.configs) else "WRONG BYTES"


def _theirs(sample: Sample) -> str:
    try:
        opened = vma.VMA(io.BytesIO(sample.data))
        images = {}
        for device in opened.devices():
            if device.size > 1 << 40:
                return "accepts the size"
            images[device.name] = device.open().read()
    except Exception as error:  # noqa: BLE001 any other program's errors are its own
        return f"refuses: {type(error).__name__}"
    return "right bytes" if (images, opened.configs()) == (sample.images, sample.configs) else "WRONG BYTES"


# --- the table --------------------------------------------------------------------------------------------------------

ROWS = [
    Row("sound", "right bytes", "right bytes", ""),
    Row("sound, without digests", "right bytes", "right bytes", ""),
    Row("sound, clusters in reverse", "right bytes", "right bytes", ""),
    Row("sound, unused slots between used ones", "right bytes", "right bytes", ""),
    Row("sound, zeros stored", "right bytes", "right bytes", ""),
    Row("sound, of configs alone", "right bytes", "right bytes", ""),
    Row(
        "sound, RAM state longer than its header says",
        "right bytes",
        "WRONG BYTES",
        "A RAM state is a stream, whose clusters tell its size; dissect goes by the header's.",
    ),
    Row(
        "sound, gzip",
        "right bytes",
        "refuses: InvalidHeaderError",
        "dissect reads archives without compression alone.",
    ),
    Row(
        "one cluster missing",
        "refuses: cluster_missing",
        "WRONG BYTES",
        "Every cluster has to be there; dissect does not count them.",
    ),
    Row("a bit flipped in the data", "refuses: extent_digest", "WRONG BYTES", "Only the digests cover the data."),
    Row(
        "cut at an extent's boundary",
        "refuses: cluster_missing",
        "WRONG BYTES",
        "Every cluster has to be there; dissect does not count them.",
    ),
    Row(
        "header alone, no extent",
        "refuses: cluster_missing",
        "WRONG BYTES",
        "Every cluster has to be there; dissect does not count them.",
    ),
    Row("cut inside an extent's data", "refuses: truncated", "WRONG BYTES", "dissect returns what is left."),
    Row(
        "cut inside an extent's header",
        "refuses: truncated",
        "WRONG BYTES",
        "dissect takes half a header for the end.",
    ),
    Row(
        "the last byte cut off",
        "refuses: truncated",
        "right bytes",
        "The byte fills up the last block, behind the device's end; that it is gone tells of a cut file.",
    ),
    Row(
        "a cluster twice",
        "refuses: cluster_duplicate",
        "WRONG BYTES",
        "Another one is missing for it; dissect does not count them.",
    ),
    Row("magic of the first extent", "refuses: extent_magic", "refuses: InvalidHeaderError", ""),
    Row("magic of a middle extent", "refuses: extent_magic", "refuses: InvalidHeaderError", ""),
    Row("magic of the last extent", "refuses: extent_magic", "refuses: InvalidHeaderError", ""),
    Row("an entry flipped", "refuses: extent_checksum", "refuses: InvalidHeaderError", ""),
    Row("the MD5 flipped", "refuses: extent_checksum", "refuses: InvalidHeaderError", ""),
    Row(
        "an extent of another archive",
        "refuses: extent_uuid",
        "right bytes",
        "dissect does not compare UUIDs. That the bytes are right is this example's luck.",
    ),
    Row(
        "a wrong count of blocks",
        "refuses: extent_block_count",
        "refuses: InvalidHeaderError",
        "dissect looks for the next extent where the count puts it, and finds none.",
    ),
    Row("masks swapped", "refuses: extent_digest", "WRONG BYTES", "The MD5 is right again; only the digest tells."),
    Row(
        "the last byte of the archive flipped",
        "refuses: extent_digest",
        "right bytes",
        "The byte lies behind the device's end. Something changed the file all the same.",
    ),
    Row(
        "a digest removed",
        "refuses: extent_digest",
        "right bytes",
        "dissect knows no digests. Who changes data on purpose would remove them.",
    ),
    Row(
        "one byte more",
        "refuses: trailing_data",
        "right bytes",
        "Proxmox VE refuses it as well; dissect does not look behind the last extent.",
    ),
    Row(
        "zeros appended",
        "refuses: trailing_data",
        "right bytes",
        "As above. dissect stops once a device is whole, before it comes there.",
    ),
    Row("another archive appended", "refuses: trailing_data", "right bytes", "As above."),
    Row(
        "an extent once more",
        "refuses: cluster_duplicate",
        "right bytes",
        "Which of the two is right is not known; dissect takes the first.",
    ),
    Row("a byte inserted before an extent", "refuses: extent_magic", "refuses: InvalidHeaderError", ""),
    Row("a sector inserted before an extent", "refuses: extent_magic", "refuses: InvalidHeaderError", ""),
    Row("two mebibytes inserted before an extent", "refuses: extent_magic", "refuses: InvalidHeaderError", ""),
    Row(
        "a device that the header does not have",
        "refuses: unknown_device",
        "WRONG BYTES",
        "dissect passes over it, and over the cluster that is missing for it.",
    ),
    Row("a cluster outside its device", "refuses: cluster_out_of_range", "WRONG BYTES", "As above."),
    Row("the highest cluster number", "refuses: cluster_out_of_range", "WRONG BYTES", "As above."),
    Row(
        "a block outside its device",
        "refuses: cluster_out_of_range",
        "right bytes",
        "Proxmox VE refuses it as well; the block is not part of any device.",
    ),
    Row(
        "a bit flipped in the data, without digests",
        "WRONG BYTES",
        "WRONG BYTES",
        "Nothing in the archive tells. That is why archives carry digests, and why results tell of `integrity`.",
    ),
    Row(
        "RAM state out of order",
        "refuses: vmstate_order",
        "right bytes",
        "Proxmox VE reads a RAM state as a stream, and would restore another one.",
    ),
    Row("magic of the header", "refuses: not_vma", "refuses: InvalidHeaderError", ""),
    Row("a bit flipped in the header", "refuses: header_checksum", "refuses: InvalidHeaderError", ""),
    Row("version 2", "refuses: header_invalid", "right bytes", "What another version means is not known."),
    Row("cut inside the header", "refuses: truncated", "refuses: InvalidHeaderError", ""),
    Row(
        "config named `../escaped.txt`",
        "refuses: unsafe_name",
        "right bytes",
        "dissect hands out the name as it is; its tool `vma-extract` writes to it.",
    ),
    Row(
        "device named `../ve-scsi0`",
        "refuses: unsafe_name",
        "right bytes",
        "As above. Here, a path that the user names lets the device be extracted.",
    ),
    Row("two devices of one name", "refuses: header_invalid", "right bytes", "One would be written over the other."),
    Row(
        "device of size 0",
        "refuses: header_invalid",
        "WRONG BYTES",
        "No writer makes one; dissect returns an empty disk.",
    ),
    Row("device's size no multiple of 512", "right bytes", "right bytes", ""),
    Row(
        "device's size of 2^63",
        "refuses: header_invalid",
        "accepts the size",
        "The format ends at 256 TiB a device; dissect promises a disk of 8 EiB.",
    ),
    Row("device without a name", "refuses: header_invalid", "WRONG BYTES", "dissect passes over the device."),
    Row("config without content", "refuses: header_invalid", "refuses: KeyError", ""),
    Row("an empty file", "refuses: not_vma", "refuses: EOFError", ""),
]
SAMPLES = _samples()


def test_each_archive_has_its_row() -> None:
    assert [row.name for row in ROWS] == list(SAMPLES)


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_row(row: Row, tmp_path: pathlib.Path) -> None:
    sample = SAMPLES[row.name]
    assert (_ours(sample, tmp_path), _theirs(sample)) == (row.ours, row.theirs)
    if row.ours.partition(":")[0] != row.theirs.partition(":")[0]:
        assert row.reason


def test_page() -> None:
    """docs/differential.md shows the table as it is here."""
    lines = ["| archive | this collection | dissect.archive | why they differ |", "|---|---|---|---|"]
    lines += [f"| {row.name} | {_shown(row.ours)} | {_shown(row.theirs)} | {row.reason} |" for row in ROWS]
    shown = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert shown == lines


def _shown(verdict: str) -> str:
    how, _colon, what = verdict.partition(": ")
    return f"{how}: `{what}`" if what else how
