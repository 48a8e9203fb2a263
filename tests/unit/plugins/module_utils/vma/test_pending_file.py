# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import pathlib
import stat
import threading

import pytest

from ansible_collections.vmbackup.vma.plugins.module_utils.vma import errors, pending_file


def test_it_appears_at_its_end(tmp_path: pathlib.Path) -> None:
    dest = tmp_path / "file"
    pending = pending_file.PendingFile(str(dest))
    pending.write(3, b"later")
    pending.write(0, b"now")
    pending.sync()
    assert not dest.exists()
    (name,) = os.listdir(tmp_path)
    assert name.startswith(".file.")
    assert stat.S_IMODE(os.stat(pending.path).st_mode) == 0o600
    pending.commit()
    assert os.listdir(tmp_path) == ["file"]
    assert dest.read_bytes() == b"nowlater"
    assert stat.S_IMODE(dest.stat().st_mode) == 0o600
    pending.discard()
    assert dest.exists()
    with pytest.raises(ValueError, match="no longer pending"):
        pending.write(0, b"x")


@pytest.mark.parametrize("number", [0, errno.EPERM, errno.EOPNOTSUPP])
@pytest.mark.parametrize("there", [None, "file", "link"])
def test_it_replaces_nothing_if_it_may_not(
    there: str | None, number: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C(number) is what a file system says that has no links."""

    def refuse(*_names: str) -> None:
        raise OSError(number, os.strerror(number))

    if number:
        monkeypatch.setattr(os, "link", refuse)
    dest = tmp_path / "file"
    pending = pending_file.PendingFile(str(dest), may_replace=False)
    pending.write(0, b"new")
    if there == "file":
        dest.write_bytes(b"another's")
    elif there == "link":
        dest.symlink_to("nowhere")
    assert pending.commit() == (there is None)
    pending.discard()
    assert os.listdir(tmp_path) == ["file"]
    assert dest.is_symlink() if there == "link" else dest.read_bytes() == (b"another's" if there else b"new")


def test_what_else_a_link_says_is_an_error(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_names: str) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "link", refuse)
    pending = pending_file.PendingFile(str(tmp_path / "file"), may_replace=False)
    with pytest.raises(errors.TargetError, match="Input/output error"):
        pending.commit()
    pending.discard()
    assert os.listdir(tmp_path) == []


def test_the_mode_is_closed_whatever_the_umask(tmp_path: pathlib.Path) -> None:
    before = os.umask(0)
    try:
        pending = pending_file.PendingFile(str(tmp_path / "file"))
        assert stat.S_IMODE(os.stat(pending.path).st_mode) == 0o600
        pending.discard()
    finally:
        os.umask(before)


def test_discarded_it_leaves_nothing(tmp_path: pathlib.Path) -> None:
    pending = pending_file.PendingFile(str(tmp_path / "file"))
    pending.write(0, b"x")
    pending.discard()
    pending.discard()
    assert os.listdir(tmp_path) == []


def test_a_relative_name(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pending = pending_file.PendingFile("file")
    pending.commit()
    assert os.listdir(tmp_path) == ["file"]


def test_a_link_is_replaced_and_not_followed(tmp_path: pathlib.Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    (tmp_path / "file").symlink_to(victim)
    pending = pending_file.PendingFile(str(tmp_path / "file"))
    pending.write(0, b"new")
    pending.commit()
    assert victim.read_bytes() == b"mine"
    assert not (tmp_path / "file").is_symlink()


def test_leftovers_of_this_name_go_and_no_others(tmp_path: pathlib.Path) -> None:
    mine = tmp_path / ".file.0123456789abcdef.vma-part"
    others = [
        tmp_path / ".file2.0123456789abcdef.vma-part",
        tmp_path / ".file.0123456789abcde.vma-part",
        tmp_path / ".file.0123456789abcdef.vma-part2",
        tmp_path / ".file.0123456789ABCDEF.vma-part",
        tmp_path / "file.0123456789abcdef.vma-part",
        tmp_path / ".fi.e.0123456789abcdef.vma-part",
    ]
    for path in (mine, *others):
        path.touch()
    pending = pending_file.PendingFile(str(tmp_path / "file"))
    pending.discard()
    assert sorted(tmp_path.iterdir()) == sorted(others)


def test_signs_in_a_name_mean_nothing(tmp_path: pathlib.Path) -> None:
    victim = tmp_path / ".abc.0123456789abcdef.vma-part"
    victim.touch()
    pending_file.PendingFile(str(tmp_path / "a.c")).discard()
    pending_file.PendingFile(str(tmp_path / ".*")).discard()
    assert victim.exists()


def test_a_link_among_leftovers_is_not_followed(tmp_path: pathlib.Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    (tmp_path / ".file.0123456789abcdef.vma-part").symlink_to(victim)
    with pytest.raises(errors.TargetError):
        pending_file.PendingFile(str(tmp_path / "file"))
    assert victim.read_bytes() == b"mine"


def test_another_run_is_told(tmp_path: pathlib.Path) -> None:
    first = pending_file.PendingFile(str(tmp_path / "file"))
    with pytest.raises(errors.BusyError, match="another run is writing this file") as caught:
        pending_file.PendingFile(str(tmp_path / "file"))
    assert caught.value.file == str(tmp_path / "file")
    pending_file.PendingFile(str(tmp_path / "other")).discard()
    first.write(0, b"whole")
    first.commit()
    second = pending_file.PendingFile(str(tmp_path / "file"))
    second.discard()
    assert (tmp_path / "file").read_bytes() == b"whole"


def test_a_leftover_that_gets_its_name_meanwhile(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other run ends between our look at its file and our removal of it."""
    first = pending_file.PendingFile(str(tmp_path / "file"))
    first.write(0, b"whole")
    real = fcntl.flock
    told: list[int] = []

    def flock(fd: int, how: int) -> None:
        if stat.S_ISREG(os.fstat(fd).st_mode) and not told:
            told.append(fd)
            first.commit()
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    second = pending_file.PendingFile(str(tmp_path / "file"))
    second.discard()
    assert told
    assert (tmp_path / "file").read_bytes() == b"whole"


def test_a_folder_is_no_file(tmp_path: pathlib.Path) -> None:
    with pytest.raises(errors.TargetError, match="found a folder"):
        pending_file.PendingFile(str(tmp_path))
    with pytest.raises(errors.TargetError, match="No such file"):
        pending_file.PendingFile(str(tmp_path / "absent" / "file"))


@pytest.mark.parametrize("what", ["fsync", "rename"])
def test_an_end_that_fails_leaves_the_old_file(
    what: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dest = tmp_path / "file"
    dest.write_bytes(b"old")

    def fail(*_args: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    pending = pending_file.PendingFile(str(dest))
    monkeypatch.setattr(os, what, fail)
    with pytest.raises(errors.TargetError, match="Input/output error"):
        pending.commit()
    monkeypatch.undo()
    pending.discard()
    assert os.listdir(tmp_path) == ["file"]
    assert dest.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, errors.SpaceError),
        (errno.EDQUOT, errors.SpaceError),
        (errno.EFBIG, errors.SpaceError),
        (errno.EIO, errors.TargetError),
        (errno.EROFS, errors.TargetError),
    ],
)
def test_what_the_system_says(number: int, kind: type[errors.TargetError]) -> None:
    with pytest.raises(errors.TargetError) as caught, pending_file.target_errors("/some/file"):
        raise OSError(number, os.strerror(number))
    assert caught.value.__class__ is kind
    assert caught.value.file == "/some/file"
    assert os.strerror(number) in str(caught.value)


def test_short_writes_go_on(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, view, offset: real(fd, bytes(view[:3]), offset))
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    pending_file.write_all(fd, 2, b"0123456789")
    os.close(fd)
    assert (tmp_path / "file").read_bytes() == b"\x00\x000123456789"


def test_a_folder_that_another_process_has_locked(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So does `flock /srv/backup ansible-playbook ...`: waiting for its end would wait for ourselves."""
    monkeypatch.setattr(pending_file, "LOCK_TIMEOUT", 0.1)
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(errors.BusyError, match=f"a lock on the folder {tmp_path}.*lslocks") as caught:
        pending_file.PendingFile(str(tmp_path / "file"))
    assert caught.value.file == str(tmp_path / "file")
    os.close(fd)
    assert os.listdir(tmp_path) == []
    pending_file.PendingFile(str(tmp_path / "file")).discard()


def test_a_folder_that_is_locked_for_a_moment(tmp_path: pathlib.Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    timer = threading.Timer(0.2, os.close, [fd])
    timer.start()
    pending_file.PendingFile(str(tmp_path / "file")).discard()
    timer.join()


def test_a_folder_that_cannot_be_locked(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = fcntl.flock

    def flock(fd: int, how: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    pending_file.PendingFile(str(tmp_path / "file")).discard()
