# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A host with storage that the kernel of the machine may lack: an emulated guest with device-mapper, and with ZFS.

    python3 tests/machines/storage_guest.py up /var/tmp/storage      start one: 15 s, and 90 s to build it
    ansible all -i /var/tmp/storage/inventory.yml -m ping            use it as a managed host
    ssh -F /var/tmp/storage/ssh_config storage lsblk                 or by hand
    python3 tests/machines/storage_guest.py down /var/tmp/storage    stop it; nothing is left but the built image
    python3 tests/machines/storage_guest.py build                    build the image and start nothing

With C(--zfs) the image also has ZFS, whose modules are compiled for it, once: 5 minutes.

The guest has /dev/vda and /dev/vdb, empty, 4 GiB each; whatever is written goes with it. It has libvirt, which
C(virtlogd -d && libvirtd -d) starts. sshd listens on 127.0.0.1 at
a free port. The image is kept below C(VMBACKUP_TEST_CACHE), ~/.cache/vmbackup-vma-tests by default, under a digest of
what it is made from. Building needs root and the packages mmdebstrap and e2fsprogs; running needs qemu-system-x86 and
openssh-client, and no KVM.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import inspect
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import typing as t

HERE = pathlib.Path(__file__).resolve().parent
INIT = HERE / "storage_guest_init"
RELEASE = "bookworm"
PACKAGES = (
    "iproute2",
    "kmod",
    "libvirt-clients",
    "libvirt-daemon-driver-qemu",
    "libvirt-daemon-system",
    "lvm2",
    "openssh-server",
    "procps",
    "python3",
    "python3-pytest",
    "qemu-system-x86",
    "thin-provisioning-tools",
    "udev",
)
ZFS_PACKAGES = ("libzfs4linux", "libzpool5linux", "zfsutils-linux")
DISKS = 2
DISK_SIZE = "4G"
BOOT_TIMEOUT = 120
"""Seconds until sshd has to answer. It takes 10 on an idle machine."""

# The kernel is unpacked, not installed: what its package wants to do with boot loaders is not for this guest.
UNPACK_KERNEL = r"""
set -eu
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
cd "$1"
version=$(chroot . apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: \(linux-image-[0-9].*\)$/\1/p')
(cd tmp && chroot .. sh -c "cd /tmp && apt-get -q download $version")
dpkg-deb --extract tmp/linux-image-*.deb tmp/kernel
cp -r tmp/kernel/boot/vmlinuz-* boot
cp -r tmp/kernel/lib/modules usr/lib
rm -r tmp/linux-image-*.deb tmp/kernel
chroot . depmod "${version#linux-image-}"
"""

COMPILE_ZFS = r"""
set -eu
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
cd "$1"
version=$(ls lib/modules)
chroot . apt-get -q -y --no-install-recommends install "linux-headers-$version" zfs-dkms
zfs=$(ls usr/src | sed -n 's/^zfs-//p')
chroot . dkms status zfs | grep -q "$version.*installed" || chroot . dkms install "zfs/$zfs" -k "$version"
cp -r lib/modules/"$version"/updates "$1"/root/zfs-modules
"""


class MachineError(Exception):
    """The guest cannot be built or started."""


class Guest(t.NamedTuple):
    """A guest that runs: where its files are, and its process."""

    folder: pathlib.Path
    pid: int

    def command(self, *words: str) -> list[str]:
        """A command line that runs a command in the guest."""
        return ["ssh", "-F", str(self.folder / "ssh_config"), "storage", *words]

    def run(self, *words: str, stdin: bytes | None = None, check: bool = True) -> subprocess.CompletedProcess[bytes]:
        """Run a command in the guest; what it says is captured."""
        done = subprocess.run(self.command(*words), check=False, input=stdin, capture_output=True)
        if check and done.returncode:
            raise MachineError(f"{' '.join(words)} failed in the guest:\n{done.stderr.decode(errors='replace')}")
        return done


def _cache() -> pathlib.Path:
    default = pathlib.Path.home() / ".cache/vmbackup-vma-tests"
    return pathlib.Path(os.environ.get("VMBACKUP_TEST_CACHE", default))


def missing_tools() -> list[str]:
    """What the machine lacks to build and run the guest, in words; nothing where all is there."""
    tools = {
        "mmdebstrap": "mmdebstrap",
        "mke2fs": "e2fsprogs",
        "qemu-system-x86_64": "qemu-system-x86",
        "qemu-img": "qemu-utils",
        "ssh": "openssh-client",
        "ssh-keygen": "openssh-client",
    }
    path = f"{os.environ['PATH']}{os.pathsep}/usr/sbin{os.pathsep}/sbin"
    lacking = [f"{tool} of {package}" for tool, package in tools.items() if shutil.which(tool, path=path) is None]
    if os.geteuid() != 0:
        lacking.append("root")
    return lacking


def build(*, zfs: bool = False) -> pathlib.Path:
    """The folder with C(kernel), C(root.img) and the key C(id): built where it is not there. Raises: MachineError."""
    recipe = [RELEASE, *PACKAGES, *(ZFS_PACKAGES if zfs else ()), UNPACK_KERNEL, INIT.read_text(encoding="utf-8")]
    recipe += [inspect.getsource(function) for function in (_build, _bootstrap)]
    digest = hashlib.sha256("\0".join(recipe).encode()).hexdigest()[:16]
    cache = _cache()
    image = cache / f"storage-guest-{digest}"
    if image.exists():
        return image
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "storage-guest.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not image.exists():
            lacking = missing_tools()
            if lacking:
                raise MachineError(f"the storage guest cannot be built without {', '.join(lacking)}")
            with tempfile.TemporaryDirectory(prefix=".storage-guest-", dir=cache) as scratch:
                _build(pathlib.Path(scratch), _zfs_modules(cache) if zfs else None)
                os.rename(scratch, image)
                # tempfile wants something to remove
                os.mkdir(scratch)
    return image


def _build(folder: pathlib.Path, zfs_modules: pathlib.Path | None) -> None:
    root = folder / "root"
    _bootstrap(root, [*PACKAGES, *(ZFS_PACKAGES if zfs_modules else ())])
    (kernel,) = root.glob("boot/vmlinuz-*")
    version = kernel.name.partition("-")[2]
    shutil.move(str(kernel), folder / "kernel")
    if zfs_modules is not None:
        if not (zfs_modules / version).is_dir():
            raise MachineError(f"the ZFS modules in {zfs_modules} are not for the kernel {version}: remove the folder")
        shutil.copytree(zfs_modules / version, root / "lib/modules" / version / "updates")
        _run("depmod", "--basedir", str(root), version)
    # libvirtd asks each QEMU what it can, and one is enough.
    (root / "usr/bin/qemu-system-i386").unlink()
    _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "storage-guest", "-f", str(folder / "id"))
    keys = root / "root/.ssh"
    keys.mkdir(mode=0o700, exist_ok=True)
    shutil.copy(folder / "id.pub", keys / "authorized_keys")
    shutil.copy(INIT, root / "sbin/storage-guest-init")
    (root / "sbin/storage-guest-init").chmod(0o755)
    (root / "etc/hosts").write_text("127.0.0.1 localhost storage\n", encoding="utf-8")
    _run("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", str(root), str(folder / "root.img"), "3G")
    shutil.rmtree(root)


def _bootstrap(root: pathlib.Path, packages: t.Iterable[str], *hooks: str) -> None:
    """Make a Debian root folder with the packages and the kernel."""
    # It mounts the machine's own /dev/shm and more below the root: if it is killed, that must go with it.
    command = ["unshare", "--mount", "--propagation=private"]
    command += ["mmdebstrap", "--mode=root", "--variant=minbase", "--components=main,contrib", "--quiet"]
    command += [f"--include={','.join(packages)}"]
    # A root folder that a crash cuts short is thrown away: there is nothing to bring to disk.
    command += ["--dpkgopt=force-unsafe-io"]
    command += [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("doc", "info", "locale", "man")]
    # A hook is a file of its own, or else a line for the shell.
    with contextlib.ExitStack() as stack:
        for text in (UNPACK_KERNEL, *hooks):
            hook = stack.enter_context(tempfile.NamedTemporaryFile("w", suffix=".sh", dir=root.parent))
            hook.write(text)
            hook.flush()
            command.append(f'--customize-hook=sh {hook.name} "$1"')
        _run(*command, RELEASE, str(root))


def _zfs_modules(cache: pathlib.Path) -> pathlib.Path:
    """The folder that has the modules of ZFS by kernel version: compiled where it is not there."""
    modules = cache / "zfs-modules"
    if not modules.exists():
        with tempfile.TemporaryDirectory(prefix=".zfs-modules-", dir=cache) as scratch:
            root = pathlib.Path(scratch, "root")
            _bootstrap(root, ["kmod"], COMPILE_ZFS)
            (version,) = (path.name for path in (root / "lib/modules").iterdir())
            result = pathlib.Path(scratch, "result")
            result.mkdir()
            shutil.move(str(root / "root/zfs-modules"), result / version)
            os.rename(result, modules)
    return modules


def _run(*command: str) -> None:
    path = f"{os.environ['PATH']}{os.pathsep}/usr/sbin{os.pathsep}/sbin"
    done = subprocess.run(
        command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "PATH": path}
    )
    if done.returncode:
        said = done.stdout.decode(errors="replace").strip().splitlines()[-20:]
        raise MachineError("\n".join([f"{' '.join(command)} ended with {done.returncode}:", *said]))


def start(folder: pathlib.Path, *, zfs: bool = False, outlive: bool = False) -> Guest:
    """Start a guest whose files are in the new folder, and wait for its sshd.

    It ends with this process unless it is to C(outlive) it. Raises: MachineError.
    """
    image = build(zfs=zfs)
    folder = folder.resolve()
    folder.mkdir(parents=True)
    port = _free_port()
    command = ["qemu-system-x86_64", "-accel", "tcg,thread=multi", "-smp", "2", "-m", "1024"]
    command += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", f"file:{folder}/console"]
    command += ["-kernel", str(image / "kernel")]
    arguments = "console=ttyS0 quiet panic=-1 net.ifnames=0 mitigations=off"
    command += ["-append", f"{arguments} root=/dev/nvme0n1 rw init=/sbin/storage-guest-init"]
    # What the guest writes to its root goes to a file that has no name.
    command += ["-drive", f"file={image}/root.img,format=raw,if=none,id=root,snapshot=on"]
    command += ["-device", "nvme,drive=root,serial=root"]
    for number in range(DISKS):
        disk = folder / f"disk{number}.qcow2"
        _run("qemu-img", "create", "-q", "-f", "qcow2", str(disk), DISK_SIZE)
        command += ["-drive", f"file={disk},if=virtio,cache=unsafe,discard=unmap"]
    command += ["-netdev", f"user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{port}-:22"]
    command += ["-device", "virtio-net-pci,netdev=net", "-device", "virtio-rng-pci"]
    if not outlive:
        command = ["setpriv", "--pdeathsig", "KILL", *command]
    _write_access(folder, image, port)
    with (folder / "qemu.log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=outlive)
    (folder / "qemu.pid").write_text(f"{process.pid}\n", encoding="ascii")
    guest = Guest(folder, process.pid)
    try:
        _wait_for_ssh(guest, process)
    except BaseException:
        process.kill()
        process.wait()
        raise
    return guest


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _write_access(folder: pathlib.Path, image: pathlib.Path, port: int) -> None:
    key = folder / "id"
    shutil.copy(image / "id", key)
    key.chmod(0o600)
    (folder / "ssh_config").write_text(
        f"""\
Host storage
  HostName 127.0.0.1
  Port {port}
  User root
  IdentityFile {key}
  IdentitiesOnly yes
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
  ConnectTimeout 10
  GSSAPIAuthentication no
""",
        encoding="utf-8",
    )
    host = {
        "ansible_host": "127.0.0.1",
        "ansible_port": port,
        "ansible_user": "root",
        "ansible_ssh_private_key_file": str(key),
        "ansible_ssh_common_args": "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o IdentitiesOnly=yes",
        "ansible_python_interpreter": "/usr/bin/python3",
    }
    inventory = {"all": {"hosts": {"storage": host}}}
    # JSON is YAML as well
    (folder / "inventory.yml").write_text(json.dumps(inventory, indent=2) + "\n", encoding="utf-8")


def _wait_for_ssh(guest: Guest, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + BOOT_TIMEOUT
    while guest.run("true", check=False).returncode:
        if process.poll() is not None or time.monotonic() > deadline:
            said = [(guest.folder / name).read_text(errors="replace") for name in ("qemu.log", "console")]
            raise MachineError("the storage guest did not come up:\n" + "\n".join(said)[-2000:])
        time.sleep(0.5)


def stop(folder: pathlib.Path) -> None:
    """Stop the guest whose files are in C(folder), and remove them. Nothing happens where there is none."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError):
        pid = int((folder / "qemu.pid").read_text(encoding="ascii"))
        # Process numbers come again.
        while str(folder.resolve()).encode() in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
            time.sleep(0.05)
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def running(folder: pathlib.Path, *, zfs: bool = False) -> t.Iterator[Guest]:
    """A guest for as long as the context lasts. Raises: MachineError."""
    try:
        yield start(folder, zfs=zfs)
    finally:
        stop(folder)


def main() -> None:
    """Build, start or stop a guest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["build", "up", "down"])
    parser.add_argument("folder", nargs="?", type=pathlib.Path, help="a new folder for the guest's files")
    parser.add_argument("--zfs", action="store_true", help="with ZFS")
    options = parser.parse_args()
    if options.action != "build" and options.folder is None:
        parser.error("name a folder")
    began = time.monotonic()
    try:
        if options.action == "build":
            print(f"{build(zfs=options.zfs)} is there after {time.monotonic() - began:.0f} s")
        elif options.action == "up":
            start(options.folder, zfs=options.zfs, outlive=True)
            print(f"up after {time.monotonic() - began:.0f} s: ssh -F {options.folder}/ssh_config storage")
        else:
            stop(options.folder)
    except MachineError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
