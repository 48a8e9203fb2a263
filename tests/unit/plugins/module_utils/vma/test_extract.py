# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What extract() writes, what it leaves alone, and what it refuses."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import gzip
import os
import pathlib
import shutil
import stat
import struct
import subprocess
import sys
import types
import typing as t

import pytest

from ansible_collections.vmbackup.vma.plugins.module_utils.vma import (
    compare,
    create,
    errors,
    extract,
    image,
    parallel,
    reader,
)
from ansible_collections.vmbackup.vma.plugins.module_utils.vma.extract import DeviceRequest
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.vma import helpers
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.vma.conftest import MakeLoop, MakeTmpfs
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.vma.helpers import BLOCK, CLUSTER, Slot

DISK, EFI = "drive-scsi0", "drive-efidisk0"
IMAGES = {
    DISK: helpers.make_image(70 * CLUSTER, "disk"),
    EFI: helpers.make_image(540672, "efi"),
}
NAMES = ["disk-drive-efidisk0.raw", "disk-drive-scsi0.raw", "qemu-server.conf"]


@pytest.fixture
def src(tmp_path: pathlib.Path) -> str:
    path = tmp_path / "archive.vma"
    path.write_bytes(helpers.build_archive(IMAGES).join())
    return str(path)


@pytest.fixture
def dest(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "out"


def _one(content: bytes, folder: pathlib.Path, name: str = DISK) -> str:
    path = folder / "one.vma"
    path.write_bytes(helpers.build_archive({name: content}, configs={}).join())
    return str(path)


# --- new targets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_all_to_a_folder_that_is_made(src: str, dest: pathlib.Path, threads: int) -> None:
    done = extract.extract(src, str(dest), threads=threads)
    assert helpers.files_below(dest) == NAMES
    assert (dest / NAMES[0]).read_bytes() == IMAGES[EFI]
    assert (dest / NAMES[1]).read_bytes() == IMAGES[DISK]
    assert (dest / NAMES[2]).read_bytes() == helpers.CONF
    assert (done.changed, done.folder_made, done.integrity) == (True, True, "sha256")
    assert [(device.name, device.size, device.changed) for device in done.devices] == [
        (DISK, len(IMAGES[DISK]), True),
        (EFI, len(IMAGES[EFI]), True),
    ]
    assert [(config.name, config.before, config.changed) for config in done.configs] == [
        ("qemu-server.conf", None, True)
    ]


def test_what_is_made_is_closed_to_others(src: str, dest: pathlib.Path) -> None:
    extract.extract(src, str(dest))
    assert stat.S_IMODE(dest.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in dest.iterdir()} == {0o600}


@pytest.mark.parametrize("ending", ["/", "//", "/."])
def test_a_folder_may_be_written_with_a_slash(src: str, dest: pathlib.Path, ending: str) -> None:
    extract.extract(src, str(dest) + ending)
    assert helpers.files_below(dest) == NAMES


def test_a_folder_that_is_relative(src: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    extract.extract(src, "out")
    assert helpers.files_below(tmp_path / "out") == NAMES


def test_folders_above_are_made(src: str, dest: pathlib.Path) -> None:
    extract.extract(src, str(dest / "a" / "b"))
    assert helpers.files_below(dest / "a" / "b") == NAMES


def test_zero_blocks_become_holes(tmp_path: pathlib.Path, dest: pathlib.Path) -> None:
    content = bytes(100 * CLUSTER) + b"\x01" * BLOCK + bytes(100 * CLUSTER)
    done = extract.extract(_one(content, tmp_path), str(dest))
    assert os.stat(done.devices[0].path).st_blocks * 512 <= 4 * BLOCK
    assert done.devices[0].written_bytes == BLOCK


def test_stored_zeros_are_read_as_zeros(tmp_path: pathlib.Path, dest: pathlib.Path) -> None:
    path = tmp_path / "full.vma"
    content = helpers.make_image(3 * CLUSTER + 512)
    slots: helpers.Extents = [[Slot(1, cluster, 0xFFFF) for cluster in (3, 1, 0, 2)]]
    path.write_bytes(helpers.build_archive({DISK: content}, slots, configs={}).join())
    done = extract.extract(str(path), str(dest))
    assert pathlib.Path(done.devices[0].path).read_bytes() == content


def test_chosen_devices_and_configs(tmp_path: pathlib.Path, dest: pathlib.Path) -> None:
    path = tmp_path / "a.vma"
    path.write_bytes(helpers.build_archive(IMAGES, configs={"a": b"1", "b": b"2"}).join())
    done = extract.extract(str(path), str(dest), devices=[DeviceRequest(EFI)], configs=["b"])
    assert helpers.files_below(dest) == ["b", NAMES[0]]
    assert [item.name for item in done.items()] == [EFI, "b"]


def test_nothing_asked_for(src: str, dest: pathlib.Path) -> None:
    done = extract.extract(src, str(dest), devices=[], configs=[])
    assert not done.changed
    assert not dest.exists()


@pytest.mark.parametrize(
    ("devices", "configs", "message"),
    [
        ([DeviceRequest("drive-scsi9")], None, "no device 'drive-scsi9'.*It has drive-efidisk0, drive-scsi0"),
        (None, ["other.conf"], "no config 'other.conf'.*It has qemu-server.conf"),
        ([DeviceRequest(DISK), DeviceRequest(DISK)], None, "asked for twice"),
    ],
)
def test_what_the_archive_has_not(
    devices: list[DeviceRequest] | None, configs: list[str] | None, message: str, src: str, dest: pathlib.Path
) -> None:
    with pytest.raises(errors.RequestError, match=message):
        extract.extract(src, str(dest), devices=devices, configs=configs)
    assert not dest.exists()


# --- targets that are there -------------------------------------------------------------------------------------------


def test_a_second_run_changes_nothing(src: str, dest: pathlib.Path) -> None:
    extract.extract(src, str(dest))
    before = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in dest.iterdir()}
    done = extract.extract(src, str(dest))
    assert not done.changed
    assert [(device.changed, device.written_bytes, device.reason) for device in done.devices] == [(False, 0, None)] * 2
    assert {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in dest.iterdir()} == before


def _flip_byte(path: pathlib.Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 0xFF]))


_LAST = len(IMAGES[DISK]) - 1


@pytest.mark.parametrize("at", [0, 5 * BLOCK, 59 * CLUSTER - 1, 59 * CLUSTER, _LAST])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_byte_that_differs(src: str, dest: pathlib.Path, at: int, in_place: bool) -> None:
    extract.extract(src, str(dest))
    _flip_byte(dest / NAMES[1], at)
    dry = extract.extract(src, str(dest), in_place=in_place, dry_run=True)
    assert [device.changed for device in dry.devices] == [True, False]
    done = extract.extract(src, str(dest), in_place=in_place)
    assert [device.changed for device in done.devices] == [True, False]
    assert (dest / NAMES[1]).read_bytes() == IMAGES[DISK]
    assert (dest / NAMES[0]).read_bytes() == IMAGES[EFI]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("change", [-1, -512, -CLUSTER, 1, 512, 10 * CLUSTER])
def test_another_size(src: str, dest: pathlib.Path, change: int, in_place: bool) -> None:
    extract.extract(src, str(dest))
    path = dest / NAMES[1]
    content = IMAGES[DISK]
    path.write_bytes(content[:change] if change < 0 else content + b"\xee" * change)
    done = extract.extract(src, str(dest), in_place=in_place)
    assert [device.changed for device in done.devices] == [True, False]
    assert done.devices[0].reason is not None
    assert path.read_bytes() == content


def test_never(src: str, dest: pathlib.Path) -> None:
    dest.mkdir()
    (dest / NAMES[1]).write_bytes(b"mine")
    (dest / NAMES[2]).write_bytes(b"mine")
    done = extract.extract(src, str(dest), overwrite="never")
    assert [device.changed for device in done.devices] == [False, True]
    assert not done.configs[0].changed
    assert (dest / NAMES[1]).read_bytes() == (dest / NAMES[2]).read_bytes() == b"mine"
    assert (dest / NAMES[0]).read_bytes() == IMAGES[EFI]


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_a_file_that_appears_meanwhile_is_never_overwritten(
    image_format: str, src: str, dest: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if image_format != "raw":
        helpers.need_tool("qemu-img")
    disk, config = dest / f"disk-{DISK}.{image_format}", dest / NAMES[2]
    real = reader.Reader.scan

    def appear_last(*args: t.Any, **options: t.Any) -> None:
        real(*args, **options)
        disk.write_bytes(b"another's")
        config.write_bytes(b"another's")

    monkeypatch.setattr(reader.Reader, "scan", appear_last)
    done = extract.extract(src, str(dest), devices=[DeviceRequest(DISK, format=image_format)], overwrite="never")
    assert [(item.changed, item.is_new) for item in done.devices] == [(False, False)]
    assert not done.configs[0].changed
    assert disk.read_bytes() == config.read_bytes() == b"another's"
    assert helpers.files_below(dest) == sorted([disk.name, config.name])


def test_always(src: str, dest: pathlib.Path) -> None:
    extract.extract(src, str(dest))
    inode = (dest / NAMES[1]).stat().st_ino
    done = extract.extract(src, str(dest), overwrite="always")
    assert all(item.changed for item in done.items())
    assert all(device.written_bytes for device in done.devices)
    assert (dest / NAMES[1]).stat().st_ino != inode
    assert (dest / NAMES[1]).read_bytes() == IMAGES[DISK]


def test_in_place_keeps_the_file_and_writes_what_differs(src: str, dest: pathlib.Path) -> None:
    extract.extract(src, str(dest))
    path = dest / NAMES[1]
    inode = path.stat().st_ino
    places = [0, 8 * BLOCK, 60 * CLUSTER]
    for at in places:
        _flip_byte(path, at)
    done = extract.extract(src, str(dest), in_place=True)
    assert path.stat().st_ino == inode
    assert path.read_bytes() == IMAGES[DISK]
    device = done.devices[0]
    assert device.changed
    assert device.written_bytes > 0
    stored = [at for at in places if IMAGES[DISK][at : at + BLOCK].strip(b"\x00")]
    # of stored blocks exactly those are written; zeros are cleared in larger pieces
    if len(stored) == len(places):
        assert device.written_bytes == BLOCK * len(places)


def test_in_place_writes_single_blocks(tmp_path: pathlib.Path, dest: pathlib.Path) -> None:
    content = helpers.make_image(5 * CLUSTER, zero=0, partial=0)
    src = _one(content, tmp_path)
    extract.extract(src, str(dest))
    path = dest / NAMES[1]
    for at in (BLOCK - 1, BLOCK, 7 * BLOCK, 4 * CLUSTER + 5):
        _flip_byte(path, at)
    done = extract.extract(src, str(dest), in_place=True)
    assert done.devices[0].written_bytes == 4 * BLOCK
    assert path.read_bytes() == content


def test_in_place_gives_freed_room_back(tmp_path: pathlib.Path, dest: pathlib.Path) -> None:
    src = _one(bytes(40 * CLUSTER), tmp_path)
    dest.mkdir()
    path = dest / NAMES[1]
    path.write_bytes(b"\xee" * (40 * CLUSTER))
    os.sync()
    extract.extract(src, str(dest), in_place=True)
    assert path.read_bytes() == bytes(40 * CLUSTER)
    assert path.stat().st_blocks * 512 <= CLUSTER


def test_without_holes_zeros_are_written(
    tmp_path: pathlib.Path, dest: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image, "_punch_hole", lambda _fd, _offset, _length: False)
    content = bytes(CLUSTER) + b"x" * 100 + bytes(2 * CLUSTER)
    src = _one(content, tmp_path)
    dest.mkdir()
    (dest / NAMES[1]).write_bytes(b"\xee" * len(content))
    done = extract.extract(src, str(dest), in_place=True)
    assert (dest / NAMES[1]).read_bytes() == content.ljust(done.devices[0].size, b"\x00")


def test_an_existing_file_stays_until_the_new_one_is_whole(
    src: str, dest: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dest.mkdir()
    for name in NAMES:
        (dest / name).write_bytes(b"mine")

    def fail(*_args: object) -> t.NoReturn:
        raise errors.TargetError("stop")

    monkeypatch.setattr(image.NewFile, "finish", fail)
    monkeypatch.setattr(image.Patch, "finish", fail)
    with pytest.raises(errors.TargetError, match="stop"):
        extract.extract(src, str(dest))
    assert helpers.files_below(dest) == NAMES
    assert {(dest / name).read_bytes() for name in NAMES} == {b"mine"}


def test_owner_and_mode_of_the_old_file_are_kept(src: str, dest: pathlib.Path) -> None:
    extract.extract(src, str(dest))
    path = dest / NAMES[1]
    path.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(path, 1234, 4321)
    owner = (path.stat().st_uid, path.stat().st_gid)
    path.write_bytes(b"other")
    extract.extract(src, str(dest))
    assert path.read_bytes() == IMAGES[DISK]
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert (path.stat().st_uid, path.stat().st_gid) == owner


@pytest.mark.parametrize("change", [-CLUSTER, 0, CLUSTER])
def test_reflink_copies_are_patched(reflinks: pathlib.Path, change: int) -> None:
    content = helpers.make_image(40 * CLUSTER, zero=0.2, partial=0.2)
    src = _one(content, reflinks)
    dest = reflinks / "out"
    extract.extract(src, str(dest))
    path = dest / NAMES[1]
    path.write_bytes((content + bytes(CLUSTER))[: len(content) + change])
    _flip_byte(path, 100)
    inode = path.stat().st_ino
    clone = image.clone_for_patch(str(path), len(content))
    assert clone is not None
    clone.discard()
    done = extract.extract(src, str(dest))
    assert path.read_bytes() == content
    assert path.stat().st_ino != inode
    assert done.devices[0].written_bytes <= BLOCK + max(0, -change) + (1 << 20)
    assert helpers.files_below(dest) == [NAMES[1]]


def test_without_reflinks_the_file_is_made_anew(src: str, dest: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extract, "clone_for_patch", lambda _path, _size: None)
    extract.extract(src, str(dest))
    _flip_byte(dest / NAMES[1], 5)
    done = extract.extract(src, str(dest))
    assert (dest / NAMES[1]).read_bytes() == IMAGES[DISK]
    stored = sum(bool(IMAGES[DISK][at : at + BLOCK].strip(b"\x00")) for at in range(0, len(IMAGES[DISK]), BLOCK))
    assert done.devices[0].written_bytes == stored * BLOCK


# --- dry runs ---------------------------------------------------------------------------------------------------------


def test_dry_run_writes_nothing(src: str, tmp_path: pathlib.Path, dest: pathlib.Path) -> None:
    done = extract.extract(src, str(dest), dry_run=True)
    assert done.changed
    assert [(device.changed, device.reason) for device in done.devices] == [(True, "there is no such file")] * 2
    assert helpers.files_below(tmp_path) == ["archive.vma"]
    assert not dest.exists()


@pytest.mark.parametrize("in_place", [False, True])
def test_dry_run_tells_what_a_run_does(src: str, dest: pathlib.Path, in_place: bool) -> None:
    extract.extract(src, str(dest))
    _flip_byte(dest / NAMES[0], 4096)
    (dest / NAMES[2]).write_bytes(b"old")
    before = {path.name: path.read_bytes() for path in dest.iterdir()}
    dry = extract.extract(src, str(dest), in_place=in_place, dry_run=True)
    assert {path.name: path.read_bytes() for path in dest.iterdir()} == before
    assert (dry.configs[0].before, dry.configs[0].data) == (b"old", helpers.CONF)
    done = extract.extract(src, str(dest), in_place=in_place)
    assert [item.changed for item in dry.items()] == [item.changed for item in done.items()] == [False, True, True]
    assert not extract.extract(src, str(dest), in_place=in_place, dry_run=True).changed


# --- block devices ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [0, 512, 3 * CLUSTER], ids=["exact", "a sector more", "larger"])
def test_block_device(make_loop: MakeLoop, src: str, dest: pathlib.Path, more: int) -> None:
    device = make_loop(len(IMAGES[DISK]) + more)
    request = [DeviceRequest(DISK, device)]
    done = extract.extract(src, str(dest), devices=request, configs=[])
    with open(device, "rb") as file:
        content = file.read()
    # not one of the stale bytes survives, and behind the disk nothing is touched
    assert content[: len(IMAGES[DISK])] == IMAGES[DISK]
    assert content[len(IMAGES[DISK]) :] == b"\xee" * more
    assert (done.devices[0].path, done.devices[0].changed) == (device, True)
    assert not dest.exists()

    assert not extract.extract(src, str(dest), devices=request, configs=[], dry_run=True).changed
    again = extract.extract(src, str(dest), devices=request, configs=[])
    assert (again.changed, again.devices[0].written_bytes) == (False, 0)


def test_block_device_gets_what_differs(make_loop: MakeLoop, tmp_path: pathlib.Path, dest: pathlib.Path) -> None:
    content = helpers.make_image(20 * CLUSTER, zero=0, partial=0)
    src = _one(content, tmp_path)
    device = make_loop(len(content))
    request = [DeviceRequest(DISK, device)]
    extract.extract(src, str(dest), devices=request)
    with open(device, "r+b") as file:
        file.seek(7 * BLOCK)
        file.write(b"\xee" * BLOCK)
    dry = extract.extract(src, str(dest), devices=request, dry_run=True)
    assert (dry.devices[0].changed, dry.devices[0].reason) == (True, f"it differs at offset {7 * BLOCK}")
    done = extract.extract(src, str(dest), devices=request)
    assert (done.devices[0].changed, done.devices[0].written_bytes) == (True, BLOCK)
    with open(device, "rb") as file:
        assert file.read() == content


def test_block_device_with_an_odd_size(make_loop: MakeLoop, tmp_path: pathlib.Path, dest: pathlib.Path) -> None:
    # another writer's archive may have a device that ends inside a sector
    content = b"x" * 1000 + bytes(2 * CLUSTER) + b"y" * 100 + bytes(1000)
    src = _one(content, tmp_path)
    device = make_loop(-(-len(content) // 512) * 512)
    extract.extract(src, str(dest), devices=[DeviceRequest(DISK, device)])
    with open(device, "rb") as file:
        assert file.read(len(content)) == content


def test_block_device_that_is_too_small(make_loop: MakeLoop, src: str, dest: pathlib.Path) -> None:
    device = make_loop(len(IMAGES[DISK]) - 512)
    with pytest.raises(errors.TargetError, match=f"has {len(IMAGES[DISK]) - 512} bytes"):
        extract.extract(src, str(dest), devices=[DeviceRequest(DISK, device)])
    with open(device, "rb") as file:
        assert file.read().strip(b"\xee") == b""


@pytest.mark.parametrize("dry_run", [False, True], ids=["write", "check"])
def test_block_device_that_is_in_use(
    dry_run: bool, make_loop: MakeLoop, src: str, dest: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    helpers.need_tool("mkfs.ext4")
    device = make_loop(len(IMAGES[DISK]))
    subprocess.run(["mkfs.ext4", "-q", device], check=True)
    folder = tmp_path / "mounted"
    folder.mkdir()
    subprocess.run(["mount", device, str(folder)], check=True)
    try:
        with pytest.raises(errors.TargetError, match="in use"):
            extract.extract(src, str(dest), devices=[DeviceRequest(DISK, device)], dry_run=dry_run)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_block_device_under_two_names(
    make_loop: MakeLoop, src: str, dest: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    device = make_loop(len(IMAGES[DISK]))
    node = tmp_path / "node"
    os.mknod(node, stat.S_IFBLK | 0o600, os.stat(device).st_rdev)
    requests = [DeviceRequest(DISK, device), DeviceRequest(EFI, str(node))]
    with pytest.raises(errors.RequestError, match="one target under two names"):
        extract.extract(src, str(dest), devices=requests)


def test_block_device_of_another_format(make_loop: MakeLoop, src: str, dest: pathlib.Path) -> None:
    device = make_loop(len(IMAGES[DISK]))
    with pytest.raises(errors.RequestError, match="qcow2 cannot be written in place"):
        extract.extract(src, str(dest), devices=[DeviceRequest(DISK, device, "qcow2")])


def test_ram_state_to_a_block_device_of_its_size(
    make_loop: MakeLoop, tmp_path: pathlib.Path, dest: pathlib.Path
) -> None:
    content = helpers.make_image(2 * CLUSTER + 512, zero=0)
    src = _one(content, tmp_path, "vmstate")
    device = make_loop(len(content))
    extract.extract(src, str(dest), devices=[DeviceRequest("vmstate", device)])
    with open(device, "rb") as file:
        assert file.read() == content


# --- RAM states -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alone", [False, True], ids=["with the disk", "alone"])
@pytest.mark.parametrize("told", [4, 5, 3], ids=["as told", "ends inside its last cluster", "longer than told"])
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_ram_state(tmp_path: pathlib.Path, dest: pathlib.Path, told: int, alone: bool, ending: str) -> None:
    """Its size in the header need not bound it: what counts is the stream of its clusters."""
    disk = helpers.make_image(4 * CLUSTER, "disk")
    size = {4: 4 * CLUSTER, 5: 3 * CLUSTER + 512, 3: 3 * CLUSTER}[told]
    stream = helpers.make_image(4 * CLUSTER, "ram", zero=0)
    if told == 5:
        stream = stream[:size]
    extents: helpers.Extents = [
        [Slot(2, 0, 0xFFFF), Slot(1, 0), Slot(2, 1, 0xFFFF)],
        [Slot(1, 1), Slot(2, 2, 0xFFFF), Slot(1, 2)],
        [Slot(2, 3, 0xFFFF), Slot(1, 3)],
    ]
    archive = helpers.build_archive({DISK: disk, "vmstate": stream}, extents, sizes={"vmstate": size}, configs={})
    path = tmp_path / f"a.vma{ending}"
    path.write_bytes(gzip.compress(archive.join()) if ending else archive.join())
    devices = [DeviceRequest("vmstate")] if alone else None
    done = extract.extract(str(path), str(dest), devices=devices)
    assert (dest / "vmstate.bin").read_bytes() == stream
    state = next(device for device in done.devices if device.name == "vmstate")
    assert state.size == len(stream)
    assert not extract.extract(str(path), str(dest), devices=devices).changed
    # over an older one, in place as well
    for content in (b"", stream[:-1], b"\xee" * (len(stream) + 5)):
        (dest / "vmstate.bin").write_bytes(content)
        assert extract.extract(str(path), str(dest), devices=devices, in_place=True).changed
        assert (dest / "vmstate.bin").read_bytes() == stream


def test_ram_state_gets_the_zeros_that_masks_leave_out(tmp_path: pathlib.Path, dest: pathlib.Path) -> None:
    content = bytes(CLUSTER) + b"x" * BLOCK + bytes(CLUSTER - BLOCK)
    path = tmp_path / "a.vma"
    path.write_bytes(helpers.build_archive({"vmstate": content}, [[Slot(1, 0), Slot(1, 1)]], configs={}).join())
    extract.extract(str(path), str(dest))
    assert (dest / "vmstate.bin").read_bytes() == content


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("overwrite", extract.OVERWRITE)
def test_links_that_wait_are_not_followed(
    name: str, overwrite: str, src: str, dest: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    dest.mkdir()
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    (dest / name).symlink_to(victim)
    with pytest.raises(errors.TargetError, match="symbolic link is in the way"):
        extract.extract(src, str(dest), overwrite=overwrite)
    assert victim.read_bytes() == b"mine"
    assert helpers.files_below(dest) == [name]


def test_a_link_that_the_user_names_is_followed(src: str, dest: pathlib.Path, tmp_path: pathlib.Path) -> None:
    real = tmp_path / "real"
    (tmp_path / "link").symlink_to(real)
    requests = [DeviceRequest(DISK, str(tmp_path / "link"))]
    done = extract.extract(src, str(dest), devices=requests, configs=[])
    assert done.devices[0].path == str(real)
    assert real.read_bytes() == IMAGES[DISK]
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_in_the_way(name: str, src: str, dest: pathlib.Path) -> None:
    (dest / name).mkdir(parents=True)
    with pytest.raises(errors.TargetError, match="in the way"):
        extract.extract(src, str(dest))


def test_a_file_where_the_folder_should_be(src: str, dest: pathlib.Path) -> None:
    dest.write_bytes(b"mine")
    with pytest.raises(errors.VmaError):
        extract.extract(src, str(dest))
    assert dest.read_bytes() == b"mine"


@pytest.mark.parametrize("is_there", [False, True], ids=["folder missing", "folder there"])
def test_a_name_too_long_for_the_file_system(is_there: bool, tmp_path: pathlib.Path, dest: pathlib.Path) -> None:
    if is_there:
        dest.mkdir()
    src = _one(b"x" * 512, tmp_path, "d" * 255)
    with pytest.raises(errors.VmaError):
        extract.extract(src, str(dest))
    assert helpers.files_below(dest) == []


def test_a_folder_for_a_target_that_is_not_there(src: str, dest: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(errors.RequestError, match="folder for this target does not exist"):
        extract.extract(src, str(dest), devices=[DeviceRequest(DISK, str(tmp_path / "absent" / "disk"))])


def test_a_target_that_is_no_file(src: str, dest: pathlib.Path, tmp_path: pathlib.Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", pathlib.Path("/dev/null")):
        with pytest.raises(errors.TargetError, match="expected a file or a block device"):
            extract.extract(src, str(dest), devices=[DeviceRequest(DISK, str(path))])


@pytest.mark.parametrize("how", ["same", "link", "hard link", "default name", "config"])
def test_two_targets_in_one(how: str, src: str, dest: pathlib.Path, tmp_path: pathlib.Path) -> None:
    dest.mkdir()
    first = str(tmp_path / "first")
    second = str(tmp_path / "second")
    configs: list[str] = []
    if how == "link":
        os.symlink(first, second)
    elif how == "hard link":
        pathlib.Path(first).write_bytes(b"mine")
        os.link(first, second)
    elif how == "default name":
        second = str(dest / NAMES[1])
    elif how == "config":
        first, configs = str(dest / NAMES[2]), ["qemu-server.conf"]
    requests = {
        "same": [DeviceRequest(DISK, first), DeviceRequest(EFI, first)],
        "default name": [DeviceRequest(DISK), DeviceRequest(EFI, second)],
        "config": [DeviceRequest(DISK, first)],
    }.get(how, [DeviceRequest(DISK, first), DeviceRequest(EFI, second)])
    with pytest.raises(errors.RequestError, match="one target"):
        extract.extract(src, str(dest), devices=requests, configs=configs)


@pytest.mark.parametrize("how", ["same", "link", "hard link"])
@pytest.mark.parametrize("overwrite", extract.OVERWRITE)
def test_the_archive_as_target(how: str, overwrite: str, src: str, dest: pathlib.Path, tmp_path: pathlib.Path) -> None:
    path = str(tmp_path / "other")
    if how == "link":
        os.symlink(src, path)
    elif how == "hard link":
        os.link(src, path)
    else:
        path = src
    before = pathlib.Path(src).read_bytes()
    with pytest.raises(errors.RequestError, match="the archive itself"):
        extract.extract(src, str(dest), devices=[DeviceRequest(DISK, path)], overwrite=overwrite)
    assert pathlib.Path(src).read_bytes() == before


def test_an_archive_among_its_targets(dest: pathlib.Path) -> None:
    dest.mkdir()
    src = dest / "qemu-server.conf"
    src.write_bytes(helpers.build_archive(IMAGES).join())
    with pytest.raises(errors.RequestError, match="the archive itself"):
        extract.extract(str(src), str(dest))


def _rename(path: pathlib.Path, old: bytes, new: bytes) -> None:
    archive = helpers.build_archive(IMAGES)
    at = archive.header.index(old + b"\x00")
    archive.header[at : at + len(old)] = new
    helpers.seal_header(archive.header)
    path.write_bytes(archive.join())


def test_an_unsafe_name_with_a_path_of_the_users(tmp_path: pathlib.Path, dest: pathlib.Path) -> None:
    path = tmp_path / "a.vma"
    _rename(path, b"drive-scsi0", b"../../scsi0")
    with pytest.raises(errors.ArchiveError) as caught:
        extract.extract(str(path), str(dest))
    assert caught.value.problem.kind == "unsafe_name"
    target = str(tmp_path / "disk")
    done = extract.extract(str(path), str(dest), devices=[DeviceRequest("../../scsi0", target)], configs=[])
    assert pathlib.Path(target).read_bytes() == IMAGES[DISK]
    assert done.devices[0].name == "../../scsi0"
    # the other device is not held up by its neighbour's name
    extract.extract(str(path), str(dest), devices=[DeviceRequest(EFI)])
    assert helpers.files_below(dest) == [NAMES[0], NAMES[2]]


def test_a_config_does_not_escape(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.vma"
    _rename(path, b"qemu-server.conf", b"../escaped02.txt")
    dest = tmp_path / "below" / "out"
    for configs in (None, ["../escaped02.txt"]):
        with pytest.raises(errors.ArchiveError) as caught:
            extract.extract(str(path), str(dest), configs=configs)
        assert caught.value.problem.kind == "unsafe_name"
    extract.extract(str(path), str(dest), configs=[])
    assert sorted(os.listdir(tmp_path)) == ["a.vma", "below"]
    assert helpers.files_below(dest) == NAMES[:2]


@pytest.mark.parametrize("content", [b"", b"not an archive at all"])
def test_no_archive(content: bytes, tmp_path: pathlib.Path, dest: pathlib.Path) -> None:
    path = tmp_path / "a.vma"
    path.write_bytes(content)
    with pytest.raises(errors.ArchiveError) as caught:
        extract.extract(str(path), str(dest))
    assert caught.value.problem.kind == "not_vma"
    with pytest.raises(errors.RequestError, match="cannot be opened"):
        extract.extract(str(tmp_path / "absent"), str(dest))
    assert not dest.exists()


@pytest.mark.parametrize("dry_run", [False, True])
def test_same_bytes_and_yet_a_damaged_archive(tmp_path: pathlib.Path, dest: pathlib.Path, dry_run: bool) -> None:
    """What is there equals what can be read; the archive is refused all the same."""
    archive = helpers.build_archive(IMAGES, configs={})
    path = tmp_path / "a.vma"
    path.write_bytes(archive.join())
    extract.extract(str(path), str(dest))
    path.write_bytes(archive.join()[: archive.offset(1)])
    with pytest.raises(errors.ArchiveError):
        extract.extract(str(path), str(dest), dry_run=dry_run)
    assert {(dest / f"disk-{name}.raw").read_bytes() for name in IMAGES} == set(IMAGES.values())


# --- damaged archives -------------------------------------------------------------------------------------------------


def test_devices_before_the_damage_are_extracted(tmp_path: pathlib.Path, dest: pathlib.Path) -> None:
    images = {name: helpers.make_image(59 * CLUSTER, name) for name in ("a", "b", "c")}
    archive = helpers.build_archive(images)
    archive.extents[1][600] ^= 1
    path = tmp_path / "a.vma"
    path.write_bytes(archive.join()[: archive.offset(2) + 100])
    with pytest.raises(errors.ArchiveError):
        extract.extract(str(path), str(dest))
    assert helpers.files_below(dest) == []
    done = extract.extract(str(path), str(dest), devices=[DeviceRequest("a")])
    assert pathlib.Path(done.devices[0].path).read_bytes() == images["a"]
    with pytest.raises(errors.ArchiveError) as caught:
        extract.extract(str(path), str(dest), devices=[DeviceRequest("b")])
    assert caught.value.problem.kind == "extent_digest"
    with pytest.raises(errors.ArchiveError) as caught:
        extract.extract(str(path), str(dest), devices=[DeviceRequest("c")])
    assert caught.value.problem.kind == "truncated"
    assert helpers.files_below(dest) == ["disk-a.raw", "qemu-server.conf"]


# --- room -------------------------------------------------------------------------------------------------------------


def test_no_room_is_told_before_the_first_write(make_tmpfs: MakeTmpfs, src: str) -> None:
    folder = make_tmpfs(1 << 20)
    with pytest.raises(errors.SpaceError, match="may need"):
        extract.extract(src, str(folder / "out"))
    assert os.listdir(folder) == []


@pytest.mark.parametrize("threads", [1, 3])
def test_no_room_while_writing(make_tmpfs: MakeTmpfs, src: str, threads: int) -> None:
    folder = make_tmpfs(1 << 20)
    with pytest.raises(errors.SpaceError, match="no room"):
        extract.extract(src, str(folder / "out"), check_space=False, threads=threads)
    assert helpers.files_below(folder) == []


def test_holes_need_no_room(make_tmpfs: MakeTmpfs, tmp_path: pathlib.Path) -> None:
    # the archive itself tells that its data is smaller than its device
    src = _one(bytes(40 * CLUSTER) + b"x" * 512, tmp_path)
    folder = make_tmpfs(1 << 20)
    extract.extract(src, str(folder / "out"))
    assert (folder / "out" / NAMES[1]).stat().st_size == 40 * CLUSTER + 512


# --- other formats ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_format", ["qcow2", "vmdk"])
def test_to_another_format(image_format: str, src: str, dest: pathlib.Path, tmp_path: pathlib.Path) -> None:
    tool = helpers.need_tool("qemu-img")
    requests = [DeviceRequest(DISK, None, image_format)]
    done = extract.extract(src, str(dest), devices=requests, configs=[])
    path = dest / f"disk-{DISK}.{image_format}"
    assert done.devices[0].path == str(path)
    assert helpers.files_below(dest) == [path.name]
    raw = tmp_path / "raw"
    subprocess.run([tool, "convert", "-f", image_format, "-O", "raw", str(path), str(raw)], check=True)
    assert raw.read_bytes() == IMAGES[DISK]
    inode = path.stat().st_ino
    assert not extract.extract(src, str(dest), devices=requests, configs=[]).changed
    assert path.stat().st_ino == inode
    # what differs is written anew
    subprocess.run([tool, "create", "-q", "-f", image_format, str(path), str(len(IMAGES[DISK]))], check=True)
    assert extract.extract(src, str(dest), devices=requests, configs=[]).changed
    raw.unlink()
    subprocess.run([tool, "convert", "-f", image_format, "-O", "raw", str(path), str(raw)], check=True)
    assert raw.read_bytes() == IMAGES[DISK]
    assert helpers.files_below(dest) == [path.name]


def test_to_another_format_without_the_tool(
    src: str, dest: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(errors.ToolError, match=r"qemu-img.*Install the package qemu-utils"):
        extract.extract(src, str(dest), devices=[DeviceRequest(DISK, None, "qcow2")], configs=[])
    assert helpers.files_below(dest) == []


def test_a_target_that_is_no_image_of_the_format(src: str, dest: pathlib.Path) -> None:
    helpers.need_tool("qemu-img")
    dest.mkdir()
    path = dest / f"disk-{DISK}.qcow2"
    path.write_bytes(b"no qcow2 at all" * 100)
    done = extract.extract(src, str(dest), devices=[DeviceRequest(DISK, None, "qcow2")], configs=[])
    assert done.changed
    assert path.read_bytes()[:4] == b"QFI\xfb"


# --- several runs, and the end of one ---------------------------------------------------------------------------------


def test_two_runs_at_once(src: str, dest: pathlib.Path) -> None:
    dest.mkdir()
    other = image.NewFile(str(dest / NAMES[0]))
    try:
        with pytest.raises(errors.BusyError, match="another run"):
            extract.extract(src, str(dest))
    finally:
        other.discard()
    assert helpers.files_below(dest) == []
    extract.extract(src, str(dest))
    assert helpers.files_below(dest) == NAMES


_KILLED = """
import os, signal, sys
sys.path[:] = {path!r}
from ansible_collections.vmbackup.vma.plugins.module_utils.vma import extract, image
real = image.NewFile.write
def write(self, view, offset):
    real(self, view, offset)
    os.kill(os.getpid(), signal.SIGKILL)
image.NewFile.write = write
extract.extract({src!r}, {dest!r})
"""


def test_what_a_killed_run_left_is_removed(src: str, dest: pathlib.Path) -> None:
    script = _KILLED.format(path=sys.path, src=src, dest=str(dest))
    killed = subprocess.run([sys.executable, "-c", script], check=False)
    assert killed.returncode == -9
    left = helpers.files_below(dest)
    assert left
    assert not set(left) & set(NAMES)
    extract.extract(src, str(dest))
    assert helpers.files_below(dest) == NAMES


def test_bandwidth_limit(src: str, dest: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]

    def pause(_crew: parallel.Crew, seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(parallel, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(parallel.Crew, "pause", pause)
    rate = 100_000
    extract.extract(src, str(dest), threads=1, bytes_per_second=rate)
    size = os.path.getsize(src)
    # the last extent need not be waited for
    assert size / rate * 0.5 < now[0] - 100 <= size / rate


def test_no_descriptor_is_left_open(src: str, dest: pathlib.Path, tmp_path: pathlib.Path) -> None:
    gc.collect()  # what other tests left may hold descriptors
    before = len(os.listdir("/proc/self/fd"))
    extract.extract(src, str(dest))
    extract.extract(src, str(dest))
    _flip_byte(dest / NAMES[1], 0)
    extract.extract(src, str(dest), in_place=True)
    broken = tmp_path / "broken.vma"
    broken.write_bytes(pathlib.Path(src).read_bytes()[:-1])
    shutil.rmtree(dest)
    with contextlib.suppress(errors.ArchiveError):
        extract.extract(str(broken), str(dest))
    create.create(str(tmp_path / "b.vma.zst"), [create.SourceDevice("d", src)])
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("digest", [True, False], ids=["digests", "no digests"])
def test_a_device_alone_out_of_a_damaged_compressed_archive(
    tmp_path: pathlib.Path, dest: pathlib.Path, digest: bool
) -> None:
    """Without digests, only the compression's checksum at the very end vouches for what came before."""
    images = {DISK: helpers.make_image(4 * CLUSTER, "first"), EFI: helpers.make_image(200 * CLUSTER, "second", zero=0)}
    whole = gzip.compress(helpers.build_archive(images, digest=digest, configs={}).join())
    path = tmp_path / "a.vma.gz"
    path.write_bytes(whole[:-8] + bytes(4) + whole[-4:])
    if digest:
        extract.extract(str(path), str(dest), devices=[DeviceRequest(DISK)])
        assert (dest / f"disk-{DISK}.raw").read_bytes() == images[DISK]
    else:
        with pytest.raises(errors.ArchiveError, match="decompression"):
            extract.extract(str(path), str(dest), devices=[DeviceRequest(DISK)])
        assert helpers.files_below(dest) == []


@pytest.mark.parametrize("number", [0, 2], ids=["its own extent", "another's"])
def test_a_device_alone_out_of_a_damaged_archive(tmp_path: pathlib.Path, dest: pathlib.Path, number: int) -> None:
    """What vma_info calls whole can be extracted, whatever became of the rest."""
    images = {EFI: helpers.make_image(130 * CLUSTER, "first"), DISK: helpers.make_image(60 * CLUSTER, "second")}
    archive = helpers.build_archive(images, configs={})
    damaged = len(archive.extents) - 1 if number == 0 else 0
    archive.extents[damaged][100] ^= 1
    path = tmp_path / "a.vma"
    path.write_bytes(archive.join())
    assert helpers.look(path).whole == {EFI: damaged != 0, DISK: damaged == 0}
    if damaged:
        with pytest.raises(errors.ArchiveError, match="extent_checksum"):
            extract.extract(str(path), str(dest), devices=[DeviceRequest(DISK)])
        assert helpers.files_below(dest) == []
    else:
        extract.extract(str(path), str(dest), devices=[DeviceRequest(DISK)])
        assert (dest / f"disk-{DISK}.raw").read_bytes() == images[DISK]
    with pytest.raises(errors.ArchiveError, match="extent_checksum"):
        extract.extract(str(path), str(dest))


def test_check_mode_does_not_promise_room_that_is_not_there(tmp_path: pathlib.Path, make_tmpfs: MakeTmpfs) -> None:
    path = tmp_path / "a.vma.gz"
    path.write_bytes(gzip.compress(helpers.build_archive({DISK: bytes(64 << 20)}).join()))
    small = make_tmpfs(1 << 20)
    for dry_run in (True, False):
        with pytest.raises(errors.SpaceError, match="the disks may need"):
            extract.extract(str(path), f"{small}/out", dry_run=dry_run)


# --- targets and archives that change meanwhile -----------------------------------------------------------------------


@contextlib.contextmanager
def _used_by_qemu(path: pathlib.Path) -> t.Iterator[None]:
    """Hold the lock that a QEMU holds which writes to the image."""
    with path.open("r+b") as file:
        lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 201, 1, 0)
        fcntl.fcntl(file.fileno(), fcntl.F_OFD_SETLK, lock)
        yield


@pytest.mark.parametrize("dry_run", [False, True], ids=["write", "check"])
@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_the_image_of_a_running_vm_is_not_replaced(
    image_format: str, dry_run: bool, src: str, tmp_path: pathlib.Path
) -> None:
    target = tmp_path / "disk"
    target.write_bytes(b"in use")
    request = [DeviceRequest(DISK, str(target), image_format)]
    with _used_by_qemu(target), pytest.raises(errors.TargetError, match="a running VM uses this image"):
        extract.extract(src, str(tmp_path), devices=request, overwrite="always", dry_run=dry_run)
    assert target.read_bytes() == b"in use"


@pytest.mark.parametrize("dry_run", [False, True], ids=["write", "check"])
def test_the_image_of_a_running_vm_is_not_patched(dry_run: bool, src: str, tmp_path: pathlib.Path) -> None:
    target = tmp_path / "disk"
    target.write_bytes(b"in use")
    request = [DeviceRequest(DISK, str(target))]
    with _used_by_qemu(target), pytest.raises(errors.TargetError, match="a running VM uses this image"):
        extract.extract(src, str(tmp_path), devices=request, in_place=True, dry_run=dry_run)
    assert target.read_bytes() == b"in use"


def test_a_vm_that_is_started_while_its_image_is_extracted(
    src: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "disk"
    target.write_bytes(b"in use")
    real = image.NewFile.finish
    with contextlib.ExitStack() as stack:

        def finish(new: image.NewFile, size: int) -> None:
            stack.enter_context(_used_by_qemu(target))
            real(new, size)

        monkeypatch.setattr(image.NewFile, "finish", finish)
        with pytest.raises(errors.TargetError, match="a running VM uses this image"):
            extract.extract(
                src, str(tmp_path), devices=[DeviceRequest(DISK, str(target))], configs=[], overwrite="always"
            )
    assert target.read_bytes() == b"in use"


def test_check_mode_refuses_a_block_device_that_is_too_small(make_loop: MakeLoop, src: str, dest: pathlib.Path) -> None:
    request = [DeviceRequest(DISK, make_loop(CLUSTER))]
    for dry_run in (False, True):
        with pytest.raises(errors.TargetError, match=f"the block device has {CLUSTER} bytes"):
            extract.extract(src, str(dest), devices=request, configs=[], dry_run=dry_run)
    assert not extract.extract(src, str(dest), devices=request, configs=[], overwrite="never").changed


def test_no_extent_read_is_no_integrity(src: str, dest: pathlib.Path) -> None:
    dest.mkdir()
    (dest / "disk-drive-scsi0.raw").write_bytes(b"of another size")
    done = extract.extract(src, str(dest), devices=[DeviceRequest(DISK)], dry_run=True)
    assert (done.changed, done.integrity) == (True, None)


@pytest.mark.parametrize("what", ["another one", "a config", "a touch"])
def test_an_archive_that_is_replaced_before_it_is_read(
    what: str, src: str, dest: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conf = helpers.CONF.swapcase()
    other = helpers.build_archive(IMAGES, configs={"qemu-server.conf": conf if what == "a config" else helpers.CONF})
    if what == "another one":
        for part in (other.header, *other.extents):
            part[8:24] = bytes(16)
        helpers.seal_header(other.header)
    status = os.stat(src)
    real = extract._Job.look_at_targets

    def replace_and_look(job: extract._Job) -> None:
        pathlib.Path(src + ".new").write_bytes(other.join())
        os.rename(src + ".new", src)
        os.utime(src, ns=(0, status.st_mtime_ns + (what == "a touch")))
        real(job)

    monkeypatch.setattr(extract._Job, "look_at_targets", replace_and_look)
    with pytest.raises(errors.RequestError, match="the archive was replaced while it was read"):
        extract.extract(src, str(dest))
    assert not dest.exists()


def test_a_target_that_changes_while_it_is_compared(
    src: str, dest: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract.extract(src, str(dest))
    real = compare.differing

    def compare_and_change(*args: t.Any, **options: t.Any) -> dict[int, int]:
        found = real(*args, **options)
        os.utime(dest / "disk-drive-scsi0.raw", ns=(0, 0))
        return found

    monkeypatch.setattr(extract, "differing", compare_and_change)
    with pytest.raises(errors.SourceError, match="no single instant"):
        extract.extract(src, str(dest))
