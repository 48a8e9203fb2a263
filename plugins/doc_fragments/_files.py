# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: the options of the modules that write files."""

from __future__ import annotations


class ModuleDocFragment:
    """Goes before C(ansible.builtin.files), some of whose options it describes as they are here."""

    DOCUMENTATION = r"""
options:
  config_content:
    description:
      - Whether RV(archive.configs[].content) and the diff show the content of configs.
      - Configs may hold secrets, for example a password for cloud-init. Without this, only sizes and digests show.
    type: bool
    default: false
  bandwidth_limit:
    description:
      - The most bytes a second to read. There is no limit by default.
      - A unit may follow the number, as in V(50M), which counts in powers of 1024.
    type: bytes
  threads:
    description:
      - How many threads do the work. By default as many as there are processors that the module may use.
    type: int
  mode:
    description:
      - The permissions of the files, as a quoted octal number like V('0640') or a symbolic mode like V(u=rw,g=r).
      - A new file has V('0600') by default, whatever the C(umask), because a backup holds secrets. A file that is there
        already keeps its mode by default.
    type: raw
  unsafe_writes:
    description:
      - Has no effect. The module never falls back to writing files in a way that may leave a part of them.
    type: bool
    default: false
"""
