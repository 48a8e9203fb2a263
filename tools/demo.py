# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Take a disk to an archive and back with the collection as users install it, and damage copies on the way.

Every step is an ad-hoc command of Ansible; what it reports is checked by other means. tools/demo starts this.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import typing as t

ROOT = pathlib.Path(__file__).resolve().parents[1]
MIB = 1 << 20
BLOCK = 4096
DISK_SIZE = 256 * MIB
EFI_SIZE = 540672  # what Proxmox VE gives an EFI disk
LEDGER_LINES = 40000
DAMAGED_LINE = b"020000 balance "
CONF = """\
name: demo
memory: 2048
cores: 2
bios: ovmf
efidisk0: local-lvm:vm-100-disk-0,efitype=4m,size=528K
scsi0: local-lvm:vm-100-disk-1,size=256M
#qmdump#map:efidisk0:drive-efidisk0:local-lvm:raw:
#qmdump#map:scsi0:drive-scsi0:local-lvm:raw:
"""


class DemoError(Exception):
    """A step failed on which the next ones build."""


def size_text(size: int) -> str:
    """A size as people read it."""
    for unit, name in ((1 << 30, "GiB"), (MIB, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} bytes"


def digest_of(path: pathlib.Path) -> str:
    """The SHA-256 of a file."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(MIB):
            sha256.update(chunk)
    return sha256.hexdigest()


class Screen:
    """Lines for people: a mark, a sentence, the time it took."""

    TEXT_WIDTH = 66

    def __init__(self) -> None:
        self._is_terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self._has_colours = self._is_terminal and not os.environ.get("NO_COLOR")
        self.passed = 0
        self.failed: list[str] = []

    def _paint(self, code: str, text: str) -> str:
        return f"\033[{code}m{text}\033[0m" if self._has_colours else text

    def title(self, text: str) -> None:
        """A heading."""
        print(f"\n{self._paint('1', text)}", flush=True)

    def note(self, text: str) -> None:
        """A line below the one before it."""
        print(f"        {self._paint('2', text)}", flush=True)

    def wait(self, text: str) -> None:
        """Say what is being done, on terminals, until the next line comes."""
        if self._is_terminal:
            print(f"\r\033[K  {self._paint('2', '....')}  {text}", end="", flush=True)

    def check(self, ok: bool, text: str, seconds: float | None = None) -> None:
        """The result of a step. The next steps go on either way."""
        mark = self._paint("32", "PASS") if ok else self._paint("31", "FAIL")
        took = "" if seconds is None else f"{seconds:6.1f} s"
        self.clear()
        print(f"  {mark}  {text:{self.TEXT_WIDTH}}{self._paint('2', took)}".rstrip(), flush=True)
        if ok:
            self.passed += 1
        else:
            self.failed.append(text)

    def clear(self) -> None:
        """Wipe what wait() left."""
        if self._is_terminal:
            print("\r\033[K", end="")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a module returned. C(seconds) are those of the whole command, the start of Ansible included."""

    ok: bool
    values: dict[str, t.Any]
    seconds: float

    def archive(self) -> dict[str, t.Any]:
        """The one archive that vma_info told of."""
        if len(self.values.get("archives", ())) != 1:
            raise DemoError(f"vma_info told of no archive: {self.values.get('msg')}")
        return t.cast("dict[str, t.Any]", self.values["archives"][0])

    def verification(self) -> dict[str, t.Any]:
        """What the verification of that archive found."""
        if "verification" not in self.archive():
            raise DemoError(f"vma_info verified nothing: {self.values.get('msg')}")
        return t.cast("dict[str, t.Any]", self.archive()["verification"])

    def first_problem(self) -> dict[str, t.Any]:
        """The first problem that a verification found."""
        problems = self.verification()["problems"]
        return t.cast("dict[str, t.Any]", problems[0]) if problems else {"kind": "none", "message": ""}

    def kinds(self) -> list[str]:
        """The kinds of problems that a verification found."""
        return [problem["kind"] for problem in self.verification()["problems"]]


class Ansible:
    """ansible-core in a folder of its own, which sees the collection's tarball and nothing of the checkout."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._venv = folder / "venv"
        self._collections = folder / "collections"
        config = folder / "ansible.cfg"
        config.touch()
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("ANSIBLE_", "PYTHON"))}
        self._env = {
            **kept,
            "LC_ALL": "C.UTF-8",
            "ANSIBLE_COLLECTIONS_PATH": str(self._collections),
            "ANSIBLE_CONFIG": str(config),
            "ANSIBLE_HOME": str(folder / "ansible"),
            "ANSIBLE_LOCALHOST_WARNING": "false",
            "ANSIBLE_NOCOLOR": "true",
            "ANSIBLE_REMOTE_TMP": str(folder / "ansible" / "remote"),
        }

    def _tool(self, name: str) -> str:
        return str(self._venv / "bin" / name)

    def run(self, *command: str | os.PathLike[str]) -> subprocess.CompletedProcess[str]:
        """Run a command to its end. If this process is told to stop, so is the command."""
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=self._env,
        ) as process:
            try:
                stdout, stderr = process.communicate()
            except BaseException:
                process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.communicate(timeout=10)
                process.kill()
                raise
        return subprocess.CompletedProcess(list(command), process.returncode, stdout, stderr)

    def must_run(self, *command: str | os.PathLike[str]) -> str:
        """Run a command that has to succeed and return what it printed."""
        done = self.run(*command)
        if done.returncode:
            words = " ".join(map(str, command))
            raise DemoError(f"{words}\nended with exit status {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout

    def set_up(self) -> str:
        """Make the environment and return the version of ansible-core."""
        self.must_run(sys.executable, "-m", "venv", self._venv)
        pip = [self._tool("python"), "-m", "pip", "--disable-pip-version-check"]
        self.must_run(*pip, "install", "--quiet", "ansible-core>=2.17")
        return self.must_run(
            self._tool("python"), "-c", "import ansible.release; print(ansible.release.__version__)"
        ).strip()

    def install_collection(self, folder: pathlib.Path) -> pathlib.Path:
        """Build the tarball from the checkout, install it, and return its path."""
        galaxy = [self._tool("ansible-galaxy"), "collection"]
        self.must_run(*galaxy, "build", ROOT, "--output-path", folder)
        (tarball,) = folder.glob("*.tar.gz")
        self.must_run(*galaxy, "install", tarball, "--collections-path", self._collections)
        return tarball

    def module(self, name: str, **options: t.Any) -> Outcome:
        """Call a module of the collection as one does by hand: ansible localhost -m vmbackup.vma.<name> -a ..."""
        began = time.monotonic()
        module = f"vmbackup.vma.{name}"
        done = self.run(self._tool("ansible"), "localhost", "-m", module, "-a", json.dumps(options, default=os.fspath))
        try:
            values = json.loads(done.stdout[done.stdout.index("=> {") + 3 :])
        except ValueError as error:
            raise DemoError(f"{module} returned no result:\n{done.stdout}{done.stderr}") from error
        return Outcome(done.returncode == 0, values, time.monotonic() - began)

    def must(self, name: str, **options: t.Any) -> Outcome:
        """Call a module that has to succeed."""
        outcome = self.module(name, **options)
        if not outcome.ok:
            raise DemoError(f"{name} failed: {outcome.values.get('msg')}")
        return outcome


class Demo:
    """The steps, in their order."""

    def __init__(self, folder: pathlib.Path, screen: Screen) -> None:
        self._folder = folder
        self._screen = screen
        self._ansible = Ansible(folder)
        self._disk = folder / "disk.raw"
        self._efi = folder / "efi.raw"
        self._ledger = folder / "files" / "ledger.txt"
        self._archive = folder / time.strftime("vzdump-qemu-100-%Y_%m_%d-%H_%M_%S.vma.zst")
        self._plain = folder / "plain.vma"
        self._damaged = folder / "damaged.vma"
        self._restored = folder / "restored"
        self._sources = {
            "devices": [
                {"name": "drive-scsi0", "path": self._disk},
                {"name": "drive-efidisk0", "path": self._efi},
            ],
            "configs": [{"name": "qemu-server.conf", "content": CONF}],
        }

    def run(self) -> None:
        """Run all steps."""
        self.set_up()
        self.make_disks()
        self.archive()
        self.damage_a_bit()
        self.damage_by_cutting()
        self.restore()

    def set_up(self) -> None:
        """Install Ansible and the collection."""
        screen = self._screen
        screen.title("Set up")
        began = time.monotonic()
        screen.wait("ansible-core from PyPI, in a venv")
        version = self._ansible.set_up()
        screen.check(True, f"ansible-core {version}, in a venv of its own", time.monotonic() - began)
        began = time.monotonic()
        screen.wait("the collection's tarball")
        tarball = self._ansible.install_collection(self._folder)
        text = f"{tarball.name} ({size_text(tarball.stat().st_size)}) built and installed"
        screen.check(True, text, time.monotonic() - began)

    def make_disks(self) -> None:
        """Make the disks of a guest: ext4 with files, and an EFI disk."""
        screen = self._screen
        screen.title("A guest's disks")
        began = time.monotonic()
        screen.wait("an ext4 file system")
        chance = random.Random(20)
        self._ledger.parent.mkdir()
        with self._ledger.open("w", encoding="ascii") as ledger:
            for line in range(LEDGER_LINES):
                ledger.write(f"{line:06d} balance {chance.randrange(100000):05d}\n")
        (self._ledger.parent / "photos.bin").write_bytes(chance.randbytes(40 * MIB))
        shutil.copytree(ROOT / "plugins", self._ledger.parent / "plugins")
        self._ansible.must_run(
            "mke2fs", "-q", "-t", "ext4", "-d", self._ledger.parent, self._disk, f"{DISK_SIZE // MIB}M"
        )
        text = (
            f"drive-scsi0, {size_text(DISK_SIZE)}: ext4, {size_text(self._used(self._disk))} of it used, the rest holes"
        )
        screen.check(self._disk.stat().st_size == DISK_SIZE, text, time.monotonic() - began)
        self._efi.write_bytes(chance.randbytes(100000).ljust(EFI_SIZE, b"\0"))
        screen.check(True, f"drive-efidisk0, {size_text(EFI_SIZE)}: an EFI disk, not a multiple of 64 KiB")

    @staticmethod
    def _used(path: pathlib.Path) -> int:
        return path.stat().st_blocks * 512

    def archive(self) -> None:
        """Make archives and prove them."""
        screen = self._screen
        screen.title("Archive and verify")
        screen.wait("vma_create")
        created = self._ansible.must("vma_create", dest=self._archive, **self._sources)
        written = self._archive.stat()
        text = f"vma_create: {size_text(DISK_SIZE + EFI_SIZE)} in an archive of {size_text(written.st_size)}"
        screen.check(created.values["changed"] and written.st_mode & 0o077 == 0, text, created.seconds)
        screen.note(self._archive.name)

        screen.wait("vma_info")
        verified = self._ansible.module("vma_info", path=[self._archive], verify="content")
        found = verified.verification()
        text = f"vma_info: all {found['clusters']} clusters are there, all {found['extents']} SHA-256 fit"
        ok = verified.ok and found["ok"] and verified.archive()["integrity"] == "sha256"
        screen.check(ok, text, verified.seconds)

        screen.wait("vma_create again")
        again = self._ansible.must("vma_create", dest=self._archive, **self._sources)
        now = self._archive.stat()
        same = (now.st_ino, now.st_mtime_ns) == (written.st_ino, written.st_mtime_ns)
        screen.check(
            not again.values["changed"] and same,
            "vma_create again: nothing to do, the file is as it was",
            again.seconds,
        )

        screen.wait("vma_create, not compressed")
        plain = self._ansible.must("vma_create", dest=self._plain, **self._sources)
        text = f"vma_create: the same without compression, {size_text(self._plain.stat().st_size)}"
        screen.check(plain.values["changed"], text, plain.seconds)

    def damage_a_bit(self) -> None:
        """Flip a bit in the ledger within the archive, find it, and save what it did not touch."""
        screen = self._screen
        screen.title("One flipped bit")
        content = bytearray(self._plain.read_bytes())
        at = content.index(DAMAGED_LINE) + len(DAMAGED_LINE)
        line = slice(at - len(DAMAGED_LINE), at + 5)
        before = content[line].decode()
        content[at] ^= 1
        self._damaged.write_bytes(content)
        screen.note(f"{before} -> {content[line].decode()}   ledger.txt, at byte {at} of the archive")

        screen.wait("vma_info")
        verified = self._ansible.module("vma_info", path=[self._damaged], verify="content")
        problem = verified.first_problem()
        offset = problem.get("offset", -1)
        end = content.find(b"VMAE", at)
        text = f"vma_info fails: {problem['kind']} in the extent at {offset}"
        found = (
            not verified.ok
            and verified.kinds() == ["extent_digest"]
            and offset == content.rfind(b"VMAE", 0, at) < at < end
        )
        screen.check(found, text, verified.seconds)
        whole = {device["name"]: device["whole"] for device in verified.verification()["devices"]}
        screen.check(
            whole == {"drive-scsi0": False, "drive-efidisk0": True},
            "  it names drive-scsi0 as damaged, and drive-efidisk0 as whole",
        )

        screen.wait("vma_extract")
        folder = self._folder / "refused"
        refused = self._ansible.module("vma_extract", src=self._damaged, dest=folder)
        left = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
        screen.check(not refused.ok and not left, "vma_extract refuses it, and leaves no file behind", refused.seconds)

        screen.wait("vma_extract, one device")
        folder = self._folder / "salvaged"
        saved = self._ansible.module(
            "vma_extract", src=self._damaged, dest=folder, devices=[{"name": "drive-efidisk0"}], configs=["none"]
        )
        target = folder / "disk-drive-efidisk0.raw"
        ok = saved.ok and target.exists() and digest_of(target) == digest_of(self._efi)
        screen.check(ok, "vma_extract saves drive-efidisk0 alone: SHA-256 as at the source", saved.seconds)
        self._damaged.unlink()

    def damage_by_cutting(self) -> None:
        """Cut copies short where it shows, and where it hardly does."""
        screen = self._screen
        screen.title("Copies that were cut short")
        cut = self._folder / "cut.vma.zst"
        content = self._archive.read_bytes()
        cut.write_bytes(content[: len(content) * 2 // 3])
        screen.wait("vma_info")
        verified = self._ansible.module("vma_info", path=[cut], verify="content")
        problem = verified.first_problem()
        text = f"a third of the .zst is missing: {problem['kind']} at {problem.get('offset')}"
        screen.check(not verified.ok and problem["kind"] == "decompression", text, verified.seconds)

        cut = self._folder / "cut.vma"
        content = self._plain.read_bytes()
        cut.write_bytes(content[: content.rindex(b"VMAE")])
        screen.wait("vma_info")
        verified = self._ansible.module("vma_info", path=[cut], verify="structure")
        text = "the last extent is missing, all others are sound: cluster_missing"
        screen.check(not verified.ok and set(verified.kinds()) == {"cluster_missing"}, text, verified.seconds)
        for problem in verified.verification()["problems"]:
            screen.note(problem["message"])

    def restore(self) -> None:
        """Restore, compare, and repair a restored disk."""
        screen = self._screen
        screen.title("Restore")
        disk = self._restored / "disk-drive-scsi0.raw"
        efi = self._restored / "disk-drive-efidisk0.raw"
        screen.wait("vma_extract")
        restored = self._ansible.must("vma_extract", src=self._archive, dest=self._restored)
        text = f"vma_extract: both disks and qemu-server.conf, {size_text(self._used(disk))} on disk"
        ok = restored.values["changed"] and (self._restored / "qemu-server.conf").read_text(encoding="utf-8") == CONF
        screen.check(ok, text, restored.seconds)
        for source, target in ((self._disk, disk), (self._efi, efi)):
            expected = digest_of(source)
            screen.check(digest_of(target) == expected, f"{target.name}: SHA-256 {expected[:16]}... as at the source")

        checked = self._ansible.run("e2fsck", "-fn", disk)
        screen.check(checked.returncode == 0, "e2fsck -fn: the restored file system is clean")
        ledger = self._folder / "ledger.txt"
        self._ansible.must_run("debugfs", "-R", f"dump /ledger.txt {ledger}", disk)
        text = f"debugfs: ledger.txt has all its {LEDGER_LINES} lines"
        screen.check(digest_of(ledger) == digest_of(self._ledger), text)

        screen.wait("vma_extract again")
        again = self._ansible.must("vma_extract", src=self._archive, dest=self._restored)
        screen.check(not again.values["changed"], "vma_extract again: nothing to do", again.seconds)

        with disk.open("r+b") as file:
            file.seek(DISK_SIZE // 2)
            file.write(b"something that was not there before")
        screen.wait("vma_extract, in place")
        repaired = self._ansible.must("vma_extract", src=self._archive, dest=self._restored, in_place=True)
        count = sum(device["written_bytes"] for device in repaired.values["devices"])
        ok = count == BLOCK and digest_of(disk) == digest_of(self._disk)
        text = f"vma_extract repairs a block that was overwritten: {count} bytes"
        screen.check(ok, text, repaired.seconds)


def stop(number: int, _frame: object) -> t.NoReturn:
    """End by a signal, so that what has to be removed is."""
    sys.exit(128 + number)


def remove(folder: pathlib.Path) -> None:
    """Remove the folder, though a process that was just stopped may still be making files in it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    for _attempt in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.2)
    print(f"Not removed: {folder}", file=sys.stderr)


def main() -> None:
    """Take a disk to an archive and back in a temporary folder, damage copies of the archive, and check each step."""
    argparse.ArgumentParser(prog="tools/demo", description=main.__doc__).parse_args()
    if sys.version_info < (3, 10):
        sys.exit("The demo runs ansible-core, which needs Python 3.10 or newer. (The modules themselves need 3.9.)")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    began = time.monotonic()
    screen = Screen()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="vma-demo-"))
    status = 1
    print("A guest's disks to a VMA archive and back. Each step is: ansible localhost -m vmbackup.vma.<module> -a ...")
    try:
        Demo(folder, screen).run()
        status = 1 if screen.failed else 0
    except DemoError as error:
        screen.check(False, "a step that the others need")
        print(error, file=sys.stderr)
    except KeyboardInterrupt:
        screen.clear()
        print("Interrupted.", file=sys.stderr)
        status = 130
    finally:
        remove(folder)
    if status != 130:
        screen.title(f"{screen.passed} passed, {len(screen.failed)} failed in {time.monotonic() - began:.0f} s")
        print("The temporary folder is removed.")
    sys.exit(status)


if __name__ == "__main__":
    main()
