# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Snapshots of LVM: on real volumes, in a guest whose kernel has device-mapper; and what needs no volumes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import subprocess
import typing as t

import pytest

from ansible_collections.vmbackup.vma.extensions.molecule.tools import check_instant
from ansible_collections.vmbackup.vma.plugins.module_utils.host import lvm, provider
from ansible_collections.vmbackup.vma.plugins.module_utils.host.errors import SnapshotError
from ansible_collections.vmbackup.vma.plugins.module_utils.vma import errors, image
from ansible_collections.vmbackup.vma.tests.machines.in_storage_guest import in_storage_guest
from ansible_collections.vmbackup.vma.tests.machines.provider_run import RUN_ID, Guest, Run, disks, paths
from ansible_collections.vmbackup.vma.tests.machines.writer import Writer, compile_writer

pytest_plugins = ("ansible_collections.vmbackup.vma.tests.machines.in_storage_guest",)

MIB = 1 << 20
EXTENT = 4 * MIB
GROUP = "guests"

ROW = {
    "vg_name": "vg0",
    "lv_name": "web",
    "lv_size": "268435456",
    "lv_layout": "thin,sparse",
    "lv_kernel_major": "253",
    "lv_kernel_minor": "5",
    "pool_lv": "pool",
    "data_percent": "25.00",
    "metadata_percent": "",
    "lv_tags": "vmbackup-vma,other",
    "lv_device_open": "1",
    "lv_snapshot_invalid": "-1",
    "lv_health_status": "",
    "vg_free": "2940207104",
    "vg_extent_size": "4194304",
}


def parse(**fields: str) -> lvm.Volume:
    (volume,) = lvm.parse_report(json.dumps({"report": [{"lv": [{**ROW, **fields}]}]})).values()
    return volume


def test_a_thin_volume_takes_up_its_share() -> None:
    volume = parse()
    assert (volume.location, volume.device, volume.is_thin, volume.pool) == (("vg0", "web"), 253 << 8 | 5, True, "pool")
    assert (volume.size, volume.allocated) == (256 * MIB, 64 * MIB)
    assert volume.is_open
    assert not volume.is_invalid
    assert volume.tags == {"vmbackup-vma", "other"}


def test_an_inactive_volume_has_no_device_and_is_not_open() -> None:
    volume = parse(lv_kernel_major="-1", lv_kernel_minor="-1", lv_device_open="-1", lv_layout="linear", pool_lv="")
    assert volume.device is None
    assert not volume.is_open
    assert volume.allocated == volume.size


def test_hidden_volumes_lose_their_brackets() -> None:
    assert parse(lv_name="[pool_tdata]").name == "pool_tdata"


@pytest.mark.parametrize(
    ("free", "sizes"),
    [
        # a fifth, in whole extents
        (10000, {"a": 204, "b": 24}),
        # what there is, by size: 84 - 2 * 2 * 4 MiB for 1100
        (84, {"a": 64, "b": 8}),
    ],
)
def test_a_thick_snapshot_is_as_large_as_it_may(free: int, sizes: dict[str, int]) -> None:
    common = {"lv_layout": "linear", "vg_free": str(free * MIB)}
    volumes = [
        parse(lv_name="a", lv_size=str(1000 * MIB), **common),
        parse(lv_name="b", lv_size=str(100 * MIB), **common),
    ]
    found = lvm.snapshot_sizes(volumes)
    assert {name: size // MIB for (_group, name), size in found.items()} == sizes
    assert sum(found.values()) <= free * MIB


def test_a_thick_snapshot_that_is_too_small_is_not_taken() -> None:
    volume = parse(lv_layout="linear", lv_size=str(1000 * MIB), vg_free=str(56 * MIB))
    with pytest.raises(errors.SpaceError, match="need 58 MiB in the volume group vg0, 56 MiB are free"):
        lvm.snapshot_sizes([volume])


def lv(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


def names_of_volumes() -> set[str]:
    listed = subprocess.run(["lvs", "--noheadings", "-o", "lv_name", GROUP], check=True, capture_output=True, text=True)
    return set(listed.stdout.split())


@pytest.fixture(scope="module")
def group() -> t.Iterator[None]:
    """A volume group of 4 GiB with a thin pool."""
    lv("vgcreate", "-y", GROUP, "/dev/vda")
    lv("lvcreate", "-y", "-L", "512M", "-T", f"{GROUP}/pool")
    yield
    lv("vgremove", "-y", GROUP)
    lv("pvremove", "-y", "/dev/vda")


Make = t.Callable[..., str]


@pytest.fixture
def make(group: None) -> t.Iterator[Make]:  # noqa: ARG001 (there has to be one)
    """Make thick and thin volumes of a size in MiB; returns their paths."""
    present = names_of_volumes()
    count = 0

    def make_volume(kind: str, size: int = 64) -> str:
        nonlocal count
        count += 1
        name = f"{kind}{count}"
        where = ["-L", f"{size}M", GROUP] if kind == "thick" else ["-V", f"{size}M", "-T", f"{GROUP}/pool"]
        lv("lvcreate", "-y", "-Wn", "-n", name, *where)
        return f"/dev/{GROUP}/{name}"

    yield make_volume
    for name in sorted(names_of_volumes() - present):
        lv("lvremove", "-y", f"{GROUP}/{name}")


@pytest.fixture
def writer(tmp_path: pathlib.Path) -> t.Iterator[t.Callable[..., Writer]]:
    """Start processes that write to volumes all the time."""
    with contextlib.ExitStack() as stack:
        yield lambda *volumes: stack.enter_context(Writer(compile_writer(tmp_path), volumes))


def digest(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@in_storage_guest
@pytest.mark.parametrize("kind", ["thick", "thin"])
def test_a_volume_is_frozen_while_its_guest_writes(
    kind: str, make: Make, writer: t.Callable[..., Writer], tmp_path: pathlib.Path
) -> None:
    volume = make(kind)
    guest = writer(volume)
    before = names_of_volumes()
    with Run(tmp_path, lvm.LvmVolumes(disks(volume))) as run:
        planned = run.provider.plan()
        assert names_of_volumes() == before
        last = guest.last_write()
        frozen = run.freeze()
        assert (frozen.consistency, run.guest.musts) == (provider.CRASH, [False])
        assert check_instant.check(paths(frozen), at_least=last) >= last
        assert names_of_volumes() - before == {f"vmbackup-vma-{RUN_ID}-0"}
        seen = digest(*paths(frozen))
        guest.wait_for_writes(guest.last_write() + 100)
        assert digest(*paths(frozen)) == seen
        assert run.trouble() is None
        assert [disk.size for disk in frozen.disks] == [disk.size for disk in planned.disks] == [64 * MIB]
        # the writer has written 64 blocks of 4 KiB, each in another chunk of 64 KiB
        assert [disk.allocated for disk in planned.disks] == [{"thick": 64 * MIB, "thin": 4 * MIB}[kind]]
        assert run.release() == [f"the LVM snapshot {GROUP}/vmbackup-vma-{RUN_ID}-0"]
        assert run.release() == []
    assert names_of_volumes() == before
    guest.wait_for_writes(guest.last_write() + 100)


@in_storage_guest
def test_volumes_of_a_guest_that_is_held_are_of_one_instant(
    make: Make, writer: t.Callable[..., Writer], tmp_path: pathlib.Path
) -> None:
    volumes = [make("thick"), make("thin")]
    guest = writer(*volumes)
    with Run(tmp_path, lvm.LvmVolumes(disks(*volumes)), Guest(guest)) as run:
        frozen = run.freeze()
        assert run.guest.musts == [True]
        check_instant.check(paths(frozen))
        guest.wait_for_writes(guest.last_write() + 100)


@in_storage_guest
def test_volumes_of_a_guest_that_goes_on_are_of_several_instants(
    make: Make, writer: t.Callable[..., Writer], tmp_path: pathlib.Path
) -> None:
    """The reason for holding it, and the proof that the judge would notice."""

    class Liar(Guest):
        @contextlib.contextmanager
        def standing_still(self, *, must: bool) -> t.Iterator[str]:
            self.musts.append(must)
            yield provider.CRASH

    volumes = [make("thick"), make("thick")]
    writer(*volumes)
    with Run(tmp_path, lvm.LvmVolumes(disks(*volumes)), Liar()) as run:
        frozen = run.freeze()
        with pytest.raises(check_instant.NotOneInstant):
            check_instant.check(paths(frozen))


@in_storage_guest
def test_volumes_of_a_guest_that_cannot_be_held_are_refused(
    make: Make, writer: t.Callable[..., Writer], tmp_path: pathlib.Path
) -> None:
    volumes = [make("thick"), make("thick")]
    writer(*volumes)
    before = names_of_volumes()
    with Run(tmp_path, lvm.LvmVolumes(disks(*volumes))) as run:
        with pytest.raises(SnapshotError, match="cannot be held"):
            run.freeze()
        assert run.journal.steps == []
    assert names_of_volumes() == before


@in_storage_guest
def test_volumes_that_nobody_has_open_need_no_guest(make: Make, tmp_path: pathlib.Path) -> None:
    volumes = [make("thick"), make("thin")]
    with Run(tmp_path, lvm.LvmVolumes(disks(*volumes))) as run:
        assert run.provider.plan().consistency == provider.OFFLINE
        frozen = run.freeze()
        assert (frozen.consistency, run.guest.musts) == (provider.OFFLINE, [False])
        for path in paths(frozen):
            with pytest.raises(OSError, match="not permitted"), path.open("r+b", buffering=0) as snapshot:
                snapshot.write(bytes(4096))


@in_storage_guest
def test_a_snapshot_that_overflows_is_noticed_and_gives_no_bytes(make: Make, tmp_path: pathlib.Path) -> None:
    volume = make("thick")
    with Run(tmp_path, lvm.LvmVolumes(disks(volume))) as run, open(volume, "r+b", buffering=0) as origin:
        frozen = run.freeze()
        assert run.trouble() is None
        reader = image.SourceImage(frozen.disks[0].path)
        with contextlib.closing(reader):
            reader.read(memoryview(bytearray(4096)), 0)
            for _mebibyte in range(32):
                origin.write(os.urandom(MIB))
            os.fsync(origin.fileno())
            trouble = run.trouble()
            assert trouble is not None
            assert f"the LVM snapshot {GROUP}/vmbackup-vma-{RUN_ID}-0 overflowed" in trouble
            with pytest.raises(errors.SourceError, match="Input/output error"):
                reader.read(memoryview(bytearray(4096)), 40 * MIB)
        assert len(run.release()) == 1
        # the guest's own volume does not suffer
        origin.write(b"x")


@in_storage_guest
def test_a_thin_pool_that_fills_is_noticed_before_guests_stop(make: Make, tmp_path: pathlib.Path) -> None:
    volume = make("thin", 1024)
    with Run(tmp_path, lvm.LvmVolumes(disks(volume))) as run, open(volume, "r+b", buffering=0) as origin:
        run.freeze()
        assert run.trouble() is None
        zeros = bytes(MIB)
        for _mebibyte in range(490):
            origin.write(zeros)
        os.fsync(origin.fileno())
        trouble = run.trouble()
        assert trouble is not None
        assert f"the thin pool {GROUP}/pool is nearly full: 95" in trouble
        run.release()
        with pytest.raises(errors.SpaceError, match=f"in the thin pool {GROUP}/pool below 95 %"):
            run.provider.plan()


@in_storage_guest
def test_a_group_without_room_is_refused(make: Make, tmp_path: pathlib.Path) -> None:
    volume = make("thick", 200)
    lv("lvcreate", "-y", "-Wn", "-n", "thickrest", "-l", "100%FREE", GROUP)
    with Run(tmp_path, lvm.LvmVolumes(disks(volume))) as run:
        for attempt in (run.provider.plan, run.freeze):
            with pytest.raises(errors.SpaceError, match=f"18 MiB in the volume group {GROUP}, 0 MiB are free"):
                attempt()
        assert run.journal.steps == []


@in_storage_guest
def test_volumes_are_known_by_any_path(make: Make, tmp_path: pathlib.Path) -> None:
    volume = make("thick", 4)
    link = tmp_path / "link"
    link.symlink_to(volume)
    mapper = f"/dev/mapper/{GROUP}-{os.path.basename(volume)}"
    for path in (volume, str(link), mapper, os.path.realpath(volume)):
        assert lvm.LvmVolumes.fits(path)
        assert lvm.LvmVolumes(disks(path)).plan().disks[0].size == 4 * MIB


@in_storage_guest
def test_what_is_no_active_volume_is_refused(make: Make) -> None:
    volume = make("thick", 4)
    lv("lvchange", "-an", volume.partition("/dev/")[2])
    for path, words in {
        f"/dev/{GROUP}/none": "lvs lists them all",
        volume: f"lvchange --activate y {volume.partition('/dev/')[2]}",
        "/dev/vdb": "expected a logical volume",
        "/etc/hosts": "expected a logical volume",
    }.items():
        assert not lvm.LvmVolumes.fits(path)
        with pytest.raises(errors.SourceError, match=words):
            lvm.LvmVolumes(disks(path)).plan()


@in_storage_guest
def test_a_volume_that_only_has_such_a_name_is_not_removed(make: Make, tmp_path: pathlib.Path) -> None:
    volume = make("thick", 4)
    name = f"vmbackup-vma-{RUN_ID}-0"
    with Run(tmp_path, lvm.LvmVolumes(disks(volume))) as run:
        run.freeze()
        lv("lvchange", "--deltag", provider.MARK, f"{GROUP}/{name}")
        with pytest.raises(SnapshotError, match="is not ours to remove"):
            run.release()
        assert name in names_of_volumes()
        lv("lvchange", "--addtag", provider.MARK, f"{GROUP}/{name}")


@in_storage_guest
def test_a_snapshot_that_was_removed_by_others_is_missed(make: Make, tmp_path: pathlib.Path) -> None:
    with Run(tmp_path, lvm.LvmVolumes(disks(make("thick", 4)))) as run:
        run.freeze()
        lv("lvremove", "-y", f"{GROUP}/vmbackup-vma-{RUN_ID}-0")
        assert run.trouble() == f"the LVM snapshot {GROUP}/vmbackup-vma-{RUN_ID}-0 is gone"
        assert run.release() == []


def test_who_is_not_root_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(SnapshotError, match="become"):
        lvm.LvmVolumes(disks("/dev/vg0/web")).plan()


def test_without_lvm_its_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(errors.ToolError, match="Install the package lvm2"):
        lvm.LvmVolumes(disks("/dev/vg0/web")).plan()
