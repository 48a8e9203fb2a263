# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The host's tools, run to their end: what they said, or an error that tells it."""

from __future__ import annotations

import os
import subprocess
import typing as t

from ansible_collections.vmbackup.vma.plugins.module_utils.vma.errors import ToolError

from ..vma.tools import bound_to_us, find_tool

DEFAULT_TIMEOUT = 120
"""Seconds that a tool may take unless its caller knows better."""


class CommandError(ToolError):
    """A tool ended with an error. C(said) is what it wrote to its standard error."""

    def __init__(self, command: t.Sequence[str], how: str, said: str, remedy: str | None = None) -> None:
        last = said.strip().splitlines()[-1:] or ["it said nothing"]
        super().__init__(f"{' '.join(command)} ended with {how}: {last[0]}", remedy=remedy)
        self.said = said


def run(command: t.Sequence[str], *, purpose: str, timeout: float = DEFAULT_TIMEOUT, remedy: str | None = None) -> str:
    """Run a tool to its end and return what it wrote to its standard output.

    C(purpose) completes "the tool X is needed ...". C(timeout) is in seconds. The tool ends with this process, even if
    that is killed: else it could still do what was undone already. Only the main thread may call this.

    Raises: CommandError where it ends with an error or not in time; ToolError where it is missing.
    """
    found = bound_to_us([find_tool(command[0], purpose), *command[1:]])
    try:
        # Ansible's run_command() is not for code that does not know Ansible.
        done = subprocess.run(  # pylint: disable=ansible-bad-function
            found,
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout,
            env={**os.environ, "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired as error:
        raise CommandError(command, f"no answer within {timeout:g} seconds", "", remedy) from error
    except OSError as error:
        raise ToolError(f"{found[0]} cannot be started: {error.strerror}") from error
    if done.returncode:
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit status {done.returncode}"
        raise CommandError(command, how, done.stderr.decode(errors="replace"), remedy)
    return done.stdout.decode(errors="replace")


__all__ = ("DEFAULT_TIMEOUT", "CommandError", "run")
