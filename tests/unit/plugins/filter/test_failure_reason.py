# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The reason of a failure is what failed said, not what Ansible says of every failure."""

from __future__ import annotations

import typing as t

import pytest
from ansible.errors import AnsibleFilterError

from ansible_collections.vmbackup.vma.plugins.filter import failure_reason

tell: t.Callable[..., str] = failure_reason.FilterModule().filters()["failure_reason"]

CODE = "non-zero return code"
SOME = "One or more items failed"
WARNED = {"failed": False, "stderr": "a warning"}
ENDED = {"failed": True, "msg": CODE, "stderr": "a"}
FULL = {"failed": True, "msg": "full"}


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        ({"failed": True, "msg": "No space left on device."}, "No space left on device."),
        ({"failed": True, "msg": CODE, "rc": 5, "stderr": "no such volume group\n"}, "no such volume group"),
        ({"failed": True, "msg": CODE, "rc": 5, "stderr": ""}, CODE),
        # as a rescue has a result whose task failed by failed_when
        ({"msg": "", "stderr": " told\n"}, "told"),
        ({"failed": True, "msg": "could not find job"}, "could not find job: the host was restarted meanwhile"),
        ({"failed": True, "msg": SOME, "results": [WARNED, FULL]}, "full"),
        ({"failed": True, "msg": SOME, "results": [ENDED, FULL]}, "a full"),
        ({"msg": SOME, "results": [FULL, FULL]}, "full"),
        ({"failed": True, "msg": "the condition is wrong", "results": [{"skipped": True}]}, "the condition is wrong"),
        ({"failed": True, "msg": "the loop is none", "results": []}, "the loop is none"),
        ({"failed": True, "results": "these are the module's"}, "unknown"),
        ({}, "unknown"),
    ],
)
def test_reason(result: dict[str, t.Any], reason: str) -> None:
    assert tell(result) == reason


def test_what_is_no_result_is_refused() -> None:
    with pytest.raises(AnsibleFilterError, match="expected the result of a task, found str"):
        tell("it failed")
