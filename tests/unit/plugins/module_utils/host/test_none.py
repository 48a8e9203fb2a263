# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Disks that are at rest."""

from __future__ import annotations

import os
import pathlib
import typing as t

import pytest

from ansible_collections.vmbackup.vma.plugins.module_utils.host.journal import Step
from ansible_collections.vmbackup.vma.plugins.module_utils.host.none import AtRest
from ansible_collections.vmbackup.vma.plugins.module_utils.host.provider import OFFLINE, Disk, Frozen, Work
from ansible_collections.vmbackup.vma.plugins.module_utils.vma import errors
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.host import snapshots
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.vma.conftest import MakeLoop, make_loop
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.vma.helpers import need_tool

__all__ = ("make_loop",)

MIB = 1 << 20


@pytest.fixture
def raw(tmp_path: pathlib.Path) -> pathlib.Path:
    """4 MiB, of which one is data."""
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.write(os.urandom(MIB))
        file.truncate(4 * MIB)
    return path


@pytest.fixture
def work(tmp_path: pathlib.Path) -> t.Iterator[tuple[Work, list[int]]]:
    """What a provider works with, and what it was given to hold."""
    held: list[int] = []
    with snapshots.open_journal(tmp_path / "journals") as kept:
        yield Work(kept, "0badcafe", str(tmp_path), snapshots.stand_still, lambda fd: held.append(os.dup(fd))), held
        for fd in held:
            os.close(fd)


def test_they_are_read_in_place_and_held(
    raw: pathlib.Path, make_loop: MakeLoop, tmp_path: pathlib.Path, work: tuple[Work, list[int]]
) -> None:
    need_tool("qemu-img")
    qcow2, device = tmp_path / "disk.qcow2", make_loop(2 * MIB)
    assert snapshots.qemu("qemu-img", "create", "-f", "qcow2", str(qcow2), "1G").returncode == 0
    provider = AtRest([Disk("scsi0", str(raw)), Disk("scsi1", str(qcow2), "qcow2"), Disk("scsi2", device)])
    planned = provider.plan()
    assert snapshots.write_by_qemu(raw) == ""  # the plan holds nothing
    frozen = provider.freeze(work[0])
    expected = [
        Disk("scsi0", str(raw), "raw", 4 * MIB, raw.stat().st_blocks * 512),
        Disk("scsi1", str(qcow2), "qcow2", None, qcow2.stat().st_blocks * 512),
        Disk("scsi2", device, "raw", 2 * MIB, 2 * MIB),
    ]
    assert planned == frozen == Frozen(expected, "read in place", OFFLINE)
    assert MIB <= expected[0].allocated < 2 * MIB  # type: ignore[operator]
    assert len(work[1]) == 3
    assert "lock" in snapshots.write_by_qemu(raw)
    assert "lock" in snapshots.write_by_qemu(qcow2, "qcow2")
    assert work[0].journal.steps == [Step("at-rest", {"path": device})]


def test_one_that_a_vm_writes_to_is_refused(
    raw: pathlib.Path, tmp_path: pathlib.Path, work: tuple[Work, list[int]]
) -> None:
    other = tmp_path / "other.raw"
    other.write_bytes(bytes(MIB))
    provider = AtRest([Disk("scsi0", str(other)), Disk("scsi1", str(raw))])
    with snapshots.written_by_qemu(raw, tmp_path):
        for attempt in (provider.plan, lambda: provider.freeze(work[0])):
            with pytest.raises(errors.SourceError, match="a running VM writes to this image") as caught:
                attempt()
            assert caught.value.file == str(raw)


def test_it_is_never_chosen_by_itself(raw: pathlib.Path) -> None:
    assert not AtRest.fits(str(raw))
