# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The filter vmbackup.vma.domain_disks: its documentation, and a call of the pure functions behind it."""

from __future__ import annotations

DOCUMENTATION = r"""
name: domain_disks
short_description: Name the disks of a libvirt domain
version_added: 0.1.0
author:
  - The vmbackup.vma contributors (@vmbackup)
description:
  - From the definition of a domain, as C(virsh dumpxml) prints it, take the paths of its disks as they are on the host.
positional: _input
options:
  _input:
    description:
      - The definition.
    type: str
    required: true
  everything:
    description:
      - Whether to name also what the disks are overlays of as far as the definition tells, drives for removable media,
        the file of UEFI variables, and volumes of storage pools, these by their names.
    type: bool
    default: false
seealso:
  - plugin: vmbackup.vma.domain_xml
    plugin_type: filter
"""

EXAMPLES = r"""
---
- name: Ask for the definition of a domain
  ansible.builtin.command: virsh --connect qemu:///system dumpxml web
  register: definition
  changed_when: false

- name: Name its disks
  ansible.builtin.debug:
    msg: "{{ definition.stdout | vmbackup.vma.domain_disks }}"
"""

RETURN = r"""
_value:
  description: The paths, in the order of the definition.
  type: list
  elements: str
  sample:
    - /var/lib/libvirt/images/web.qcow2
    - /dev/vg0/web-data
"""

import typing as t

from ansible.errors import AnsibleFilterError

from ansible_collections.vmbackup.vma.plugins.plugin_utils.domain_disks import find_disks, find_sources


def domain_disks(definition: t.Any, everything: bool = False) -> list[str]:
    """The result of the filter. Raises: AnsibleFilterError where the input is not as documented."""
    if not isinstance(definition, str):
        raise AnsibleFilterError(f"vmbackup.vma.domain_disks: expected a text, found {type(definition).__name__}")
    try:
        return find_sources(definition) if everything else find_disks(definition)
    except ValueError as error:
        raise AnsibleFilterError(f"vmbackup.vma.domain_disks: {error}. Give what virsh dumpxml prints.") from error


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        return {"domain_disks": domain_disks}
