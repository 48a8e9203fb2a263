# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What runs a guest on this host, and how much of the host there is for it."""

from __future__ import annotations

import os
import select
import subprocess
import time
import typing as t

from ..vma.errors import SpaceError, ToolError
from ..vma.tools import bound_to_us, start_tool

ACCELERATORS: tuple[str, ...] = ("auto", "kvm", "tcg")
_CPUS: dict[str, str] = {"kvm": "host", "tcg": "max,la57=off"}
"""The richest processor of each; five levels of page tables only slow the emulation down, and some guests stumble."""
_TRIAL_SECONDS = 10.0
_SPOKE = b"SeaBIOS"
_MIB = 1 << 20
_RESERVE = 256 * _MIB
"""Bytes of memory that a drill leaves to the host."""
_LEAST = 64 * _MIB


def choose_accelerator(qemu: str, wanted: str) -> str:
    """C(kvm) where it runs a guest, else C(tcg), the emulation. Raises: ToolError where KVM is wanted and does not."""
    if wanted == "tcg" or (wanted == "auto" and not kvm_runs(qemu)):
        return "tcg"
    if wanted == "kvm" and not kvm_runs(qemu):
        raise ToolError(
            "KVM does not run a guest on this host",
            file="/dev/kvm",
            remedy="Check that virtualisation is on, and that the user may use KVM; or choose tcg, the emulation.",
        )
    return "kvm"


def kvm_runs(qemu: str) -> bool:
    """Whether a guest without disks comes as far as its firmware's first words.

    That /dev/kvm can be opened says too little: in containers and nested hosts it may be there and not work.
    """
    command = [qemu, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-m", "64"]
    command += [*processor_options("kvm"), "-chardev", "stdio,id=firmware,signal=off"]
    command += ["-device", "isa-debugcon,iobase=0x402,chardev=firmware"]
    process = start_tool(bound_to_us(command), stdout=subprocess.PIPE)
    try:
        return _hears(t.cast("t.IO[bytes]", process.stdout).fileno())
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _hears(fd: int) -> bool:
    said = b""
    deadline = time.monotonic() + _TRIAL_SECONDS
    while select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
        data = os.read(fd, 4096)
        if not data:
            return False
        said += data
        if _SPOKE in said:
            return True
    return False


def processor_options(accelerator: str) -> list[str]:
    """QEMU's options for an accelerator and the processor that goes with it."""
    return ["-accel", accelerator, "-cpu", _CPUS[accelerator]]


def affordable_memory(wanted: int) -> int:
    """So many MiB of the wanted ones as the host has free. Raises: SpaceError where that is too little for a guest."""
    free = (_available_memory() - _RESERVE) // _MIB
    if free < _LEAST // _MIB:
        raise SpaceError(
            f"the host has only {max(0, free)} MiB of memory to spare",
            remedy="Boot the guest on another host, or end what needs the memory.",
        )
    return min(wanted, free)


def affordable_cores(wanted: int) -> int:
    """So many of the wanted processors as this process may use."""
    return min(wanted, len(os.sched_getaffinity(0)))


def _available_memory() -> int:
    """Bytes that can be had without swapping."""
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    raise ToolError("the kernel does not tell how much memory is free", file="/proc/meminfo")


__all__ = (
    "ACCELERATORS",
    "affordable_cores",
    "affordable_memory",
    "choose_accelerator",
    "kvm_runs",
    "processor_options",
)
