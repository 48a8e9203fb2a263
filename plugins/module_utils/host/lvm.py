# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Volumes of LVM: frozen by thick or thin snapshots.

LVM freezes one volume at a time. Several of a VM are therefore frozen only while the guest stands still, or while
nobody has them open.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import shutil
import stat
import typing as t

from ..vma.errors import SourceError, SpaceError, ToolError
from .command import run
from .errors import SnapshotError
from .headroom import check_room, format_mib, required_room
from .journal import Fields
from .provider import CRASH, MARK, OFFLINE, Disk, Frozen, Provider, StepKind, Work, consistency_of

_PURPOSE = "for snapshots of LVM volumes"
_METHOD = "LVM snapshot"
_SHARE_PERCENT = 20
"""Percent of a volume that its thick snapshot can keep of what the guest overwrites, where there is room for it."""
_FULL_PERCENT = 95
"""Percent of a thin pool at which a snapshot is let go: a pool that is full stops every guest in it."""
_FIELDS = (
    "vg_name",
    "lv_name",
    "lv_size",
    "lv_layout",
    "lv_kernel_major",
    "lv_kernel_minor",
    "pool_lv",
    "data_percent",
    "metadata_percent",
    "lv_tags",
    "lv_device_open",
    "lv_snapshot_invalid",
    "lv_health_status",
    "vg_free",
    "vg_extent_size",
)
_Location = tuple[str, str]


def _run(command: t.Sequence[str]) -> str:
    """Run one of the tools. Raises: ToolError."""
    if shutil.which(command[0]) is None:
        raise ToolError(
            f"the tool {command[0]} is needed for {_METHOD}s and was not found in PATH",
            remedy="Install the package lvm2.",
        )
    return run(command, purpose=_PURPOSE)


@dataclasses.dataclass(frozen=True)
class Volume:
    """A logical volume as C(lvs) tells of it. Sizes are bytes, and so is C(group_free)."""

    group: str
    name: str
    size: int
    device: int | None
    """The number of its block device, where it is active."""
    is_thin: bool
    pool: str
    data_percent: float
    """Of a thin volume what it takes up, of a thick snapshot or a thin pool how full it is."""
    metadata_percent: float
    tags: frozenset[str]
    is_open: bool
    is_invalid: bool
    health: str
    group_free: int
    extent_size: int

    @property
    def location(self) -> _Location:
        """What tells it from all others on the host."""
        return self.group, self.name

    @property
    def allocated(self) -> int:
        """The bytes that it takes up at most."""
        return int(self.size * self.data_percent / 100) if self.is_thin else self.size


def parse_report(text: str) -> dict[_Location, Volume]:
    """What C(lvs) says in JSON with C(--binary), sizes in bytes, and the fields above."""
    rows = [row for report in json.loads(text)["report"] for row in report["lv"]]
    return {volume.location: volume for volume in map(_parse_row, rows)}


def _parse_row(row: t.Mapping[str, str]) -> Volume:
    major, minor = int(row["lv_kernel_major"]), int(row["lv_kernel_minor"])
    layout = row["lv_layout"].split(",")
    return Volume(
        group=row["vg_name"],
        # Volumes that LVM keeps for itself stand in brackets.
        name=row["lv_name"].strip("[]"),
        size=int(row["lv_size"]),
        device=None if major < 0 else os.makedev(major, minor),
        is_thin="thin" in layout and "pool" not in layout,
        pool=row["pool_lv"].strip("[]"),
        data_percent=float(row["data_percent"] or 0),
        metadata_percent=float(row["metadata_percent"] or 0),
        tags=frozenset(filter(None, row["lv_tags"].split(","))),
        is_open=row["lv_device_open"] == "1",
        is_invalid=row["lv_snapshot_invalid"] == "1",
        health=row["lv_health_status"],
        group_free=int(row["vg_free"]),
        extent_size=int(row["vg_extent_size"]),
    )


def _read_volumes(*groups: str) -> dict[_Location, Volume]:
    """The volumes of some groups, or of all. Raises: SnapshotError, ToolError."""
    if os.geteuid() != 0:
        raise SnapshotError("LVM answers root alone", remedy="Run the task with become: true.")
    command = ["lvs", "--all", "--reportformat=json", "--units=b", "--nosuffix", "--binary"]
    return parse_report(_run([*command, f"--options={','.join(_FIELDS)}", *groups]))


def snapshot_sizes(volumes: t.Sequence[Volume]) -> dict[_Location, int]:
    """How large the thick snapshots of thick volumes become, in whole extents.

    Where their group has not enough room, each gets its share of what there is. Raises: SpaceError.
    """
    groups: dict[str, list[Volume]] = collections.defaultdict(list)
    for volume in volumes:
        groups[volume.group].append(volume)
    sizes = {}
    for group, members in groups.items():
        free, extent = members[0].group_free, members[0].extent_size
        total = sum(member.size for member in members)
        # A snapshot takes an extent at least, and one more lets every share be rounded up.
        free_shares = free - 2 * extent * len(members)
        if free_shares < required_room(member.size for member in members):
            needed = required_room(member.size for member in members) + 2 * extent * len(members)
            raise SpaceError(
                f"snapshots need {format_mib(needed)} in the volume group {group}, {format_mib(free)} are free",
                remedy=f"Add a disk to the group (vgextend {group} ...), or free some of it.",
            )
        for member in members:
            wanted = min(member.size * _SHARE_PERCENT // 100, free_shares * member.size // total)
            sizes[member.location] = (wanted // extent + 1) * extent
    return sizes


def _check_pools(volumes: t.Iterable[Volume], known: t.Mapping[_Location, Volume]) -> None:
    """Refuse thin volumes whose pool is so full that the guest's own writes could fill it. Raises: SpaceError."""
    members: dict[_Location, list[Volume]] = collections.defaultdict(list)
    for volume in volumes:
        members[volume.group, volume.pool].append(volume)
    for location, thin in members.items():
        pool = known[location]
        where = f"the thin pool {pool.group}/{pool.name} below {_FULL_PERCENT} % of its size"
        free = int(pool.size * (_FULL_PERCENT - pool.data_percent) / 100)
        check_room(where, [volume.allocated for volume in thin], max(0, free))
        trouble = _find_pool_trouble(pool)
        if trouble is not None:
            raise SpaceError(trouble, remedy=f"Enlarge it: lvextend --poolmetadatasize, or lvextend {pool.group}/...")


def _find_pool_trouble(pool: Volume) -> str | None:
    name = f"the thin pool {pool.group}/{pool.name}"
    if pool.health:
        return f"{name} is not well: {pool.health}"
    for what, percent in (("data", pool.data_percent), ("metadata", pool.metadata_percent)):
        if percent >= _FULL_PERCENT:
            return f"{name} is nearly full: {percent:g} % of its {what}"
    return None


class LvmVolumes(Provider):
    """Logical volumes, named by any path of their block devices."""

    name = "lvm"
    kinds: t.ClassVar[t.Mapping[str, StepKind]]

    def __init__(self, disks: t.Sequence[Disk]) -> None:
        self._disks = disks

    @classmethod
    def fits(cls, path: str) -> bool:
        """See Provider."""
        try:
            status = os.stat(path)
        except OSError:
            return False
        device = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
        try:
            with open(f"/sys/dev/block/{device}/dm/uuid", encoding="ascii") as uuid:
                return stat.S_ISBLK(status.st_mode) and uuid.read().startswith("LVM-")
        except OSError:
            return False

    def plan(self) -> Frozen:
        """See Provider."""
        volumes, _sizes = self._look()
        consistency = CRASH if any(volume.is_open for volume in volumes) else OFFLINE
        return self._result([disk.path for disk in self._disks], volumes, consistency)

    def freeze(self, work: Work) -> Frozen:
        """See Provider."""
        volumes, sizes = self._look()
        is_used = any(volume.is_open for volume in volumes)
        names = [f"{MARK}-{work.run_id}-{number}" for number in range(len(volumes))]
        with work.stand_still(must=is_used and len(volumes) > 1) as reached:
            for volume, name in zip(volumes, names):
                _create(work, volume, name, sizes.get(volume.location))
        if not is_used:
            still = _read_volumes(*{volume.group for volume in volumes})
            if any(still[volume.location].is_open for volume in volumes):
                raise SnapshotError("a volume was opened while the volumes were being frozen", remedy="Run it again.")
        paths = [f"/dev/{volume.group}/{name}" for volume, name in zip(volumes, names)]
        return self._result(paths, volumes, consistency_of(reached, len(volumes), is_used=is_used))

    def _look(self) -> tuple[list[Volume], dict[_Location, int]]:
        """The volumes of the disks, and how large the thick snapshots become."""
        known = _read_volumes()
        volumes = [_find(disk.path, known) for disk in self._disks]
        _check_pools([volume for volume in volumes if volume.is_thin], known)
        return volumes, snapshot_sizes([volume for volume in volumes if not volume.is_thin])

    def _result(self, paths: t.Iterable[str], volumes: t.Iterable[Volume], consistency: str) -> Frozen:
        disks = [
            dataclasses.replace(
                disk,
                path=path,
                size=volume.size if disk.format == "raw" else None,
                allocated=volume.allocated,
            )
            for disk, path, volume in zip(self._disks, paths, volumes)
        ]
        return Frozen(disks, _METHOD, consistency)


def _find(path: str, known: t.Mapping[_Location, Volume]) -> Volume:
    """The volume behind a path. Raises: SourceError."""
    try:
        status = os.stat(path)
    except OSError as error:
        remedy = "Name the volume as /dev/GROUP/VOLUME; lvs lists them all."
        parts = path.split("/")
        if len(parts) == 4 and (parts[2], parts[3]) in known:
            remedy = f"The volume is not active: lvchange --activate y {parts[2]}/{parts[3]}."
        raise SourceError(f"cannot be opened: {error.strerror}", file=path, remedy=remedy) from error
    if stat.S_ISBLK(status.st_mode):
        for volume in known.values():
            if volume.device == status.st_rdev:
                return volume
    raise SourceError("expected a logical volume of LVM", file=path, remedy="Use the provider of its storage.")


def _create(work: Work, origin: Volume, name: str, size: int | None) -> None:
    """Take a snapshot: a thick one of C(size) bytes, or a thin one."""
    pool = origin.pool if origin.is_thin else None
    path = f"/dev/{origin.group}/{name}"
    work.journal.add("lvm_snapshot", path=path, group=origin.group, name=name, pool=pool)
    command = ["lvcreate", "--quiet", "--yes", "--snapshot", f"--name={name}", f"--addtag={MARK}", "--permission=r"]
    # A thin snapshot would else stay inactive, unlike a thick one.
    command += ["--setactivationskip=n"] if size is None else [f"--size={size}b"]
    _run([*command, f"{origin.group}/{origin.name}"])


def _remove(fields: Fields) -> str | None:
    group, name = fields["group"], fields["name"]
    snapshot = _read_volumes().get((group, name))
    if snapshot is None:
        return None
    if not name.startswith(f"{MARK}-") or MARK not in snapshot.tags:
        raise SnapshotError(
            f"the volume {group}/{name} lacks the tag {MARK} and is not ours to remove",
            remedy="Look whose it is, and rename or remove it.",
        )
    _run(["lvremove", "--quiet", "--yes", f"{group}/{name}"])
    return f"the LVM snapshot {group}/{name}"


def _find_trouble(fields: Fields) -> str | None:
    group, name, pool = fields["group"], fields["name"], fields["pool"]
    known = _read_volumes(group)
    snapshot = known.get((group, name))
    if snapshot is None:
        return f"the LVM snapshot {group}/{name} is gone"
    if pool is not None:
        return _find_pool_trouble(known[group, pool])
    if snapshot.is_invalid or snapshot.data_percent >= 100:
        return (
            f"the LVM snapshot {group}/{name} overflowed: the guest overwrote more than its {format_mib(snapshot.size)}"
        )
    return None


LvmVolumes.kinds = {"lvm_snapshot": StepKind(undo=_remove, health=_find_trouble)}

__all__ = ("LvmVolumes", "Volume", "parse_report", "snapshot_sizes")
