# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The module vma_create: what it promises around the codec."""

from __future__ import annotations

import os
import pathlib
import signal
import stat
import threading
import typing as t

import pytest

from ansible_collections.vmbackup.vma.plugins.module_utils.vma.create import Created
from ansible_collections.vmbackup.vma.plugins.module_utils.vma.verify import verify
from ansible_collections.vmbackup.vma.plugins.modules import vma_create
from ansible_collections.vmbackup.vma.tests.unit.plugins.modules.helpers import SECRET, Run

Options = dict[str, t.Any]


@pytest.fixture
def options(tmp_path: pathlib.Path, image: pathlib.Path) -> Options:
    """An archive of one disk and two configs, one of which holds a secret."""
    (tmp_path / "qemu-server.fw").write_text("[OPTIONS]\n\nenable: 1\n")
    return {
        "dest": str(tmp_path / "vzdump-qemu-100-2026_01_31-22_15_00.vma.zst"),
        "devices": [{"name": "drive-scsi0", "path": str(image)}],
        "configs": [
            {"name": "qemu-server.conf", "content": f"name: web\n{SECRET}"},
            {"name": "qemu-server.fw", "src": str(tmp_path / "qemu-server.fw")},
        ],
    }


def test_creates_an_archive_and_describes_it(run: Run, options: Options) -> None:
    result = run(vma_create, **options)
    assert result["changed"] is True
    assert result["reason"] == "there is no such file"
    assert result["data_bytes"] == 65536 + 4096
    assert result["read_bytes"] >= result["data_bytes"]
    archive = result["archive"]
    assert archive["path"] == options["dest"]
    assert archive["size"] == os.path.getsize(options["dest"])
    assert archive["devices"] == [{"dev_id": 1, "name": "drive-scsi0", "size": 196608}]
    assert [config["name"] for config in archive["configs"]] == ["qemu-server.conf", "qemu-server.fw"]
    assert (archive["compression"], archive["integrity"], archive["vmid"]) == ("zstd", "sha256", 100)
    assert archive["vm"]["name"] == "web"
    assert stat.S_IMODE(os.stat(options["dest"]).st_mode) == 0o600
    assert verify(options["dest"]).verification.ok


def test_is_idempotent(run: Run, options: Options) -> None:
    first = run(vma_create, **options)
    inode = os.stat(options["dest"]).st_ino
    second = run(vma_create, **options)
    assert (second["changed"], second["reason"]) == (False, None)
    assert (second["read_bytes"], second["data_bytes"]) == (0, 0)
    assert second["archive"] == first["archive"]
    assert os.stat(options["dest"]).st_ino == inode


def test_check_mode_tells_the_truth_before_and_after(run: Run, options: Options, image: pathlib.Path) -> None:
    foreseen = run(vma_create, check=True, **options)
    assert not os.path.exists(options["dest"])
    made = run(vma_create, **options)
    assert (foreseen["changed"], foreseen["reason"]) == (made["changed"], made["reason"])
    unknown = {"size", "uuid", "ctime", "header_size"}
    assert foreseen["archive"].keys() == made["archive"].keys()
    assert {key for key, value in foreseen["archive"].items() if value != made["archive"][key]} == unknown
    assert all(foreseen["archive"][key] is None for key in unknown)
    assert run(vma_create, check=True, **options)["changed"] is False

    with image.open("r+b") as file:
        file.seek(100000)
        file.write(b"new")
    before = pathlib.Path(options["dest"]).read_bytes()
    foreseen = run(vma_create, check=True, **options)
    assert pathlib.Path(options["dest"]).read_bytes() == before
    made = run(vma_create, **options)
    assert foreseen["changed"] is made["changed"] is True
    assert foreseen["reason"] == made["reason"]
    assert "differs at offset" in made["reason"]


@pytest.mark.parametrize("check", [True, False])
def test_the_uuid_and_time_that_are_given_are_foreseen(run: Run, options: Options, check: bool) -> None:
    uuid = "5d6417dd-461f-44a9-8553-14f8d37622f8"
    archive = run(vma_create, check=check, uuid=uuid, ctime=7, **options)["archive"]
    assert (archive["uuid"], archive["ctime"]) == (uuid, 7)


def test_the_same_input_makes_the_same_bytes(run: Run, options: Options) -> None:
    fixed = {"uuid": "5d6417dd-461f-44a9-8553-14f8d37622f8", "ctime": 0, "overwrite": "always"}
    run(vma_create, **fixed, **options)
    first = pathlib.Path(options["dest"]).read_bytes()
    assert run(vma_create, **fixed, **options)["reason"] == "the archive is rewritten always"
    assert pathlib.Path(options["dest"]).read_bytes() == first


def test_no_secret_leaves_the_module(run: Run, options: Options) -> None:
    for check in (True, False):
        result = run(vma_create, check=check, diff=True, **options)
        assert "sesame" not in result.text
        assert "sesame" not in result.log
        assert result["archive"]["configs"][0]["name"] == "qemu-server.conf"
        assert [config["content"] for config in result["archive"]["configs"]] == [None, None]


def test_shows_contents_where_that_is_asked_for(run: Run, options: Options) -> None:
    result = run(vma_create, diff=True, config_content=True, **options)
    assert result["archive"]["configs"][0]["content"] == f"name: web\n{SECRET}"
    contents = {diff["after_header"]: diff["after"] for diff in result["diff"]}
    assert contents["qemu-server.conf"] == f"name: web\n{SECRET}"
    assert contents["qemu-server.fw"] == "[OPTIONS]\n\nenable: 1\n"
    assert "sesame" not in result.log


def test_diff_of_a_new_archive(run: Run, options: Options) -> None:
    (diff,) = run(vma_create, diff=True, **options)["diff"]
    assert diff["before"] == ""
    assert "device drive-scsi0: 196608 bytes\n" in diff["after"]
    assert "config qemu-server.fw: 21 bytes, SHA-256 " in diff["after"]


def test_diff_of_a_change_in_check_mode_and_in_earnest(run: Run, options: Options) -> None:
    run(vma_create, **options)
    options["configs"][0]["content"] = "name: web\ncipassword: other\n"
    fixed = {"uuid": "5d6417dd-461f-44a9-8553-14f8d37622f8", "ctime": 7}
    foreseen = run(vma_create, check=True, diff=True, **fixed, **options)
    made = run(vma_create, diff=True, **fixed, **options)
    assert foreseen["diff"] == made["diff"]
    (diff,) = made["diff"]
    changed = set(diff["before"].splitlines()) ^ set(diff["after"].splitlines())
    assert {line.partition(":")[0] for line in changed} == {"config qemu-server.conf", "uuid", "ctime"}
    assert run(vma_create, diff=True, **fixed, **options)["diff"][0]["before"] == diff["after"]


def test_diff_names_what_stands_in_the_archives_place(run: Run, options: Options) -> None:
    pathlib.Path(options["dest"]).write_text("no archive")
    (diff,) = run(vma_create, check=True, diff=True, **options)["diff"]
    assert "not_vma" in diff["before"]


def test_attributes_count_as_a_change(run: Run, options: Options) -> None:
    run(vma_create, **options)
    foreseen = run(vma_create, check=True, diff=True, mode="0640", **options)
    assert (foreseen["changed"], foreseen["reason"]) == (True, None)
    assert foreseen["diff"][-1]["before"] == {"mode": "0600"}
    assert foreseen["diff"][-1]["after"] == {"mode": "0640"}
    assert stat.S_IMODE(os.stat(options["dest"]).st_mode) == 0o600
    made = run(vma_create, mode="0640", **options)
    assert (made["changed"], made["reason"]) == (True, None)
    assert stat.S_IMODE(os.stat(options["dest"]).st_mode) == 0o640
    assert run(vma_create, mode="0640", **options)["changed"] is False


def test_an_existing_file_keeps_its_mode(run: Run, options: Options) -> None:
    run(vma_create, mode="0644", **options)
    assert run(vma_create, overwrite="always", **options)["changed"] is True
    assert stat.S_IMODE(os.stat(options["dest"]).st_mode) == 0o644


def test_overwrite_never_leaves_the_archive_alone(run: Run, options: Options, image: pathlib.Path) -> None:
    run(vma_create, **options)
    before = pathlib.Path(options["dest"]).read_bytes()
    image.write_bytes(b"something else".ljust(196608))
    result = run(vma_create, overwrite="never", **options)
    assert result["changed"] is False
    assert result["archive"]["integrity"] is None
    assert pathlib.Path(options["dest"]).read_bytes() == before


def test_overwrite_never_does_not_take_anything_for_an_archive(run: Run, options: Options) -> None:
    pathlib.Path(options["dest"]).write_text("no archive")
    result = run(vma_create, fails=True, overwrite="never", **options)
    assert result["error"]["kind"] == "not_vma"
    assert pathlib.Path(options["dest"]).read_text() == "no archive"


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"dest": "{folder}/x.tar"}, "request", "expected a name that ends in .vma"),
        ({"dest": "{folder}/x.vma.gz", "compression": "zstd"}, "request", "compression"),
        ({"dest": "{folder}/none/x.vma"}, "request", "the folder for the archive does not exist"),
        ({"dest": "{folder}/folder.vma"}, "request", "not a regular file"),
        ({"uuid": "4711"}, "request", "expected a UUID"),
        ({"threads": 0}, "request", "expected a number above 0 for threads"),
        ({"bandwidth_limit": 0}, "request", "expected a number above 0 for bandwidth_limit"),
        ({"compression_level": 99}, "request", "compression level"),
        ({"devices": [{"name": "a/b", "path": "{image}"}]}, "request", "a slash"),
        ({"devices": [{"name": "a", "path": "{folder}/missing.raw"}]}, "source", "No such file"),
        ({"configs": [{"name": "c", "src": "{folder}/missing.conf"}]}, "source", "No such file"),
        ({"configs": [{"name": "c", "content": "x" * 65536}]}, "request", "65536 bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
@pytest.mark.parametrize("check", [True, False])
def test_errors_are_told_and_leave_nothing(
    run: Run,
    options: Options,
    tmp_path: pathlib.Path,
    image: pathlib.Path,
    change: Options,
    kind: str,
    words: str,
    check: bool,
) -> None:
    def fill(value: t.Any) -> t.Any:
        if isinstance(value, list):
            return [fill(item) for item in value]
        if isinstance(value, dict):
            return {key: fill(item) for key, item in value.items()}
        return value.format(folder=tmp_path, image=image) if isinstance(value, str) else value

    (tmp_path / "folder.vma").mkdir()
    before = sorted(tmp_path.iterdir())
    result = run(vma_create, check=check, fails=True, **{**options, **fill(change)})
    assert result["error"]["kind"] == kind
    assert words in result["msg"]
    assert words in result["error"]["message"] + result["error"].get("remedy", "")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("config", [{}, {"src": "/etc/hostname", "content": SECRET}])
def test_a_config_needs_src_or_content(run: Run, options: Options, config: Options) -> None:
    result = run(vma_create, fails=True, **{**options, "configs": [{"name": "qemu-server.conf", **config}]})
    assert "src" in result["msg"]
    assert "content" in result["msg"]
    assert "sesame" not in result.text


@pytest.mark.parametrize(("given", "expected"), [("50M", 50 << 20), (1000, 1000), ("1K", 1024), (None, None)])
def test_bandwidth_limit_takes_units(
    run: Run, options: Options, monkeypatch: pytest.MonkeyPatch, given: t.Any, expected: int | None
) -> None:
    run(vma_create, **options)
    seen: list[int | None] = []

    def create(*_args: t.Any, bytes_per_second: int | None, **_options: t.Any) -> Created:
        seen.append(bytes_per_second)
        return Created(False, None)

    monkeypatch.setattr(vma_create, "create", create)
    run(vma_create, bandwidth_limit=given, **options)
    assert seen == [expected]


def test_relative_paths_and_home_folders(
    run: Run, options: Options, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    result = run(vma_create, **{**options, "dest": "x.vma", "devices": [{"name": "d", "path": "~/disk.raw"}]})
    assert result["archive"]["path"] == str(tmp_path / "x.vma")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_it_and_leaves_nothing(
    run: Run, options: Options, tmp_path: pathlib.Path, image: pathlib.Path, number: signal.Signals
) -> None:
    image.write_bytes(os.urandom(16 << 20))
    before = sorted(tmp_path.iterdir())
    handlers = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    timer = threading.Timer(0.3, os.kill, (os.getpid(), number))
    timer.start()
    result = run(vma_create, fails=True, bandwidth_limit="1M", **options)
    timer.join()
    # The module's process would end now; this one goes on.
    for each, handler in handlers.items():
        signal.signal(each, handler)
    assert signal.pthread_sigmask(signal.SIG_UNBLOCK, handlers) >= set(handlers)
    assert result["error"]["kind"] == "interrupted"
    assert number.name in result["msg"]
    assert sorted(tmp_path.iterdir()) == before
