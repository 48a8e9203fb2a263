# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The filter vmbackup.vma.junit: its documentation, and a call of the pure function behind it."""

from __future__ import annotations

DOCUMENTATION = r"""
name: junit
short_description: Make a JUnit document of the results of a restore drill
version_added: 0.1.0
author:
  - The vmbackup.vma contributors (@vmbackup)
description:
  - Make the XML that CI systems show as tests, with a test for each result of the role
    P(vmbackup.vma.restore_drill#role).
  - A backup that does not restore is a failure. What says nothing of the backup, such as a full disk of the host, is
    an error. What was not tried is skipped.
  - What XML cannot hold, such as the control characters of a console, is replaced.
positional: _input
options:
  _input:
    description:
      - The results, as C(restore_drill_results) has them.
    type: list
    elements: dict
    required: true
  suite:
    description:
      - What the tests are named together.
    type: str
    default: restore_drill
"""

EXAMPLES = r"""
---
- name: Write the results of all hosts to one file
  ansible.builtin.copy:
    content: "{{ results | vmbackup.vma.junit(suite='nightly drill') }}"
    dest: restore-drill.xml
    mode: "0644"
  delegate_to: localhost
  run_once: true
  vars:
    results: "{{ ansible_play_hosts_all | map('extract', hostvars, 'restore_drill_results') | flatten }}"
"""

RETURN = r"""
_value:
  description: The document.
  type: str
  sample: |
    <?xml version="1.0" encoding="UTF-8"?>
    <testsuites tests="1" failures="0" errors="0" skipped="0" time="14.212">
      <testsuite name="restore_drill" tests="1" failures="0" errors="0" skipped="0" time="14.212">
        <testcase classname="restore_drill" name="web vzdump-qemu-100-2026_11_22-03_00_00.vma.zst" time="14.212" />
      </testsuite>
    </testsuites>
"""

import typing as t
from collections.abc import Mapping

from ansible.errors import AnsibleFilterError

from ansible_collections.vmbackup.vma.plugins.plugin_utils.junit import junit


def make_junit(results: t.Any, suite: t.Any = "restore_drill") -> str:
    """The result of the filter. Raises: AnsibleFilterError where the input is not as documented."""
    if not isinstance(results, (list, tuple)) or not all(isinstance(result, Mapping) for result in results):
        raise AnsibleFilterError(f"vmbackup.vma.junit: expected a list of results, found {type(results).__name__}")
    if not isinstance(suite, str):
        raise AnsibleFilterError(f"vmbackup.vma.junit: suite cannot be of type {type(suite).__name__}")
    return junit(results, suite)


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        return {"junit": make_junit}
