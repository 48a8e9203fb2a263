# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The filter that builds the standard name of an archive, and of the log beside it. Pure: no clock, no time zone."""

from __future__ import annotations

DOCUMENTATION = r"""
name: archive_name
short_description: Build the standard file name of an archive
version_added: 0.1.0
author:
  - The vmbackup.vma contributors (@vmbackup)
description:
  - Build the name by which Proxmox VE lists an archive with its VM, and by which archives are pruned, such as
    V(vzdump-qemu-100-2026_01_31-22_15_00.vma.zst).
  - The time in it is local time of the host that keeps the archives. A filter runs on the control node, whose time zone
    may be another one, so this filter never looks at it.
positional: time, compression
options:
  _input:
    description: The number of the VM, from V(100) to V(999999999).
    type: int
    required: true
  time:
    description:
      - The time of the backup.
      - As text it is local time, V(2026-01-31 22:15:00), V(2026-01-31T22:15:00), as in archive names, or as the fact
        C(ansible_facts.date_time.iso8601_basic_short) has it, V(20260131T221500).
      - As a number it is seconds since the epoch, and O(tz_offset) tells what local time that is.
    type: raw
    required: true
  compression:
    description: How the archive is compressed, which the ending of the name tells.
    type: str
    choices: [none, zstd, gzip]
    default: zstd
  tz_offset:
    description:
      - How far local time is ahead of UTC at that time, like V(+0100), as the fact C(ansible_facts.date_time.tz_offset)
        has it.
      - Required where O(time) is a number, and refused where it is text.
    type: str
  log:
    description: Whether to build the name of the log beside the archive instead, where Proxmox VE shows it.
    type: bool
    default: false
seealso:
  - plugin: vmbackup.vma.prune
    plugin_type: filter
  - module: vmbackup.vma.vma_create
"""

EXAMPLES = r"""
---
- name: Name an archive after the present time of the managed host
  ansible.builtin.set_fact:
    archive: "{{ 100 | vmbackup.vma.archive_name(ansible_facts.date_time.iso8601_basic_short) }}"

- name: Name the log beside it
  ansible.builtin.set_fact:
    archive_log: "{{ 100 | vmbackup.vma.archive_name(ansible_facts.date_time.iso8601_basic_short, log=true) }}"

- name: Name an archive after seconds since the epoch
  ansible.builtin.debug:
    msg: "{{ 100 | vmbackup.vma.archive_name(1769894100, compression='gzip', tz_offset='+0100') }}"
# => vzdump-qemu-100-2026_01_31-22_15_00.vma.gz
"""

RETURN = r"""
_value:
  description: The file name, without a folder.
  type: str
  sample: vzdump-qemu-100-2026_01_31-22_15_00.vma.zst
"""

import datetime
import re
import typing as t

from ansible.errors import AnsibleFilterError

from ansible_collections.vmbackup.vma.plugins.module_utils.vma.errors import RequestError, VmaError
from ansible_collections.vmbackup.vma.plugins.module_utils.vma.retention import local_time

_ENDINGS = {"none": ".vma", "zstd": ".vma.zst", "gzip": ".vma.gz"}
_VMIDS = range(100, 1000000000)
_NUMBER = re.compile(r"[0-9]+")
_OFFSET = re.compile(r"([+-])([01][0-9]|2[0-3]):?([0-5][0-9])")


def archive_name(
    vmid: object, time: object, compression: str = "zstd", *, tz_offset: str | None = None, log: bool = False
) -> str:
    """The file name of an archive, or of its log, as the documentation above has it.

    Raises: AnsibleFilterError where an argument is out of its range.
    """
    try:
        number = _whole_number(vmid)
        if number is None or number not in _VMIDS:
            raise RequestError(f"expected the number of a VM, {_VMIDS[0]} to {_VMIDS[-1]}, found {vmid!r}")
        if compression not in _ENDINGS:
            raise RequestError(f"expected a compression of {', '.join(_ENDINGS)}, found {compression!r}")
        ending = ".log" if log else _ENDINGS[compression]
        return f"vzdump-qemu-{number}-{_local(time, tz_offset):%Y_%m_%d-%H_%M_%S}{ending}"
    except VmaError as error:
        raise AnsibleFilterError(f"vmbackup.vma.archive_name: {error}") from error


def _whole_number(value: object) -> int | None:
    """The number that C(value) is, or that its text is: facts and templates yield numbers as text."""
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _local(time: object, tz_offset: str | None) -> datetime.datetime:
    """The local time that the name shall have."""
    epoch = _whole_number(time)
    if epoch is None:
        if not isinstance(time, str):
            raise RequestError(f"expected a time as text or as whole seconds since the epoch, found {time!r}")
        if tz_offset is not None:
            raise RequestError(
                f"the time '{time}' is local time already, so that tz_offset '{tz_offset}' has no meaning",
                remedy="Leave tz_offset out, or give seconds since the epoch.",
            )
        return local_time(time)
    offset = _OFFSET.fullmatch(tz_offset or "")
    if offset is None:
        raise RequestError(
            f"expected a tz_offset like '+0100' beside seconds since the epoch, found {tz_offset!r}",
            remedy="Give tz_offset=ansible_facts.date_time.tz_offset, or the local time as text.",
        )
    ahead = datetime.timedelta(hours=int(offset[2]), minutes=int(offset[3]))
    try:
        return (
            datetime.datetime(1970, 1, 1) + datetime.timedelta(seconds=epoch) + (-ahead if offset[1] == "-" else ahead)
        )
    except OverflowError:
        raise RequestError(f"expected seconds since the epoch up to the year 9999, found {epoch}") from None


class FilterModule:
    """What Ansible asks for the filters of this file."""

    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        """The filter by its name."""
        return {"archive_name": archive_name}
