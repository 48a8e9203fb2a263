# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Tell whether raw copies of a guest's disks are of one instant; the guest numbers its writes, see guest/writer.c.

Exit status 0: they are; 1: they are not; 2: this cannot be told from these files. Nothing of the collection is used
here, and nothing but Python: so that a test can run it on any host.
"""

from __future__ import annotations

import argparse
import pathlib
import struct
import sys
import typing as t

BLOCK = 4096
PLACES = 64
STRIDE = 1 << 20
WORDS = struct.Struct(f"<{BLOCK // 8}Q")


class NotOneInstant(Exception):
    """The copies hold a state that the disks never had."""


class CannotTell(Exception):
    """These files are not whole disks of a guest that has numbered its writes for long enough."""


class Place(t.NamedTuple):
    """Where a write goes to: the disk's position among the disks, and the offset in bytes."""

    disk: int
    offset: int


def place_of(write: int, disks: int) -> Place:
    """Return where a write goes to, from its number, as guest/writer.c has it."""
    turn, disk = divmod(write - 1, disks)
    reversed_bits = int(f"{turn % PLACES:06b}"[::-1], 2)
    return Place(disk, reversed_bits * STRIDE)


def read_number(image: t.BinaryIO, offset: int) -> int:
    """Return the number of the write that made this block."""
    image.seek(offset)
    block = image.read(BLOCK)
    if len(block) != BLOCK:
        raise CannotTell(f"{image.name} ends before offset {offset}")
    words: set[int] = set(WORDS.unpack(block))
    if len(words) != 1:
        torn = f"the block at offset {offset} is torn between the writes {sorted(words)[:9]}"
        raise NotOneInstant(f"{image.name}: {torn}")
    return words.pop()


def check(paths: t.Sequence[pathlib.Path], at_least: int = 0) -> int:
    """Return the number of the last write that the disks hold, given in the guest's order.

    Raises: NotOneInstant, CannotTell, OSError.
    """
    places = [place_of(write, len(paths)) for write in range(1, PLACES * len(paths) + 1)]
    found: list[int] = []
    for position, path in enumerate(paths):
        with path.open("rb") as image:
            found += [read_number(image, place.offset) for place in places if place.disk == position]
    order = [place for position in range(len(paths)) for place in places if place.disk == position]
    numbers = dict(zip(order, found))

    last = max(found)
    if last < max(at_least, 2 * len(places)):
        raise CannotTell(f"the guest has done no more than {last} writes: wait for more")
    for write in range(last - len(places) + 1, last + 1):
        disk, offset = place_of(write, len(paths))
        number = numbers[Place(disk, offset)]
        if number != write:
            raise NotOneInstant(
                f"write {last} is there, but {paths[disk]} has at offset {offset} write {number} instead of {write}: "
                f"{abs(write - number) // len(places)} rounds apart"
            )
    return last


def main() -> int:
    """Check the files that are named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("images", nargs="+", type=pathlib.Path, help="raw copies of all disks, in the guest's order")
    parser.add_argument("--at-least", type=int, default=0, metavar="WRITE", help="expect this write or a later one")
    options = parser.parse_args()
    try:
        last = check(options.images, options.at_least)
    except NotOneInstant as error:
        print(f"NOT ONE INSTANT: {error}")
        return 1
    except (CannotTell, OSError) as error:
        print(f"CANNOT TELL: {error}")
        return 2
    print(f"ONE INSTANT: between the writes {last} and {last + 1}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
