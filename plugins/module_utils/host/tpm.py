# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A copy of the state of a guest's TPM, as Proxmox VE keeps it: libvirt keeps it beside the disks, in no snapshot."""

from __future__ import annotations

import os

from ..vma.errors import SourceError
from ..vma.pending_file import target_errors
from .domain import Domain
from .provider import Disk
from .tpm_state import FILES, IMAGE_SIZE, to_linear

DRIVE = "tpmstate0"
_FOLDER = "/var/lib/libvirt/swtpm"


def find_tpm(domain: Domain) -> Disk | None:
    """The file with the state, where the domain has a TPM whose state can be taken along."""
    if domain.tpm is None or domain.tpm.backend != "emulator" or domain.tpm.encrypted:
        return None
    path = os.path.join(_FOLDER, domain.uuid, FILES[domain.tpm.version])
    return Disk(DRIVE, path, "raw", IMAGE_SIZE, IMAGE_SIZE) if os.path.exists(path) else None


def copy_tpm(path: str, folder: str) -> Disk:
    """Write an image of the state at C(path) into the folder. Raises: SourceError, RequestError, TargetError."""
    try:
        with open(path, "rb") as file:
            state = file.read(IMAGE_SIZE + 1)
    except OSError as error:
        raise SourceError(f"the TPM's state cannot be read: {error.strerror}", file=path) from error
    copy = os.path.join(folder, DRIVE)
    image = to_linear(state)
    with target_errors(copy), open(copy, "wb") as file:
        file.write(image)
    return Disk(DRIVE, copy, "raw", IMAGE_SIZE, len(state))


__all__ = ("DRIVE", "copy_tpm", "find_tpm")
