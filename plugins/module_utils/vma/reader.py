# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""An open archive: its header, and its extents followed from first to last, each checked on the way.

Verifying, extracting and comparing all read through this room; they differ in what they do with an extent's data, and
in whether a problem ends the reading or is written down.
"""

from __future__ import annotations

import os
import threading
import typing as t

from . import layout
from .archive_file import Stream, open_archive, open_stream
from .coverage import AnyCoverage, Budget, Coverage, StreamCoverage
from .errors import ArchiveError, Problem, Report, refuse
from .image import drop_behind
from .layout import CLUSTER_SIZE, EXTENT_HEADER_SIZE, Device, Extent, Header, Run, Segment
from .parallel import Crew, Throttle

_RESYNC_CHUNK = 1 << 20
_PAGE_SIZE = 4096
"""Bytes that the kernel reads at least: where one of them cannot be read, none of them can."""
_VMSTATE_SLACK = 1 << 30
"""Bytes that a vmstate may be longer than its size in the header says, on top of twice that size."""


Visitor = t.Callable[[memoryview, "list[Segment]"], None]
"""What an operation does with an extent's data and its segments, which all lie within their devices.

Called from several threads at once, in any order.
"""


_BATCH_SIZE = 1 << 16
"""Bytes of extents after which a thread has enough to do; zero clusters make extents of 512 bytes."""
_EMPTY_EXTENTS = 64
"""Extents without any cluster that are put up with: Proxmox VE writes one where an archive has no device."""


class Statistics:
    """What a scan counted. C(read_bytes) are bytes of the uncompressed archive."""

    def __init__(self) -> None:
        self.extents = 0
        self.clusters = 0
        self.data_bytes = 0
        self.read_bytes = 0
        self.with_digest = 0

    @property
    def integrity(self) -> str | None:
        """C(sha256) where every extent carries a digest, C(none) where not; None as long as no extent was read."""
        if not self.extents:
            return None
        return "sha256" if self.with_digest == self.extents else "none"


class Reader:
    """An archive that is open for reading. Use it as a context manager."""

    def __init__(self, path: str, report: Report = refuse) -> None:
        """Open the archive and read its header, and nothing behind it.

        C(report) gets each problem. By default the first one is raised.

        Raises: ArchiveError where there is no header to be read, RequestError, ToolError.
        """
        self.path = path
        self.statistics = Statistics()
        self.damaged: set[int] = set()
        """The devices of which something is known to be wrong."""
        self._report_to = report
        self._counting = threading.Lock()
        self._ended = False
        self._fd = open_archive(path)
        self._stream: Stream | None = None
        try:
            self.status = os.fstat(self._fd)
            self.file_size = self.status.st_size
            self._stream = open_stream(self._fd)
            self.header = self._read_header(self._stream)
        except BaseException as error:
            self.close()
            if isinstance(error, ArchiveError):
                error.file = path
            raise
        self._position = self.header.size
        self._budget = Budget()
        self.coverage: dict[int, AnyCoverage] = {
            device.dev_id: StreamCoverage(device.clusters)
            if device.name == layout.VMSTATE
            else Coverage(device.clusters, self._budget)
            for device in self.header.devices
        }
        self._devices = {device.dev_id: device for device in self.header.devices}
        self._length_limit = self._longest_stream()

    @property
    def stream(self) -> Stream:
        """The uncompressed bytes. Raises: ValueError after close()."""
        if self._stream is None:
            raise ValueError("the archive is closed")
        return self._stream

    def report_to(self, report: Report) -> None:
        """From now on problems go to C(report)."""
        self._report_to = report

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file. May be called more than once."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _report(self, problem: Problem) -> None:
        try:
            self._report_to(problem)
        except ArchiveError as error:
            error.file = self.path
            raise

    def _read_header(self, stream: Stream) -> Header:
        fixed = bytearray(layout.HEADER_FIXED_SIZE)
        size = layout.parse_header_size(memoryview(fixed)[: stream.read(0, memoryview(fixed))])
        data = bytearray(size)
        data[: len(fixed)] = fixed
        count = len(fixed) + stream.read(len(fixed), memoryview(data)[len(fixed) :])
        if count < size:
            raise ArchiveError(Problem("truncated", f"expected {size} bytes of header, found {count}", count))
        return layout.parse_header(data, self._report)

    def _longest_stream(self) -> int:
        """The most bytes that an archive of these devices can have: an extent for each cluster. Stops bombs."""
        clusters = _EMPTY_EXTENTS
        for device in self.header.devices:
            clusters += device.clusters
            if device.name == layout.VMSTATE:
                clusters += device.clusters + _VMSTATE_SLACK // CLUSTER_SIZE
        return self.header.size + clusters * (EXTENT_HEADER_SIZE + CLUSTER_SIZE)

    @property
    def end(self) -> int:
        """The offset behind the last extent that could be followed."""
        return self._position

    def doubts(self, problem: Problem) -> bool:
        """Whether the problem casts doubt on all devices, as a damaged header does."""
        return problem.kind in ("header_checksum", "header_invalid")

    def size_of(self, device: Device) -> int:
        """How many bytes the device has. A vmstate's size is told by its clusters, so it is known after the scan."""
        stored = t.cast(StreamCoverage, self.coverage[device.dev_id]).next if device.name == layout.VMSTATE else 0
        return device.size if stored <= device.clusters else stored * CLUSTER_SIZE

    # --- following the extents ----------------------------------------------------------------------------------------

    def scan(
        self,
        visit: Visitor | None,
        *,
        threads: int = 1,
        wanted: t.Container[int] | None = None,
        bytes_per_second: int | None = None,
        until_complete: bool = False,
    ) -> None:
        """Follow the extents to the end, check each, and hand it to C(visit). Call this once.

        Without C(visit) no data is read where the file can be skipped through. C(wanted) are the dev_ids whose data
        is needed, all by default; extents without them are not read. C(until_complete) ends the scan as soon as all
        clusters of the wanted devices have come, where what follows could tell nothing of them.

        Raises: ArchiveError where the report raises it; what C(visit) raises.
        """
        stream = self.stream
        if stream.seekable:
            # Reading ahead of headers that are megabytes apart would read all of the archive.
            advice = os.POSIX_FADV_RANDOM if visit is None else os.POSIX_FADV_SEQUENTIAL
            os.posix_fadvise(self._fd, 0, 0, advice)
        crew = Crew(stream.interrupt)
        throttle = Throttle(bytes_per_second, crew)
        most_data = min(layout.EXTENT_DATA_SIZE, self.file_size if stream.seekable else layout.EXTENT_DATA_SIZE)
        turn = threading.Lock()

        def work() -> None:
            view = memoryview(bytearray(_BATCH_SIZE + EXTENT_HEADER_SIZE + most_data))
            while True:
                crew.check()
                with turn:
                    batch = self._next_extents(view, wanted if until_complete else ())
                if not batch:
                    return
                if visit is None:
                    continue
                for offset, extent, whole in batch:
                    if wanted is not None and not any(run.dev_id in wanted for run in extent.runs):
                        continue
                    throttle.take(len(whole))
                    if self._load(offset, extent, whole) and self._check_digest(offset, extent, whole):
                        visit(whole[EXTENT_HEADER_SIZE:], self._segments(extent.runs))

        crew.run(work, threads)
        self._drop_behind()
        if not self.header.devices and not self.statistics.extents:
            message = "expected an extent behind the header, as every writer makes one; found the end"
            self._report(Problem("truncated", message, self.header.size))
        self._report_missing(wanted)

    def _is_proven(self, wanted: t.Container[int] | None) -> bool:
        """Whether nothing behind this place can tell more of the wanted devices.

        Behind a decompressor it can: without digests, the compression's own checksum at the end is all there is.
        """
        return self._is_complete(wanted) and (self.stream.seekable or self.statistics.integrity == "sha256")

    def _is_complete(self, wanted: t.Container[int] | None = None) -> bool:
        return not any(
            coverage.missing for dev_id, coverage in self.coverage.items() if wanted is None or dev_id in wanted
        )

    def _report_missing(self, wanted: t.Container[int] | None) -> None:
        for device in self.header.devices:
            coverage = self.coverage[device.dev_id]
            if coverage.missing and (wanted is None or device.dev_id in wanted):
                self.damaged.add(device.dev_id)
                first = coverage.first_missing()
                message = (
                    f"{coverage.missing} of {device.clusters} clusters of {device.name!r} are missing, from {first} on"
                )
                self._report(Problem("cluster_missing", message, device=device.name, cluster=first))

    def _next_extents(self, view: memoryview, awaited: t.Container[int] | None) -> list[tuple[int, Extent, memoryview]]:
        """The next extents, one or as many small ones as make a thread's turn worth its while; none at the end.

        Each comes with its offset and the part of C(view) that is its own. None comes once all clusters of the
        devices in C(awaited) have, if there are any such.
        """
        batch: list[tuple[int, Extent, memoryview]] = []
        used = 0
        while used < _BATCH_SIZE and (awaited == () or not self._is_proven(awaited)):
            found = self._next_extent(view[used:])
            if found is None:
                break
            offset, extent = found
            size = EXTENT_HEADER_SIZE + extent.data_size
            batch.append((offset, extent, view[used : used + size]))
            used += size
        return batch

    def _next_extent(self, view: memoryview) -> tuple[int, Extent] | None:
        """Read, check and account for the next extent whose header is sound; None at the end.

        C(view) gets the header as the digest covers it, and the data where the stream comes only once.
        """
        while not self._ended:
            offset = self._position
            count = 0
            try:
                count = self.stream.read(offset, view[:EXTENT_HEADER_SIZE])
                if not count:
                    break
                extent = self._parse(offset, view[:count])
            except ArchiveError as error:
                if not self._can_go_on(error.problem):
                    self._end_with(error.problem)
                    break
                self._report(error.problem)
                self.stream.unread(view[1:count])
                if not self._resync(max(offset + 1, error.problem.offset or 0)):
                    break
                continue
            view[:EXTENT_HEADER_SIZE] = extent.blank
            end = offset + EXTENT_HEADER_SIZE + extent.data_size
            try:
                self._require(offset, extent, view[EXTENT_HEADER_SIZE : end - offset])
                self._account(offset, extent)
            except ArchiveError as error:
                self._end_with(error.problem)
                break
            self._position = end
            return offset, extent
        self._ended = True
        return None

    def _parse(self, offset: int, header: memoryview) -> Extent:
        if offset >= self._length_limit:
            message = f"the archive goes on after {offset} bytes, which is more than its devices can take"
            raise ArchiveError(Problem("trailing_data", message, offset))
        try:
            return layout.parse_extent(header, self.header.uuid, offset)
        except ArchiveError as error:
            if error.problem.kind not in ("extent_magic", "truncated") or not self._is_complete():
                raise
            more = f"{self.file_size - offset} B more" if self.stream.seekable else "more"
            message = f"expected the end, since all clusters have come; found {more}, which is no extent"
            raise ArchiveError(Problem("trailing_data", message, offset)) from error

    def _end_with(self, problem: Problem) -> None:
        """Report the problem behind which nothing is read.

        Where the extents carry no digests, the compression's own checksum at the end vouches for all data that came
        before it. Without having got there, nothing is known to be right.
        """
        if not self.stream.seekable and not self.stream.is_checked and self.statistics.integrity != "sha256":
            self.damaged.update(self._devices)
        self._report(problem)

    def _can_go_on(self, problem: Problem) -> bool:
        """Whether what follows the problem may still be read."""
        return problem.kind in _LOST or (problem.kind == "read_error" and self.stream.seekable)

    def _resync(self, position: int) -> bool:
        """Look from C(position) on for the next sound extent header, and continue there. False where there is none."""
        memory = bytearray(_RESYNC_CHUNK)
        view = memoryview(memory)
        while True:
            if position >= self._length_limit:
                self._position = position  # where _parse() says that the archive is too long
                return True
            try:
                position, count = self._read_on(position, view)
            except ArchiveError as error:
                self._end_with(error.problem)
                return False
            at = memory.find(layout.EXTENT_MAGIC, 0, count)
            while 0 <= at <= count - EXTENT_HEADER_SIZE:
                if layout.is_extent(view[at : at + EXTENT_HEADER_SIZE], self.header.uuid):
                    self.stream.unread(view[at:count])
                    self._position = position + at
                    return True
                at = memory.find(layout.EXTENT_MAGIC, at + 1, count)
            if count < EXTENT_HEADER_SIZE:
                return False
            overlap = EXTENT_HEADER_SIZE - 1
            self.stream.unread(view[count - overlap : count])
            position += count - overlap

    def _read_on(self, position: int, view: memoryview) -> tuple[int, int]:
        """Fill C(view) from C(position), or from behind what cannot be read there. Returns where, and how many came.

        Bytes that can be read come first. Of a storage that is gone altogether, one place in each megabyte is tried.
        """
        step = _PAGE_SIZE
        while True:
            try:
                return position, self.stream.read(position, view)
            except ArchiveError as error:
                bad = error.problem.offset
                if bad is None or bad >= self.file_size or not self.stream.seekable:
                    raise
                if bad - position >= EXTENT_HEADER_SIZE:
                    view = view[: bad - position]
                    continue
                if bad > position:
                    self._report(error.problem)
                position = bad - bad % _PAGE_SIZE + step
                step = min(2 * step, _RESYNC_CHUNK)

    def _require(self, offset: int, extent: Extent, data: memoryview) -> None:
        """See that the archive holds the extent's data; read it now where the stream comes only once."""
        begin = offset + EXTENT_HEADER_SIZE
        statistics = self.statistics
        if self.stream.seekable:
            statistics.read_bytes += EXTENT_HEADER_SIZE
            if begin + extent.data_size <= self.file_size:
                return
            present = max(0, self.file_size - begin)
        else:
            present = self.stream.read(begin, data)
            statistics.read_bytes += EXTENT_HEADER_SIZE + present
            self._drop_behind()
            if present == extent.data_size:
                return
        self._mark_damaged(extent)
        message = f"expected {extent.data_size} bytes of data after the extent header, found {present}"
        raise ArchiveError(Problem("truncated", message, offset))

    def _account(self, offset: int, extent: Extent) -> None:
        statistics = self.statistics
        has_digest = extent.digest is not None
        if statistics.extents and has_digest != bool(statistics.with_digest):
            others = "carry none" if has_digest else "do"
            carries = "carries a digest" if has_digest else "carries no digest"
            self._mark_damaged(extent)
            self._report(Problem("extent_digest", f"the extent {carries}, but the ones before it {others}", offset))
        statistics.extents += 1
        statistics.with_digest += has_digest
        statistics.data_bytes += extent.data_size
        for run in extent.runs:
            statistics.clusters += run.clusters
            device = self._devices.get(run.dev_id)
            if device is None:
                message = f"{run.clusters} clusters of device {run.dev_id}, which the header does not have"
                self._report(Problem("unknown_device", message, offset, cluster=run.cluster))
                continue
            coverage = self.coverage[run.dev_id]
            if isinstance(coverage, StreamCoverage):
                self._account_stream(offset, run, device, coverage)
            else:
                self._account_clusters(offset, run, device, coverage)

    def _account_clusters(self, offset: int, run: Run, device: Device, coverage: Coverage) -> None:
        count = run.clusters
        if run.cluster + count >= device.clusters:
            count = self._check_end(offset, run, device)
        for cluster in coverage.add(run.cluster, count):
            self.damaged.add(device.dev_id)
            message = f"cluster {cluster} of {device.name!r} comes a second time"
            self._report(Problem("cluster_duplicate", message, offset, device.name, cluster))

    def _check_end(self, offset: int, run: Run, device: Device) -> int:
        """Check a run that reaches the device's end, or further. Returns how many of its clusters lie within."""
        message = None
        inside = max(0, min(run.clusters, device.clusters - run.cluster))
        blocks = -(-(device.size - (device.clusters - 1) * CLUSTER_SIZE) // layout.BLOCK_SIZE)
        if inside < run.clusters:
            first = run.cluster + inside
            message = f"clusters from {first} on are outside of {device.name!r}, which has {device.clusters} clusters"
        elif run.mask != layout.FULL_MASK and run.mask >> blocks:
            first = device.clusters - 1
            message = f"the last cluster of {device.name!r} has {blocks} blocks, the mask {run.mask:#06x} has more"
        if message is not None:
            self.damaged.add(device.dev_id)
            self._report(Problem("cluster_out_of_range", message, offset, device.name, first))
        return inside

    def _account_stream(self, offset: int, run: Run, device: Device, coverage: StreamCoverage) -> None:
        if run.cluster != coverage.next:
            self.damaged.add(device.dev_id)
            message = f"expected cluster {coverage.next} of the RAM state next, found {run.cluster}"
            self._report(Problem("vmstate_order", message, offset, device.name, run.cluster))
        coverage.next = run.cluster + run.clusters
        limit = 2 * device.clusters + _VMSTATE_SLACK // CLUSTER_SIZE
        if coverage.next > limit:
            message = f"the RAM state has more than {limit} clusters, its size in the header tells of {device.clusters}"
            raise ArchiveError(Problem("cluster_out_of_range", message, offset, device.name, coverage.next - 1))

    def _mark_damaged(self, extent: Extent) -> None:
        self.damaged.update(run.dev_id for run in extent.runs)

    # --- data ---------------------------------------------------------------------------------------------------------

    def _load(self, offset: int, extent: Extent, whole: memoryview) -> bool:
        """Read the data behind the header where that was not done yet. False where it cannot be had."""
        if not self.stream.seekable or not extent.data_size:
            return True
        data = whole[EXTENT_HEADER_SIZE:]
        begin = offset + EXTENT_HEADER_SIZE
        try:
            count = self.stream.read(begin, data)
            if count < len(data):
                message = f"expected {len(data)} bytes of data, found {count}: the file shrank while it was read"
                raise ArchiveError(Problem("truncated", message, offset))
        except ArchiveError as error:
            self._mark_damaged(extent)
            self._report(error.problem)
            return False
        drop_behind(self._fd, offset, len(whole))
        with self._counting:
            self.statistics.read_bytes += count
        return True

    def _check_digest(self, offset: int, extent: Extent, whole: memoryview) -> bool:
        """Whether the extent's digest, where it carries one, is that of its bytes."""
        if extent.digest is None:
            return True
        actual = layout.extent_digest(whole)
        if actual == extent.digest:
            return True
        self._mark_damaged(extent)
        first = extent.runs[0] if extent.runs else None
        device = None if first is None else self._devices.get(first.dev_id)
        message = (
            f"the {len(whole)} bytes of the extent were changed: expected the SHA-256 {bytes(extent.digest).hex()}, "
            f"found {actual.hex()}; it holds {self._contents(extent)}"
        )
        self._report(
            Problem(
                "extent_digest",
                message,
                offset,
                None if device is None else device.name,
                None if first is None else first.cluster,
            )
        )
        return False

    def _contents(self, extent: Extent) -> str:
        ranges: list[list[int]] = []
        for run in extent.runs:
            if ranges and ranges[-1][0] == run.dev_id and ranges[-1][2] == run.cluster:
                ranges[-1][2] += run.clusters
            else:
                ranges.append([run.dev_id, run.cluster, run.cluster + run.clusters])
        names = {dev_id: device.name for dev_id, device in self._devices.items()}
        parts = [f"clusters {first} to {end - 1} of {names.get(dev_id, dev_id)!r}" for dev_id, first, end in ranges]
        if not parts:
            return "no clusters"
        return ", ".join(parts[:3]) + (f" and {len(parts) - 3} more stretches" if len(parts) > 3 else "")

    def _segments(self, runs: list[Run]) -> list[Segment]:
        """The runs' segments, or what of them lies within their devices."""
        found = layout.segments(runs)
        if not any(self._reaches_end(run) for run in runs):
            return found
        inside = []
        for segment in found:
            device = self._devices.get(segment.dev_id)
            if device is None:
                continue
            limit = device.size if device.name != layout.VMSTATE else segment.start + segment.length
            length = min(segment.length, limit - segment.start)
            if length > 0:
                inside.append(segment._replace(length=length))
        return inside

    def _reaches_end(self, run: Run) -> bool:
        device = self._devices.get(run.dev_id)
        return device is None or run.cluster + run.clusters >= device.clusters

    def _drop_behind(self) -> None:
        if not self.stream.seekable:
            drop_behind(self._fd, 0, os.lseek(self._fd, 0, os.SEEK_CUR))


_LOST = ("extent_magic", "extent_checksum", "extent_uuid", "extent_block_count")
"""After these, what follows may still be read: its headers are looked for."""

__all__ = ("Reader", "Statistics", "Visitor")
