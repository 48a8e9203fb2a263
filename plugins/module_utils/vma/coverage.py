# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Which clusters of a device have come: each must, exactly once, in any order. No I/O.

One bit a cluster, in chunks that are made when their first cluster comes and shrink to nothing when their last one
does. So an archive that stores devices in order costs next to no memory at any size, and what an archive can make
this allocate has a bound.
"""

from __future__ import annotations

import typing as t

from .errors import ArchiveError, Problem

CHUNK = 1 << 12
"""Clusters in a chunk: 256 MiB of a device."""
CHUNK_BUDGET = 1 << 15
"""Chunks in part filled at one time: 16 MiB of bits, enough for 8 TiB of clusters in any order."""
_FULL = (1 << CHUNK) - 1


class Budget:
    """The memory that all devices of an archive share."""

    def __init__(self, chunks: int = CHUNK_BUDGET) -> None:
        self.chunks = chunks

    def take(self) -> None:
        """Account for one more chunk. Raises: ArchiveError of the kind cluster_out_of_range."""
        if not self.chunks:
            raise ArchiveError(
                Problem(
                    "cluster_out_of_range",
                    f"clusters are scattered over more than {CHUNK_BUDGET} separate regions of 256 MiB, "
                    "which no backup program does; reading on would take memory without bound",
                )
            )
        self.chunks -= 1

    def give_back(self) -> None:
        """Account for a chunk that is full, and so needs no memory any more."""
        self.chunks += 1


class Coverage:
    """The clusters of one device that have come."""

    def __init__(self, clusters: int, budget: Budget) -> None:
        self.clusters = clusters
        self.missing = clusters
        self._budget = budget
        self._full: set[int] = set()
        self._partial: dict[int, int] = {}

    def add(self, first: int, count: int) -> list[int]:
        """Note that the clusters from C(first) have come; all lie within the device. Returns those that came before."""
        repeated: list[int] = []
        while count:
            chunk = first // CHUNK
            part = min(count, (chunk + 1) * CHUNK - first)
            repeated += self._add_to_chunk(chunk, first % CHUNK, part)
            first += part
            count -= part
        return repeated

    def _add_to_chunk(self, chunk: int, at: int, count: int) -> t.Sequence[int]:
        base = chunk * CHUNK
        if chunk in self._full:
            return range(base + at, base + at + count)
        bits = self._partial.get(chunk)
        if bits is None:
            self._budget.take()
            bits = 0
        new = ((1 << count) - 1) << at
        both = bits & new
        bits |= new
        if bits == self._complete(chunk):
            self._partial.pop(chunk, None)
            self._full.add(chunk)
            self._budget.give_back()
        else:
            self._partial[chunk] = bits
        self.missing -= count
        if not both:
            return ()
        repeated = [base + n for n in range(at, at + count) if both >> n & 1]
        self.missing += len(repeated)
        return repeated

    def _complete(self, chunk: int) -> int:
        """The bits of a chunk of which every cluster has come; the last chunk of a device may be shorter."""
        left = self.clusters - chunk * CHUNK
        return _FULL if left >= CHUNK else (1 << left) - 1

    def first_missing(self) -> int | None:
        """The lowest cluster that has not come; None where all have."""
        for chunk in range(-(-self.clusters // CHUNK)):
            if chunk in self._full:
                continue
            bits = self._partial.get(chunk, 0)
            lowest_zero = ~bits & (bits + 1)
            return chunk * CHUNK + lowest_zero.bit_length() - 1
        return None


class StreamCoverage:
    """The clusters of a vmstate: a stream whose clusters come strictly in order and which its size need not bound."""

    def __init__(self, clusters: int) -> None:
        self.clusters = clusters
        self.next = 0

    @property
    def missing(self) -> int:
        """How many clusters the size in the header tells of and the archive does not hold."""
        return max(0, self.clusters - self.next)

    def first_missing(self) -> int | None:
        """The lowest cluster that has not come; None where all have."""
        return self.next if self.missing else None


AnyCoverage = t.Union[Coverage, StreamCoverage]

__all__ = ("CHUNK", "CHUNK_BUDGET", "AnyCoverage", "Budget", "Coverage", "StreamCoverage")
