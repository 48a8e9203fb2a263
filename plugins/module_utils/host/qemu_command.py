# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The throw-away machine that a guest is booted on, as QEMU's command line. Pure: nothing is looked at or started."""

from __future__ import annotations

import dataclasses
import json
import typing as t

from ..vma.errors import RequestError

BUSES: dict[str, int] = {"virtio": 16, "scsi": 16, "sata": 6, "ide": 4}
"""How disks can be attached, and how many of each."""
SCSI_CONTROLLERS: dict[str, str] = {
    "virtio-scsi-pci": "virtio-scsi-pci",
    "virtio-scsi-single": "virtio-scsi-pci",
    "lsi": "lsi53c895a",
    "lsi53c810": "lsi53c810",
    "megasas": "megasas",
    "pvscsi": "pvscsi",
}
"""What Proxmox VE calls them, and QEMU."""
_FEW_TARGETS = ("lsi", "lsi53c810")
"""Controllers with no more than seven disks."""
NETWORK_CARDS: dict[str, str] = {
    "virtio": "virtio-net-pci",
    "e1000": "e1000",
    "e1000e": "e1000e",
    "rtl8139": "rtl8139",
    "vmxnet3": "vmxnet3",
}
MONITOR_FD, CONSOLE_FD = 0, 1
"""The descriptors on which QEMU finds its connections to us, so that no socket lies about."""
AGENT_BUS = "agent-bus.0"


@dataclasses.dataclass(frozen=True)
class Disk:
    """A disk of the guest: an image or a block device. The firmware tries it if C(boot)."""

    path: str
    format: str = "raw"
    bus: str = "virtio"
    boot: bool = True


@dataclasses.dataclass(frozen=True)
class Node:
    """Where QEMU finds a disk's bytes: C(overlay) takes what is written, C(path) is only read."""

    path: str
    format: str
    is_block: bool
    overlay: str


@dataclasses.dataclass(frozen=True)
class Flash:
    """A part of the UEFI firmware."""

    path: str
    format: str
    read_only: bool


@dataclasses.dataclass(frozen=True)
class Machine:
    """The hardware, as far as it does not depend on the host. C(memory) is in MiB, C(port) one inside the guest.

    C(not_booted) are disks that the firmware does not try, by their numbers from 0 on.
    """

    type: str
    memory: int
    cores: int
    buses: t.Sequence[str]
    not_booted: t.Collection[int] = ()
    scsi_controller: str = "virtio-scsi-pci"
    network_card: str = "virtio"
    port: int | None = None
    with_agent: bool = False


def build_options(
    machine: Machine, processor: t.Sequence[str], nodes: t.Sequence[Node], flash: t.Sequence[Flash], pid_file: str
) -> list[str]:
    """QEMU's options. It starts with the guest halted, and is told to go on by its monitor.

    Raises: RequestError where there are more disks than the buses take.
    """
    options = ["-nodefaults", "-no-user-config", "-name", "vmbackup-vma", "-S", "-pidfile", pid_file]
    options += [*processor, "-m", str(machine.memory), "-smp", str(machine.cores)]
    settings = [machine.type]
    for number, part in enumerate(flash):
        options += ["-blockdev", json.dumps(_flash_node(number, part))]
        settings.append(f"pflash{number}=flash{number}")
    # Without it SeaBIOS and the boot loaders that use it write to the screen alone. OVMF writes to both by itself.
    settings.append("graphics=off")
    options += ["-machine", ",".join(settings), "-display", "none", "-vga", "std", "-device", "pvpanic"]
    options += ["-chardev", f"socket,id=monitor,fd={MONITOR_FD}", "-mon", "chardev=monitor,mode=control"]
    options += ["-chardev", f"socket,id=console,fd={CONSOLE_FD}", "-serial", "chardev:console"]
    for number, node in enumerate(nodes):
        options += ["-blockdev", json.dumps(_disk_node(number, node))]
    for device in _disk_devices(machine):
        options += ["-device", device]
    if machine.with_agent:
        options += ["-device", "virtio-serial-pci,id=agent-bus"]
    return [*options, *_network(machine)]


def _flash_node(number: int, part: Flash) -> dict[str, t.Any]:
    return {
        "driver": part.format,
        "node-name": f"flash{number}",
        "read-only": part.read_only,
        "file": {"driver": "file", "filename": part.path},
    }


def _disk_node(number: int, node: Node) -> dict[str, t.Any]:
    protocol = "host_device" if node.is_block else "file"
    return {
        "driver": "qcow2",
        "node-name": f"disk{number}",
        # What the guest writes is thrown away, so it need never reach the storage.
        "cache": {"no-flush": True},
        "discard": "unmap",
        "file": {"driver": "file", "filename": node.overlay, "cache": {"no-flush": True}},
        "backing": {
            "driver": node.format,
            "read-only": True,
            "file": {"driver": protocol, "filename": node.path, "read-only": True},
        },
    }


def _disk_devices(machine: Machine) -> list[str]:
    """The controllers that the disks need, and the disks; the firmware tries them in their order."""
    limits = dict(BUSES)
    if machine.scsi_controller in _FEW_TARGETS:
        limits["scsi"] = 7
    controllers: list[str] = []
    disks: list[str] = []
    counts = dict.fromkeys(BUSES, 0)
    for number, bus in enumerate(machine.buses):
        place = counts[bus]
        counts[bus] += 1
        if counts[bus] > limits[bus]:
            raise RequestError(
                f"expected at most {limits[bus]} disks on the bus {bus}, got {list(machine.buses).count(bus)}",
                remedy="Attach some of them to another bus.",
            )
        if place == 0 and bus == "scsi":
            controllers.append(f"{SCSI_CONTROLLERS[machine.scsi_controller]},id=scsi")
        if place == 0 and bus == "sata":
            controllers.append("ich9-ahci,id=sata")
        index = "" if number in machine.not_booted else f",bootindex={number}"
        disks.append(f"{_disk_device(machine, bus, place)},drive=disk{number}{index}")
    return controllers + disks


def _disk_device(machine: Machine, bus: str, place: int) -> str:
    if bus == "virtio":
        return "virtio-blk-pci"
    if bus == "scsi":
        return f"scsi-hd,bus=scsi.0,scsi-id={place}"
    if bus == "sata":
        return f"ide-hd,bus=sata.{place}"
    # A q35 has no IDE; its own SATA controller is found by every guest that finds IDE disks on a q35.
    return f"ide-hd,bus=ide.{place}" if "q35" in machine.type else f"ide-hd,bus=ide.{place // 2},unit={place % 2}"


def _network(machine: Machine) -> list[str]:
    """No network; or one in which nothing but one port inside can be reached, and nothing from inside."""
    if machine.port is None:
        return ["-nic", "none"]
    forward = f"hostfwd=tcp:127.0.0.1:0-:{machine.port}"
    card = f"{NETWORK_CARDS[machine.network_card]},netdev=net,romfile="
    return ["-netdev", f"user,id=net,restrict=on,ipv6=off,{forward}", "-device", card]


def choose_type(wanted: str, known: str) -> str:
    """The machine type to use: the wanted one if QEMU knows it, else the newest of its family.

    C(known) is what QEMU lists. Proxmox VE's own endings (C(+pve0)) and options are dropped.

    Raises: RequestError for a type that is of no known family.
    """
    plain = wanted.split(",", 1)[0].split("+", 1)[0]
    if plain in [line.split(" ", 1)[0] for line in known.splitlines()]:
        return plain
    if "q35" in plain:
        return "q35"
    if plain.startswith("pc"):
        return "pc"
    raise RequestError(
        f"expected a machine type of the family pc or q35, got {wanted}", remedy="See qemu-system-x86_64 -machine help."
    )


__all__ = (
    "AGENT_BUS",
    "BUSES",
    "CONSOLE_FD",
    "MONITOR_FD",
    "NETWORK_CARDS",
    "SCSI_CONTROLLERS",
    "Disk",
    "Flash",
    "Machine",
    "Node",
    "build_options",
    "choose_type",
)
