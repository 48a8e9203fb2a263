# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Backups hold secrets, and nothing here needs root: who may read what is written, and what an ordinary user can do."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import pwd
import shutil
import stat
import struct
import subprocess
import tempfile
import typing as t

import pytest

from ansible_collections.vmbackup.vma.plugins.module_utils.vma import create, extract, qemu
from ansible_collections.vmbackup.vma.plugins.module_utils.vma.create import SourceDevice
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.vma import helpers, victim
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.vma.helpers import CLUSTER

DISK = helpers.make_image(20 * CLUSTER, "disk")
EFI = helpers.make_image(540672, "efi")
ENDINGS = [".vma", ".vma.gz", ".vma.zst"]


# --- what is written is closed to others from the first byte ----------------------------------------------------------


@pytest.fixture
def modes(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> t.Iterator[dict[str, set[int]]]:
    """The modes that files below the test's folder had at each of their writes, with a umask that closes nothing."""
    found: dict[str, set[int]] = {}
    real = os.pwrite

    def pwrite(fd: int, data: bytes, offset: int) -> int:
        path = os.readlink(f"/proc/self/fd/{fd}")
        if path.startswith(str(tmp_path)):
            found.setdefault(path, set()).add(stat.S_IMODE(os.fstat(fd).st_mode))
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    before = os.umask(0)
    yield found
    os.umask(before)


@pytest.mark.parametrize("old", [None, 0o644], ids=["new", "over one that all may read"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_an_archive_is_closed(ending: str, old: int | None, modes: dict[str, set[int]], tmp_path: pathlib.Path) -> None:
    source = tmp_path / "disk"
    source.write_bytes(DISK)
    path = tmp_path / f"a{ending}"
    if old is not None:
        path.write_bytes(b"old")
        path.chmod(old)
    create.create(str(path), [SourceDevice("disk", str(source))])
    assert list(modes.values()) == [{0o600}]
    # the mode that the owner gave it counts again once it is whole
    assert stat.S_IMODE(path.stat().st_mode) == (0o600 if old is None else old)


@pytest.mark.parametrize("old", [None, 0o644], ids=["new", "over ones that all may read"])
def test_disks_and_configs_are_closed(old: int | None, modes: dict[str, set[int]], tmp_path: pathlib.Path) -> None:
    src = tmp_path / "a.vma"
    src.write_bytes(helpers.build_archive({"disk": DISK, "efi": EFI}).join())
    folder = tmp_path / "out"
    names = ["disk-disk.raw", "disk-efi.raw", "qemu-server.conf"]
    if old is not None:
        folder.mkdir()
        for name in names:
            (folder / name).write_bytes(b"old")
            (folder / name).chmod(old)
    extract.extract(str(src), str(folder))
    assert list(modes.values()) == [{0o600}] * 3
    assert [stat.S_IMODE((folder / name).stat().st_mode) for name in names] == [0o600 if old is None else old] * 3
    if old is None:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


# --- what the owner of a file has laid down for it stays, as with ansible.builtin.copy --------------------------------

LABEL = b"system_u:object_r:virt_image_t:s0\0"


def _access_list(*entries: tuple[int, int, int]) -> bytes:
    """A POSIX access control list as the kernel takes it, of tags, permissions and numbers of users."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


# user::rw- user:nobody:r-- group::--- mask::r-- other::---
FOR_NOBODY = _access_list(
    (1, 6, 0xFFFFFFFF), (2, 4, 65534), (4, 0, 0xFFFFFFFF), (16, 4, 0xFFFFFFFF), (32, 0, 0xFFFFFFFF)
)


def _set_or_skip(path: pathlib.Path, name: str, value: bytes) -> None:
    try:
        os.setxattr(path, name, value)
    except OSError as error:
        pytest.skip(f"{name} cannot be set here: {error.strerror}")


@pytest.mark.parametrize(
    ("name", "value"),
    [("security.selinux", LABEL), ("user.comment", b"kept for the auditors"), ("system.posix_acl_access", FOR_NOBODY)],
)
@pytest.mark.parametrize("operation", ["create", "extract", "extract to qcow2"])
def test_extended_attributes_stay(operation: str, name: str, value: bytes, tmp_path: pathlib.Path) -> None:
    source = tmp_path / "disk"
    source.write_bytes(DISK)
    archive, folder = tmp_path / "a.vma", tmp_path / "out"
    folder.mkdir()
    kind = "qcow2" if operation.endswith("qcow2") else "raw"
    path = archive if operation == "create" else folder / f"disk-disk.{kind}"
    if kind == "qcow2":
        subprocess.run([helpers.need_tool("qemu-img"), "create", "-q", "-f", kind, str(path), "1M"], check=True)
    else:
        path.write_bytes(b"old")
    _set_or_skip(path, name, value)
    before = path.stat()
    if operation == "create":
        create.create(str(path), [SourceDevice("disk", str(source))])
    else:
        archive.write_bytes(helpers.build_archive({"disk": DISK}).join())
        extract.extract(str(archive), str(folder), devices=[extract.DeviceRequest("disk", None, kind)], configs=[])
    after = path.stat()
    assert after.st_ino != before.st_ino
    assert os.getxattr(path, name) == value
    assert stat.S_IMODE(after.st_mode) == stat.S_IMODE(before.st_mode)


def test_what_a_list_grants_to_one_is_not_granted_to_the_group(home: Home) -> None:
    """The mode shows r for the group where a list lets another user read."""
    helpers.need_tool("setpriv")
    home.path.chmod(0o755)
    archive = home.path / "a.vma"
    archive.write_bytes(b"old")
    archive.chmod(0o600)
    _set_or_skip(archive, "system.posix_acl_access", FOR_NOBODY)
    assert stat.S_IMODE(archive.stat().st_mode) == 0o640
    create.create(str(archive), [SourceDevice("disk", home.give("disk", DISK))])
    assert home.do(victim.Task("verify", str(archive), "")) == (0, "")
    command = ["setpriv", "--reuid", "65533", "--regid", "0", "--clear-groups", "cat", str(archive)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, "Permission denied" in done.stderr) == (1, True)


def test_the_scratch_of_other_formats_is_closed(
    modes: dict[str, set[int]], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The raw file that qemu-img reads, and what it writes."""
    helpers.need_tool("qemu-img")
    src = tmp_path / "a.vma"
    src.write_bytes(helpers.build_archive({"disk": DISK}, configs={}).join())
    folder = tmp_path / "out"
    seen: set[int] = set()
    real = qemu.convert

    def convert(*args: str) -> None:
        real(*args)
        seen.update(stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir())

    monkeypatch.setattr(qemu, "convert", convert)
    done = extract.extract(str(src), str(folder), devices=[extract.DeviceRequest("disk", None, "qcow2")])
    assert list(modes.values()) == [{0o600}]
    assert seen == {0o600}
    assert stat.S_IMODE(os.stat(done.devices[0].path).st_mode) == 0o600


# --- an ordinary user -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Home:
    """A folder of an ordinary user."""

    path: pathlib.Path
    uid: int

    def do(self, task: victim.Task) -> tuple[int, str]:
        """Let the user do the task. Returns the exit status, and what was said."""
        process = victim.start(dataclasses.replace(task, uid=self.uid), stderr=-1)
        _out, said = process.communicate(timeout=60)
        return process.returncode, said

    def give(self, name: str, content: bytes) -> str:
        """A file of the user's."""
        path = self.path / name
        path.write_bytes(content)
        os.chown(path, self.uid, self.uid)
        path.chmod(0o600)
        return str(path)


@pytest.fixture
def home() -> t.Iterator[Home]:
    """Where every user may go: pytest's folders are for their owner alone, and so may be that of the checkout."""
    if os.geteuid() != 0:
        pytest.skip("to run as somebody else needs root; all other tests run as an ordinary user already")
    uid = pwd.getpwnam("nobody").pw_uid
    path = pathlib.Path(tempfile.mkdtemp(prefix="vma-home-", dir="/var/tmp"))
    os.chown(path, uid, uid)
    yield Home(path, uid)
    shutil.rmtree(path)


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_ordinary_user_makes_and_reads_archives(ending: str, home: Home) -> None:
    archive, out = str(home.path / f"a{ending}"), home.path / "out"
    assert home.do(victim.Task("create", home.give("disk", DISK), archive)) == (0, "")
    status = os.stat(archive)
    assert (status.st_uid, stat.S_IMODE(status.st_mode)) == (home.uid, 0o600)
    assert home.do(victim.Task("verify", archive, "")) == (0, "")
    both = home.give("b.vma", helpers.build_archive({"disk": DISK, "efi": EFI}).join())
    assert home.do(victim.Task("extract", both, str(out))) == (0, "")
    assert (out / "disk-disk.raw").read_bytes() == DISK
    assert {path.stat().st_uid for path in (out, *out.iterdir())} == {home.uid}


def test_an_ordinary_user_reads_a_qcow2_image(home: Home) -> None:
    """Where the user may not mount a view, the image is converted."""
    tool = helpers.need_tool("qemu-img")
    raw = home.give("raw", DISK)
    source = home.give("disk.qcow2", b"")
    subprocess.run([tool, "convert", "-O", "qcow2", raw, source], check=True)
    assert home.do(victim.Task("create", source, str(home.path / "a.vma"), "qcow2")) == (0, "")
    assert helpers.look(home.path / "a.vma").ok
    assert sorted(os.listdir(home.path)) == ["a.vma", "disk.qcow2", "raw"]


def test_what_belongs_to_others_stays_closed(home: Home) -> None:
    archive = home.path / "a.vma"
    archive.write_bytes(helpers.build_archive({"disk": DISK, "efi": EFI}).join())
    archive.chmod(0o600)
    for task in (
        victim.Task("verify", str(archive), ""),
        victim.Task("extract", str(archive), str(home.path / "out")),
        victim.Task("create", home.give("disk", DISK), str(archive)),
    ):
        code, said = home.do(task)
        assert code == 1
        assert f"RequestError: {archive}: the archive cannot be opened: Permission denied" in said
    assert sorted(os.listdir(home.path)) == ["a.vma", "disk"]


def test_a_folder_that_belongs_to_others(home: Home) -> None:
    folder = home.path / "theirs"
    folder.mkdir(mode=0o755)
    code, said = home.do(victim.Task("create", home.give("disk", DISK), str(folder / "a.vma")))
    assert code == 1
    assert f"TargetError: {folder / 'a.vma'}: cannot be written: Permission denied" in said
    assert os.listdir(folder) == []


def test_in_place_of_what_belongs_to_others_comes_a_file_of_the_users(home: Home) -> None:
    """An ordinary user cannot give the file away, so nobody else gets to read it."""
    archive = home.path / "a.vma"
    archive.write_bytes(b"old")
    archive.chmod(0o644)
    assert home.do(victim.Task("create", home.give("disk", DISK), str(archive))) == (0, "")
    status = archive.stat()
    assert (status.st_uid, stat.S_IMODE(status.st_mode)) == (home.uid, 0o600)
    assert helpers.look(archive).ok
