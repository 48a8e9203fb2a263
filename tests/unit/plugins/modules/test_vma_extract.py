# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The module vma_extract: what it promises around the codec."""

from __future__ import annotations

import os
import pathlib
import stat
import typing as t

import pytest

from ansible_collections.vmbackup.vma.plugins.modules import vma_create, vma_extract
from ansible_collections.vmbackup.vma.tests.unit.plugins.modules.helpers import SECRET, Run, flip, rename_in_header

Options = dict[str, t.Any]


@pytest.fixture
def options(run: Run, tmp_path: pathlib.Path, image: pathlib.Path) -> Options:
    """An archive of two disks and two configs, to be extracted to a folder that is not there yet."""
    (tmp_path / "second.raw").write_bytes(b"second".ljust(4096))
    run(
        vma_create,
        dest=str(tmp_path / "x.vma"),
        devices=[
            {"name": "drive-scsi0", "path": str(image)},
            {"name": "drive-scsi1", "path": str(tmp_path / "second.raw")},
        ],
        configs=[{"name": "qemu-server.conf", "content": SECRET}, {"name": "qemu-server.fw", "content": "[OPTIONS]\n"}],
    )
    return {"src": str(tmp_path / "x.vma"), "dest": str(tmp_path / "out")}


def names(folder: str) -> list[str]:
    """What is in the folder."""
    return sorted(os.listdir(folder))


def test_extracts_all_by_default(run: Run, options: Options, tmp_path: pathlib.Path, image: pathlib.Path) -> None:
    result = run(vma_extract, **options)
    assert result["changed"] is True
    assert names(options["dest"]) == [
        "disk-drive-scsi0.raw",
        "disk-drive-scsi1.raw",
        "qemu-server.conf",
        "qemu-server.fw",
    ]
    first, second = result["devices"]
    assert first == {
        "name": "drive-scsi0",
        "path": str(tmp_path / "out/disk-drive-scsi0.raw"),
        "format": "raw",
        "size": 196608,
        "written_bytes": 65536 + 4096,
        "changed": True,
        "reason": "there is no such file",
    }
    assert pathlib.Path(first["path"]).read_bytes() == image.read_bytes()
    assert pathlib.Path(second["path"]).read_bytes() == (tmp_path / "second.raw").read_bytes()
    config = result["configs"][0]
    assert config == {
        "name": "qemu-server.conf",
        "path": str(tmp_path / "out/qemu-server.conf"),
        "size": len(SECRET),
        "changed": True,
    }
    assert pathlib.Path(config["path"]).read_text() == SECRET
    assert all(stat.S_IMODE(os.stat(item["path"]).st_mode) == 0o600 for item in (*result["devices"], config))
    assert result["archive"]["integrity"] == "sha256"
    assert result["archive"]["path"] == options["src"]
    assert result["elapsed"] >= 0


def test_is_idempotent(run: Run, options: Options) -> None:
    run(vma_extract, **options)
    result = run(vma_extract, **options)
    assert result["changed"] is False
    assert [device["reason"] for device in result["devices"]] == [None, None]
    assert [device["written_bytes"] for device in result["devices"]] == [0, 0]


@pytest.mark.parametrize("in_place", [True, False])
def test_check_mode_tells_the_truth(run: Run, options: Options, in_place: bool) -> None:
    foreseen = run(vma_extract, check=True, in_place=in_place, **options)
    assert not os.path.exists(options["dest"])
    made = run(vma_extract, in_place=in_place, **options)
    changes = [[item["changed"] for item in (*each["devices"], *each["configs"])] for each in (foreseen, made)]
    assert changes == [[True] * 4] * 2

    target = pathlib.Path(made["devices"][0]["path"])
    flip(target, 70000)
    stale = target.read_bytes()
    foreseen = run(vma_extract, check=True, in_place=in_place, **options)
    assert target.read_bytes() == stale
    made = run(vma_extract, in_place=in_place, **options)
    changes = [[item["changed"] for item in (*each["devices"], *each["configs"])] for each in (foreseen, made)]
    assert changes == [[True, False, False, False]] * 2
    assert foreseen["devices"][0]["reason"].startswith("it differs at offset ")
    assert run(vma_extract, check=True, in_place=in_place, **options)["changed"] is False


def test_some_devices_and_configs(run: Run, options: Options, tmp_path: pathlib.Path) -> None:
    wanted = [{"name": "drive-scsi1", "path": str(tmp_path / "mine.img")}]
    result = run(vma_extract, devices=wanted, configs=["qemu-server.fw"], **options)
    assert [device["path"] for device in result["devices"]] == [str(tmp_path / "mine.img")]
    assert (tmp_path / "mine.img").stat().st_size == 4096
    assert names(options["dest"]) == ["qemu-server.fw"]


@pytest.mark.parametrize(
    ("configs", "expected"),
    [
        ("all", ["qemu-server.conf", "qemu-server.fw"]),
        (["all"], ["qemu-server.conf", "qemu-server.fw"]),
        ("none", []),
        ([], []),
        ("qemu-server.fw", ["qemu-server.fw"]),
    ],
)
def test_configs_alone(run: Run, options: Options, configs: t.Any, expected: list[str]) -> None:
    result = run(vma_extract, devices=[], configs=configs, **options)
    assert result["devices"] == []
    assert [config["name"] for config in result["configs"]] == expected
    if expected:
        assert names(options["dest"]) == expected


def test_diff_hides_secrets(run: Run, options: Options) -> None:
    for check in (True, False):
        result = run(vma_extract, check=check, diff=True, **options)
        assert "sesame" not in result.text
        diffs = {os.path.basename(diff["after_header"]): diff for diff in result["diff"]}
        assert diffs["disk-drive-scsi0.raw"]["before"] == "there is no such file\n"
        assert diffs["disk-drive-scsi0.raw"]["after"] == "device drive-scsi0: 196608 bytes, raw\n"
        assert diffs["qemu-server.conf"]["before"] == ""
        assert diffs["qemu-server.conf"]["after"].startswith(f"config qemu-server.conf: {len(SECRET)} bytes, SHA-256 ")
    assert run(vma_extract, diff=True, **options)["diff"] == []


def test_diff_shows_contents_where_that_is_asked_for(run: Run, options: Options) -> None:
    os.mkdir(options["dest"])
    pathlib.Path(options["dest"], "qemu-server.conf").write_text("old\n")
    result = run(vma_extract, check=True, diff=True, config_content=True, **options)
    diffs = {os.path.basename(diff["after_header"]): diff for diff in result["diff"]}
    assert (diffs["qemu-server.conf"]["before"], diffs["qemu-server.conf"]["after"]) == ("old\n", SECRET)
    assert result["archive"]["configs"][0]["content"] == SECRET


def test_attributes_are_those_of_the_files(run: Run, options: Options) -> None:
    run(vma_extract, **options)
    for check, changed in ((True, True), (False, True), (False, False)):
        result = run(vma_extract, check=check, diff=True, mode="0640", **options)
        assert result["changed"] is changed
        items = [*result["devices"], *result["configs"]]
        assert [item["changed"] for item in items] == [changed] * 4
        assert len(result["diff"]) == 4 * changed
        assert [device["reason"] for device in result["devices"]] == [None, None]
        mode = 0o600 if check else 0o640
        assert {stat.S_IMODE(os.stat(item["path"]).st_mode) for item in items} == {mode}
    assert stat.S_IMODE(os.stat(options["dest"]).st_mode) == 0o700


def test_a_name_that_looks_like_a_variable_is_none(
    run: Run, options: Options, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir(mode=0o700)
    monkeypatch.setenv("LEAK", "/../../other")
    rename_in_header(pathlib.Path(options["src"]), b"drive-scsi0", b"drive-$LEAK")
    result = run(vma_extract, mode="0640", **options)
    path = pathlib.Path(result["devices"][0]["path"])
    assert path.name == "disk-drive-$LEAK.raw"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert stat.S_IMODE(other.stat().st_mode) == 0o700


def test_an_unsafe_name_is_refused_unless_a_path_is_given(run: Run, options: Options, tmp_path: pathlib.Path) -> None:
    rename_in_header(pathlib.Path(options["src"]), b"drive-scsi0", b"../../../.x")
    result = run(vma_extract, fails=True, **options)
    assert result["error"]["kind"] == "unsafe_name"
    assert not os.path.exists(options["dest"])
    result = run(vma_extract, devices=[{"name": "../../../.x", "path": str(tmp_path / "x.raw")}], **options)
    assert result["devices"][0]["path"] == str(tmp_path / "x.raw")
    assert result["archive"]["devices"][0]["name"] == "../../../.x"


def test_an_unsafe_config_name_escapes_nothing(run: Run, options: Options, tmp_path: pathlib.Path) -> None:
    rename_in_header(pathlib.Path(options["src"]), b"qemu-server.fw", b"../escaped.txt")
    assert run(vma_extract, fails=True, **options)["error"]["kind"] == "unsafe_name"
    assert not (tmp_path / "escaped.txt").exists()
    assert run(vma_extract, configs="none", **options)["changed"] is True


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"devices": [{"name": "drive-ide0"}]}, "no device 'drive-ide0'"),
        ({"configs": ["nothing.conf"]}, "no config 'nothing.conf'"),
        ({"configs": ["none", "qemu-server.fw"]}, "'none' does not go together"),
        ({"threads": 0}, "expected a number above 0 for threads"),
        ({"bandwidth_limit": 0}, "expected a number above 0 for bandwidth_limit"),
        ({"src": "/nonexistent/x.vma"}, "No such file"),
    ],
)
def test_what_cannot_be_done_is_told(run: Run, options: Options, change: Options, words: str, check: bool) -> None:
    result = run(vma_extract, check=check, fails=True, **{**options, **change})
    assert result["error"]["kind"] == "request"
    assert words in result["msg"]
    assert not os.path.exists(options["dest"])


def test_damage_is_located_and_leaves_nothing(run: Run, options: Options) -> None:
    offset = run(vma_extract, check=True, **options)["archive"]["header_size"]
    flip(pathlib.Path(options["src"]), offset + 512 + 1000)
    result = run(vma_extract, fails=True, **options)
    assert result["error"]["kind"] == "extent_digest"
    assert result["error"]["offset"] == offset
    assert result["error"]["file"] == options["src"]
    assert result["error"]["remedy"] in result["msg"]
    assert f"offset {offset}" in result["msg"]
    assert not os.path.exists(options["dest"])


@pytest.mark.parametrize(("overwrite", "changed"), [("changed", True), ("never", False), ("always", True)])
@pytest.mark.parametrize("check", [True, False])
def test_overwrite(run: Run, options: Options, overwrite: str, changed: bool, check: bool) -> None:
    made = run(vma_extract, **options)
    target = pathlib.Path(made["devices"][0]["path"])
    whole = target.read_bytes()
    flip(target, 0)
    stale = target.read_bytes()
    result = run(vma_extract, check=check, overwrite=overwrite, **options)
    assert result["devices"][0]["changed"] is changed
    assert result["devices"][1]["changed"] is (overwrite == "always")
    assert target.read_bytes() == (whole if changed and not check else stale)


def test_a_trailing_slash_makes_the_same_folder(run: Run, options: Options) -> None:
    result = run(vma_extract, **{**options, "dest": options["dest"] + "/"})
    assert os.path.dirname(result["devices"][0]["path"]) == options["dest"]
