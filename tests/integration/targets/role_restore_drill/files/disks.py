# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What disks that boot are made of: file systems, partitions and boot loaders, without root."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import typing as t

MIB = 1 << 20
SECTOR = 512
TOOLS: dict[str, str] = {
    "qemu-system-x86_64": "qemu-system-x86",
    "qemu-img": "qemu-utils",
    "mcopy": "mtools",
    "syslinux": "syslinux",
    "mkfs.vfat": "dosfstools",
    "mke2fs": "e2fsprogs",
    "sfdisk": "fdisk",
}
"""The tools that make and boot disks, and Debian's packages of them."""
MBR = ("/usr/lib/syslinux/mbr/mbr.bin", "/usr/lib/SYSLINUX/mbr.bin", "/usr/share/syslinux/mbr.bin")
COMMAND_LINE = "console=ttyS0 no_timer_check"
"""On a busy host an emulated guest finds its timer wanting, and goes on without it: that is, hangs."""
SYSLINUX = f"""SERIAL 0 115200
DEFAULT linux
PROMPT 0
LABEL linux
KERNEL vmlinuz
INITRD initrd.img
APPEND {COMMAND_LINE} """

BOOT, BOOT_SIZE = MIB, 40 * MIB
DATA = BOOT + BOOT_SIZE
"""Where the partitions lie, in bytes: one to boot from, and one for all else, which ends a MiB before the disk."""

os.environ["PATH"] += ":/usr/sbin:/sbin"


def missing_packages(tools: t.Mapping[str, str], *needed: tuple[t.Sequence[str], str]) -> list[str]:
    """What has to be installed for tools, and for files of which one has to be there."""
    missing = {package for tool, package in tools.items() if shutil.which(tool) is None}
    missing |= {package for paths, package in needed if not any(map(os.path.exists, paths))}
    return sorted(missing)


def run(*command: str | os.PathLike[str], **options: t.Any) -> bytes:
    """Run a tool, and return what it writes."""
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env={**os.environ, "LC_ALL": "C"}, **options)
    return bytes(done.stdout)


def make_empty(path: pathlib.Path, size: int) -> pathlib.Path:
    """A file of a size, without contents."""
    with path.open("wb") as file:
        file.truncate(size)
    return path


def write_at(disk: pathlib.Path, offset: int, data: bytes) -> None:
    """Write a part of a disk."""
    with disk.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def put(part: pathlib.Path, disk: pathlib.Path, offset: int) -> None:
    """Put a file system where its partition begins."""
    run("dd", f"if={part}", f"of={disk}", "bs=1M", f"seek={offset // MIB}", "conv=notrunc,sparse", "status=none")


def make_ext4(path: pathlib.Path, tree: pathlib.Path, size: int) -> pathlib.Path:
    """A file system with the files of a folder."""
    run("mke2fs", "-q", "-F", "-t", "ext4", "-d", tree, make_empty(path, size))
    return path


def make_bios_disk(
    disk: pathlib.Path, kernel: pathlib.Path, initrd: pathlib.Path, data: pathlib.Path, append: str
) -> pathlib.Path:
    """A disk with a boot sector, FAT with syslinux, and a file system."""
    boot = make_empty(disk.with_suffix(".boot"), BOOT_SIZE)
    run("mkfs.vfat", "-F", "16", boot)
    config = disk.with_suffix(".cfg")
    config.write_text(SYSLINUX + append + "\n")
    for name, path in (("vmlinuz", kernel), ("initrd.img", initrd), ("syslinux.cfg", config)):
        run("mcopy", "-i", boot, path, f"::{name}")
    run("syslinux", "--install", boot)
    _partition(disk, "dos", data, "6,bootable", "83")
    write_at(disk, 0, pathlib.Path(next(filter(os.path.exists, MBR))).read_bytes())
    put(boot, disk, BOOT)
    put(data, disk, DATA)
    boot.unlink()
    return disk


def make_uefi_disk(
    disk: pathlib.Path, program: pathlib.Path, place: str, data: pathlib.Path, identity: str
) -> pathlib.Path:
    """A disk with a GPT, an EFI system partition that has an C(identity) and holds a program, and a file system."""
    boot = make_empty(disk.with_suffix(".boot"), BOOT_SIZE)
    run("mkfs.vfat", "-F", "32", "-s", "1", boot)
    for folder in list(pathlib.PurePosixPath(place).parents)[-2::-1]:
        run("mmd", "-i", boot, f"::{folder}")
    run("mcopy", "-i", boot, program, f"::{place}")
    system, linux = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B", "0FC63DAF-8483-4772-8E79-3D69D8477DE4"
    _partition(disk, "gpt", data, f"{system},uuid={identity}", linux)
    put(boot, disk, BOOT)
    put(data, disk, DATA)
    boot.unlink()
    return disk


def _partition(disk: pathlib.Path, label: str, data: pathlib.Path, *kinds: str) -> None:
    size = data.stat().st_size
    make_empty(disk, DATA + size + MIB)
    parts = zip((BOOT, DATA), (BOOT_SIZE, size), kinds)
    table = [f"start={start // SECTOR},size={length // SECTOR},type={kind}" for start, length, kind in parts]
    run("sfdisk", "--quiet", "--no-tell-kernel", disk, input="\n".join([f"label: {label}", *table, ""]).encode())


def make_broken(disk: pathlib.Path, name: str, offset: int, length: int) -> None:
    """A copy of a disk, beside it, in which a part is zeros."""
    copy = disk.with_name(f"{name}.raw")
    run("cp", "--sparse=always", disk, copy)
    write_at(copy, offset, bytes(length))


def make_broken_file(disk: pathlib.Path, name: str, file: pathlib.Path) -> None:
    """A copy of a disk, beside it, in which a file has no contents; its name and size stay."""
    content = file.read_bytes()
    # FAT keeps a file that is written to an empty file system in one piece
    offset = disk.read_bytes().find(content[:SECTOR])
    if offset < 0:
        raise ValueError(f"{file} is not on {disk}")
    make_broken(disk, name, offset, len(content))
