# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Problems and errors as users see them."""

from __future__ import annotations

import pytest

from ansible_collections.vmbackup.vma.plugins.module_utils.vma import errors
from ansible_collections.vmbackup.vma.plugins.module_utils.vma.errors import Problem

PROMISED = """
not_vma header_checksum header_invalid unsafe_name extent_magic extent_checksum extent_uuid extent_block_count
extent_digest truncated trailing_data unknown_device cluster_out_of_range cluster_duplicate cluster_missing
vmstate_order decompression read_error
"""


def test_the_kinds_are_those_that_playbooks_know() -> None:
    assert set(errors.KINDS) == set(PROMISED.split())


@pytest.mark.parametrize("kind", errors.KINDS)
def test_every_kind_has_advice(kind: str) -> None:
    error = errors.ArchiveError(Problem(kind, "something"), file="/a.vma")
    assert str(error).startswith(f"/a.vma: {kind}: something. ")
    assert str(error).endswith(".")
    assert errors.REMEDIES[kind] in str(error)


@pytest.mark.parametrize(
    ("problem", "told"),
    [
        (Problem("truncated", "m"), {"kind": "truncated", "message": "m"}),
        (Problem("truncated", "m", 0), {"kind": "truncated", "message": "m", "offset": 0}),
        (
            Problem("cluster_missing", "m", device="d", cluster=0),
            {"kind": "cluster_missing", "message": "m", "device": "d", "cluster": 0},
        ),
    ],
)
def test_what_is_not_known_is_left_out(problem: Problem, told: dict[str, object]) -> None:
    assert problem.as_dict() == told


def test_the_strict_report_raises() -> None:
    problem = Problem("truncated", "cut", 5)
    with pytest.raises(errors.ArchiveError, match="truncated at offset 5: cut") as caught:
        errors.refuse(problem)
    assert caught.value.problem is problem


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (errors.VmaError("it broke"), "it broke."),
        (errors.VmaError("it broke!", file="/f"), "/f: it broke!"),
        (errors.VmaError("it broke", file="/f", remedy="Mend it."), "/f: it broke. Mend it."),
    ],
)
def test_text(error: errors.VmaError, text: str) -> None:
    assert str(error) == text


@pytest.mark.parametrize("kind", [errors.SpaceError, errors.BusyError])
def test_families(kind: type[errors.VmaError]) -> None:
    assert issubclass(kind, errors.TargetError)
    assert issubclass(kind, errors.VmaError)
