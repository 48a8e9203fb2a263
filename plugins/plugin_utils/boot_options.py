# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""How vm_boot boots the VM of an archive whose disks were extracted. Pure: no I/O."""

from __future__ import annotations

import dataclasses
import typing as t

from ansible_collections.vmbackup.vma.plugins.module_utils.host.qemu_command import NETWORK_CARDS, SCSI_CONTROLLERS
from ansible_collections.vmbackup.vma.plugins.module_utils.vma.errors import RequestError

from .guest import Guest

_DEFAULT_CARD = "e1000"


@dataclasses.dataclass(frozen=True)
class Image:
    """Where a device of the archive was extracted to."""

    path: str
    format: str = "raw"


def boot_options(guest: Guest, images: t.Mapping[str, Image]) -> dict[str, t.Any]:
    """The options of vm_boot, by their names, and C(notes), which say what the booted VM has otherwise.

    C(images) are by the name of the device, one for each device of C(guest).

    Raises: RequestError where vm_boot cannot boot the VM, or where there is no disk.
    """
    if guest.arch != "x86_64":
        raise RequestError(
            f"the VM is for {guest.arch}, and only those for x86_64 are booted",
            remedy="Check it without booting, by its file systems.",
        )
    drives = [drive for drive in guest.drives if drive.device in images]
    if not drives:
        raise RequestError("the archive holds no disk to boot from", remedy="Check it without booting.")
    notes = list(guest.missing)
    controller = guest.scsi_controller
    if controller not in SCSI_CONTROLLERS:
        notes.append(f"the SCSI controller is lsi instead of {controller}")
        controller = "lsi"
    if guest.is_uefi and guest.efi is None:
        notes.append("the EFI variables are empty, the VM's own boot entries among them: the archive has none")
    card = guest.nics[0].model if guest.nics else "virtio"
    if card not in NETWORK_CARDS:
        card = _DEFAULT_CARD
    tried = {drive.name for drive in drives if drive.name in guest.boot} or {drive.name for drive in drives}
    return {
        "disks": [
            {"path": image.path, "format": image.format, "bus": drive.bus, "boot": drive.name in tried}
            for drive in drives
            for image in [images[t.cast(str, drive.device)]]
        ],
        "firmware": "uefi" if guest.is_uefi else "bios",
        "efi_vars": images[guest.efi].path if guest.is_uefi and guest.efi is not None else None,
        "machine": guest.machine,
        "memory": guest.memory,
        "cores": guest.cores,
        "scsi_controller": controller,
        "network_card": card,
        "agent": guest.agent,
        "notes": notes,
    }


__all__ = ("Image", "boot_options")
