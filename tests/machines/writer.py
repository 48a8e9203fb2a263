# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A process that stands for a guest: it numbers its writes to disks, and check_instant.py judges copies of them."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import time
import typing as t

from ansible_collections.vmbackup.vma.extensions.molecule.tools import check_instant

ROOT = pathlib.Path(__file__).resolve().parents[2]
SOURCE = ROOT / "extensions/molecule/guest/writer.c"
SHIPPED = ROOT / "writer"
"""The program where no compiler is: in the storage guest."""
DISK_SIZE = 64 << 20
_POLL = 0.02


def compile_writer(folder: pathlib.Path) -> pathlib.Path:
    """The program, for any Linux of this processor: compiled into the folder, unless it is there already."""
    if SHIPPED.exists():
        return SHIPPED
    program = folder / "writer"
    if not program.exists():
        subprocess.run(["cc", "-O2", "-static", "-o", str(program), str(SOURCE)], check=True)
    return program


class Writer:
    """Writes for as long as the context lasts. Each disk has DISK_SIZE bytes or more."""

    def __init__(self, program: pathlib.Path, disks: t.Sequence[str | pathlib.Path]) -> None:
        self._command = [str(program), "0", "0", *map(str, disks)]
        self._disks = [pathlib.Path(disk) for disk in disks]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Writer:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        self.wait_for_writes(3 * check_instant.PLACES * len(self._disks))
        return self

    def __exit__(self, *_failure: object) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def last_write(self) -> int:
        """The number of a write that was done just now, or a little before."""
        disk = os.open(self._disks[0], os.O_RDONLY)
        try:
            os.posix_fadvise(disk, 0, 4096, os.POSIX_FADV_DONTNEED)
            return int.from_bytes(os.pread(disk, 8, 0), "little")
        finally:
            os.close(disk)

    def wait_for_writes(self, count: int) -> None:
        """Wait until so many writes have been done."""
        assert self._process is not None
        while self.last_write() < count:
            if self._process.poll() is not None:
                raise RuntimeError(f"the writer ended with {self._process.returncode}")
            time.sleep(_POLL)

    def pause(self) -> None:
        """Let it stand still. The write that is under way is done when this returns."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        stat = pathlib.Path(f"/proc/{self._process.pid}/stat")
        while stat.read_text(encoding="ascii").rpartition(")")[2].split()[0] != "T":
            time.sleep(_POLL)

    def resume(self) -> None:
        """Let it go on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)
