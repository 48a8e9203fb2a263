# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The throw-away machine: its command line, its firmware, its processor, and pictures of its screen."""

from __future__ import annotations

import json
import os
import pathlib
import stat
import struct
import typing as t
import zlib

import pytest

from ansible_collections.vmbackup.vma.plugins.module_utils.host import accelerator, firmware, picture
from ansible_collections.vmbackup.vma.plugins.module_utils.host.qemu_command import (
    SCSI_CONTROLLERS,
    Flash,
    Machine,
    Node,
    build_options,
    choose_type,
)
from ansible_collections.vmbackup.vma.plugins.module_utils.vma.errors import RequestError, SpaceError, ToolError

LISTED = "Supported machines are:\npc   Standard PC (alias of pc-i440fx-7.2)\npc-i440fx-7.2  x\npc-q35-7.2  x\nq35 x\n"


def _options(machine: Machine, nodes: t.Sequence[Node] = (), flash: t.Sequence[Flash] = ()) -> list[str]:
    return build_options(machine, ["-accel", "tcg"], nodes, flash, "/scratch/pid")


def _values(options: list[str], name: str) -> list[str]:
    return [options[place + 1] for place, option in enumerate(options) if option == name]


def test_there_is_no_network() -> None:
    options = _options(Machine("pc", 256, 1, ["virtio"]))
    assert _values(options, "-nic") == ["none"]
    assert "-netdev" not in options


def test_a_port_is_reached_from_this_host_alone_and_nothing_from_inside() -> None:
    options = _options(Machine("pc", 256, 1, ["virtio"], port=22, network_card="e1000"))
    assert _values(options, "-netdev") == ["user,id=net,restrict=on,ipv6=off,hostfwd=tcp:127.0.0.1:0-:22"]
    assert "e1000,netdev=net,romfile=" in _values(options, "-device")


def test_disks_are_only_read() -> None:
    nodes = [
        Node("/disks/a,b.raw", "raw", False, "/scratch/disk0"),
        Node("/dev/vg/lv", "qcow2", True, "/scratch/disk1"),
    ]
    options = _options(Machine("pc", 256, 1, ["virtio", "scsi"]), nodes)
    first, second = map(json.loads, _values(options, "-blockdev"))
    for node, layer in zip(nodes, (first, second)):
        assert (layer["driver"], layer["file"]["filename"]) == ("qcow2", node.overlay)
        assert layer["backing"]["read-only"] is layer["backing"]["file"]["read-only"] is True
        assert (layer["backing"]["driver"], layer["backing"]["file"]["filename"]) == (node.format, node.path)
    assert [layer["backing"]["file"]["driver"] for layer in (first, second)] == ["file", "host_device"]


def test_the_firmware_is_only_read_and_its_variables_are_not() -> None:
    flash = [Flash("/usr/share/code", "raw", True), Flash("/scratch/efi-vars", "raw", False)]
    options = _options(Machine("q35", 256, 1, ["virtio"]), [], flash)
    assert [json.loads(node)["read-only"] for node in _values(options, "-blockdev")] == [True, False]
    assert _values(options, "-machine") == ["q35,pflash0=flash0,pflash1=flash1,graphics=off"]


def test_disks_are_tried_in_their_order() -> None:
    options = _options(Machine("pc", 256, 1, ["ide", "scsi", "sata", "virtio", "ide", "ide"]))
    assert [device for device in _values(options, "-device") if "drive=" in device] == [
        "ide-hd,bus=ide.0,unit=0,drive=disk0,bootindex=0",
        "scsi-hd,bus=scsi.0,scsi-id=0,drive=disk1,bootindex=1",
        "ide-hd,bus=sata.0,drive=disk2,bootindex=2",
        "virtio-blk-pci,drive=disk3,bootindex=3",
        "ide-hd,bus=ide.0,unit=1,drive=disk4,bootindex=4",
        "ide-hd,bus=ide.1,unit=0,drive=disk5,bootindex=5",
    ]


def test_disks_that_are_not_to_boot_are_there_all_the_same() -> None:
    options = _options(Machine("pc", 256, 1, ["virtio", "scsi"], not_booted=[0]))
    assert [device for device in _values(options, "-device") if "drive=" in device] == [
        "virtio-blk-pci,drive=disk0",
        "scsi-hd,bus=scsi.0,scsi-id=0,drive=disk1,bootindex=1",
    ]


@pytest.mark.parametrize("name", SCSI_CONTROLLERS)
def test_scsi_controllers(name: str) -> None:
    options = _options(Machine("pc", 256, 1, ["scsi", "scsi"], scsi_controller=name))
    assert f"{SCSI_CONTROLLERS[name]},id=scsi" in _values(options, "-device")


@pytest.mark.parametrize(
    ("bus", "controller", "limit"),
    [("virtio", "lsi", 16), ("scsi", "virtio-scsi-pci", 16), ("scsi", "lsi", 7), ("sata", "lsi", 6), ("ide", "lsi", 4)],
)
def test_a_bus_has_its_limit(bus: str, controller: str, limit: int) -> None:
    _options(Machine("q35", 256, 1, [bus] * limit, scsi_controller=controller))
    with pytest.raises(RequestError, match=f"at most {limit} disks on the bus {bus}, got {limit + 1}"):
        _options(Machine("q35", 256, 1, [bus] * (limit + 1), scsi_controller=controller))


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        ("pc-q35-7.2", "pc-q35-7.2"),
        ("pc-q35-7.2+pve0", "pc-q35-7.2"),
        ("pc-q35-9.0", "q35"),
        ("q35,viommu=intel", "q35"),
        ("pc-i440fx-9.2+pve1", "pc"),
    ],
)
def test_machine_types(wanted: str, chosen: str) -> None:
    assert choose_type(wanted, LISTED) == chosen


def test_a_machine_type_of_another_family() -> None:
    with pytest.raises(RequestError, match=r"family pc or q35, got virt-7\.2"):
        choose_type("virt-7.2", LISTED)


# --- firmware ---------------------------------------------------------------------------------------------------------


def _volume(length: int, mark: bytes = b"_FVH") -> bytes:
    return struct.pack("<16x16xQ4s", length, mark).ljust(length, b"\xff")


@pytest.mark.parametrize("size", [0x84000, 0x20000])
@pytest.mark.parametrize("more", [0, 4096])
def test_variables_tell_their_size(tmp_path: pathlib.Path, size: int, more: int) -> None:
    path = tmp_path / "efi-vars"
    path.write_bytes(_volume(size) + bytes(more))
    assert firmware.variables_size(str(path)) == size


@pytest.mark.parametrize(
    "data", [b"", bytes(0x84000), _volume(0x84000, b"XFVH"), _volume(0x40000), _volume(0x84000)[:-1]]
)
def test_what_are_no_variables(tmp_path: pathlib.Path, data: bytes) -> None:
    path = tmp_path / "efi-vars"
    path.write_bytes(data)
    with pytest.raises(RequestError, match="expected EFI variables"):
        firmware.variables_size(str(path))


@pytest.fixture
def places(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> dict[int, list[pathlib.Path]]:
    """A host that has firmware of both sizes, made up."""
    made = {}
    for size in (0x84000, 0x20000):
        made[size] = [tmp_path / f"code-{size}.qcow2", tmp_path / f"vars-{size}.fd"]
        for path in made[size]:
            path.write_bytes(_volume(size))
    table = tuple((size, str(code), str(variables)) for size, (code, variables) in made.items())
    monkeypatch.setattr(firmware, "PLACES", (((0x84000, "/nonexistent/code", "/nonexistent/vars")), *table))
    return made


@pytest.mark.parametrize("size", [0x84000, 0x20000])
def test_firmware_that_fits(places: dict[int, list[pathlib.Path]], tmp_path: pathlib.Path, size: int) -> None:
    own = tmp_path / "own"
    own.write_bytes(_volume(size) + b"beyond")
    found = firmware.find_firmware(str(own))
    assert (found.code, found.code_format) == (str(places[size][0]), "qcow2")
    assert (found.variables, found.variables_format) == (str(own), "raw")
    copy = tmp_path / "copy"
    with copy.open("wb") as file:
        firmware.copy_variables(found, file)
    assert copy.read_bytes() == _volume(size)


def test_empty_variables(places: dict[int, list[pathlib.Path]], tmp_path: pathlib.Path) -> None:
    found = firmware.find_firmware(None)
    assert (found.code, found.variables) == tuple(map(str, places[0x84000]))
    copy = tmp_path / "copy"
    with copy.open("wb") as file:
        firmware.copy_variables(found, file)
    assert copy.read_bytes() == places[0x84000][1].read_bytes()


def test_no_firmware_that_fits(places: dict[int, list[pathlib.Path]], tmp_path: pathlib.Path) -> None:
    own = tmp_path / "own"
    own.write_bytes(_volume(0x20000))
    places[0x20000][0].unlink()
    with pytest.raises(
        ToolError, match=r"with 2 MiB of flash memory.* Install the package ovmf .*, or leave out efi_vars"
    ):
        firmware.find_firmware(str(own))
    places[0x84000][1].unlink()
    with pytest.raises(ToolError, match="UEFI firmware is needed"):
        firmware.find_firmware(None)


# --- the host ---------------------------------------------------------------------------------------------------------


def _fake_qemu(folder: pathlib.Path, script: str) -> str:
    path = folder / "qemu"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.mark.parametrize(
    ("script", "runs"),
    [
        ("echo 'SeaBIOS (version 1.16)'; exec sleep 60", True),
        ("echo 'failed to initialize kvm: No such device' >&2; exit 1", False),
        ("exec sleep 60", False),  # it starts, and its processor never does
    ],
)
def test_kvm_is_tried(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, script: str, runs: bool) -> None:
    monkeypatch.setattr(accelerator, "_TRIAL_SECONDS", 10.0 if runs else 0.5)
    qemu = _fake_qemu(tmp_path, script)
    assert accelerator.kvm_runs(qemu) is runs
    assert accelerator.choose_accelerator(qemu, "auto") == ("kvm" if runs else "tcg")
    assert accelerator.choose_accelerator(qemu, "tcg") == "tcg"
    if not runs:
        with pytest.raises(ToolError, match="KVM does not run a guest"):
            accelerator.choose_accelerator(qemu, "kvm")


def test_a_guest_gets_no_more_than_the_host_has(monkeypatch: pytest.MonkeyPatch) -> None:
    assert accelerator.affordable_memory(1) == 1
    assert 64 <= accelerator.affordable_memory(1 << 40) < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
    assert accelerator.affordable_cores(1 << 20) == len(os.sched_getaffinity(0))
    monkeypatch.setattr(accelerator, "_RESERVE", 1 << 60)
    with pytest.raises(SpaceError, match="only 0 MiB of memory"):
        accelerator.affordable_memory(64)


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_a_picture() -> None:
    png = picture.png_from_ppm(b"P6\n2 3\n255\n" + bytes(range(18)))
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert png[8:33] == struct.pack(">I4sIIBBBBBI", 13, b"IHDR", 2, 3, 8, 2, 0, 0, 0, zlib.crc32(png[12:29]))
    (length,) = struct.unpack(">I", png[33:37])
    rows = zlib.decompress(png[41 : 41 + length])
    assert rows == b"\0" + bytes(range(6)) + b"\0" + bytes(range(6, 12)) + b"\0" + bytes(range(12, 18))
    assert png.endswith(b"\0\0\0\0IEND\xae\x42\x60\x82")


@pytest.mark.parametrize("data", [b"", b"P5\n1 1\n255\nx", b"P6\n2 2\n255\n" + bytes(11)])
def test_what_is_no_picture(data: bytes) -> None:
    with pytest.raises(ToolError, match="QEMU's picture"):
        picture.png_from_ppm(data)
