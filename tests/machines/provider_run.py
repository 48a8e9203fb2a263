# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the tests of snapshot providers share: a journal, a guest that can be held, and a judge of what was frozen."""

from __future__ import annotations

import contextlib
import os
import pathlib
import typing as t

from ansible_collections.vmbackup.vma.plugins.module_utils.host import folder, journal, provider, undo, view
from ansible_collections.vmbackup.vma.plugins.module_utils.host.errors import SnapshotError
from ansible_collections.vmbackup.vma.tests.machines.writer import Writer

RUN_ID = "0badcafe"


class Guest:
    """Stands still as the guest of a real run does: it can be held, or (C(writer) is None) not."""

    def __init__(self, writer: Writer | None = None) -> None:
        self._writer = writer
        self.musts: list[bool] = []

    @contextlib.contextmanager
    def standing_still(self, *, must: bool) -> t.Iterator[str]:
        """See StandStill."""
        self.musts.append(must)
        if must and self._writer is None:
            raise SnapshotError("this guest cannot be held")
        if must and self._writer is not None:
            self._writer.pause()
        try:
            yield provider.CRASH
        finally:
            if must and self._writer is not None:
                self._writer.resume()


class Run:
    """A run with a provider: its journal, and how it ends."""

    def __init__(self, place: pathlib.Path, made_by: provider.Provider, guest: Guest | None = None) -> None:
        self.guest = guest or Guest()
        self.provider = made_by
        self.kinds = {**folder.KINDS, **view.KINDS, **made_by.kinds}
        self.journal = journal.lock_journal("a guest", str(place / "journals"))
        self.held: list[int] = []
        self._scratch = place

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_failure: object) -> None:
        for fd in self.held:
            os.close(fd)
        self.release()
        self.journal.close()

    def freeze(self) -> provider.Frozen:
        """Freeze the disks."""
        still = self.guest.standing_still
        return self.provider.freeze(provider.Work(self.journal, RUN_ID, str(self._scratch), still, self._hold))

    def _hold(self, fd: int) -> None:
        self.held.append(os.dup(fd))

    def release(self) -> list[str]:
        """Undo all steps; what was removed."""
        return undo.release(self.journal, self.kinds)

    def trouble(self) -> str | None:
        """What the keeper would find."""
        return undo.find_trouble(self.journal, self.kinds)


def paths(frozen: provider.Frozen) -> list[pathlib.Path]:
    """Where the frozen disks are to be read."""
    return [pathlib.Path(disk.path) for disk in frozen.disks]


def disks(*places: str | pathlib.Path) -> list[provider.Disk]:
    """Raw disks at these places."""
    return [provider.Disk(f"scsi{number}", str(place)) for number, place in enumerate(places)]
