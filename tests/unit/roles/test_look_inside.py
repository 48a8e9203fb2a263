# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The look into file systems of the role restore_drill: real ones, mounted as the role does it, which needs root."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import typing as t

import pytest

SCRIPT = pathlib.Path(__file__).resolve().parents[3] / "roles/restore_drill/files/look_inside.py"
ENVIRONMENT = {**os.environ, "LC_ALL": "C", "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"}
TOOLS = {"unshare": "util-linux", "mount": "mount", "sfdisk": "fdisk", "blkid": "util-linux", "mke2fs": "e2fsprogs"}
NAMESPACE = ["unshare", "--mount", "--propagation", "private"]
MIB = 1 << 20


@pytest.fixture(autouse=True)
def _needs() -> None:
    missing = sorted({package for tool, package in TOOLS.items() if not shutil.which(tool, path=ENVIRONMENT["PATH"])})
    if missing:
        pytest.skip(f"mounting needs the packages {' '.join(missing)}")
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    done = subprocess.run([*NAMESPACE, "losetup", "--find"], check=False, capture_output=True, env=ENVIRONMENT)
    if done.returncode != 0:
        pytest.skip("mounting needs mount namespaces and loop devices")


def run(*command: str | os.PathLike[str], stdin: str = "") -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=ENVIRONMENT, input=stdin)
    return done.stdout


def make_ext4(path: pathlib.Path, files: dict[str, str], size: int = 8 * MIB) -> pathlib.Path:
    tree = path.with_suffix(".tree")
    for name, text in files.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    with path.open("wb") as file:
        file.truncate(size)
    run("mke2fs", "-q", "-F", "-t", "ext4", "-d", tree, path)
    return path


def look(folder: pathlib.Path, images: dict[str, pathlib.Path], **request: t.Any) -> dict[str, t.Any]:
    asked = {
        "images": {name: str(path) for name, path in images.items()},
        "mountpoint": str(folder / "mnt"),
        "min_files": 1,
        "files": [],
        **request,
    }
    command = [*NAMESPACE, sys.executable, str(SCRIPT), json.dumps(asked)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode in (0, 1), done.stderr
    assert str(folder) not in pathlib.Path("/proc/mounts").read_text()
    assert str(folder) not in run("losetup", "--list", "--output", "BACK-FILE")
    result: dict[str, t.Any] = json.loads(done.stdout)
    assert (done.returncode == 1) == (result.get("result") == "failed")
    return result


def test_partitions_and_whole_disks(tmp_path: pathlib.Path) -> None:
    """Swap is passed over, what is encrypted is named, and file systems are counted wherever they lie."""
    whole = make_ext4(tmp_path / "whole", {"etc/hostname": "web\n", "data": "x"})
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.truncate(24 * MIB)
    run(
        "sfdisk",
        "--quiet",
        disk,
        stdin="label: gpt\nstart=2048,size=16384\nstart=18432,size=2048\nstart=20480,size=8192\n",
    )
    with disk.open("r+b") as file:
        file.seek(MIB)
        file.write(make_ext4(tmp_path / "part", {"a": "1", "b/c": "2", "b/d": "3"}).read_bytes())
        file.seek(9 * MIB)
        file.write(b"LUKS\xba\xbe\x00\x01".ljust(1024, b"\0"))
        file.seek(10 * MIB + 1024)
        file.write((1).to_bytes(4, "little") + (1023).to_bytes(4, "little"))
        file.seek(10 * MIB + 4086)
        file.write(b"SWAPSPACE2")
    result = look(tmp_path, {"drive-scsi0": whole, "drive-scsi1": disk}, min_files=5)
    assert result["file_systems"] == [
        {"disk": "drive-scsi0", "partition": 0, "type": "ext4", "files": 2},
        {"disk": "drive-scsi1", "partition": 1, "type": "ext4", "files": 3},
    ]
    assert result["files"] == 5
    assert result["notes"] == ["partition 2 of drive-scsi1 holds encrypted data, which is not opened"]
    few = look(tmp_path, {"drive-scsi0": whole}, min_files=3)
    assert (few["kind"], few["reason"]) == ("files", "expected 3 files or more, found 2")


def test_a_file_system_that_was_in_use(tmp_path: pathlib.Path) -> None:
    """Its journal is replayed on the copy, as the VM's own system would do it; it is not taken for broken."""
    disk, copy = make_ext4(tmp_path / "disk", {"old": "1"}), tmp_path / "copy"
    mountpoint = tmp_path / "at"
    mountpoint.mkdir()
    use = f"mount -o loop {disk} {mountpoint} && echo 2 >{mountpoint}/new && sync"
    run(*NAMESPACE, "sh", "-c", f"{use} && cp {disk} {copy}; umount {mountpoint}")
    assert "needs_recovery" in run("dumpe2fs", "-h", copy)
    assert look(tmp_path, {"drive-scsi0": copy}, files=[{"path": "/new"}])["files"] == 2
    assert "needs_recovery" not in run("dumpe2fs", "-h", copy)


@pytest.mark.parametrize(
    ("damage", "kind", "reason"),
    [
        # All but the superblock of its beginning; all of it
        ((2048, 62 * 1024), "file_system", "drive-scsi0, a ext4, cannot be mounted"),
        ((0, 8 * MIB), "no_file_system", "no file system was found that can be mounted"),
    ],
)
def test_a_file_system_that_is_broken(tmp_path: pathlib.Path, damage: tuple[int, int], kind: str, reason: str) -> None:
    disk = make_ext4(tmp_path / "disk", {"a": "1"})
    with disk.open("r+b") as file:
        file.seek(damage[0])
        file.write(bytes(damage[1]))
    result = look(tmp_path, {"drive-scsi0": disk})
    assert (result["result"], result["kind"]) == ("failed", kind)
    assert reason in result["reason"]


def test_a_partition_that_does_not_fit_the_disk(tmp_path: pathlib.Path) -> None:
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.truncate(24 * MIB)
    run("sfdisk", "--quiet", disk, stdin="label: dos\nstart=2048,size=40000\n")
    os.truncate(disk, 8 * MIB)
    result = look(tmp_path, {"drive-scsi0": disk})
    assert (result["kind"], result["reason"]) == (
        "partition_table",
        "partition 1 of drive-scsi0 ends behind the end of the disk",
    )


@pytest.mark.parametrize(
    ("label", "table_type", "is_right"),
    [
        ("gpt", "0FC63DAF-8483-4772-8E79-3D69D8477DE4", False),
        ("gpt", "21686148-6449-6E6F-744E-656564454649", True),
        ("gpt", "E3C9E316-0B5C-4DB8-817D-F92DF00215AE", True),
        ("gpt", "0657FD6D-A4AB-43C4-84E5-0933C84B4F4F", True),
        ("dos", "83", False),
        ("dos", "82", True),
        ("dos", "5", True),
    ],
)
def test_a_partition_in_which_nothing_is_known(
    tmp_path: pathlib.Path, label: str, table_type: str, is_right: bool
) -> None:
    """Another file system of the disk has files, and does not make up for one that is gone."""
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.truncate(24 * MIB)
    table = f"label: {label}\nstart=2048,size=16384\nstart=18432,size=8192,type={table_type}\n"
    run("sfdisk", "--quiet", disk, stdin=table)
    with disk.open("r+b") as file:
        file.seek(MIB)
        file.write(make_ext4(tmp_path / "part", {"a": "1"}).read_bytes())
    result = look(tmp_path, {"drive-scsi0": disk})
    if is_right:
        assert (result.get("result"), result["files"], result["notes"]) == (None, 1, [])
    else:
        assert (result["result"], result["kind"]) == ("failed", "file_system")
        assert result["reason"].startswith("partition 2 of drive-scsi0 holds nothing that is known")


@pytest.mark.parametrize("table", ["", "label: gpt\n"])
def test_a_disk_in_which_nothing_is_known_is_noted(tmp_path: pathlib.Path, table: str) -> None:
    system, data = make_ext4(tmp_path / "system", {"a": "1"}), tmp_path / "data"
    with data.open("wb") as file:
        file.truncate(8 * MIB)
    if table:
        run("sfdisk", "--quiet", data, stdin=table)
    result = look(tmp_path, {"drive-scsi0": system, "drive-scsi1": data})
    assert (result.get("result"), result["files"]) == (None, 1)
    assert result["notes"] == ["drive-scsi1 holds nothing that is known"]


def test_a_disk_with_the_marks_of_two_file_systems_is_noted(tmp_path: pathlib.Path) -> None:
    system, both = make_ext4(tmp_path / "system", {"a": "1"}), make_ext4(tmp_path / "both", {"b": "1"})
    with both.open("r+b") as file:
        # The boot sector of a FAT16, which leaves the ext4 whole
        file.write(bytes.fromhex("eb3c90 6d6b66732e666174 0002 04 0400 02 0002 0040 f8 1000"))
        file.seek(54)
        file.write(b"FAT16   ")
        file.seek(510)
        file.write(b"\x55\xaa")
    result = look(tmp_path, {"drive-scsi0": system, "drive-scsi1": both})
    assert result["notes"] == ["drive-scsi1 has the marks of several file systems, and is not opened"]


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ({"path": "/etc/hostname"}, None),
        ({"path": "etc/hostname", "disk": "scsi0", "partition": 0}, None),
        # As -e and templates of older versions of Ansible have numbers
        ({"path": "etc/hostname", "partition": "0"}, None),
        ({"path": "/etc/hostname", "checksum": hashlib.sha256(b"web\n").hexdigest().upper()}, None),
        ({"path": "/etc/hostname", "checksum": "md5:" + hashlib.md5(b"web\n").hexdigest()}, None),
        ({"path": "/etc/hostname", "checksum": "sha256:00"}, "/etc/hostname: its checksum is"),
        ({"path": "/etc/hostname", "checksum": "crc:00"}, "/etc/hostname: this host knows no checksum crc"),
        ({"path": "/etc/shadow"}, "/etc/shadow: No such file or directory"),
        ({"path": "/etc", "checksum": "00"}, "/etc: it is no file"),
        ({"path": "/etc/hostname", "disk": "scsi1"}, "no file system was there to look for it"),
        ({"path": "/link"}, "/link: it is a link that leads out of its file system"),
    ],
)
def test_files_that_are_looked_for(tmp_path: pathlib.Path, wanted: dict[str, t.Any], reason: str | None) -> None:
    disk = make_ext4(tmp_path / "disk", {"etc/hostname": "web\n"})
    # The host's own file, which must not be taken for the guest's
    run("debugfs", "-w", "-R", "symlink /link /etc/passwd", disk)
    result = look(tmp_path, {"drive-scsi0": disk}, files=[wanted])
    if reason is None:
        assert "result" not in result
    else:
        assert result["kind"] == "files"
        assert reason in result["reason"]
