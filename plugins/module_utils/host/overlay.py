# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""External snapshots by libvirt: the guest writes to overlay files, so its disks stand still and are read in place.

This is the way where libvirt has no backup jobs. Afterwards the overlays are committed into the disks, and the guest
goes on with those.
"""

from __future__ import annotations

import os
import typing as t
from xml.etree import ElementTree

from ..vma.errors import ToolError
from ..vma.image import check_unused
from ..vma.pending_file import target_errors
from . import readers, virsh
from .command import CommandError, run
from .errors import SnapshotError
from .journal import Fields
from .provider import StepKind, Work
from .scratch_space import find_shortage

_COMMIT_TIMEOUT = 24 * 3600.0


class Base(t.NamedTuple):
    """A disk below an overlay: its path, and its format."""

    path: str
    format: str


def put(work: Work, domain: str, folder: str, bases: t.Mapping[str, Base], others: t.Iterable[str]) -> None:
    """Put overlays on some disks of a running domain, all at once. Raises: SnapshotError."""
    overlays = {target: os.path.join(folder, f"{target}.overlay") for target in bases}
    work.journal.add(
        "overlays",
        domain=domain,
        folder=folder,
        disks={target: [overlays[target], base.path, base.format] for target, base in bases.items()},
    )
    try:
        virsh.put_overlays(domain, overlays, others)
    except CommandError as error:
        raise SnapshotError(
            f"libvirt did not put overlays on the disks: {error.message}",
            remedy=f"QEMU must be able to write to {folder}: see its user, AppArmor or SELinux, and the libvirt log.",
        ) from error


def _commit(fields: Fields) -> str | None:
    """Bring the guest back to its own disks, whether it runs, was shut off meanwhile, or the host was rebooted."""
    domain = fields["domain"]
    state = virsh.get_state(domain)
    if state is not None and state.has_process:
        virsh.settle(domain)
    committed = []
    for target, (overlay, base, base_format) in fields["disks"].items():
        if not os.path.lexists(overlay):
            continue
        current = None if state is None else _get_source(domain, target, running=state.has_process)
        if current == overlay and state is not None and state.has_process:
            virsh.abort_block_job(domain, target)
            virsh.commit_overlay(domain, target)
            _check_left(domain, target, overlay, base)
            committed.append(target)
        elif current == overlay:
            _commit_offline(domain, fields["folder"], overlay, Base(base, base_format))
            committed.append(target)
        elif current == base and overlay in _find_opened(domain, overlay):
            raise SnapshotError(
                f"libvirt says that the guest {domain} has the disk {base}, but its QEMU has our overlay on it open",
                file=overlay,
                remedy="It holds what the guest writes: shut the guest down from within, then qemu-img commit it.",
            )
        elif current != base:
            raise SnapshotError(
                f"the domain {domain} uses neither the disk {base} nor our overlay on it, but {current or 'is gone'}",
                file=overlay,
                remedy="It may hold what the guest wrote last: commit it by hand (qemu-img commit), or remove it.",
            )
        with target_errors(overlay):
            os.unlink(overlay)
    state = virsh.get_state(domain)
    if state is not None and state.is_starved:
        virsh.resume(domain)
    return f"the overlays of {domain} on {', '.join(committed)}" if committed else None


def _check_left(domain: str, target: str, overlay: str, base: str) -> None:
    """Raises: SnapshotError where the guest did not go over to the disk that it had before the overlay."""
    current = _get_source(domain, target, running=True)
    if current != base:
        raise SnapshotError(
            f"the overlay of {domain} was committed, and its disk {target} is now {current}, not {base}",
            file=overlay,
            remedy=f"See virsh dumpxml {domain}, and remove the overlay when nothing uses it.",
        )


def _get_source(domain: str, target: str, *, running: bool) -> str | None:
    """The file or block device that a disk of the domain is."""
    root = ElementTree.fromstring(virsh.dump_xml(domain, inactive=not running))
    for disk in root.iterfind("./devices/disk"):
        named, source = disk.find("target"), disk.find("source")
        if named is not None and source is not None and named.get("dev") == target:
            return source.get("file") or source.get("dev")
    return None


def _is_on_base(domain: str, overlay: str, base: str) -> bool:
    """Whether libvirt has lost a guest that runs, which has the base open, and the overlay no more.

    libvirt 7 does that when it is killed while the guest goes over to the base: it cannot read the state that it wrote.
    To commit the overlay then, now or after the guest was shut off, would put old data over what it wrote since.
    """
    return _find_opened(domain, overlay, base) == {base}


def _find_opened(domain: str, *paths: str) -> set[str]:
    """Those of some files that the QEMU of the domain has open, whatever libvirt knows of it."""
    pid = virsh.get_process(ElementTree.fromstring(virsh.dump_xml(domain, inactive=True)).findtext("name", ""))
    if pid is None:
        return set()
    try:
        return readers.opened_of(pid, paths)
    except OSError:
        return set()


def _check_at_rest(domain: str, path: str) -> None:
    """Raises: SnapshotError where a QEMU has the disk open although libvirt runs none for this domain."""
    with target_errors(path):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        is_at_rest = check_unused(fd, to_write=True)
    finally:
        os.close(fd)
    if not is_at_rest:
        raise SnapshotError(
            f"libvirt takes the domain {domain} for shut off, but a QEMU has its disk open: libvirt has lost a guest"
            " that runs",
            file=path,
            remedy="Do not start the domain. Shut the guest down from within first.",
        )


def _commit_offline(domain: str, folder: str, overlay: str, base: Base) -> None:
    if not _is_on_base(domain, overlay, base.path):
        for path in (overlay, base.path):
            _check_at_rest(domain, path)
        run(
            ["qemu-img", "commit", "-q", "-f", "qcow2", overlay],
            purpose="to commit an overlay of a domain that is shut off",
            timeout=_COMMIT_TIMEOUT,
            remedy="Do not start the domain. "
            f"The overlay {overlay} holds what the guest wrote last: commit it by hand.",
        )
    root = ElementTree.fromstring(virsh.dump_xml(domain, inactive=True, secrets=True))
    for disk in root.iterfind("./devices/disk"):
        source = disk.find("source")
        if source is None or source.get("file") != overlay:
            continue
        backing = disk.find("backingStore")
        if backing is not None:
            disk.remove(backing)
        driver = disk.find("driver")
        if driver is not None:
            driver.set("type", base.format)
        is_block = base.path.startswith("/dev/")
        disk.set("type", "block" if is_block else "file")
        source.attrib.clear()
        source.set("dev" if is_block else "file", base.path)
    definition = os.path.join(folder, "domain.xml")
    with target_errors(definition), open(definition, "wb") as file:
        file.write(ElementTree.tostring(root))
    virsh.define(definition)


def _find_trouble(fields: Fields) -> str | None:
    shortage = find_shortage(fields["folder"])
    if shortage is not None:
        return shortage
    try:
        state = virsh.get_state(fields["domain"])
    except ToolError:
        return None  # libvirt may be restarting; the overlays are QEMU's and stay as they are
    if state is not None and state.is_starved:
        return f"the guest was paused, as a write failed: was {fields['folder']} full?"
    return None


KINDS: t.Mapping[str, StepKind] = {"overlays": StepKind(undo=_commit, health=_find_trouble)}

__all__ = ("KINDS", "Base", "put")
