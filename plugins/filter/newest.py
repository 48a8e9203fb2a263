# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The filter vmbackup.vma.newest: its documentation, and a call of the pure function behind it."""

from __future__ import annotations

DOCUMENTATION = r"""
name: newest
short_description: Choose the newest archive of each VM
version_added: 0.1.0
author:
  - The vmbackup.vma contributors (@vmbackup)
description:
  - Of archives with standard names of Proxmox VE, choose the newest of each VM in each folder. The digits of the name
    tell how new it is.
  - An archive with another name tells no VM. It stands for one of its own, and is chosen.
  - Archives that cannot be read are chosen as any other, so that a broken newest one is not hidden by an older one.
positional: _input
options:
  _input:
    description:
      - The archives, as paths, or as RV(vmbackup.vma.vma_info#module:archives) has them.
    type: list
    elements: raw
    required: true
seealso:
  - module: vmbackup.vma.vma_info
  - plugin: vmbackup.vma.prune
    plugin_type: filter
"""

EXAMPLES = r"""
---
- name: Look at what is there
  vmbackup.vma.vma_info:
    path: /srv/backup/dump
    config_content: false
  register: found

- name: Name the newest archive of three VMs, chosen at random
  ansible.builtin.debug:
    msg: "{{ (found.archives | vmbackup.vma.newest | shuffle)[:3] | map(attribute='path') }}"
"""

RETURN = r"""
_value:
  description: The newest archives, as the input has them, ordered by their paths.
  type: list
  elements: raw
  sample:
    - /srv/backup/dump/vzdump-qemu-100-2026_11_22-03_00_00.vma.zst
    - /srv/backup/dump/vzdump-qemu-101-2026_11_22-03_07_12.vma.zst
"""

import typing as t
from collections.abc import Mapping

from ansible.errors import AnsibleFilterError

from ansible_collections.vmbackup.vma.plugins.plugin_utils.newest import newest


def newest_archives(archives: t.Any) -> list[t.Any]:
    """The result of the filter. Raises: AnsibleFilterError where the input is not as documented."""
    if isinstance(archives, (str, bytes, Mapping)) or not isinstance(archives, t.Iterable):
        raise AnsibleFilterError(f"vmbackup.vma.newest: expected a list of archives, found {archives!r}")
    return newest(archives, _path)


def _path(archive: t.Any) -> str:
    path = archive.get("path") if isinstance(archive, Mapping) else archive
    if not isinstance(path, str) or not path:
        raise AnsibleFilterError(
            f"vmbackup.vma.newest: expected paths, or archives with a 'path', found {archive!r}. "
            "Give what vma_info returns as archives."
        )
    return path


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        return {"newest": newest_archives}
