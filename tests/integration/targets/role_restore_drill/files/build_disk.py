# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Make a disk that a BIOS boots to a login prompt within seconds, and copies of it that are broken; without root.

The system is a kernel of this host and a busybox in memory. Beside it lies an ext4 with two files.
"""

from __future__ import annotations

import gzip
import os
import pathlib
import re
import shutil
import subprocess
import sys
import typing as t

MIB = 1 << 20
TOOLS: dict[str, str] = {
    "qemu-system-x86_64": "qemu-system-x86",
    "qemu-img": "qemu-utils",
    "busybox": "busybox-static",
    "cpio": "cpio",
    "mcopy": "mtools",
    "syslinux": "syslinux",
    "mkfs.vfat": "dosfstools",
    "mke2fs": "e2fsprogs",
    "sfdisk": "fdisk",
}
MBR = ("/usr/lib/syslinux/mbr/mbr.bin", "/usr/lib/SYSLINUX/mbr.bin", "/usr/share/syslinux/mbr.bin")
INIT = """#!/bin/busybox sh
/bin/busybox mount -t devtmpfs none /dev
while :; do /bin/busybox echo "drill login: "; /bin/busybox sleep 1; done
"""
SYSLINUX = """SERIAL 0 115200
DEFAULT linux
PROMPT 0
LABEL linux
KERNEL vmlinuz
INITRD initrd.img
APPEND console=ttyS0 quiet panic=0
"""
TABLE = "label: dos\nstart=2048,size=81920,type=6,bootable\nstart=83968,size=16384,type=83\n"
BOOT, DATA, SIZE = MIB, 41 * MIB, 50 * MIB


def run(*command: str, **options: t.Any) -> None:
    """Run a tool."""
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "LC_ALL": "C"}, **options)


def find_kernel() -> str | None:
    """A kernel that can be read; one for clouds, which starts fastest, goes first."""
    found = [str(path) for path in pathlib.Path("/boot").glob("vmlinuz-*") if os.access(path, os.R_OK)]
    return max(found, key=lambda path: ("cloud" in path, path)) if found else None


def missing_packages() -> list[str]:
    """What has to be installed."""
    missing = {package for tool, package in TOOLS.items() if shutil.which(tool) is None}
    if not any(map(os.path.exists, MBR)):
        missing.add("syslinux-common")
    if find_kernel() is None:
        missing.add("linux-image-cloud-amd64")
    return sorted(missing)


def make_initrd(folder: pathlib.Path) -> None:
    """The system in memory: busybox, and what it runs."""
    root = folder / "root"
    for name in ("bin", "dev"):
        (root / name).mkdir(parents=True)
    shutil.copy(t.cast(str, shutil.which("busybox")), root / "bin/busybox")
    (root / "init").write_text(INIT)
    (root / "init").chmod(0o755)
    names = "\n".join(str(path.relative_to(root)) for path in [root, *sorted(root.rglob("*"))])
    packed = subprocess.run(
        ["cpio", "--create", "--format=newc", "--quiet"],
        cwd=root,
        input=names.encode(),
        check=True,
        capture_output=True,
    )
    (folder / "initrd.img").write_bytes(gzip.compress(packed.stdout, 1))


def make_image(path: pathlib.Path, size: int) -> str:
    """An empty file of a size."""
    with path.open("wb") as file:
        file.truncate(size)
    return str(path)


def write_at(disk: pathlib.Path, offset: int, data: bytes) -> None:
    """Write a part of a disk."""
    with disk.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def make_disk(folder: pathlib.Path) -> pathlib.Path:
    """The disk."""
    make_initrd(folder)
    boot = make_image(folder / "boot.img", 40 * MIB)
    run("mkfs.vfat", "-F", "16", boot)
    (folder / "syslinux.cfg").write_text(SYSLINUX)
    shutil.copy(t.cast(str, find_kernel()), folder / "vmlinuz")
    for name in ("vmlinuz", "initrd.img", "syslinux.cfg"):
        run("mcopy", "-i", boot, str(folder / name), f"::{name}")
    run("syslinux", "--install", boot)
    (folder / "tree/etc").mkdir(parents=True)
    (folder / "tree/etc/hostname").write_text("drill\n")
    (folder / "tree/data").write_text("intact\n")
    data = make_image(folder / "data.img", 8 * MIB)
    run("mke2fs", "-q", "-F", "-t", "ext4", "-d", str(folder / "tree"), data)
    disk = folder / "good.raw"
    run("sfdisk", "--quiet", "--no-tell-kernel", make_image(disk, SIZE), input=TABLE.encode())
    write_at(disk, 0, pathlib.Path(next(filter(os.path.exists, MBR))).read_bytes())
    write_at(disk, BOOT, pathlib.Path(boot).read_bytes())
    write_at(disk, DATA, pathlib.Path(data).read_bytes())
    return disk


def break_copies(folder: pathlib.Path, disk: pathlib.Path) -> None:
    """Copies without a boot sector, with a kernel of zeros, and with a broken file system."""
    kernel = (folder / "vmlinuz").read_bytes()
    # FAT keeps a file that is written to an empty file system in one piece
    place = disk.read_bytes().find(kernel[:512])
    damages = {
        "no_mbr.raw": [(0, bytes(512))],
        "no_kernel.raw": [(place, bytes(len(kernel)))],
        "no_files.raw": [(DATA + 2 * 1024, bytes(62 * 1024))],
    }
    for name, parts in damages.items():
        shutil.copy(disk, folder / name)
        for offset, data in parts:
            write_at(folder / name, offset, data)


def main() -> None:
    """Make the disks in the folder that is given, or say what is missing."""
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    missing = missing_packages()
    if missing:
        print("missing:", *missing)
        return
    folder = pathlib.Path(sys.argv[1])
    break_copies(folder, make_disk(folder))
    kernel = re.sub(r"\s+", " ", find_kernel() or "")
    print(f"made of {kernel}")


if __name__ == "__main__":
    main()
