# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Files that appear whole or not at all: written beside their name, brought to disk, renamed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import stat
import time
import typing as t

from .errors import BusyError, SpaceError, TargetError

_NAME_LIMIT = 200
"""Bytes of a file's name that leave room for what a pending file adds to it."""
LOCK_TIMEOUT = 60.0
"""Seconds to wait for the lock of a folder, which our own runs hold only while they look for leftovers."""
_LOCK_POLL = 0.05
_SPACE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES)
"""What file systems say that know no second names, as FAT and some of FUSE and of networks do."""
_LABEL = "security.selinux"
_ACCESS_LIST = "system.posix_acl_access"


@contextlib.contextmanager
def target_errors(path: str) -> t.Iterator[None]:
    """Turn what the system says while C(path) is written into a TargetError, or a SpaceError."""
    try:
        yield
    except OSError as error:
        raise target_error(path, error) from error


def target_error(path: str, error: OSError) -> TargetError:
    """What the system said while C(path) was written, as an error of the domain."""
    if error.errno in _SPACE_ERRORS:
        return SpaceError(
            f"there is no room: {error.strerror}", file=path, remedy="Make room, or choose another target."
        )
    return TargetError(f"cannot be written: {error.strerror}", file=path)


def write_all(fd: int, offset: int, data: bytes | bytearray | memoryview) -> None:
    """Write C(data) at C(offset), however many calls it takes. Raises: OSError."""
    count = os.pwrite(fd, data, offset)
    while count < len(data):
        data = memoryview(data)[count:]
        offset += count
        count = os.pwrite(fd, data, offset)


def sync_folder(path: str) -> None:
    """Make the names in a folder durable. Raises: OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


unfinished: dict[str, t.Callable[[str], None]] = {}
"""What this process has to remove, and how. Each is known before it is made, and until it is gone or has its name."""


def remove_unfinished() -> None:
    """Remove what an interrupt kept its makers from removing. Nobody may write any more."""
    while unfinished:
        path, remove = unfinished.popitem()
        with contextlib.suppress(OSError):
            remove(path)


class PendingFile:
    """A file that gets its name when it is whole and on disk, and leaves no trace otherwise.

    It is written beside its name with mode 0600, under a name that cannot be guessed, and locked: so another run knows
    that this one lives, and the next one removes what a killed run left.
    """

    _SUFFIX = ".vma-part"

    def __init__(self, dest: str, *, may_replace: bool = True) -> None:
        """C(may_replace) says whether the file may take the place of one that is at C(dest) when it is committed.

        Raises: BusyError where another run writes C(dest); TargetError, SpaceError.
        """
        self.dest = dest
        self._may_replace = may_replace
        self._folder = os.path.dirname(os.path.abspath(dest))
        self._fd: int | None = None
        name = os.path.basename(dest)
        if len(os.fsencode(name)) > _NAME_LIMIT:
            name = hashlib.sha256(os.fsencode(name)).hexdigest()
        self.path = os.path.join(self._folder, f".{name}.{secrets.token_hex(8)}{self._SUFFIX}")
        siblings = re.compile(rf"\.{re.escape(name)}\.[0-9a-f]{{16}}{re.escape(self._SUFFIX)}")
        if os.path.isdir(dest):
            raise TargetError("expected a file, found a folder", file=dest, remedy="Name the file in it.")
        with target_errors(dest):
            folder_fd = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                self._lock_folder(folder_fd)
                for entry in os.listdir(folder_fd):
                    if siblings.fullmatch(entry):
                        self._remove_leftover(os.path.join(self._folder, entry))
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                unfinished[self.path] = os.unlink
                self._fd = os.open(self.path, flags, 0o600)
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            finally:
                os.close(folder_fd)

    def _lock_folder(self, fd: int) -> None:
        deadline = time.monotonic() + LOCK_TIMEOUT
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if time.monotonic() >= deadline:
                    raise BusyError(
                        f"another process holds a lock on the folder {self._folder}",
                        file=self.dest,
                        remedy="End it, or have it lock another file: see lslocks, or a flock command around this run.",
                    ) from error
                time.sleep(_LOCK_POLL)
            except OSError:
                return  # some network file systems cannot lock a folder: two runs that start at once both go on
            else:
                return

    def _remove_leftover(self, path: str) -> None:
        try:
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):  # it may have got its name just now
                os.unlink(path)
        except BlockingIOError as error:
            raise BusyError(
                "another run is writing this file",
                file=self.dest,
                remedy="Wait for it to end, or stop it, and run again.",
            ) from error
        finally:
            os.close(fd)

    @property
    def fd(self) -> int:
        """The open descriptor. Raises: ValueError after the end."""
        if self._fd is None:
            raise ValueError("the file is no longer pending")
        return self._fd

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write at C(offset). Several threads may be in here. Raises: TargetError, SpaceError."""
        try:
            write_all(self.fd, offset, data)
        except OSError as error:
            raise target_error(self.dest, error) from error

    def sync(self) -> None:
        """Bring the content to disk; what follows is the name alone. Raises: TargetError, SpaceError."""
        with target_errors(self.dest):
            os.fsync(self.fd)

    def commit(self) -> bool:
        """Give the file its name, in place of what has it now, whose owner, mode and label it takes over.

        Where nothing may be replaced and something has the name by now, that stays. Returns whether it got its name.

        Raises: TargetError, SpaceError; the old file is then untouched.
        """
        with target_errors(self.dest):
            if self._may_replace:
                self._adopt_attributes()
            os.fsync(self.fd)
            if self._may_replace:
                os.rename(self.path, self.dest)
            elif not self._rename_to_new():
                return False
            unfinished.pop(self.path, None)
            fd, self._fd = self.fd, None  # an interrupt must not have it closed twice
            os.close(fd)
            sync_folder(self._folder)
        return True

    def _rename_to_new(self) -> bool:
        try:
            os.link(self.path, self.dest)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
        else:
            os.unlink(self.path)
            return True
        # Without links there is a moment between this look and the name.
        if os.path.lexists(self.dest):
            return False
        os.rename(self.path, self.dest)
        return True

    def _adopt_attributes(self) -> None:
        try:
            old = os.lstat(self.dest)
        except FileNotFoundError:
            return
        if not stat.S_ISREG(old.st_mode):
            return
        names = self._xattrs_of_old()
        for name in names:
            if name == _LABEL or name.startswith("user."):
                with contextlib.suppress(OSError):
                    self._adopt_xattr(name)
        new = os.fstat(self.fd)
        if (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid):
            # Not every user may give files away: then the new file is the user's own, and stays closed to others.
            try:
                os.fchown(self.fd, old.st_uid, old.st_gid)
            except PermissionError:
                return
        if _ACCESS_LIST in names:
            # Without it, the mode opens the file to the group: its bits are then the most that the list grants anyone.
            self._adopt_xattr(_ACCESS_LIST)
        os.fchmod(self.fd, stat.S_IMODE(old.st_mode))

    def _xattrs_of_old(self) -> list[str]:
        try:
            return os.listxattr(self.dest, follow_symlinks=False)
        except OSError:
            return []  # the file system has none

    def _adopt_xattr(self, name: str) -> None:
        os.setxattr(self.fd, name, os.getxattr(self.dest, name, follow_symlinks=False))

    def discard(self) -> None:
        """Remove the file, unless it was committed. May be called more than once."""
        if self._fd is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)
            unfinished.pop(self.path, None)
            fd, self._fd = self._fd, None
            os.close(fd)


__all__ = (
    "PendingFile",
    "remove_unfinished",
    "sync_folder",
    "target_error",
    "target_errors",
    "unfinished",
    "write_all",
)
