# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Copies of UEFI variables."""

from __future__ import annotations

import os
import pathlib

import pytest

from ansible_collections.vmbackup.vma.plugins.module_utils.host import nvram
from ansible_collections.vmbackup.vma.plugins.module_utils.host.domain import Domain
from ansible_collections.vmbackup.vma.plugins.module_utils.host.provider import Disk
from ansible_collections.vmbackup.vma.plugins.module_utils.vma import errors
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.host import domains, snapshots

SIZE = 540672


def found(path: pathlib.Path, image_format: str = "raw") -> Disk:
    return Disk("efidisk0", str(path), image_format)


@pytest.fixture
def raw(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "web_VARS.fd"
    path.write_bytes(os.urandom(SIZE))
    return path


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "run"
    path.mkdir()
    return path


def test_raw(raw: pathlib.Path, folder: pathlib.Path) -> None:
    copy = nvram.copy_nvram(found(raw), str(folder))
    assert copy == Disk("efidisk0", str(folder / "efidisk0"), "raw", SIZE, SIZE)
    assert (folder / "efidisk0").read_bytes() == raw.read_bytes()


def test_qcow2(raw: pathlib.Path, folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "web_VARS.qcow2"
    assert snapshots.qemu("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(path)).returncode == 0
    # the guest runs, so its QEMU has the file locked
    with snapshots.written_by_qemu(path, tmp_path):
        copy = nvram.copy_nvram(found(path, "qcow2"), str(folder))
    assert copy == Disk("efidisk0", str(folder / "efidisk0"), "raw", SIZE, SIZE)
    assert (folder / "efidisk0").read_bytes() == raw.read_bytes()
    assert os.listdir(folder) == ["efidisk0"]


def test_where_a_domain_has_them(raw: pathlib.Path) -> None:
    text = domains.DEBIAN.replace("/var/lib/libvirt/qemu/nvram/web_VARS.fd", str(raw))
    assert nvram.find_nvram(Domain.parse(text)) == Disk("efidisk0", str(raw), "raw", SIZE, SIZE)
    raw.unlink()
    assert nvram.find_nvram(Domain.parse(text)) is None  # libvirt has not made them yet


def test_variables_that_are_gone(tmp_path: pathlib.Path) -> None:
    with pytest.raises(errors.SourceError, match="cannot be read: No such file"):
        nvram.copy_nvram(found(tmp_path / "missing"), str(tmp_path))


def test_variables_that_never_stand_still_are_refused(folder: pathlib.Path) -> None:
    # it counts how often it is read
    path = pathlib.Path("/proc/self/io")
    with pytest.raises(errors.SourceError, match="change while they are being copied"):
        nvram.copy_nvram(found(path), str(folder))
    assert os.listdir(folder) == []


def test_a_file_that_is_too_large_is_refused(tmp_path: pathlib.Path, folder: pathlib.Path) -> None:
    path = tmp_path / "large"
    path.touch()
    os.truncate(path, (64 << 20) + 1)
    with pytest.raises(errors.SourceError, match="expected at most"):
        nvram.copy_nvram(found(path), str(folder))
