# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Snapshots of ZFS: which commands are given, told by a stand-in; and real volumes, in a guest that has ZFS.

The modules of ZFS must be compiled for the guest, which takes minutes: its tests run with VMBACKUP_STORAGE_ZFS=1.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import subprocess
import sys
import time
import typing as t

import pytest

from ansible_collections.vmbackup.vma.extensions.molecule.tools import check_instant
from ansible_collections.vmbackup.vma.plugins.module_utils.host import provider, zfs
from ansible_collections.vmbackup.vma.plugins.module_utils.host.errors import SnapshotError
from ansible_collections.vmbackup.vma.plugins.module_utils.vma import errors
from ansible_collections.vmbackup.vma.tests.machines.in_storage_guest import in_storage_guest_with_zfs
from ansible_collections.vmbackup.vma.tests.machines.provider_run import RUN_ID, Guest, Run, disks, paths
from ansible_collections.vmbackup.vma.tests.machines.writer import Writer, compile_writer

pytest_plugins = ("ansible_collections.vmbackup.vma.tests.machines.in_storage_guest",)

MIB = 1 << 20
TAG = f"vmbackup-vma-{RUN_ID}"
MARK = f"vmbackup.vma:vm={TAG}"

STAND_IN = """\
#!{python}
import os, pathlib, sys
place = pathlib.Path({place!r})
words = sys.argv[1:]
with open(place / "commands", "a") as log:
    print(os.path.basename(sys.argv[0]), *words, file=log)
marks = place / "marks"
target = marks / words[-1].replace("/", "%")
if words[0] == "list" and "volume" in words:
    print((place / "volumes").read_text(), end="")
elif words[0] == "list":
    print((place / ("health" if "health" in words else "available")).read_text())
elif words[0] == "get":
    if not target.exists():
        sys.exit("cannot open '%s': dataset does not exist" % words[-1])
    print(target.read_text())
elif words[0] == "destroy":
    target.unlink()
else:
    mark = next(word for word in words if word.startswith("vmbackup.vma:vm=")).partition("=")[2]
    for name in words[words.index(next(word for word in words if "@" in word)):]:
        if words[0] == "snapshot" or "@" not in name:
            (marks / name.replace("/", "%")).write_text(mark)
    if words[0] == "clone":
        device = place / "devices" / words[-1]
        device.parent.mkdir(parents=True, exist_ok=True)
        device.touch()
"""


class StandIn:
    """Answers for C(zfs) and C(zpool): no kernel here has them. What it was asked is written down."""

    def __init__(self, place: pathlib.Path) -> None:
        self._place = place
        (place / "marks").mkdir(parents=True)
        self.set_volumes("tank/web\t1073741824\t536870912\t268435456\tnone\n")
        self.set("available", str(4096 * MIB))
        self.set("health", "ONLINE")
        tools = place / "tools"
        tools.mkdir()
        for name in ("zfs", "zpool"):
            tool = tools / name
            tool.write_text(STAND_IN.format(python=sys.executable, place=str(place)), encoding="utf-8")
            tool.chmod(0o755)

    def set_volumes(self, *lines: str) -> None:
        self.set("volumes", "".join(lines))

    def set(self, what: str, answer: str) -> None:
        (self._place / what).write_text(answer, encoding="utf-8")

    def mark_of(self, name: str) -> pathlib.Path:
        return self._place / "marks" / name.replace("/", "%")

    def commands(self) -> list[str]:
        """The commands that change something."""
        lines = (self._place / "commands").read_text(encoding="utf-8").splitlines()
        return [line for line in lines if line.split()[1] not in ("get", "list")]


@pytest.fixture
def stand_in(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """Tools of ZFS, with one volume in one pool."""
    place = tmp_path / "zfs"
    answers = StandIn(place)
    monkeypatch.setenv("PATH", f"{place}/tools{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(zfs, "_DEVICES", f"{place}/devices/")
    return answers


TWO = ("tank/a\t1073741824\t4096\t4096\tnone\n", "tank/sub/b\t1073741824\t4096\t4096\t1107296256\n")


def test_sizes_of_a_volume() -> None:
    volume = zfs.parse_list("tank/vm/web\t1073741824\t536870912\t268435456\t-\n")["tank/vm/web"]
    assert (volume.size, volume.allocated, volume.pool, volume.parent) == (1024 * MIB, 512 * MIB, "tank", "tank/vm")
    assert not volume.is_reserved
    assert zfs.parse_list("".join(TWO))["tank/sub/b"].is_reserved


def test_a_volume_is_snapshotted_and_cloned_and_both_are_destroyed(stand_in: StandIn, tmp_path: pathlib.Path) -> None:
    with Run(tmp_path, zfs.ZfsVolumes(disks("tank/web"))) as run:
        planned = run.provider.plan()
        assert [(disk.size, disk.allocated) for disk in planned.disks] == [(1024 * MIB, 512 * MIB)]
        assert stand_in.commands() == []
        frozen = run.freeze()
        assert paths(frozen) == [tmp_path / "zfs/devices/tank" / f"{TAG}-0"]
        assert (frozen.consistency, run.guest.musts) == (provider.CRASH, [False])
        assert run.trouble() is None
        assert run.release() == [f"the ZFS clone tank/{TAG}-0", f"the ZFS snapshots tank/web@{TAG}"]
        assert run.release() == []
    assert stand_in.commands() == [
        f"zfs snapshot -o {MARK} tank/web@{TAG}",
        f"zfs clone -o {MARK} -o readonly=on -o volmode=dev tank/web@{TAG} tank/{TAG}-0",
        f"zfs destroy tank/{TAG}-0",
        f"zfs destroy tank/web@{TAG}",
    ]


def test_volumes_of_one_pool_are_frozen_by_one_command(stand_in: StandIn, tmp_path: pathlib.Path) -> None:
    stand_in.set_volumes(*TWO)
    with Run(tmp_path, zfs.ZfsVolumes(disks("tank/a", "tank/sub/b"))) as run:
        run.freeze()
        assert run.guest.musts == [False]
    assert stand_in.commands()[0] == f"zfs snapshot -o {MARK} tank/a@{TAG} tank/sub/b@{TAG}"


def test_volumes_of_several_pools_need_a_guest_that_is_held(stand_in: StandIn, tmp_path: pathlib.Path) -> None:
    stand_in.set_volumes(*(line.replace("tank/sub", "dozer") for line in TWO))
    with Run(tmp_path, zfs.ZfsVolumes(disks("tank/a", "dozer/b"))) as run:
        with pytest.raises(SnapshotError, match="cannot be held"):
            run.freeze()
        assert run.guest.musts == [True]
        assert stand_in.commands() == []


def test_a_reservation_needs_room_for_all_that_is_there(stand_in: StandIn) -> None:
    stand_in.set_volumes("tank/web\t1073741824\t536870912\t268435456\t1107296256\n")
    stand_in.set("available", str(200 * MIB))
    with pytest.raises(errors.SpaceError, match="need 12 MiB in the ZFS dataset tank, besides 256 MiB to keep"):
        zfs.ZfsVolumes(disks("tank/web")).plan()
    stand_in.set("available", str(300 * MIB))
    zfs.ZfsVolumes(disks("tank/web")).plan()


@pytest.mark.parametrize(
    ("what", "answer", "trouble"),
    [
        ("health", "SUSPENDED", "the ZFS pool tank is SUSPENDED"),
        ("available", "1048576", "the ZFS pool tank is nearly full: 1 MiB are free, 64 MiB are needed"),
    ],
)
def test_a_pool_in_trouble_is_noticed(
    stand_in: StandIn, tmp_path: pathlib.Path, what: str, answer: str, trouble: str
) -> None:
    with Run(tmp_path, zfs.ZfsVolumes(disks("tank/web"))) as run:
        run.freeze()
        stand_in.set(what, answer)
        assert run.trouble() == trouble


def test_a_snapshot_that_was_destroyed_by_others_is_missed(stand_in: StandIn, tmp_path: pathlib.Path) -> None:
    with Run(tmp_path, zfs.ZfsVolumes(disks("tank/web"))) as run:
        run.freeze()
        for name in (f"tank/{TAG}-0", f"tank/web@{TAG}"):
            stand_in.mark_of(name).unlink()
        assert run.trouble() == f"the ZFS snapshot tank/web@{TAG} is gone"
        assert run.release() == []


def test_what_lacks_our_property_is_not_destroyed(stand_in: StandIn, tmp_path: pathlib.Path) -> None:
    with Run(tmp_path, zfs.ZfsVolumes(disks("tank/web"))) as run:
        run.freeze()
        mark = stand_in.mark_of(f"tank/web@{TAG}")
        mark.write_text("", encoding="utf-8")
        with pytest.raises(SnapshotError, match=f"tank/web@{TAG} lacks our property"):
            run.release()
        assert mark.exists()
        mark.write_text(TAG, encoding="utf-8")


def test_what_is_no_volume_is_refused(stand_in: StandIn) -> None:  # noqa: ARG001 (it answers)
    for path in ("tank/none", "/dev/zvol/tank/none", "/dev/null"):
        with pytest.raises(errors.SourceError, match="expected a volume of ZFS"):
            zfs.ZfsVolumes(disks(path)).plan()


def test_only_block_devices_are_taken_for_volumes() -> None:
    """C(pool/volume) may be an image of Ceph."""
    assert zfs.ZfsVolumes.fits("/dev/zvol/tank/web")
    assert zfs.ZfsVolumes.fits("/dev/zd16")
    assert not zfs.ZfsVolumes.fits("tank/web")


def test_without_zfs_its_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(errors.ToolError, match="Install the package zfsutils-linux"):
        zfs.ZfsVolumes(disks("tank/web")).plan()


def tool(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def pools() -> t.Iterator[None]:
    """Two pools of 4 GiB, tank and dozer."""
    for pool, device in {"tank": "/dev/vda", "dozer": "/dev/vdb"}.items():
        tool("zpool", "create", "-f", pool, device)
    yield
    for pool in ("tank", "dozer"):
        tool("zpool", "destroy", pool)


@pytest.fixture
def make(pools: None) -> t.Iterator[t.Callable[[str], str]]:  # noqa: ARG001 (they have to be there)
    """Make volumes of 64 MiB; returns the paths of their block devices."""
    names: list[str] = []

    def make_volume(pool: str) -> str:
        names.append(f"{pool}/disk{len(names)}")
        tool("zfs", "create", "-V", "64M", names[-1])
        path = f"/dev/zvol/{names[-1]}"
        while not os.path.exists(path):
            time.sleep(0.1)
        return path

    yield make_volume
    for name in names:
        # udev looks once more at what was written to
        while subprocess.run(["zfs", "destroy", name], check=False).returncode:
            time.sleep(0.1)


@pytest.fixture
def writer(tmp_path: pathlib.Path) -> t.Iterator[t.Callable[..., Writer]]:
    """Start processes that write to volumes all the time."""
    with contextlib.ExitStack() as stack:
        yield lambda *volumes: stack.enter_context(Writer(compile_writer(tmp_path), volumes))


def digest(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@in_storage_guest_with_zfs
def test_real_volumes_of_one_pool_are_of_one_instant(
    make: t.Callable[[str], str], writer: t.Callable[..., Writer], tmp_path: pathlib.Path
) -> None:
    volumes = [make("tank"), make("tank")]
    guest = writer(*volumes)
    before = tool("zfs", "list", "-H", "-t", "all", "-o", "name")
    with Run(tmp_path, zfs.ZfsVolumes(disks(*volumes))) as run:
        last = guest.last_write()
        frozen = run.freeze()
        assert run.guest.musts == [False]
        assert check_instant.check(paths(frozen), at_least=last) >= last
        seen = [digest(path) for path in paths(frozen)]
        guest.wait_for_writes(guest.last_write() + 100)
        assert [digest(path) for path in paths(frozen)] == seen
        assert run.trouble() is None
        assert len(run.release()) == 3
        assert run.release() == []
    assert tool("zfs", "list", "-H", "-t", "all", "-o", "name") == before


@in_storage_guest_with_zfs
def test_real_volumes_of_two_pools_are_of_one_instant_if_their_guest_is_held(
    make: t.Callable[[str], str], writer: t.Callable[..., Writer], tmp_path: pathlib.Path
) -> None:
    volumes = [make("tank"), make("dozer")]
    guest = writer(*volumes)
    with Run(tmp_path, zfs.ZfsVolumes(disks(*volumes)), Guest(guest)) as run:
        frozen = run.freeze()
        assert run.guest.musts == [True]
        check_instant.check(paths(frozen))


@in_storage_guest_with_zfs
def test_a_real_snapshot_without_our_property_is_not_destroyed(
    make: t.Callable[[str], str], tmp_path: pathlib.Path
) -> None:
    volume = make("tank")
    snapshot = f"{volume.partition('/dev/zvol/')[2]}@{TAG}"
    with Run(tmp_path, zfs.ZfsVolumes(disks(volume))) as run:
        run.freeze()
        tool("zfs", "inherit", "vmbackup.vma:vm", snapshot)
        with pytest.raises(SnapshotError, match="lacks our property"):
            run.release()
        tool("zfs", "set", MARK, snapshot)


@in_storage_guest_with_zfs
def test_a_real_clone_that_somebody_reads_is_destroyed_when_he_is_done(
    make: t.Callable[[str], str], tmp_path: pathlib.Path
) -> None:
    with Run(tmp_path, zfs.ZfsVolumes(disks(make("tank")))) as run:
        (clone,) = paths(run.freeze())
        with clone.open("rb") as file:
            reader = subprocess.Popen(["sleep", "1"], stdin=file)
        assert len(run.release()) == 2
        assert reader.wait() == 0
