# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The filter vmbackup.vma.failure_reason: its documentation, and a call of the pure function behind it."""

from __future__ import annotations

DOCUMENTATION = r"""
name: failure_reason
short_description: Tell why a task failed
version_added: 0.1.0
author:
  - The vmbackup.vma contributors (@vmbackup)
description:
  - Tell why a task failed, for a message that a person reads.
  - Of a command this is what it wrote to its standard error, where Ansible's message has only its return code. Of a
    loop it is the reason of each item that failed, where Ansible's message says only that some did. Of an asynchronous
    task whose job is gone it says that the host was restarted.
positional: _input
options:
  _input:
    description:
      - The result of the task, as C(ansible_failed_result) has it in a C(rescue).
    type: dict
    required: true
"""

EXAMPLES = r"""
---
- name: Make volumes, and say why that failed
  block:
    - name: Make volumes
      ansible.builtin.command:
        argv: [lvcreate, --size, 1G, --name, "{{ item }}", vg0]
      loop: [web, mail]
      changed_when: true
  rescue:
    - name: Fail with the reason
      ansible.builtin.fail:
        msg: "No volumes were made: {{ ansible_failed_result | vmbackup.vma.failure_reason }}"
"""

RETURN = r"""
_value:
  description: The reason.
  type: str
  sample: Logical Volume "web" already exists in volume group "vg0"
"""

import typing as t
from collections.abc import Mapping

from ansible.errors import AnsibleFilterError

from ansible_collections.vmbackup.vma.plugins.plugin_utils.failure_reason import failure_reason


def tell_failure_reason(result: t.Any) -> str:
    """The result of the filter. Raises: AnsibleFilterError where the input is not as documented."""
    if not isinstance(result, Mapping):
        raise AnsibleFilterError(
            f"vmbackup.vma.failure_reason: expected the result of a task, found {type(result).__name__}"
        )
    return failure_reason(result)


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        return {"failure_reason": tell_failure_reason}
