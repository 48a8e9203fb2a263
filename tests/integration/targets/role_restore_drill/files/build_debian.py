# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Make a disk with a Debian, its kernel and its systemd, and a copy whose root file system is broken.

The disk is kept below C(VMBACKUP_TEST_CACHE), ~/.cache/vmbackup-vma-tests by default, under a digest of what it is made
from. To build it takes root, a minute, and the mirror that apt uses on this machine.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import pathlib
import sys
import tempfile

import disks

TOOLS = {**disks.TOOLS, "mmdebstrap": "mmdebstrap", "unshare": "util-linux"}
RELEASE = "bookworm"
PACKAGES = ("initramfs-tools", "linux-image-cloud-amd64", "systemd-sysv", "udev")
SIZE = 256 * disks.MIB
# What the system needs to come up is in its initrd.
HOOK = r"""
set -eu
mv "$1"/boot/vmlinuz-* "$1"/../vmlinuz
mv "$1"/boot/initrd.img-* "$1"/../initrd.img
rm -r "$1"/usr/lib/modules/*
echo drill >"$1"/etc/hostname
echo '/dev/vda2 / ext4 defaults 0 1' >"$1"/etc/fstab
"""


def build(folder: pathlib.Path) -> None:
    """Make the disk in a folder."""
    hook = folder / "hook.sh"
    hook.write_text(HOOK)
    # It mounts the machine's own /dev/shm and more below the root: if it is killed, that must go with it.
    command = ["unshare", "--mount", "--propagation=private"]
    command += ["mmdebstrap", "--mode=root", "--variant=minbase", "--quiet", f"--include={','.join(PACKAGES)}"]
    command += ["--dpkgopt=force-unsafe-io", f'--customize-hook=sh {hook} "$1"']
    command += [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("doc", "info", "locale", "man")]
    disks.run(*command, RELEASE, folder / "root")
    data = disks.make_ext4(folder / "data.img", folder / "root", SIZE)
    kernel, initrd = folder / "vmlinuz", folder / "initrd.img"
    disks.make_bios_disk(folder / "debian.raw", kernel, initrd, data, "root=/dev/vda2 ro")


def find_or_build() -> pathlib.Path:
    """The disk, which is built where it is not there."""
    default = pathlib.Path.home() / ".cache/vmbackup-vma-tests"
    cache = pathlib.Path(os.environ.get("VMBACKUP_TEST_CACHE", default))
    recipe = b"".join(pathlib.Path(file).read_bytes() for file in (__file__, disks.__file__))
    disk = cache / f"debian-{hashlib.sha256(recipe).hexdigest()[:16]}.raw"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "debian.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not disk.exists():
            with tempfile.TemporaryDirectory(prefix=".debian-", dir=cache) as scratch:
                build(pathlib.Path(scratch))
                os.rename(pathlib.Path(scratch, "debian.raw"), disk)
    return disk


def main() -> None:
    """Put the disks into the folder that is given, or say what is missing."""
    missing = disks.missing_packages(TOOLS, (disks.MBR, "syslinux-common"))
    if missing or os.geteuid() != 0:
        print("missing:", *(missing or ["root"]))
        return
    disk = pathlib.Path(sys.argv[1], "debian.raw")
    disks.run("cp", "--sparse=always", find_or_build(), disk)
    disks.make_broken(disk, "debian_no_root", disks.DATA, disks.MIB)
    print(f"made of {RELEASE}")


if __name__ == "__main__":
    main()
