# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The host's tools that the codec runs: where they are, how they are started, and how they ended."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import typing as t

from .errors import ToolError

PACKAGES: dict[str, str] = {"zstd": "zstd", "lzop": "lzop", "qemu-img": "qemu-utils (Debian) or qemu-img (Fedora)"}
"""The packages that tools come in, where they are not called as the tool is."""
_WHILE_WE_LIVE = '[ "$PPID" = "$0" ] && exec "$@"'
"""For sh: become a command, unless this process, whose number stands before the command, is no longer the parent."""


def find_tool(name: str, purpose: str) -> str:
    """The path of a tool. Raises: ToolError that names the package to install."""
    path = shutil.which(name)
    if path is None:
        package = PACKAGES.get(name, name)
        raise ToolError(
            f"the tool {name} is needed {purpose} and was not found in PATH", remedy=f"Install the package {package}."
        )
    return path


def start_tool(
    command: list[str],
    *,
    stdin: int | t.IO[bytes] = subprocess.DEVNULL,
    stdout: int | t.IO[bytes] = subprocess.DEVNULL,
    stderr: int | t.IO[bytes] = subprocess.DEVNULL,
) -> subprocess.Popen[bytes]:
    """Start a tool, which says what it has to say in English. Raises: ToolError where it does not start."""
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        # The codec must not know Ansible, whose run_command() also cannot give a tool a file to read or write.
        return subprocess.Popen(  # pylint: disable=ansible-bad-function
            command, stdin=stdin, stdout=stdout, stderr=stderr, bufsize=0, env=environment
        )
    except OSError as error:
        raise ToolError(f"{command[0]} cannot be started: {error.strerror}") from error


def open_scratch() -> t.IO[bytes]:
    """A file without a name, for what a tool says. Raises: ToolError where none can be made."""
    try:
        return tempfile.TemporaryFile()
    except OSError as error:
        remedy = "Make room in the folder for temporary files, or set TMPDIR to another one."
        raise ToolError(f"no temporary file can be made: {error.strerror}", remedy=remedy) from error


def bound_to_us(command: list[str]) -> list[str]:
    """The command, so that it ends with this process even if that is killed, where the host has setpriv.

    It must be started by the main thread: the kernel sends its signal when the thread that started it ends.
    """
    guard = shutil.which("setpriv")
    if guard is None:
        return command
    # Of a process that is killed before setpriv has asked for the signal there is none: so sh looks after that.
    return [guard, "--pdeathsig", "TERM", "sh", "-c", _WHILE_WE_LIVE, str(os.getpid()), *command]


def describe_exit(status: int, stderr: t.IO[bytes]) -> str:
    """How a command ended, and the last thing that it said."""
    stderr.seek(0)
    said = stderr.read(4096).decode(errors="replace").strip().splitlines()
    how = f"signal {-status}" if status < 0 else f"exit status {status}"
    return f"{how}: {said[-1]}" if said else how


__all__ = ("PACKAGES", "bound_to_us", "describe_exit", "find_tool", "open_scratch", "start_tool")
