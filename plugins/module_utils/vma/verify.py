# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""An archive in, findings out: all of its problems, as far as its stream can be followed."""

from __future__ import annotations

import collections
import dataclasses
import threading
import time
import typing as t

from .archive_file import usable_cpus
from .errors import ArchiveError, Problem
from .layout import CLUSTER_SIZE, Header, Segment
from .reader import Reader

LEVELS: tuple[str, ...] = ("none", "structure", "content")
PROBLEM_LIMIT = 1000
"""So many problems are kept in full; of those beyond, each kind is counted."""


@dataclasses.dataclass
class Verification:
    """What a verification found. C(elapsed) is in seconds; the other numbers are of the uncompressed archive.

    C(good_until) is the offset up to which nothing is wrong. C(whole) has for each device's name whether all of it is
    there and nothing of it is known to be wrong. C(counts) has how many problems there are of each kind.
    """

    level: str
    problems: list[Problem]
    counts: dict[str, int]
    whole: dict[str, bool]
    good_until: int = 0
    extents: int = 0
    clusters: int = 0
    data_bytes: int = 0
    zero_bytes: int = 0
    read_bytes: int = 0
    elapsed: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong, at this level."""
        return not self.counts

    def as_dict(self) -> dict[str, t.Any]:
        """The verification as modules return it."""
        result = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        result["ok"] = self.ok
        result["problems"] = [problem.as_dict() for problem in self.problems]
        result["devices"] = [{"name": name, "whole": whole} for name, whole in result.pop("whole").items()]
        result["counts"] = dict(self.counts)
        result["elapsed"] = round(self.elapsed, 3)
        return result


@dataclasses.dataclass
class Verified:
    """An archive that was looked at. Without a readable header C(header) is None."""

    header: Header | None
    compression: str | None
    integrity: str | None
    verification: Verification


class _Collector:
    """Keeps problems; many of one archive must not take memory without bound."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.counts: collections.Counter[str] = collections.Counter()
        self._lock = threading.Lock()

    def __call__(self, problem: Problem) -> None:
        with self._lock:
            self.counts[problem.kind] += 1
            if len(self.problems) < PROBLEM_LIMIT:
                self.problems.append(problem)


def _look(_data: memoryview, _segments: list[Segment]) -> None:
    """The reader has checked the data; there is nothing more to do with it."""


def verify(path: str, level: str = "content", *, threads: int | None = None) -> Verified:
    """Look for everything that is wrong with the archive at C(path).

    C(structure) checks the header, each extent's header, and that every cluster of every device is there once. It
    reads no data where the archive is not compressed. C(content) reads all and checks the digests, where there are.

    Raises: RequestError where the file cannot be opened, ToolError where a tool is missing. A problem of the archive
    is never raised: it is returned.
    """
    began = time.monotonic()
    collector = _Collector()
    header: Header | None = None
    compression: str | None = None
    integrity: str | None = None
    verification = Verification(level, collector.problems, collector.counts, {})
    try:
        with Reader(path, collector) as reader:
            header = reader.header
            compression = reader.stream.compression
            by_content = level == "content"
            reader.scan(_look if by_content else None, threads=(threads or usable_cpus()) if by_content else 1)
            statistics = reader.statistics
            integrity = statistics.integrity
            verification.extents = statistics.extents
            verification.clusters = statistics.clusters
            verification.data_bytes = statistics.data_bytes
            verification.zero_bytes = statistics.clusters * CLUSTER_SIZE - statistics.data_bytes
            verification.read_bytes = header.size + statistics.read_bytes
            verification.good_until = reader.end
            is_sound = not any(reader.doubts(problem) for problem in collector.problems)
            for device in header.devices:
                verification.whole[device.name] = is_sound and device.dev_id not in reader.damaged
    except ArchiveError as error:
        collector(error.problem)
    collector.problems.sort(key=lambda problem: (problem.offset is None, problem.offset or 0))
    if collector.problems and collector.problems[0].offset is not None:
        verification.good_until = min(collector.problems[0].offset, verification.good_until)
    verification.elapsed = time.monotonic() - began
    return Verified(header, compression, integrity, verification)


__all__ = ("LEVELS", "PROBLEM_LIMIT", "Verification", "Verified", "verify")
