# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Reflink copies, on loop-mounted btrfs and xfs, and refusals where there are none."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pathlib
import shutil
import stat
import subprocess
import typing as t

import pytest

from ansible_collections.vmbackup.vma.extensions.molecule.tools import check_instant
from ansible_collections.vmbackup.vma.plugins.module_utils.host import provider, reflink
from ansible_collections.vmbackup.vma.plugins.module_utils.host.errors import SnapshotError
from ansible_collections.vmbackup.vma.plugins.module_utils.vma import errors, qemu
from ansible_collections.vmbackup.vma.tests.machines.provider_run import RUN_ID, Guest, Run, disks, paths
from ansible_collections.vmbackup.vma.tests.machines.writer import DISK_SIZE, Writer, compile_writer

MIB = 1 << 20
FILE_SYSTEMS = {
    "btrfs": ["mkfs.btrfs", "-q"],
    "xfs": ["mkfs.xfs", "-q", "-m", "reflink=1"],
    "xfs without reflinks": ["mkfs.xfs", "-q", "-m", "reflink=0"],
    "ext4": ["mkfs.ext4", "-q"],
}

Mount = t.Callable[[str], pathlib.Path]


@pytest.fixture(scope="module")
def mount(tmp_path_factory: pytest.TempPathFactory) -> t.Iterator[Mount]:
    """Mount new file systems of half a GiB; each kind once."""
    if os.geteuid() != 0:
        pytest.skip("file systems need root")
    place = tmp_path_factory.mktemp("mounts")
    mounted: dict[str, pathlib.Path] = {}
    with contextlib.ExitStack() as stack:

        def mount_one(kind: str) -> pathlib.Path:
            if kind in mounted:
                return mounted[kind]
            command = FILE_SYSTEMS[kind]
            if shutil.which(command[0]) is None:
                pytest.skip(f"the tool {command[0]} is not installed")
            backing = place / f"{len(mounted)}.img"
            with backing.open("wb") as file:
                file.truncate(512 * MIB)
            subprocess.run([*command, str(backing)], check=True, capture_output=True)
            folder = place / str(len(mounted))
            folder.mkdir()
            subprocess.run(["mount", "-o", "loop", str(backing), str(folder)], check=True)
            stack.callback(subprocess.run, ["umount", "-l", str(folder)], check=True)
            mounted[kind] = folder
            return folder

        yield mount_one


@pytest.fixture(params=["btrfs", "xfs"])
def folder(request: pytest.FixtureRequest, mount: Mount) -> t.Iterator[pathlib.Path]:
    """An empty folder on a file system with reflinks."""
    path = mount(request.param) / "images"
    path.mkdir()
    yield path
    shutil.rmtree(path)


@pytest.fixture
def writer(tmp_path: pathlib.Path) -> t.Iterator[t.Callable[..., Writer]]:
    """Start processes that write to images all the time."""
    if shutil.which("cc") is None:
        pytest.skip("the writer cannot be compiled: cc of gcc is not installed")
    with contextlib.ExitStack() as stack:
        yield lambda *images: stack.enter_context(Writer(compile_writer(tmp_path), images))


def make_image(folder: pathlib.Path, name: str = "disk.raw", data: bytes = b"") -> pathlib.Path:
    path = folder / name
    path.write_bytes(data)
    os.truncate(path, DISK_SIZE)
    return path


def run_with(place: pathlib.Path, *images: pathlib.Path, guest: Guest | None = None) -> Run:
    return Run(place, reflink.ReflinkCopies(disks(*images)), guest)


def test_an_image_is_frozen_while_its_guest_writes(
    folder: pathlib.Path, writer: t.Callable[..., Writer], tmp_path: pathlib.Path
) -> None:
    path = make_image(folder)
    guest = writer(path)
    with run_with(tmp_path, path) as run:
        last = guest.last_write()
        assert reflink.ReflinkCopies.fits(str(path))
        assert run.provider.plan().consistency == provider.CRASH
        assert os.listdir(folder) == ["disk.raw"]
        frozen = run.freeze()
        assert (frozen.consistency, run.guest.musts) == (provider.CRASH, [False])
        (copy,) = paths(frozen)
        assert copy == folder / f".vmbackup-vma-{RUN_ID}-0-disk.raw"
        assert stat.S_IMODE(copy.stat().st_mode) == 0o600
        assert check_instant.check([copy], at_least=last) >= last
        seen = copy.read_bytes()
        guest.wait_for_writes(guest.last_write() + 100)
        assert copy.read_bytes() == seen
        assert run.trouble() is None
        assert run.release() == [f"the reflink copy {copy}"]
        assert run.release() == []
    assert os.listdir(folder) == ["disk.raw"]


def test_images_of_a_guest_that_is_held_are_of_one_instant(
    folder: pathlib.Path, writer: t.Callable[..., Writer], tmp_path: pathlib.Path
) -> None:
    images = [make_image(folder, name) for name in ("one.raw", "two.raw")]
    guest = writer(*images)
    with run_with(tmp_path, *images, guest=Guest(guest)) as run:
        frozen = run.freeze()
        assert run.guest.musts == [True]
        check_instant.check(paths(frozen))


def test_images_of_a_guest_that_cannot_be_held_are_refused(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    images = [make_image(folder, name) for name in ("one.raw", "two.raw")]
    with run_with(tmp_path, *images) as run, images[1].open("r+b"):
        with pytest.raises(SnapshotError, match="cannot be held"):
            run.freeze()
        assert run.journal.steps == []
    assert sorted(os.listdir(folder)) == ["one.raw", "two.raw"]


def test_images_that_nobody_writes_to_need_no_guest(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    images = [make_image(folder, name, os.urandom(MIB)) for name in ("one.raw", "two.raw")]
    with run_with(tmp_path, *images) as run, images[0].open("rb"):
        frozen = run.freeze()
        assert (frozen.consistency, run.guest.musts) == (provider.OFFLINE, [False])
        for path, copy in zip(images, paths(frozen)):
            assert copy.read_bytes() == path.read_bytes()
        assert [disk.size for disk in frozen.disks] == [DISK_SIZE] * 2
        assert [disk.allocated for disk in frozen.disks] == [MIB] * 2


def test_a_link_is_followed_and_a_relative_backing_file_is_found(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    if shutil.which("qemu-img") is None:
        pytest.skip("the tool qemu-img is not installed")
    make_image(folder, "base.raw", b"base" * 1024)
    overlay = folder / "overlay.qcow2"
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", "base.raw", str(overlay)]
    subprocess.run(command, check=True)
    link = tmp_path / "link"
    link.symlink_to(overlay)
    wanted = [provider.Disk("scsi0", str(link), "qcow2")]
    with Run(tmp_path, reflink.ReflinkCopies(wanted)) as run:
        (disk,) = run.freeze().disks
        assert (os.path.dirname(disk.path), disk.format, disk.size) == (str(folder), "qcow2", None)
        with qemu.open_source(disk.path, "qcow2", str(tmp_path)) as source:
            start = bytearray(4096)
            source.read(memoryview(start), 0)
    assert (source.size, bytes(start)) == (DISK_SIZE, b"base" * 1024)


def test_an_image_without_copy_on_write_is_cloned(mount: Mount, tmp_path: pathlib.Path) -> None:
    """libvirt makes its images on btrfs so."""
    if shutil.which("chattr") is None:
        pytest.skip("the tool chattr is not installed")
    folder = mount("btrfs") / "nocow"
    folder.mkdir()
    path = folder / "disk.raw"
    path.touch()
    subprocess.run(["chattr", "+C", str(path)], check=True)
    path.write_bytes(b"x" * MIB)
    with run_with(tmp_path, path) as run:
        (copy,) = paths(run.freeze())
        assert copy.read_bytes() == b"x" * MIB
    shutil.rmtree(folder)


def test_a_copy_takes_no_room(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    path = make_image(folder, data=os.urandom(32 * MIB))
    os.sync()
    before = os.statvfs(folder)
    with run_with(tmp_path, path) as run:
        run.freeze()
        os.sync()
        after = os.statvfs(folder)
    assert (before.f_bavail - after.f_bavail) * before.f_frsize < 4 * MIB


def test_a_long_name_is_cut(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    path = make_image(folder, "n" * 255)
    with run_with(tmp_path, path) as run:
        (copy,) = paths(run.freeze())
        assert len(copy.name) == 255
        assert copy.stat().st_size == DISK_SIZE


@pytest.mark.parametrize("kind", ["xfs without reflinks", "ext4"])
def test_a_file_system_without_reflinks_is_refused(kind: str, mount: Mount, tmp_path: pathlib.Path) -> None:
    path = make_image(mount(kind))
    assert not reflink.ReflinkCopies.fits(str(path))
    with run_with(tmp_path, path) as run:
        for attempt in (run.provider.plan, run.freeze):
            with pytest.raises(SnapshotError, match=r"no reflinks.*reflink=1"):
                attempt()
        assert run.journal.steps == []


def test_a_file_system_that_is_full_is_refused_and_noticed(mount: Mount, tmp_path: pathlib.Path) -> None:
    folder = mount("xfs")
    path = make_image(folder)
    with run_with(tmp_path, path) as run:
        run.freeze()
        assert run.trouble() is None
        status = os.statvfs(folder)
        rest = folder / "rest"
        with rest.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, status.f_bavail * status.f_frsize - 32 * MIB)
        trouble = run.trouble()
        run.release()
        with pytest.raises(errors.SpaceError, match="nearly full"):
            run.provider.plan()
        rest.unlink()
    assert trouble is not None
    assert "nearly full" in trouble
    path.unlink()


def test_what_is_no_file_is_refused(folder: pathlib.Path) -> None:
    refusals = {str(folder / "none"): "No such file", str(folder): "Is a directory", "/dev/null": "expected a file"}
    for path, words in refusals.items():
        with pytest.raises(errors.SourceError, match=words):
            reflink.ReflinkCopies(disks(path)).plan()


def test_a_file_that_is_in_the_way_is_not_touched(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    stranger = folder / f".vmbackup-vma-{RUN_ID}-0-disk.raw"
    stranger.write_bytes(b"in the way")
    with run_with(tmp_path, make_image(folder)) as run, pytest.raises(SnapshotError, match="in the way"):
        run.freeze()
    assert stranger.read_bytes() == b"in the way"


def test_a_copy_that_was_removed_by_others_is_missed(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with run_with(tmp_path, make_image(folder)) as run:
        (copy,) = paths(run.freeze())
        copy.unlink()
        assert run.trouble() == f"the reflink copy {copy} is gone"
        assert run.release() == []


@pytest.mark.parametrize("name", ["disk.raw", ".vmbackup-vma-disk.raw", "x.vmbackup-vma-0badcafe-0-disk.raw"])
def test_nothing_without_our_mark_is_removed(name: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / name
    path.touch()
    with pytest.raises(SnapshotError, match="not one that we give"):
        reflink.ReflinkCopies.kinds["reflink"].undo({"path": str(path)})
    assert path.exists()


def test_where_nothing_is_known_of_writers_there_may_be_some(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: object) -> int:
        raise OSError(errno.EINVAL, "this file system knows no leases")

    made_by = reflink.ReflinkCopies(disks(make_image(folder)))
    assert made_by.plan().consistency == provider.OFFLINE
    monkeypatch.setattr(fcntl, "fcntl", refuse)
    assert made_by.plan().consistency == provider.CRASH
