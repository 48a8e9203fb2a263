# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""An archive in, disk images and configs out: all that was asked for, whole, or an error.

Files that are there already are compared first; what is to be written goes to files beside them, which take their
names after the last extent was read and found sound. Block devices are written in place, and only where they differ.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import stat
import threading
import time
import typing as t

from . import layout, qemu
from .archive_file import usable_cpus
from .compare import differing
from .errors import ArchiveError, Problem, RequestError, SpaceError, TargetError, ToolError
from .image import (
    NewFile,
    SourceImage,
    Target,
    check_block_size,
    clone_for_patch,
    has_live_times,
    open_patch,
    refuse_used,
)
from .layout import Config, Device, Header, Segment
from .pending_file import PendingFile, sync_folder, target_errors
from .reader import Reader

OVERWRITE: tuple[str, ...] = ("changed", "never", "always")


@dataclasses.dataclass(frozen=True)
class DeviceRequest:
    """A device to extract. Without C(path) it goes to the destination folder under a name made from its own."""

    name: str
    path: str | None = None
    format: str = "raw"


@dataclasses.dataclass
class ExtractedDevice:
    """What became of a device. C(reason) says why its target was, or would be, written; None where it stayed.

    C(is_new) says that there was no target before.
    """

    name: str
    path: str
    size: int
    format: str = "raw"
    written_bytes: int = 0
    changed: bool = False
    reason: str | None = None
    is_new: bool = False


@dataclasses.dataclass
class ExtractedConfig:
    """What became of a config. C(before) is what the file held, None where there was none."""

    name: str
    path: str
    size: int
    data: bytes
    before: bytes | None = None
    changed: bool = False

    @property
    def is_new(self) -> bool:
        """Whether there was no file before."""
        return self.before is None


@dataclasses.dataclass
class Extracted:
    """What extract() did, or with C(dry_run) would do. C(elapsed) is in seconds."""

    devices: list[ExtractedDevice]
    configs: list[ExtractedConfig]
    folder_made: bool = False
    integrity: str | None = None
    elapsed: float = 0.0

    def items(self) -> list[ExtractedDevice | ExtractedConfig]:
        """All targets."""
        return [*self.devices, *self.configs]

    @property
    def changed(self) -> bool:
        """Whether anything was, or would be, written."""
        return self.folder_made or any(item.changed for item in self.items())


def extract(
    src: str,
    dest: str,
    *,
    devices: t.Sequence[DeviceRequest] | None = None,
    configs: t.Sequence[str] | None = None,
    overwrite: str = "changed",
    in_place: bool = False,
    check_space: bool = True,
    bytes_per_second: int | None = None,
    threads: int | None = None,
    dry_run: bool = False,
) -> Extracted:
    """Bring devices and configs of the archive C(src) to the folder C(dest), or to the paths that are given.

    C(devices) and C(configs) are all of them by default. C(overwrite) says what becomes of targets that are there:
    C(changed) writes what differs, C(never) leaves them alone, C(always) writes them anew. C(in_place) patches files
    where they lie; block devices always are. With C(check_space) targets that may not fit are refused before the first
    write. C(dry_run) compares and writes nothing.

    Where only some devices are asked for, reading ends when they are whole: the rest may be damaged.

    Raises: ArchiveError where the archive is not sound; RequestError, TargetError, SpaceError, BusyError, ToolError.
    """
    began = time.monotonic()
    job = _Job(src, dest, overwrite, in_place, bytes_per_second, threads or usable_cpus(), dry_run)
    with contextlib.ExitStack() as stack:
        job.stack = stack
        with Reader(src, _pass_names) as reader:
            job.choose(reader, devices, configs)
        job.look_at_targets()
        if check_space:
            job.check_space()
        if not dry_run:
            job.write()
    job.result.elapsed = time.monotonic() - began
    return job.result


class _Plan:
    """A device, its target, and what is to be done there."""

    def __init__(self, device: Device, target: ExtractedDevice, present: os.stat_result | None) -> None:
        self.device = device
        self.target = target
        self.present = present
        self.is_block = present is not None and stat.S_ISBLK(present.st_mode)


class _Job:
    """One extraction, step by step."""

    def __init__(
        self,
        src: str,
        dest: str,
        overwrite: str,
        in_place: bool,
        bytes_per_second: int | None,
        threads: int,
        dry_run: bool,
    ) -> None:
        self._src = src
        self._dest = dest
        self._overwrite = overwrite
        self._may_replace = overwrite != "never"
        self._in_place = in_place
        self._bytes_per_second = bytes_per_second
        self._threads = threads
        self._dry_run = dry_run
        self._plans: list[_Plan] = []
        self._selective = False
        self._asked_for_all = False
        self._uses_folder = False
        self._data_limit = 0
        self._seen: tuple[Header, int, int] | None = None
        self.result = Extracted([], [])
        self.stack = contextlib.ExitStack()

    # --- what goes where ----------------------------------------------------------------------------------------------

    def choose(
        self, reader: Reader, devices: t.Sequence[DeviceRequest] | None, configs: t.Sequence[str] | None
    ) -> None:
        """Find what was asked for in the archive, and a target for each."""
        self._seen = _identity(reader)
        by_name = {device.name: device for device in reader.header.devices}
        self._asked_for_all = devices is None
        if devices is None:
            devices = [DeviceRequest(name) for name in by_name]
        for request in devices:
            if request.name not in by_name:
                raise RequestError(
                    f"the archive has no device {request.name!r}",
                    file=self._src,
                    remedy=f"It has {', '.join(sorted(by_name)) or 'no devices'}.",
                )
            if any(plan.device.name == request.name for plan in self._plans):
                raise RequestError(f"the device {request.name!r} is asked for twice", file=self._src)
            self._plans.append(self._plan(by_name[request.name], request))
        self._selective = len({plan.device.dev_id for plan in self._plans}) < len(by_name)
        chosen = [config for config in reader.header.configs if configs is None or config.name in configs]
        missing = set(configs or ()) - {config.name for config in chosen}
        if missing:
            present = ", ".join(config.name for config in reader.header.configs) or "no configs"
            raise RequestError(
                f"the archive has no config {sorted(missing)[0]!r}", file=self._src, remedy=f"It has {present}."
            )
        for config in chosen:
            self.result.configs.append(self._plan_config(config))
        self.result.devices = [plan.target for plan in self._plans]
        self._data_limit = reader.file_size if reader.stream.seekable else 1 << 63
        self._check_targets()

    def _plan(self, device: Device, request: DeviceRequest) -> _Plan:
        if request.path is None:
            _check_name(self._src, "device", device.name)
            self._uses_folder = True
            name = "vmstate.bin" if device.name == layout.VMSTATE else f"disk-{device.name}.{request.format}"
            path = os.path.join(self._dest, name)
            present = _stat_unlinked(path)
        else:
            path = os.path.realpath(request.path)
            present = os.stat(path) if os.path.exists(path) else None
            if not os.path.isdir(os.path.dirname(path)):
                raise RequestError("the folder for this target does not exist", file=path, remedy="Make it first.")
        plan = _Plan(device, ExtractedDevice(device.name, path, device.size, request.format), present)
        if present is not None and not plan.is_block and not stat.S_ISREG(present.st_mode):
            raise TargetError("expected a file or a block device", file=path)
        if plan.is_block and self._overwrite != "never":
            check_block_size(path, device.size)
        if request.format != "raw" and (plan.is_block or self._in_place):
            raise RequestError(
                f"the format {request.format} cannot be written in place",
                file=path,
                remedy="Use the format raw, or another target without in_place.",
            )
        return plan

    def _plan_config(self, config: Config) -> ExtractedConfig:
        _check_name(self._src, "config", config.name)
        self._uses_folder = True
        path = os.path.join(self._dest, config.name)
        found = ExtractedConfig(config.name, path, len(config.data), config.data)
        if _stat_unlinked(path) is not None:
            with target_errors(path), open(path, "rb") as file:
                found.before = file.read(layout.BLOB_LIMIT + 1)
        found.changed = found.before != config.data
        if found.before is not None and self._overwrite != "changed":
            found.changed = self._overwrite == "always"
        return found

    def _check_targets(self) -> None:
        """See that no two targets are one, and that none is the archive."""
        paths: dict[str, str] = {}
        identities: dict[tuple[int, int], str] = {}
        archive = os.stat(self._src)
        for name, path in [(item.name, item.path) for item in self.result.items()]:
            real = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
            if real in paths:
                raise RequestError(
                    f"{name!r} and {paths[real]!r} have one target", file=path, remedy="Give each its own."
                )
            paths[real] = name
            if not os.path.exists(path):
                continue
            status = os.stat(path)
            identity = (status.st_dev, status.st_ino)
            if stat.S_ISBLK(status.st_mode):
                identity = (-1, status.st_rdev)
            if identity == (archive.st_dev, archive.st_ino):
                raise RequestError(f"the target of {name!r} is the archive itself", file=path)
            if identity in identities:
                raise RequestError(f"{name!r} and {identities[identity]!r} have one target under two names", file=path)
            identities[identity] = name

    def look_at_targets(self) -> None:
        """Tell for each target whether it has to be written, comparing what is there where that decides."""
        to_compare = []
        for plan in self._plans:
            target = plan.target
            if plan.present is None:
                target.changed, target.reason, target.is_new = True, "there is no such file", True
            elif self._overwrite == "never":
                continue
            elif self._overwrite == "always":
                target.changed, target.reason = True, "it is written always"
            elif self._dry_run or not self._is_patched_in_place(plan):
                to_compare.append(plan)
        if to_compare:
            self._compare(to_compare)
        self._refuse_used_targets()

    def _refuse_used_targets(self) -> None:
        """See that no VM uses what is to be replaced. What is patched is looked at when it is opened to be written."""
        for plan in self._plans:
            if plan.target.is_new:
                continue
            if self._is_patched_in_place(plan):
                concerns = self._dry_run and self._overwrite != "never"
            else:
                concerns = plan.target.changed
            if concerns:
                refuse_used(plan.target.path)

    def _is_patched_in_place(self, plan: _Plan) -> bool:
        return plan.is_block or (self._in_place and plan.present is not None)

    def _compare(self, plans: list[_Plan]) -> None:
        with contextlib.ExitStack() as stack:
            images: dict[int, SourceImage] = {}
            for plan in plans:
                folder = os.path.dirname(plan.target.path)
                try:
                    source = qemu.open_source(plan.target.path, plan.target.format, folder)
                    images[plan.device.dev_id] = stack.enter_context(source)
                except ToolError as error:
                    plan.target.changed, plan.target.reason = True, error.message
            with self._open() as reader:
                differences = differing(reader, images, threads=self._threads, bytes_per_second=self._bytes_per_second)
                self.result.integrity = reader.statistics.integrity
                for image in images.values():
                    image.check_unchanged()
                for plan in plans:
                    if plan.device.dev_id not in images:
                        continue
                    image = images[plan.device.dev_id]
                    plan.target.size = size = reader.size_of(plan.device)
                    offset = differences.get(plan.device.dev_id)
                    if offset is None and not plan.is_block and plan.target.format == "raw" and image.size != size:
                        offset = min(image.size, size)
                    if offset is not None:
                        plan.target.changed, plan.target.reason = True, f"it differs at offset {offset}"

    def _open(self) -> Reader:
        """The archive once more. Raises: RequestError where it is another one by now.

        Where only some devices are asked for, the others may be damaged: then only what concerns these is raised.
        """
        wanted = {plan.device.dev_id for plan in self._plans}
        passed: list[Problem] = []

        def report(problem: Problem) -> None:
            # What ends the reading is found first, and that clusters are missing follows from it.
            if problem.offset is None and passed:
                problem = passed[0]
            elif self._selective and not reader.damaged & wanted and not reader.doubts(problem):
                passed.append(problem)
                return
            raise ArchiveError(problem)

        reader = Reader(self._src, _pass_names)
        reader.report_to(report)
        if _identity(reader) != self._seen:
            reader.close()
            raise RequestError("the archive was replaced while it was read", file=self._src, remedy="Run again.")
        return reader

    # --- writing ------------------------------------------------------------------------------------------------------

    def check_space(self) -> None:
        """Raises: SpaceError where the targets may need more than their file systems have free."""
        needed: dict[int, int] = {}
        folders: dict[int, str] = {}
        for plan in self._plans:
            if not plan.target.changed or plan.is_block:
                continue
            folder = _nearest_folder(plan.target.path)
            device = os.stat(folder).st_dev
            folders[device] = folder
            need = plan.device.size * (1 if plan.target.format == "raw" else 2)
            if self._is_patched_in_place(plan) and plan.present is not None:
                need = max(0, need - plan.present.st_blocks * 512)
            needed[device] = needed.get(device, 0) + need
        for device, need in needed.items():
            status = os.statvfs(folders[device])
            free = status.f_bavail * status.f_frsize
            need = min(need, self._data_limit)
            if need > free:
                raise SpaceError(
                    f"the disks may need {need} bytes, and {free} bytes are free",
                    file=folders[device],
                    remedy="Make room, choose another target, or switch the check of the space off where you know "
                    "that the disks hold less than their size.",
                )

    def write(self) -> None:
        """Write all targets that have to be, and let them appear together at the end."""
        configs = [config for config in self.result.configs if config.changed]
        plans = [
            plan
            for plan in self._plans
            if plan.target.changed or (self._overwrite == "changed" and self._is_patched_in_place(plan))
        ]
        if self._uses_folder:
            self._make_folder()
        targets = {plan.device.dev_id: self._open_target(plan) for plan in plans}
        pending = [self._write_config(config) for config in configs]
        if targets or (self._asked_for_all and not self._plans):
            self._write_devices(plans, targets)
        self._refuse_used_targets()
        for plan in plans:
            if not targets[plan.device.dev_id].commit():
                plan.target.changed, plan.target.reason, plan.target.is_new = False, None, False
                plan.target.written_bytes = 0
        for config, file in zip(configs, pending):
            config.changed = file.commit()

    def _make_folder(self) -> None:
        if os.path.isdir(self._dest):
            return
        above = _nearest_folder(self._dest)
        with target_errors(self._dest):
            os.makedirs(self._dest, mode=0o700)
            self.stack.callback(_remove_if_empty, self._dest)
            folder = os.path.abspath(self._dest)
            while folder != above:
                folder = os.path.dirname(folder)
                sync_folder(folder)
        self.result.folder_made = True

    def _open_target(self, plan: _Plan) -> Target:
        path = plan.target.path
        target: Target | None = None
        if self._is_patched_in_place(plan):
            target = open_patch(path, plan.device.size)
        elif plan.target.format != "raw":
            target = _ConvertedFile(path, plan.target.format, may_replace=self._may_replace)
        elif plan.present is not None and self._overwrite == "changed":
            target = clone_for_patch(path, plan.device.size)
        if target is None:
            target = NewFile(path, may_replace=self._may_replace)
        self.stack.callback(target.discard)
        return target

    def _write_config(self, config: ExtractedConfig) -> PendingFile:
        pending = PendingFile(config.path, may_replace=self._may_replace)
        self.stack.callback(pending.discard)
        pending.write(0, config.data)
        pending.sync()
        return pending

    def _write_devices(self, plans: list[_Plan], targets: dict[int, Target]) -> None:
        written = dict.fromkeys(targets, 0)
        lock = threading.Lock()

        def visit(data: memoryview, segments: list[Segment]) -> None:
            counts = dict.fromkeys(targets, 0)
            for dev_id, start, length, data_at in segments:
                target = targets.get(dev_id)
                if target is None:
                    continue
                if data_at is None:
                    counts[dev_id] += target.zero(start, length)
                else:
                    counts[dev_id] += target.write(data[data_at : data_at + length], start)
            with lock:
                for dev_id, count in counts.items():
                    written[dev_id] += count

        with self._open() as reader:
            reader.scan(
                visit,
                threads=self._threads,
                wanted=targets if len(targets) < len(reader.header.devices) else None,
                bytes_per_second=self._bytes_per_second,
                until_complete=self._selective and all(plan.device.name != layout.VMSTATE for plan in plans),
            )
            self.result.integrity = reader.statistics.integrity
            for plan in plans:
                plan.target.size = reader.size_of(plan.device)
                targets[plan.device.dev_id].finish(plan.target.size)
                plan.target.written_bytes = count = written[plan.device.dev_id]
                if plan.target.reason is None and count:
                    plan.target.reason = "it differed"
                elif plan.present is not None and not plan.is_block and plan.present.st_size != plan.target.size:
                    plan.target.reason = plan.target.reason or "its size differed"
                plan.target.changed = plan.target.reason is not None


class _ConvertedFile(NewFile):
    """A target in another format than raw: written raw to a file that never gets a name, then converted."""

    def __init__(self, path: str, image_format: str, *, may_replace: bool) -> None:
        self._final = PendingFile(path, may_replace=may_replace)
        try:
            super().__init__(path + ".raw")
        except BaseException:
            self._final.discard()
            raise
        self._format = image_format

    def finish(self, size: int) -> None:
        """See Target."""
        super().finish(size)
        qemu.convert(self.pending.path, "raw", self._final.path, self._format)
        self._final.sync()

    def commit(self) -> bool:
        """See Target."""
        self.pending.discard()
        return self._final.commit()

    def discard(self) -> None:
        """See Target."""
        self.pending.discard()
        self._final.discard()


def _identity(reader: Reader) -> tuple[Header, int, int]:
    """What tells an archive from another one. Inode numbers do not: some network file systems change them."""
    modified = 0 if has_live_times(reader.status) else reader.status.st_mtime_ns
    return reader.header, reader.file_size, modified


def _pass_names(problem: Problem) -> None:
    """The strict report, but for names: only those that would become part of a path are a danger here."""
    if problem.kind != "unsafe_name":
        raise ArchiveError(problem)


def _check_name(src: str, what: str, name: str) -> None:
    fault = layout.name_fault(name)
    if fault is not None:
        problem = Problem("unsafe_name", f"no path is made from the {what} name {name!r}: {fault}")
        raise ArchiveError(problem, file=src)


def _stat_unlinked(path: str) -> os.stat_result | None:
    """What is at C(path), which came from a name in the archive. Raises: TargetError for a link or anything odd."""
    try:
        with target_errors(path):
            status = os.lstat(path)
    except TargetError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise
    if not stat.S_ISREG(status.st_mode):
        what = "a symbolic link" if stat.S_ISLNK(status.st_mode) else "no regular file"
        remedy = "Remove it, or name the target yourself."
        raise TargetError(f"{what} is in the way, and is not followed", file=path, remedy=remedy)
    return status


def _remove_if_empty(folder: str) -> None:
    with contextlib.suppress(OSError):
        os.rmdir(folder)


def _nearest_folder(path: str) -> str:
    folder = os.path.dirname(os.path.abspath(path))
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return folder


__all__ = ("OVERWRITE", "DeviceRequest", "Extracted", "ExtractedConfig", "ExtractedDevice", "extract")
