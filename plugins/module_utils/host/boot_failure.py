# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""How a guest can fail to boot, as values: the kinds, their words, and what to do about each. No I/O."""

from __future__ import annotations

import dataclasses
import typing as t


class Kind(t.NamedTuple):
    """What happened, and what to do about it."""

    what: str
    remedy: str


KINDS: dict[str, Kind] = {
    "no_boot_device": Kind(
        "the firmware found nothing to boot from",
        "Check that the boot disk stands first, that the firmware is the VM's own (bios or uefi), and that all of "
        "its disks are there; if so, the disk's boot sector or EFI system partition is damaged: restore another "
        "archive.",
    ),
    "boot_loader": Kind(
        "the boot loader came, and could not start a system",
        "Its configuration, the kernel or the file system that holds them is missing or damaged: check that all "
        "disks of the VM are given, in their order, and restore another archive.",
    ),
    "kernel_panic": Kind(
        "the guest's kernel panicked",
        "The console says why. Check that all disks are given with the buses that the VM had; if so, the system on "
        "them is damaged: restore another archive.",
    ),
    "emergency_shell": Kind(
        "the guest came no further than an emergency shell",
        "The console says what it misses. Check that all disks are given with the buses that the VM had; if so, a "
        "file system on them is damaged: restore another archive.",
    ),
    "shutdown": Kind(
        "the guest shut itself down before there was a sign of life",
        "The console says why; a guest that is meant to shut down needs a pattern that comes before.",
    ),
    "timeout": Kind(
        "there was no sign of life in time",
        "Look at the console and at a screenshot. If the guest is only slow, raise the timeout. A guest that writes "
        "nothing on its serial port needs console=ttyS0 on its kernel's command line, or another sign of life.",
    ),
    "scratch_full": Kind(
        "what the guest writes found no room in scratch_dir",
        "This says nothing of the backup. Make room there, or choose another scratch_dir.",
    ),
    "qemu_failed": Kind(
        "QEMU itself failed",
        "This says nothing of the backup. Check the formats and options that were given, and QEMU on this host.",
    ),
}
"""Every kind of failure."""

_OF_THE_HOST = ("scratch_full", "qemu_failed")


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why a guest did not boot. C(evidence) is what the guest, or QEMU, said of it."""

    kind: str
    evidence: str = ""

    @property
    def message(self) -> str:
        """What happened."""
        what = KINDS[self.kind].what
        return f"{what}: {self.evidence}" if self.evidence else what

    @property
    def remedy(self) -> str:
        """What to do about it."""
        return KINDS[self.kind].remedy

    @property
    def is_of_the_host(self) -> bool:
        """Whether this says something of the host, and nothing of the guest."""
        return self.kind in _OF_THE_HOST

    def as_dict(self) -> dict[str, str]:
        """The failure as modules return it."""
        return {"kind": self.kind, "message": self.message, "remedy": self.remedy}

    def __str__(self) -> str:
        dot = "" if self.message.endswith((".", "!", "?")) else "."
        return f"{self.message}{dot} {self.remedy}"


__all__ = ("KINDS", "Failure", "Kind")
