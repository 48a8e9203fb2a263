# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""File names, files beside archives, and qemu-server.conf, as Proxmox VE has them."""

from __future__ import annotations

import pathlib
import time
import typing as t

import pytest

from ansible_collections.vmbackup.vma.plugins.module_utils.vma import vzdump
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.vma import helpers


@pytest.mark.parametrize(
    ("name", "vmid"),
    [
        ("vzdump-qemu-100-2024_02_29-23_59_58.vma", 100),
        ("vzdump-qemu-100-2024_02_29-23_59_58.vma.zst", 100),
        ("vzdump-qemu-100-2024_02_29-23_59_58.vma.gz", 100),
        ("vzdump-qemu-100-2024_02_29-23_59_58.vma.lzo", 100),
        ("vzdump-qemu-100-2024_02_29-23_59_58.vma.bz2", 100),
        ("vzdump-qemu-999999999-2024_02_29-23_59_58.vma", 999999999),
        ("/some/folder/vzdump-qemu-100-2024_02_29-23_59_58.vma", 100),
        ("vzdump-qemu-99-2024_02_29-23_59_58.vma", None),
        ("vzdump-qemu-1000000000-2024_02_29-23_59_58.vma", None),
        ("vzdump-lxc-100-2024_02_29-23_59_58.vma", None),
        ("vzdump-qemu-100-2024_02_29-23_59_58.tar", None),
        ("vzdump-qemu-100-2024_02_29-23_59_58.vma.xz", None),
        ("vzdump-qemu-100-2024_02_29-23_59_58.vma.zst.notes", None),
        ("vzdump-qemu-100-2024_02_29-23_59_58.vma\n", None),
        ("vzdump-qemu-100-2023_02_29-23_59_58.vma", None),
        ("vzdump-qemu-100-2024_13_01-23_59_58.vma", None),
        ("vzdump-qemu-100-2024_02_29-24_00_00.vma", None),
        ("vzdump-qemu-100-2024_2_29-23_59_58.vma", None),
        ("vzdump-qemu-\u0661\u0660\u0660-2024_02_29-23_59_58.vma", None),
        ("vzdump-qemu-100.vma", None),
        ("web.vma", None),
    ],
)
def test_standard_names(name: str, vmid: int | None) -> None:
    parsed = vzdump.parse_name(name)
    assert (None if parsed is None else parsed.vmid) == vmid
    if parsed is not None:
        assert parsed.timestamp == int(time.mktime((2024, 2, 29, 23, 59, 58, 0, 0, -1)))


@pytest.mark.parametrize(
    ("zone", "timestamp"), [("UTC", 1709251198), ("Europe/Vienna", 1709247598), ("XST-5", 1709233198)]
)
def test_names_have_local_time(zone: str, timestamp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        if zone == "Europe/Vienna" and time.timezone != -3600:
            pytest.skip("the time zone Europe/Vienna is not installed (package tzdata)")
        assert vzdump.parse_name("vzdump-qemu-100-2024_02_29-23_59_58.vma") == vzdump.StandardName(100, timestamp)
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("a.vma", True),
        ("a.vma.gz", True),
        ("a.vma.zst", True),
        ("a.vma.lzo", True),
        ("a.vma.bz2", True),
        (".a.vma", False),
        (".vma", False),
        (".a.vma.0123456789abcdef.vma-part", False),
        ("a.vma.notes", False),
        ("a.vma.zst.protected", False),
        ("a.vma.xz", False),
        ("a.log", False),
        ("a.vmax", False),
        ("avma", False),
    ],
)
def test_archive_names(name: str, meant: bool) -> None:
    assert vzdump.is_archive_name(name) == meant


@pytest.mark.parametrize(
    ("content", "notes"),
    [
        (None, None),
        (b"", ""),
        (b"before the upgrade\n", "before the upgrade"),
        (b"first\nsecond\n\n", "first\nsecond"),
        ("für später".encode(), "für später"),
        (b"\xff", "\ufffd"),
    ],
)
def test_notes(content: bytes | None, notes: str | None, tmp_path: pathlib.Path) -> None:
    if content is not None:
        (tmp_path / "a.vma.zst.notes").write_bytes(content)
    assert vzdump.read_notes(str(tmp_path / "a.vma.zst")) == notes


def test_protection(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.vma"
    assert not vzdump.is_protected(str(path))
    (tmp_path / "a.vma.protected").touch()
    assert vzdump.is_protected(str(path))


def test_the_config_of_the_vectors() -> None:
    vm = vzdump.parse_config((helpers.VECTORS / "qemu-server.conf").read_bytes())
    assert vm["name"]
    assert vm["memory"] > 0
    assert [disk for disk in vm["disks"] if disk.get("device")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {"name": None, "memory": None, "description": None, "disks": []}),
        ("name: web\nmemory: 2048\ncores: 4\n", {"name": "web", "memory": 2048, "cores": 4}),
        ("memory: current=4096\n", {"memory": None}),
        ("#a note\n#second line\nname: web\n", {"description": "a note\nsecond line", "name": "web"}),
        (
            "#qmdump#map:scsi0:drive-scsi0:local-lvm:raw:\nscsi0: local-lvm:vm-100-disk-0,size=8G\n",
            {
                "description": None,
                "disks": [
                    {
                        "drive": "scsi0",
                        "setting": "local-lvm:vm-100-disk-0,size=8G",
                        "device": "drive-scsi0",
                        "storage": "local-lvm",
                        "format": "raw",
                    }
                ],
            },
        ),
        (
            "#qmdump#map:tpmstate0:drive-tpmstate0-backup:::\n",
            {
                "disks": [
                    {
                        "drive": "tpmstate0",
                        "setting": None,
                        "device": "drive-tpmstate0-backup",
                        "storage": "local",
                        "format": "raw",
                    }
                ]
            },
        ),
        # without its last colon it is no map line
        ("#qmdump#map:scsi0:drive-scsi0:local:raw\n", {"disks": []}),
        ("ide2: none,media=cdrom\n", {"disks": [{"drive": "ide2", "setting": "none,media=cdrom"}]}),
        ("name: now\n[before]\nname: then\nmemory: 1\n", {"name": "now", "memory": None}),
        ("name: web\n\n[PENDING]\nmemory: 5\n#qmdump#map:scsi0:d:::\n", {"memory": None, "disks": []}),
        ("name: web\r\nmemory: 5\r\n", {"name": "web", "memory": 5}),
        ("no setting at all\n: x\nname:\n", {"name": None}),
        ("scsihw: virtio-scsi-single\nnet0: virtio\n", {"scsihw": "virtio-scsi-single", "disks": []}),
    ],
)
def test_configs(text: str, expected: dict[str, t.Any]) -> None:
    vm = vzdump.parse_config(text.encode())
    assert {key: vm[key] for key in expected} == expected


def test_a_config_of_any_bytes_is_survived() -> None:
    assert vzdump.parse_config(bytes(range(256)) * 3)["name"] is None


def test_a_line_of_colons_takes_no_time() -> None:
    began = time.monotonic()
    config = vzdump.parse_config(b"#qmdump#map:" + b":" * 60000 + b"x")
    assert config["disks"] == []
    assert time.monotonic() - began < 5
