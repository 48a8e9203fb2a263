# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Make disks that boot within seconds, for a BIOS and for UEFI, and copies of them that are broken; without root.

Their system is a kernel of this host and a busybox in memory. Beside it lies an ext4 with two files.
"""

from __future__ import annotations

import gzip
import os
import pathlib
import re
import shutil
import sys
import typing as t
import uuid

import disks
import efi_variables

MIB = disks.MIB
TOOLS = {
    **disks.TOOLS,
    "busybox": "busybox-static",
    "cpio": "cpio",
    "modprobe": "kmod",
    "objcopy": "binutils",
    "qemu-ga": "qemu-guest-agent",
}
STUB = "/usr/lib/systemd/boot/efi/linuxx64.efi.stub"
EFI_VARIABLES = "/usr/share/OVMF/OVMF_VARS_4M.fd"
EFI_PROGRAM = "EFI/drill/linux.efi"
"""Not where firmware looks by itself, as with an installed system: without its EFI variables it does not boot."""

LOGIN = """#!/bin/busybox sh
/bin/busybox mount -t devtmpfs none /dev
while :; do /bin/busybox echo "drill login: "; /bin/busybox sleep 1; done
"""
SERVICES = """#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc none /proc
mount -t sysfs none /sys
mount -t devtmpfs none /dev
for module in $(cat /modules/order); do insmod /modules/$module; done
case $(cat /proc/cmdline) in
  *drill.agent*)
    until port=$(ls /dev/vport*p1); do sleep 0.2; done 2>/dev/null
    mkdir -p /run /var/run
    exec qemu-ga --method virtio-serial --path "$port" --statedir /run --pidfile /run/qga.pid
    ;;
  *drill.port*)
    ip link set lo up
    until ip link set eth0 up; do sleep 0.2; done 2>/dev/null
    udhcpc -q -i eth0 -s /bin/lease
    exec httpd -f -p 8080 -h /modules
    ;;
esac
"""
"""No login here: who waits for one, and not for what the VM was to be asked, waits in vain."""
LEASE = """#!/bin/sh
[ "$1" != bound ] || ip address add "$ip/$mask" dev "$interface"
"""
MODULES = ("virtio_pci", "virtio_console", "virtio_net")


def find_kernel() -> pathlib.Path | None:
    """A kernel that can be read and has its modules; one for clouds, which starts fastest, goes first."""
    found = [
        path
        for path in pathlib.Path("/boot").glob("vmlinuz-*")
        if os.access(path, os.R_OK) and pathlib.Path("/lib/modules", version_of(path), "modules.dep").exists()
    ]
    return max(found, key=lambda path: ("cloud" in path.name, path.name)) if found else None


def version_of(kernel: pathlib.Path) -> str:
    """The version, from the file's name."""
    return kernel.name.partition("-")[2]


def make_initrd(path: pathlib.Path, init: str, *, kernel: pathlib.Path | None = None) -> pathlib.Path:
    """The system in memory: busybox, what it runs, and for a kernel its modules, the guest agent and its libraries."""
    root = path.with_suffix("")
    for name in ("bin", "dev", "proc", "sys", "modules"):
        (root / name).mkdir(parents=True)
    shutil.copy(t.cast(str, shutil.which("busybox")), root / "bin/busybox")
    write_program(root / "init", init)
    if kernel is not None:
        write_program(root / "bin/lease", LEASE)
        add_modules(root / "modules", version_of(kernel))
        add_program(root, t.cast(str, shutil.which("qemu-ga")))
    names = "\n".join(str(entry.relative_to(root)) for entry in [root, *sorted(root.rglob("*"))])
    packed = disks.run("cpio", "--create", "--format=newc", "--quiet", cwd=root, input=names.encode())
    path.write_bytes(gzip.compress(packed, 1))
    return path


def write_program(path: pathlib.Path, text: str) -> None:
    """A script that can be run."""
    path.write_text(text)
    path.chmod(0o755)


def add_modules(folder: pathlib.Path, version: str) -> None:
    """The modules with those that they need, and their order."""
    files: dict[str, None] = {}
    for module in MODULES:
        needed = disks.run("modprobe", "--set-version", version, "--show-depends", module).decode()
        files.update(dict.fromkeys(re.findall(r"^insmod (\S+)", needed, re.MULTILINE)))
    for file in files:
        shutil.copy(file, folder)
    (folder / "order").write_text("\n".join(map(os.path.basename, files)))


def add_program(root: pathlib.Path, program: str) -> None:
    """A program of this host, with its libraries."""
    shutil.copy(program, root / "bin")
    for library in re.findall(r"(/\S+) \(0x", disks.run("ldd", program).decode()):
        place = root / library[1:]
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, place)


def make_data(folder: pathlib.Path) -> pathlib.Path:
    """The file system with two files."""
    (folder / "tree/etc").mkdir(parents=True)
    (folder / "tree/etc/hostname").write_text("drill\n")
    (folder / "tree/data").write_text("intact\n")
    return disks.make_ext4(folder / "data.img", folder / "tree", 8 * MIB)


def make_unified_kernel(path: pathlib.Path, kernel: pathlib.Path, initrd: pathlib.Path) -> pathlib.Path:
    """A program for UEFI that holds a kernel, its command line and its system."""
    command_line, release = path.with_suffix(".cmdline"), path.with_suffix(".osrel")
    command_line.write_text(f"{disks.COMMAND_LINE} quiet")
    release.write_text("ID=drill\n")
    headers = disks.run("objdump", "-h", STUB).decode()
    sections = re.findall(r"^\s+\d+ \S+\s+([0-9a-f]+)\s+([0-9a-f]+)", headers, re.MULTILINE)
    address = max(int(size, 16) + int(start, 16) for size, start in sections)
    options: list[str] = []
    # The kernel comes last: it is unpacked in place and needs more room than its file.
    parts = ((".osrel", release), (".cmdline", command_line), (".initrd", initrd), (".linux", kernel))
    for name, part in parts:
        address = -(-address // 4096) * 4096
        options += ["--add-section", f"{name}={part}", "--change-section-vma", f"{name}={address:#x}"]
        address += part.stat().st_size
    disks.run("objcopy", *options, STUB, path)
    return path


def make_all(folder: pathlib.Path, kernel: pathlib.Path) -> None:
    """The disks."""
    data = make_data(folder)
    login = make_initrd(folder / "login.initrd", LOGIN)
    good = disks.make_bios_disk(folder / "good.raw", kernel, login, data, "quiet panic=0")
    disks.make_broken(good, "no_mbr", 0, disks.SECTOR)
    disks.make_broken_file(good, "no_kernel", kernel)
    disks.make_broken_file(good, "no_system", login)
    disks.make_broken(good, "no_files", disks.DATA + 2048, 62 << 10)

    services = make_initrd(folder / "services.initrd", SERVICES, kernel=kernel)
    for name in ("agent", "port"):
        disks.make_bios_disk(folder / f"{name}.raw", kernel, services, data, f"quiet drill.{name}")

    program, identity = make_unified_kernel(folder / "linux.efi", kernel, login), uuid.uuid4()
    uefi = disks.make_uefi_disk(folder / "uefi.raw", program, EFI_PROGRAM, data, str(identity))
    disks.make_broken_file(uefi, "no_program", program)
    place = disks.BOOT // disks.SECTOR, disks.BOOT_SIZE // disks.SECTOR
    empty = pathlib.Path(EFI_VARIABLES).read_bytes()
    variables = efi_variables.with_boot_entry(empty, identity, *place, "\\" + EFI_PROGRAM.replace("/", "\\"))
    (folder / "efi_variables.raw").write_bytes(variables)


def main() -> None:
    """Make the disks in the folder that is given, or say what is missing."""
    files = ((disks.MBR, "syslinux-common"), ((STUB,), "systemd-boot-efi"), ((EFI_VARIABLES,), "ovmf"))
    missing = disks.missing_packages(TOOLS, *files)
    kernel = find_kernel()
    if kernel is None or missing:
        print("missing:", *missing, *(["linux-image-cloud-amd64"] if kernel is None else []))
        return
    make_all(pathlib.Path(sys.argv[1]), kernel)
    print(f"made of {kernel}")


if __name__ == "__main__":
    main()
