# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The module vma_info: what it promises around the codec."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import typing as t

import pytest

from ansible_collections.vmbackup.vma.plugins.modules import vma_create, vma_info
from ansible_collections.vmbackup.vma.tests.unit.plugins.modules.helpers import (
    SECRET,
    VECTORS,
    Run,
    flip,
    rename_in_header,
    unpack,
)

MANIFEST = json.loads((VECTORS / "manifest.json").read_text(encoding="utf-8"))["archives"]
FIRST_EXTENT = 12800
"""Where the extents begin in the archives that Proxmox VE's own tool made."""


@pytest.fixture
def archive(tmp_path: pathlib.Path) -> pathlib.Path:
    """An archive that Proxmox VE's own tool made, uncompressed."""
    return unpack("multi", tmp_path / "vzdump-qemu-100-2026_01_31-22_15_00.vma")


@pytest.fixture
def protected(run: Run, tmp_path: pathlib.Path, image: pathlib.Path) -> pathlib.Path:
    """An archive with digests."""
    path = tmp_path / "own.vma"
    devices = [{"name": "drive-scsi0", "path": str(image)}]
    run(vma_create, dest=str(path), devices=devices, configs=[{"name": "qemu-server.conf", "content": SECRET}])
    return path


@pytest.mark.parametrize("level", ["none", "structure", "content"])
@pytest.mark.parametrize("name", sorted(path.name for path in VECTORS.glob("*.vma.gz")))
def test_describes_what_proxmox_made(run: Run, name: str, level: str) -> None:
    facts = MANIFEST[name[: -len(".gz")]]
    (archive,) = run(vma_info, path=[str(VECTORS / name)], verify=level)["archives"]
    assert (archive["uuid"], archive["ctime"]) == (facts["uuid"], facts["ctime"])
    assert [(device["dev_id"], device["name"]) for device in archive["devices"]] == [
        (device["dev_id"], device["name"]) for device in facts["devices"]
    ]
    assert [config["name"] for config in archive["configs"]] == facts["configs"]
    assert archive["compression"] == "gzip"
    assert archive["integrity"] == (None if level == "none" else "none")
    assert "error" not in archive
    if level == "none":
        assert "verification" not in archive
    else:
        assert (archive["verification"]["level"], archive["verification"]["ok"]) == (level, True)
        assert archive["verification"]["problems"] == []


def test_tells_what_stands_in_the_name_and_beside_the_archive(run: Run, archive: pathlib.Path) -> None:
    (found,) = run(vma_info, path=[str(archive)])["archives"]
    assert (found["vmid"], found["notes"], found["protected"]) == (100, None, False)
    assert found["vm"]["name"] == "vector-vm"
    pathlib.Path(f"{archive}.notes").write_text("before the upgrade\n")
    pathlib.Path(f"{archive}.protected").touch()
    (found,) = run(vma_info, path=[str(archive)])["archives"]
    assert (found["notes"], found["protected"]) == ("before the upgrade", True)


@pytest.mark.parametrize("shown", [True, False])
def test_contents_can_be_kept_out(run: Run, protected: pathlib.Path, shown: bool) -> None:
    result = run(vma_info, path=[str(protected)], config_content=shown)
    assert result["archives"][0]["configs"][0]["content"] == (SECRET if shown else None)
    assert ("sesame" in result.text) is shown


def test_check_mode_and_diff_mode_change_nothing(run: Run, archive: pathlib.Path) -> None:
    plain = run(vma_info, path=[str(archive)])
    result = run(vma_info, check=True, diff=True, path=[str(archive)])
    assert result["changed"] is False
    assert result["archives"] == plain["archives"]
    assert "diff" not in result.data


def test_folders_globs_and_files_each_once(run: Run, tmp_path: pathlib.Path, archive: pathlib.Path) -> None:
    unpack("single", tmp_path / "b.vma")
    (tmp_path / "b.vma.notes").write_text("note")
    (tmp_path / "b.log").write_text("log")
    paths = [str(tmp_path / "b.vma"), str(tmp_path), str(tmp_path / "*.vma")]
    found = [item["path"] for item in run(vma_info, path=paths)["archives"]]
    assert found == [str(tmp_path / "b.vma"), str(archive)]


def test_warns_where_nothing_is_found(run: Run, tmp_path: pathlib.Path) -> None:
    (tmp_path / "empty").mkdir()
    result = run(vma_info, path=[str(tmp_path / "empty"), str(tmp_path / "*.vma")])
    assert result["archives"] == []
    # ansible-core before 2.19 returns warnings as texts, later ones as what the controller makes texts of.
    for path in (tmp_path / "empty", tmp_path / "*.vma"):
        assert f"No archives were found at {path}." in str(result["warnings"])


@pytest.mark.parametrize("level", ["none", "structure", "content"])
def test_looks_at_all_before_it_fails(run: Run, tmp_path: pathlib.Path, archive: pathlib.Path, level: str) -> None:
    (tmp_path / "junk.vma").write_text("junk")
    (tmp_path / "empty.vma").touch()
    paths = [str(tmp_path / name) for name in ("junk.vma", "missing.vma", "empty.vma")] + [str(archive)]
    result = run(vma_info, fails=True, path=paths, verify=level)
    junk, missing, empty, good = result["archives"]
    assert [item["path"] for item in result["archives"]] == paths
    assert (junk["error"]["kind"], junk["error"]["file"], junk["size"]) == ("not_vma", paths[0], 4)
    assert missing == {"path": paths[1], "error": missing["error"]}
    assert missing["error"]["kind"] == "request"
    assert empty["error"]["kind"] == "not_vma"
    assert "error" not in good
    assert len(good["devices"]) == 3
    assert result["msg"].startswith("3 of 4 archives have problems.\n")
    assert all(path in result["msg"] for path in paths[:3])
    assert str(archive) not in result["msg"]
    if level != "none":
        assert junk["verification"]["problems"][0]["kind"] == "not_vma"


def test_damaged_data_is_located_by_its_digest(run: Run, protected: pathlib.Path) -> None:
    flip(protected, FIRST_EXTENT + 512 + 5000)
    assert run(vma_info, path=[str(protected)], verify="structure")["archives"][0]["verification"]["ok"] is True
    result = run(vma_info, fails=True, path=[str(protected)], verify="content")
    (found,) = result["archives"]
    assert found["integrity"] == "sha256"
    assert found["error"]["kind"] == "extent_digest"
    assert found["error"]["offset"] == FIRST_EXTENT
    assert found["verification"]["counts"] == {"extent_digest": 1}
    assert found["verification"]["devices"] == [{"name": "drive-scsi0", "whole": False}]
    assert f"{protected}:\n  extent_digest at offset {FIRST_EXTENT}: " in result["msg"]


def test_many_problems_are_summed_up(run: Run, tmp_path: pathlib.Path) -> None:
    count = 9
    extent = 59 * 65536
    with (tmp_path / "disk.raw").open("wb") as image:
        for number in range(count):
            image.seek(number * extent)
            image.write(b"data" * 1024)
        image.truncate(count * extent)
    path = tmp_path / "many.vma"
    header = run(vma_create, dest=str(path), devices=[{"name": "d", "path": str(tmp_path / "disk.raw")}])["archive"]
    for number in range(count):
        flip(path, header["header_size"] + number * (512 + 4096) + 600)
    result = run(vma_info, fails=True, path=[str(path)], verify="content")
    assert result["archives"][0]["verification"]["counts"] == {"extent_digest": count}
    lines = result["msg"].splitlines()
    assert lines[:2] == ["1 of 1 archives have problems.", f"{path}:"]
    assert [line.split(":")[0] for line in lines[2:5]] == [
        f"  extent_digest at offset {header['header_size'] + number * (512 + 4096)}" for number in range(3)
    ]
    assert lines[5] == f"  and {count - 3} more; in all {count} extent_digest"
    assert len(lines) == 7


def test_what_is_still_whole_is_told(run: Run, archive: pathlib.Path) -> None:
    data = archive.read_bytes()
    archive.write_bytes(data[: data.rindex(b"VMAE")])
    result = run(vma_info, fails=True, path=[str(archive)], verify="structure")
    (found,) = result["archives"]
    whole = [device["name"] for device in found["verification"]["devices"] if device["whole"]]
    assert 0 < len(whole) < 3
    assert f"  Still whole: {', '.join(whole)}.\n" in result["msg"]
    assert found["error"]["kind"] == "cluster_missing"


def test_a_header_with_a_fault_is_described_and_fails(run: Run, archive: pathlib.Path) -> None:
    rename_in_header(archive, b"qemu-server.fw", b"../escaped.txt")
    result = run(vma_info, fails=True, path=[str(archive)])
    (found,) = result["archives"]
    assert [config["name"] for config in found["configs"]] == ["qemu-server.conf", "../escaped.txt"]
    assert found["error"]["kind"] == "unsafe_name"
    flip(archive, 12000)
    assert run(vma_info, fails=True, path=[str(archive)])["archives"][0]["error"]["kind"] == "header_checksum"


@pytest.mark.parametrize("level", ["none", "content"])
def test_a_missing_tool_is_named(
    run: Run, tmp_path: pathlib.Path, archive: pathlib.Path, monkeypatch: pytest.MonkeyPatch, level: str
) -> None:
    shutil.copy(VECTORS / "single.vma.lzo", tmp_path / "single.vma.lzo")
    monkeypatch.setenv("PATH", str(tmp_path))
    paths = [str(tmp_path / "single.vma.lzo"), str(archive)]
    result = run(vma_info, fails=True, path=paths, verify=level)
    bad, good = result["archives"]
    assert bad == {"path": paths[0], "error": bad["error"]}
    assert bad["error"]["kind"] == "tool"
    assert "Install the package lzop." in result["msg"]
    assert "error" not in good


def test_threads_must_be_positive(run: Run, archive: pathlib.Path) -> None:
    result = run(vma_info, fails=True, path=[str(archive)], threads=0)
    assert result["error"]["kind"] == "request"


@pytest.mark.parametrize("given", ["~/x.vma", ["~/x.vma"]])
def test_home_folders_and_a_single_path(
    run: Run, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, given: t.Any
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    unpack("single", tmp_path / "x.vma")
    (found,) = run(vma_info, path=given)["archives"]
    assert found["path"] == os.path.join(tmp_path, "x.vma")
