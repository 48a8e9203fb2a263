# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The filter that chooses which archives a retention keeps: Ansible's values to those of vma/retention.py and back."""

from __future__ import annotations

DOCUMENTATION = r"""
name: prune
short_description: Choose which archives a retention keeps
version_added: 0.1.0
author:
  - The vmbackup.vma contributors (@vmbackup)
description:
  - Decide by Proxmox VE's rules which archives stay and which go, and say why. The filter removes nothing.
  - The archives of one VM in one folder are a group, and each group is decided on by itself.
  - The rules apply in the order V(last), V(hourly), V(daily), V(weekly), V(monthly), V(yearly), each to the archives
    from the newest to the oldest. A rule keeps the newest archive of each hour, day, ISO week, month or year, until it
    has kept as many as its number says. An hour, day and so on from which an earlier rule keeps an archive is skipped
    and does not count.
  - Never removed, and never counted, are archives whose names are not standard, which are protected, which have a known
    problem, or whose time is in the future.
  - Of the others in a group, the newest that O(verified) names stays in any case. It takes no place of another.
  - Times are the digits of the names, local time of the host that made the archives, and are never converted. When
    clocks are set back, both of the hours that have the same digits are one hour for V(hourly), and archives of these
    hours are ordered by their digits. An hour that clocks skip counts as little as any other without an archive.
positional: keep
options:
  _input:
    description:
      - The archives, as paths, or as RV(vmbackup.vma.vma_info#module:archives) has them.
      - Of the latter, C(protected) and C(error) are looked at. Nothing is known to be protected, or to have a problem,
        where there are paths alone.
    type: list
    elements: raw
    required: true
  keep:
    description:
      - How many archives each rule keeps. Without any number above 0 everything is kept.
    type: dict
    required: true
    suboptions:
      last:
        description: How many archives to keep, whatever their times.
        type: int
      hourly:
        description: For how many hours to keep an archive. Hours without any do not count; so too below.
        type: int
      daily:
        description: For how many days to keep an archive.
        type: int
      weekly:
        description: For how many ISO weeks, which begin on Mondays, to keep an archive.
        type: int
      monthly:
        description: For how many months to keep an archive.
        type: int
      yearly:
        description: For how many years to keep an archive.
        type: int
      all:
        description: Keep everything. An error together with a number above 0.
        type: bool
  verified:
    description:
      - The archives that are known to have verified well, as the paths that the input has, or as file names, which
        count in any folder. What names no archive of the input is ignored.
    type: list
    elements: str
    default: []
  now:
    description:
      - The present local time of the host that keeps the archives, like V(2026-01-31 22:15:00) or, as the fact
        C(ansible_facts.date_time.iso8601_basic_short) has it, V(20260131T221500). What is later is from the future.
      - By default the present time in the time zone that is farthest ahead, UTC+14, by the control node's clock. So an
        archive may be up to 26 hours in the future before it is noticed.
    type: str
notes:
  - Look again whether an archive is protected when you remove it. Somebody may have protected it since.
seealso:
  - module: vmbackup.vma.vma_info
  - plugin: vmbackup.vma.archive_name
    plugin_type: filter
"""

EXAMPLES = r"""
---
- name: Verify what is there
  vmbackup.vma.vma_info:
    path: /srv/backup/dump
    verify: content
    config_content: false
  register: found
  failed_when: found.archives is not defined

- name: Choose what stays
  ansible.builtin.set_fact:
    pruned: "{{ found.archives | vmbackup.vma.prune(keep, verified=verified) }}"
  vars:
    keep:
      last: 2
      daily: 7
      weekly: 4
      monthly: 12
    verified: "{{ found.archives | rejectattr('error', 'defined') | map(attribute='path') }}"

- name: Remove the others, with their logs and notes
  ansible.builtin.file:
    path: "{{ item }}"
    state: absent
  loop: "{{ going | map(attribute='path') | list + going | map(attribute='beside') | flatten }}"
  vars:
    going: "{{ pruned | rejectattr('keep') }}"
"""

RETURN = r"""
_value:
  description: What becomes of each archive, in the order of the input.
  type: list
  elements: dict
  sample:
    - path: /srv/backup/dump/vzdump-qemu-100-2026_11_22-03_00_00.vma.zst
      keep: true
      reason: daily 2026-11-22
      beside: []
    - path: /srv/backup/dump/vzdump-qemu-100-2026_11_21-22_15_00.vma.zst
      keep: false
      reason: no rule keeps it
      beside:
        - /srv/backup/dump/vzdump-qemu-100-2026_11_21-22_15_00.log
        - /srv/backup/dump/vzdump-qemu-100-2026_11_21-22_15_00.vma.zst.notes
  contains:
    path:
      description: The archive, as the input has it.
      type: str
    keep:
      description: Whether it stays.
      type: bool
    reason:
      description:
        - The rule that keeps it, with the time that it is kept for, such as V(daily 2026-11-22) or V(weekly 2026-W47).
        - Or one of V(last verified), V(protected), V(not a standard name), V(from the future), V(everything is kept)
          and V(no rule keeps it), or V(has a problem:) and the kind of it.
      type: str
    beside:
      description:
        - The log and the notes of an archive that goes, which go with it. They need not be there.
        - Empty for an archive that stays.
      type: list
      elements: str
"""

import datetime
import re
import typing as t

from ansible.errors import AnsibleFilterError
from ansible.module_utils.parsing.convert_bool import boolean

from ansible_collections.vmbackup.vma.plugins.module_utils.vma.errors import RequestError, VmaError
from ansible_collections.vmbackup.vma.plugins.module_utils.vma.retention import Archive, choose, local_time

_NUMBER = re.compile(r"-?[0-9]+")
_FARTHEST_AHEAD = datetime.timezone(datetime.timedelta(hours=14))


def prune(
    archives: t.Iterable[object], keep: object, *, verified: t.Iterable[str] = (), now: str | None = None
) -> list[dict[str, t.Any]]:
    """What becomes of each archive, as the documentation above has it.

    Raises: AnsibleFilterError where an argument is not of its kind.
    """
    try:
        decisions = choose(
            [_archive(item) for item in _items("the input", archives)],
            _keep(keep),
            verified=[str(item) for item in _items("verified", verified)],
            now=datetime.datetime.now(_FARTHEST_AHEAD).replace(tzinfo=None) if now is None else local_time(now),
        )
    except VmaError as error:
        raise AnsibleFilterError(f"vmbackup.vma.prune: {error}") from error
    return [
        {"path": decision.path, "keep": decision.keep, "reason": decision.reason, "beside": decision.beside}
        for decision in decisions
    ]


def _items(what: str, value: t.Iterable[object]) -> list[object]:
    """The items of a list; a text or a dict could be gone through too, but that is not what was meant."""
    if isinstance(value, (str, bytes, t.Mapping)) or not isinstance(value, t.Iterable):
        raise RequestError(f"expected {what} to be a list, found {value!r}")
    return list(value)


def _archive(item: object) -> Archive:
    """An archive from its path, or from what vma_info tells of it."""
    if isinstance(item, str) and item:
        return Archive(item)
    if not isinstance(item, t.Mapping) or not isinstance(item.get("path"), str) or not item["path"]:
        raise RequestError(
            f"expected paths, or archives with a 'path', found {item!r}",
            remedy="Give what vma_info returns as archives.",
        )
    error = item.get("error")
    kind = str(error.get("kind", "unknown")) if isinstance(error, t.Mapping) else "unknown"
    return Archive(item["path"], _truth("protected", item.get("protected", False)), kind if error else None)


def _keep(keep: object) -> dict[str, object]:
    """The rules, with numbers and booleans that a template made into text turned back."""
    if not isinstance(keep, t.Mapping):
        raise RequestError(f"expected keep to be a dict like {{'daily': 7}}, found {keep!r}")
    rules: dict[str, object] = {}
    for key, value in keep.items():
        if isinstance(value, str) and _NUMBER.fullmatch(value):
            rules[key] = int(value)
        else:
            rules[key] = _truth(key, value) if key == "all" and isinstance(value, str) else value
    return rules


def _truth(what: str, value: object) -> bool:
    """The boolean that C(value) is, or that its text is."""
    try:
        return bool(boolean(value))
    except TypeError:
        raise RequestError(f"expected '{what}' to be true or false, found {value!r}") from None


class FilterModule:
    """What Ansible asks for the filters of this file."""

    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        """The filter by its name."""
        return {"prune": prune}
