# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""QEMU's monitor protocol (QMP) over a socket that is connected already: commands, and the events between them."""

from __future__ import annotations

import json
import select
import socket
import time
import typing as t

from ..vma.errors import ToolError

_TIMEOUT = 60.0
"""Seconds that QEMU may take to answer: on a busy host it can be slow to start."""


class Monitor:
    """A conversation with one QEMU."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._received = b""
        self._events: list[dict[str, t.Any]] = []
        self.is_closed = False

    def fileno(self) -> int:
        """The descriptor to wait for."""
        return self._socket.fileno()

    def negotiate(self) -> None:
        """Begin the conversation. Raises: ToolError where QEMU does not take part in it."""
        self._next_message("QMP")
        self.execute("qmp_capabilities")

    def execute(self, command: str, arguments: dict[str, t.Any] | None = None, *, fd: int | None = None) -> t.Any:
        """Have a command done, and hand over a descriptor with it. Returns what it returns.

        Raises: ToolError where it fails, or QEMU ended.
        """
        line = json.dumps({"execute": command, "arguments": arguments or {}}).encode()
        try:
            if fd is None:
                self._socket.sendall(line)
            else:
                socket.send_fds(self._socket, [line], [fd])
        except OSError as error:
            # What it told before it ended can still be read.
            raise ToolError(f"QEMU does not take the command {command}: {error.strerror}") from error
        answer = self._next_message("return", "error")
        if "error" in answer:
            raise ToolError(f"QEMU refused the command {command}: {answer['error'].get('desc')}")
        return answer["return"]

    def events(self) -> list[dict[str, t.Any]]:
        """What happened since the last call. Never waits."""
        while not self.is_closed and select.select([self._socket], [], [], 0)[0]:
            self._receive()
        while True:
            message = self._take()
            if message is None:
                break
            if "event" in message:
                self._events.append(message)
        events, self._events = self._events, []
        return events

    def _next_message(self, *keys: str) -> dict[str, t.Any]:
        """The next message that has one of these keys; events are kept for later."""
        deadline = time.monotonic() + _TIMEOUT
        while True:
            message = self._take()
            if message is not None:
                if any(key in message for key in keys):
                    return message
                if "event" in message:
                    self._events.append(message)
                continue
            if self.is_closed:
                raise ToolError("QEMU ended while it was asked for something")
            if not select.select([self._socket], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise ToolError(f"QEMU does not answer within {_TIMEOUT:.0f} seconds")
            self._receive()

    def _receive(self) -> None:
        try:
            data = self._socket.recv(65536)
        except OSError:
            data = b""
        self._received += data
        self.is_closed = not data

    def _take(self) -> dict[str, t.Any] | None:
        line, newline, rest = self._received.partition(b"\n")
        if not newline:
            return None
        self._received = rest
        message: dict[str, t.Any] = json.loads(line)
        return message


__all__ = ("Monitor",)
