# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Images of Ceph RBD: frozen by snapshots, and read through a raw view by QEMU's own driver.

Ceph could freeze the images of a group at once, but QEMU cannot open such a snapshot: its names are not in the name
space that QEMU looks into (tried with QEMU 7.2 and Ceph 16). So several images of a VM are frozen one after the other
while the guest stands still, or while nobody has them open.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import typing as t

from ..vma.errors import RequestError, SourceError, ToolError
from .command import CommandError, run
from .errors import SnapshotError
from .folder import make_folder
from .journal import Fields
from .provider import CRASH, MARK, OFFLINE, Disk, Frozen, Provider, StepKind, Work, consistency_of
from .view import open_view

_PURPOSE = "for snapshots of Ceph RBD images"
_METHOD = "RBD snapshot"
_PREFIX = "rbd:"
_PART = re.compile(r"(?:[^:\\]|\\.)+", re.DOTALL)
_REMEDY = "Name the image as POOL/IMAGE or rbd:POOL/IMAGE:conf=/etc/ceph/ceph.conf:id=admin."


def _run(command: t.Sequence[str]) -> str:
    """Run one of the tools. Raises: ToolError."""
    if shutil.which(command[0]) is None:
        raise ToolError(
            f"the tool {command[0]} is needed for {_METHOD}s and was not found in PATH",
            remedy="Install the package ceph-common.",
        )
    return run(command, purpose=_PURPOSE)


@dataclasses.dataclass(frozen=True)
class Location:
    """Where an image is: C(conf) is Ceph's configuration file, C(user) its user, without C(client.)."""

    pool: str
    namespace: str
    image: str
    conf: str | None = None
    user: str | None = None

    @classmethod
    def parse(cls, path: str) -> Location:
        """C(pool/image), C(pool/namespace/image), or either as QEMU writes it: C(rbd:pool/image:key=value:...).

        Raises: RequestError.
        """
        text = path[len(_PREFIX) :] if path.startswith(_PREFIX) else path
        parts = _PART.findall(text)
        words = [_unescape(word) for word in parts[0].split("/")] if parts else []
        if ":".join(parts) != text or len(words) not in (2, 3) or not all(words) or "@" in parts[0]:
            raise RequestError("this names no image of Ceph RBD", file=path, remedy=_REMEDY)
        options = {key: _unescape(value) for key, _sign, value in (part.partition("=") for part in parts[1:])}
        unknown = sorted(set(options) - {"conf", "id"})
        if unknown:
            raise RequestError(
                f"the options {', '.join(unknown)} of an RBD image are not known here: conf and id are",
                file=path,
                remedy="Write them into a configuration file of Ceph, and name that as conf.",
            )
        return cls(words[0], "/".join(words[1:-1]), words[-1], options.get("conf"), options.get("id"))

    @property
    def spec(self) -> str:
        """The image as the tool C(rbd) names it."""
        return "/".join(filter(None, (self.pool, self.namespace, self.image)))

    def command(self, *words: str) -> list[str]:
        """A command line of C(rbd) for the image's cluster."""
        access = {"conf": self.conf, "id": self.user}
        return ["rbd", *(f"--{key}={value}" for key, value in access.items() if value is not None), *words]

    def as_node(self, snapshot: str) -> dict[str, str]:
        """A snapshot of the image as a block device of QEMU."""
        node = {
            "driver": "rbd",
            "pool": self.pool,
            "namespace": self.namespace,
            "image": self.image,
            "snapshot": snapshot,
            "conf": self.conf,
            "user": self.user,
        }
        return {key: value for key, value in node.items() if value}


def _unescape(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text, flags=re.DOTALL)


class RbdImages(Provider):
    """Images in pools of Ceph."""

    name = "rbd"
    kinds: t.ClassVar[t.Mapping[str, StepKind]]

    def __init__(self, disks: t.Sequence[Disk]) -> None:
        self._disks = disks
        self._locations = [Location.parse(disk.path) for disk in disks]

    @classmethod
    def fits(cls, path: str) -> bool:
        """See Provider."""
        return path.startswith(_PREFIX)

    def plan(self) -> Frozen:
        """See Provider."""
        disks = [_measured(disk, location) for disk, location in zip(self._disks, self._locations)]
        return Frozen(disks, _METHOD, CRASH if self._is_used() else OFFLINE)

    def freeze(self, work: Work) -> Frozen:
        """See Provider."""
        disks = [_measured(disk, location) for disk, location in zip(self._disks, self._locations)]
        is_used = self._is_used()
        snapshot = f"{MARK}-{work.run_id}"
        folder = make_folder(work.journal, work.scratch, work.run_id)
        with work.stand_still(must=is_used and len(disks) > 1) as reached:
            for location in self._locations:
                fields = dataclasses.asdict(location)
                work.journal.add("rbd_snapshot", path=f"{location.spec}@{snapshot}", location=fields, snapshot=snapshot)
                _run(location.command("--no-progress", "snap", "create", f"{location.spec}@{snapshot}"))
        if not is_used and self._is_used():
            raise SnapshotError("an image was opened while the images were being frozen", remedy="Run it again.")
        frozen = []
        for number, (disk, location) in enumerate(zip(disks, self._locations)):
            view = os.path.join(folder, f"image{number}")
            open_view(work.journal, location.as_node(snapshot), view)
            frozen.append(dataclasses.replace(disk, path=view))
        return Frozen(frozen, _METHOD, consistency_of(reached, len(disks), is_used=is_used))

    def _is_used(self) -> bool:
        """Whether anybody, on any host, has one of the images open for writing."""
        return any(_ask(location, "status", location.spec)["watchers"] for location in self._locations)


def _ask(location: Location, *words: str) -> t.Any:
    return json.loads(_run(location.command("--format=json", *words)))


def _measured(disk: Disk, location: Location) -> Disk:
    """The disk with its sizes. Raises: SourceError, ToolError."""
    try:
        info = _ask(location, "info", location.spec)
    except CommandError as error:
        if "No such file or directory" not in error.said:
            raise
        raise SourceError(
            f"Ceph has no such image, or the user {location.user or 'admin'} may not see it",
            file=disk.path,
            remedy=f"{' '.join(location.command('ls', location.pool))} lists the images. {_REMEDY}",
        ) from error
    size = int(info["size"])
    allocated = size
    # Without this feature Ceph would look at each object.
    if "fast-diff" in info["features"]:
        used = _ask(location, "du", location.spec)["images"]
        allocated = min(size, sum(int(row["used_size"]) for row in used))
    return dataclasses.replace(disk, size=size if disk.format == "raw" else None, allocated=allocated)


def _remove(fields: Fields) -> str | None:
    location, snapshot = Location(**fields["location"]), fields["snapshot"]
    if not snapshot.startswith(f"{MARK}-") or not _has_snapshot(location, snapshot):
        return None
    _run(location.command("--no-progress", "snap", "rm", f"{location.spec}@{snapshot}"))
    return f"the RBD snapshot {location.spec}@{snapshot}"


def _has_snapshot(location: Location, snapshot: str) -> bool:
    try:
        return any(row["name"] == snapshot for row in _ask(location, "snap", "ls", location.spec))
    except CommandError as error:
        if "No such file or directory" in error.said:
            return False  # the image was removed, and its snapshots before it
        raise


def _find_trouble(fields: Fields) -> str | None:
    location, snapshot = Location(**fields["location"]), fields["snapshot"]
    if _has_snapshot(location, snapshot):
        return None
    return f"the RBD snapshot {location.spec}@{snapshot} is gone"


RbdImages.kinds = {"rbd_snapshot": StepKind(undo=_remove, health=_find_trouble)}

__all__ = ("Location", "RbdImages")
