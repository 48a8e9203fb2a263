# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Disks that boot within seconds, made without root: for a BIOS with syslinux, for UEFI with a unified kernel.

Their system is a kernel of this host and a busybox. It mounts the disk's second partition and tells of its marker.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import os
import pathlib
import re
import shutil
import subprocess
import typing as t

import pytest

MIB = 1 << 20
SECTOR = 512
PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
"""The tools that make file systems are not on everybody's path."""

TOOLS: dict[str, str] = {
    "qemu-system-x86_64": "qemu-system-x86",
    "qemu-img": "qemu-utils",
    "busybox": "busybox-static",
    "modprobe": "kmod",
    "cpio": "cpio",
    "mcopy": "mtools",
    "syslinux": "syslinux",
    "mkfs.vfat": "dosfstools",
    "mke2fs": "e2fsprogs",
    "sfdisk": "fdisk",
    "objcopy": "binutils",
}
"""The tools that make and boot the disks, and Debian's packages of them."""
MBR = "/usr/lib/syslinux/mbr/mbr.bin", "/usr/lib/SYSLINUX/mbr.bin", "/usr/share/syslinux/mbr.bin"
STUB = "/usr/lib/systemd/boot/efi/linuxx64.efi.stub"
OVMF = "/usr/share/OVMF/OVMF_CODE_4M.fd"

MODULES = ["virtio_pci", "virtio_blk", "virtio_scsi", "sd_mod", "ata_piix", "virtio_console", "virtio_net"]
COMMAND_LINE = "console=ttyS0 quiet no_timer_check"
"""On a busy host an emulated guest finds its timer wanting, and goes on without it: that is, hangs."""
UP = r"kernel \S+ is up"
"""What the console shows as soon as the system runs, which the firmware and the loader have read from the disk."""
ALIVE = r"ALIVE marker=(\S+)"
"""What the console shows when the data partition could be read."""

_INIT = r"""#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc none /proc
mount -t sysfs none /sys
mount -t devtmpfs none /dev
for module in $(cat /modules/order); do insmod /modules/$module; done
has() { grep -qw "$1" /proc/cmdline; }
value() { sed -n "s/.*\<$1=\([^ ]*\).*/\1/p" /proc/cmdline; }
echo "kernel $(uname -r) is up"
has test.hang && while :; do sleep 1000; done
has test.poweroff && poweroff -f
has test.reset && reboot -f
if has test.network; then
  n=0; while [ ! -e /sys/class/net/eth0 ] && [ $n -lt 50 ]; do sleep 0.1; n=$((n + 1)); done
  ip link set lo up; ip link set eth0 up; ip address add 10.0.2.15/24 dev eth0; ip route add default via 10.0.2.2
  httpd -p 8080 -h /modules
  port=$(value test.twin)
  [ -z "$port" ] || { nc -w 3 10.0.2.2 $port </dev/null && echo TWIN met || echo TWIN not met; }
fi
if [ -x /bin/qemu-ga ] && has test.agent; then
  mkdir -p /run /var/run
  n=0; while ! ls /dev/vport*p1 >/dev/null 2>&1 && [ $n -lt 50 ]; do sleep 0.1; n=$((n + 1)); done
  qemu-ga --daemonize --method virtio-serial --path $(ls /dev/vport*p1) --statedir /run --pidfile /run/qga.pid
fi
n=0
while [ $n -lt 30 ]; do
  for disk in /dev/vda2 /dev/sda2; do
    [ ! -b $disk ] || { mount -t ext4 $disk /data && break 2; }
  done
  sleep 0.1; n=$((n + 1))
done
if has test.fill; then dd if=/dev/urandom of=/data/fill bs=1M count=8; sync; fi
if [ -e /data/marker ] && date >/data/booted && sync; then
  echo "ALIVE marker=$(cat /data/marker)"
else
  echo "no marker was found"
fi
has test.stop && sleep 6 && poweroff -f
echo "test login: "
while :; do sleep 1000; done
"""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel of this host, with its modules."""

    image: pathlib.Path
    version: str


def _version_key(version: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.findall(r"\d+|[^\d.-]+", version)]


@functools.cache
def find_kernel() -> Kernel | None:
    """The newest kernel that can be read and has its modules; one for clouds, which starts fastest, goes first."""
    found = []
    for image in pathlib.Path("/boot").glob("vmlinuz-*"):
        version = image.name[len("vmlinuz-") :]
        if os.access(image, os.R_OK) and pathlib.Path("/lib/modules", version, "modules.dep").exists():
            found.append(("cloud" in version, _version_key(version), image, version))
    return Kernel(max(found)[2], max(found)[3]) if found else None


def need_everything(*, uefi: bool = False) -> Kernel:
    """The kernel to boot; the test is skipped where something is missing, with the packages to install."""
    missing = {package for tool, package in TOOLS.items() if shutil.which(tool, path=PATH) is None}
    if not any(map(os.path.exists, MBR)):
        missing.add("syslinux-common")
    if uefi:
        missing |= {
            package for path, package in ((STUB, "systemd-boot-efi"), (OVMF, "ovmf")) if not os.path.exists(path)
        }
    kernel = find_kernel()
    if kernel is None:
        missing.add("linux-image-cloud-amd64")
    if missing or kernel is None:
        pytest.skip(f"disks that boot need the packages {' '.join(sorted(missing))}")
    return kernel


def find_agent() -> str:
    """The guest agent's program; the test is skipped without it."""
    path = shutil.which("qemu-ga", path=PATH)
    if path is None:
        pytest.skip("the guest agent needs the package qemu-guest-agent")
    return path


def _run(command: t.Sequence[str | os.PathLike[str]], **options: t.Any) -> bytes:
    done = subprocess.run(
        command, check=False, capture_output=True, env={**os.environ, "LC_ALL": "C", "PATH": PATH}, **options
    )
    assert done.returncode == 0, (command, done.stderr)
    return bytes(done.stdout)


def _module_files(kernel: Kernel) -> list[str]:
    """The files of the modules, those that others need first."""
    files: dict[str, None] = {}
    for module in MODULES:
        done = subprocess.run(
            ["modprobe", "--set-version", kernel.version, "--show-depends", module],
            check=False,
            capture_output=True,
            text=True,
            env={**os.environ, "PATH": PATH},
        )
        # What the kernel has built in, or does not have at all, needs no file.
        files.update(dict.fromkeys(re.findall(r"^insmod (\S+)", done.stdout, re.MULTILINE)))
    return list(files)


def make_initrd(folder: pathlib.Path, kernel: Kernel, *, agent: str | None = None) -> pathlib.Path:
    """The system: busybox, the modules that find disks, and where wanted the guest agent with its libraries."""
    root = folder / "initrd"
    for name in ("bin", "dev", "proc", "sys", "modules", "data"):
        (root / name).mkdir(parents=True)
    shutil.copy(t.cast(str, shutil.which("busybox", path=PATH)), root / "bin/busybox")
    files = _module_files(kernel)
    for file in files:
        shutil.copy(file, root / "modules")
    (root / "modules/order").write_text("\n".join(map(os.path.basename, files)))
    (root / "init").write_text(_INIT)
    (root / "init").chmod(0o755)
    if agent is not None:
        shutil.copy(agent, root / "bin/qemu-ga")
        for library in re.findall(r"(/\S+) \(0x", _run(["ldd", agent]).decode()):
            place = root / library[1:]
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(library, place)
    names = "\n".join(str(path.relative_to(root)) for path in [root, *sorted(root.rglob("*"))])
    packed = _run(["cpio", "--create", "--format=newc", "--quiet"], cwd=root, input=names.encode())
    path = folder / "initrd.img"
    path.write_bytes(gzip.compress(packed, 1))
    return path


def _write_at(disk: pathlib.Path, offset: int, data: bytes) -> None:
    with disk.open("r+b") as file:
        for start in range(0, len(data), MIB):
            piece = data[start : start + MIB]
            if piece.strip(b"\0"):
                file.seek(offset + start)
                file.write(piece)


def _partition(disk: pathlib.Path, size: int, table: str) -> None:
    with disk.open("wb") as file:
        file.truncate(size)
    _run(["sfdisk", "--quiet", "--no-tell-kernel", disk], input=table.encode())


def _make_data(folder: pathlib.Path, marker: str) -> pathlib.Path:
    tree = folder / "tree"
    tree.mkdir()
    (tree / "marker").write_text(marker)
    path = folder / "data.img"
    with path.open("wb") as file:
        file.truncate(DATA_SIZE)
    _run(["mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal", "-d", tree, path])
    return path


BOOT_START = MIB
BOOT_SIZE = 40 * MIB
DATA_START = BOOT_START + BOOT_SIZE
DATA_SIZE = 10 * MIB
DISK_SIZE = DATA_START + DATA_SIZE + MIB
"""Where the partitions lie, in bytes."""


def make_bios_disk(
    folder: pathlib.Path,
    kernel: Kernel,
    initrd: pathlib.Path | None,
    *,
    append: str = "",
    marker: str = "intact",
) -> pathlib.Path:
    """A disk with a boot sector, syslinux on FAT, and ext4. Without C(initrd) the kernel finds no system."""
    boot = folder / "boot.img"
    with boot.open("wb") as file:
        file.truncate(BOOT_SIZE)
    _run(["mkfs.vfat", "-F", "16", boot])
    config = folder / "syslinux.cfg"
    lines = ["SERIAL 0 115200", "DEFAULT test", "PROMPT 0", "LABEL test", "KERNEL vmlinuz"]
    lines += [] if initrd is None else ["INITRD initrd.img"]
    config.write_text("\n".join([*lines, f"APPEND {COMMAND_LINE} {append}", ""]))
    files = {"vmlinuz": kernel.image, "syslinux.cfg": config}
    if initrd is not None:
        files["initrd.img"] = initrd
    for name, path in files.items():
        _run(["mcopy", "-i", boot, path, f"::{name}"])
    _run(["syslinux", "--install", boot])

    disk = folder / "bios.raw"
    parts = [(BOOT_START, BOOT_SIZE, "type=6,bootable"), (DATA_START, DATA_SIZE, "type=83")]
    table = [f"start={start // SECTOR},size={size // SECTOR},{kind}" for start, size, kind in parts]
    _partition(disk, DISK_SIZE, "\n".join(["label: dos", *table, ""]))
    _write_at(disk, 0, next(pathlib.Path(path) for path in MBR if os.path.exists(path)).read_bytes())
    _write_at(disk, BOOT_START, boot.read_bytes())
    _write_at(disk, DATA_START, _make_data(folder, marker).read_bytes())
    return disk


def make_unified_kernel(
    folder: pathlib.Path, kernel: Kernel, initrd: pathlib.Path, *, append: str = ""
) -> pathlib.Path:
    """A program for UEFI that holds a kernel, its command line and its system."""
    command_line = folder / "cmdline"
    command_line.write_text(f"{COMMAND_LINE} {append}")
    release = folder / "os-release"
    release.write_text("ID=test\n")
    sections = re.findall(
        r"^\s+\d+ \S+\s+([0-9a-f]+)\s+([0-9a-f]+)", _run(["objdump", "-h", STUB]).decode(), re.MULTILINE
    )
    address = max(int(size, 16) + int(start, 16) for size, start in sections)
    command: list[str | os.PathLike[str]] = ["objcopy"]
    for name, path in ((".osrel", release), (".cmdline", command_line), (".initrd", initrd), (".linux", kernel.image)):
        address = -(-address // 4096) * 4096
        command += ["--add-section", f"{name}={path}", "--change-section-vma", f"{name}={address:#x}"]
        # The kernel comes last: it is unpacked in place and needs more room than its file.
        address += path.stat().st_size
    program = folder / "BOOTX64.EFI"
    _run([*command, STUB, program])
    return program


def make_uefi_disk(
    folder: pathlib.Path, kernel: Kernel, initrd: pathlib.Path, *, append: str = "", marker: str = "intact"
) -> pathlib.Path:
    """A disk with a GPT, an EFI system partition that holds a unified kernel, and ext4."""
    program = make_unified_kernel(folder, kernel, initrd, append=append)
    boot = folder / "esp.img"
    with boot.open("wb") as file:
        file.truncate(BOOT_SIZE)
    _run(["mkfs.vfat", "-F", "32", "-s", "1", boot])
    _run(["mmd", "-i", boot, "::EFI", "::EFI/BOOT"])
    _run(["mcopy", "-i", boot, program, "::EFI/BOOT/BOOTX64.EFI"])

    disk = folder / "uefi.raw"
    esp, linux = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B", "0FC63DAF-8483-4772-8E79-3D69D8477DE4"
    parts = [(BOOT_START, BOOT_SIZE, esp), (DATA_START, DATA_SIZE, linux)]
    table = [f"start={start // SECTOR},size={size // SECTOR},type={kind}" for start, size, kind in parts]
    _partition(disk, DISK_SIZE, "\n".join(["label: gpt", *table, ""]))
    _write_at(disk, BOOT_START, boot.read_bytes())
    _write_at(disk, DATA_START, _make_data(folder, marker).read_bytes())
    return disk


class Forge:
    """Makes disks, each kind once. They are not to be changed: C(broken) makes a copy for that."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder
        self._made: dict[tuple[t.Any, ...], pathlib.Path] = {}

    def bios(
        self, append: str = "", *, with_system: bool = True, agent: bool = False, marker: str = "intact"
    ) -> pathlib.Path:
        """A disk that boots with a BIOS."""
        kernel = need_everything()

        def make(folder: pathlib.Path) -> pathlib.Path:
            initrd = self.system(agent=agent) if with_system else None
            return make_bios_disk(folder, kernel, initrd, append=append, marker=marker)

        return self._once(make, "bios", append, with_system, agent, marker)

    def uefi(self, append: str = "") -> pathlib.Path:
        """A disk that boots with UEFI."""
        kernel = need_everything(uefi=True)
        return self._once(lambda folder: make_uefi_disk(folder, kernel, self.system(), append=append), "uefi", append)

    def system(self, *, agent: bool = False) -> pathlib.Path:
        """The system that is on the disks."""
        kernel = need_everything()
        program = find_agent() if agent else None
        return self._once(lambda folder: make_initrd(folder, kernel, agent=program), "system", agent)

    def unified_kernel(self) -> pathlib.Path:
        """The program that is on the disks for UEFI."""
        return self.uefi().parent / "BOOTX64.EFI"

    def broken(self, disk: pathlib.Path, dest: pathlib.Path, damage: t.Callable[[pathlib.Path], None]) -> pathlib.Path:
        """A copy of a disk that is damaged in some way."""
        _run(["cp", "--sparse=always", disk, dest])
        damage(dest)
        return dest

    def _once(self, make: t.Callable[[pathlib.Path], pathlib.Path], *key: t.Any) -> pathlib.Path:
        if key not in self._made:
            folder = self._folder / "-".join(re.sub(r"\W", "_", str(part)) for part in key)
            folder.mkdir()
            self._made[key] = make(folder)
        return self._made[key]


_SPEAKING_SECTOR = bytes.fromhex("31c0 8ed8 be1a7c fc ac 84c0 7409 b40e bb0700 cd10 ebf2 f4 ebfd 90")
"""Point DS:SI at the words; give each to the BIOS (interrupt 10h, function 0Eh) up to the zero; halt."""


def make_tiny_disk(path: pathlib.Path, words: str) -> pathlib.Path:
    """A disk whose boot sector says something and halts: the smallest guest that comes up. It takes no tools."""
    for tool in ("qemu-system-x86_64", "qemu-img"):
        if shutil.which(tool) is None:
            pytest.skip(f"booting needs the packages {TOOLS['qemu-system-x86_64']} and {TOOLS['qemu-img']}")
    sector = (_SPEAKING_SECTOR + words.encode() + b"\r\n\0").ljust(510, b"\0") + b"\x55\xaa"
    path.write_bytes(sector.ljust(MIB, b"\0"))
    return path


def zero(disk: pathlib.Path, offset: int, length: int) -> None:
    """Overwrite a part of a disk with zeros."""
    with disk.open("r+b") as file:
        file.seek(offset)
        file.write(bytes(length))


def zero_content(disk: pathlib.Path, content: bytes) -> None:
    """Overwrite a file on a disk, which FAT keeps in one piece, with zeros; its name and size stay."""
    offset = disk.read_bytes().find(content[:SECTOR])
    assert offset > 0
    zero(disk, offset, len(content))


__all__ = (
    "ALIVE",
    "BOOT_START",
    "DATA_SIZE",
    "DATA_START",
    "UP",
    "Forge",
    "Kernel",
    "find_agent",
    "find_kernel",
    "make_bios_disk",
    "make_initrd",
    "make_tiny_disk",
    "make_uefi_disk",
    "make_unified_kernel",
    "need_everything",
    "zero",
    "zero_content",
)
