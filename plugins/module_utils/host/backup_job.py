# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""libvirt's backup job in pull mode: QEMU shows the disks of one instant, whatever the guest writes meanwhile.

The guest's own disks are not touched: what it overwrites goes to scratch files first.
"""

from __future__ import annotations

import os
import typing as t
from xml.etree import ElementTree

from ..vma.errors import ToolError
from ..vma.pending_file import target_errors
from . import virsh
from .command import CommandError
from .errors import SnapshotError
from .journal import Fields
from .provider import StepKind, Work
from .scratch_space import find_shortage
from .view import open_view

_UNSUPPORTED = ("not supported", "unsupported", "unknown command", "doesn't support", "does not support")
"""How libvirt and virsh say that they, or the QEMU below, cannot do a backup."""


class BackupUnsupportedError(SnapshotError):
    """This libvirt, or one of the disks, has no backup jobs."""


def begin(work: Work, domain: str, folder: str, targets: t.Sequence[str]) -> None:
    """Start the job for some disks of a running domain. C(folder) must be writable for its QEMU.

    Raises: BackupUnsupportedError, and nothing is left to undo; SnapshotError.
    """
    request = os.path.join(folder, "backup.xml")
    with target_errors(request), open(request, "wb") as file:
        file.write(_describe(folder, targets))
    running = virsh.describe_backup(domain)
    if running is not None:
        raise SnapshotError(
            "another program has a backup job on this domain",
            remedy="Wait for it. If it was left behind: virsh domjobabort " + domain,
        )
    step = work.journal.add("backup-job", domain=domain, folder=folder)
    try:
        virsh.begin_backup(domain, request)
    except CommandError as error:
        if any(word in error.said for word in _UNSUPPORTED):
            work.journal.remove(step)
            raise BackupUnsupportedError(error.message) from error
        raise SnapshotError(
            f"libvirt did not start the backup job: {error.message}",
            remedy=f"QEMU must be able to write to {folder}: see its user, AppArmor or SELinux, and the libvirt log.",
        ) from error


def open_views(work: Work, folder: str, targets: t.Sequence[str]) -> dict[str, str]:
    """Show the disks of the job as raw files. Returns target device to path. Raises: ToolError."""
    paths = {target: os.path.join(folder, f"{target}.raw") for target in targets}
    for target, path in paths.items():
        server = {"type": "unix", "path": _socket(folder)}
        open_view(work.journal, {"driver": "nbd", "server": server, "export": target}, path)
    return paths


def _socket(folder: str) -> str:
    return os.path.join(folder, "nbd")


def _describe(folder: str, targets: t.Sequence[str]) -> bytes:
    root = ElementTree.Element("domainbackup", mode="pull")
    ElementTree.SubElement(root, "server", transport="unix", socket=_socket(folder))
    disks = ElementTree.SubElement(root, "disks")
    for target in targets:
        disk = ElementTree.SubElement(disks, "disk", name=target, backup="yes", type="file", exportname=target)
        ElementTree.SubElement(disk, "driver", type="qcow2")
        ElementTree.SubElement(disk, "scratch", file=os.path.join(folder, f"{target}.scratch"))
    return ElementTree.tostring(root)


def _end(fields: Fields) -> str | None:
    domain = fields["domain"]
    state = virsh.get_state(domain)
    if state is not None and state.has_process:
        virsh.settle(domain)
    if not _is_running(fields):
        return None
    virsh.abort_backup(domain)
    state = virsh.get_state(domain)
    if state is not None and state.is_starved:
        virsh.resume(domain)
    return f"the backup job of {domain}"


def _is_running(fields: Fields) -> bool:
    """Whether the job is there, and ours: another program's has its socket elsewhere."""
    state = virsh.get_state(fields["domain"])
    if state is None or not state.has_process:
        return False
    job = virsh.describe_backup(fields["domain"])
    if job is None:
        return False
    server = ElementTree.fromstring(job).find("server")
    return server is not None and server.get("socket") == _socket(fields["folder"])


def _find_trouble(fields: Fields) -> str | None:
    shortage = find_shortage(fields["folder"])
    if shortage is not None:
        return shortage
    try:
        state = virsh.get_state(fields["domain"])
        if state is not None and state.is_starved:
            return f"the guest was paused, as a write failed: was {fields['folder']} full?"
        return None if _is_running(fields) else "the backup job is gone: did the guest end, or somebody abort it?"
    except ToolError:
        return None  # libvirt may be restarting; the job is QEMU's and goes on


KINDS: t.Mapping[str, StepKind] = {"backup-job": StepKind(undo=_end, health=_find_trouble)}

__all__ = ("KINDS", "BackupUnsupportedError", "begin", "open_views")
