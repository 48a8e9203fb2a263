# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Mounts the file systems of raw disk images read-only, one after the other, counts their files, and looks for some.

It is run in a mount namespace of its own, with a request as JSON, and prints what it found as JSON. It exits with 1
where that is not what was asked for.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import subprocess
import sys
import typing as t

SAFE = "nosuid,nodev,noexec"
OPTIONS: dict[str, str] = {"xfs": "nouuid", "ext3": "noatime", "ext4": "noatime"}
"""What a type of file system needs: the original of an XFS may be mounted on the host."""
IGNORED = ("swap", "swsuspend")
CONTAINERS: dict[str, str] = {
    "LVM2_member": "a volume group",
    "crypto_LUKS": "encrypted data",
    "linux_raid_member": "a part of a RAID",
    "zfs_member": "a ZFS pool",
    "BitLocker": "encrypted data",
}
"""What holds file systems and is not opened."""
NESTED = ("bsd", "solaris_x86")
"""Tables of partitions within a partition, which are not opened either."""
WITHOUT_FILES = frozenset(
    (
        # Of a DOS table: extended ones, which hold others, and swap, PReP, and what is marked as no file system
        *("5", "f", "85", "82", "41", "da"),
        "21686148-6449-6E6F-744E-656564454649",  # BIOS boot
        "E3C9E316-0B5C-4DB8-817D-F92DF00215AE",  # reserved by Microsoft
        "5808C8AA-7E8F-42E0-85D2-E1E90434CFB3",  # Microsoft's metadata of dynamic disks
        "9E1A2D38-C612-4316-AA26-8B49521E5A8B",  # PReP
        "0657FD6D-A4AB-43C4-84E5-0933C84B4F4F",  # swap
        "8DA63339-0007-60C0-C436-083AC8230908",  # reserved on Linux
        "6A945A3B-1DD2-11B2-99A6-080020736631",  # reserved by ZFS
        "83BD6B9D-7F41-11DC-BE0B-001560B84F0F",  # FreeBSD's boot code
        "516E7CB5-6ECF-11D6-8FF8-00022D71F2B2",  # FreeBSD's swap
    )
)
"""Types of partitions in which nothing need be known."""
_AMBIVALENT = 8
"""The exit code of blkid where it could be several things."""
_CHUNK = 1 << 20
UNKNOWN = "unknown filesystem type"
"""What mount says of a type that the host's kernel does not have."""


class Trouble(Exception):
    """Why the images are not as they should be: C(kind) is for programs, the message for people."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Unmountable(Exception):
    """It is not mounted, which says nothing of the image."""


class Place(t.NamedTuple):
    """A part of an image, in bytes. C(partition) is its number, 0 for the whole image; C(table_type) is its type."""

    image: str
    path: str
    partition: int
    offset: int
    size: int
    table_type: str = ""

    def __str__(self) -> str:
        return f"partition {self.partition} of {self.image}" if self.partition else self.image


def run(command: t.Sequence[str]) -> str:
    """What a tool prints. Raises: Trouble where it is missing, or fails."""
    return run_any(command, codes=(0,)).stdout


def run_any(command: t.Sequence[str], *, codes: t.Container[int]) -> subprocess.CompletedProcess[str]:
    """What a tool prints, and its code. Raises: Trouble where it is missing, or ends with another code."""
    search = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            env={**os.environ, "LC_ALL": "C", "PATH": search},
        )
    except FileNotFoundError as error:
        raise Trouble("tool", f"{command[0]} is not installed (packages fdisk, mount and util-linux)") from error
    if done.returncode not in codes:
        raise Trouble("tool", f"{command[0]} failed: {done.stderr.strip() or done.returncode}")
    return done


def places(image: str, path: str) -> list[Place]:
    """The partitions of an image, or the whole of it where it has none."""
    size = os.stat(path).st_size
    try:
        table = json.loads(run(["sfdisk", "--json", path]))["partitiontable"]
    except Trouble as trouble:
        if "not installed" in str(trouble):
            raise
        return [Place(image, path, 0, 0, size)]
    sector = int(table.get("sectorsize", 512))
    found = []
    for partition in table.get("partitions", []):
        number = int(partition["node"][len(path) :].lstrip("p"))
        start, length = partition["start"] * sector, partition["size"] * sector
        if start + length > size:
            raise Trouble("partition_table", f"partition {number} of {image} ends behind the end of the disk")
        found.append(Place(image, path, number, start, length, str(partition.get("type", ""))))
    return found or [Place(image, path, 0, 0, size)]


def probe(place: Place) -> str:
    """The type of what lies there, empty where there may be nothing.

    Raises: Trouble where there has to be something and nothing is known, Unmountable where it cannot be told.
    """
    command = ["blkid", "-p", "-o", "export", "-O", str(place.offset), "-S", str(place.size), place.path]
    done = run_any(command, codes=(0, 2, _AMBIVALENT))
    if done.returncode == _AMBIVALENT:
        raise Unmountable(f"{place} has the marks of several file systems, and is not opened")
    values = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    if "TYPE" in values:
        return values["TYPE"]
    if values.get("PTTYPE") in NESTED:
        raise Unmountable(f"{place} holds partitions of its own, which are not opened")
    if place.partition == 0:
        # A data disk may be blank, or a database's own.
        raise Unmountable(f"{place} holds nothing that is known")
    if place.table_type in WITHOUT_FILES:
        return ""
    meant = f"its type {place.table_type} is one for a file system"
    raise Trouble("file_system", f"{place} holds nothing that is known, and {meant}")


@contextlib.contextmanager
def mounted(place: Place, kind: str, mountpoint: str) -> t.Iterator[None]:
    """The file system, mounted read-only. Raises: Trouble where it is broken, Unmountable."""
    where = f"loop,offset={place.offset},sizelimit={place.size},{SAFE}"
    options = ",".join([where, *filter(None, [OPTIONS.get(kind)])])
    command = ["mount", "-t", kind, "-o", f"ro,{options}", place.path, mountpoint]
    try:
        run(command)
    except Trouble as refused:
        if "not installed" in str(refused):
            raise
        if UNKNOWN in str(refused):
            raise Unmountable(f"{place} holds a {kind}, which this host cannot mount") from None
        try:
            # A journal that is not empty has to be replayed first, as the VM's own system would do it. The image is a
            # copy, made for this alone.
            run(["mount", "-t", kind, "-o", f"rw,{options}", place.path, mountpoint])
            run(["umount", mountpoint])
            run(command)
        except Trouble:
            raise Trouble("file_system", f"{place}, a {kind}, cannot be mounted: {refused}") from None
    try:
        yield
    finally:
        run(["umount", mountpoint])


def count(place: Place, root: str) -> int:
    """How many files and other entries there are, folders aside. Raises: Trouble where one cannot be looked at."""

    def fail(error: OSError) -> t.NoReturn:
        name = os.path.relpath(error.filename or root, root)
        raise Trouble("file_system", f"{place}: {name} cannot be read: {error.strerror}")

    number = 0
    for folder, _folders, files in os.walk(root, onerror=fail):
        for name in files:
            try:
                os.lstat(os.path.join(folder, name))
            except OSError as error:
                fail(error)
            number += 1
    return number


def look_for(root: str, wanted: t.Mapping[str, t.Any]) -> str | None:
    """What is wrong with a file, None if nothing; a file that is not there is wrong as well."""
    path = os.path.join(root, str(wanted["path"]).lstrip("/"))
    # A link could lead out of the file system, to the host's own files.
    if not os.path.realpath(path).startswith(os.path.join(os.path.realpath(root), "")):
        return "it is a link that leads out of its file system"
    try:
        status = os.stat(path)
    except OSError as error:
        return error.strerror or "it cannot be read"
    checksum = wanted.get("checksum")
    if not checksum:
        return None
    if not stat.S_ISREG(status.st_mode):
        return "it is no file"
    method, _colon, expected = str(checksum).rpartition(":")
    try:
        digest = hashlib.new(method or "sha256")
    except ValueError:
        return f"this host knows no checksum {method}"
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        return error.strerror or "it cannot be read"
    if digest.hexdigest() != expected.lower():
        return f"its checksum is {digest.hexdigest()}, expected {expected}"
    return None


def is_meant(place: Place, wanted: t.Mapping[str, t.Any]) -> bool:
    """Whether a file is to be looked for there: everywhere, unless its disk or partition is given."""
    disk = wanted.get("disk")
    number = wanted.get("partition")
    return (disk is None or place.image in (disk, f"drive-{disk}")) and (
        number is None or place.partition == int(number)
    )


def look(request: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    """What is in the images. Raises: Trouble where that is not what was asked for."""
    mountpoint = request["mountpoint"]
    os.makedirs(mountpoint, exist_ok=True)
    found: list[dict[str, t.Any]] = []
    unopened: list[str] = []
    wrong: dict[int, str] = dict.fromkeys(range(len(request["files"])), "no file system was there to look for it")
    done: set[int] = set()
    for image, path in request["images"].items():
        for place in places(image, path):
            try:
                kind = probe(place)
                if kind in CONTAINERS:
                    raise Unmountable(f"{place} holds {CONTAINERS[kind]}, which is not opened")
                if not kind or kind in IGNORED:
                    continue
                with mounted(place, kind, mountpoint):
                    entry = {"disk": place.image, "partition": place.partition, "type": kind}
                    found.append({**entry, "files": count(place, mountpoint)})
                    for index, wanted in enumerate(request["files"]):
                        if index not in done and is_meant(place, wanted):
                            problem = look_for(mountpoint, wanted)
                            if problem is None:
                                done.add(index)
                            elif wrong[index].startswith("no file system") or "checksum" in problem:
                                wrong[index] = problem
            except Unmountable as unmountable:
                unopened.append(str(unmountable))
    result = {"file_systems": found, "files": sum(entry["files"] for entry in found), "notes": unopened}
    reasons = [f"{request['files'][i]['path']}: {wrong[i]}" for i in wrong if i not in done]
    if not found:
        reason = "; ".join(["no file system was found that can be mounted", *unopened])
        return {**result, "result": "failed", "kind": "no_file_system", "reason": reason}
    if reasons:
        return {**result, "result": "failed", "kind": "files", "reason": "; ".join(reasons)}
    if result["files"] < request["min_files"]:
        reason = f"expected {request['min_files']} files or more, found {result['files']}"
        return {**result, "result": "failed", "kind": "files", "reason": reason}
    return result


def main() -> int:
    """Answer the request on the command line."""
    try:
        result = look(json.loads(sys.argv[1]))
    except Trouble as trouble:
        result = {"result": "failed", "kind": trouble.kind, "reason": str(trouble)}
    json.dump(result, sys.stdout)
    return int(result.get("result") == "failed")


if __name__ == "__main__":
    sys.exit(main())
