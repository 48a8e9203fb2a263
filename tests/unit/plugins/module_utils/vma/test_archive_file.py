# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Compression recognised, undone and done."""

from __future__ import annotations

import bz2
import gzip
import io
import os
import pathlib
import subprocess
import typing as t

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ansible_collections.vmbackup.vma.plugins.module_utils.vma import archive_file, errors, pending_file, tools, zstd
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.vma import helpers

DATA = b"VMA\x00" + helpers.make_image(3_000_000, "stream")


@pytest.mark.parametrize(
    ("start", "compression"),
    [
        (b"VMA\x00", "none"),
        (b"\x28\xb5\x2f\xfd....", "zstd"),
        (b"\x50\x2a\x4d\x18....", "zstd"),
        (b"\x5f\x2a\x4d\x18....", "zstd"),
        (b"\x60\x2a\x4d\x18....", None),
        (b"\x1f\x8b\x08", "gzip"),
        (b"\x89LZO\x00\r\n\x1a\n", "lzo"),
        (b"BZh9", "bzip2"),
        (b"\xfd7zXZ\x00", None),
        (b"VMAE", None),
        (b"VMA", None),
        (b"", None),
    ],
)
def test_recognised(start: bytes, compression: str | None) -> None:
    assert archive_file.recognise(start) == compression


@pytest.mark.parametrize(
    ("path", "asked", "told"),
    [
        ("a.vma", "auto", "none"),
        ("a.vma.zst", "auto", "zstd"),
        ("a.vma.gz", "auto", "gzip"),
        ("a.vma.gz", "gzip", "gzip"),
        ("a.vma", "none", "none"),
        ("a.backup", "zstd", "zstd"),
    ],
)
def test_compression_of(path: str, asked: str, told: str) -> None:
    assert archive_file.compression_of(path, asked) == told


def _pack(compression: str, data: bytes) -> bytes:
    if compression == "none":
        return data
    if compression == "gzip":
        return gzip.compress(data, 1)
    if compression == "bzip2":
        return bz2.compress(data, 1)
    command = {"lzo": ["lzop", "-q", "-c"], "zstd": ["zstd", "-q", "-c", "--check"]}[compression]
    helpers.need_tool(command[0])
    return subprocess.run(command, input=data, stdout=subprocess.PIPE, check=True).stdout


def _open(path: pathlib.Path, data: bytes) -> tuple[int, archive_file.Stream]:
    path.write_bytes(data)
    fd = archive_file.open_archive(str(path))
    return fd, archive_file.open_stream(fd)


@pytest.mark.parametrize("compression", ["none", "gzip", "bzip2", "lzo", "zstd"])
def test_reads_skips_and_takes_back(compression: str, tmp_path: pathlib.Path) -> None:
    fd, stream = _open(tmp_path / "a", _pack(compression, DATA))
    assert stream.compression == compression
    memory = bytearray(len(DATA))

    def read(offset: int, length: int) -> bytes:
        view = memoryview(memory)[:length]
        return bytes(view[: stream.read(offset, view)])

    assert read(0, 4) == b"VMA\x00"
    assert read(4, 100) == DATA[4:104]
    # forwards, over more than a buffer
    assert read(1_000_000, 5) == DATA[1_000_000:1_000_005]
    # the end of what came is given back, twice, and comes again
    assert read(1_000_005, 1000) == DATA[1_000_005:1_001_005]
    stream.unread(memoryview(memory)[600:1000])
    stream.unread(memoryview(memory)[500:600])
    assert read(1_000_505, 5000) == DATA[1_000_505:1_005_505]
    stream.unread(memoryview(memory)[:5000])
    # and what was given back can be skipped
    assert read(1_000_600, 10) == DATA[1_000_600:1_000_610]
    assert read(2_000_000, len(DATA)) == DATA[2_000_000:]
    assert read(len(DATA), 10) == b""
    assert read(len(DATA) + 100, 10) == b""
    stream.close()
    stream.close()
    os.close(fd)


@pytest.mark.parametrize("compression", ["gzip", "bzip2", "lzo", "zstd"])
def test_a_skip_over_the_end(compression: str, tmp_path: pathlib.Path) -> None:
    fd, stream = _open(tmp_path / "a", _pack(compression, DATA[:1000]))
    assert stream.read(5_000_000, memoryview(bytearray(10))) == 0
    stream.close()
    os.close(fd)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.binary(max_size=3000), min_size=1, max_size=6),
    st.lists(st.integers(1, 4000), min_size=1, max_size=20),
    st.sampled_from(["gzip", "bzip2", "zstd"]),
    st.integers(0, 600),
)
def test_parts_one_after_another(parts: list[bytes], lengths: list[int], compression: str, zeros: int) -> None:
    """However the members are cut and the reads fall: the same bytes. Zeros may follow gzip and bzip2."""
    if compression == "zstd" and not zstd.is_available():
        pytest.skip("libzstd.so.1 is not installed")
    packed = b"".join(_pack_in_process(compression, part) for part in parts)
    if compression != "zstd":
        packed += bytes(zeros)
    with io.BytesIO() as out:
        fd = os.memfd_create("archive")
        try:
            os.write(fd, packed)
            os.lseek(fd, 0, os.SEEK_SET)
            stream = archive_file.open_stream(fd)
            position = 0
            number = 0
            while True:
                view = memoryview(bytearray(lengths[number % len(lengths)]))
                count = stream.read(position, view)
                out.write(view[:count])
                position += count
                number += 1
                if count < len(view):
                    break
            stream.close()
        finally:
            os.close(fd)
        assert out.getvalue() == b"".join(parts)


def _pack_in_process(compression: str, data: bytes) -> bytes:
    if compression == "gzip":
        return gzip.compress(data, 1)
    if compression == "bzip2":
        return bz2.compress(data)
    pieces: list[bytes] = []
    compressor = zstd.Compressor(lambda view: pieces.append(bytes(view)), 1, 1)
    compressor.write(bytearray(data))
    compressor.finish()
    compressor.close()
    return b"".join(pieces)


def test_a_decompressor_that_waits_is_interrupted(tmp_path: pathlib.Path, tool_folder: pathlib.Path) -> None:
    tool = tool_folder / "lzop"
    tool.write_text("#!/bin/sh\nexec sleep 3600\n")
    tool.chmod(0o755)
    fd, stream = _open(tmp_path / "a", b"\x89LZO\x00\r\n\x1a\n")
    stream.interrupt()
    with pytest.raises(errors.ArchiveError, match="lzop ended with signal 9"):
        stream.read(0, memoryview(bytearray(10)))
    stream.close()
    os.close(fd)


def test_a_decompressor_that_is_not_there(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(zstd, "is_available", lambda: False)
    for magic, package in ((b"\x89LZO\x00\r\n\x1a\n", "lzop"), (b"\x28\xb5\x2f\xfd", "zstd")):
        with pytest.raises(errors.ToolError, match=f"Install the package {package}"):
            _open(tmp_path / "a", magic)


class _Kept(t.NamedTuple):
    path: pathlib.Path
    pending: pending_file.PendingFile


@pytest.fixture
def pending(tmp_path: pathlib.Path) -> t.Iterator[_Kept]:
    made = pending_file.PendingFile(str(tmp_path / "out"))
    yield _Kept(tmp_path / "out", made)
    made.discard()


@pytest.mark.parametrize("compression", ["none", "gzip", "zstd", "command"])
def test_sinks(compression: str, pending: _Kept, request: pytest.FixtureRequest) -> None:
    if compression == "command":
        request.getfixturevalue("without_libzstd")
        compression = "zstd"
    sink = archive_file.open_sink(pending.pending, compression, None, 2)
    for at in range(0, len(DATA), 700_001):
        encoded = sink.encode(bytearray(DATA[at : at + 700_001]))
        offset = sink.append(encoded)
        if offset is not None:
            sink.write(offset, encoded)
    sink.finish()
    sink.close()
    pending.pending.commit()
    fd, stream = _open(pending.path, pending.path.read_bytes())
    memory = bytearray(len(DATA) + 1)
    assert stream.compression == compression
    assert stream.read(0, memoryview(memory)) == len(DATA)
    assert memory[:-1] == DATA
    stream.close()
    os.close(fd)


@pytest.mark.parametrize("compression", ["none", "gzip", "zstd"])
def test_a_sink_that_is_let_go_early(compression: str, pending: _Kept) -> None:
    sink = archive_file.open_sink(pending.pending, compression, None, 2)
    sink.append(sink.encode(bytearray(DATA)))
    sink.interrupt()
    sink.close()
    sink.close()


@pytest.mark.parametrize(
    ("status", "said", "told"),
    [
        (1, b"", "exit status 1"),
        (2, b"first\nlast\n", "exit status 2: last"),
        (-9, b"", "signal 9"),
        (1, b"\xff\n", "exit status 1: \ufffd"),
    ],
)
def test_how_a_command_ended(status: int, said: bytes, told: str) -> None:
    assert tools.describe_exit(status, io.BytesIO(said)) == told
