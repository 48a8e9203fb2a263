# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Archives that Proxmox VE's own tool made: each must be read as that tool reads it, in every compression."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import os
import pathlib
import shutil
import subprocess
import typing as t

import pytest

from ansible_collections.vmbackup.vma.plugins.module_utils.vma import create, extract, info, reader, verify
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.vma import helpers
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.vma.helpers import MANIFEST, VECTORS
from ansible_collections.vmbackup.vma.tests.unit.vectors import images

ARCHIVES: dict[str, t.Any] = MANIFEST["archives"]
FILES = sorted(path.name for path in VECTORS.glob("*.vma.*"))
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".lzo": "lzo"}


def _vector(name: str) -> str:
    if name.endswith(".lzo"):
        helpers.need_tool("lzop")
    return str(VECTORS / name)


def _facts(name: str) -> t.Any:
    return ARCHIVES[name.rpartition(".")[0]]


def _plain(name: str, folder: pathlib.Path) -> pathlib.Path:
    path = folder / f"{name}"
    path.write_bytes(gzip.decompress((VECTORS / f"{name}.gz").read_bytes()))
    assert helpers.sha256_of(path) == ARCHIVES[name]["sha256"]
    return path


def _check_extracted(done: extract.Extracted, facts: t.Any) -> None:
    assert {device.name for device in done.devices} == {device["name"] for device in facts["devices"]}
    by_name = {device.name: device for device in done.devices}
    for device in facts["devices"]:
        image = MANIFEST["images"][device["image"]]
        target = by_name[device["name"]]
        assert target.size == os.path.getsize(target.path) == image["size"]
        assert helpers.sha256_of(target.path) == image["sha256"]
    assert [config.name for config in done.configs] == facts["configs"]
    for config in done.configs:
        assert helpers.sha256_of(config.path) == MANIFEST["configs"][config.name]


def test_no_vector_is_forgotten() -> None:
    assert {name.rpartition(".")[0] for name in FILES} == set(ARCHIVES)
    assert {os.path.splitext(name)[1] for name in FILES} == set(COMPRESSIONS)


@pytest.mark.parametrize("name", FILES)
def test_header(name: str) -> None:
    facts = _facts(name)
    with reader.Reader(_vector(name)) as opened:
        header = opened.header
        assert opened.stream.compression == COMPRESSIONS[os.path.splitext(name)[1]]
    assert (header.uuid_text, header.ctime, header.version) == (facts["uuid"], facts["ctime"], 1)
    assert [(device.dev_id, device.name, device.size) for device in header.devices] == [
        (device["dev_id"], device["name"], MANIFEST["images"][device["image"]]["size"]) for device in facts["devices"]
    ]
    assert {config.name: hashlib.sha256(config.data).hexdigest() for config in header.configs} == {
        config: MANIFEST["configs"][config] for config in facts["configs"]
    }


@pytest.mark.parametrize("level", ["structure", "content"])
@pytest.mark.parametrize("name", FILES)
def test_nothing_is_wrong(name: str, level: str) -> None:
    facts = _facts(name)
    seen = verify.verify(_vector(name), level)
    assert seen.verification.problems == []
    assert seen.verification.ok
    assert seen.integrity == "none"
    assert seen.verification.whole == {device["name"]: True for device in facts["devices"]}
    assert seen.verification.good_until == facts["size"]
    assert seen.verification.clusters == sum(
        -(-MANIFEST["images"][device["image"]]["size"] // helpers.CLUSTER) for device in facts["devices"]
    )


@pytest.mark.parametrize("name", FILES)
def test_extract(name: str, tmp_path: pathlib.Path) -> None:
    done = extract.extract(_vector(name), str(tmp_path / "out"))
    assert done.changed
    _check_extracted(done, _facts(name))
    again = extract.extract(_vector(name), str(tmp_path / "out"))
    assert not again.changed


@pytest.mark.parametrize("name", sorted(ARCHIVES))
def test_extract_uncompressed(name: str, tmp_path: pathlib.Path) -> None:
    done = extract.extract(str(_plain(name, tmp_path)), str(tmp_path / "out"))
    _check_extracted(done, ARCHIVES[name])


@pytest.mark.parametrize("name", ["multi.vma", "vmstate.vma", "config-only.vma"])
def test_extract_bzip2(name: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / f"{name}.bz2"
    path.write_bytes(bz2.compress(gzip.decompress((VECTORS / f"{name}.gz").read_bytes())))
    _check_extracted(extract.extract(str(path), str(tmp_path / "out")), ARCHIVES[name])
    assert verify.verify(str(path)).verification.ok


@pytest.mark.parametrize("name", sorted(ARCHIVES))
def test_structure_reads_headers_alone(name: str, tmp_path: pathlib.Path) -> None:
    seen = verify.verify(str(_plain(name, tmp_path)), "structure")
    assert seen.header is not None
    assert seen.verification.read_bytes == seen.header.size + 512 * seen.verification.extents


@pytest.mark.usefixtures("without_libzstd")
def test_zstd_by_its_command(tmp_path: pathlib.Path) -> None:
    assert verify.verify(_vector("single.vma.zst")).verification.ok
    done = extract.extract(_vector("single.vma.zst"), str(tmp_path / "out"))
    _check_extracted(done, ARCHIVES["single.vma"])


def test_zeros_take_no_room(tmp_path: pathlib.Path) -> None:
    done = extract.extract(_vector("zeros.vma.gz"), str(tmp_path / "out"))
    status = os.stat(done.devices[0].path)
    assert status.st_size == 1 << 30
    assert status.st_blocks * 512 < 1 << 20
    assert done.devices[0].written_bytes == 0


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("multi.vma.gz", "drive-efidisk0"), ("shuffled.vma.gz", "drive-tpmstate0"), ("vmstate.vma.gz", "vmstate")],
)
def test_one_device_of_several(name: str, wanted: str, tmp_path: pathlib.Path) -> None:
    done = extract.extract(_vector(name), str(tmp_path / "out"), devices=[extract.DeviceRequest(wanted)], configs=[])
    image = next(device["image"] for device in _facts(name)["devices"] if device["name"] == wanted)
    assert helpers.files_below(tmp_path / "out") == [os.path.basename(done.devices[0].path)]
    assert helpers.sha256_of(done.devices[0].path) == MANIFEST["images"][image]["sha256"]


@pytest.mark.parametrize("name", sorted(ARCHIVES))
def test_ours_holds_what_theirs_holds(name: str, tmp_path: pathlib.Path) -> None:
    facts = ARCHIVES[name]
    devices = []
    for device in facts["devices"]:
        path = tmp_path / device["image"]
        images.write_image(device["image"], path)
        assert helpers.sha256_of(path) == MANIFEST["images"][device["image"]]["sha256"]
        devices.append(create.SourceDevice(device["name"], str(path)))
    with reader.Reader(str(VECTORS / f"{name}.gz")) as theirs:
        configs = theirs.header.configs
    dest = tmp_path / "ours.vma"
    create.create(str(dest), devices, configs, uuid=facts["uuid"], ctime=facts["ctime"])
    ours = verify.verify(str(dest)).verification
    assert ours.ok
    stored = verify.verify(str(VECTORS / f"{name}.gz")).verification.data_bytes
    if "vmstate" not in name:  # of RAM we store every block
        assert ours.data_bytes == stored
    if devices:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        _check_extracted(extract.extract(str(dest), str(tmp_path / "out")), facts)


def test_an_archive_of_proxmox_is_not_rewritten_where_digests_are_not_asked_for(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "multi.vma.gz"
    shutil.copy(VECTORS / "multi.vma.gz", path)
    before = path.read_bytes()
    devices = []
    for device in ARCHIVES["multi.vma"]["devices"]:
        images.write_image(device["image"], tmp_path / device["image"])
        devices.append(create.SourceDevice(device["name"], str(tmp_path / device["image"])))
    with reader.Reader(str(path)) as theirs:
        configs = theirs.header.configs
    done = create.create(str(path), devices, configs, integrity="none")
    assert (done.changed, done.reason) == (False, None)
    assert path.read_bytes() == before
    done = create.create(str(path), devices, configs, dry_run=True)
    assert (done.changed, done.reason) == (True, "the integrity is none")


def test_described() -> None:
    told = info.read_info(str(VECTORS / "multi.vma.gz"))
    assert told["vm"]["name"] is not None
    assert [device["name"] for device in told["devices"]] == ["drive-scsi0", "drive-efidisk0", "drive-tpmstate0"]
    assert told["configs"][0]["content"] == (VECTORS / "qemu-server.conf").read_text(encoding="utf-8")
    assert told["integrity"] is None
    assert (told["version"], told["header_size"] % 512) == (1, 0)


def test_our_archives_are_unpacked_by_the_tools_that_qmrestore_calls(tmp_path: pathlib.Path) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(helpers.make_image(3 << 20))
    plain = tmp_path / "a.vma"
    devices = [create.SourceDevice("drive-scsi0", str(image))]
    create.create(str(plain), devices, uuid=helpers.UUID_TEXT, ctime=1)
    for ending, command in ((".gz", ["zcat"]), (".zst", ["zstd", "-q", "-d", "-c"])):
        path = f"{plain}{ending}"
        create.create(path, devices, uuid=helpers.UUID_TEXT, ctime=1)
        helpers.need_tool(command[0])
        with open(path, "rb") as file:
            unpacked = subprocess.run(command, stdin=file, stdout=subprocess.PIPE, check=True).stdout
        assert unpacked == plain.read_bytes()


def test_our_zstd_frames_carry_a_checksum(tmp_path: pathlib.Path) -> None:
    create.create(str(tmp_path / "a.vma.zst"), [], [])
    frame = (tmp_path / "a.vma.zst").read_bytes()
    assert frame[4] & 0b100  # the frame header descriptor's content checksum flag
