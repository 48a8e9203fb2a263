# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The state of an emulated TPM: from libvirt's folder of files to the one raw image of Proxmox VE, and back. No I/O.

Both run swtpm. libvirt keeps its permanent state in a file of its own; Proxmox VE keeps all states in what swtpm calls
the linear format, little endian: a header with one entry for each kind of state, and the states behind it. The state
itself is the same bytes in both.
"""

from __future__ import annotations

import struct

from ..vma.errors import RequestError

IMAGE_SIZE = 4 << 20
"""The size in bytes that Proxmox VE gives an image of TPM state."""
FILES = {"1.2": "tpm1.2/tpm-00.permall", "2.0": "tpm2/tpm2-00.permall"}
"""Where a TPM's permanent state is, by its version, in libvirt's folder C(/var/lib/libvirt/swtpm/UUID). swtpm replaces
the file as a whole, so that it may be read at any time."""

_MAGIC = int.from_bytes(b"swtpmlin", "big")
_VERSION = 1
_ENTRIES = 15
_LINEAR = struct.Struct("<QBxH")
_ENTRY = struct.Struct("<III")
_HEADER_SIZE = _LINEAR.size + _ENTRIES * _ENTRY.size

# What stands before a state: version, oldest version that can read it, size of this header, flags, size of it all
_STATE = struct.Struct(">BBHHI")
_STATE_VERSION = 2
_ENCRYPTED = 0x1


def to_linear(state: bytes) -> bytes:
    """The image that Proxmox VE's swtpm loads, from the content of a file of C(FILES).

    Raises: RequestError where this is no state, or is encrypted with a key that only its host has.
    """
    _check_state(state)
    # As swtpm does it, which lets the state grow without moving
    section = 1 << (len(state) - 1).bit_length()
    if _HEADER_SIZE + section > IMAGE_SIZE:
        raise RequestError(f"the TPM's state has {len(state)} bytes, which does not fit into {IMAGE_SIZE}")
    header = _LINEAR.pack(_MAGIC, _VERSION, _HEADER_SIZE) + _ENTRY.pack(_HEADER_SIZE, len(state), section)
    return (header.ljust(_HEADER_SIZE, b"\0") + state).ljust(IMAGE_SIZE, b"\0")


def from_linear(image: bytes) -> bytes:
    """The content of a file of C(FILES), from an image of Proxmox VE.

    Raises: RequestError where the image holds no state.
    """
    if len(image) < _HEADER_SIZE:
        raise RequestError(f"expected an image of TPM state, found {len(image)} bytes")
    magic, version, _size = _LINEAR.unpack_from(image)
    if magic != _MAGIC or version > _VERSION:
        raise RequestError("expected an image of TPM state, found another magic number or a newer version")
    offset, length, _section = _ENTRY.unpack_from(image, _LINEAR.size)
    if offset < _HEADER_SIZE or offset + length > len(image):
        raise RequestError("the image of TPM state has no permanent state, or not all of it")
    state = image[offset : offset + length]
    _check_state(state)
    return state


def _check_state(state: bytes) -> None:
    if len(state) < _STATE.size:
        raise RequestError(f"expected the state of a TPM, found {len(state)} bytes")
    _version, oldest, header_size, flags, size = _STATE.unpack_from(state)
    if oldest > _STATE_VERSION or header_size < _STATE.size or size != len(state):
        raise RequestError(
            f"this is no state of swtpm: it tells of version {oldest} and {size} bytes, and has {len(state)} bytes"
        )
    if flags & _ENCRYPTED:
        raise RequestError(
            "the TPM's state is encrypted with a key of its host",
            remedy="Without the key it is of no use elsewhere: leave it out, and add a new TPM after the restore.",
        )


__all__ = ("FILES", "IMAGE_SIZE", "from_linear", "to_linear")
