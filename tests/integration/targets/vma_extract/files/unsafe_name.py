# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Copy a gzipped archive, uncompressed, and give one of its configs a name that leads out of the folder."""

from __future__ import annotations

import gzip
import hashlib
import pathlib
import sys

source, dest = map(pathlib.Path, sys.argv[1:])
data = bytearray(gzip.decompress(source.read_bytes()))
size = int.from_bytes(data[56:60], "big")
at = data.index(b"qemu-server.fw\x00", 0, size)
data[at : at + 14] = b"../escaped.txt"
data[32:48] = bytes(16)
data[32:48] = hashlib.md5(data[:size], usedforsecurity=False).digest()
dest.write_bytes(data)
