# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""UEFI firmware (OVMF): where distributions put it, and which of it fits a VM's own EFI variables."""

from __future__ import annotations

import dataclasses
import os
import struct
import typing as t

from ..vma.errors import RequestError, SourceError, ToolError

_SMALL = 0x20000
_LARGE = 0x84000
SIZES: dict[int, str] = {_SMALL: "2 MiB", _LARGE: "4 MiB"}
"""Bytes of the variables, and the size of the flash memory that they are a part of."""

PLACES: tuple[tuple[int, str, str], ...] = (
    # Debian, Ubuntu
    (_LARGE, "/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
    (_SMALL, "/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
    # Proxmox VE
    (_LARGE, "/usr/share/pve-edk2-firmware/OVMF_CODE_4M.fd", "/usr/share/pve-edk2-firmware/OVMF_VARS_4M.fd"),
    (_SMALL, "/usr/share/pve-edk2-firmware/OVMF_CODE.fd", "/usr/share/pve-edk2-firmware/OVMF_VARS.fd"),
    # Fedora and its kin
    (_LARGE, "/usr/share/edk2/ovmf/OVMF_CODE_4M.qcow2", "/usr/share/edk2/ovmf/OVMF_VARS_4M.qcow2"),
    (_SMALL, "/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),
    # Arch
    (_LARGE, "/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"),
    # openSUSE
    (_LARGE, "/usr/share/qemu/ovmf-x86_64-4m-code.bin", "/usr/share/qemu/ovmf-x86_64-4m-vars.bin"),
    (_SMALL, "/usr/share/qemu/ovmf-x86_64-code.bin", "/usr/share/qemu/ovmf-x86_64-vars.bin"),
    # QEMU's own build of it
    (_LARGE, "/usr/share/qemu/edk2-x86_64-code.fd", "/usr/share/qemu/edk2-i386-vars.fd"),
)
"""Size of the variables, code, empty variables; without secure boot, which proves nothing about a backup."""

_HEADER = struct.Struct("<16x16sQ4s")
"""The beginning of a firmware volume: its GUID, its length, its mark (UEFI PI specification, volume 3)."""
_MARK = b"_FVH"


@dataclasses.dataclass(frozen=True)
class Firmware:
    """Files to boot with. C(variables) is to be copied, never written; C(size) bytes of it count, None being all."""

    code: str
    code_format: str
    variables: str
    variables_format: str
    size: int | None = None


def find_firmware(own_variables: str | None) -> Firmware:
    """The host's OVMF; with a VM's own EFI variables, the one that they belong to.

    Raises: ToolError where the host has none that fits; SourceError, RequestError about the VM's variables.
    """
    size = None if own_variables is None else variables_size(own_variables)
    for place_size, code, variables in PLACES:
        if size in (None, place_size) and os.path.exists(code) and os.path.exists(variables):
            if own_variables is None:
                return Firmware(code, _format_of(code), variables, _format_of(variables))
            return Firmware(code, _format_of(code), own_variables, "raw", size)
    which = "" if size is None else f" with {SIZES[size]} of flash memory, to which the EFI variables belong,"
    raise ToolError(
        f"UEFI firmware{which} is needed and was not found on this host",
        remedy="Install the package ovmf (Debian) or edk2-ovmf (Fedora)"
        + ("." if size is None else ", or leave out efi_vars."),
    )


def variables_size(path: str) -> int:
    """How many bytes of a file are EFI variables; a disk that holds them may be larger.

    Raises: SourceError where it cannot be read, RequestError where it does not hold EFI variables of OVMF.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(_HEADER.size)
            end = file.seek(0, os.SEEK_END)
    except OSError as error:
        raise SourceError(
            f"cannot be read: {error.strerror}", file=path, remedy="Check the path and the permissions."
        ) from error
    _guid, length, mark = _HEADER.unpack(head.ljust(_HEADER.size, b"\0"))
    if mark != _MARK or length not in SIZES or end < length:
        raise RequestError(
            "expected EFI variables of OVMF, found something else",
            file=path,
            remedy="Name the raw disk that was extracted from the device drive-efidisk0, or leave out efi_vars.",
        )
    return int(length)


def _format_of(path: str) -> str:
    return "qcow2" if path.endswith(".qcow2") else "raw"


def copy_variables(firmware: Firmware, dest: t.BinaryIO) -> None:
    """Write the variables to a file of the guest's own. Raises: SourceError; OSError of the destination."""
    try:
        with open(firmware.variables, "rb") as file:
            data = file.read() if firmware.size is None else file.read(firmware.size)
    except OSError as error:
        raise SourceError(f"cannot be read: {error.strerror}", file=firmware.variables) from error
    dest.write(data)


__all__ = ("PLACES", "SIZES", "Firmware", "copy_variables", "find_firmware", "variables_size")
