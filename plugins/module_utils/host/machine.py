# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The VM of a request: its domain, where libvirt knows one, its disks with the provider for them, its configuration.

Nothing here touches the VM.
"""

from __future__ import annotations

import dataclasses
import typing as t

from ..vma.errors import RequestError
from . import virsh
from .domain import Domain
from .drives import assign
from .guest_config import GuestConfig, Options, guest_config
from .guest_names import vmid_of
from .journal import FOLDER
from .keeper import Limits
from .libvirt import LibvirtDomain
from .lvm import LvmVolumes
from .none import AtRest
from .nvram import DRIVE as NVRAM_DRIVE
from .nvram import find_nvram
from .provider import Disk, Provider
from .rbd import RbdImages
from .reflink import ReflinkCopies
from .tpm import DRIVE as TPM_DRIVE
from .tpm import find_tpm
from .zfs import ZfsVolumes

STORAGES: dict[str, type[LvmVolumes | ZfsVolumes | RbdImages | ReflinkCopies | AtRest]] = {
    provider.name: provider for provider in (LvmVolumes, ZfsVolumes, RbdImages, ReflinkCopies, AtRest)
}
PROVIDERS: tuple[str, ...] = ("auto", LibvirtDomain.name, *STORAGES)

DEFAULT_LIMITS = Limits(total=86400, idle=3600)


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be frozen, and how. C(disks) may be empty where libvirt knows the VM; C(exclude) names drives or
    target devices; C(scratch) is a folder; C(config) is what qemu-server.conf has that no domain tells."""

    name: str
    provider: str = "auto"
    disks: tuple[Disk, ...] = ()
    exclude: tuple[str, ...] = ()
    quiesce: str = "auto"
    scratch: str = "/var/tmp"
    limits: Limits = DEFAULT_LIMITS
    vmid: int | None = None
    storage: str = "local-lvm"
    bridge: str = "vmbr0"
    journals: str = FOLDER


class Machine:
    """The VM of a request: its domain, where libvirt knows one, and its disks with the provider for them."""

    def __init__(self, request: Request) -> None:
        self.uuid = virsh.find_domain(request.name)
        self.domain = None if self.uuid is None else Domain.parse(virsh.dump_xml(self.uuid))
        self.vmid = request.vmid if self.domain is None or request.vmid is not None else vmid_of(self.domain.uuid)
        self.request = request
        drives = {} if self.domain is None else _wanted_drives(self.domain, request)
        wants_libvirt = request.provider == LibvirtDomain.name or (request.provider == "auto" and not request.disks)
        self.provider: Provider
        if wants_libvirt:
            if self.domain is None:
                raise RequestError(
                    f"libvirt knows no domain {request.name} on this host",
                    remedy="Check the name (virsh list --all), or give disks and a provider.",
                )
            if not drives:
                raise RequestError(f"no disk of {request.name} is left to be backed up", remedy="Exclude fewer disks.")
            self.provider = LibvirtDomain(self.domain, {target: drive for drive, target in drives.items()})
        else:
            disks = request.disks or self._disks_of_domain(drives)
            name = choose_storage(disks) if request.provider == "auto" else request.provider
            self.provider = STORAGES[name](disks)
        self.drives = set(drives) if not request.disks else {disk.name for disk in request.disks}
        self.small_state = [] if self.domain is None else self._find_small_state(self.domain)

    def _find_small_state(self, domain: Domain) -> list[Disk]:
        """What the guest has besides disks, and is neither excluded nor given as a disk."""
        found = (find_nvram(domain), find_tpm(domain))
        left_out = {*self.request.exclude, *(disk.name for disk in self.request.disks)}
        return [disk for disk in found if disk is not None and disk.name not in left_out]

    def _disks_of_domain(self, drives: t.Mapping[str, str]) -> tuple[Disk, ...]:
        if self.domain is None:
            raise RequestError(
                f"the disks of {self.request.name} are not known: libvirt has no such domain", remedy="Name the disks."
            )
        names = {target: drive for drive, target in drives.items()}
        return tuple(
            Disk(names[disk.target], disk.source.location, disk.format)
            for disk in self.domain.disks
            if disk.target in names and disk.source is not None
        )

    def configure(self, disks: t.Iterable[Disk]) -> GuestConfig | None:
        """The qemu-server.conf for what is archived; None where libvirt does not know the VM."""
        if self.domain is None:
            return None
        present = assign(self.domain.disks)
        archived = {disk.name: disk for disk in disks}
        strangers = sorted(set(archived) - set(present) - {NVRAM_DRIVE, TPM_DRIVE})
        if strangers:
            raise RequestError(
                f"the domain {self.request.name} has no drive {', '.join(strangers)}: it has {', '.join(present)}",
                remedy="Name the disks as the domain's drives are called.",
            )
        excluded = [drive for drive, disk in present.items() if disk.device != "cdrom" and drive not in archived]
        if NVRAM_DRIVE not in archived and self.domain.firmware.kind == "uefi":
            excluded.append(NVRAM_DRIVE)
        sizes = {disk.target: archived[drive].size for drive, disk in present.items() if drive in archived}
        if NVRAM_DRIVE in archived:
            sizes["nvram"] = archived[NVRAM_DRIVE].size
        options = Options(
            disk_sizes={name: size for name, size in sizes.items() if size is not None},
            exclude=excluded,
            storage=self.request.storage,
            bridge=self.request.bridge,
            tpm_state=TPM_DRIVE in archived,
        )
        # While it runs, libvirt tells what the host's processor was mapped to, in place of what was asked for.
        defined = Domain.parse(virsh.dump_xml(self.domain.uuid, inactive=True))
        return guest_config(dataclasses.replace(self.domain, cpu=defined.cpu), self.vmid, options)


def _wanted_drives(domain: Domain, request: Request) -> dict[str, str]:
    """Drive to target device, of the disks that a backup holds and that are not excluded.

    Raises: RequestError where the guest has data on another disk, which nobody else can read, and it is not excluded.
    """
    drives = {drive: disk.target for drive, disk in assign(domain.disks).items() if disk.device != "cdrom"}
    unreadable = {disk.target: disk.obstacle for disk in domain.disks if disk.has_data and disk.obstacle is not None}
    known = {*drives, *drives.values(), *unreadable, NVRAM_DRIVE, TPM_DRIVE}
    unknown = sorted(set(request.exclude) - known)
    if unknown:
        raise RequestError(
            f"{request.name} has no disk {', '.join(unknown)} that could be excluded",
            remedy="Its disks are " + ", ".join(f"{drive} ({target})" for drive, target in drives.items()) + ".",
        )
    for target, obstacle in unreadable.items():
        if target not in request.exclude and not request.disks:
            raise RequestError(
                f"the disk {target} of {request.name} cannot be backed up: {obstacle}", remedy="Exclude it."
            )
    return {
        drive: target
        for drive, target in drives.items()
        if drive not in request.exclude and target not in request.exclude
    }


def choose_storage(disks: t.Iterable[Disk]) -> str:
    """The provider that fits all the disks. Raises: RequestError where there is none."""
    found = {_storage_of(disk.path) for disk in disks}
    if len(found) == 1:
        name = found.pop()
        if name is not None:
            return name
    raise RequestError(
        "no one provider fits all the disks: " + ", ".join(disk.path for disk in disks),
        remedy="Name the provider; none is for disks that nothing writes to.",
    )


def _storage_of(path: str) -> str | None:
    return next((name for name, provider in STORAGES.items() if provider.fits(path)), None)


__all__ = ("DEFAULT_LIMITS", "PROVIDERS", "STORAGES", "Machine", "Request", "choose_storage")
