# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Runs that are killed, file systems that are full, storages that cannot read: what is left, and what is told."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gzip
import json
import os
import pathlib
import random
import subprocess
import time
import typing as t

import pytest

from ansible_collections.vmbackup.vma.plugins.module_utils.vma import create, errors, extract
from ansible_collections.vmbackup.vma.plugins.module_utils.vma.create import SourceDevice
from ansible_collections.vmbackup.vma.plugins.module_utils.vma.extract import DeviceRequest
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.vma import helpers, victim
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.vma.conftest import MakeTmpfs
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.vma.helpers import CLUSTER

KILLS = int(os.environ.get("VMA_TEST_KILLS", "5"))
"""How often each operation is killed."""

MIB = 1 << 20
DISK = helpers.make_image(70 * CLUSTER, "new")
OLD_DISK = helpers.make_image(66 * CLUSTER, "old")
EFI = helpers.make_image(540672, "efi")
OLD_EFI = helpers.make_image(540672, "old")


# --- kill -9 ----------------------------------------------------------------------------------------------------------


class Contents(dict[str, bytes]):
    """Files of a folder: names and what they hold."""

    @classmethod
    def of(cls, folder: pathlib.Path) -> Contents:
        """All that is there. What is hidden counts by its name alone: it may be a view whose daemon is gone."""
        names = helpers.files_below(folder)
        return cls({name: b"" if name.startswith(".") else (folder / name).read_bytes() for name in names})

    def write(self, folder: pathlib.Path) -> None:
        """Make the folder hold this, and nothing else."""
        for name in helpers.files_below(folder):
            (folder / name).unlink()
        for name, content in self.items():
            (folder / name).write_bytes(content)


def _check_kills(task: victim.Task, folder: pathlib.Path, old: Contents) -> None:
    """Kill the task again and again, half of the times before a call into the system, half of them by the clock.

    C(old) is what the folder holds before each of them.
    """
    old.write(folder)
    calls, seconds = victim.measure(task)
    new = Contents.of(folder)
    assert new != old
    draw = random.Random(f"{task.operation} {task.format} {KILLS}")
    for number in range(KILLS):
        old.write(folder)
        share = (number + draw.random()) / KILLS
        # a run that ended before its kill, as threads make fewer calls or the machine has become quicker, is repeated
        if number % 2:
            while not victim.run_until_call(task, 1 + int(share * calls)):
                calls -= 1 + calls // 20
                old.write(folder)
        else:
            while not victim.run_until_time(task, share * seconds):
                seconds *= 0.9
                old.write(folder)
        left = Contents.of(folder)
        for name in new:
            assert left.get(name) in (old.get(name), new[name]), f"{name} is a mixture after {share:.4f} of the run"
        for name in left.keys() - new.keys():
            assert name.startswith("."), f"{name} is not hidden, after {share:.4f} of the run"
        victim.run(task)
        assert Contents.of(folder) == new, f"after a run that was killed at {share:.4f}"
        assert [entry.name for entry in folder.iterdir() if entry.is_dir()] == []


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to make an archive."""

    ending: str
    source_format: str = "raw"
    without_libzstd: bool = False


WAYS = {
    "plain": Way(".vma"),
    "gzip": Way(".vma.gz"),
    "zstd": Way(".vma.zst"),
    "zstd's command": Way(".vma.zst", without_libzstd=True),
    "a qcow2 image": Way(".vma", "qcow2"),
}


@pytest.mark.parametrize("way", list(WAYS.values()), ids=list(WAYS))
def test_create_is_killed(way: Way, tmp_path: pathlib.Path) -> None:
    if way.without_libzstd:
        helpers.need_tool("zstd")
    source = tmp_path / "disk"
    source.write_bytes(DISK)
    if way.source_format != "raw":
        raw = source.rename(tmp_path / "raw")
        command = [helpers.need_tool("qemu-img"), "convert", "-O", way.source_format, str(raw), str(source)]
        subprocess.run(command, check=True)
    folder = tmp_path / "archives"
    folder.mkdir()
    dest = str(folder / f"a{way.ending}")
    task = victim.Task("create", str(source), dest, way.source_format, without_libzstd=way.without_libzstd)
    old_source = tmp_path / "old"
    old_source.write_bytes(OLD_DISK)
    victim.run(dataclasses.replace(task, src=str(old_source), format="raw"))
    _check_kills(task, folder, Contents.of(folder))


def _archive(folder: pathlib.Path) -> str:
    path = folder / "archive.vma"
    path.write_bytes(helpers.build_archive({"disk": DISK, "efi": EFI}).join())
    return str(path)


_OLD_FILES = Contents({"disk-disk.raw": OLD_DISK, "disk-efi.raw": OLD_EFI, "qemu-server.conf": b"name: old\n"})


@pytest.mark.parametrize("old", [Contents(), _OLD_FILES], ids=["new files", "over files"])
def test_extract_is_killed(old: Contents, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    _check_kills(victim.Task("extract", _archive(tmp_path), str(folder)), folder, old)


def test_extract_to_another_format_is_killed(tmp_path: pathlib.Path) -> None:
    """Images in other formats hold times and random numbers: what counts is that QEMU finds the right disk in them."""
    tool = helpers.need_tool("qemu-img")
    folder = tmp_path / "out"
    folder.mkdir()
    task = victim.Task("extract", _archive(tmp_path), str(folder), "qcow2")
    path = folder / "disk-disk.qcow2"
    raw = tmp_path / "raw"
    calls, seconds = victim.measure(task)
    names = helpers.files_below(folder)
    kills = KILLS // 2 + 1  # each takes twice as long as others
    for number in range(kills):
        Contents().write(folder)
        share = (number + 0.5) / kills
        if number % 2:
            victim.run_until_call(task, 1 + int(share * calls))
        else:
            victim.run_until_time(task, share * seconds)
        for _state in ("what was killed", "the next run"):
            if path.exists():
                subprocess.run([tool, "convert", "-f", "qcow2", "-O", "raw", str(path), str(raw)], check=True)
                assert raw.read_bytes() == DISK
            victim.run(task)
        assert helpers.files_below(folder) == names


def test_extract_over_reflink_copies_is_killed(reflinks: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folder = reflinks / "out"
    folder.mkdir()
    _check_kills(victim.Task("extract", _archive(tmp_path), str(folder)), folder, _OLD_FILES)


# --- a full disk ------------------------------------------------------------------------------------------------------


def _fill(folder: pathlib.Path, leave: int) -> pathlib.Path:
    """Let a file take the room of a file system, but for so many bytes."""
    status = os.statvfs(folder)
    filler = folder / "filler"
    filler.write_bytes(b"x" * (status.f_bavail * status.f_frsize - leave))
    return filler


@contextlib.contextmanager
def _failing(what: str, number: int = 1) -> t.Iterator[None]:
    """Let a function of the system, when it is called for the so many-th time, find no room."""
    real: t.Callable[..., object] = getattr(os, what)
    calls: list[object] = []

    def fail(*args: object, **options: object) -> object:
        calls.append(args)
        if len(calls) == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, what, fail)
        yield
    assert len(calls) >= number


ROOM = {"at the first byte": 0, "in the middle": MIB}
CALLS = {"at fsync": "fsync", "at rename": "rename"}


def _no_room(when: str, folder: pathlib.Path) -> t.ContextManager[None]:
    if when in CALLS:
        return _failing(CALLS[when])
    filler = _fill(folder, ROOM[when])
    stack = contextlib.ExitStack()
    stack.callback(filler.unlink)
    return t.cast("t.ContextManager[None]", stack)


@pytest.mark.parametrize("when", [*ROOM, *CALLS])
@pytest.mark.parametrize("way", [name for name in WAYS if name != "a qcow2 image"])
def test_no_room_for_an_archive(when: str, way: str, make_tmpfs: MakeTmpfs, request: pytest.FixtureRequest) -> None:
    if WAYS[way].without_libzstd:
        request.getfixturevalue("without_libzstd")
    source = request.getfixturevalue("tmp_path") / "disk"
    source.write_bytes(helpers.make_image(4 * MIB, zero=0, partial=0))
    folder = make_tmpfs(8 * MIB)
    path = folder / f"a{WAYS[way].ending}"
    path.write_bytes(b"old")
    with _no_room(when, folder):
        with pytest.raises(errors.SpaceError) as caught:
            create.create(str(path), [SourceDevice("disk", str(source))])
        assert caught.value.file == str(path)
        assert caught.value.remedy
        assert set(os.listdir(folder)) - {"filler"} == {path.name}
        assert path.read_bytes() == b"old"
    create.create(str(path), [SourceDevice("disk", str(source))])
    assert helpers.look(path).ok
    assert os.listdir(folder) == [path.name]


_BIG = {"a": helpers.make_image(2 * MIB, "a", zero=0, partial=0), "b": helpers.make_image(2 * MIB, "b", zero=0)}


def _big_archive(compression: str, folder: pathlib.Path) -> str:
    path = folder / "archive.vma"
    path.write_bytes(helpers.build_archive(_BIG).join())
    if compression == "gzip":
        path.write_bytes(gzip.compress(path.read_bytes(), 1))
    elif compression == "zstd":
        packed = folder / "archive.vma.zst"
        subprocess.run([helpers.need_tool("zstd"), "-q", "-1", "-o", str(packed), str(path)], check=True)
        path = packed
    return str(path)


@pytest.mark.parametrize("when", [*ROOM, *CALLS])
@pytest.mark.parametrize("compression", ["plain", "gzip", "zstd", "zstd's command"])
def test_no_room_for_disks(
    when: str, compression: str, make_tmpfs: MakeTmpfs, tmp_path: pathlib.Path, request: pytest.FixtureRequest
) -> None:
    if compression == "zstd's command":
        request.getfixturevalue("without_libzstd")
    src = _big_archive(compression.partition("'")[0], tmp_path)
    folder = make_tmpfs(8 * MIB)
    old = {"disk-a.raw": b"old" * 512, "disk-b.raw": b"older" * 512}
    for name, content in old.items():
        (folder / name).write_bytes(content)
    with _no_room(when, folder):
        with pytest.raises(errors.SpaceError) as caught:
            extract.extract(src, str(folder), check_space=False)
        assert caught.value.file is not None
        assert caught.value.file.startswith(str(folder))
        assert caught.value.remedy
        assert {name: (folder / name).read_bytes() for name in os.listdir(folder) if name != "filler"} == old
    done = extract.extract(src, str(folder), check_space=False)
    assert {device.name: pathlib.Path(device.path).read_bytes() for device in done.devices} == _BIG
    assert sorted(os.listdir(folder)) == ["disk-a.raw", "disk-b.raw", "qemu-server.conf"]


def test_no_room_for_the_second_name(tmp_path: pathlib.Path) -> None:
    """Names are given one after the other: the first one stays, and is whole."""
    src = _big_archive("plain", tmp_path)
    folder = tmp_path / "out"
    with _failing("rename", 2), pytest.raises(errors.SpaceError) as caught:
        extract.extract(src, str(folder))
    assert caught.value.file == str(folder / "disk-b.raw")
    assert helpers.files_below(folder) == ["disk-a.raw"]
    assert (folder / "disk-a.raw").read_bytes() == _BIG["a"]
    extract.extract(src, str(folder))
    assert helpers.files_below(folder) == ["disk-a.raw", "disk-b.raw", "qemu-server.conf"]


def test_no_room_for_the_folder_at_the_very_end(tmp_path: pathlib.Path) -> None:
    """Whether the name is on disk is not known then: the run fails, and what has the name is whole."""
    source, folder = tmp_path / "disk", tmp_path / "archives"
    source.write_bytes(DISK)
    folder.mkdir()
    path = folder / "a.vma"
    # the archive is brought to disk twice: before its owner and mode are set, and after
    with _failing("fsync", 3), pytest.raises(errors.SpaceError):
        create.create(str(path), [SourceDevice("disk", str(source))])
    assert os.listdir(folder) == [path.name]
    assert helpers.look(path).ok


@pytest.mark.parametrize("in_place", [False, True])
def test_no_room_over_a_file_full_of_holes(in_place: bool, make_tmpfs: MakeTmpfs, tmp_path: pathlib.Path) -> None:
    """The room that its size promises is not there. In place, what was written stays, and the next run ends it."""
    src = _big_archive("plain", tmp_path)
    folder = make_tmpfs(8 * MIB)
    path = folder / "disk-a.raw"
    path.touch()
    os.truncate(path, len(_BIG["a"]))
    filler = _fill(folder, MIB // 2)
    with pytest.raises(errors.SpaceError):
        extract.extract(src, str(folder), devices=[DeviceRequest("a")], in_place=in_place, check_space=False)
    assert path.stat().st_size == len(_BIG["a"])
    assert any(path.read_bytes()) is in_place
    filler.unlink()
    extract.extract(src, str(folder), devices=[DeviceRequest("a")], in_place=in_place)
    assert path.read_bytes() == _BIG["a"]


# --- a storage that cannot read ---------------------------------------------------------------------------------------

BadStorage = t.Callable[[pathlib.Path, int], str]


@pytest.fixture
def bad_storage(tmp_path: pathlib.Path) -> t.Iterator[BadStorage]:
    """Shows a file as another one, of which the kernel cannot read the page with a certain offset: EIO, in earnest."""
    daemon = helpers.need_tool("qemu-storage-daemon")
    helpers.need_tool("fusermount3")
    with contextlib.ExitStack() as stack:

        def show(path: pathlib.Path, offset: int) -> str:
            view = tmp_path / f"{path.name}-bad"
            view.touch()
            error = {"event": "none", "iotype": "read", "errno": errno.EIO, "sector": offset // 512}
            image = {"driver": "file", "filename": str(path)}
            node = {
                "driver": "raw",
                "node-name": "bad",
                "read-only": True,
                "file": {"driver": "blkdebug", "image": image, "inject-error": [error]},
            }
            export = {"type": "fuse", "id": "view", "node-name": "bad", "mountpoint": str(view), "writable": False}
            ready = tmp_path / f"{path.name}-pid"
            command = [daemon, "--blockdev", json.dumps(node), "--export", json.dumps(export), "--pidfile", str(ready)]
            process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
            stack.callback(process.communicate, timeout=30)
            stack.callback(process.terminate)
            while not ready.exists():
                if process.poll() is not None:
                    _out, said = process.communicate()
                    pytest.skip(f"qemu-storage-daemon shows no file that cannot be read here: {said.strip()}")
                time.sleep(0.01)
            return str(view)

        yield show


def _page(offset: int) -> int:
    return offset // 4096 * 4096


@pytest.mark.parametrize("ending", [".vma", ".vma.gz", ".vma.zst"])
def test_a_source_that_cannot_be_read(ending: str, bad_storage: BadStorage, tmp_path: pathlib.Path) -> None:
    source = tmp_path / "disk"
    source.write_bytes(helpers.make_image(200 * CLUSTER, zero=0, partial=0))
    bad = 130 * CLUSTER + 5000
    view = bad_storage(source, bad)
    folder = tmp_path / "archives"
    folder.mkdir()
    with pytest.raises(
        errors.SourceError, match=f"cannot be read at offset {_page(bad)}: Input/output error"
    ) as caught:
        create.create(str(folder / f"a{ending}"), [SourceDevice("disk", view)])
    assert caught.value.file == view
    assert caught.value.remedy is not None
    assert "dmesg" in caught.value.remedy
    assert os.listdir(folder) == []


_IMAGES = {"disk": helpers.make_image(100 * CLUSTER, zero=0), "efi": helpers.make_image(26 * CLUSTER, zero=0)}
_BASE = helpers.build_archive(_IMAGES)
"""Extent 0: clusters 0 to 58 of the disk; 1: the rest of it, and 0 to 17 of the EFI disk; 2: the rest of that."""


def test_an_archive_that_cannot_be_read(bad_storage: BadStorage, tmp_path: pathlib.Path) -> None:
    archive = _BASE.copy()
    # another damage behind the place that cannot be read: it is found as well
    archive.extents[2][-1] ^= 1
    path = tmp_path / "a.vma"
    path.write_bytes(archive.join())
    bad = _BASE.offset(0) + 40 * CLUSTER
    view = bad_storage(path, bad)
    seen = helpers.look(view)
    assert helpers.found(seen.problems) == [
        ("extent_digest", _BASE.offset(2), "efi", 18),
        ("read_error", _page(bad), None, None),
    ]
    assert (seen.extents, seen.clusters) == (3, 126)
    assert seen.good_until <= bad
    # what lies there is not asked for: the headers are sound
    assert helpers.look(view, "structure").ok
    out = tmp_path / "out"
    # of two threads, the other might come upon the second damage first
    with pytest.raises(errors.ArchiveError, match="Input/output error") as caught:
        extract.extract(view, str(out), threads=1)
    assert (caught.value.problem.kind, caught.value.problem.offset) == ("read_error", _page(bad))
    assert caught.value.file == view
    assert helpers.files_below(out) == []


def test_the_other_disk_of_an_archive_that_cannot_be_read(bad_storage: BadStorage, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.vma"
    path.write_bytes(_BASE.join())
    view = bad_storage(path, _BASE.offset(0) + 40 * CLUSTER)
    assert helpers.look(view).whole == {"disk": False, "efi": True}
    out = tmp_path / "out"
    extract.extract(view, str(out), devices=[DeviceRequest("efi")], configs=[])
    assert (out / "disk-efi.raw").read_bytes() == _IMAGES["efi"]
    assert helpers.files_below(out) == ["disk-efi.raw"]


@pytest.mark.parametrize("level", ["structure", "content"])
def test_a_header_of_an_extent_that_cannot_be_read(level: str, bad_storage: BadStorage, tmp_path: pathlib.Path) -> None:
    """Its clusters are lost; the extents behind it are found, and another damage in them as well."""
    archive = _BASE.copy()
    archive.extents[2][512 + 7777] ^= 1
    path = tmp_path / "a.vma"
    path.write_bytes(archive.join())
    bad = _BASE.offset(1)
    view = bad_storage(path, bad)
    seen = helpers.look(view, level)
    expected: list[helpers.Found] = [
        ("cluster_missing", None, "disk", 59),
        ("cluster_missing", None, "efi", 0),
        ("read_error", bad, None, None),
    ]
    if level == "content":
        # the page begins with the last data of the extent before
        expected += [("extent_digest", _BASE.offset(2), "efi", 18), ("read_error", _page(bad), None, None)]
    assert helpers.found(seen.problems) == sorted(expected, key=repr)
    assert seen.extents == 2
    assert seen.whole == {"disk": False, "efi": False}
    with pytest.raises(errors.ArchiveError, match="Input/output error"):
        extract.extract(view, str(tmp_path / "out"), threads=1)
    assert helpers.files_below(tmp_path / "out") == []


def test_a_disk_behind_a_header_that_cannot_be_read(bad_storage: BadStorage, tmp_path: pathlib.Path) -> None:
    images = {"disk": helpers.make_image(118 * CLUSTER, zero=0), "efi": helpers.make_image(26 * CLUSTER, zero=0)}
    archive = helpers.build_archive(images)
    path = tmp_path / "a.vma"
    path.write_bytes(archive.join())
    view = bad_storage(path, archive.offset(1))
    assert helpers.look(view).whole == {"disk": False, "efi": True}
    extract.extract(view, str(tmp_path / "out"), devices=[DeviceRequest("efi")], configs=[])
    assert (tmp_path / "out" / "disk-efi.raw").read_bytes() == images["efi"]


def test_an_archive_whose_time_goes_on(
    bad_storage: BadStorage, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU gives the present time as that of the last change, which does not make an archive another one."""
    image = helpers.make_image(26 * CLUSTER, zero=0)
    path = tmp_path / "a.vma"
    path.write_bytes(helpers.build_archive({"efi": image}).join())
    view = bad_storage(path, path.stat().st_size)
    real = extract._Job.look_at_targets

    def look_later(job: extract._Job) -> None:
        began = os.stat(view).st_mtime_ns
        while os.stat(view).st_mtime_ns == began:
            time.sleep(0.05)
        real(job)

    monkeypatch.setattr(extract._Job, "look_at_targets", look_later)
    extract.extract(view, str(tmp_path / "out"))
    assert (tmp_path / "out" / "disk-efi.raw").read_bytes() == image


@pytest.mark.parametrize("way", ["gzip", "zstd", "zstd's command", "bzip2", "lzop"])
def test_a_compressed_archive_that_cannot_be_read(
    way: str, bad_storage: BadStorage, tmp_path: pathlib.Path, request: pytest.FixtureRequest
) -> None:
    """The bytes behind cannot be told without those before: the reading ends, and what is missing is told."""
    if way == "zstd's command":
        request.getfixturevalue("without_libzstd")
    path = tmp_path / "a.vma"
    with path.open("wb") as file:
        tool = helpers.need_tool(way.partition("'")[0])
        subprocess.run([tool, "-1", "-c"], input=_BASE.join(), stdout=file, check=True)
    view = bad_storage(path, path.stat().st_size // 2)
    seen = helpers.look(view)
    assert set(seen.counts) == {"read_error", "cluster_missing"}
    assert not seen.whole["efi"]
    message = next(problem.message for problem in seen.problems if problem.kind == "read_error")
    assert message == "the file cannot be read: Input/output error"
    out = tmp_path / "out"
    with pytest.raises(errors.ArchiveError) as caught:
        extract.extract(view, str(out))
    assert caught.value.problem.kind == "read_error"
    assert helpers.files_below(out) == []
