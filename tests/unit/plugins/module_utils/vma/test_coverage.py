# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Which clusters came, against a plain set; and the bound on the memory that an archive can make us take."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ansible_collections.vmbackup.vma.plugins.module_utils.vma import coverage, errors


@st.composite
def _runs(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]]]:
    clusters = draw(st.integers(1, 300) | st.sampled_from([65535, 65536, 65537, 131072, 131073, 200000]))
    near = st.sampled_from([0, 65535, 65536, 131071, clusters - 1]).filter(lambda first: first < clusters)
    first = near | st.integers(0, clusters - 1)
    return clusters, [
        (at, min(count, clusters - at))
        for at, count in draw(st.lists(st.tuples(first, st.integers(1, 59) | st.integers(1, 70000)), max_size=12))
    ]


@given(_runs())
def test_like_a_set(case: tuple[int, list[tuple[int, int]]]) -> None:
    clusters, runs = case
    seen = coverage.Coverage(clusters, coverage.Budget())
    model: set[int] = set()
    for first, count in runs:
        new = set(range(first, first + count))
        assert seen.add(first, count) == sorted(model & new)
        model |= new
        assert seen.missing == clusters - len(model)
    expected = next((cluster for cluster in range(clusters) if cluster not in model), None)
    assert seen.first_missing() == expected


def test_in_order_memory_is_given_back() -> None:
    budget = coverage.Budget(chunks=1)
    seen = coverage.Coverage(5 * coverage.CHUNK + 7, budget)
    for first in range(0, seen.clusters, 59):
        assert seen.add(first, min(59, seen.clusters - first)) == []
    assert (seen.missing, seen.first_missing(), budget.chunks) == (0, None, 1)
    # what is full still tells what comes a second time
    assert seen.add(coverage.CHUNK, 2) == [coverage.CHUNK, coverage.CHUNK + 1]


def test_scattered_clusters_take_no_memory_without_bound() -> None:
    seen = coverage.Coverage(1 << 32, coverage.Budget(chunks=3))
    for number in range(3):
        seen.add(number * coverage.CHUNK, 1)
    with pytest.raises(errors.ArchiveError, match="without bound") as caught:
        seen.add(3 * coverage.CHUNK, 1)
    assert caught.value.problem.kind == "cluster_out_of_range"


def test_256_tib() -> None:
    seen = coverage.Coverage(1 << 32, coverage.Budget())
    assert seen.add((1 << 32) - 1, 1) == []
    assert (seen.missing, seen.first_missing()) == ((1 << 32) - 1, 0)


@pytest.mark.parametrize(
    ("clusters", "following", "missing", "first"), [(3, 0, 3, 0), (3, 2, 1, 2), (3, 3, 0, None), (3, 5, 0, None)]
)
def test_stream(clusters: int, following: int, missing: int, first: int | None) -> None:
    seen = coverage.StreamCoverage(clusters)
    seen.next = following
    assert (seen.missing, seen.first_missing()) == (missing, first)
