# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Volumes of ZFS: frozen by a snapshot, those of one pool in one transaction, and read through clones of it.

A clone has a block device of its own, so that no property of the guest's volume needs to be changed. What is made
bears the user property C(vmbackup.vma:vm), set on itself; nothing else is ever destroyed.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import re
import shutil
import time
import typing as t

from ..vma.errors import SourceError, ToolError
from .command import CommandError, run
from .errors import SnapshotError
from .headroom import check_room, format_mib
from .journal import Fields
from .provider import CRASH, MARK, Disk, Frozen, Provider, StepKind, Work

_PURPOSE = "for snapshots of ZFS volumes"
_METHOD = "ZFS snapshot"
_PROPERTY = "vmbackup.vma:vm"
_DEVICES = "/dev/zvol/"
_FIELDS = ("name", "volsize", "logicalreferenced", "referenced", "refreservation")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 _.:-]*(?:/[A-Za-z0-9 _.:-]+)+")
_RESERVE = 64 << 20
"""Bytes that must stay free in a pool, so that a snapshot is let go before guests cannot write any more."""
_DEVICE_TIMEOUT = 60.0
_POLL = 0.1


def _run(command: t.Sequence[str]) -> str:
    """Run one of the tools. Raises: ToolError."""
    if shutil.which(command[0]) is None:
        raise ToolError(
            f"the tool {command[0]} is needed for {_METHOD}s and was not found in PATH",
            remedy="Install the package zfsutils-linux (Debian) or zfs (OpenZFS's own).",
        )
    return run(command, purpose=_PURPOSE)


class Volume(t.NamedTuple):
    """A volume as C(zfs list) tells of it; all sizes are bytes."""

    name: str
    size: int
    allocated: int
    """What it takes up before compression."""
    referenced: int
    is_reserved: bool
    """Whether all of its size is reserved: then a snapshot needs as much room again as it takes up."""

    @property
    def pool(self) -> str:
        """The pool that it is in."""
        return self.name.partition("/")[0]

    @property
    def parent(self) -> str:
        """The dataset that it is in."""
        return self.name.rpartition("/")[0]


def parse_list(text: str) -> dict[str, Volume]:
    """What C(zfs list -H -p) says with the fields above, by the volumes' names."""
    volumes = {}
    for line in text.splitlines():
        name, size, logical, referenced, reservation = line.split("\t")
        is_reserved = reservation not in ("-", "none", "0")
        volumes[name] = Volume(name, int(size), int(logical), int(referenced), is_reserved)
    return volumes


class ZfsVolumes(Provider):
    """Volumes, named by a path of their block device or as C(pool/volume)."""

    name = "zfs"
    kinds: t.ClassVar[t.Mapping[str, StepKind]]

    def __init__(self, disks: t.Sequence[Disk]) -> None:
        self._disks = disks

    @classmethod
    def fits(cls, path: str) -> bool:
        """See Provider."""
        return path.startswith(_DEVICES) or re.fullmatch(r"/dev/zd\d+", os.path.realpath(path)) is not None

    def plan(self) -> Frozen:
        """See Provider."""
        return self._result([disk.path for disk in self._disks], self._look(), CRASH)

    def freeze(self, work: Work) -> Frozen:
        """See Provider."""
        volumes = self._look()
        tag = f"{MARK}-{work.run_id}"
        pools: dict[str, list[str]] = collections.defaultdict(list)
        for volume in volumes:
            pools[volume.pool].append(f"{volume.name}@{tag}")
        mark = f"{_PROPERTY}={tag}"
        with work.stand_still(must=len(pools) > 1) as reached:
            for snapshots in pools.values():
                work.journal.add("zfs_snapshots", path=" ".join(snapshots), names=snapshots, mark=tag)
                _run(["zfs", "snapshot", "-o", mark, *snapshots])
        clones = [f"{volume.parent}/{tag}-{number}" for number, volume in enumerate(volumes)]
        for volume, clone in zip(volumes, clones):
            work.journal.add("zfs_clone", path=clone, mark=tag)
            options = ["-o", mark, "-o", "readonly=on", "-o", "volmode=dev"]
            _run(["zfs", "clone", *options, f"{volume.name}@{tag}", clone])
        return self._result([_wait_for_device(clone) for clone in clones], volumes, reached)

    def _look(self) -> list[Volume]:
        """The volumes of the disks. Raises: SourceError, SpaceError, ToolError."""
        known = parse_list(_run(["zfs", "list", "-H", "-p", "-t", "volume", "-o", ",".join(_FIELDS)]))
        volumes = [_find(disk.path, known) for disk in self._disks]
        parents: dict[str, list[Volume]] = collections.defaultdict(list)
        for volume in volumes:
            parents[volume.parent].append(volume)
        for parent, members in parents.items():
            free = _read_available(parent)
            reserved = sum(volume.referenced for volume in members if volume.is_reserved)
            where = f"the ZFS dataset {parent}"
            if reserved:
                where += f", besides {format_mib(reserved)} to keep the reservations of volumes"
            check_room(where, [volume.referenced for volume in members], max(0, free - reserved))
        return volumes

    def _result(self, paths: t.Iterable[str], volumes: t.Iterable[Volume], consistency: str) -> Frozen:
        disks = [
            dataclasses.replace(
                disk,
                path=path,
                size=volume.size if disk.format == "raw" else None,
                allocated=min(volume.size, volume.allocated),
            )
            for disk, path, volume in zip(self._disks, paths, volumes)
        ]
        return Frozen(disks, _METHOD, consistency)


def _find(path: str, known: t.Mapping[str, Volume]) -> Volume:
    """The volume behind a path or a name. Raises: SourceError."""
    name = path[len(_DEVICES) :] if path.startswith(_DEVICES) else path
    if name in known:
        return known[name]
    if path.startswith("/dev/"):
        device = os.path.realpath(path)
        for volume in known.values():
            if os.path.realpath(_DEVICES + volume.name) == device:
                return volume
    raise SourceError(
        "expected a volume of ZFS", file=path, remedy="Name it as POOL/VOLUME; zfs list -t volume lists them all."
    )


def _read_available(dataset: str) -> int:
    return int(_run(["zfs", "list", "-H", "-p", "-o", "available", dataset]))


def _wait_for_device(volume: str) -> str:
    """The path of a volume's block device, which udev makes in its own time. Raises: SnapshotError."""
    path = _DEVICES + volume
    deadline = time.monotonic() + _DEVICE_TIMEOUT
    while not os.path.exists(path):
        if time.monotonic() > deadline:
            raise SnapshotError(
                f"no block device appeared within {_DEVICE_TIMEOUT:g} seconds",
                file=path,
                remedy="Check that udevd runs.",
            )
        time.sleep(_POLL)
    return path


def _read_mark(name: str) -> str | None:
    """Our property of a dataset or snapshot, set on itself; empty where it lacks it, None where there is no such one.

    Raises: ToolError.
    """
    try:
        return _run(["zfs", "get", "-H", "-s", "local", "-o", "value", _PROPERTY, name]).strip()
    except CommandError as error:
        if "does not exist" in error.said:
            return None
        raise


def _destroy(name: str, mark: str) -> bool:
    """Destroy one dataset or snapshot that is ours, and nothing that hangs on it. False where it is gone already."""
    found = _read_mark(name)
    if found is None:
        return False
    if found != mark or MARK not in name.rpartition("@" if "@" in name else "/")[2]:
        raise SnapshotError(
            f"{name} lacks our property {_PROPERTY}={mark} and is not ours to destroy",
            remedy="Look whose it is, and rename or destroy it.",
        )
    # Who reads all new devices, as udev does, keeps one busy for a moment.
    deadline = time.monotonic() + _DEVICE_TIMEOUT
    while True:
        try:
            _run(["zfs", "destroy", name])
            return True
        except CommandError as error:
            if "busy" not in error.said or time.monotonic() > deadline:
                raise
        time.sleep(_POLL)


def _remove_snapshots(fields: Fields) -> str | None:
    removed = [name for name in fields["names"] if _destroy(name, fields["mark"])]
    return f"the ZFS snapshots {', '.join(removed)}" if removed else None


def _remove_clone(fields: Fields) -> str | None:
    return f"the ZFS clone {fields['path']}" if _destroy(fields["path"], fields["mark"]) else None


def _find_trouble(fields: Fields) -> str | None:
    for name in fields["names"]:
        if _read_mark(name) is None:
            return f"the ZFS snapshot {name} is gone"
    pool = fields["names"][0].partition("/")[0]
    health = _run(["zpool", "list", "-H", "-o", "health", pool]).strip()
    if health not in ("ONLINE", "DEGRADED"):
        return f"the ZFS pool {pool} is {health}"
    free = _read_available(pool)
    if free < _RESERVE:
        return f"the ZFS pool {pool} is nearly full: {format_mib(free)} are free, {format_mib(_RESERVE)} are needed"
    return None


ZfsVolumes.kinds = {
    "zfs_snapshots": StepKind(undo=_remove_snapshots, health=_find_trouble, is_ground=True),
    "zfs_clone": StepKind(undo=_remove_clone),
}

__all__ = ("Volume", "ZfsVolumes", "parse_list")
