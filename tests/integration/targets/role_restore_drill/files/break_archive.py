# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Copy an archive that is not compressed, with one bit flipped or without its last extent."""

from __future__ import annotations

import pathlib
import sys

source, dest, damage = sys.argv[1:]
data = bytearray(pathlib.Path(source).read_bytes())
MAGIC, HEADER_SIZE = b"VMAE", 512
if damage == "flip":
    data[data.find(MAGIC) + HEADER_SIZE + 100] ^= 1
else:
    del data[data.rfind(MAGIC) :]
pathlib.Path(dest).write_bytes(data)
