# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""libzstd without its command: the C library that dpkg, rpm and systemd link against, called through ctypes.

A pipe to the command costs two more copies of every byte and a scheduler's round trip for each buffer. Hosts without
the library are served by the command; archive_file.py chooses. Function names and parameter numbers are those of
zstd.h, the stable part of the library's interface.
"""

from __future__ import annotations

import ctypes
import functools
import typing as t

_LIBRARY = "libzstd.so.1"
_COMPRESSION_LEVEL = 100
_CHECKSUM_FLAG = 201
_WORKERS = 400
_CONTINUE = 0
_END = 2
_OLDEST = 10400
"""Version 1.4.0 made the calls below part of the stable interface."""


class _Buffer(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("size", ctypes.c_size_t), ("pos", ctypes.c_size_t))


@functools.lru_cache(maxsize=1)
def _library() -> t.Any:
    try:
        library = ctypes.CDLL(_LIBRARY)
        if library.ZSTD_versionNumber() < _OLDEST:
            return None
        for name in ("ZSTD_createDCtx", "ZSTD_createCCtx"):
            getattr(library, name).restype = ctypes.c_void_p
        library.ZSTD_getErrorName.restype = ctypes.c_char_p
        library.ZSTD_getErrorName.argtypes = (ctypes.c_size_t,)
        for name in ("ZSTD_freeDCtx", "ZSTD_freeCCtx"):
            getattr(library, name).argtypes = (ctypes.c_void_p,)
        pointer = ctypes.POINTER(_Buffer)
        for name, types in (
            ("ZSTD_decompressStream", (ctypes.c_void_p, pointer, pointer)),
            ("ZSTD_compressStream2", (ctypes.c_void_p, pointer, pointer, ctypes.c_int)),
            ("ZSTD_CCtx_setParameter", (ctypes.c_void_p, ctypes.c_int, ctypes.c_int)),
        ):
            function = getattr(library, name)
            function.argtypes = types
            function.restype = ctypes.c_size_t
    except (OSError, AttributeError):
        return None
    return library


def is_available() -> bool:
    """Whether this host has the library, in a version that has the calls."""
    return _library() is not None


class ZstdError(Exception):
    """The library's word on what is wrong."""


def _check(code: int) -> int:
    if _library().ZSTD_isError(ctypes.c_size_t(code)):
        raise ZstdError(_library().ZSTD_getErrorName(code).decode())
    return code


def _address(memory: t.Any) -> int:
    return ctypes.addressof((ctypes.c_char * 1).from_buffer(memory))


class Decompressor:
    """Undoes zstd compression: frames one after another, as the zstd command takes them."""

    def __init__(self, read: t.Callable[[memoryview], int], chunk: int = 1 << 18) -> None:
        """C(read) fills a buffer of C(chunk) bytes from the compressed file and returns how many bytes came."""
        self._read = read
        self._library = _library()
        self._context = self._library.ZSTD_createDCtx()
        self._memory = bytearray(chunk)
        self._input = _Buffer(_address(self._memory), 0, 0)
        self._inside_frame = False

    def readinto(self, view: memoryview) -> int:
        """Fill C(view) with uncompressed bytes. Returns how many; fewer than asked only at the end.

        Raises: ZstdError where the data is damaged, or ends inside a frame.
        """
        output = _Buffer(_address(view), len(view), 0)
        while output.pos < output.size:
            if self._input.pos == self._input.size:
                self._input.size = self._read(memoryview(self._memory))
                self._input.pos = 0
            at_end = self._input.size == 0
            before = output.pos
            if at_end and not self._inside_frame:
                break
            hint = _check(
                self._library.ZSTD_decompressStream(self._context, ctypes.byref(output), ctypes.byref(self._input))
            )
            self._inside_frame = hint != 0
            if at_end and self._inside_frame and output.pos == before:
                raise ZstdError("the file ends inside a frame")
        return int(output.pos)

    def close(self) -> None:
        """Free the library's memory."""
        if self._context:
            self._library.ZSTD_freeDCtx(self._context)
            self._context = None


class Compressor:
    """Makes one zstd frame with a content checksum."""

    def __init__(self, write: t.Callable[[memoryview], None], level: int, threads: int, chunk: int = 1 << 18) -> None:
        """C(write) takes compressed bytes, which it must use before it returns. C(threads) do the work."""
        self._write = write
        self._library = _library()
        self._context = self._library.ZSTD_createCCtx()
        self._memory = bytearray(chunk)
        self._set(_COMPRESSION_LEVEL, level)
        self._set(_CHECKSUM_FLAG, 1)
        # A library that was built without threads refuses the parameter, and compresses in the caller's.
        self._library.ZSTD_CCtx_setParameter(self._context, _WORKERS, threads)

    def _set(self, parameter: int, value: int) -> None:
        _check(self._library.ZSTD_CCtx_setParameter(self._context, parameter, value))

    def write(self, data: bytearray | memoryview) -> None:
        """Compress C(data), which must be writable memory."""
        source = _Buffer(_address(data) if len(data) else None, len(data), 0)
        while source.pos < source.size:
            self._step(source, _CONTINUE)

    def finish(self) -> None:
        """End the frame."""
        nothing = _Buffer(None, 0, 0)
        while self._step(nothing, _END):
            continue

    def _step(self, source: _Buffer, directive: int) -> int:
        output = _Buffer(_address(self._memory), len(self._memory), 0)
        left = _check(
            self._library.ZSTD_compressStream2(self._context, ctypes.byref(output), ctypes.byref(source), directive)
        )
        if output.pos:
            self._write(memoryview(self._memory)[: output.pos])
        return left

    def close(self) -> None:
        """Free the library's memory; this also ends its threads."""
        if self._context:
            self._library.ZSTD_freeCCtx(self._context)
            self._context = None


__all__ = ("Compressor", "Decompressor", "ZstdError", "is_available")
