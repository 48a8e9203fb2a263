# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Raw views of what is not a raw file, by qemu-storage-daemon: they outlive the process that opened them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import time
import typing as t

from ..vma.errors import ToolError
from ..vma.pending_file import target_errors
from .command import CommandError, run
from .journal import Fields, Journal
from .provider import StepKind

PACKAGES = "qemu-system-common (Debian 12 and newer) or qemu-img (Fedora)"
_DAEMON = "qemu-storage-daemon"
_TIMEOUT = 20.0
"""Seconds that the daemon may take to end before it is killed."""
_POLL = 0.05


def can_view() -> bool:
    """Whether the host has what opens views."""
    return shutil.which(_DAEMON) is not None and os.path.exists("/dev/fuse")


def open_view(journal: Journal, node: t.Mapping[str, t.Any], path: str) -> None:
    """Let the new file C(path) show, raw and not writable, what the block device C(node) holds.

    C(node) is a block device as QEMU's option C(--blockdev) takes it, without its name.

    Raises: ToolError where the daemon is missing or cannot open it; TargetError.
    """
    if shutil.which(_DAEMON) is None:
        raise ToolError(f"the tool {_DAEMON} is needed to read this disk", remedy=f"Install the package {PACKAGES}.")
    journal.add("view", path=path)
    with target_errors(path), open(path, "xb"):
        pass  # the view is mounted on a file
    block = {**node, "node-name": "image", "read-only": True}
    export = {"type": "fuse", "id": "view", "node-name": "image", "mountpoint": path, "writable": False}
    command = [_DAEMON, "--blockdev", json.dumps(block), "--export", json.dumps(export)]
    run([*command, "--pidfile", _pid_path(path), "--daemonize"], purpose="to read this disk", timeout=60)


def _pid_path(path: str) -> str:
    return f"{path}.pid"


def _close_view(fields: Fields) -> str | None:
    path = fields["path"]
    there = os.path.lexists(path) or _is_mounted(path)
    _end_daemon(path)
    for tool in ("fusermount3", "fusermount"):
        if shutil.which(tool) is not None and _is_mounted(path):
            with contextlib.suppress(CommandError):
                run([tool, "-u", "-z", path], purpose="to take away a view")
    for leftover in (path, _pid_path(path)):
        with target_errors(leftover), contextlib.suppress(FileNotFoundError):
            os.unlink(leftover)
    return f"the view {path}" if there else None


def _end_daemon(path: str) -> None:
    """End the daemon of a view, if it lives or is just coming up: known by its command line."""
    deadline = time.monotonic() + _TIMEOUT
    while True:
        daemons = [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and _is_daemon(pid, path)]
        if not daemons:
            return
        for pid in daemons:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM if time.monotonic() < deadline else signal.SIGKILL)
        time.sleep(_POLL)


def _is_daemon(pid: str, path: str) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            arguments = file.read().split(b"\0")
    except OSError:
        return False
    return os.fsencode(_pid_path(path)) in arguments


def _is_mounted(path: str) -> bool:
    # The path of a dead view cannot be asked, but the kernel's list can; it writes blanks as octal numbers.
    wanted = path.replace("\\", "\\134").replace(" ", "\\040").replace("\t", "\\011").replace("\n", "\\012")
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
        return any(line.split(" ")[4] == wanted for line in mounts)


def _find_dead(fields: Fields) -> str | None:
    path = fields["path"]
    try:
        os.stat(path)
    except OSError as error:
        return f"the view {path} is gone: {error.strerror}"
    return None if _is_mounted(path) else f"the view {path} is gone: its daemon has ended"


KINDS: t.Mapping[str, StepKind] = {"view": StepKind(undo=_close_view, health=_find_dead)}

__all__ = ("KINDS", "PACKAGES", "can_view", "open_view")
