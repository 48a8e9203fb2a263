# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: the attributes that its modules share."""

from __future__ import annotations


class ModuleDocFragment:
    """What every module of the collection says of itself; each adds its C(support) and C(details)."""

    DOCUMENTATION = r"""
options: {}
attributes:
  check_mode:
    description: In check mode the module changes nothing, and tells whether it would.
  diff_mode:
    description: In diff mode the module shows what it changed, or in check mode would change.
  idempotent:
    description: Run again with the same options and the same input, the module changes nothing.
  platform:
    description: The operating systems of managed hosts that the module runs on.
    platforms: posix
    support: full
"""

    FILES = r"""
options: {}
attributes:
  safe_file_operations:
    description: A file has its old or its new content, never a mixture or a part, also after a crash or on a full disk.
"""

    ACTIONGROUP_VMA = r"""
options: {}
attributes:
  action_group:
    description: Use C(group/vmbackup.vma.vma) in C(module_defaults) to set options of all modules of the group.
    support: full
    membership:
      - vmbackup.vma.vma
"""
