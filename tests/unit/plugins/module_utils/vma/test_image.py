# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Images: where they hold data, how they are compared, and what is written of them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pathlib
import typing as t

import pytest

from ansible_collections.vmbackup.vma.plugins.module_utils.vma import errors, image
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.vma.helpers import BLOCK

MIB = 1 << 20


@pytest.fixture
def sparse(tmp_path: pathlib.Path) -> t.Iterator[image.SourceImage]:
    """Ten mebibytes: data in the third and in the last one."""
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        for at in (2 * MIB, 9 * MIB):
            file.seek(at)
            file.write(b"x" * MIB)
    opened = image.SourceImage(str(path))
    with contextlib.closing(opened):
        if os.lseek(opened.fd, 0, os.SEEK_DATA) != 2 * MIB:
            pytest.skip("the file system of the temporary folder does not tell holes")
        yield opened


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (0, 10 * MIB, (2 * MIB, 3 * MIB)),
        (0, 2 * MIB, (2 * MIB, 2 * MIB)),
        (0, 2 * MIB + BLOCK, (2 * MIB, 2 * MIB + BLOCK)),
        (2 * MIB + BLOCK, 10 * MIB, (2 * MIB + BLOCK, 3 * MIB)),
        (3 * MIB, 9 * MIB, (9 * MIB, 9 * MIB)),
        (3 * MIB, 10 * MIB, (9 * MIB, 10 * MIB)),
        (5 * MIB, 6 * MIB, (6 * MIB, 6 * MIB)),
        (9 * MIB, 20 * MIB, (9 * MIB, 10 * MIB)),
        (10 * MIB, 20 * MIB, (20 * MIB, 20 * MIB)),
    ],
)
def test_next_data(sparse: image.SourceImage, start: int, end: int, expected: tuple[int, int]) -> None:
    assert sparse.next_data(start, end) == expected
    # a second time, and after other questions, the same
    sparse.next_data(0, MIB)
    sparse.next_data(4 * MIB, 5 * MIB)
    assert sparse.next_data(start, end) == expected


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTTY])
def test_where_the_file_system_cannot_tell_all_is_data(
    sparse: image.SourceImage, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lseek(*_args: object) -> t.NoReturn:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "lseek", lseek)
    assert sparse.next_data(MIB, 5 * MIB) == (MIB, 5 * MIB)


def test_a_search_that_fails(sparse: image.SourceImage, monkeypatch: pytest.MonkeyPatch) -> None:
    def lseek(*_args: object) -> t.NoReturn:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "lseek", lseek)
    with pytest.raises(errors.SourceError, match="holes at offset 0: Input/output error"):
        sparse.next_data(0, MIB)


@contextlib.contextmanager
def _image(path: pathlib.Path, content: bytes) -> t.Iterator[image.SourceImage]:
    path.write_bytes(content)
    with contextlib.closing(image.SourceImage(str(path))) as opened:
        yield opened


def test_differences(tmp_path: pathlib.Path) -> None:
    content = os.urandom(3 * MIB + 5000)
    other = bytearray(content)
    for at in (0, MIB - 1, MIB, 2 * MIB + 5 * BLOCK + 7, len(other) - 1):
        other[at] ^= 1
    with _image(tmp_path / "a", content) as opened:
        assert list(opened.differences(memoryview(other), 0)) == [
            (0, BLOCK),
            (MIB - BLOCK, MIB),
            (MIB, MIB + BLOCK),
            (2 * MIB + 5 * BLOCK, 2 * MIB + 6 * BLOCK),
            (3 * MIB + BLOCK, 3 * MIB + 5000),
        ]
        assert not opened.holds(memoryview(other), 0)
        assert opened.holds(memoryview(content), 0)
        assert opened.holds(memoryview(content)[777:], 777)
        assert not opened.holds(memoryview(content)[777:], 776 - 700)


@pytest.mark.parametrize(
    ("place", "start", "length", "found"),
    [
        (0, 0, 3 * MIB, 0),
        (0, 1, 3 * MIB - 1, None),
        (3 * MIB - 1, 0, 3 * MIB, 2 * MIB),
        (3 * MIB - 1, 0, 3 * MIB - 1, None),
        (MIB + 5, MIB + 5, 1, MIB + 5),
        (MIB + 5, MIB + 6, 100, None),
    ],
)
def test_first_nonzero(place: int, start: int, length: int, found: int | None, tmp_path: pathlib.Path) -> None:
    content = bytearray(3 * MIB)
    content[place] = 1
    with _image(tmp_path / "a", bytes(content)) as opened:
        assert opened.first_nonzero(start, length) == found


def test_a_source_that_is_read_beyond_its_end(tmp_path: pathlib.Path) -> None:
    with _image(tmp_path / "a", b"x" * 100) as opened:
        with pytest.raises(errors.SourceError, match="expected 100 bytes, but the file now ends at 100"):
            opened.read(memoryview(bytearray(101)), 0)
        opened.check_unchanged()
        opened.close()


def test_check_unchanged(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a"
    with _image(path, b"x" * 100) as opened:
        os.truncate(path, 99)
        with pytest.raises(errors.SourceError, match="expected 100 bytes, found 99"):
            opened.check_unchanged()
    with _image(path, b"x" * 100) as opened:
        os.utime(path, ns=(0, 0))
        with pytest.raises(errors.SourceError, match="no single instant"):
            opened.check_unchanged()
    view = tmp_path / "view"
    view.write_bytes(b"x" * 100)
    with (
        _image(path, b"x" * 100) as original,
        contextlib.closing(image.SourceImage(str(view), original=original)) as opened,
    ):
        os.utime(view, ns=(5, 5))
        opened.check_unchanged()
        os.utime(path, ns=(5, 5))
        with pytest.raises(errors.SourceError, match="no single instant"):
            opened.check_unchanged()


def test_a_patch_writes_what_differs(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a"
    content = os.urandom(2 * MIB)
    path.write_bytes(content)
    changed = bytearray(content)
    changed[10] ^= 1
    changed[BLOCK + 10] ^= 1
    changed[5 * BLOCK] ^= 1
    patch = image.open_patch(str(path), len(content))
    assert patch.write(memoryview(content), 0) == 0
    assert patch.write(memoryview(changed), 0) == 3 * BLOCK
    assert patch.zero(3 * BLOCK, BLOCK) == BLOCK
    assert patch.zero(3 * BLOCK, BLOCK) == 0
    patch.finish(len(content))
    patch.commit()
    expected = changed[: 3 * BLOCK] + bytes(BLOCK) + changed[4 * BLOCK :]
    assert path.read_bytes() == expected


@pytest.mark.parametrize("can_punch", [True, False])
def test_a_patch_zeroes_any_stretch(can_punch: bool, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not can_punch:
        monkeypatch.setattr(image, "_punch_hole", lambda _fd, _offset, _length: False)
    path = tmp_path / "a"
    for start, length in ((0, 1), (100, 5000), (BLOCK, BLOCK), (1, 3 * MIB - 2), (MIB - 7, 14), (3 * MIB - 1, 1)):
        path.write_bytes(b"\xee" * (3 * MIB))
        patch = image.open_patch(str(path), 3 * MIB)
        assert patch.zero(start, length) == length
        patch.finish(3 * MIB)
        patch.commit()
        assert path.read_bytes() == b"\xee" * start + bytes(length) + b"\xee" * (3 * MIB - start - length)


def test_a_patch_of_another_size(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a"
    for before, after in ((100, 5000), (5000, 100)):
        path.write_bytes(b"x" * before)
        patch = image.open_patch(str(path), after)
        patch.finish(after)
        patch.commit()
        assert path.read_bytes() == (b"x" * before)[:after].ljust(after, b"\x00")


def test_a_patch_of_a_link_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a").write_bytes(b"mine")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with pytest.raises(errors.TargetError):
        image.open_patch(str(tmp_path / "link"), 100)
    assert (tmp_path / "a").read_bytes() == b"mine"


def test_a_clone(reflinks: pathlib.Path) -> None:
    path = reflinks / "a"
    path.write_bytes(b"x" * MIB)
    patch = image.clone_for_patch(str(path), 2 * MIB)
    assert patch is not None
    patch.write(memoryview(b"y" * BLOCK), 0)
    patch.finish(2 * MIB)
    assert path.read_bytes() == b"x" * MIB
    patch.commit()
    assert path.read_bytes() == (b"y" * BLOCK + b"x" * (MIB - BLOCK)).ljust(2 * MIB, b"\x00")
    assert os.listdir(reflinks) == ["a"]


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL, errno.EXDEV, errno.ENOTTY])
def test_no_clone(number: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"x")

    def ioctl(*_args: object) -> t.NoReturn:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    assert image.clone_for_patch(str(path), 5) is None
    assert os.listdir(tmp_path) == ["a"]
    assert path.read_bytes() == b"x"


def test_a_clone_that_fails(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"x")

    def ioctl(*_args: object) -> t.NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    with pytest.raises(errors.SpaceError):
        image.clone_for_patch(str(path), 5)
    assert os.listdir(tmp_path) == ["a"]
