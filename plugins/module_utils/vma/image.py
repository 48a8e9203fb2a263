# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Disk images: sources to read, with their holes, and targets to write: new files, files to patch, block devices.

All images here are raw; qemu.py turns others into raw ones and back.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import os
import stat
import struct
import threading
import typing as t

from .errors import BusyError, SourceError, TargetError
from .layout import BLOCK_SIZE
from .pending_file import PendingFile, target_errors, write_all

COMPARE_SIZE = 1 << 20
"""Bytes that are compared, or looked at for zeros, at a time."""

_DROP_AGAIN = 8 << 20
_FICLONE = 0x40049409
_BLKZEROOUT = 0x127F
_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2
_ZEROS = bytes(COMPARE_SIZE)
_FLOCK = struct.Struct("hhqqi4x")
_NO_SUPPORT = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENOTTY)


class _Scratch(threading.local):
    """A buffer for each thread, made when the thread first needs it."""

    memory: bytearray | None = None

    def get(self) -> bytearray:
        if self.memory is None:
            self.memory = bytearray(COMPARE_SIZE)
        return self.memory


def drop_behind(fd: int, offset: int, length: int) -> None:
    """Give back the host's memory that caches these bytes, and a little before them. Never fails.

    The kernel keeps a stretch of pages that is only in part within what it is told to drop. So what the last calls left
    at their edges is dropped by the next. A length of 0 means all that follows.
    """
    before = min(offset, _DROP_AGAIN)
    with contextlib.suppress(OSError):
        os.posix_fadvise(fd, offset - before, length + before if length else 0, os.POSIX_FADV_DONTNEED)


class Image:
    """An open raw image: a file or a block device. Reads are whole and may come from several threads."""

    def __init__(self, path: str, fd: int, size: int, is_block: bool) -> None:
        self.path = path
        self.fd = fd
        self.size = size
        self.is_block = is_block
        self._scratch = _Scratch()
        # What was found last, as the next question is mostly about the same: some file systems look at each page.
        self._hole = (0, 0)
        self._data = (0, 0)

    def read(self, view: memoryview, offset: int) -> None:
        """Fill C(view) from C(offset). Raises: SourceError where the image ends before, or cannot be read."""
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self.fd, [view[done:]], offset + done)
            except OSError as error:
                raise SourceError(
                    f"cannot be read at offset {offset + done}: {error.strerror}",
                    file=self.path,
                    remedy="See the kernel's log (dmesg) for the device behind it.",
                ) from error
            if not count:
                raise SourceError(
                    f"expected {self.size} bytes, but the file now ends at {offset + done}",
                    file=self.path,
                    remedy="It shrank while it was read: back up a snapshot, or stop what writes to it.",
                )
            done += count

    def next_data(self, start: int, end: int) -> tuple[int, int]:
        """The first stretch from C(start) on, and before C(end), that is no hole: where it begins and ends.

        Both are C(end) where all is hole. The file system tells; where it cannot, all is data.
        """
        hole_start, hole_end = self._hole
        if hole_start <= start and end <= hole_end:
            return end, end
        data_start, data_end = self._data
        if data_start <= start < data_end:
            return start, min(end, data_end)
        try:
            begin = os.lseek(self.fd, start, os.SEEK_DATA)
            self._hole = start, begin
            if begin >= end:
                return end, end
            data_end = os.lseek(self.fd, begin, os.SEEK_HOLE)
            self._data = begin, data_end
            return begin, min(end, data_end)
        except OSError as error:
            if error.errno == errno.ENXIO:
                self._hole = start, self.size
                return end, end
            if error.errno in _NO_SUPPORT:
                return start, end
            raise SourceError(
                f"cannot be searched for holes at offset {start}: {error.strerror}", file=self.path
            ) from error

    def holds(self, view: memoryview, offset: int) -> bool:
        """Whether the image has exactly these bytes at C(offset)."""
        return next(self.differences(view, offset), None) is None

    def differences(self, view: memoryview, offset: int) -> t.Iterator[tuple[int, int]]:
        """The blocks that differ from C(view), which begins at C(offset): begin and end in the view."""
        scratch = self._scratch.get()
        for at in range(0, len(view), COMPARE_SIZE):
            part = view[at : at + COMPARE_SIZE]
            self.read(memoryview(scratch)[: len(part)], offset + at)
            if scratch.startswith(part):
                continue
            for block in range(0, len(part), BLOCK_SIZE):
                if not scratch.startswith(part[block : block + BLOCK_SIZE], block):
                    yield at + block, at + min(block + BLOCK_SIZE, len(part))

    def first_nonzero(self, start: int, length: int) -> int | None:
        """The offset of a block between C(start) and its end that is not all zero; None where all of it is."""
        return next((begin for begin, _end in self.nonzero_parts(start, length)), None)

    def nonzero_parts(self, start: int, length: int) -> t.Iterator[tuple[int, int]]:
        """The stretches of at most COMPARE_SIZE bytes that hold something: begin and end. Holes are not read."""
        scratch = self._scratch.get()
        end = start + length
        while start < end:
            begin, data_end = self.next_data(start, end)
            for at in range(begin, data_end, COMPARE_SIZE):
                size = min(COMPARE_SIZE, data_end - at)
                self.read(memoryview(scratch)[:size], at)
                if not scratch.startswith(_ZEROS[:size] if size < COMPARE_SIZE else _ZEROS):
                    yield at, at + size
            start = data_end if begin < end else end

    def close(self) -> None:
        """Close the descriptor. May be called more than once."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _open(path: str, flags: int) -> tuple[int, os.stat_result]:
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
    return fd, os.fstat(fd)


def _size_of(fd: int, status: os.stat_result) -> int:
    return os.lseek(fd, 0, os.SEEK_END) if stat.S_ISBLK(status.st_mode) else status.st_size


def check_unused(fd: int, *, to_write: bool) -> bool:
    """Whether no QEMU has the image open: for writing, or C(to_write) for anything.

    QEMU holds read locks, owned by the open file, on a byte for each thing that it does with an image, from byte 100
    on, and on a byte for each thing that it forbids others, from byte 200 on; the byte of writing is the second.
    """
    start, length = (100, 200) if to_write else (101, 1)
    request = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
    try:
        answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, request)
    except OSError:
        return True  # a file system that knows no locks: QEMU can hold none there either
    return bool(_FLOCK.unpack(answer)[0] == fcntl.F_UNLCK)


class SourceImage(Image):
    """An image that is read, and must not change meanwhile."""

    def __init__(self, path: str, *, original: SourceImage | None = None) -> None:
        """C(original) is the image that the file is a view or a copy of; then the file's own times mean nothing.

        Raises: SourceError.
        """
        try:
            fd, status = _open(path, os.O_RDONLY)
        except OSError as error:
            raise SourceError(
                f"cannot be opened: {error.strerror}",
                file=path,
                remedy="Check the path and the permissions.",
            ) from error
        is_block = stat.S_ISBLK(status.st_mode)
        if not is_block and not stat.S_ISREG(status.st_mode):
            os.close(fd)
            raise SourceError("expected a file or a block device", file=path)
        if original is None and not check_unused(fd, to_write=False):
            os.close(fd)
            raise SourceError(
                "a running VM writes to this image", file=path, remedy="Back up a snapshot of it, or stop the VM."
            )
        super().__init__(path, fd, _size_of(fd, status), is_block)
        self._original = original
        times_tell = not is_block and original is None and not has_live_times(status)
        self._modified = status.st_mtime_ns if times_tell else None

    def check_unchanged(self) -> None:
        """Raises: SourceError where the image has another size than at the start, or was written to."""
        if self._original is not None:
            self._original.check_unchanged()
        status = os.fstat(self.fd)
        size = _size_of(self.fd, status)
        if size != self.size:
            raise SourceError(
                f"expected {self.size} bytes, found {size} after reading",
                file=self.path,
                remedy="It changed while it was read: back up a snapshot, or stop what writes to it.",
            )
        if self._modified is not None and status.st_mtime_ns != self._modified:
            raise SourceError(
                "something wrote to it while it was read, so the copy is of no single instant",
                file=self.path,
                remedy="Back up a snapshot, or stop what writes to it.",
            )


def has_live_times(status: os.stat_result) -> bool:
    """Whether the file is on FUSE, where QEMU's exports give the present time as the time of the last change."""
    device = f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
    with contextlib.suppress(OSError), open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
        for line in mounts:
            before, _dash, after = line.partition(" - ")
            if before.split()[2] == device:
                return after.startswith("fuse")
    return False


class Target(t.Protocol):
    """Where a device of an archive goes. Threads write different parts at once."""

    def write(self, view: memoryview, offset: int) -> int:
        """Make C(offset) hold these bytes. Returns how many bytes were written. Raises: TargetError."""

    def zero(self, offset: int, length: int) -> int:
        """Make these bytes zero. Returns how many bytes were cleared. Raises: TargetError."""

    def finish(self, size: int) -> None:
        """Give a file its size and bring all to disk. Raises: TargetError."""

    def commit(self) -> bool:
        """Give the file its name. Returns False where it may not replace what has it by now. Raises: TargetError."""

    def discard(self) -> None:
        """Undo what can be undone, unless it was committed. May be called more than once."""


class NewFile:
    """A target that does not exist yet: sparse, with holes wherever nothing is written."""

    def __init__(self, path: str, *, may_replace: bool = True) -> None:
        """C(may_replace) is as for PendingFile. Raises: TargetError, BusyError."""
        self.pending = PendingFile(path, may_replace=may_replace)

    def write(self, view: memoryview, offset: int) -> int:
        """See Target."""
        self.pending.write(offset, view)
        return len(view)

    def zero(self, offset: int, length: int) -> int:  # noqa: ARG002 (what is not written is a hole, and so zero)
        """See Target."""
        return 0

    def finish(self, size: int) -> None:
        """See Target."""
        with target_errors(self.pending.dest):
            os.ftruncate(self.pending.fd, size)
        self.pending.sync()

    def commit(self) -> bool:
        """See Target."""
        return self.pending.commit()

    def discard(self) -> None:
        """See Target."""
        self.pending.discard()


class Patch:
    """A target that holds bytes already: what is right stays untouched."""

    def __init__(self, image: Image, pending: PendingFile | None = None) -> None:
        """C(pending) is where the image becomes a file of its own; without it, it is written where it lies."""
        self.image = image
        self._pending = pending

    def write(self, view: memoryview, offset: int) -> int:
        """See Target."""
        inside = max(0, min(len(view), self.image.size - offset))
        written = 0
        with target_errors(self.image.path):
            for begin, end in _joined(self.image.differences(view[:inside], offset)):
                write_all(self.image.fd, offset + begin, view[begin:end])
                written += end - begin
            if inside < len(view) and self.image.is_block:
                if any(view[inside:]):
                    raise TargetError(
                        f"the block device ends at {self.image.size}, the data does not", file=self.image.path
                    )
            elif inside < len(view):
                write_all(self.image.fd, offset + inside, view[inside:])
                written += len(view) - inside
        return written

    def zero(self, offset: int, length: int) -> int:
        """See Target."""
        cleared = 0
        length = max(0, min(length, self.image.size - offset))
        for begin, end in self.image.nonzero_parts(offset, length):
            with target_errors(self.image.path):
                if not (_zero_blocks if self.image.is_block else _punch_hole)(self.image.fd, begin, end - begin):
                    write_all(self.image.fd, begin, _ZEROS[: end - begin])
            cleared += end - begin
        return cleared

    def finish(self, size: int) -> None:
        """See Target."""
        with target_errors(self.image.path):
            if not self.image.is_block:
                os.ftruncate(self.image.fd, size)
            os.fsync(self.image.fd)

    def commit(self) -> bool:
        """See Target."""
        if self._pending is not None:
            return self._pending.commit()
        self.image.close()
        return True

    def discard(self) -> None:
        """See Target."""
        if self._pending is not None:
            self._pending.discard()
        else:
            self.image.close()


def _joined(parts: t.Iterator[tuple[int, int]]) -> t.Iterator[tuple[int, int]]:
    """Neighbouring stretches as one."""
    begin = end = 0
    for next_begin, next_end in parts:
        if next_begin != end:
            if end > begin:
                yield begin, end
            begin = next_begin
        end = next_end
    if end > begin:
        yield begin, end


def _zero_blocks(fd: int, offset: int, length: int) -> bool:
    """Let a block device zero a stretch, which frees it where the device can. False where it cannot."""
    try:
        fcntl.ioctl(fd, _BLKZEROOUT, struct.pack("=QQ", offset, length))
    except OSError as error:
        if error.errno in _NO_SUPPORT:
            return False
        raise
    return True


@functools.lru_cache(maxsize=1)
def _fallocate() -> t.Any:
    try:
        function = ctypes.CDLL(None, use_errno=True).fallocate64
    except (AttributeError, OSError):
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    return function


def _punch_hole(fd: int, offset: int, length: int) -> bool:
    """Make a hole of a stretch of a file. False where the file system cannot. Python has no call for it."""
    function = _fallocate()
    if function is None:
        return False
    if function(fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, length) == 0:
        return True
    error = ctypes.get_errno()
    if error in _NO_SUPPORT:
        return False
    raise OSError(error, os.strerror(error))


def refuse_used(path: str) -> None:
    """See that no VM uses the file or block device at C(path), and that no file system lies mounted on it.

    A VM would go on with a file that was replaced, unseen.

    Raises: TargetError.
    """
    try:
        fd, _status = _open_unused(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return  # what is gone is used by nobody, and of what may not be read the locks cannot be asked for
    try:
        _refuse_used(fd, path)
    finally:
        os.close(fd)


def _refuse_used(fd: int, path: str) -> None:
    if not check_unused(fd, to_write=True):
        raise TargetError("a running VM uses this image", file=path, remedy="Stop the VM, or name another target.")


def _open_unused(path: str, flags: int) -> tuple[int, os.stat_result]:
    """Raises: TargetError where it is a block device that is mounted, or part of a volume group or array."""
    exclusive = os.O_EXCL if stat.S_ISBLK(os.stat(path).st_mode) else 0
    try:
        return _open(path, flags | exclusive)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise TargetError(
                "the block device is in use", file=path, remedy="Unmount it, and stop the VM that uses it."
            ) from error
        raise


def check_block_size(path: str, size: int) -> None:
    """Raises: TargetError where the block device at C(path) has less than C(size) bytes, or cannot be opened."""
    with target_errors(path):
        fd, status = _open(path, os.O_RDONLY)
        try:
            present = _size_of(fd, status)
        finally:
            os.close(fd)
    _refuse_small(path, present, size)


def _refuse_small(path: str, present: int, size: int) -> None:
    if present < size:
        raise TargetError(
            f"the block device has {present} bytes, the archive's device has {size}",
            file=path,
            remedy="Name a larger block device, or enlarge this one.",
        )


def open_patch(path: str, size: int) -> Patch:
    """A block device, or a file to be patched where it lies; it gets C(size) bytes.

    Raises: TargetError where a block device is smaller, or is in use.
    """
    with target_errors(path):
        fd, status = _open_unused(path, os.O_RDWR | os.O_NOFOLLOW)
    try:
        is_block = stat.S_ISBLK(status.st_mode)
        if not is_block and not stat.S_ISREG(status.st_mode):
            raise TargetError("expected a file or a block device", file=path)
        _claim(fd, path)
        present = _size_of(fd, status)
        if is_block:
            _refuse_small(path, present, size)
        else:
            with target_errors(path):
                os.ftruncate(fd, size)
        return Patch(Image(path, fd, size, is_block))
    except BaseException:
        os.close(fd)
        raise


def _claim(fd: int, path: str) -> None:
    """Keep other runs from writing the same target. Raises: BusyError, TargetError where a VM uses it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BusyError("another run is writing this", file=path, remedy="Wait for it to end, or stop it.") from error
    _refuse_used(fd, path)


def clone_for_patch(path: str, size: int) -> Patch | None:
    """A reflink copy of the file at C(path), to be patched and renamed over it; None where there are no reflinks.

    Raises: TargetError, BusyError.
    """
    pending = PendingFile(path)
    try:
        with target_errors(path):
            old = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.ioctl(pending.fd, _FICLONE, old)
            except OSError as error:
                if error.errno in (*_NO_SUPPORT, errno.EXDEV, errno.EPERM):
                    pending.discard()
                    return None
                raise
            finally:
                os.close(old)
            os.ftruncate(pending.fd, size)
        return Patch(Image(path, pending.fd, size, False), pending)
    except BaseException:
        pending.discard()
        raise


__all__ = (
    "COMPARE_SIZE",
    "Image",
    "NewFile",
    "Patch",
    "SourceImage",
    "Target",
    "check_block_size",
    "check_unused",
    "clone_for_patch",
    "drop_behind",
    "has_live_times",
    "open_patch",
    "refuse_used",
)
