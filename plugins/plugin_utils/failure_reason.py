# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Why a task failed, in the words of what failed. Pure: no I/O."""

from __future__ import annotations

import typing as t

_LOST_JOB = "could not find job"
"""How Ansible says that the file of an asynchronous task is gone."""


def failure_reason(result: t.Mapping[str, t.Any]) -> str:
    """Why a task failed: of each item of a loop that failed, what its command wrote to stderr, or else the message."""
    items = result.get("results")
    if not isinstance(items, (list, tuple)) or not items:
        items = [{**result, "failed": True}]
    reasons = [_reason_of(item) for item in items if isinstance(item, t.Mapping) and item.get("failed")]
    # A loop can fail without an item, as where its condition is wrong
    return " ".join(dict.fromkeys(reasons)) or _reason_of(result)


def _reason_of(result: t.Mapping[str, t.Any]) -> str:
    message = str(result.get("msg") or "").strip()
    reason = str(result.get("stderr") or "").strip() or message or "unknown"
    return f"{reason}: the host was restarted meanwhile" if _LOST_JOB in message else reason


__all__ = ("failure_reason",)
