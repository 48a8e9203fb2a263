# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""virsh: what it says is understood, and what it is told is right."""

from __future__ import annotations

import os
import pathlib

import pytest

from ansible_collections.vmbackup.vma.plugins.module_utils.host import command, virsh
from ansible_collections.vmbackup.vma.plugins.module_utils.host.errors import GuestError
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.host import snapshots
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.host.snapshots import UUID, Libvirt, libvirt

__all__ = ("libvirt",)


@pytest.mark.parametrize(
    ("said", "state", "has_process", "is_starved"),
    [
        ("running (booted)\n", ("running", "booted"), True, False),
        ("running (unpaused)\n\n", ("running", "unpaused"), True, False),
        ("paused (user)\n", ("paused", "user"), True, False),
        ("paused (I/O error)\n", ("paused", "I/O error"), True, True),
        ("in shutdown (user)\n", ("in shutdown", "user"), True, False),
        ("crashed (panicked)\n", ("crashed", "panicked"), True, False),
        ("shut off (shutdown)\n", ("shut off", "shutdown"), False, False),
        ("shut off\n", ("shut off", ""), False, False),
    ],
)
def test_states(libvirt: Libvirt, said: str, state: tuple[str, str], has_process: bool, is_starved: bool) -> None:
    libvirt.answer("domstate", said)
    found = virsh.get_state(UUID)
    assert found == state
    assert (found.has_process, found.is_starved) == (has_process, is_starved)
    assert libvirt.told() == [f"domstate --reason --domain {UUID}"]


def test_a_domain_that_is_gone_is_no_error_and_a_libvirt_that_is_gone_is(libvirt: Libvirt) -> None:
    libvirt.answer("domstate", error=f"failed to get domain '{UUID}'")
    assert virsh.get_state(UUID) is None
    libvirt.answer("domstate", error="failed to connect to the hypervisor")
    with pytest.raises(command.CommandError, match="failed to connect to the hypervisor"):
        virsh.get_state(UUID)


def test_domains_by_name(libvirt: Libvirt, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = UUID.replace("1", "2")
    libvirt.answer("list", f" {UUID} web\n {other} my old web server\n\n")
    assert virsh.list_domains() == {"web": UUID, "my old web server": other}
    assert virsh.find_domain("my old web server") == other
    assert virsh.find_domain("old") is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert virsh.find_domain("web") is None


def test_it_asks_the_systems_libvirt_unless_told_otherwise(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "virsh").write_text('#!/bin/sh\necho "$2 $3 $LC_ALL"\n', encoding="ascii")
    (tmp_path / "virsh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("LIBVIRT_DEFAULT_URI", raising=False)
    assert virsh.dump_xml(UUID) == "-c qemu:///system C\n"
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", "qemu:///session")
    assert virsh.dump_xml(UUID) == "-c qemu:///session C\n"


def test_sizes(libvirt: Libvirt) -> None:
    libvirt.answer(
        "domblkinfo", "Capacity:       10737418240\nAllocation:     4294967296\nPhysical:       4295032832\n"
    )
    assert virsh.get_disk_size(UUID, "vda") == (10737418240, 4294967296)
    libvirt.answer("domblkinfo", "Capacity:       -\n")
    with pytest.raises(GuestError, match="does not tell the size of the disk vda"):
        virsh.get_disk_size(UUID, "vda")


def test_how_many_file_systems_were_frozen(libvirt: Libvirt) -> None:
    libvirt.answer("domfsfreeze", "Froze 12 filesystem(s)\n")
    assert virsh.freeze(UUID) == 12


def test_definitions(libvirt: Libvirt) -> None:
    virsh.dump_xml(UUID)
    virsh.dump_xml(UUID, inactive=True)
    virsh.dump_xml(UUID, inactive=True, secrets=True)
    assert [line.removeprefix(f"dumpxml --domain {UUID}") for line in libvirt.told()] == [
        "",
        " --inactive",
        " --inactive --security-info",
    ]


def test_a_backup_job_that_is_not_there(libvirt: Libvirt) -> None:
    for said in ("Requested operation is not valid: no domain backup job present", "domain is not running"):
        libvirt.answer("backup-dumpxml", error=said)
        assert virsh.describe_backup(UUID) is None
    libvirt.answer("backup-dumpxml", error="Timed out during operation: cannot acquire state change lock")
    with pytest.raises(command.CommandError):
        virsh.describe_backup(UUID)


def test_aborting_waits_until_the_job_is_gone(
    libvirt: Libvirt, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = "echo 'error: no domain backup job present' >&2; exit 1"
    looked = tmp_path / "looked"
    libvirt.script("backup-dumpxml", f"if [ -e {looked} ]; then {end}; fi; touch {looked}; echo '<domainbackup/>'")
    virsh.abort_backup(UUID)
    assert [line.split()[0] for line in libvirt.told()] == ["domjobabort", "backup-dumpxml", "backup-dumpxml"]
    libvirt.answer("backup-dumpxml", "<domainbackup/>\n")
    monkeypatch.setattr(virsh, "_JOB_TIMEOUT", 0.2)
    with pytest.raises(GuestError, match="does not end"):
        virsh.abort_backup(UUID)


def test_overlays_are_put_all_at_once_and_commas_are_quoted(libvirt: Libvirt) -> None:
    virsh.put_overlays(UUID, {"vda": "/scratch/a,b/vda.overlay", "vdb": "/scratch/vdb"}, ["vdc"])
    (line,) = libvirt.told()
    assert line == (
        f"snapshot-create-as --domain {UUID} --disk-only --atomic --no-metadata"
        " --diskspec vda,snapshot=external,file=/scratch/a,,b/vda.overlay"
        " --diskspec vdb,snapshot=external,file=/scratch/vdb --diskspec vdc,snapshot=no"
    )


def test_a_commit_that_is_not_under_way_need_not_be_ended(libvirt: Libvirt) -> None:
    for said in ("No active block job 'vda'", "internal error: no active operation", "block job 'drive' not found"):
        libvirt.answer("blockjob", error=said)
        virsh.abort_block_job(UUID, "vda")
    libvirt.answer("blockjob", error="failed to connect to the hypervisor")
    with pytest.raises(command.CommandError):
        virsh.abort_block_job(UUID, "vda")


def test_a_virsh_that_hangs_is_given_up(libvirt: Libvirt, monkeypatch: pytest.MonkeyPatch) -> None:
    libvirt.script("domfsfreeze", "exec sleep 600")
    monkeypatch.setattr(virsh, "_AGENT_TIMEOUT", 0.3)
    with pytest.raises(command.CommandError, match="no answer within"):
        virsh.freeze(UUID)


def test_the_owner_of_a_guest_that_is_not_there() -> None:
    assert virsh.get_process_owner(f"no-such-domain-{snapshots.RUN_ID}") is None
