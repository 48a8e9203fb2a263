# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Disks of a libvirt domain: by a backup job where libvirt has them, by overlays where not, in place if it is off."""

from __future__ import annotations

import dataclasses
import typing as t

from ..vma.errors import RequestError
from . import backup_job, overlay, virsh
from .domain import Disk as DomainDisk
from .domain import Domain
from .folder import make_folder
from .locks import keep_at_rest
from .provider import CRASH, OFFLINE, Disk, Frozen, Provider, StepKind, Work
from .view import can_view

_IN_PLACE, _BACKUP_JOB, _OVERLAYS = "read in place", "backup job", "external snapshot"


class LibvirtDomain(Provider):
    """A domain of this host's libvirt."""

    name = "libvirt"
    kinds: t.ClassVar[t.Mapping[str, StepKind]] = {**backup_job.KINDS, **overlay.KINDS}

    def __init__(self, domain: Domain, drives: t.Mapping[str, str]) -> None:
        """C(drives) has, for the target device of each disk that is wanted, the name that the disk has on Proxmox VE.

        Raises: RequestError where a disk cannot be read from outside of the guest.
        """
        self._domain = domain
        self._drives = drives
        self._disks = [disk for disk in domain.disks if disk.target in drives]
        for disk in self._disks:
            if disk.obstacle is not None or disk.encrypted:
                reason = disk.obstacle or "it is encrypted"
                raise RequestError(
                    f"the disk {disk.target} of {domain.name} cannot be backed up: {reason}", remedy="Exclude it."
                )

    def plan(self) -> Frozen:
        """See Provider."""
        state = virsh.get_state(self._domain.uuid)
        runs = state is not None and state.has_process
        disks = []
        for disk in self._disks:
            size, allocated = virsh.get_disk_size(self._domain.uuid, disk.target)
            disks.append(Disk(self._drives[disk.target], _location(disk), disk.format, size, allocated))
        if not runs:
            return Frozen(disks, _IN_PLACE, OFFLINE)
        self._check_passed_through()
        return Frozen(disks, _BACKUP_JOB if can_view() else _OVERLAYS, CRASH)

    def freeze(self, work: Work) -> Frozen:
        """See Provider."""
        state = virsh.get_state(self._domain.uuid)
        if state is None or not state.has_process:
            return self._lock(work)
        self._check_passed_through()
        folder = make_folder(work.journal, work.scratch, work.run_id, virsh.get_process_owner(self._domain.name))
        targets = [disk.target for disk in self._disks]
        if not can_view():
            return self._put_overlays(work, folder)
        try:
            with work.stand_still(must=False) as consistency:
                backup_job.begin(work, self._domain.uuid, folder, targets)
        except backup_job.BackupUnsupportedError:
            return self._put_overlays(work, folder)
        return self._result(backup_job.open_views(work, folder, targets), _BACKUP_JOB, consistency)

    def _check_passed_through(self) -> None:
        """Raises: RequestError where the guest sends SCSI commands to a disk, past whatever QEMU puts before it."""
        for disk in self._disks:
            if disk.device == "lun":
                raise RequestError(
                    f"the disk {disk.target} of {self._domain.name} is a LUN that is passed through, which libvirt"
                    " cannot snapshot while the guest runs",
                    remedy="Use the provider of its storage, such as lvm, shut the guest down, or exclude the disk.",
                )

    def _put_overlays(self, work: Work, folder: str) -> Frozen:
        bases = {}
        for disk in self._disks:
            if disk.source is None or disk.source.path is None:
                raise RequestError(
                    f"the disk {disk.target} of {self._domain.name} is on {_location(disk)}, which this libvirt can"
                    " snapshot by backup jobs alone",
                    remedy="Use the provider of its storage, such as rbd, or a host with a newer libvirt.",
                )
            bases[disk.target] = overlay.Base(disk.source.path, disk.format)
        others = [disk.target for disk in self._domain.disks if disk.target not in bases and not disk.readonly]
        with work.stand_still(must=False) as consistency:
            overlay.put(work, self._domain.uuid, folder, bases, others)
        return Frozen(
            [self._measured(disk, Disk(self._drives[disk.target], *bases[disk.target])) for disk in self._disks],
            _OVERLAYS,
            consistency,
        )

    def _lock(self, work: Work) -> Frozen:
        disks = []
        with work.stand_still(must=False):
            for disk in self._disks:
                if disk.source is None or disk.source.path is None:
                    raise RequestError(
                        f"the disk {disk.target} of {self._domain.name}, which is off, is on {_location(disk)}",
                        remedy="Use the provider of its storage, such as rbd, or start the domain.",
                    )
                keep_at_rest(work, disk.source.path)
                image = Disk(self._drives[disk.target], disk.source.path, disk.format)
                disks.append(self._measured(disk, image))
        return Frozen(disks, _IN_PLACE, OFFLINE)

    def _result(self, paths: t.Mapping[str, str], method: str, consistency: str) -> Frozen:
        disks = [self._measured(disk, Disk(self._drives[disk.target], paths[disk.target])) for disk in self._disks]
        return Frozen(disks, method, consistency)

    def _measured(self, disk: DomainDisk, image: Disk) -> Disk:
        size, allocated = virsh.get_disk_size(self._domain.uuid, disk.target)
        return dataclasses.replace(image, size=size, allocated=allocated)


def _location(disk: DomainDisk) -> str:
    return "" if disk.source is None else disk.source.location


__all__ = ("LibvirtDomain",)
