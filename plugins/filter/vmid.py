# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The filter vmbackup.vma.vmid: its documentation, and a call of the pure function behind it."""

from __future__ import annotations

DOCUMENTATION = r"""
name: vmid
short_description: Make a VMID of a UUID
version_added: 0.1.0
author:
  - The vmbackup.vma contributors (@vmbackup)
description:
  - Make a VMID for a VM that has none, such as a libvirt domain. A UUID has always the same.
  - It has nine digits and begins with 1 to 9, so that it does not meet the short ones that people give.
  - Two of a thousand VMs have the same with a probability of one in 1800; Proxmox VE would take their backups for those
    of one VM. Give one of them a VMID of its own then.
positional: _input
options:
  _input:
    description:
      - A UUID, as C(virsh domuuid) prints it.
    type: str
    required: true
seealso:
  - plugin: vmbackup.vma.guest_config
    plugin_type: filter
"""

EXAMPLES = r"""
---
- name: Tell the VMID of a domain
  ansible.builtin.debug:
    msg: "{{ 'c7a5fdbd-edaf-9455-926a-d65c16db1809' | vmbackup.vma.vmid }}"
"""

RETURN = r"""
_value:
  description: The VMID, between 100000000 and 999999999.
  type: int
  sample: 302201504
"""

import typing as t

from ansible.errors import AnsibleFilterError

from ansible_collections.vmbackup.vma.plugins.module_utils.host.guest_names import vmid_of
from ansible_collections.vmbackup.vma.plugins.module_utils.vma.errors import VmaError


def make_vmid(uuid: t.Any) -> int:
    """The VMID of a UUID.

    Raises: AnsibleFilterError for anything else.
    """
    if not isinstance(uuid, str):
        raise AnsibleFilterError(f"vmbackup.vma.vmid takes a UUID, not {type(uuid).__name__}")
    try:
        return vmid_of(uuid.strip())
    except VmaError as error:
        raise AnsibleFilterError(f"vmbackup.vma.vmid: {error}") from error


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        return {"vmid": make_vmid}
