# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""An archive beside images: which differ, and where the first difference is."""

from __future__ import annotations

import contextlib
import pathlib
import typing as t

import pytest

from ansible_collections.vmbackup.vma.plugins.module_utils.vma import compare, errors, image, reader
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.vma import helpers
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.vma.helpers import BLOCK, CLUSTER

IMAGES = {
    # blocks 0, 2, 4, … of the first cluster are zero; the second cluster is; the third is full
    "a": (bytes(BLOCK) + b"x" * BLOCK) * 8 + bytes(CLUSTER) + b"y" * CLUSTER,
    "b": b"z" * (60 * CLUSTER) + b"end".ljust(512, b"\x00"),
}


def _compare(tmp_path: pathlib.Path, contents: t.Mapping[str, bytes], data: bytes | None = None) -> dict[str, int]:
    path = tmp_path / "archive.vma"
    path.write_bytes(helpers.build_archive(IMAGES).join() if data is None else data)
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(reader.Reader(str(path)))
        numbers = {device.name: device.dev_id for device in opened.header.devices}
        images: dict[int, image.Image] = {}
        for name, content in contents.items():
            (tmp_path / name).write_bytes(content)
            images[numbers[name]] = source = image.SourceImage(str(tmp_path / name))
            stack.callback(source.close)
        found = compare.differing(opened, images, threads=1)
        return {name: found[number] for name, number in numbers.items() if number in found}


def _with(content: bytes, at: int, byte: bytes) -> bytes:
    return content[:at] + byte + content[at + 1 :]


def test_nothing_differs(tmp_path: pathlib.Path) -> None:
    assert _compare(tmp_path, IMAGES) == {}
    assert _compare(tmp_path, {"b": IMAGES["b"]}) == {}
    assert _compare(tmp_path, {}) == {}


@pytest.mark.parametrize(
    ("at", "byte", "offset"),
    [
        pytest.param(BLOCK - 1, b"\x01", 0, id="a block that is left out is not zero"),
        pytest.param(BLOCK + 5, b"\x00", BLOCK, id="a stored block differs"),
        pytest.param(CLUSTER + 3 * BLOCK, b"\x01", CLUSTER, id="a cluster that is left out is not zero"),
        pytest.param(3 * CLUSTER - 1, b"\x00", 3 * CLUSTER - BLOCK, id="the last byte"),
    ],
)
def test_one_byte_differs(at: int, byte: bytes, offset: int, tmp_path: pathlib.Path) -> None:
    contents = {**IMAGES, "a": _with(IMAGES["a"], at, byte)}
    assert _compare(tmp_path, contents) == {"a": offset}


@pytest.mark.parametrize(
    ("change", "offset"),
    [
        pytest.param(lambda content: content + b"\x00" * 512, 60 * CLUSTER + 512, id="longer"),
        pytest.param(lambda content: content[:-512], 60 * CLUSTER, id="shorter"),
        # such an image would be filled up to the sector with zeros, and so hold the same
        pytest.param(lambda content: content[:-509], None, id="without the zeros at its end"),
        # and such a one would not
        pytest.param(lambda content: content[:-510], 60 * CLUSTER, id="without the last byte before them"),
    ],
)
def test_size(change: t.Callable[[bytes], bytes], offset: int | None, tmp_path: pathlib.Path) -> None:
    found = _compare(tmp_path, {**IMAGES, "b": change(IMAGES["b"])})
    if offset is None:
        assert found == {}
    else:
        assert set(found) == {"b"}
        assert offset <= found["b"] <= len(IMAGES["b"])


def test_the_end_is_read_where_one_image_does_not_differ(tmp_path: pathlib.Path) -> None:
    data = helpers.build_archive(IMAGES).join() + b"more"
    with pytest.raises(errors.ArchiveError) as caught:
        _compare(tmp_path, IMAGES, data)
    assert caught.value.problem.kind == "trailing_data"
    # where all differ, nothing more is to be learnt
    assert _compare(tmp_path, {"a": b"q" * (3 * CLUSTER)}, data) == {"a": 0}
