# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Write a disk whose boot sector says something on the screen and halts: the smallest guest that comes up."""

from __future__ import annotations

import pathlib
import sys

# Point DS:SI at the words; give each to the BIOS (interrupt 10h, function 0Eh) up to the zero; halt.
_CODE = bytes.fromhex("31c0 8ed8 be1a7c fc ac 84c0 7409 b40e bb0700 cd10 ebf2 f4 ebfd 90")

dest, words = sys.argv[1:]
sector = (_CODE + words.encode() + b"\r\n\0").ljust(510, b"\0") + b"\x55\xaa"
pathlib.Path(dest).write_bytes(sector.ljust(1 << 20, b"\0"))
