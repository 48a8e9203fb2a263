# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The keeper: it undoes everything, whoever dies, and holds what it was given until then."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import time
import typing as t

import pytest

from ansible_collections.vmbackup.vma.plugins.module_utils.host import journal, keeper, locks
from ansible_collections.vmbackup.vma.plugins.module_utils.host.errors import SnapshotError
from ansible_collections.vmbackup.vma.plugins.module_utils.vma import errors
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.host import snapshots
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.vma.conftest import MakeTmpfs, make_tmpfs

__all__ = ("make_tmpfs",)

LONG = keeper.Limits(600, 600)
_STARTER = """
import json, os, pathlib, signal
from ansible_collections.vmbackup.vma.plugins.module_utils.host import journal, keeper
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.host import snapshots
arguments = json.loads(sys.argv[1])
kept = journal.lock_journal("web", arguments["journals"])
started = keeper.start_keeper(kept, snapshots.KINDS, keeper.Limits(*arguments["limits"]))
snapshots.make_file(kept, pathlib.Path(arguments["effect"]))
if arguments["dies"]:
    os.kill(os.getpid(), signal.SIGKILL)
kept.note(ready=True, disks=arguments["disks"])
started.ready()
print("ready", flush=True)
"""


class Site:
    """The places of a test."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.journals = str(folder / "journals")
        self.effect = folder / "effect"
        self.disk = folder / "disk.raw"
        self.disk.write_bytes(bytes(1 << 20))

    def start(
        self, limits: tuple[float, float] = LONG, *, dies: bool = False, **options: t.Any
    ) -> subprocess.Popen[str]:
        """A process that makes an effect, and leaves it to the keeper."""
        told = {"journals": self.journals, "limits": limits, "effect": str(self.effect), "dies": dies}
        arguments = json.dumps({**told, "disks": [{"path": str(self.disk)}]})
        return snapshots.run_python(_STARTER, arguments, **options)

    @property
    def notes(self) -> dict[str, t.Any]:
        return journal.read_journal("web", self.journals)[1]

    @property
    def pid(self) -> int:
        pid = self.notes["pid"]
        assert isinstance(pid, int)
        return pid

    def wait_for_end(self) -> None:
        """Wait until the keeper has given up the lock."""

        def is_free() -> bool:
            with contextlib.suppress(errors.BusyError), snapshots.open_journal(pathlib.Path(self.journals)):
                return True
            return False

        snapshots.wait_for(is_free, "the keeper lives on")


def opened_by(pid: int) -> set[str]:
    """What a process has open."""
    opened = set()
    for entry in pathlib.Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            opened.add(os.readlink(entry))
    return opened


@pytest.fixture
def site(tmp_path: pathlib.Path) -> t.Iterator[Site]:
    found = Site(tmp_path)
    yield found
    pid = found.notes.get("pid")
    if pid is not None:
        keeper.ask(pid, journal.find_lock("web", found.journals))
        found.wait_for_end()


def test_a_starter_that_is_killed_leaves_nothing(site: Site) -> None:
    starter = site.start(dies=True)
    assert starter.wait(snapshots.SECONDS) == -signal.SIGKILL
    snapshots.wait_for(lambda: not site.effect.exists())
    site.wait_for_end()
    assert os.listdir(site.journals) in ([], [os.path.basename(journal.find_lock("web", site.journals))])


def test_it_lets_go_of_what_its_starter_had_open(site: Site) -> None:
    starter = site.start(stderr=subprocess.PIPE)
    # both pipes come to their end although the keeper lives
    assert starter.communicate(timeout=snapshots.SECONDS) == ("ready\n", "")
    assert snapshots.lives(site.pid)
    allowed = {os.devnull, journal.find_lock("web", site.journals)}
    # now and then it looks who reads, and has something of /proc open for a moment
    snapshots.wait_for(lambda: opened_by(site.pid) == allowed, "it has more open than it needs")
    assert os.readlink(f"/proc/{site.pid}/cwd") == "/"
    assert os.getsid(site.pid) == site.pid
    assert site.effect.exists()


def test_it_lets_go_when_asked(site: Site) -> None:
    site.start().wait()
    pid = site.pid
    assert keeper.ask(pid, journal.find_lock("web", site.journals))
    site.wait_for_end()
    assert not site.effect.exists()
    assert site.notes["pid"] is None
    assert "trouble" not in site.notes
    assert site.notes["removed"] == [f"the file {site.effect}"]
    assert not keeper.ask(pid, journal.find_lock("web", site.journals))


def test_a_number_that_is_somebody_elses_is_not_asked(site: Site) -> None:
    site.start().wait()
    stranger = subprocess.Popen(["sleep", "60"])
    assert not keeper.ask(stranger.pid, journal.find_lock("web", site.journals))
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_from_elsewhere_is_trouble(site: Site, number: signal.Signals) -> None:
    # whoever reads the disks is not asked, so what was read is worth nothing
    site.start().wait()
    os.kill(site.pid, number)
    site.wait_for_end()
    assert not site.effect.exists()
    assert site.notes["trouble"] == f"{number.name} ended the keeper of the snapshot before it was let go"


def test_it_stays_while_somebody_reads_and_goes_when_nobody_does(site: Site) -> None:
    with open(site.disk, "rb") as file:
        reader = subprocess.Popen(["sleep", "600"], stdin=file)
    site.start((600, 1)).wait()
    pid = site.pid
    ended = time.monotonic() + 6
    while time.monotonic() < ended:
        assert site.effect.exists()
        time.sleep(0.1)
    reader.kill()
    reader.wait()
    snapshots.wait_for(lambda: not site.effect.exists())
    site.wait_for_end()
    assert site.notes["trouble"] == "nobody has read the snapshot for 1 seconds"
    snapshots.wait_for(lambda: not snapshots.lives(pid))


def test_it_keeps_no_longer_than_allowed(site: Site) -> None:
    site.start((1, 600)).wait()
    site.wait_for_end()
    assert not site.effect.exists()
    assert site.notes["trouble"].startswith("the snapshot was kept for 1 seconds, which is as long as was allowed")


def test_trouble_ends_it(site: Site) -> None:
    site.start().wait()
    site.effect.unlink()
    site.wait_for_end()
    assert site.notes["trouble"] == f"the file {site.effect} is gone"


def test_who_reads_on_after_trouble_came_is_ended(site: Site) -> None:
    with snapshots.open_journal(pathlib.Path(site.journals)) as kept:
        started = keeper.start_keeper(kept, snapshots.KINDS, LONG)
        snapshots.make_file(kept, site.effect)
        kept.add("busy", path=str(site.disk))
        kept.note(ready=True, disks=[{"path": str(site.disk)}])
        started.ready()
    with site.disk.open("rb") as disk:
        reader = subprocess.Popen(["sleep", "60"], stdin=disk)
    site.effect.unlink()
    site.wait_for_end()
    assert reader.wait(snapshots.SECONDS) == -signal.SIGTERM
    assert journal.read_journal("web", site.journals)[0] == []
    assert site.notes["trouble"] == f"the file {site.effect} is gone"


def test_trouble_just_before_it_is_asked_is_told(site: Site) -> None:
    site.start().wait()
    lock = journal.find_lock("web", site.journals)
    pid = site.pid
    site.effect.unlink()
    keeper.ask(pid, lock)
    site.wait_for_end()
    assert site.notes["trouble"] == f"the file {site.effect} is gone"


def test_what_cannot_be_undone_is_told_and_stays(site: Site, tmp_path: pathlib.Path) -> None:
    stubborn = tmp_path / "stubborn"
    with snapshots.open_journal(pathlib.Path(site.journals)) as kept:
        started = keeper.start_keeper(kept, snapshots.KINDS, LONG)
        snapshots.make_file(kept, site.effect)
        snapshots.make_file(kept, stubborn, "stubborn")
        started.abandon()
        assert kept.is_current()
        kept.reload()
        assert [step.kind for step in kept.steps] == ["stubborn"]
        assert kept.notes["trouble"].startswith("vm_snapshot ended before the snapshot was ready; not everything")
    assert not site.effect.exists()


def test_abandoning_waits_until_all_is_undone(site: Site) -> None:
    with snapshots.open_journal(pathlib.Path(site.journals)) as kept:
        started = keeper.start_keeper(kept, snapshots.KINDS, LONG)
        pid = site.pid
        snapshots.make_file(kept, site.effect)
        started.abandon()
        assert not site.effect.exists()
        assert not kept.is_current()
    assert os.listdir(site.journals) == []
    assert not pathlib.Path(f"/proc/{pid}").exists()  # nor is there a zombie


def test_abandoning_after_it_took_over(site: Site) -> None:
    with snapshots.open_journal(pathlib.Path(site.journals)) as kept:
        started = keeper.start_keeper(kept, snapshots.KINDS, LONG)
        snapshots.make_file(kept, site.effect)
        started.ready()
        started.abandon()
    assert not site.effect.exists()


def test_a_keeper_that_was_killed_is_noticed(site: Site) -> None:
    with snapshots.open_journal(pathlib.Path(site.journals)) as kept:
        started = keeper.start_keeper(kept, snapshots.KINDS, LONG)
        os.kill(site.pid, signal.SIGKILL)
        snapshots.wait_for(lambda: not snapshots.lives(site.pid))
        with pytest.raises(SnapshotError, match="the keeper of the snapshot has died"):
            started.ready()
        started.abandon()
        assert kept.is_current()


def test_it_holds_the_locks_of_what_it_was_given(site: Site) -> None:
    assert snapshots.write_by_qemu(site.disk) == ""
    with snapshots.open_journal(pathlib.Path(site.journals)) as kept:
        started = keeper.start_keeper(kept, snapshots.KINDS, LONG)
        for _which in range(20):
            fd = locks.lock_image(str(site.disk))
            started.hold(fd)
            os.close(fd)
        started.ready()
    assert "lock" in snapshots.write_by_qemu(site.disk)
    pid = site.pid
    keeper.ask(pid, journal.find_lock("web", site.journals))
    site.wait_for_end()
    assert snapshots.write_by_qemu(site.disk) == ""
    os.waitpid(pid, 0)


def test_a_full_file_system_does_not_stop_it(make_tmpfs: MakeTmpfs) -> None:
    # the scratch files that fill the file system are what has to go, and the journal lies on it as well
    folder = make_tmpfs(4 << 20)
    with snapshots.open_journal(folder / "journals") as kept:
        started = keeper.start_keeper(kept, snapshots.KINDS, LONG)
        kept.add("file", path=str(folder / "filling"))
        snapshots.fill(folder / "filling")
        started.abandon()
    assert not (folder / "filling").exists()
    assert os.listdir(folder / "journals") == []
