# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The serial console of a guest as text: without control sequences, searched as it comes, kept in bounded memory.

What the firmware, boot loaders and kernels say when they give up is known here. Where the bytes come from is not.
"""

from __future__ import annotations

import codecs
import re

from .boot_failure import Failure

_LIMIT = 1 << 20
"""Characters that are kept."""
_OVERLAP = 4096
"""Characters before the newest ones that are searched again: what a pattern that is cut in two may span."""

_MOVE = re.compile(r"\x1b\[[0-9;]*[Hf]")
_CONTROL = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[()#][0-9A-Za-z]|[ -/]*[0-Z\\-~])")
_UNFINISHED = re.compile(r"\x1b(?:\[[0-?]*[ -/]*|\][^\x07\x1b]{0,256}\x1b?|[()#])?\Z")
_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")

# A firmware tries one device after the other: only what it says after the last one is a failure. So too a loader's
# complaint alone is none; that it waits for somebody to type is.
_FAILURES = re.compile(
    r"(?P<no_boot_device>"
    r"No bootable device\b"
    r"|No bootable option or device was found"
    r"|UEFI Interactive Shell v"
    r"|^Shell> "
    r")|(?P<boot_loader>"
    r"^grub rescue>|^grub> "
    r"|Minimal BASH-like line editing is supported"
    r"|you need to load the kernel first"
    r"|Booting kernel failed"
    r"|Invalid or corrupt kernel image"
    r"|Could not find kernel image"
    r"|No DEFAULT or UI configuration directive found"
    r"|Failed to load ldlinux\.c32"
    r"|Missing operating system"
    r"|Operating system not found"
    r"|Error loading operating system"
    r"|Invalid partition table"
    r"|BOOTMGR is (?:missing|compressed)"
    r"|NTLDR is missing"
    r")|(?P<kernel_panic>"
    r"Kernel panic - not syncing"
    r"|System halted\.?$"
    r")|(?P<emergency_shell>"
    r"You are in (?:emergency|rescue) mode"
    r"|Give root password for (?:maintenance|system maintenance|login)"
    r"|Entering emergency mode"
    r"|Dropping to a shell!"
    r"|^\(initramfs\)"
    r")",
    re.MULTILINE,
)

_REFUSED = re.compile(r"^BdsDxe: failed to .*$", re.MULTILINE)
"""What OVMF says of each device that it cannot boot from: more than that it then starts its shell."""


class Console:
    """What a guest has written so far. C(failed_at) is where in the text it first said that it gave up."""

    def __init__(self) -> None:
        self.text = ""
        self.failed_at: int | None = None
        self._kind = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._searched = 0

    def feed(self, data: bytes) -> None:
        """Take what has come."""
        text = self._held + self._decoder.decode(data)
        unfinished = _UNFINISHED.search(text)
        self._held = "" if unfinished is None else unfinished[0]
        text = text[: len(text) - len(self._held)]
        text = _UNSEEN.sub("", _CONTROL.sub("", _MOVE.sub("\n", text)))
        self._searched = len(self.text)
        self.text += text
        if self.failed_at is None:
            found = self.search(_FAILURES)
            if found is not None:
                self.failed_at, self._kind = found.start(), str(found.lastgroup)
        self._trim()

    def _trim(self) -> None:
        excess = len(self.text) - _LIMIT
        if excess > 0:
            self.text = self.text[excess:]
            self._searched = max(0, self._searched - excess)
            if self.failed_at is not None:
                self.failed_at = max(0, self.failed_at - excess)

    def search(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        """Where the pattern matches what came last, or what came last and what was shortly before it."""
        return pattern.search(self.text, max(0, self._searched - _OVERLAP))

    def failure(self) -> Failure | None:
        """That the guest gave up, if it did, with the line that says so."""
        if self.failed_at is None:
            return None
        refused = list(_REFUSED.finditer(self.text, 0, self.failed_at)) if self._kind == "no_boot_device" else []
        return Failure(self._kind, refused[-1][0].strip() if refused else self._line_at(self.failed_at))

    def _line_at(self, position: int) -> str:
        end = self.text.find("\n", position)
        return self.text[self.text.rfind("\n", 0, position) + 1 : end if end >= 0 else None].strip()

    def tail(self, lines: int) -> str:
        """The last lines, without empty ones."""
        kept = [line.rstrip() for line in self.text.split("\n") if line.strip()]
        return "\n".join(kept[-lines:]) if lines > 0 else ""


__all__ = ("Console",)
