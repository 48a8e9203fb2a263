# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Archives made by hand, to be damaged or laid out as no writer of ours would.

Extents are put together here with struct and hashlib alone, so that the codec is not its own judge.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import random
import shutil
import struct
import typing as t

import pytest

from ansible_collections.vmbackup.vma.plugins.module_utils.vma import errors, layout, verify

BLOCK = 4096
CLUSTER = 16 * BLOCK
SLOTS = 59
UUID = bytes(range(16))
UUID_TEXT = "00010203-0405-0607-0809-0a0b0c0d0e0f"
CTIME = 1_700_000_000
CONF = b"#qmdump#map:scsi0:drive-scsi0:local-lvm:raw:\nname: web\nmemory: 2048\n"

VECTORS = pathlib.Path(__file__).resolve().parents[3] / "vectors"
MANIFEST: dict[str, t.Any] = json.loads((VECTORS / "manifest.json").read_text(encoding="utf-8"))


class Slot(t.NamedTuple):
    """An entry of an extent. Without a mask, the mask follows from the content."""

    dev_id: int
    cluster: int
    mask: int | None = None


Extents = list[list[t.Optional[Slot]]]


def need_tool(name: str) -> str:
    """The path of a tool; the test is skipped without it."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"the tool {name} is not installed")
    return path


def make_image(size: int, seed: str = "", *, zero: float = 0.5, partial: float = 0.3) -> bytes:
    """Random blocks among zero ones; C(zero) of the clusters are empty, C(partial) hold some blocks."""
    draw = random.Random(f"{size} {seed}")
    data = bytearray(size)
    for start in range(0, size, CLUSTER):
        kind = draw.random()
        for at in range(start, min(start + CLUSTER, size), BLOCK):
            if kind >= zero and (kind >= zero + partial or draw.random() < 0.3):
                end = min(at + BLOCK, size)
                data[at:end] = draw.randbytes(end - at)
    data[-1:] = b"\xa5"
    return bytes(data)


def mask_of(cluster: bytes) -> int:
    """The mask of a cluster by its content."""
    return sum(1 << number for number in range(16) if cluster[number * BLOCK : (number + 1) * BLOCK].strip(b"\x00"))


def seal(extent: bytearray, *, digest: bool) -> None:
    """Give an extent the digest of docs/format.md, or none, and its MD5."""
    extent[24:40] = bytes(16)
    for slot in range(SLOTS):
        extent[42 + 8 * slot] = 0
    if digest:
        sha256 = hashlib.sha256(extent).digest()
        for slot, byte in enumerate(sha256):
            extent[42 + 8 * slot] = byte
        extent[42 + 8 * 32] = 1
    extent[24:40] = hashlib.md5(extent[:512]).digest()


def seal_header(header: bytearray) -> None:
    """Give a header its MD5."""
    header[32:48] = bytes(16)
    header[32:48] = hashlib.md5(header).digest()


def build_extent(
    slots: t.Sequence[Slot | None], images: t.Mapping[int, bytes], *, uuid: bytes = UUID, digest: bool = True
) -> bytearray:
    """A whole extent: header and data."""
    entries = []
    data = bytearray()
    for slot in slots:
        if slot is None:
            entries.append(0)
            continue
        image = images.get(slot.dev_id, b"")
        cluster = image[slot.cluster * CLUSTER : (slot.cluster + 1) * CLUSTER].ljust(CLUSTER, b"\x00")
        mask = mask_of(cluster) if slot.mask is None else slot.mask
        entries.append(mask << 48 | slot.dev_id << 32 | slot.cluster)
        for number in range(16):
            if mask >> number & 1:
                data += cluster[number * BLOCK : (number + 1) * BLOCK]
    entries += [0] * (SLOTS - len(entries))
    extent = bytearray(struct.pack(">4sHH16s16s59Q", b"VMAE", 0, len(data) // BLOCK, uuid, bytes(16), *entries) + data)
    seal(extent, digest=digest)
    return extent


def in_order(images: t.Mapping[str, bytes]) -> Extents:
    """Device after device, cluster after cluster, every slot filled."""
    slots = [
        Slot(dev_id, cluster, 0xFFFF if name == "vmstate" else None)
        for dev_id, (name, image) in enumerate(images.items(), 1)
        for cluster in range(-(-len(image) // CLUSTER))
    ]
    return [list(slots[at : at + SLOTS]) for at in range(0, len(slots), SLOTS)]


@dataclasses.dataclass
class Archive:
    """An archive in its parts, to be changed and joined."""

    header: bytearray
    extents: list[bytearray]

    def offset(self, number: int) -> int:
        """Where an extent begins; with the number of extents, where the archive ends."""
        return len(self.header) + sum(map(len, self.extents[:number]))

    def join(self) -> bytes:
        """The archive's bytes."""
        return bytes(self.header) + b"".join(self.extents)

    def copy(self) -> Archive:
        """The same once more, so that a change does not reach this one."""
        return Archive(bytearray(self.header), [bytearray(extent) for extent in self.extents])


def build_archive(
    images: t.Mapping[str, bytes],
    extents: Extents | None = None,
    *,
    configs: t.Mapping[str, bytes] | None = None,
    digest: bool = True,
    sizes: t.Mapping[str, int] | None = None,
) -> Archive:
    """An archive of these images; the devices have the numbers 1, 2, … C(sizes) are those that the header tells."""
    sizes = sizes or {}
    header = layout.build_header(
        UUID,
        CTIME,
        [
            layout.Device(dev_id, name, sizes.get(name, len(image)))
            for dev_id, (name, image) in enumerate(images.items(), 1)
        ],
        [
            layout.Config(name, data)
            for name, data in ({"qemu-server.conf": CONF} if configs is None else configs).items()
        ],
    )
    numbered = dict(enumerate(images.values(), 1))
    laid_out = in_order(images) if extents is None else extents
    return Archive(bytearray(header), [build_extent(slots, numbered, digest=digest) for slots in laid_out])


Found = tuple[str, t.Optional[int], t.Optional[str], t.Optional[int]]
"""A problem without its words: kind, offset, device, cluster."""


def found(problems: t.Iterable[errors.Problem]) -> list[Found]:
    """The problems without their words, in an order that does not depend on threads."""
    return sorted(((item.kind, item.offset, item.device, item.cluster) for item in problems), key=repr)


def look(path: str | os.PathLike[str], level: str = "content") -> verify.Verification:
    """What verify() finds."""
    return verify.verify(str(path), level).verification


def files_below(folder: pathlib.Path) -> list[str]:
    """Everything in a folder but folders, hidden files included. No file is looked at: a dying view does not answer."""
    found = []
    for parent, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        found += [os.path.relpath(os.path.join(parent, name), folder) for name in (*names, *links)]
    return sorted(found)


def sha256_of(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file, read in pieces; of a gibibyte of hole it is known."""
    digest = hashlib.sha256()
    status = os.stat(path)
    if status.st_blocks == 0 and status.st_size == MANIFEST["images"]["zeros-1g.raw"]["size"]:
        return str(MANIFEST["images"]["zeros-1g.raw"]["sha256"])
    with open(path, "rb") as file:
        while True:
            piece = file.read(1 << 20)
            if not piece:
                return digest.hexdigest()
            digest.update(piece)
