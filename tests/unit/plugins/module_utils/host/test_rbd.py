# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Snapshots of Ceph RBD, on a real cluster of one monitor and one OSD; and how images are named."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import time
import typing as t

import pytest

from ansible_collections.vmbackup.vma.extensions.molecule.tools import check_instant
from ansible_collections.vmbackup.vma.plugins.module_utils.host import provider, rbd
from ansible_collections.vmbackup.vma.plugins.module_utils.host.errors import SnapshotError
from ansible_collections.vmbackup.vma.plugins.module_utils.vma import errors
from ansible_collections.vmbackup.vma.tests.machines import ceph_cluster
from ansible_collections.vmbackup.vma.tests.machines.provider_run import RUN_ID, Guest, Run, disks, paths
from ansible_collections.vmbackup.vma.tests.machines.writer import DISK_SIZE, Writer, compile_writer

MIB = 1 << 20
SNAPSHOT = f"vmbackup-vma-{RUN_ID}"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("rbd/web", rbd.Location("rbd", "", "web")),
        ("rbd:rbd/web", rbd.Location("rbd", "", "web")),
        ("rbd:rbd/tenant/web", rbd.Location("rbd", "tenant", "web")),
        ("rbd:rbd/web:id=libvirt:conf=/etc/ceph/a.conf", rbd.Location("rbd", "", "web", "/etc/ceph/a.conf", "libvirt")),
        (r"rbd:rbd/we\:b:conf=/a\:b", rbd.Location("rbd", "", "we:b", "/a:b")),
    ],
)
def test_an_image_is_named_as_qemu_names_it(path: str, expected: rbd.Location) -> None:
    assert rbd.Location.parse(path) == expected


@pytest.mark.parametrize(
    "path", ["web", "rbd:web", "rbd:", "rbd/", "rbd/a@b", "a/b/c/d", "rbd:rbd/web:", "rbd:rbd/web\\"]
)
def test_what_names_no_image_is_refused(path: str) -> None:
    with pytest.raises(errors.RequestError, match="names no image"):
        rbd.Location.parse(path)


def test_an_option_that_would_be_ignored_is_refused() -> None:
    with pytest.raises(errors.RequestError, match="the options mon_host of an RBD image are not known"):
        rbd.Location.parse(r"rbd:rbd/web:mon_host=10.0.0.1\:6789:id=admin")


def test_only_what_says_so_is_taken_for_an_image() -> None:
    """C(pool/volume) may be one of ZFS."""
    assert rbd.RbdImages.fits("rbd:rbd/web")
    assert not rbd.RbdImages.fits("rbd/web")


def test_without_ceph_its_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(errors.ToolError, match="Install the package ceph-common"):
        rbd.RbdImages(disks("rbd/web")).plan()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> t.Iterator[ceph_cluster.Cluster]:
    """A cluster."""
    lacking = ceph_cluster.missing_tools()
    if os.geteuid() != 0:
        lacking.append("root")
    if lacking:
        pytest.skip(f"a cluster of Ceph needs {', '.join(lacking)}")
    with ceph_cluster.running(tmp_path_factory.mktemp("ceph") / "cluster") as running:
        yield running


Make = t.Callable[..., str]


@pytest.fixture
def make(cluster: ceph_cluster.Cluster) -> t.Iterator[Make]:
    """Make images; returns their paths."""
    names: list[str] = []

    def make_image(*options: str) -> str:
        names.append(f"image{len(names)}")
        cluster.run("rbd", "create", f"rbd/{names[-1]}", "--size", f"{DISK_SIZE // MIB}M", *options)
        return f"rbd:rbd/{names[-1]}:conf={cluster.conf}"

    yield make_image
    for name in names:
        cluster.run("rbd", "--no-progress", "snap", "purge", f"rbd/{name}")
        cluster.run("rbd", "--no-progress", "rm", f"rbd/{name}")


@pytest.fixture
def opened(tmp_path: pathlib.Path) -> t.Iterator[t.Callable[[str], pathlib.Path]]:
    """Open images for writing, as a guest's QEMU does; returns files that show them."""
    if shutil.which("qemu-storage-daemon") is None:
        pytest.skip("the tool qemu-storage-daemon is not installed")
    with contextlib.ExitStack() as stack:

        def open_image(path: str) -> pathlib.Path:
            location = rbd.Location.parse(path)
            view = tmp_path / location.image
            view.touch()
            node = {
                "driver": "rbd",
                "pool": "rbd",
                "image": location.image,
                "conf": location.conf,
                "node-name": "image",
            }
            export = {"type": "fuse", "id": "view", "node-name": "image", "mountpoint": str(view), "writable": True}
            ready = tmp_path / f"{location.image}.pid"
            command = ["setpriv", "--pdeathsig", "TERM", "qemu-storage-daemon", "--blockdev", json.dumps(node)]
            process = subprocess.Popen([*command, "--export", json.dumps(export), "--pidfile", str(ready)])
            stack.callback(process.wait)
            stack.callback(process.terminate)
            while not ready.exists():
                assert process.poll() is None
                time.sleep(0.02)
            return view

        yield open_image


@pytest.fixture
def writer(tmp_path: pathlib.Path) -> t.Iterator[t.Callable[..., Writer]]:
    """Start processes that write to disks all the time."""
    if shutil.which("cc") is None:
        pytest.skip("the writer cannot be compiled: cc of gcc is not installed")
    with contextlib.ExitStack() as stack:
        yield lambda *files: stack.enter_context(Writer(compile_writer(tmp_path), files))


def snapshots_of(cluster: ceph_cluster.Cluster, path: str) -> list[str]:
    listed = json.loads(cluster.run("rbd", "--format=json", "snap", "ls", rbd.Location.parse(path).spec))
    return [row["name"] for row in listed]


def test_an_image_is_frozen_while_its_guest_writes(
    cluster: ceph_cluster.Cluster,
    make: Make,
    opened: t.Callable[[str], pathlib.Path],
    writer: t.Callable[..., Writer],
    tmp_path: pathlib.Path,
) -> None:
    path = make()
    guest = writer(opened(path))
    with Run(tmp_path, rbd.RbdImages(disks(path))) as run:
        planned = run.provider.plan()
        assert planned.consistency == provider.CRASH
        # the writer has been to all 16 objects of 4 MiB
        assert [(disk.size, disk.allocated) for disk in planned.disks] == [(DISK_SIZE, DISK_SIZE)]
        assert snapshots_of(cluster, path) == []
        last = guest.last_write()
        frozen = run.freeze()
        assert (frozen.consistency, run.guest.musts) == (provider.CRASH, [False])
        assert snapshots_of(cluster, path) == [SNAPSHOT]
        (view,) = paths(frozen)
        assert check_instant.check([view], at_least=last) >= last
        seen = view.read_bytes()
        guest.wait_for_writes(guest.last_write() + 100)
        assert view.read_bytes() == seen
        assert run.trouble() is None
        assert run.release() == [
            f"the view {view}",
            f"the RBD snapshot rbd/image0@{SNAPSHOT}",
            f"the folder {view.parent}",
        ]
        assert run.release() == []
    assert snapshots_of(cluster, path) == []
    guest.wait_for_writes(guest.last_write() + 100)


def test_images_of_a_guest_that_is_held_are_of_one_instant(
    make: Make,
    opened: t.Callable[[str], pathlib.Path],
    writer: t.Callable[..., Writer],
    tmp_path: pathlib.Path,
) -> None:
    images = [make(), make()]
    guest = writer(*map(opened, images))
    with Run(tmp_path, rbd.RbdImages(disks(*images)), Guest(guest)) as run:
        frozen = run.freeze()
        assert run.guest.musts == [True]
        check_instant.check(paths(frozen))


def test_images_of_a_guest_that_cannot_be_held_are_refused(
    cluster: ceph_cluster.Cluster, make: Make, opened: t.Callable[[str], pathlib.Path], tmp_path: pathlib.Path
) -> None:
    images = [make(), make()]
    opened(images[1])
    with Run(tmp_path, rbd.RbdImages(disks(*images))) as run, pytest.raises(SnapshotError, match="cannot be held"):
        run.freeze()
    assert [snapshots_of(cluster, path) for path in images] == [[], []]


def test_images_that_nobody_has_open_need_no_guest(make: Make, tmp_path: pathlib.Path) -> None:
    with Run(tmp_path, rbd.RbdImages(disks(make(), make()))) as run:
        frozen = run.freeze()
        assert (frozen.consistency, run.guest.musts) == (provider.OFFLINE, [False])
        assert [disk.allocated for disk in frozen.disks] == [0, 0]
        assert [path.stat().st_size for path in paths(frozen)] == [DISK_SIZE] * 2


def test_an_image_without_fast_diff_takes_up_all_of_its_size(make: Make) -> None:
    path = make("--image-feature", "layering")
    assert rbd.RbdImages(disks(path)).plan().disks[0].allocated == DISK_SIZE


def test_an_image_that_is_not_there_is_refused(cluster: ceph_cluster.Cluster) -> None:
    with pytest.raises(errors.SourceError, match=r"no such image.*rbd --conf=.*ceph.conf ls rbd lists the images"):
        rbd.RbdImages(disks(f"rbd:rbd/none:conf={cluster.conf}")).plan()


def test_a_snapshot_that_was_removed_by_others_is_missed(
    cluster: ceph_cluster.Cluster, make: Make, tmp_path: pathlib.Path
) -> None:
    path = make()
    with Run(tmp_path, rbd.RbdImages(disks(path))) as run:
        run.freeze()
        cluster.run("rbd", "--no-progress", "snap", "rm", f"rbd/image0@{SNAPSHOT}")
        assert run.trouble() == f"the RBD snapshot rbd/image0@{SNAPSHOT} is gone"
        assert not any("RBD" in what for what in run.release())


def test_other_snapshots_stay(cluster: ceph_cluster.Cluster, make: Make, tmp_path: pathlib.Path) -> None:
    path = make()
    cluster.run("rbd", "--no-progress", "snap", "create", "rbd/image0@vmbackup-vma-ffffffff")
    with Run(tmp_path, rbd.RbdImages(disks(path))) as run:
        run.freeze()
    assert snapshots_of(cluster, path) == ["vmbackup-vma-ffffffff"]
