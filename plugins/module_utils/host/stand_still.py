# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The guest stands still for a moment: its file systems quiesced by its agent, and the whole of it paused where needed.

Whatever happens meanwhile, the guest goes on: here at the end of the context, or by the journal.
"""

from __future__ import annotations

import contextlib
import typing as t

from ..vma.errors import ToolError, VmaError
from . import virsh
from .errors import SnapshotError
from .journal import Fields, Journal, Step
from .provider import APPLICATION, CRASH, OFFLINE, StepKind

QUIESCE = ("auto", "always", "never")


class Guest:
    """A guest, which libvirt knows or does not know."""

    def __init__(self, name: str, domain: str | None, quiesce: str, journal: Journal) -> None:
        """C(domain) is its UUID, None where libvirt knows no domain of this name. Raises: ToolError."""
        self._name = name
        self._domain = domain or ""
        self._state = virsh.get_state(domain) if domain else None
        self._quiesce = quiesce
        self._journal = journal

    def watch(self) -> None:
        """Let the guest go on at the end where a write failed meanwhile, as the snapshot took the storage's last room.

        The libvirt provider's own steps do that. To be called before the storage is touched, so as to be undone after.
        """
        if self._state is not None and self._state.has_process and not self._state.is_starved:
            self._journal.add("guest", domain=self._domain)

    @contextlib.contextmanager
    def quiesced(self) -> t.Iterator[str]:
        """The agent keeps the guest's file systems frozen, as far as asked for; the value is the consistency.

        Raises: SnapshotError where that is a must and cannot be had.
        """
        if self._state is not None and not self._state.has_process:
            yield OFFLINE
            self._check_still_off()
            return
        if self._state is None or self._quiesce == "never" or self._state.name != "running":
            if self._quiesce == "always":
                raise SnapshotError(
                    f"the file systems of {self._name} cannot be quiesced: libvirt does not run a guest of this name",
                    remedy="Start it, or set quiesce to auto.",
                )
            yield CRASH
            return
        step = self._journal.add("frozen", domain=self._domain)
        consistency = self._freeze(step)
        try:
            yield consistency
        finally:
            if consistency == APPLICATION:
                virsh.thaw(self._domain)
                self._journal.remove(step)

    def _freeze(self, step: Step) -> str:
        try:
            virsh.freeze(self._domain)
        except ToolError as error:
            # The agent may have frozen some of the file systems, or may yet do so. Where it does not thaw them now, the
            # step stays, and is undone with the snapshot.
            with contextlib.suppress(VmaError):
                if not virsh.is_without_agent(error, unasked=True):
                    _thaw(step.fields)
                self._journal.remove(step)
            if self._quiesce == "always":
                raise SnapshotError(
                    f"the file systems of {self._name} could not be quiesced: {error.message}",
                    remedy="Install and start qemu-guest-agent in the guest, or set quiesce to auto.",
                ) from error
            return CRASH
        return APPLICATION

    @contextlib.contextmanager
    def standing_still(self, *, must: bool) -> t.Iterator[str]:
        """As quiesced(), and the guest is paused if that is a C(must). Raises: SnapshotError."""
        if must and self._state is None:
            raise SnapshotError(
                f"the disks of {self._name} lie on several volumes, which cannot be frozen at one instant: libvirt"
                " knows no domain of this name that could be paused for it",
                remedy="Give the name of the libvirt domain, shut the VM off, or back up one volume at a time.",
            )
        with self.quiesced() as consistency:
            if not must or self._state is None or self._state.name != "running":
                yield consistency
                return
            step = self._journal.add("paused", domain=self._domain)
            virsh.suspend(self._domain)
            try:
                yield consistency
            finally:
                virsh.resume(self._domain)
                self._journal.remove(step)

    def _check_still_off(self) -> None:
        state = virsh.get_state(self._domain)
        if state is not None and state.has_process:
            raise SnapshotError(f"{self._name} was started while its disks were being frozen", remedy="Run it again.")


def _thaw(fields: Fields) -> str | None:
    state = virsh.get_state(fields["domain"])
    if state is None or state.name != "running":
        return None
    try:
        virsh.thaw(fields["domain"])
    except ToolError as error:
        # Without an agent nothing was frozen; the attempt is all that there was.
        if virsh.is_without_agent(error):
            return None
        raise
    return f"the freeze of the file systems of {fields['domain']}"


def _go_on(fields: Fields) -> str | None:
    state = virsh.get_state(fields["domain"])
    if state is None or state.name != "paused":
        return None
    virsh.resume(fields["domain"])
    return f"the pause of {fields['domain']}"


def _feed(fields: Fields) -> str | None:
    state = virsh.get_state(fields["domain"])
    if state is not None and state.is_starved:
        virsh.resume(fields["domain"])
    return None


def _find_hunger(fields: Fields) -> str | None:
    try:
        state = virsh.get_state(fields["domain"])
    except ToolError:
        return None  # libvirt may be restarting
    if state is not None and state.is_starved:
        return "the guest was paused, as a write failed: is its storage full?"
    return None


KINDS: t.Mapping[str, StepKind] = {
    "frozen": StepKind(undo=_thaw),
    "guest": StepKind(undo=_feed, health=_find_hunger),
    "paused": StepKind(undo=_go_on),
}

__all__ = ("KINDS", "QUIESCE", "Guest")
