# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Disk images and configs in, an archive out: under its name only when it is whole and on disk."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import time
import typing as t
import uuid as uuid_module

from . import layout
from .archive_file import Sink, check_level, compression_of, open_sink, usable_cpus
from .compare import differing
from .errors import ArchiveError, RequestError, SourceError
from .image import SourceImage, drop_behind
from .layout import BLOCK_SIZE, CLUSTER_SIZE, EXTENT_DATA_SIZE, EXTENT_HEADER_SIZE, SECTOR_SIZE, Config, Device
from .parallel import Crew, Throttle, Turns
from .pending_file import PendingFile
from .qemu import open_source
from .reader import Reader

OVERWRITE: tuple[str, ...] = ("changed", "never", "always")
_ZERO_BLOCK = bytes(BLOCK_SIZE)


@dataclasses.dataclass(frozen=True)
class SourceDevice:
    """A disk to be archived. C(format) is a format's name as QEMU's tools know it; C(raw) needs no tool."""

    name: str
    path: str
    format: str = "raw"


@dataclasses.dataclass(frozen=True)
class Created:
    """What create() did. C(reason) says why the archive is, or would be, written; None where it stays.

    C(read_bytes) were read from the images, C(data_bytes) are stored in the archive. C(elapsed) is in seconds.
    C(is_new) says that there was no file before.
    """

    changed: bool
    reason: str | None
    read_bytes: int = 0
    data_bytes: int = 0
    elapsed: float = 0.0
    is_new: bool = False


def create(
    dest: str,
    devices: t.Sequence[SourceDevice] = (),
    configs: t.Sequence[Config] = (),
    *,
    compression: str = "auto",
    level: int | None = None,
    threads: int | None = None,
    integrity: str = "sha256",
    overwrite: str = "changed",
    uuid: str | None = None,
    ctime: int | None = None,
    bytes_per_second: int | None = None,
    dry_run: bool = False,
) -> Created:
    """Make the archive C(dest) of these devices and configs.

    C(overwrite) says what becomes of a file that is there: C(changed) replaces it only where it is not an archive of
    exactly these devices and configs, in this compression, with this integrity and, where they are given, this C(uuid)
    and C(ctime). C(dry_run) writes nothing and tells whether an archive would be written.

    Raises: RequestError for what cannot be done as asked; SourceError where an image cannot be read or changes
    meanwhile; TargetError, SpaceError, BusyError where the archive cannot be written; ToolError.
    """
    began = time.monotonic()
    compression = compression_of(dest, compression)
    check_level(compression, level)
    if not os.path.isdir(os.path.dirname(os.path.abspath(dest))):
        raise RequestError("the folder for the archive does not exist", file=dest, remedy="Make it first.")
    if overwrite == "never" and os.path.lexists(dest):
        return Created(False, None)
    threads = threads or usable_cpus()
    with contextlib.ExitStack() as stack:
        sources = [_open_device(stack, device, dest) for device in devices]
        headed = [
            Device(number, device.name, -(-source.size // SECTOR_SIZE) * SECTOR_SIZE)
            for number, (device, source) in enumerate(zip(devices, sources), 1)
        ]
        new_uuid = _parse_uuid(uuid) if uuid is not None else uuid_module.uuid4().bytes
        header = layout.build_header(new_uuid, int(time.time()) if ctime is None else ctime, headed, configs)
        reason: str | None = "the archive is rewritten always" if overwrite == "always" else None
        is_new = not os.path.lexists(dest)
        if overwrite == "never" and not is_new:  # it appeared while the sources were opened
            return Created(False, None)
        if is_new:
            reason = "there is no such file"
        elif reason is None:
            asked = _Asked(tuple(headed), tuple(configs), compression, integrity, new_uuid if uuid else None, ctime)
            reason = _difference(dest, asked, sources, threads, bytes_per_second)
        if reason is None or dry_run:
            for source in sources:
                source.check_unchanged()
            return Created(reason is not None, reason, elapsed=time.monotonic() - began, is_new=is_new)
        writer = _Writer(headed, sources, new_uuid, integrity == "sha256", bytes_per_second)
        pending = PendingFile(dest, may_replace=overwrite != "never")
        stack.callback(pending.discard)
        if overwrite == "never" and os.path.lexists(dest):
            return Created(False, None)
        sink = open_sink(pending, compression, level, threads)
        stack.callback(sink.close)
        writer.write(sink, header, threads)
        for source in sources:
            source.check_unchanged()
            drop_behind(source.fd, 0, 0)
        pending.sync()
        drop_behind(pending.fd, 0, 0)
        if not pending.commit():
            return Created(False, None)
        return Created(True, reason, writer.read_bytes, writer.data_bytes, time.monotonic() - began, is_new)


def _parse_uuid(text: str) -> bytes:
    try:
        return uuid_module.UUID(text).bytes
    except ValueError as error:
        raise RequestError(f"expected a UUID such as 01234567-89ab-cdef-0123-456789abcdef, got {text!r}") from error


def _open_device(stack: contextlib.ExitStack, device: SourceDevice, dest: str) -> SourceImage:
    source = stack.enter_context(open_source(device.path, device.format, os.path.dirname(os.path.abspath(dest))))
    if source.size == 0:
        raise SourceError(f"the image of the device {device.name!r} is empty", file=device.path)
    if os.path.exists(dest) and os.path.samefile(device.path, dest):
        raise RequestError(f"the image of the device {device.name!r} is the archive itself", file=dest)
    return source


# --- does the file that is there hold this already? -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Asked:
    devices: tuple[Device, ...]
    configs: tuple[Config, ...]
    compression: str
    integrity: str
    uuid: bytes | None
    ctime: int | None


def _difference(
    dest: str, asked: _Asked, sources: t.Sequence[SourceImage], threads: int, bytes_per_second: int | None
) -> str | None:
    """Why the archive at C(dest) is not what is asked for; None where it is."""
    try:
        with Reader(dest) as reader:
            present = reader.header
            if reader.stream.compression != asked.compression:
                return f"the compression is {reader.stream.compression}, not {asked.compression}"
            if asked.uuid is not None and present.uuid != asked.uuid:
                return f"the UUID is {present.uuid_text}"
            if asked.ctime is not None and present.ctime != asked.ctime:
                return f"the creation time is {present.ctime}"
            if sorted(present.configs, key=lambda config: config.name) != sorted(
                asked.configs, key=lambda config: config.name
            ):
                return "the configs differ"
            by_name = {device.name: device for device in present.devices}
            if {device.name: device.size for device in asked.devices} != {
                device.name: device.size for device in present.devices
            }:
                return "the devices' names or sizes differ"
            if not present.devices:
                reader.scan(None)
            images = {by_name[device.name].dev_id: source for device, source in zip(asked.devices, sources)}
            differences = differing(reader, images, threads=threads, bytes_per_second=bytes_per_second)
            for device in present.devices:
                if device.dev_id in differences:
                    return f"the device {device.name!r} differs at offset {differences[device.dev_id]}"
            if reader.statistics.integrity != asked.integrity:
                return f"the integrity is {reader.statistics.integrity}"
    except ArchiveError as error:
        return f"the file is not a whole archive: {error.problem}"
    return None


# --- writing ----------------------------------------------------------------------------------------------------------


_HOLE_BATCH = 256
"""Extents without data that a thread makes in one turn: they are headers alone."""

_Runs = t.Sequence["tuple[int, int, int]"]
"""The stretches of clusters that fill an extent's slots: dev_id, first cluster, count."""


class _Writer:
    """Turns images into extents, several at a time, and gives them to a sink in order."""

    def __init__(
        self,
        devices: t.Sequence[Device],
        sources: t.Sequence[SourceImage],
        uuid: bytes,
        with_digests: bool,
        bytes_per_second: int | None,
    ) -> None:
        self._devices = {device.dev_id: device for device in devices}
        self._sources = {device.dev_id: source for device, source in zip(devices, sources)}
        self._uuid = uuid
        self._with_digests = with_digests
        self._bytes_per_second = bytes_per_second
        self._counting = threading.Lock()
        self.read_bytes = 0
        self.data_bytes = 0

    def write(self, sink: Sink, header: bytes, threads: int) -> None:
        """Write the whole archive. Raises: SourceError, TargetError, SpaceError, ToolError."""

        def interrupt() -> None:
            sink.interrupt()
            turns.wake()

        crew = Crew(interrupt)
        turns = Turns(crew)
        throttle = Throttle(self._bytes_per_second, crew)
        tasks = enumerate(self._tasks())
        choosing = threading.Lock()

        def work() -> None:
            memory = bytearray(EXTENT_HEADER_SIZE + EXTENT_DATA_SIZE)
            while True:
                crew.check()
                with choosing:
                    number, extents = next(tasks, (0, None))
                if extents is None:
                    return
                end = 0
                for runs in extents:
                    end = self._make_extent(runs, memory, end, throttle)
                data = sink.encode(memoryview(memory)[:end])
                with turns.turn(number):
                    offset = sink.append(data)
                if offset is not None:
                    sink.write(offset, data)

        start = sink.encode(bytearray(header))
        offset = sink.append(start)
        if offset is not None:
            sink.write(offset, start)
        crew.run(work, threads)
        sink.finish()

    def _tasks(self) -> t.Iterator[list[_Runs]]:
        """The extents in order, each alone, or many together where they are headers only."""
        holes: list[_Runs] = []
        for runs in self._extents():
            is_hole = self._is_hole(runs)
            if is_hole:
                holes.append(runs)
            if holes and (not is_hole or len(holes) == _HOLE_BATCH):
                yield holes
                holes = []
            if not is_hole:
                yield [runs]
        if holes:
            yield holes

    def _extents(self) -> t.Iterator[_Runs]:
        """Device after device, each slot filled."""
        runs: list[tuple[int, int, int]] = []
        free = layout.SLOTS
        for device in self._devices.values():
            cluster = 0
            while cluster < device.clusters:
                count = min(free, device.clusters - cluster)
                runs.append((device.dev_id, cluster, count))
                cluster += count
                free -= count
                if not free:
                    yield runs
                    runs = []
                    free = layout.SLOTS
        if runs or not self._devices:  # without any extent, Proxmox VE takes an archive for cut short
            yield runs

    def _is_hole(self, runs: _Runs) -> bool:
        for dev_id, cluster, count in runs:
            start = cluster * CLUSTER_SIZE
            stop = start + count * CLUSTER_SIZE
            if self._devices[dev_id].name == layout.VMSTATE or self._sources[dev_id].next_data(start, stop)[0] < stop:
                return False
        return True

    def _make_extent(self, runs: _Runs, memory: bytearray, begin: int, throttle: Throttle) -> int:
        """Put the extent's bytes into C(memory) from C(begin) on. Returns where they end."""
        stored = 0
        slot = 0
        end = data_at = begin + EXTENT_HEADER_SIZE
        read = 0
        for dev_id, cluster, count in runs:
            bits, end, part = self._gather(dev_id, cluster, count, memory, end, throttle)
            stored |= bits << slot * layout.BLOCKS_PER_CLUSTER
            slot += count
            read += part
        header = layout.build_extent(self._uuid, runs, stored)
        digest = None
        if self._with_digests:
            memory[begin:data_at] = header
            digest = layout.extent_digest(memoryview(memory)[begin:end])
        layout.seal_extent(header, digest)
        memory[begin:data_at] = header
        with self._counting:
            self.read_bytes += read
            self.data_bytes += end - data_at
        return end

    def _gather(
        self, dev_id: int, cluster: int, count: int, memory: bytearray, end: int, throttle: Throttle
    ) -> tuple[int, int, int]:
        """Read the clusters' blocks that are not zero to C(memory) from C(end) on.

        Returns a bit for each block that is stored, the new end, and how many bytes were read.
        """
        view = memoryview(memory)
        source = self._sources[dev_id]
        start = cluster * CLUSTER_SIZE
        stop = min(start + count * CLUSTER_SIZE, source.size)
        if self._devices[dev_id].name == layout.VMSTATE:
            return self._gather_whole(source, start, stop, count, view, end, throttle)
        bits = 0
        read = 0
        while start < stop:
            data_start, data_stop = source.next_data(start, stop)
            if data_start >= stop:
                break
            first = data_start // BLOCK_SIZE
            data_start = first * BLOCK_SIZE
            data_stop = min(stop, -(-data_stop // BLOCK_SIZE) * BLOCK_SIZE)
            length = data_stop - data_start
            padded = -(-length // BLOCK_SIZE) * BLOCK_SIZE
            if end + padded > len(view):  # many extents share the memory of one where they were all hole
                raise SourceError(
                    f"data appeared in a hole at offset {data_start}",
                    file=source.path,
                    remedy="It changed while it was read: back up a snapshot, or stop what writes to it.",
                )
            throttle.take(length)
            source.read(view[end : end + length], data_start)
            drop_behind(source.fd, data_start, length)
            read += length
            view[end + length : end + padded] = bytes(padded - length)
            found, end = _squeeze(memory, end, padded)
            bits |= found << first - cluster * layout.BLOCKS_PER_CLUSTER
            start = data_stop
        return bits, end, read

    def _gather_whole(
        self, source: SourceImage, start: int, stop: int, count: int, view: memoryview, end: int, throttle: Throttle
    ) -> tuple[int, int, int]:
        """Like _gather(), for a RAM state: Proxmox VE drops blocks that are left out, so all of them are stored."""
        length = stop - start
        throttle.take(length)
        source.read(view[end : end + length], start)
        drop_behind(source.fd, start, length)
        view[end + length : end + count * CLUSTER_SIZE] = bytes(count * CLUSTER_SIZE - length)
        return (1 << count * layout.BLOCKS_PER_CLUSTER) - 1, end + count * CLUSTER_SIZE, length


def _squeeze(memory: bytearray, begin: int, length: int) -> tuple[int, int]:
    """Drop the zero blocks of a stretch of memory: what is left moves down to C(begin).

    Returns a bit for each block that is left, and where they end now.
    """
    view = memoryview(memory)
    is_zero = memory.startswith
    zeros = bytes([is_zero(_ZERO_BLOCK, at) for at in range(begin, begin + length, BLOCK_SIZE)])
    bits = 0
    end = begin
    first = zeros.find(0)
    while first >= 0:
        last = zeros.find(1, first)
        if last < 0:
            last = len(zeros)
        bits |= ((1 << last - first) - 1) << first
        size = (last - first) * BLOCK_SIZE
        source = begin + first * BLOCK_SIZE
        if source != end:
            view[end : end + size] = view[source : source + size]
        end += size
        first = zeros.find(0, last)
    return bits, end


__all__ = ("OVERWRITE", "Created", "SourceDevice", "create")
