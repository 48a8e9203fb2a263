# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Which archives stay: a table of cases, a second statement of the rules to compare with, and the page's example."""

from __future__ import annotations

import datetime
import os
import pathlib
import re
import time
import typing as t

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ansible_collections.vmbackup.vma.plugins.module_utils.vma import errors, retention

FOLDER = "/srv/backup/dump"
PAGE = pathlib.Path(__file__).resolve().parents[5] / "docs" / "retention.md"
NO_RULE = "no rule keeps it"


def _path(when: str, vmid: int = 100, folder: str = FOLDER, ending: str = ".vma.zst") -> str:
    """The standard name for a time like C(2026-01-31 22:15:00)."""
    date, clock = when.split(" ")
    return f"{folder}/vzdump-qemu-{vmid}-{date.replace('-', '_')}-{clock.replace(':', '_')}{ending}"


class Row(t.NamedTuple):
    """An archive and the reason that is expected for it; C(how) may be protected, verified or both."""

    when: str
    reason: str
    how: str = ""


class Case(t.NamedTuple):
    """One retention and all archives of a VM, newest first."""

    title: str
    keep: dict[str, object]
    rows: list[Row]


CASES = [
    Case(
        "several a day: the newest of each day stays",
        {"daily": 2},
        [
            Row("2026-11-22 22:00:00", "daily 2026-11-22"),
            Row("2026-11-22 10:00:00", NO_RULE),
            Row("2026-11-21 22:00:00", "daily 2026-11-21"),
            Row("2026-11-21 10:00:00", NO_RULE),
            Row("2026-11-20 22:00:00", NO_RULE),
        ],
    ),
    Case(
        "last counts archives, and a day that it covers is no day of daily",
        {"last": 2, "daily": 2},
        [
            Row("2026-11-22 22:00:00", "last 2026-11-22 22:00:00"),
            Row("2026-11-22 10:00:00", "last 2026-11-22 10:00:00"),
            Row("2026-11-22 09:00:00", NO_RULE),
            Row("2026-11-21 22:00:00", "daily 2026-11-21"),
            Row("2026-11-20 22:00:00", "daily 2026-11-20"),
            Row("2026-11-19 22:00:00", NO_RULE),
        ],
    ),
    Case(
        "hours are those of the clock, not spans of 60 minutes",
        {"hourly": 2},
        [
            Row("2026-11-22 11:00:00", "hourly 2026-11-22 11"),
            Row("2026-11-22 10:59:59", "hourly 2026-11-22 10"),
            Row("2026-11-22 10:00:00", NO_RULE),
            Row("2026-11-22 09:59:59", NO_RULE),
        ],
    ),
    Case(
        "clocks set back: the archives of both hours with the same digits are of one hour",
        {"hourly": 3},
        [
            Row("2026-10-25 03:10:00", "hourly 2026-10-25 03"),
            Row("2026-10-25 02:50:00", "hourly 2026-10-25 02"),
            Row("2026-10-25 02:20:00", NO_RULE),
            Row("2026-10-25 02:10:00", NO_RULE),
            Row("2026-10-25 01:50:00", "hourly 2026-10-25 01"),
            Row("2026-10-25 00:50:00", NO_RULE),
        ],
    ),
    Case(
        "clocks set forward: the hour that is missing does not count",
        {"hourly": 2},
        [
            Row("2026-03-29 03:10:00", "hourly 2026-03-29 03"),
            Row("2026-03-29 01:50:00", "hourly 2026-03-29 01"),
            Row("2026-03-29 00:50:00", NO_RULE),
        ],
    ),
    Case(
        "clocks set forward: a name within the missing hour counts by its digits",
        {"hourly": 2},
        [
            Row("2026-03-29 03:10:00", "hourly 2026-03-29 03"),
            Row("2026-03-29 02:30:00", "hourly 2026-03-29 02"),
            Row("2026-03-29 01:50:00", NO_RULE),
        ],
    ),
    Case(
        "days of 23 and 25 hours are days",
        {"daily": 4},
        [
            Row("2026-10-26 00:00:00", "daily 2026-10-26"),
            Row("2026-10-25 23:59:59", "daily 2026-10-25"),
            Row("2026-10-25 00:00:00", NO_RULE),
            Row("2026-03-29 23:59:59", "daily 2026-03-29"),
            Row("2026-03-29 00:00:00", NO_RULE),
            Row("2026-03-28 23:59:59", "daily 2026-03-28"),
        ],
    ),
    Case(
        "the last days of 2020 and the first of 2021 are in week 53 of 2020",
        {"weekly": 3},
        [
            Row("2021-01-04 03:00:00", "weekly 2021-W01"),
            Row("2021-01-03 03:00:00", "weekly 2020-W53"),
            Row("2021-01-01 03:00:00", NO_RULE),
            Row("2020-12-31 03:00:00", NO_RULE),
            Row("2020-12-27 03:00:00", "weekly 2020-W52"),
            Row("2020-01-01 03:00:00", NO_RULE),
        ],
    ),
    Case(
        "the 30th of December 2024 is in week 1 of 2025, and of no week of 2024",
        {"weekly": 3},
        [
            Row("2025-01-01 03:00:00", "weekly 2025-W01"),
            Row("2024-12-30 03:00:00", NO_RULE),
            Row("2024-12-29 03:00:00", "weekly 2024-W52"),
            Row("2024-01-01 03:00:00", "weekly 2024-W01"),
        ],
    ),
    Case(
        "years are those of the calendar, whatever the week",
        {"yearly": 2},
        [
            Row("2021-01-01 03:00:00", "yearly 2021"),
            Row("2020-12-31 03:00:00", "yearly 2020"),
            Row("2020-01-01 03:00:00", NO_RULE),
        ],
    ),
    Case(
        "a week that daily covers is no week of weekly",
        {"daily": 1, "weekly": 1},
        [
            Row("2020-12-07 12:18:21", "daily 2020-12-07"),
            Row("2020-12-04 12:18:21", "weekly 2020-W49"),
            Row("2020-12-03 12:18:21", NO_RULE),
        ],
    ),
    Case(
        "a month that weekly covers is no month of monthly",
        {"daily": 1, "weekly": 1, "monthly": 1},
        [
            Row("2020-01-01 12:18:21", "daily 2020-01-01"),
            Row("2019-12-31 12:18:21", NO_RULE),
            Row("2019-12-25 12:18:21", "weekly 2019-W52"),
        ],
    ),
    Case(
        "what weekly passed over in its week, monthly does not take",
        {"weekly": 1, "monthly": 1},
        [
            Row("2026-12-06 03:00:00", "weekly 2026-W49"),
            Row("2026-11-30 03:00:00", NO_RULE),
            Row("2026-11-29 03:00:00", "monthly 2026-11"),
        ],
    ),
    Case(
        "but it takes what weekly did not look at, the week being covered by daily",
        {"daily": 1, "weekly": 1, "monthly": 1},
        [
            Row("2026-12-06 03:00:00", "daily 2026-12-06"),
            Row("2026-11-30 03:00:00", "monthly 2026-11"),
            Row("2026-10-20 03:00:00", "weekly 2026-W43"),
        ],
    ),
    Case(
        "gaps do not count",
        {"daily": 3},
        [
            Row("2026-11-22 03:00:00", "daily 2026-11-22"),
            Row("2026-11-02 03:00:00", "daily 2026-11-02"),
            Row("2025-02-28 03:00:00", "daily 2025-02-28"),
            Row("2025-02-27 03:00:00", NO_RULE),
        ],
    ),
    Case(
        "a number larger than the archives keeps the newest of each bucket",
        {"daily": 1000000},
        [
            Row("2026-11-22 03:00:00", "daily 2026-11-22"),
            Row("2026-11-21 03:00:00", "daily 2026-11-21"),
            Row("2026-11-21 02:00:00", NO_RULE),
        ],
    ),
    Case(
        "the rules apply in their own order, not in that in which they are written",
        {"yearly": 1, "monthly": 1, "weekly": 1, "daily": 1, "hourly": 1, "last": 1},
        [
            Row("2026-11-22 03:30:00", "last 2026-11-22 03:30:00"),
            Row("2026-11-22 03:00:00", NO_RULE),
            Row("2026-11-22 02:00:00", "hourly 2026-11-22 02"),
            Row("2026-11-21 02:00:00", "daily 2026-11-21"),
            Row("2026-11-15 02:00:00", "weekly 2026-W46"),
            Row("2026-10-31 02:00:00", "monthly 2026-10"),
            Row("2025-12-31 02:00:00", "yearly 2025"),
            Row("2024-12-31 02:00:00", NO_RULE),
        ],
    ),
    Case(
        "protected archives stay, and the rules do not see them",
        {"last": 1, "daily": 1},
        [
            Row("2026-11-22 22:00:00", "protected", "protected"),
            Row("2026-11-22 10:00:00", "last 2026-11-22 10:00:00"),
            Row("2026-11-21 22:00:00", "protected", "protected"),
            Row("2026-11-21 10:00:00", "daily 2026-11-21"),
            Row("2026-11-20 22:00:00", NO_RULE),
        ],
    ),
    Case(
        "the last one that verified stays, older than all that are kept, and the one before it goes",
        {"last": 2},
        [
            Row("2026-11-22 03:00:00", "last 2026-11-22 03:00:00"),
            Row("2026-11-21 03:00:00", "last 2026-11-21 03:00:00"),
            Row("2026-11-20 03:00:00", NO_RULE),
            Row("2026-11-19 03:00:00", "last verified", "verified"),
            Row("2026-11-18 03:00:00", NO_RULE, "verified"),
        ],
    ),
    Case(
        "a rule that keeps the last verified one counts it as ever",
        {"last": 2},
        [
            Row("2026-11-22 03:00:00", "last 2026-11-22 03:00:00"),
            Row("2026-11-21 03:00:00", "last 2026-11-21 03:00:00", "verified"),
            Row("2026-11-20 03:00:00", NO_RULE, "verified"),
        ],
    ),
    Case(
        "protection may be lifted, so a protected one does not serve as the last verified",
        {"last": 1},
        [
            Row("2026-11-22 03:00:00", "last 2026-11-22 03:00:00"),
            Row("2026-11-21 03:00:00", "protected", "protected verified"),
            Row("2026-11-20 03:00:00", "last verified", "verified"),
            Row("2026-11-19 03:00:00", NO_RULE, "verified"),
        ],
    ),
    *(
        Case(
            f"everything stays with keep={keep}",
            keep,
            [
                Row("2026-11-22 03:00:00", "everything is kept"),
                Row("2026-11-22 02:00:00", "protected", "protected"),
                Row("1999-11-22 02:00:00", "everything is kept", "verified"),
            ],
        )
        for keep in t.cast(
            "list[dict[str, object]]",
            [
                {},
                {"last": 0, "hourly": 0, "daily": 0, "weekly": 0, "monthly": 0, "yearly": 0},
                {"daily": None},
                {"all": True},
                {"all": True, "daily": 0},
                {"all": False},
            ],
        )
    ),
    Case("no archives, no decisions", {"last": 1}, []),
]


def _decide(case: Case) -> dict[str, str]:
    archives = [retention.Archive(_path(row.when), "protected" in row.how) for row in reversed(case.rows)]
    verified = [_path(row.when) for row in case.rows if "verified" in row.how]
    decisions = retention.choose(archives, case.keep, verified=verified)
    assert [decision.path for decision in decisions] == [archive.path for archive in archives]
    assert [decision.keep for decision in decisions] == [decision.reason != NO_RULE for decision in decisions]
    return {decision.path: decision.reason for decision in decisions}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_cases(case: Case) -> None:
    assert _decide(case) == {_path(row.when): row.reason for row in case.rows}


@pytest.mark.parametrize("zone", ["UTC", "CET-1CEST,M3.5.0,M10.5.0/3", "LHST-10:30LHDT-11,M10.1.0,M4.1.0", "XST+12"])
def test_the_zone_of_this_host_has_no_part(zone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where the digits are an hour that this host's clock skips, or has twice."""
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        for case in CASES:
            assert _decide(case) == {_path(row.when): row.reason for row in case.rows}
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    "name",
    [
        "web.vma.zst",
        "vzdump-qemu-100-2020_01_01-00_00_00.vma.zst.notes",
        "vzdump-qemu-100-2020_02_30-00_00_00.vma.zst",
        "vzdump-qemu-100-2020_01_01-00_00_60.vma.zst",
        "vzdump-qemu-0100-2020_01_01-00_00_00.vma.zst",
        "vzdump-lxc-100-2020_01_01-00_00_00.tar.zst",
        ".vmbackup-vma-vzdump-qemu-100-2020_01_01-00_00_00.vma.zst",
    ],
)
def test_other_names_are_never_removed_and_never_counted(name: str) -> None:
    decisions = retention.choose(
        [retention.Archive(f"{FOLDER}/{name}"), retention.Archive(_path("2019-01-01 00:00:00"))],
        {"last": 1},
        verified=[name],
    )
    assert [(decision.keep, decision.reason) for decision in decisions] == [
        (True, "not a standard name"),
        (True, "last 2019-01-01 00:00:00"),
    ]


def test_each_vm_and_each_folder_is_a_group() -> None:
    newest, older = "2026-11-22 03:00:00", "2026-11-21 03:00:00"
    archives = [
        retention.Archive(_path(when, vmid, folder))
        for when in (newest, older)
        for vmid in (100, 1000)
        for folder in (FOLDER, "/mnt/copy")
    ]
    verified = [_path(older, 1000, "/mnt/copy")]
    decisions = retention.choose(archives, {"last": 1}, verified=verified)
    assert [decision.path for decision in decisions if decision.keep] == [
        *(archive.path for archive in archives[:4]),
        *verified,
    ]


def test_a_folder_may_be_written_in_two_ways() -> None:
    newest, older = _path("2026-11-22 03:00:00", folder="/srv//x/../b"), _path("2026-11-21 03:00:00", folder="/srv/b")
    decisions = retention.choose([retention.Archive(older), retention.Archive(newest)], {"last": 1})
    assert [(decision.path, decision.keep) for decision in decisions] == [(older, False), (newest, True)]


@pytest.mark.parametrize(
    ("verified", "stays"),
    [
        (_path("2026-11-21 03:00:00"), True),
        ("/srv//backup/./dump/vzdump-qemu-100-2026_11_21-03_00_00.vma.zst", True),
        ("vzdump-qemu-100-2026_11_21-03_00_00.vma.zst", True),
        ("/elsewhere/vzdump-qemu-100-2026_11_21-03_00_00.vma.zst", False),
        ("vzdump-qemu-101-2026_11_21-03_00_00.vma.zst", False),
        ("vzdump-qemu-100-2026_11_21-03_00_00.vma", False),
    ],
)
def test_verified_is_a_path_or_a_name(verified: str, stays: bool) -> None:
    archives = [retention.Archive(_path("2026-11-22 03:00:00")), retention.Archive(_path("2026-11-21 03:00:00"))]
    assert retention.choose(archives, {"last": 1}, verified=[verified])[1].keep is stays


def test_a_damaged_archive_takes_no_place_of_a_good_one() -> None:
    decisions = retention.choose(
        [
            retention.Archive(_path("2026-11-22 22:00:00"), error="extent_digest"),
            retention.Archive(_path("2026-11-22 10:00:00")),
            retention.Archive(_path("2026-11-21 10:00:00")),
        ],
        {"daily": 1},
        verified=[_path("2026-11-22 22:00:00"), _path("2026-11-21 10:00:00")],
    )
    assert [decision.reason for decision in decisions] == [
        "has a problem: extent_digest",
        "daily 2026-11-22",
        "last verified",
    ]


def test_an_archive_from_the_future_takes_no_place_of_a_present_one() -> None:
    archives = [
        retention.Archive(_path("2070-01-01 00:00:00")),
        retention.Archive(_path("2026-11-22 03:00:01")),
        retention.Archive(_path("2026-11-22 03:00:00")),
        retention.Archive(_path("2026-11-21 03:00:00")),
    ]
    now = datetime.datetime(2026, 11, 22, 3, 0, 0)
    assert [decision.reason for decision in retention.choose(archives, {"last": 1}, now=now)] == [
        "from the future",
        "from the future",
        "last 2026-11-22 03:00:00",
        NO_RULE,
    ]
    assert [decision.keep for decision in retention.choose(archives, {"last": 1})] == [True, False, False, False]


def test_of_two_with_the_same_time_one_counts() -> None:
    """So Proxmox VE has it; there it is by chance which one."""
    when = "2026-11-22 03:00:00"
    archives = [retention.Archive(_path(when, ending=ending)) for ending in (".vma", ".vma.zst", ".vma.gz")]
    assert [decision.keep for decision in retention.choose(archives, {"last": 5})] == [False, True, False]


def test_log_and_notes_go_with_their_archive() -> None:
    newest, older = "2026-11-22 03:00:00", "2026-11-21 03:00:00"
    folder = "/srv/a.vma/dump"
    decisions = retention.choose(
        [retention.Archive(_path(when, folder=folder)) for when in (newest, older)], {"last": 1}
    )
    assert decisions[0].beside == []
    assert decisions[1].beside == [
        _path(older, folder=folder, ending=".log"),
        _path(older, folder=folder, ending=".vma.zst.notes"),
    ]


@pytest.mark.parametrize(
    ("keep", "found"),
    [
        ({"daily": -1}, "'daily' to be a whole number of 0 or more, found -1"),
        ({"daily": 1.0}, "'daily' to be a whole number of 0 or more, found 1.0"),
        ({"daily": "7"}, "'daily' to be a whole number of 0 or more, found '7'"),
        ({"daily": True}, "'daily' to be a whole number of 0 or more, found True"),
        ({"keep-daily": 7}, "expected last, hourly, daily, weekly, monthly, yearly or all, found 'keep-daily'"),
        ({"dayly": None}, "found 'dayly'"),
        ({"all": 1}, "'all' to be true or false, found 1"),
        ({"all": True, "weekly": 4}, "'all' is true and 'weekly' is 4"),
    ],
)
def test_a_retention_that_makes_no_sense_is_refused(keep: dict[str, object], found: str) -> None:
    with pytest.raises(errors.RequestError, match=re.escape(found)):
        retention.choose([], keep)


def test_an_archive_that_is_listed_twice_is_refused() -> None:
    """Else the second would be an older one of its own bucket, and the file would go that the first one keeps."""
    path = _path("2026-11-22 03:00:00")
    with pytest.raises(errors.RequestError, match="listed twice") as caught:
        retention.choose([retention.Archive(path), retention.Archive(path.replace("/dump", "//dump"))], {"last": 1})
    assert caught.value.file == path.replace("/dump", "//dump")


@pytest.mark.parametrize(
    "text", ["2026-01-31 22:15:00", "2026-01-31T22:15:00", "20260131T221500", "2026_01_31-22_15_00"]
)
def test_local_times(text: str) -> None:
    assert retention.local_time(text) == datetime.datetime(2026, 1, 31, 22, 15, 0)


@pytest.mark.parametrize(
    "text", ["2026-01-31T22:15:00Z", "2026-01-31 22:15:00+01:00", "2026-02-30 22:15:00", "2026-01-31", "now", ""]
)
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(errors.RequestError, match=re.escape(f"found '{text}'")):
        retention.local_time(text)


# The rules once more, from the buckets' side: what is one bucket is written with the calendar's own functions.
SAME: dict[str, t.Callable[[datetime.datetime], object]] = {
    "last": lambda time: time,
    "hourly": lambda time: (time.date(), time.hour),
    "daily": lambda time: time.date(),
    "weekly": lambda time: tuple(time.isocalendar())[:2],
    "monthly": lambda time: (time.year, time.month),
    "yearly": lambda time: time.year,
}


def _model(times: t.Iterable[datetime.datetime], keep: t.Mapping[str, int]) -> set[datetime.datetime]:
    """The times that stay."""
    kept: set[datetime.datetime] = set()
    undecided = set(times)
    if not any(keep.values()):
        return undecided
    for rule, same in SAME.items():
        buckets: dict[object, list[datetime.datetime]] = {}
        for when in undecided:
            buckets.setdefault(same(when), []).append(when)
        for covered in {same(when) for when in kept}:
            buckets.pop(covered, None)
        for bucket in sorted(buckets.values(), key=max, reverse=True)[: keep.get(rule, 0)]:
            kept.add(max(bucket))
            undecided.difference_update(bucket)
    return kept


Group = dict[datetime.datetime, bool]


@st.composite
def _groups(draw: st.DrawFn) -> Group:
    """Times, close together or far apart, and whether they are protected."""
    first = draw(st.sampled_from([(2020, 12, 24), (2024, 12, 20), (2026, 3, 27), (2026, 10, 23), (2026, 11, 27)]))
    step = draw(st.sampled_from([7, 60, 600, 1440, 10080, 40000]))
    minutes = draw(st.lists(st.integers(0, 20 * step), max_size=25, unique=True))
    return {
        datetime.datetime(*first) + datetime.timedelta(minutes=minute): draw(st.sampled_from([False, False, True]))
        for minute in minutes
    }


KEEPS = st.dictionaries(st.sampled_from(list(SAME)), st.sampled_from([0, 1, 1, 2, 3, 10]))


def _archives(group: Group, vmid: int = 100) -> list[retention.Archive]:
    return [retention.Archive(_path(str(when), vmid), protected) for when, protected in group.items()]


@given(_groups(), KEEPS)
def test_the_rules_stated_otherwise_keep_the_same(group: Group, keep: dict[str, int]) -> None:
    archives = _archives(group)
    expected = {_path(str(when)) for when in _model([when for when, protected in group.items() if not protected], keep)}
    expected |= {archive.path for archive in archives if archive.protected}
    assert {decision.path for decision in retention.choose(archives, keep) if decision.keep} == expected


@given(_groups(), KEEPS, st.data())
def test_pruning_again_changes_nothing(group: Group, keep: dict[str, int], data: st.DataObject) -> None:
    archives = _archives(group)
    verified = data.draw(st.sets(st.sampled_from([archive.path for archive in archives]))) if archives else set()
    first = retention.choose(archives, keep, verified=verified)
    kept = [decision for decision in first if decision.keep]
    left = [archive for archive, decision in zip(archives, first) if decision.keep]
    assert retention.choose(left, keep, verified=verified) == kept


@given(_groups(), KEEPS, st.data())
def test_what_verified_adds(group: Group, keep: dict[str, int], data: st.DataObject) -> None:
    """At most one archive, and then one stays that verified and is not protected, wherever there was one."""
    archives = _archives(group)
    verified = data.draw(st.sets(st.sampled_from([archive.path for archive in archives]))) if archives else set()
    without = {decision.path for decision in retention.choose(archives, keep) if decision.keep}
    decisions = retention.choose(archives, keep, verified=verified)
    kept = {decision.path for decision in decisions if decision.keep}
    added = kept - without
    assert without <= kept
    assert len(added) <= 1
    assert added == {decision.path for decision in decisions if decision.reason == "last verified"}
    removable = {archive.path for archive in archives if not archive.protected}
    assert not removable & verified or max(removable & verified) in kept


@given(_groups(), _groups(), KEEPS, st.randoms(use_true_random=False))
def test_groups_and_the_order_of_the_input_have_no_part(
    one: Group, other: Group, keep: dict[str, int], shuffle: t.Any
) -> None:
    apart = [*retention.choose(_archives(one), keep), *retention.choose(_archives(other, 101), keep)]
    together = [*_archives(one), *_archives(other, 101)]
    shuffle.shuffle(together)
    assert set(retention.choose(together, keep)) == set(apart)


def test_the_example_of_the_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    rules = re.findall(r"^ +(last|hourly|daily|weekly|monthly|yearly): ([0-9]+)$", text, re.MULTILINE)
    rows = re.findall(r"^\| `(vzdump-qemu-\S+)` \| (\w*) ?\| (stays|goes) \| (.*) \|$", text, re.MULTILINE)
    assert len(rules) == 4
    assert len(rows) == 15
    decisions = retention.choose(
        [retention.Archive(os.path.join(FOLDER, row[0]), protected=row[1] == "protected") for row in rows],
        {rule: int(number) for rule, number in rules},
        verified=[row[0] for row in rows if row[1] == "verified"],
    )
    assert [(decision.keep, decision.reason) for decision in decisions] == [(row[2] == "stays", row[3]) for row in rows]
