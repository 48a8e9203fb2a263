# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Signs of life: how a guest shows that it is up. Each looks for one sign and waits for nothing."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import time
import typing as t

from ..vma.errors import RequestError, ToolError
from .console import Console
from .qemu_command import AGENT_BUS
from .qemu_monitor import Monitor

LOGIN = r"login:"
"""The pattern that stands for every sign where none is asked for."""
_QUIET = 0.3
"""Seconds without output after which a line without an end is taken for whole, as a prompt is."""
_AGAIN = 3.0
"""Seconds after which a question that was not answered is asked again."""


class Sign(t.Protocol):
    """Something to wait for."""

    name: str

    def is_seen(self) -> bool:
        """Whether it is there. Raises: ToolError where it cannot be looked for."""

    def close(self) -> None:
        """Let go of what it holds."""


class ConsoleSign:
    """A pattern on the serial console."""

    name = "expect"

    def __init__(self, console: Console, pattern: str) -> None:
        """Raises: RequestError for a pattern that cannot be a sign."""
        self._console = console
        self._pattern = compile_pattern(pattern)
        self._found: re.Match[str] | None = None
        self._quiet_since = 0.0
        self._length = -1

    def look(self) -> None:
        """Look at what has come; it has to be called each time that something came."""
        if self._found is None or self._found.end() == self._length:
            # While the line goes on, the match may do so too.
            self._found = self._console.search(self._pattern) or self._found
        self._length = len(self._console.text)
        self._quiet_since = time.monotonic()

    def is_seen(self) -> bool:
        """Whether the pattern matched before the guest gave up, and the match is whole."""
        if self._found is None:
            return False
        failed_at = self._console.failed_at
        if failed_at is not None and failed_at < self._found.start():
            return False
        return self._found.end() < self._length or time.monotonic() - self._quiet_since > _QUIET

    @property
    def match(self) -> str | None:
        """What matched."""
        return None if self._found is None else self._found[0]

    def close(self) -> None:
        """Nothing is held."""


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """The pattern; C(^) and C($) are the ends of lines.

    Raises: RequestError for what is no regular expression, and for one that proves nothing.
    """
    try:
        compiled = re.compile(pattern, re.MULTILINE)
    except re.error as error:
        raise RequestError(
            f"expected a regular expression, got {pattern}: {error}",
            remedy="Put a backslash before a character such as ( that is meant as it is.",
        ) from error
    if compiled.search(""):
        raise RequestError(
            f"the pattern '{pattern}' matches even an empty text, so any output of any guest would be its sign of life",
            remedy="Give one that needs at least one character which only a guest that is up prints, such as login:",
        )
    return compiled


class AgentSign:
    """The guest agent answers a ping."""

    name = "expect_agent"

    def __init__(self, monitor: Monitor) -> None:
        """Plug its channel in. Raises: ToolError."""
        self._socket, theirs = socket.socketpair()
        self._socket.setblocking(False)
        with theirs:
            monitor.execute("getfd", {"fdname": "agent"}, fd=theirs.fileno())
        address = {"type": "fd", "data": {"str": "agent"}}
        backend = {"type": "socket", "data": {"addr": address, "server": False}}
        monitor.execute("chardev-add", {"id": "agent", "backend": backend})
        port = {"driver": "virtserialport", "bus": AGENT_BUS, "chardev": "agent", "name": "org.qemu.guest_agent.0"}
        monitor.execute("device_add", port)
        self._said = b""
        self._asked = 0.0

    def is_seen(self) -> bool:
        """Whether an answer came. What nobody reads inside waits in the channel until somebody does."""
        with contextlib.suppress(OSError):
            self._said += self._socket.recv(4096)
        if any(_is_answer(line) for line in self._said.split(b"\n")[:-1]):
            return True
        if time.monotonic() - self._asked > _AGAIN:
            self._asked = time.monotonic()
            with contextlib.suppress(OSError):
                self._socket.send(b'{"execute": "guest-ping"}\n')
        return False

    def close(self) -> None:
        """Close our end of the channel."""
        self._socket.close()


def _is_answer(line: bytes) -> bool:
    try:
        message = json.loads(line)
    except ValueError:
        return False
    return isinstance(message, dict) and "return" in message


class PortSign:
    """A port inside takes a connection.

    QEMU's user-mode network takes ours at once and only then asks the guest, so that we have a connection says nothing:
    what QEMU tells of it does.
    """

    name = "expect_port"

    def __init__(self, monitor: Monitor) -> None:
        """Find out where the port is reached from here. Raises: ToolError."""
        self._monitor = monitor
        self._socket: socket.socket | None = None
        self._asked = 0.0
        forward = re.search(r"TCP\[HOST_FORWARD\]\s+\d+\s+\S+\s+(\d+)", self._connections())
        if forward is None:
            raise ToolError("QEMU does not forward the port")
        self._port = int(forward[1])

    def _connections(self) -> str:
        return str(self._monitor.execute("human-monitor-command", {"command-line": "info usernet"}))

    def is_seen(self) -> bool:
        """Whether the guest took the connection."""
        if self._socket is not None and re.search(r"TCP\[(?:ESTABLISHED|CLOSE_WAIT)\]", self._connections()):
            return True
        if time.monotonic() - self._asked > _AGAIN:
            self._asked = time.monotonic()
            self.close()
            with contextlib.suppress(OSError):
                self._socket = socket.create_connection(("127.0.0.1", self._port), timeout=1)
        return False

    def close(self) -> None:
        """Close the connection."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


__all__ = ("LOGIN", "AgentSign", "ConsoleSign", "PortSign", "Sign", "compile_pattern")
