# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Archives as files: recognise and undo compression by content, and compress.

This room knows of descriptors, pipes and compression formats; what the bytes mean is layout.py's.
"""

from __future__ import annotations

import abc
import bz2
import contextlib
import fcntl
import os
import stat
import subprocess
import typing as t
import zlib

from . import layout, zstd
from .errors import ArchiveError, Problem, RequestError, SpaceError, ToolError
from .pending_file import PendingFile
from .tools import describe_exit, find_tool, open_scratch, start_tool

CHUNK = 1 << 18
"""Bytes of a compressed file that are read or written at a time."""

MAGICS: tuple[tuple[bytes, str], ...] = (
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\x1f\x8b", "gzip"),
    (b"\x89LZO\x00\r\n\x1a\n", "lzo"),
    (b"BZh", "bzip2"),
)
ENDINGS: dict[str, str] = {".vma": "none", ".vma.zst": "zstd", ".vma.gz": "gzip"}
LEVELS: dict[str, range] = {"zstd": range(1, 20), "gzip": range(1, 10)}
DEFAULT_LEVELS: dict[str, int] = {"zstd": 3, "gzip": 6}
_F_SETPIPE_SZ = 1031
_PIPE_SIZE = 1 << 20


def usable_cpus() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0))


# --- reading ----------------------------------------------------------------------------------------------------------


class Stream(abc.ABC):
    """The bytes of an archive without its compression."""

    compression = "none"
    seekable = False
    """Whether reads may skip and may come from several threads at once."""
    is_checked = False
    """Whether the compression's own checksums were found right, up to the last one at the end."""

    @abc.abstractmethod
    def read(self, offset: int, view: memoryview) -> int:
        """Fill C(view) with the bytes from C(offset). Returns how many came: fewer than asked only at the end.

        Where the stream is not seekable, C(offset) must not lie before the end of the last read.

        Raises: ArchiveError of the kinds read_error, decompression, trailing_data.
        """

    @abc.abstractmethod
    def unread(self, view: memoryview) -> None:
        """Take back the last bytes that read() gave, so that they come again."""

    @abc.abstractmethod
    def interrupt(self) -> None:
        """Make a read() that waits in another thread return soon."""

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of everything. May be called more than once."""


class PlainStream(Stream):
    """An archive that is not compressed."""

    seekable = True

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def read(self, offset: int, view: memoryview) -> int:
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._fd, [view[done:] if done else view], offset + done)
            except OSError as error:
                raise _read_error(error, offset + done) from error
            if not count:
                break
            done += count
        return done

    def unread(self, view: memoryview) -> None:
        """Reads name their offset, so nothing has to be remembered."""

    def interrupt(self) -> None:
        """A read of a file does not wait for anything that could be ended."""

    def close(self) -> None:
        """The descriptor is the caller's."""


def _read_error(error: OSError, offset: int) -> ArchiveError:
    return ArchiveError(Problem("read_error", f"the file cannot be read: {error.strerror}", offset))


class ForwardStream(Stream):
    """An archive behind a decompressor: its bytes come once, in order."""

    def __init__(self, compression: str, decompressor: _Decompressor) -> None:
        self.compression = compression
        self._decompressor = decompressor
        self._position = 0
        self._returned = bytearray()

    def read(self, offset: int, view: memoryview) -> int:
        scratch = memoryview(bytearray(min(CHUNK, max(0, offset - self._position))))
        while self._position < offset:
            if not self._advance(scratch[: offset - self._position]):
                return 0
        return self._advance(view)

    def unread(self, view: memoryview) -> None:
        self._returned[:0] = view
        self._position -= len(view)

    def _advance(self, view: memoryview) -> int:
        done = min(len(self._returned), len(view))
        if done:
            view[:done] = self._returned[:done]
            del self._returned[:done]
        self._position += done
        try:
            while done < len(view):
                count = self._decompressor.readinto(view[done:])
                if not count:
                    self.is_checked = True
                    break
                done += count
                self._position += count
        except (zlib.error, zstd.ZstdError, EOFError, ValueError) as error:
            message = f"the {self.compression} data is damaged after {self._position} bytes of archive: {error}"
            raise ArchiveError(Problem("decompression", message, self._position)) from error
        except _Trailing as error:
            self.is_checked = True
            raise ArchiveError(Problem("trailing_data", str(error), self._position)) from error
        except OSError as error:
            raise _read_error(error, self._position) from error
        return done

    def interrupt(self) -> None:
        self._decompressor.interrupt()

    def close(self) -> None:
        self._decompressor.close()


class _Trailing(Exception):
    """Behind the compressed data stand bytes that are none."""


class _Decompressor(t.Protocol):
    def readinto(self, view: memoryview) -> int:
        """Fill C(view), or a part of it, with uncompressed bytes. Returns how many; 0 at the end."""

    def interrupt(self) -> None:
        """Make a readinto() that waits in another thread return soon."""

    def close(self) -> None:
        """Let go of everything. May be called more than once."""


class _ZstdLibrary:
    def __init__(self, fd: int) -> None:
        self._zstd = zstd.Decompressor(lambda view: os.readv(fd, [view]))

    def readinto(self, view: memoryview) -> int:
        return self._zstd.readinto(view)

    def interrupt(self) -> None:
        """A call into the library never waits."""

    def close(self) -> None:
        self._zstd.close()


class _Gunzip:
    """zlib's decompressor with the interface of bz2's."""

    def __init__(self) -> None:
        self._inflate = zlib.decompressobj(16 + zlib.MAX_WBITS)

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._inflate.decompress(self._inflate.unconsumed_tail + data, max_length)

    @property
    def needs_input(self) -> bool:
        return not self._inflate.unconsumed_tail and not self._inflate.eof

    @property
    def eof(self) -> bool:
        return self._inflate.eof

    @property
    def unused_data(self) -> bytes:
        return self._inflate.unused_data


class _Members:
    """Undoes gzip or bzip2 in this process: members one after another, as zcat and bzcat take them."""

    def __init__(self, fd: int, compression: str) -> None:
        self._fd = fd
        self._make: t.Callable[[], t.Any] = _Gunzip if compression == "gzip" else bz2.BZ2Decompressor
        self._magic = next(magic for magic, name in MAGICS if name == compression)
        self._member = self._make()
        self._waiting = b""

    def readinto(self, view: memoryview) -> int:
        while True:
            if self._member.eof and not self._begin_next():
                return 0
            if self._member.needs_input and not self._waiting:
                self._waiting = os.read(self._fd, CHUNK)
                if not self._waiting:
                    raise EOFError("the file ends before the compressed data does")
            try:
                data = self._member.decompress(self._waiting, len(view))
            except OSError as error:  # so bz2 says that its data is damaged
                raise ValueError(str(error)) from error
            self._waiting = b""
            if data:
                view[: len(data)] = data
                return len(data)

    def _begin_next(self) -> bool:
        rest = self._member.unused_data
        while len(rest) < len(self._magic) or not rest.strip(b"\x00"):
            more = os.read(self._fd, CHUNK)
            rest = rest + more if rest.strip(b"\x00") else more
            if not more:
                break
        if not rest.strip(b"\x00"):
            return False  # tapes and some storages pad with zeros, which zcat and bzcat accept
        if not rest.startswith(self._magic):
            raise _Trailing("the compressed data is followed by bytes that are not compressed")
        self._member = self._make()
        self._waiting = rest
        return True

    def interrupt(self) -> None:
        """A call into the library never waits."""

    def close(self) -> None:
        """Nothing is held."""


class _Command:
    """Undoes compression by a command that writes to a pipe. Its exit status counts."""

    def __init__(self, fd: int, command: list[str], purpose: str) -> None:
        self._fd = fd
        self._name = command[0]
        path = find_tool(self._name, purpose)
        self._stderr = open_scratch()
        self._process = start_tool([path, *command[1:]], stdin=fd, stdout=subprocess.PIPE, stderr=self._stderr)
        self._pipe = t.cast("t.IO[bytes]", self._process.stdout).fileno()
        _widen_pipe(self._pipe)

    def readinto(self, view: memoryview) -> int:
        count = os.readv(self._pipe, [view])
        if not count and self._process.wait() != 0:
            # The command reads through our descriptor. Where it could not go on, neither can we: that is an OSError.
            os.read(self._fd, 1)
            raise ValueError(f"{self._name} ended with {describe_exit(self._process.returncode, self._stderr)}")
        return count

    def interrupt(self) -> None:
        self._process.kill()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._stderr.close()


def _widen_pipe(fd: int) -> None:
    # An ordinary user may have used up the pages that the kernel grants for pipes: then the default size serves.
    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, _F_SETPIPE_SZ, _PIPE_SIZE)


def recognise(start: bytes) -> str | None:
    """The compression of a file that begins with these bytes: none, zstd, gzip, lzo, bzip2; None for no archive."""
    if start.startswith(layout.MAGIC):
        return "none"
    if len(start) >= 4 and start[1:4] == b"\x2a\x4d\x18" and start[0] & 0xF0 == 0x50:
        return "zstd"  # a skippable frame may stand before the first one
    for magic, compression in MAGICS:
        if start.startswith(magic):
            return compression
    return None


def open_archive(path: str) -> int:
    """A descriptor of the archive at C(path). Raises: RequestError where it is no regular file or cannot be opened."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        remedy = "Check the path, and that the user may read it."
        raise RequestError(f"the archive cannot be opened: {error.strerror}", file=path, remedy=remedy) from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise RequestError("this is not a regular file", file=path, remedy="Name an archive.")
    return fd


def open_stream(fd: int) -> Stream:
    """The uncompressed bytes of the archive behind C(fd), whose offset must be 0. The descriptor stays the caller's.

    Raises: ArchiveError of the kinds not_vma and read_error; ToolError where a tool is missing.
    """
    try:
        start = os.pread(fd, 16, 0)
    except OSError as error:
        raise _read_error(error, 0) from error
    compression = recognise(start)
    if compression is None:
        found = start[:4].hex(" ") if start else "an empty file"
        message = f"expected an archive, plain or compressed with zstd, gzip, lzo or bzip2; it begins with {found}"
        raise ArchiveError(Problem("not_vma", message, 0))
    if compression == "none":
        return PlainStream(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    if compression == "zstd" and zstd.is_available():
        return ForwardStream(compression, _ZstdLibrary(fd))
    if compression in ("gzip", "bzip2"):
        return ForwardStream(compression, _Members(fd, compression))
    command = ["zstd", "-q", "-d", "-c"] if compression == "zstd" else ["lzop", "-q", "-d", "-c"]
    return ForwardStream(compression, _Command(fd, command, f"to read archives that are compressed with {compression}"))


# --- compressing ------------------------------------------------------------------------------------------------------


def compression_of(path: str, compression: str = "auto") -> str:
    """The compression for a new archive at C(path): as asked, or by its ending.

    Raises: RequestError where the ending is none of ENDINGS, or tells of another compression than is asked for.
    """
    for ending, by_ending in {**ENDINGS, ".vma.lzo": "lzo", ".vma.bz2": "bzip2"}.items():
        if path.endswith(ending):
            if by_ending not in ENDINGS.values():
                raise RequestError(
                    f"archives are not compressed with {by_ending}, only read",
                    file=path,
                    remedy=f"Choose a name that ends in {', '.join(ENDINGS)}.",
                )
            if compression in ("auto", by_ending):
                return by_ending
            raise RequestError(
                f"the ending {ending} tells readers of compression {by_ending}, but {compression} was asked for",
                file=path,
                remedy="Proxmox VE goes by the ending: change the one or the other.",
            )
    if compression == "auto":
        raise RequestError(
            f"expected a name that ends in {', '.join(ENDINGS)}",
            file=path,
            remedy="Change the name.",
        )
    return compression


class Sink:
    """Takes the pieces of an archive in order and writes them, as they are, to the start of a file."""

    def __init__(self, pending: PendingFile) -> None:
        self._pending = pending
        self._size = 0

    def encode(self, piece: bytearray | memoryview) -> bytes | bytearray | memoryview:
        """The bytes that stand for C(piece) in the file. Several threads may be in here."""
        return piece

    def append(self, data: bytes | bytearray | memoryview) -> int | None:
        """Take what encode() returned, in the archive's order.

        Returns the offset at which the caller is to write() it, in any order; None where it has been taken already.
        """
        offset = self._size
        self._size += len(data)
        return offset

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write to the file. Several threads may be in here."""
        self._pending.write(offset, data)

    def finish(self) -> None:
        """Write what is left. Raises: ToolError where the compressor failed."""

    def interrupt(self) -> None:
        """Make an append() that waits in another thread return soon."""

    def close(self) -> None:
        """Let go of everything, finished or not."""


class GzipSink(Sink):
    """Makes a gzip member of each piece, so that as many threads compress as there are."""

    def __init__(self, pending: PendingFile, level: int) -> None:
        super().__init__(pending)
        self._level = level

    def encode(self, piece: bytearray | memoryview) -> bytes:
        deflate = zlib.compressobj(self._level, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
        return deflate.compress(piece) + deflate.flush()


class ZstdSink(Sink):
    """Compresses by libzstd, which brings its own threads."""

    def __init__(self, pending: PendingFile, level: int, threads: int) -> None:
        super().__init__(pending)
        self._zstd = zstd.Compressor(self._write_next, level, threads)

    def _write_next(self, data: memoryview) -> None:
        self.write(self._size, data)
        self._size += len(data)

    def append(self, data: bytes | bytearray | memoryview) -> int | None:
        self._zstd.write(t.cast(memoryview, data))
        return None

    def finish(self) -> None:
        self._zstd.finish()

    def close(self) -> None:
        self._zstd.close()


class CommandSink(Sink):
    """Compresses by a command between two pipes' ends: this process and the file."""

    def __init__(self, pending: PendingFile, command: list[str]) -> None:
        super().__init__(pending)
        self._name = command[0]
        path = find_tool(self._name, "to compress an archive")
        self._stderr = open_scratch()
        # Its own open file, so that a compressor that outlives this process holds no lock of it.
        output = os.open(pending.path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            self._process = start_tool([path, *command[1:]], stdin=subprocess.PIPE, stdout=output, stderr=self._stderr)
        finally:
            os.close(output)
        self._stdin = t.cast("t.IO[bytes]", self._process.stdin)
        _widen_pipe(self._stdin.fileno())

    def append(self, data: bytes | bytearray | memoryview) -> int | None:
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._stdin.fileno(), view) :]
        except BrokenPipeError:
            self._raise_failure(self._process.wait())
        return None

    def finish(self) -> None:
        self._stdin.close()
        status = self._process.wait()
        if status:
            self._raise_failure(status)

    def _raise_failure(self, status: int) -> t.NoReturn:
        how = describe_exit(status, self._stderr)
        kind = SpaceError if "No space left" in how else ToolError
        raise kind(f"{self._name} ended with {how}", file=self._pending.dest, remedy="The archive was not written.")

    def interrupt(self) -> None:
        self._process.kill()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(OSError):
            self._stdin.close()
        self._stderr.close()


def open_sink(pending: PendingFile, compression: str, level: int | None, threads: int) -> Sink:
    """What compresses into C(pending).

    Raises: RequestError for a level that there is not; ToolError where a tool is missing.
    """
    if compression == "none":
        return Sink(pending)
    check_level(compression, level)
    chosen = DEFAULT_LEVELS[compression] if level is None else level
    if compression == "gzip":
        return GzipSink(pending, chosen)
    if zstd.is_available():
        return ZstdSink(pending, chosen, threads)
    return CommandSink(pending, ["zstd", "-q", "-c", f"-{chosen}", f"-T{threads}", "--check"])


def check_level(compression: str, level: int | None) -> None:
    """Raises: RequestError for a compression level that there is not."""
    levels = LEVELS.get(compression)
    if level is not None and levels is not None and level not in levels:
        raise RequestError(
            f"expected a compression level from {levels[0]} to {levels[-1]} for {compression}, got {level}"
        )


__all__ = (
    "CHUNK",
    "DEFAULT_LEVELS",
    "ENDINGS",
    "LEVELS",
    "CommandSink",
    "GzipSink",
    "PlainStream",
    "Sink",
    "Stream",
    "ZstdSink",
    "check_level",
    "compression_of",
    "open_archive",
    "open_sink",
    "open_stream",
    "recognise",
    "usable_cpus",
)
