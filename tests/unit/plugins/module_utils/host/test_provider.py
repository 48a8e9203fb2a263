# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What all providers have in common."""

from __future__ import annotations

import pytest

from ansible_collections.vmbackup.vma.plugins.module_utils.host.errors import SnapshotError
from ansible_collections.vmbackup.vma.plugins.module_utils.host.provider import (
    APPLICATION,
    CRASH,
    OFFLINE,
    consistency_of,
)


@pytest.mark.parametrize(
    ("reached", "count", "is_used", "expected"),
    [
        (APPLICATION, 2, True, APPLICATION),
        (CRASH, 2, True, CRASH),
        (CRASH, 2, False, OFFLINE),
        (OFFLINE, 1, True, CRASH),
    ],
)
def test_volumes_are_as_consistent_as_whoever_uses_them_stood_still(
    reached: str, count: int, is_used: bool, expected: str
) -> None:
    assert consistency_of(reached, count, is_used=is_used) == expected


def test_volumes_of_a_guest_that_is_off_here_and_runs_elsewhere_are_refused() -> None:
    with pytest.raises(SnapshotError, match="shut off here, and yet its 2 volumes are in use"):
        consistency_of(OFFLINE, 2, is_used=True)
