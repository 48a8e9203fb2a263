# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What we write is read by others: an independent reader must find the same bytes."""

from __future__ import annotations

import gzip
import io
import pathlib
import subprocess

import pytest

from ansible_collections.vmbackup.vma.plugins.module_utils.vma import create, layout
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.vma import helpers

vma = pytest.importorskip("dissect.archive.vma", reason="dissect.archive is not installed")

KIB = 1 << 10
MIB = 1 << 20
LAYOUTS: dict[str, dict[str, int]] = {
    "one disk": {"drive-scsi0": 8 * MIB},
    "several disks": {"drive-scsi0": 5 * MIB, "drive-efidisk0": 540672, "drive-tpmstate0-backup": 4 * MIB},
    "sizes that are no multiple of a cluster": {"a": 64 * KIB + 512, "b": 3 * MIB + 20 * KIB + 1536, "c": 512},
    "sizes that are no multiple of a sector": {"a": 1, "b": 64 * KIB - 1, "c": 1000},
    "exactly one extent": {"a": 59 * 64 * KIB},
    "one cluster more than an extent": {"a": 60 * 64 * KIB},
    "a RAM state": {"drive-scsi0": MIB, "vmstate": MIB + 12 * KIB},
    "many disks": {f"d{number}": 68 * KIB for number in range(40)},
}


def _make(sizes: dict[str, int], folder: pathlib.Path) -> tuple[dict[str, bytes], list[create.SourceDevice]]:
    contents = {name: helpers.make_image(size, name) for name, size in sizes.items()}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return contents, [create.SourceDevice(name, str(folder / name)) for name in sizes]


def _check(data: bytes, contents: dict[str, bytes], configs: dict[str, bytes]) -> None:
    opened = vma.VMA(io.BytesIO(data))
    assert str(opened.uuid) == helpers.UUID_TEXT
    assert opened.configs() == configs
    assert [device.name for device in opened.devices()] == list(contents)
    for device in opened.devices():
        content = contents[device.name]
        assert device.size == -(-len(content) // 512) * 512
        assert device.open().read() == content.ljust(device.size, b"\x00")


@pytest.mark.parametrize("integrity", ["sha256", "none"])
@pytest.mark.parametrize("sizes", list(LAYOUTS.values()), ids=list(LAYOUTS))
def test_devices(sizes: dict[str, int], integrity: str, tmp_path: pathlib.Path) -> None:
    contents, devices = _make(sizes, tmp_path)
    configs = {"qemu-server.conf": helpers.CONF, "qemu-server.fw": b""}
    path = tmp_path / "archive.vma"
    given = [layout.Config(name, data) for name, data in configs.items()]
    create.create(str(path), devices, given, integrity=integrity, uuid=helpers.UUID_TEXT, ctime=helpers.CTIME)
    data = path.read_bytes()
    _check(data, contents, configs)
    assert int(vma.VMA(io.BytesIO(data)).creation_time.timestamp()) == helpers.CTIME


def test_gzip(tmp_path: pathlib.Path) -> None:
    contents, devices = _make(LAYOUTS["several disks"], tmp_path)
    path = tmp_path / "archive.vma.gz"
    create.create(str(path), devices, uuid=helpers.UUID_TEXT)
    _check(gzip.decompress(path.read_bytes()), contents, {})


def test_zstd(tmp_path: pathlib.Path) -> None:
    zstd = helpers.need_tool("zstd")
    contents, devices = _make(LAYOUTS["several disks"], tmp_path)
    path = tmp_path / "archive.vma.zst"
    create.create(str(path), devices, uuid=helpers.UUID_TEXT)
    done = subprocess.run([zstd, "-q", "-d", "-c", str(path)], stdout=subprocess.PIPE, check=True)
    _check(done.stdout, contents, {})


def test_no_device(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "archive.vma"
    create.create(str(path), [], [layout.Config("qemu-server.conf", helpers.CONF)], uuid=helpers.UUID_TEXT)
    opened = vma.VMA(io.BytesIO(path.read_bytes()))
    assert opened.configs() == {"qemu-server.conf": helpers.CONF}
    # Proxmox VE takes an archive without any extent for cut short
    assert path.stat().st_size == opened.header.header_size + 512
