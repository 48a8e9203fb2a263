# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Make the disk images that the archives beside this file were made from.

The repository holds the archives only: what belongs in them follows from seeds, byte for byte the same with every
Python, and manifest.json has the size and the SHA-256 of each image and each archive. To look at images by hand:

    python3 tests/unit/vectors/images.py FOLDER [NAME ...]
"""

from __future__ import annotations

import argparse
import pathlib
import random
import typing as t

BLOCK = 4096
CLUSTER = 16 * BLOCK
MIB = 1 << 20


class _Mixture(t.NamedTuple):
    """An image of zero, partly written and full clusters; the shares of the first two, the rest is full."""

    size: int
    seed: str
    zero: float = 0.4
    partial: float = 0.3

    def write(self, image: t.BinaryIO) -> None:
        draw = random.Random(self.seed)
        for start in range(0, self.size, CLUSTER):
            kind = draw.random()
            if kind < self.zero:
                continue
            for offset in range(start, min(start + CLUSTER, self.size), BLOCK):
                if kind < self.zero + self.partial and draw.random() < 0.5:
                    continue
                # A repeated token keeps the archives small, and yet no block equals another.
                content = draw.randbytes(16) * (BLOCK // 16)
                image.seek(offset)
                image.write(content[: self.size - offset])
        # A lost tail must not be mistaken for zeros.
        image.seek(self.size - 1)
        image.write(b"\xa5")


class _Zeros(t.NamedTuple):
    """Nothing at all."""

    size: int

    def write(self, image: t.BinaryIO) -> None:
        image.truncate(self.size)


class _LastBytes(t.NamedTuple):
    """Every other block is zero up to its last byte: a zero test that looks at the start alone is found out."""

    size: int

    def write(self, image: t.BinaryIO) -> None:
        for offset in range(0, self.size, 2 * BLOCK):
            image.seek(offset + BLOCK - 1)
            image.write(b"\x01")


IMAGES: dict[str, _Mixture | _Zeros | _LastBytes] = {
    "disk-8m.raw": _Mixture(8 * MIB, "disk-8m"),
    "disk-6m-dense.raw": _Mixture(6 * MIB, "dense", zero=0.0, partial=0.0),
    "efidisk-528k.raw": _Mixture(540672, "efi"),
    "tpmstate-4m.raw": _Mixture(4 * MIB, "tpm", zero=0.9, partial=0.1),
    "odd-tail.raw": _Mixture(3 * MIB + 5 * BLOCK + 1536, "tail", zero=0.2, partial=0.4),
    "one-sector.raw": _Mixture(512, "sector", zero=0.0, partial=0.0),
    "zeros-1g.raw": _Zeros(1024 * MIB),
    "last-byte-2m.raw": _LastBytes(2 * MIB),
    "vmstate-1m.raw": _Mixture(MIB + 3 * BLOCK, "vmstate", zero=0.1, partial=0.2),
}


def write_image(name: str, path: pathlib.Path) -> None:
    """Write the image of that name, as a sparse file where the file system has them."""
    recipe = IMAGES[name]
    with path.open("wb") as image:
        image.truncate(recipe.size)
        recipe.write(image)


def main() -> None:
    """Write images into a folder."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("names", nargs="*", metavar="name", help=f"all by default: {', '.join(IMAGES)}")
    options = parser.parse_args()
    unknown = sorted(set(options.names) - set(IMAGES))
    if unknown:
        parser.error(f"no such image: {', '.join(unknown)}")
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in options.names or IMAGES:
        write_image(name, options.folder / name)


if __name__ == "__main__":
    main()
