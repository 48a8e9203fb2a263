# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What must be undone for a VM, written down before it is done; and the lock that says who works on the VM.

A journal survives its writer, and the host's reboot: whoever holds the lock next undoes what it tells.
No knowledge here of what the steps mean.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import typing as t

from ..vma.errors import BusyError, TargetError
from ..vma.pending_file import sync_folder, target_errors

FOLDER = "/var/lib/vmbackup-vma"
"""Where journals are: it must outlive a reboot, as snapshots do."""

Fields = t.Mapping[str, t.Any]
"""What a step says of itself, as JSON has it."""


class Step(t.NamedTuple):
    """Something that is about to be done, or was done, and that its kind knows how to undo."""

    kind: str
    fields: dict[str, t.Any]


class Journal:
    """The journal of one VM, held by its lock. A process that is forked holds the lock as well, until it closes it."""

    def __init__(self, path: str, lock: int, content: dict[str, t.Any]) -> None:
        """For lock_journal() alone."""
        self._path = path
        self.lock = lock
        self._content = content

    @property
    def steps(self) -> list[Step]:
        """The steps that were not undone yet, the first one first."""
        return [Step(*step) for step in self._content["steps"]]

    @property
    def notes(self) -> dict[str, t.Any]:
        """What else was written down: C(id), C(began), C(disks), C(trouble), C(removed) and the like."""
        return dict(self._content["notes"])

    def add(self, kind: str, **fields: t.Any) -> Step:
        """Write down a step. It is on disk when this returns, so that it may be done. Raises: TargetError."""
        step = Step(kind, fields)
        self._content["steps"].append(list(step))
        self._write()
        return step

    def remove(self, step: Step) -> None:
        """Forget a step: it was undone. Raises: TargetError."""
        self._content["steps"].remove(list(step))
        self._write()

    def begin(self, **notes: t.Any) -> None:
        """Forget what was noted of an earlier run, whose steps are all undone. Raises: TargetError."""
        self._content["notes"] = notes
        self._write()

    def note(self, **notes: t.Any) -> None:
        """Write down what others want to know. Raises: TargetError."""
        self._content["notes"].update(notes)
        self._write()

    def reload(self) -> None:
        """Read again what another process that holds the same lock has written."""
        self._content = _read(self._path)

    def is_current(self) -> bool:
        """Whether the lock is the VM's still: another process that held it as well may have deleted the journal."""
        try:
            return os.path.samestat(os.fstat(self.lock), os.stat(_lock_path(self._path)))
        except FileNotFoundError:
            return False

    def delete(self) -> None:
        """Remove the journal, whose steps are all undone, and its lock."""
        for path in (_new_path(self._path), self._path, _lock_path(self._path)):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def close(self) -> None:
        """Let go of the lock, in this process. May be called more than once."""
        if self.lock >= 0:
            os.close(self.lock)
            self.lock = -1

    def _write(self) -> None:
        new = _new_path(self._path)
        with target_errors(self._path):
            with open(new, "w", encoding="utf-8", opener=_private) as file:
                json.dump(self._content, file)
                file.flush()
                os.fsync(file.fileno())
            os.rename(new, self._path)
            sync_folder(os.path.dirname(self._path))


def lock_journal(name: str, folder: str = FOLDER) -> Journal:
    """Take the lock of the VM called C(name), and its journal. Raises: BusyError, TargetError."""
    path = _path(name, folder)
    with target_errors(folder):
        os.makedirs(folder, 0o700, exist_ok=True)
        while True:
            lock = os.open(_lock_path(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            journal = Journal(path, lock, {})
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The one who had the lock may have removed its file, and another may have made a new one since.
                if journal.is_current():
                    journal.reload()
                    return journal
            except BlockingIOError as error:
                journal.close()
                raise BusyError(f"another run works on the VM {name}") from error
            except BaseException:
                journal.close()
                raise
            journal.close()


def read_journal(name: str, folder: str = FOLDER) -> tuple[list[Step], dict[str, t.Any]]:
    """The steps and notes of a VM's journal, whoever holds its lock; both empty where there is none."""
    content = _read(_path(name, folder))
    return [Step(*step) for step in content["steps"]], dict(content["notes"])


def find_lock(name: str, folder: str = FOLDER) -> str:
    """The path of the lock of the VM called C(name): who works on it has this file open."""
    return _lock_path(_path(name, folder))


def _path(name: str, folder: str) -> str:
    # The name is for the administrator who looks into the folder, the digest tells apart what it cannot.
    readable = re.sub(r"[^A-Za-z0-9_-]", "_", name)[:64]
    return os.path.join(folder, f"{readable}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:8]}.json")


def _lock_path(path: str) -> str:
    return f"{path}.lock"


def _new_path(path: str) -> str:
    return f"{path}.new"


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _read(path: str) -> dict[str, t.Any]:
    try:
        with open(path, encoding="utf-8") as file:
            return t.cast("dict[str, t.Any]", json.load(file))
    except FileNotFoundError:
        return {"steps": [], "notes": {}}
    except OSError as error:
        raise TargetError(
            f"the journal cannot be read: {error.strerror}", file=path, remedy="Run the task as root (become: true)."
        ) from error
    except ValueError as error:
        raise TargetError(
            f"the journal is damaged: {error}",
            file=path,
            remedy="Remove what bears the mark vmbackup-vma and belongs to this VM, then the journal.",
        ) from error


__all__ = ("FOLDER", "Fields", "Journal", "Step", "find_lock", "lock_journal", "read_journal")
