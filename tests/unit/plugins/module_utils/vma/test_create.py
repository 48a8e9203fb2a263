# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What create() reads and writes, when it leaves an archive alone, and that a failure leaves no file."""

from __future__ import annotations

import errno
import os
import pathlib
import stat
import subprocess
import sys
import types
import typing as t

import pytest

from ansible_collections.vmbackup.vma.plugins.module_utils.vma import (
    archive_file,
    compare,
    create,
    errors,
    extract,
    image,
    layout,
    parallel,
    pending_file,
    qemu,
    reader,
    verify,
    zstd,
)
from ansible_collections.vmbackup.vma.plugins.module_utils.vma.create import SourceDevice
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.vma import helpers
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.vma.conftest import MakeLoop, MakeTmpfs
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.vma.helpers import BLOCK, CLUSTER

DISK = "drive-scsi0"
CONTENT = helpers.make_image(70 * CLUSTER, "disk")
CONFIGS = [layout.Config("qemu-server.conf", helpers.CONF)]
ENDINGS = [".vma", ".vma.gz", ".vma.zst"]


@pytest.fixture
def source(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def dest(tmp_path: pathlib.Path) -> pathlib.Path:
    folder = tmp_path / "archives"
    folder.mkdir()
    return folder / "a.vma"


@pytest.fixture
def qcow2(source: pathlib.Path, tmp_path: pathlib.Path) -> SourceDevice:
    path = tmp_path / "disk.qcow2"
    tool = helpers.need_tool("qemu-img")
    subprocess.run([tool, "convert", "-f", "raw", "-O", "qcow2", str(source), str(path)], check=True)
    return SourceDevice(DISK, str(path), "qcow2")


def _device(path: pathlib.Path | str, name: str = DISK) -> SourceDevice:
    return SourceDevice(name, str(path))


def _content(archive: pathlib.Path | str, folder: pathlib.Path, name: str = DISK) -> bytes:
    """What comes out of the archive again."""
    target = folder / "extracted"
    extract.extract(str(archive), str(folder), devices=[extract.DeviceRequest(name, str(target))], configs=[])
    return target.read_bytes()


# --- reading ----------------------------------------------------------------------------------------------------------


def test_holes_are_not_read(tmp_path: pathlib.Path, dest: pathlib.Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(1 << 30)
        for at in (0, 100 * CLUSTER + 3 * BLOCK, 1 << 29):
            file.seek(at)
            file.write(b"\x01" * BLOCK)
    os.sync()
    if path.stat().st_blocks * 512 > 1 << 20:
        pytest.skip("the file system of the temporary folder has no sparse files")
    done = create.create(str(dest), [_device(path)])
    assert done.data_bytes == 3 * BLOCK
    assert 3 * BLOCK <= done.read_bytes <= 3 * CLUSTER
    seen = helpers.look(dest, "structure")
    assert seen.ok
    assert seen.clusters == (1 << 30) // CLUSTER


def test_without_knowledge_of_holes_all_is_read(
    source: pathlib.Path, dest: pathlib.Path, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    real = os.lseek

    def lseek(fd: int, at: int, how: int) -> int:
        if how in (os.SEEK_DATA, os.SEEK_HOLE):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(fd, at, how)

    monkeypatch.setattr(os, "lseek", lseek)
    done = create.create(str(dest), [_device(source)])
    assert done.read_bytes == len(CONTENT)
    stored = sum(bool(CONTENT[at : at + BLOCK].strip(b"\x00")) for at in range(0, len(CONTENT), BLOCK))
    assert done.data_bytes == stored * BLOCK
    assert _content(dest, tmp_path) == CONTENT


@pytest.mark.parametrize("size", [1, 511, 512, 513, BLOCK, BLOCK + 1, CLUSTER - 1, CLUSTER + 1000, 59 * CLUSTER + 1])
def test_sizes_become_whole_sectors(size: int, tmp_path: pathlib.Path, dest: pathlib.Path) -> None:
    content = b"\xa5" * size
    (tmp_path / "disk").write_bytes(content)
    create.create(str(dest), [_device(tmp_path / "disk")])
    whole = -(-size // 512) * 512
    with reader.Reader(str(dest)) as opened:
        assert opened.header.devices == (layout.Device(1, DISK, whole),)
    assert _content(dest, tmp_path) == content.ljust(whole, b"\x00")


def test_every_block_of_a_ram_state_is_stored(tmp_path: pathlib.Path, dest: pathlib.Path) -> None:
    content = bytes(3 * CLUSTER) + b"x" * 100
    (tmp_path / "state").write_bytes(content)
    done = create.create(str(dest), [_device(tmp_path / "state", "vmstate")])
    assert done.data_bytes == 4 * CLUSTER
    data = dest.read_bytes()
    slots = data[len(data) - 4 * CLUSTER - 512 + 40 :][: 4 * 8]
    assert [slots[at : at + 2] for at in range(0, 32, 8)] == [b"\xff\xff"] * 4
    assert _content(dest, tmp_path, "vmstate") == content.ljust(3 * CLUSTER + 512, b"\x00")


def test_block_device(make_loop: MakeLoop, dest: pathlib.Path, tmp_path: pathlib.Path) -> None:
    device = make_loop(len(CONTENT))
    with open(device, "wb") as file:
        file.write(CONTENT)
    create.create(str(dest), [_device(device)])
    assert _content(dest, tmp_path) == CONTENT
    assert not create.create(str(dest), [_device(device)]).changed


def test_qcow2(qcow2: SourceDevice, dest: pathlib.Path, tmp_path: pathlib.Path) -> None:
    create.create(str(dest), [qcow2])
    assert _content(dest, tmp_path) == CONTENT
    assert not create.create(str(dest), [qcow2]).changed
    assert helpers.files_below(dest.parent) == ["a.vma"]


def test_qcow2_converted_where_there_is_no_daemon(
    qcow2: SourceDevice, dest: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "qemu-img").symlink_to(helpers.need_tool("qemu-img"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    create.create(str(dest), [qcow2])
    assert _content(dest, tmp_path) == CONTENT
    assert os.listdir(dest.parent) == ["a.vma"]


def test_an_image_that_is_not_of_its_format(source: pathlib.Path, dest: pathlib.Path) -> None:
    helpers.need_tool("qemu-img")
    with pytest.raises(errors.ToolError, match="could not convert"):
        create.create(str(dest), [SourceDevice(DISK, str(source), "qcow2")])
    assert os.listdir(dest.parent) == []


# --- writing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("integrity", ["sha256", "none"])
def test_result(ending: str, integrity: str, source: pathlib.Path, dest: pathlib.Path) -> None:
    path = f"{dest}{ending[4:]}"
    done = create.create(path, [_device(source)], CONFIGS, integrity=integrity, uuid=helpers.UUID_TEXT, ctime=77)
    assert (done.changed, done.reason) == (True, "there is no such file")
    seen = verify.verify(path)
    assert seen.verification.problems == []
    assert (seen.integrity, seen.verification.data_bytes) == (integrity, done.data_bytes)
    assert seen.header is not None
    assert (seen.header.uuid, seen.header.ctime, seen.header.configs) == (helpers.UUID, 77, tuple(CONFIGS))
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert os.listdir(dest.parent) == [os.path.basename(path)]


def test_uuids_and_times_of_their_own(source: pathlib.Path, dest: pathlib.Path) -> None:
    headers = []
    for name in ("1.vma", "2.vma"):
        create.create(str(dest.with_name(name)), [_device(source)])
        with reader.Reader(str(dest.with_name(name))) as opened:
            headers.append(opened.header)
    assert headers[0].uuid != headers[1].uuid
    assert abs(headers[0].ctime - os.stat(dest.with_name("1.vma")).st_mtime) < 60


@pytest.mark.parametrize(("level", "ending"), [(1, ".vma.gz"), (9, ".vma.gz"), (1, ".vma.zst"), (19, ".vma.zst")])
def test_levels(level: int, ending: str, tmp_path: pathlib.Path, dest: pathlib.Path) -> None:
    (tmp_path / "text").write_bytes(b"".join(b"%d and so on\n" % (number**3 % 9973) for number in range(40000)))
    sizes = []
    for chosen in (level, None):
        path = f"{dest}{chosen}{ending}"
        create.create(path, [_device(tmp_path / "text")], level=chosen, uuid=helpers.UUID_TEXT, ctime=0)
        assert helpers.look(path).ok
        sizes.append(os.path.getsize(path))
    assert sizes[0] > sizes[1] if level == 1 else sizes[0] < sizes[1]


@pytest.mark.usefixtures("without_libzstd")
def test_zstd_by_its_command(
    source: pathlib.Path, dest: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"{dest}.zst"
    done = create.create(path, [_device(source)], CONFIGS, uuid=helpers.UUID_TEXT, ctime=5, threads=2)
    assert helpers.look(path).ok
    assert _content(path, tmp_path) == CONTENT
    assert not create.create(path, [_device(source)], CONFIGS, uuid=helpers.UUID_TEXT, ctime=5).changed
    with open(path, "rb") as file:
        assert file.read(5)[4] & 0b100  # a content checksum
    # and the library finds the same archive in it
    monkeypatch.undo()
    if not zstd.is_available():
        pytest.skip("libzstd.so.1 is not installed, so there is nothing to compare the command with")
    other = f"{dest}-other.vma.zst"
    assert (
        create.create(other, [_device(source)], CONFIGS, uuid=helpers.UUID_TEXT, ctime=5).data_bytes == done.data_bytes
    )
    streams = []
    for name in (path, other):
        with reader.Reader(name) as opened:
            memory = bytearray(len(CONTENT) + (1 << 20))
            streams.append(bytes(memory[: opened.stream.read(opened.header.size, memoryview(memory))]))
    assert streams[0] == streams[1]
    assert len(streams[0]) > done.data_bytes


def test_mode_and_owner_of_an_old_archive_are_kept(source: pathlib.Path, dest: pathlib.Path) -> None:
    dest.write_bytes(b"old")
    dest.chmod(0o644)
    if os.geteuid() == 0:
        os.chown(dest, 1234, 4321)
    owner = (dest.stat().st_uid, dest.stat().st_gid)
    create.create(str(dest), [_device(source)])
    assert helpers.look(dest).ok
    assert stat.S_IMODE(dest.stat().st_mode) == 0o644
    assert (dest.stat().st_uid, dest.stat().st_gid) == owner


def test_bandwidth_limit(dest: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]

    def pause(_crew: parallel.Crew, seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(parallel, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(parallel.Crew, "pause", pause)
    path = tmp_path / "disk"
    path.write_bytes(b"x" * (5 * 59 * CLUSTER))
    done = create.create(str(dest), [_device(path)], threads=1, bytes_per_second=1 << 20)
    # what is read last need not be waited for
    assert 0.75 * done.read_bytes / (1 << 20) < now[0] - 100 <= done.read_bytes / (1 << 20)


# --- an archive that is there -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_same_again(ending: str, source: pathlib.Path, dest: pathlib.Path) -> None:
    path = pathlib.Path(f"{dest}{ending[4:]}")
    create.create(str(path), [_device(source)], CONFIGS)
    before = (path.stat().st_ino, path.stat().st_mtime_ns)
    done = create.create(str(path), [_device(source)], CONFIGS)
    assert (done.changed, done.reason) == (False, None)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == before


class Change(t.NamedTuple):
    """Something that is asked for otherwise, and the reason that is told."""

    reason: str
    content: bytes = CONTENT
    name: str = DISK
    configs: t.Sequence[layout.Config] = CONFIGS
    options: t.Mapping[str, t.Any] = {}


@pytest.mark.parametrize(
    "change",
    [
        Change("the device 'drive-scsi0' differs at offset 0", content=b"\x7f" + CONTENT[1:]),
        Change(f"differs at offset {69 * CLUSTER + 15 * BLOCK}", content=CONTENT[:-1] + b"\x00"),
        Change("names or sizes differ", content=CONTENT + bytes(512)),
        Change("names or sizes differ", content=CONTENT[:-512]),
        Change("names or sizes differ", name="drive-scsi1"),
        Change("configs differ", configs=[]),
        Change("configs differ", configs=[layout.Config("qemu-server.conf", b"")]),
        Change("configs differ", configs=[*CONFIGS, layout.Config("qemu-server.fw", b"")]),
        Change("configs differ", configs=[layout.Config("other.conf", helpers.CONF)]),
        Change("the UUID is", options={"uuid": "ffffffff-0000-0000-0000-000000000000"}),
        Change("the creation time is 5", options={"ctime": 6}),
        Change("the creation time is 5", options={"ctime": 0}),
        Change("the integrity is sha256", options={"integrity": "none"}),
        Change("always", options={"overwrite": "always"}),
    ],
    ids=lambda change: f"{change.reason} {dict(change.options)}",
)
def test_something_else(change: Change, tmp_path: pathlib.Path, source: pathlib.Path, dest: pathlib.Path) -> None:
    create.create(str(dest), [_device(source)], CONFIGS, ctime=5)
    before = dest.read_bytes()
    other = tmp_path / "other"
    other.write_bytes(change.content)
    dry = create.create(str(dest), [_device(other, change.name)], change.configs, dry_run=True, **change.options)
    assert dry.changed
    assert change.reason in (dry.reason or "")
    assert dest.read_bytes() == before
    done = create.create(str(dest), [_device(other, change.name)], change.configs, **change.options)
    assert (done.changed, done.reason) == (True, dry.reason)
    assert dest.read_bytes() != before
    assert helpers.look(dest).ok
    assert _content(dest, tmp_path, change.name) == change.content


def test_a_source_that_lost_the_end_of_its_last_sector(tmp_path: pathlib.Path, dest: pathlib.Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"x" * 1024)
    create.create(str(dest), [_device(path)])
    path.write_bytes(b"x" * 1000)
    assert create.create(str(dest), [_device(path)]).changed
    assert _content(dest, tmp_path) == b"x" * 1000 + bytes(24)
    assert not create.create(str(dest), [_device(path)]).changed


def test_another_compression_under_the_same_name(source: pathlib.Path, dest: pathlib.Path) -> None:
    path = pathlib.Path(f"{dest}.gz")
    create.create(f"{dest}.zst", [_device(source)])
    os.rename(f"{dest}.zst", path)
    done = create.create(str(path), [_device(source)])
    assert (done.changed, done.reason) == (True, "the compression is zstd, not gzip")


@pytest.mark.parametrize(
    "change",
    [
        lambda _data: b"",
        lambda _data: b"something else",
        lambda data: data[:-1],
        lambda data: data + b"\x00",
        lambda data: data[:-5] + b"\xff" + data[-4:],
        lambda data: data[:13000] + b"\xff" + data[13001:],
        lambda data: data[:100],
    ],
    ids=["empty", "something else", "cut", "longer", "data flipped", "header flipped", "no header"],
)
def test_a_damaged_archive_is_replaced(
    change: t.Callable[[bytes], bytes], source: pathlib.Path, dest: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    create.create(str(dest), [_device(source)])
    dest.write_bytes(change(dest.read_bytes()))
    done = create.create(str(dest), [_device(source)])
    assert done.changed
    assert helpers.look(dest).ok
    assert _content(dest, tmp_path) == CONTENT


@pytest.mark.parametrize("cut", [0, 512], ids=["byte appended", "extent cut off"])
def test_a_damaged_archive_without_devices_is_replaced(cut: int, dest: pathlib.Path) -> None:
    create.create(str(dest), [], CONFIGS)
    sound = dest.read_bytes()
    dest.write_bytes(sound[: len(sound) - cut] if cut else sound + b"\x00")
    assert create.create(str(dest), [], CONFIGS).changed
    assert dest.stat().st_size == len(sound)
    assert not create.create(str(dest), [], CONFIGS).changed


def test_never(source: pathlib.Path, dest: pathlib.Path) -> None:
    dest.write_bytes(b"mine")
    assert not create.create(str(dest), [_device(source)], overwrite="never").changed
    assert dest.read_bytes() == b"mine"
    dest.unlink()
    assert create.create(str(dest), [_device(source)], overwrite="never").changed


def test_always(source: pathlib.Path, dest: pathlib.Path) -> None:
    options: dict[str, t.Any] = {"uuid": helpers.UUID_TEXT, "ctime": 1, "overwrite": "always"}
    create.create(str(dest), [_device(source)], **options)
    before = (dest.stat().st_ino, dest.read_bytes())
    assert create.create(str(dest), [_device(source)], **options).changed
    assert (dest.stat().st_ino, dest.read_bytes()) != before
    assert dest.read_bytes() == before[1]


def test_dry_run_writes_nothing(source: pathlib.Path, dest: pathlib.Path) -> None:
    done = create.create(str(dest), [_device(source)], dry_run=True)
    assert (done.changed, done.reason) == (True, "there is no such file")
    assert os.listdir(dest.parent) == []


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("a.vma", {"compression": "zstd"}, r"ending .vma tells readers of compression none, but zstd"),
        ("a.vma.gz", {"compression": "none"}, r"ending .vma.gz tells readers of compression gzip"),
        ("a.vma.zst", {"compression": "gzip"}, r"ending .vma.zst"),
        ("a.vma.lzo", {}, "archives are not compressed with lzo, only read"),
        ("a.vma.bz2", {"compression": "gzip"}, "not compressed with bzip2"),
        ("a.tar", {}, "expected a name that ends in"),
        ("a.vma.gz", {"level": 10}, "level from 1 to 9 for gzip, got 10"),
        ("a.vma.zst", {"level": 20}, "level from 1 to 19 for zstd, got 20"),
        ("a.vma.zst", {"level": 0}, "level from 1 to 19"),
        ("absent/a.vma", {}, "folder for the archive does not exist"),
        ("a.vma", {"uuid": "no uuid"}, "expected a UUID"),
        ("a.vma", {"ctime": -1}, "creation time"),
    ],
)
def test_requests_that_cannot_be(
    name: str, options: dict[str, t.Any], message: str, source: pathlib.Path, dest: pathlib.Path
) -> None:
    with pytest.raises(errors.RequestError, match=message):
        create.create(str(dest.parent / name), [_device(source)], **options)
    assert os.listdir(dest.parent) == []


def test_a_compression_for_any_name(source: pathlib.Path, dest: pathlib.Path) -> None:
    path = str(dest.with_name("backup"))
    create.create(path, [_device(source)], compression="zstd")
    assert verify.verify(path).compression == "zstd"


@pytest.mark.parametrize("name", ["", "..", "a/b", "a b", "a\n", "x" * 256])
def test_names(name: str, source: pathlib.Path, dest: pathlib.Path) -> None:
    with pytest.raises(errors.RequestError, match="cannot be used"):
        create.create(str(dest), [_device(source, name)])
    with pytest.raises(errors.RequestError, match="cannot be used"):
        create.create(str(dest), [_device(source)], [layout.Config(name, b"")])
    with pytest.raises(errors.RequestError, match="two devices"):
        create.create(str(dest), [_device(source), _device(source)])
    assert os.listdir(dest.parent) == []


def test_a_folder_as_archive(source: pathlib.Path, dest: pathlib.Path) -> None:
    dest.mkdir()
    for overwrite in ("changed", "always"):
        with pytest.raises(errors.VmaError):
            create.create(str(dest), [_device(source)], overwrite=overwrite)


def test_the_archive_as_source(source: pathlib.Path, dest: pathlib.Path) -> None:
    create.create(str(dest), [_device(source)])
    before = dest.read_bytes()
    with pytest.raises(errors.RequestError, match="the archive itself"):
        create.create(str(dest), [_device(dest)])
    assert dest.read_bytes() == before


# --- sources that fail ------------------------------------------------------------------------------------------------


def test_sources_that_are_none(tmp_path: pathlib.Path, dest: pathlib.Path) -> None:
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "fifo")
    for path, message in (
        (tmp_path / "absent", "cannot be opened"),
        (tmp_path / "empty", "is empty"),
        (tmp_path / "fifo", "expected a file or a block device"),
        (tmp_path, "expected a file or a block device"),
        (pathlib.Path("/dev/null"), "expected a file or a block device"),
    ):
        with pytest.raises(errors.SourceError, match=message) as caught:
            create.create(str(dest), [_device(path)])
        assert caught.value.file == str(path)
    assert os.listdir(dest.parent) == []


def _append(path: pathlib.Path) -> None:
    with path.open("ab") as file:
        file.write(b"x" * 512)


def _write(path: pathlib.Path) -> None:
    before = path.stat()
    with path.open("r+b") as file:
        file.write(b"\xff")
    # even a clock of coarse ticks shows it
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


MEANWHILE: dict[str, tuple[t.Callable[[pathlib.Path], None], str]] = {
    "shrinks": (lambda path: os.truncate(path, 3 * CLUSTER), "shrank|ends at|expected .* bytes"),
    "grows": (_append, f"expected {len(CONTENT)} bytes, found {len(CONTENT) + 512}"),
    "is written": (_write, "no single instant"),
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("what", list(MEANWHILE))
@pytest.mark.parametrize("old", [None, b"old"], ids=["new archive", "old archive"])
def test_a_source_that_changes_meanwhile(
    what: str,
    ending: str,
    old: bytes | None,
    source: pathlib.Path,
    dest: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    change, message = MEANWHILE[what]
    path = pathlib.Path(f"{dest}{ending[4:]}")
    if old is not None:
        path.write_bytes(old)
    real = image.SourceImage.read
    done: list[str] = []

    def read(self: image.SourceImage, view: memoryview, offset: int) -> None:
        if not done:
            done.append(what)
            change(source)
        real(self, view, offset)

    monkeypatch.setattr(image.SourceImage, "read", read)
    with pytest.raises(errors.SourceError, match=message) as caught:
        create.create(str(path), [_device(source)], threads=2)
    assert caught.value.file == str(source)
    assert done
    assert [item.read_bytes() for item in path.parent.iterdir()] == ([] if old is None else [old])


def test_a_hole_that_is_filled_meanwhile(
    tmp_path: pathlib.Path, dest: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was a hole when the work was shared out holds data when it is done."""
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(300 * 59 * CLUSTER)
    real = create._Writer._make_extent
    done: list[int] = []

    def make_extent(self: t.Any, *args: t.Any) -> t.Any:
        if not done:
            done.append(1)
            with path.open("r+b") as file:
                for at in range(256):
                    file.seek(at * 59 * CLUSTER)
                    file.write(b"x" * (59 * CLUSTER if at < 3 else BLOCK))
            os.utime(path, ns=(0, 0))
        return real(self, *args)

    monkeypatch.setattr(create._Writer, "_make_extent", make_extent)
    with pytest.raises(errors.SourceError):
        create.create(str(dest), [_device(path)], threads=1)
    assert os.listdir(dest.parent) == []


def test_a_source_that_cannot_be_read(
    source: pathlib.Path, dest: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.preadv

    def preadv(fd: int, views: t.Sequence[memoryview], offset: int) -> int:
        if offset <= 20 * CLUSTER < offset + sum(map(len, views)):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, views, offset)

    source.write_bytes(b"x" * (70 * CLUSTER))
    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(errors.SourceError, match=r"cannot be read at offset .*: Input/output error"):
        create.create(str(dest), [_device(source)])
    assert os.listdir(dest.parent) == []


# --- targets that fail ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("old", [None, b"old"], ids=["new archive", "old archive"])
def test_disk_full(make_tmpfs: MakeTmpfs, ending: str, old: bytes | None, tmp_path: pathlib.Path) -> None:
    content = tmp_path / "random"
    content.write_bytes(helpers.make_image(3 << 20, zero=0, partial=0))
    folder = make_tmpfs(1 << 20)
    path = folder / f"a{ending}"
    if old is not None:
        path.write_bytes(old)
    with pytest.raises(errors.SpaceError, match="no room") as caught:
        create.create(str(path), [_device(content)])
    assert caught.value.file == str(path)
    assert [item.read_bytes() for item in folder.iterdir()] == ([] if old is None else [old])


@pytest.mark.usefixtures("without_libzstd")
def test_disk_full_for_the_zstd_command(make_tmpfs: MakeTmpfs, tmp_path: pathlib.Path) -> None:
    content = tmp_path / "random"
    content.write_bytes(helpers.make_image(6 << 20, zero=0, partial=0))
    folder = make_tmpfs(1 << 20)
    with pytest.raises(errors.SpaceError):
        create.create(str(folder / "a.vma.zst"), [_device(content)])
    assert os.listdir(folder) == []


_TOOLS = {
    "fails at once": "#!/bin/sh\necho 'zstd: no such luck' >&2\nexit 1\n",
    "fails at the end": "#!/bin/sh\ncat >/dev/null\necho 'zstd: no such luck' >&2\nexit 1\n",
    "is killed": "#!/bin/sh\nhead -c 100000 >/dev/null\necho 'zstd: no such luck' >&2\nkill -9 $$\n",
}


@pytest.mark.usefixtures("without_libzstd")
@pytest.mark.parametrize("how", list(_TOOLS))
def test_a_compressor_that_fails(how: str, source: pathlib.Path, dest: pathlib.Path, tool_folder: pathlib.Path) -> None:
    tool = tool_folder / "zstd"
    tool.write_text(_TOOLS[how])
    tool.chmod(0o755)
    status = "signal 9" if how == "is killed" else "exit status 1"
    with pytest.raises(errors.ToolError, match=f"zstd ended with {status}: zstd: no such luck"):
        create.create(f"{dest}.zst", [_device(source)], threads=2)
    assert os.listdir(dest.parent) == []


@pytest.mark.usefixtures("without_libzstd")
def test_no_compressor(source: pathlib.Path, dest: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(dest.parent))
    with pytest.raises(errors.ToolError, match="Install the package zstd"):
        create.create(f"{dest}.zst", [_device(source)])
    assert os.listdir(dest.parent) == []


def test_a_disk_that_cannot_be_brought_to_rest(
    source: pathlib.Path, dest: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(_fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(errors.TargetError, match="Input/output error"):
        create.create(str(dest), [_device(source)])
    assert os.listdir(dest.parent) == []


# --- several runs, and the end of one ---------------------------------------------------------------------------------


def test_two_runs_at_once(source: pathlib.Path, dest: pathlib.Path) -> None:
    other = pending_file.PendingFile(str(dest))
    with pytest.raises(errors.BusyError, match="another run"):
        create.create(str(dest), [_device(source)])
    assert os.path.exists(other.path)
    other.discard()
    create.create(str(dest), [_device(source)])
    assert os.listdir(dest.parent) == ["a.vma"]


_KILLED = """
import os, signal, sys
sys.path[:] = {path!r}
from ansible_collections.vmbackup.vma.plugins.module_utils.vma import archive_file, create, zstd
if {without!r}:
    zstd.is_available = lambda: False
    real_append = archive_file.CommandSink.append
    def append(self, data):
        real_append(self, data)
        os.kill(os.getpid(), signal.SIGKILL)
    archive_file.CommandSink.append = append
real = archive_file.Sink.write
def write(self, offset, data):
    real(self, offset, data)
    if offset:
        os.kill(os.getpid(), signal.SIGKILL)
archive_file.Sink.write = write
create.create({dest!r}, [create.SourceDevice('d', {source!r})])
"""


@pytest.mark.parametrize("ending", [".vma", ".vma.gz", ".vma.zst", "command"])
def test_what_a_killed_run_left_is_removed(ending: str, dest: pathlib.Path, tmp_path: pathlib.Path) -> None:
    without = ending == "command"
    if without:
        helpers.need_tool("zstd")
        ending = ".vma.zst"
    content = tmp_path / "random"
    content.write_bytes(helpers.make_image(9 << 20, zero=0, partial=0))
    path = f"{dest}{ending[4:]}"
    script = _KILLED.format(path=sys.path, dest=path, source=str(content), without=without)
    killed = subprocess.run([sys.executable, "-c", script], check=False)
    assert killed.returncode == -9
    (left,) = os.listdir(dest.parent)
    assert left != os.path.basename(path)
    other = dest.parent / ".other.vma.0123456789abcdef.vma-part"
    other.touch()
    create.create(path, [_device(content)])
    # and nothing else
    assert sorted(os.listdir(dest.parent)) == [other.name, os.path.basename(path)]
    assert helpers.look(path).ok


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_interrupt_leaves_nothing(
    ending: str, source: pathlib.Path, dest: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_args: object) -> t.NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(image.SourceImage, "read", read)
    with pytest.raises(KeyboardInterrupt):
        create.create(f"{dest}{ending[4:]}", [_device(source)])
    assert os.listdir(dest.parent) == []


def test_long_names(source: pathlib.Path, dest: pathlib.Path) -> None:
    """As long as the file system allows, and in any script."""
    for name in ("x" * 251 + ".vma", "ü" * 125 + ".vma"):
        create.create(str(dest.with_name(name)), [_device(source)])
        assert helpers.look(dest.with_name(name)).ok


def test_long_names_that_begin_alike_are_not_one(source: pathlib.Path, dest: pathlib.Path) -> None:
    other = pending_file.PendingFile(str(dest.with_name("x" * 200 + "1.vma")))
    try:
        create.create(str(dest.with_name("x" * 200 + "2.vma")), [_device(source)])
    finally:
        other.discard()


def test_default_levels_exist() -> None:
    assert all(archive_file.DEFAULT_LEVELS[name] in levels for name, levels in archive_file.LEVELS.items())


def test_another_integrity_is_a_difference_without_devices_too(dest: pathlib.Path) -> None:
    create.create(str(dest), [], CONFIGS, integrity="none")
    assert create.create(str(dest), [], CONFIGS).reason == "the integrity is none"
    assert not create.create(str(dest), [], CONFIGS).changed


def test_a_qcow2_that_changes_meanwhile_leaves_the_old_archive(
    qcow2: SourceDevice, dest: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dest.write_bytes(b"the old archive")
    real = create._Writer.write

    def write(writer: create._Writer, sink: archive_file.Sink, header: bytes, threads: int) -> None:
        real(writer, sink, header, threads)
        os.utime(qcow2.path, ns=(0, 0))

    monkeypatch.setattr(create._Writer, "write", write)
    with pytest.raises(errors.SourceError, match="no single instant"):
        create.create(str(dest), [qcow2])
    assert dest.read_bytes() == b"the old archive"
    assert os.listdir(dest.parent) == [dest.name]


def test_data_that_appears_in_holes(
    dest: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a file's times tell nothing, the extents without data share a buffer that has no room for it."""
    path = tmp_path / "disk.raw"
    path.write_bytes(b"x" * (3 * 59 * CLUSTER))
    monkeypatch.setattr(image, "has_live_times", lambda _status: True)
    monkeypatch.setattr(create._Writer, "_is_hole", lambda _writer, _runs: True)
    with pytest.raises(errors.SourceError, match=f"data appeared in a hole at offset {59 * CLUSTER}"):
        create.create(str(dest), [_device(path)], threads=1)
    assert os.listdir(dest.parent) == []


@pytest.mark.parametrize("where", ["open_source", "PendingFile", "open_sink", "drop_behind"])
def test_a_file_that_appears_meanwhile_is_never_overwritten(
    where: str, source: pathlib.Path, dest: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(create, where)

    def appear_first(*args: t.Any, **options: t.Any) -> t.Any:
        dest.write_bytes(b"another's")
        return real(*args, **options)

    monkeypatch.setattr(create, where, appear_first)
    if where in ("open_source", "PendingFile"):  # nothing is read and compressed for nothing
        monkeypatch.setattr(create._Writer, "write", None)
    assert not create.create(str(dest), [_device(source)], overwrite="never").changed
    assert dest.read_bytes() == b"another's"
    assert os.listdir(dest.parent) == [dest.name]


@pytest.mark.parametrize("name", ["view", ".vma-view-"])
def test_no_room_for_the_view_of_an_image(
    name: str,
    source: pathlib.Path,
    dest: pathlib.Path,
    tool_folder: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tool_folder / "qemu-storage-daemon").write_text("#!/bin/sh\nexit 1\n")
    (tool_folder / "qemu-storage-daemon").chmod(0o755)

    failed: list[str] = []

    def failing(real: t.Callable[..., t.Any]) -> t.Callable[..., t.Any]:
        def call(path: t.Any, *args: t.Any, **options: t.Any) -> t.Any:
            if os.path.basename(str(path)).startswith(name) and not failed:
                failed.append(str(path))
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(path, *args, **options)

        return call

    monkeypatch.setattr(qemu, "open", failing(open), raising=False)
    monkeypatch.setattr(os, "open", failing(os.open))
    with pytest.raises(errors.SpaceError, match="there is no room"):
        create.create(str(dest), [SourceDevice(DISK, str(source), "qcow2")])
    monkeypatch.undo()
    assert os.listdir(dest.parent) == []


@pytest.mark.parametrize("dry_run", [False, True], ids=["write", "check"])
def test_a_source_that_changes_while_it_is_compared(
    dry_run: bool, source: pathlib.Path, dest: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create.create(str(dest), [_device(source)])
    real = compare.differing

    def compare_and_change(*args: t.Any, **options: t.Any) -> dict[int, int]:
        found = real(*args, **options)
        os.utime(source, ns=(0, 0))
        return found

    monkeypatch.setattr(create, "differing", compare_and_change)
    with pytest.raises(errors.SourceError, match="no single instant"):
        create.create(str(dest), [_device(source)], dry_run=dry_run)
