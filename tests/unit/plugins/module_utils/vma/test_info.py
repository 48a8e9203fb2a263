# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Archives described, and found."""

from __future__ import annotations

import os
import pathlib
import shutil
import typing as t

import pytest

from ansible_collections.vmbackup.vma.plugins.module_utils.vma import errors, info
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.vma import helpers

STANDARD = "vzdump-qemu-100-2024_02_29-23_59_58.vma"


def test_described(tmp_path: pathlib.Path) -> None:
    path = tmp_path / STANDARD
    archive = helpers.build_archive(
        {"drive-scsi0": b"x" * 512}, configs={"qemu-server.conf": helpers.CONF, "b": b"\xff"}
    )
    path.write_bytes(archive.join())
    (tmp_path / f"{STANDARD}.notes").write_text("a note\n", encoding="utf-8")
    (tmp_path / f"{STANDARD}.protected").touch()
    told = info.read_info(str(path), integrity="sha256")
    vm = told.pop("vm")
    assert (vm["name"], vm["memory"]) == ("web", 2048)
    timestamp = told.pop("timestamp")
    assert isinstance(timestamp, int)
    assert told == {
        "path": str(path),
        "size": path.stat().st_size,
        "compression": "none",
        "version": 1,
        "uuid": helpers.UUID_TEXT,
        "ctime": helpers.CTIME,
        "header_size": len(archive.header),
        "integrity": "sha256",
        "devices": [{"dev_id": 1, "name": "drive-scsi0", "size": 512}],
        "configs": [
            {"name": "qemu-server.conf", "size": len(helpers.CONF), "content": helpers.CONF.decode()},
            {"name": "b", "size": 1, "content": "\ufffd"},
        ],
        "vmid": 100,
        "notes": "a note",
        "protected": True,
    }
    secret = info.read_info(str(path), with_content=False)
    assert [config["content"] for config in secret["configs"]] == [None, None]
    assert secret["vm"]["name"] == "web"


def test_described_with_another_name(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "web.vma"
    path.write_bytes(helpers.build_archive({}, configs={}).join())
    told = info.read_info(str(path))
    names = ("vmid", "timestamp", "vm", "notes", "protected", "integrity")
    assert [told[name] for name in names] == [None, None, None, None, False, None]


def test_described_without_a_header(tmp_path: pathlib.Path) -> None:
    path = tmp_path / STANDARD
    path.write_bytes(b"")
    with pytest.raises(errors.ArchiveError):
        info.read_info(str(path))
    told = info.describe(str(path), None, None)
    assert (told["uuid"], told["devices"], told["configs"], told["vmid"]) == (None, [], [], 100)


def test_a_header_is_enough(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.vma"
    archive = helpers.build_archive({"d": b"x" * 512})
    path.write_bytes(bytes(archive.header))
    assert info.read_info(str(path))["devices"][0]["name"] == "d"


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    for name in ("b.vma", "a.vma.zst", "a.vma.zst.notes", "c.log", ".hidden.vma", "d[1].vma.gz"):
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "e.vma").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("paths", "found"),
    [
        ([], []),
        (["."], ["a.vma.zst", "b.vma", "d[1].vma.gz"]),
        (["empty"], []),
        (["below"], ["below/e.vma"]),
        (["b.vma"], ["b.vma"]),
        # what is named is meant, whatever its name
        (["c.log"], ["c.log"]),
        (["*.vma"], ["b.vma"]),
        (["*/*.vma", "*.vma*"], ["below/e.vma", "a.vma.zst", "b.vma", "d[1].vma.gz"]),
        (["*.iso"], []),
        # a file that has a glob's signs in its name
        (["d[1].vma.gz"], ["d[1].vma.gz"]),
        (["b.vma", ".", "b.vma"], ["b.vma", "a.vma.zst", "d[1].vma.gz"]),
    ],
)
def test_found(paths: list[str], found: list[str], folder: pathlib.Path) -> None:
    told = info.find_archives(os.path.normpath(folder / path) for path in paths)
    assert [os.path.relpath(path, folder) for path in told] == found


def test_not_found(folder: pathlib.Path) -> None:
    with pytest.raises(errors.RequestError, match="no such file or folder") as caught:
        info.find_archives([str(folder), str(folder / "absent.vma")])
    assert caught.value.file == str(folder / "absent.vma")


def test_a_folder_that_cannot_be_read(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def listdir(_path: t.Any) -> t.NoReturn:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", listdir)
    try:
        with pytest.raises(errors.RequestError, match="cannot be read: Permission denied"):
            info.find_archives([str(folder)])
    finally:
        monkeypatch.undo()


def test_vectors_are_found(tmp_path: pathlib.Path) -> None:
    for path in helpers.VECTORS.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
    assert len(info.find_archives([str(tmp_path)])) == len(list(helpers.VECTORS.glob("*.vma.*")))


def test_a_pattern_means_no_folders_and_no_files_beside_archives(tmp_path: pathlib.Path) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("a.vma", "a.vma.notes", "a.vma.protected", "a.log"):
        (tmp_path / name).touch()
    assert info.find_archives([f"{tmp_path}/*"]) == [f"{tmp_path}/a.vma"]


def test_an_archive_that_is_gone_is_described_without_a_size(tmp_path: pathlib.Path) -> None:
    assert info.describe(str(tmp_path / "gone.vma"), None, None)["size"] is None
