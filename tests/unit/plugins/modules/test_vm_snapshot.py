# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The module vm_snapshot: what it returns, in check mode as well, and how it fails."""

from __future__ import annotations

import functools
import inspect
import os
import pathlib
import typing as t

import pytest
import yaml

from ansible_collections.vmbackup.vma.plugins.module_utils.host import machine, snapshot, stand_still
from ansible_collections.vmbackup.vma.plugins.module_utils.vma import qemu
from ansible_collections.vmbackup.vma.plugins.modules import vm_snapshot
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.host import snapshots
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.host.snapshots import UUID, Libvirt, libvirt
from ansible_collections.vmbackup.vma.tests.unit.plugins.modules.helpers import Result, Run

__all__ = ("libvirt",)

_PRESENT = (
    *("changed", "cleared", "config", "consistency", "devices", "disks", "id", "method", "provider", "unmapped"),
    "vmid",
)
_XML = """<domain type='kvm'>
  <name>web</name><uuid>{uuid}</uuid><memory unit='KiB'>2097152</memory><vcpu>1</vcpu>
  <os><type arch='x86_64' machine='pc'>hvm</type></os>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw'/><source file='{disk}'/><target dev='vda' bus='virtio'/>
    </disk>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw'/><source file='{disk}.other'/><target dev='vdb' bus='virtio'/>
    </disk>
    <hostdev mode='subsystem' type='pci'>
      <source><address domain='0x0000' bus='0x01' slot='0x00' function='0x0'/></source>
    </hostdev>
  </devices>
</domain>
"""


@pytest.fixture
def journals(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, libvirt: Libvirt) -> t.Iterator[pathlib.Path]:
    """The journals lie with the test, and libvirt knows no domain."""
    folder = tmp_path / "journals"
    libvirt.answer("list")
    monkeypatch.setattr(vm_snapshot, "Request", functools.partial(machine.Request, journals=str(folder)))
    for name in ("let_go", "describe_leftovers"):
        monkeypatch.setattr(vm_snapshot, name, functools.partial(getattr(vm_snapshot, name), journals=str(folder)))
    yield folder
    snapshot.let_go("web", journals=str(folder))


@pytest.fixture
def options(image: pathlib.Path) -> dict[str, t.Any]:
    """A VM with a disk at rest."""
    return {"name": "web", "provider": "none", "disks": [{"name": "scsi0", "path": str(image)}]}


def assert_documented(result: Result) -> None:
    """Each value has a place, and the type, that RETURN tells."""
    types: dict[str, t.Any] = {"str": str, "list": list, "dict": dict, "int": int}
    documented = yaml.safe_load(vm_snapshot.RETURN)
    for name, value in result.data.items():
        if name in ("changed", "invocation"):
            continue
        assert value is None or isinstance(value, types[documented[name]["type"]]), name
        if documented[name].get("elements") == "dict" and "contains" in documented[name]:
            assert all(entry.keys() == documented[name]["contains"].keys() for entry in value or []), name


def test_present_and_absent(run: Run, options: dict[str, t.Any], image: pathlib.Path, journals: pathlib.Path) -> None:
    result = run(vm_snapshot, **options)
    assert_documented(result)
    assert sorted(result.data.keys() - {"invocation"}) == sorted(_PRESENT)
    size = image.stat().st_size
    allocated = image.stat().st_blocks * 512
    assert result["disks"] == [
        {"name": "scsi0", "path": str(image), "format": "raw", "size": size, "allocated": allocated}
    ]
    assert result["devices"] == [{"name": "drive-scsi0", "path": str(image), "format": "raw"}]
    assert (result["provider"], result["method"], result["consistency"]) == ("none", "read in place", "offline")
    assert (result["config"], result["vmid"], result["unmapped"], result["cleared"]) == (None, None, [], [])
    assert len(bytes.fromhex(result["id"])) == 4
    assert "lock" in snapshots.write_by_qemu(image)
    gone = run(vm_snapshot, name="web", state="absent", id=result["id"])
    assert_documented(gone)
    assert (gone["removed"], gone["trouble"]) == ([], None)
    assert snapshots.write_by_qemu(image) == ""
    assert os.listdir(journals) == []
    assert run(vm_snapshot, name="web", state="absent")["changed"] is False


def test_check_mode_touches_nothing(
    run: Run, options: dict[str, t.Any], image: pathlib.Path, journals: pathlib.Path
) -> None:
    result = run(vm_snapshot, check=True, **options)
    assert_documented(result)
    assert (result["changed"], result["id"], result["disks"][0]["size"]) == (True, "", image.stat().st_size)
    assert not journals.exists()
    assert snapshots.write_by_qemu(image) == ""


def test_check_mode_tells_what_would_be_removed(run: Run, tmp_path: pathlib.Path, journals: pathlib.Path) -> None:
    folder = tmp_path / "vmbackup-vma-0badcafe"
    folder.mkdir()
    with snapshots.open_journal(journals) as kept:
        kept.begin(id="0badcafe")
        kept.add("folder", path=str(folder))
    for options in ({}, {"id": "0badcafe"}):
        result = run(vm_snapshot, check=True, name="web", state="absent", **options)
        assert (result["changed"], result["removed"]) == (True, [f"folder {folder}"])
    assert run(vm_snapshot, check=True, name="web", state="absent", id="ffffffff")["changed"] is False
    assert folder.is_dir()
    result = run(vm_snapshot, name="web", state="absent")
    assert (result["changed"], result["removed"]) == (True, [f"the folder {folder}"])
    assert not folder.exists()


def test_a_vm_that_another_run_has(run: Run, options: dict[str, t.Any], journals: pathlib.Path) -> None:
    first = run(vm_snapshot, **options)
    assert len(list(journals.glob("*.json"))) == 1
    result = run(vm_snapshot, fails=True, **options)
    assert result["error"]["kind"] == "busy"
    assert result["error"]["message"].startswith("another run has frozen the disks of web, since ")
    assert "state=absent" in result["error"]["remedy"]
    assert result["msg"].endswith(result["error"]["remedy"])
    stranger = run(vm_snapshot, name="web", state="absent", id="ffffffff")
    assert (stranger["changed"], "is gone" in stranger["trouble"]) == (False, True)
    assert run(vm_snapshot, name="web", state="absent", id=first["id"])["trouble"] is None


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({"disks": [{"name": "scsi0", "path": "/nonexistent/disk"}]}, "source", "No such file"),
        ({"provider": "libvirt"}, "request", "libvirt knows no domain web"),
        ({"provider": "auto", "disks": [{"name": "a", "path": "/dev/null"}]}, "request", "no one provider fits"),
        ({"timeout": 0}, "request", "expected a number above 0 for timeout"),
        ({"idle_timeout": -1}, "request", "expected a number above 0 for idle_timeout"),
    ],
)
@pytest.mark.parametrize("check", [False, True])
def test_errors(
    run: Run,
    options: dict[str, t.Any],
    journals: pathlib.Path,
    changes: dict[str, t.Any],
    kind: str,
    said: str,
    check: bool,
) -> None:
    result = run(vm_snapshot, check=check, fails=True, **{**options, **changes})
    assert result["error"]["kind"] == kind
    assert said in result["error"]["message"]
    documented = yaml.safe_load(vm_snapshot.RETURN)["error"]["contains"]
    assert result["error"].keys() <= documented.keys()
    assert f"V({kind})" in documented["kind"]["description"]
    assert not journals.exists() or os.listdir(journals) == []


def test_a_domain_that_is_off(
    run: Run, image: pathlib.Path, tmp_path: pathlib.Path, journals: pathlib.Path, libvirt: Libvirt
) -> None:
    assert not journals.exists()
    libvirt.answer("list", f"{UUID} web\n")
    libvirt.answer("domstate", "shut off (shutdown)\n")
    libvirt.answer("dumpxml", _XML.format(uuid=UUID, disk=image))
    libvirt.answer("domblkinfo", f"Capacity: {image.stat().st_size}\nAllocation: 4096\n")
    (tmp_path / "disk.raw.other").touch()
    result = run(vm_snapshot, name="web", exclude_disks=["vdb"], vmid=123, storage="fast")
    assert_documented(result)
    assert (result["provider"], result["consistency"], result["vmid"]) == ("libvirt", "offline", 123)
    assert [disk["name"] for disk in result["disks"]] == ["virtio0"]
    assert "name: web\n" in result["config"]
    assert "virtio0: fast:" in result["config"]
    assert "memory: 2048\n" in result["config"]
    assert any("01:00.0" in sentence for sentence in result["unmapped"])
    assert "lock" in snapshots.write_by_qemu(image)
    assert snapshots.write_by_qemu(tmp_path / "disk.raw.other") != ""  # it is empty, and not locked
    unknown = run(vm_snapshot, fails=True, name="web", exclude_disks=["sdz"])
    assert (unknown["error"]["kind"], "virtio1 (vdb)" in unknown["msg"]) == ("request", True)


def test_the_documentation_is_that_of_the_options() -> None:
    documented = yaml.safe_load(vm_snapshot.DOCUMENTATION)["options"]
    source = inspect.getsource(vm_snapshot.main)
    for name, option in documented.items():
        assert f'"{name}": {{"type": "{option["type"]}"' in source.replace('{\n                "type"', '{"type"'), name
    assert documented["provider"]["choices"] == list(machine.PROVIDERS)
    assert documented["quiesce"]["choices"] == list(stand_still.QUIESCE)
    assert documented["disks"]["suboptions"]["format"]["choices"] == list(qemu.FORMATS)
