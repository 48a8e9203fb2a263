# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A screen as a picture: from the format that every QEMU writes (PPM) to PNG. Pure; the files are others' business."""

from __future__ import annotations

import re
import struct
import zlib

from ..vma.errors import ToolError

_PPM = re.compile(rb"P6\s+([0-9]+)\s+([0-9]+)\s+255\s")


def png_from_ppm(data: bytes) -> bytes:
    """The picture as PNG. Raises: ToolError where C(data) is no whole PPM with a byte for each colour."""
    head = _PPM.match(data)
    if head is None:
        raise ToolError("QEMU's picture of the screen is no PPM")
    width, height = int(head[1]), int(head[2])
    stride = 3 * width
    pixels = memoryview(data)[head.end() :]
    if len(pixels) < stride * height:
        raise ToolError("QEMU's picture of the screen is cut short")
    rows = b"".join(b"\0" + bytes(pixels[stride * row : stride * (row + 1)]) for row in range(height))
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, content) for name, content in parts)


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


__all__ = ("png_from_ppm",)
