# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""QEMU's own locks on images: seen, and held against a real QEMU."""

from __future__ import annotations

import os
import pathlib
import stat
import subprocess

import pytest

from ansible_collections.vmbackup.vma.plugins.module_utils.host import locks, readers
from ansible_collections.vmbackup.vma.plugins.module_utils.host.provider import Work
from ansible_collections.vmbackup.vma.plugins.module_utils.vma import create, errors
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.host import snapshots
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.vma.conftest import MakeLoop, make_loop

__all__ = ("make_loop",)


@pytest.fixture
def disk(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(os.urandom(1 << 20))
    return path


def test_an_image_that_a_vm_writes_to_is_refused(disk: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with snapshots.written_by_qemu(disk, tmp_path):
        with pytest.raises(errors.SourceError, match="a running VM writes to this image") as caught:
            locks.lock_image(str(disk))
        assert caught.value.file == str(disk)
        assert not readers.has_open(os.getpid(), str(disk))
    os.close(locks.lock_image(str(disk)))


def test_no_vm_starts_onto_it_while_two_hold_it(disk: pathlib.Path) -> None:
    first, second = locks.lock_image(str(disk)), locks.lock_image(str(disk))
    before = disk.read_bytes()
    assert 'Failed to get "write" lock' in snapshots.write_by_qemu(disk)
    os.close(first)
    assert 'Failed to get "write" lock' in snapshots.write_by_qemu(disk)
    assert disk.read_bytes() == before
    os.close(second)
    assert snapshots.write_by_qemu(disk) == ""


def test_a_block_device(make_loop: MakeLoop) -> None:
    device = make_loop(1 << 20)
    fd = locks.lock_image(device)
    assert "lock" in snapshots.write_by_qemu(device)
    os.close(fd)
    assert snapshots.write_by_qemu(device) == ""


def test_it_cannot_be_resized_either(disk: pathlib.Path) -> None:
    fd = locks.lock_image(str(disk))
    assert "lock" in snapshots.qemu("qemu-img", "resize", "-f", "raw", str(disk), "2M").stderr
    os.close(fd)


def test_archives_are_made_and_qemu_reads_while_it_is_held(disk: pathlib.Path, tmp_path: pathlib.Path) -> None:
    fd = locks.lock_image(str(disk))
    made = create.create(str(tmp_path / "x.vma"), [create.SourceDevice("drive-scsi0", str(disk))], [])
    assert made.changed
    copy = tmp_path / "copy"
    assert snapshots.qemu("qemu-img", "convert", "-f", "raw", "-O", "raw", str(disk), str(copy)).stderr == ""
    assert copy.read_bytes() == disk.read_bytes()
    os.close(fd)


def test_what_is_no_disk_is_refused(tmp_path: pathlib.Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name, said in (("missing", "No such file"), ("", "expected a file or a block device"), ("fifo", "expected")):
        with pytest.raises(errors.SourceError, match=said):
            locks.lock_image(str(tmp_path / name))


def test_a_block_device_that_a_guest_knows_by_another_node(make_loop: MakeLoop, tmp_path: pathlib.Path) -> None:
    device, node = make_loop(1 << 20), tmp_path / "node"
    os.mknod(node, 0o600 | stat.S_IFBLK, os.stat(device).st_rdev)
    with snapshots.open_journal(tmp_path / "journals") as kept:
        work = Work(kept, "0badcafe", str(tmp_path), snapshots.stand_still, lambda _fd: None)
        locks.keep_at_rest(work, device)
        (step,) = kept.steps
        health = locks.KINDS[step.kind].health
        assert health(step.fields) is None
        with node.open("r+b") as opened, subprocess.Popen(["sleep", "60"], stdin=opened) as writer:
            assert str(health(step.fields)).endswith(f"opened {device} for writing while it was read in place")
            with pytest.raises(errors.SourceError, match="has this device open for writing") as caught:
                locks.lock_image(device)
            assert caught.value.file == device
            writer.kill()
        assert health(step.fields) is None
        assert locks.KINDS[step.kind].undo(step.fields) is None
