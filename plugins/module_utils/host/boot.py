# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Boot disks on a throw-away machine and wait for signs of life. The disks are never written.

How the machine looks is C(qemu_command)'s, how a guest shows life C(boot_signs)', how it gives up C(console)'s.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import select
import shutil
import socket
import stat
import subprocess
import tempfile
import time
import typing as t

from ..vma.errors import RequestError, SourceError, ToolError
from ..vma.image import check_unused
from ..vma.pending_file import PendingFile, target_errors
from ..vma.tools import bound_to_us, describe_exit, find_tool, start_tool
from . import boot_signs, firmware
from .accelerator import affordable_cores, affordable_memory, choose_accelerator, processor_options
from .boot_failure import Failure
from .boot_scratch import PID_FILE, scratch_folder
from .command import CommandError, run
from .console import Console
from .picture import png_from_ppm
from .qemu_command import Disk, Flash, Machine, Node, build_options, choose_type
from .qemu_monitor import Monitor

_QEMUS = ("qemu-system-x86_64", "qemu-kvm", "/usr/libexec/qemu-kvm")
_TICK = 0.2
"""Seconds between two looks at signs that do not announce themselves."""
_SILENCE = 0.5
"""Seconds without a word after which a guest that gave up has said all."""
_LAST_WORDS = 2.0
"""Seconds in which a QEMU that closed its connections ends, and says why."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What to boot, and what to wait for. C(memory) is in MiB, C(timeout) in seconds from the guest's start.

    All signs of life that are asked for must come; without any, a login prompt on the serial console has to.
    """

    disks: t.Sequence[Disk]
    firmware: str = "bios"
    efi_vars: str | None = None
    machine: str = "pc"
    memory: int = 1024
    cores: int = 1
    scsi_controller: str = "virtio-scsi-pci"
    network_card: str = "virtio"
    accelerator: str = "auto"
    expect: str | None = None
    expect_agent: bool = False
    expect_port: int | None = None
    timeout: float = 300
    scratch_dir: str = "/var/tmp"
    screenshot: str | None = None

    @property
    def pattern(self) -> str | None:
        """The pattern to look for on the serial console, if any."""
        if self.expect is None and not self.expect_agent and self.expect_port is None:
            return boot_signs.LOGIN
        return self.expect


@dataclasses.dataclass(frozen=True)
class Plan:
    """What will be booted, after what the host has and what QEMU knows. C(changes) says what is not as requested."""

    qemu: str
    machine: Machine
    firmware: firmware.Firmware | None
    changes: t.Sequence[str]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How it went. C(seconds) is from the guest's start to the last sign of life, or to the failure.

    C(signs) tells when each sign came, and C(notes) what went wrong without being a reason to fail.
    """

    plan: Plan
    accelerator: str
    seconds: float
    signs: t.Mapping[str, float]
    match: str | None
    console: Console
    failure: Failure | None
    has_screenshot: bool
    notes: t.Sequence[str]


def find_qemu() -> str:
    """QEMU's path. Raises: ToolError that names the package to install."""
    for name in _QEMUS:
        path = shutil.which(name)
        if path is not None:
            return path
    raise ToolError(
        f"the tool {_QEMUS[0]} is needed to boot a guest and was not found in PATH",
        remedy="Install the package qemu-system-x86 (Debian) or qemu-kvm (Fedora).",
    )


def plan(request: Request) -> Plan:
    """See that all is there, and fit the machine to the host. Nothing is booted.

    Raises: RequestError, SourceError, SpaceError, ToolError.
    """
    _check(request)
    qemu = find_qemu()
    find_tool("qemu-img", "to keep what the guest writes off its disks")
    memory, cores = affordable_memory(request.memory), affordable_cores(request.cores)
    machine_type = request.machine
    if machine_type not in ("pc", "q35"):
        machine_type = choose_type(machine_type, run([qemu, "-machine", "help"], purpose="to boot a guest"))
    machine = Machine(
        type=machine_type,
        memory=memory,
        cores=cores,
        buses=[disk.bus for disk in request.disks],
        not_booted=[number for number, disk in enumerate(request.disks) if not disk.boot],
        scsi_controller=request.scsi_controller,
        network_card=request.network_card,
        port=request.expect_port,
        with_agent=request.expect_agent,
    )
    build_options(machine, [], [], [], "")  # which knows how many disks a bus takes
    found = firmware.find_firmware(request.efi_vars) if request.firmware == "uefi" else None
    wanted = {"machine": request.machine, "memory": request.memory, "cores": request.cores}
    had = {"machine": machine_type, "memory": memory, "cores": cores}
    changes = [f"{key} is {had[key]} instead of {wanted[key]}" for key in wanted if wanted[key] != had[key]]
    return Plan(qemu, machine, found, changes)


def _check(request: Request) -> None:
    if not request.disks:
        raise RequestError("expected at least one disk to boot from, got none", remedy="Name the VM's disks.")
    if request.efi_vars is not None and request.firmware != "uefi":
        raise RequestError("EFI variables are of no use to a BIOS", remedy="Set firmware to uefi, or leave them out.")
    if request.expect_port is not None and not 0 < request.expect_port < 65536:
        raise RequestError(f"expected a port between 1 and 65535, got {request.expect_port}")
    for name, value in (("memory", request.memory), ("cores", request.cores), ("timeout", request.timeout)):
        if value <= 0:
            raise RequestError(f"expected a number above 0 for {name}, got {value}")
    if request.pattern is not None:
        boot_signs.compile_pattern(request.pattern)
    if not os.path.isdir(request.scratch_dir):
        raise RequestError(
            "this folder for scratch files does not exist", file=request.scratch_dir, remedy="Make it first."
        )
    for disk in request.disks:
        _is_block(disk.path)


def _is_block(path: str) -> bool:
    """Whether a disk is a block device, or else a file.

    Raises: SourceError where it is neither, cannot be read, or is written to by a running VM.
    """
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            is_unused = check_unused(file.fileno(), to_write=False)
    except OSError as error:
        raise SourceError(
            f"cannot be opened: {error.strerror}", file=path, remedy="Check the path and the permissions."
        ) from error
    if not stat.S_ISBLK(mode) and not stat.S_ISREG(mode):
        raise SourceError("expected a file or a block device", file=path)
    if not is_unused:
        raise SourceError(
            "a running VM writes to this disk",
            file=path,
            remedy="Boot a restored copy or a snapshot of it, never the disk of a living VM.",
        )
    return stat.S_ISBLK(mode)


def boot(request: Request) -> Outcome:
    """Boot the disks, wait for the signs of life or for a failure, and remove all of it.

    Raises: RequestError, SourceError, SpaceError, TargetError, ToolError where it does not come to booting.
    """
    planned = plan(request)
    accelerator = choose_accelerator(planned.qemu, request.accelerator)
    with scratch_folder(request.scratch_dir) as folder:
        nodes = [_make_overlay(disk, folder, number) for number, disk in enumerate(request.disks)]
        flash = _make_flash(planned.firmware, folder)
        pid_file = os.path.join(folder, PID_FILE)
        options = build_options(planned.machine, processor_options(accelerator), nodes, flash, pid_file)
        with _Guest([planned.qemu, *options], is_emulated=accelerator == "tcg") as guest:
            failure = guest.wait(request)
            picture = None if request.screenshot is None else _take_screenshot(guest, folder)
            if request.screenshot is not None and picture is not None:
                _write_whole(request.screenshot, picture)
            return Outcome(
                plan=planned,
                accelerator=accelerator,
                seconds=guest.seconds,
                signs=guest.seen,
                match=guest.match,
                console=guest.console,
                failure=failure,
                has_screenshot=picture is not None,
                notes=guest.notes,
            )


def _make_overlay(disk: Disk, folder: str, number: int) -> Node:
    """A file that takes what the guest writes to a disk. Raises: SourceError, ToolError."""
    path = os.path.abspath(disk.path)
    overlay = os.path.join(folder, f"disk{number}")
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", disk.format, "-b", path, overlay]
    try:
        run(command, purpose="to keep what the guest writes off its disks")
    except CommandError as error:
        raise ToolError(
            f"qemu-img cannot read it as {disk.format}: {(error.said.strip().splitlines() or [error.message])[-1]}",
            file=disk.path,
            remedy="Check that the format is the image's, and that there is room in scratch_dir.",
        ) from error
    return Node(path, disk.format, _is_block(path), overlay)


def _make_flash(found: firmware.Firmware | None, folder: str) -> list[Flash]:
    if found is None:
        return []
    copy = os.path.join(folder, "efi-vars")
    with target_errors(copy), open(copy, "wb") as file:
        firmware.copy_variables(found, file)
    return [Flash(found.code, found.code_format, True), Flash(copy, found.variables_format, False)]


def _take_screenshot(guest: _Guest, folder: str) -> bytes | None:
    """A picture of the guest's screen as PNG. Where there is none, the guest's notes say why."""
    path = os.path.join(folder, "screen")
    try:
        guest.monitor.execute("screendump", {"filename": path})
        with open(path, "rb") as file:
            return png_from_ppm(file.read())
    except (ToolError, OSError) as error:
        guest.notes.append(f"There is no screenshot: {error}")
        return None


def _write_whole(path: str, data: bytes) -> None:
    """Raises: TargetError, SpaceError; then the file is what it was."""
    pending = PendingFile(path)
    try:
        pending.write(0, data)
        pending.commit()
    finally:
        pending.discard()


class _Guest:
    """A QEMU with a guest, which ends with the context at the latest."""

    def __init__(self, command: list[str], *, is_emulated: bool) -> None:
        self.console = Console()
        self.seen: dict[str, float] = {}
        self.match: str | None = None
        self.notes: list[str] = []
        self.seconds = 0.0
        self._command = command
        self._is_emulated = is_emulated
        self._stack = contextlib.ExitStack()
        self._resets = 0
        self._last_event: Failure | None = None

    def __enter__(self) -> _Guest:
        with self._stack:
            self._stderr = self._stack.enter_context(tempfile.TemporaryFile())
            ours, monitor = socket.socketpair()
            self._line, console = socket.socketpair()
            self.monitor = Monitor(ours)
            self._stack.callback(ours.close)
            self._stack.callback(self._line.close)
            with monitor, console:
                # These names stand for descriptors, which QEMU finds as its standard input and output.
                self._process = start_tool(
                    bound_to_us(self._command),
                    stdin=monitor.fileno(),
                    stdout=console.fileno(),
                    stderr=self._stderr,
                )
            self._stack.callback(self._end)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stack.close()

    def _end(self) -> None:
        # Nothing that it still has to say or to write matters.
        self._process.kill()
        self._process.wait()

    def wait(self, request: Request) -> Failure | None:
        """Let the guest go, and wait for all signs of life. Returns what came instead of them."""
        with contextlib.ExitStack() as stack:
            try:
                self.monitor.negotiate()
                on_console = None if request.pattern is None else boot_signs.ConsoleSign(self.console, request.pattern)
                signs: list[boot_signs.Sign] = [] if on_console is None else [on_console]
                if request.expect_agent:
                    signs.append(boot_signs.AgentSign(self.monitor))
                if request.expect_port is not None:
                    signs.append(boot_signs.PortSign(self.monitor))
                for sign in signs:
                    stack.callback(sign.close)
                self.monitor.execute("cont")
            except ToolError as error:
                return self._explain_end(error)
            began = time.monotonic()
            try:
                failure = self._watch(signs, on_console, began, request.timeout)
            except ToolError as error:
                self._read_on(on_console)
                failure = self._explain_end(error)
            self.match = None if on_console is None else on_console.match
            self.seconds = max(self.seen.values()) if failure is None else round(time.monotonic() - began, 3)
            return failure

    def _watch(
        self, signs: list[boot_signs.Sign], on_console: boot_signs.ConsoleSign | None, began: float, timeout: float
    ) -> Failure | None:
        missing = list(signs)
        sources: list[t.Any] = [self._line, self.monitor]
        while missing:
            ready = select.select(sources, [], [], _TICK)[0]
            now = time.monotonic() - began
            failure = self._judge_all(self.monitor.events())
            if self.monitor.is_closed:
                self._read_on(on_console)
            elif self._line in ready:
                self._receive(on_console)
            for sign in list(missing):
                if sign.is_seen():
                    missing.remove(sign)
                    self.seen[sign.name] = round(now, 3)
            if missing and (failure is not None or self.console.failed_at is not None):
                self._read_on(on_console)
                return self.console.failure() or failure
            if missing and self.monitor.is_closed:
                return self._explain_end()
            if missing and now > timeout:
                return self._explain_timeout(missing, timeout)
        return None

    def _receive(self, on_console: boot_signs.ConsoleSign | None) -> bool:
        """Take what has come on the console. Returns whether more can come."""
        data = self._line.recv(65536)
        self.console.feed(data)
        if on_console is not None:
            on_console.look()
        return bool(data)

    def _read_on(self, on_console: boot_signs.ConsoleSign | None) -> None:
        """Take what the guest still has to say, until it falls silent."""
        deadline = time.monotonic() + _LAST_WORDS
        while time.monotonic() < deadline and select.select([self._line], [], [], _SILENCE)[0]:
            if not self._receive(on_console):
                break

    def _judge_all(self, events: t.Sequence[dict[str, t.Any]]) -> Failure | None:
        """The first of these events that ends the waiting."""
        failures = [self._judge(event) for event in events]
        return next((failure for failure in failures if failure is not None), None)

    def _judge(self, event: dict[str, t.Any]) -> Failure | None:
        """Whether something happened to the machine that ends the waiting."""
        name, data = event["event"], event.get("data", {})
        if name == "GUEST_PANICKED":
            return Failure("kernel_panic", "the guest told QEMU so")
        if name == "BLOCK_IO_ERROR" and data.get("nospace"):
            return Failure("scratch_full")
        if name == "BLOCK_IO_ERROR" and not self.notes:
            self.notes.append(f"QEMU could not {data.get('operation')} a disk: {data.get('reason')}.")
        if name == "SHUTDOWN" and data.get("guest"):
            self._last_event = Failure("shutdown")
        if name == "RESET" and data.get("guest"):
            self._resets += 1
        if name == "STOP":
            status = self.monitor.execute("query-status")["status"]
            if status in ("internal-error", "io-error"):
                return Failure("qemu_failed", f"it stopped the guest: {status}")
        return None

    def _explain_timeout(self, missing: t.Sequence[boot_signs.Sign], timeout: float) -> Failure:
        what = [f"none within {timeout:g} seconds of {', '.join(sign.name for sign in missing)}"]
        if self._resets:
            what.append(f"the guest was reset {self._resets} times")
        if self._is_emulated:
            what.append("it ran in emulation, which is slow, for want of KVM")
        if not self.console.text.strip():
            what.append("nothing came on its serial console")
        return Failure("timeout", "; ".join(what))

    def _explain_end(self, error: ToolError | None = None) -> Failure:
        """Why QEMU is not there any more, or does not answer."""
        failure = None
        with contextlib.suppress(ToolError):
            failure = self._judge_all(self.monitor.events())
        failure = self.console.failure() or failure or self._last_event
        if failure is not None:
            return failure
        try:
            status = self._process.wait(_LAST_WORDS)
        except subprocess.TimeoutExpired:
            return Failure("qemu_failed", "" if error is None else error.message)
        return Failure("qemu_failed", describe_exit(status, self._stderr))


__all__ = ("Outcome", "Plan", "Request", "boot", "find_qemu", "plan")
