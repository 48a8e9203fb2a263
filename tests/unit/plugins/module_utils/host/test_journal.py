# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Journals: on disk before anything is done, and one process at a time."""

from __future__ import annotations

import json
import os
import pathlib
import stat
import subprocess

import pytest

from ansible_collections.vmbackup.vma.plugins.module_utils.host import journal
from ansible_collections.vmbackup.vma.plugins.module_utils.vma import errors
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.host import snapshots

_JOURNAL = "ansible_collections.vmbackup.vma.plugins.module_utils.host.journal"
_KILLED = f"""
import os, signal
from {_JOURNAL} import lock_journal
journal = lock_journal("web", sys.argv[1])
journal.add("file", path="/some/where")
journal.note(id="0badcafe")
os.kill(os.getpid(), signal.SIGKILL)
"""
_HOLDER = f"""
from {_JOURNAL} import lock_journal
journal = lock_journal("web", sys.argv[1])
print("locked", flush=True)
sys.stdin.read()
"""
_HAMMER = f"""
import os, time
from {_JOURNAL} import lock_journal
from ansible_collections.vmbackup.vma.plugins.module_utils.vma.errors import BusyError
alone, turns = os.path.join(sys.argv[1], "alone"), 0
deadline = time.monotonic() + 60
while turns < 150 and time.monotonic() < deadline:
    try:
        journal = lock_journal("web", sys.argv[1])
    except BusyError:
        continue
    os.close(os.open(alone, os.O_CREAT | os.O_EXCL))
    assert journal.steps == [], journal.steps
    journal.add("turn", number=turns)
    os.unlink(alone)
    journal.delete()
    journal.close()
    turns += 1
print(turns)
"""


def test_a_step_is_on_disk_before_it_may_be_done(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, list[journal.Step]]] = []

    def look(number: int, really: object = os.fsync) -> None:
        really(number)  # type: ignore[operator]
        seen.append((os.readlink(f"/proc/self/fd/{number}"), journal.read_journal("web", str(tmp_path))[0]))

    with snapshots.open_journal(tmp_path) as kept:
        monkeypatch.setattr(os, "fsync", look)
        kept.add("file", path="/some/where")
    step = journal.Step("file", {"path": "/some/where"})
    # first the new content under another name, then the name: a power failure leaves the old one, or the new one
    assert [steps for _path, steps in seen] == [[], [step]]
    assert seen[0][0].endswith(".json.new")
    assert seen[1][0] == str(tmp_path)


def test_it_outlives_its_writer(tmp_path: pathlib.Path) -> None:
    assert snapshots.run_python(_KILLED, str(tmp_path)).wait(snapshots.SECONDS) == -9
    with snapshots.open_journal(tmp_path) as kept:
        assert kept.steps == [journal.Step("file", {"path": "/some/where"})]
        assert kept.notes == {"id": "0badcafe"}
        kept.remove(kept.steps[0])
    assert journal.read_journal("web", str(tmp_path)) == ([], {"id": "0badcafe"})


def test_only_root_sees_it(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "below" / "journals"
    with snapshots.open_journal(folder) as kept:
        kept.add("file", path="/some/where")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


def test_the_lock_keeps_others_out_until_its_holder_is_gone(tmp_path: pathlib.Path) -> None:
    holder = snapshots.run_python(_HOLDER, str(tmp_path), stdin=subprocess.PIPE)
    assert snapshots.read_line(holder) == "locked"
    with pytest.raises(errors.BusyError, match="another run works on the VM web"):
        journal.lock_journal("web", str(tmp_path))
    with snapshots.open_journal(tmp_path, "db"):
        pass  # another VM is another matter
    snapshots.end(holder)
    with snapshots.open_journal(tmp_path):
        pass


def test_a_forked_child_holds_the_lock_as_well(tmp_path: pathlib.Path) -> None:
    reading, writing = os.pipe()
    kept = journal.lock_journal("web", str(tmp_path))
    pid = os.fork()
    if not pid:
        os.close(writing)
        os.read(reading, 1)
        os._exit(0)
    os.close(reading)
    kept.close()
    kept.close()
    with pytest.raises(errors.BusyError):
        journal.lock_journal("web", str(tmp_path))
    os.close(writing)
    os.waitpid(pid, 0)
    with snapshots.open_journal(tmp_path):
        pass


def test_a_child_that_is_not_told_to_holds_none(tmp_path: pathlib.Path) -> None:
    with snapshots.open_journal(tmp_path):
        child = subprocess.Popen(["sleep", "60"], close_fds=False)
    with snapshots.open_journal(tmp_path):
        pass
    child.kill()
    child.wait()


def test_removing_the_lock_lets_no_two_in(tmp_path: pathlib.Path) -> None:
    hammers = [snapshots.run_python(_HAMMER, str(tmp_path), stderr=subprocess.PIPE) for _which in range(2)]
    assert [process.communicate(timeout=2 * snapshots.SECONDS) for process in hammers] == [("150\n", "")] * 2
    assert os.listdir(tmp_path) == []


def test_it_knows_when_its_lock_is_another_ones(tmp_path: pathlib.Path) -> None:
    with snapshots.open_journal(tmp_path) as kept:
        assert kept.is_current()
        kept.delete()
        assert not kept.is_current()
        with snapshots.open_journal(tmp_path):
            assert not kept.is_current()


@pytest.mark.parametrize(
    "names",
    [
        ("a b", "a_b", "a/b", "a:b", "a\nb"),
        ("../../etc/passwd", ".._.._etc_passwd"),
        ("ü" * 100, "ö" * 100),
        ("x" * 300, "x" * 301),
        ("web", "Web", "web "),
        ("\udcff", "\udcfe"),
    ],
    ids=lambda names: ascii(names[0])[:20],
)
def test_names_do_not_collide(tmp_path: pathlib.Path, names: tuple[str, ...]) -> None:
    for name in names:
        with snapshots.open_journal(tmp_path, name) as kept:
            assert kept.steps == []
            kept.add("named", name=ascii(name))
    for name in names:
        assert journal.read_journal(name, str(tmp_path))[0] == [journal.Step("named", {"name": ascii(name)})]
        assert os.path.dirname(journal.find_lock(name, str(tmp_path))) == str(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2 * len(names)


def test_a_run_forgets_the_notes_of_the_one_before(tmp_path: pathlib.Path) -> None:
    with snapshots.open_journal(tmp_path) as kept:
        kept.note(id="1", trouble="some")
        kept.begin(id="2")
        kept.note(began="now")
    assert journal.read_journal("web", str(tmp_path))[1] == {"id": "2", "began": "now"}


def test_nothing_is_left_of_a_deleted_one(tmp_path: pathlib.Path) -> None:
    with snapshots.open_journal(tmp_path) as kept:
        kept.note(id="1")
        (tmp_path / (next(tmp_path.glob("*.json")).name + ".new")).touch()  # as a kill while it was written leaves it
        kept.delete()
        kept.delete()
    assert os.listdir(tmp_path) == []
    assert journal.read_journal("web", str(tmp_path)) == ([], {})


def test_a_damaged_one_is_no_empty_one(tmp_path: pathlib.Path) -> None:
    with snapshots.open_journal(tmp_path) as kept:
        kept.add("file", path="/some/where")
    (path,) = tmp_path.glob("*.json")
    path.write_text(path.read_text(encoding="utf-8")[:-5], encoding="utf-8")
    for attempt in (journal.read_journal, journal.lock_journal):
        with pytest.raises(errors.TargetError, match="the journal is damaged") as caught:
            attempt("web", str(tmp_path))
        assert caught.value.file == str(path)
    path.write_text(json.dumps({"steps": [], "notes": {}}), encoding="utf-8")
    with snapshots.open_journal(tmp_path):
        pass  # the lock was not left behind


def test_a_folder_that_cannot_be_made_is_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(errors.TargetError) as caught:
        journal.lock_journal("web", str(tmp_path / "file"))
    assert caught.value.file == str(tmp_path / "file")
