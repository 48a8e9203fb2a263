# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What Ansible hands to the filter, and what it gets back. The rules themselves are tested with the codec."""

from __future__ import annotations

import datetime
import re
import typing as t

import pytest
from ansible.errors import AnsibleFilterError

from ansible_collections.vmbackup.vma.plugins.filter import prune as prune_plugin

prune: t.Callable[..., list[dict[str, t.Any]]] = prune_plugin.FilterModule().filters()["prune"]

STEM = "/srv/backup/dump/vzdump-qemu-100-2020_11_"
NEW, MIDDLE, OLD = (f"{STEM}{day}-03_00_00.vma.zst" for day in (22, 21, 20))


def _reasons(result: list[dict[str, t.Any]]) -> list[str]:
    return [item["reason"] for item in result]


def test_paths() -> None:
    assert prune([OLD, NEW], {"last": 1}) == [
        {
            "path": OLD,
            "keep": False,
            "reason": "no rule keeps it",
            "beside": [f"{STEM}20-03_00_00.log", f"{OLD}.notes"],
        },
        {"path": NEW, "keep": True, "reason": "last 2020-11-22 03:00:00", "beside": []},
    ]


def test_results_of_vma_info() -> None:
    archives = [
        {"path": NEW, "protected": True, "size": 1, "vmid": 100},
        {"path": MIDDLE, "protected": False, "error": {"kind": "extent_digest", "message": "...", "file": MIDDLE}},
        {"path": OLD, "protected": False, "verification": {"ok": True}},
        {"path": "/srv/backup/dump/web.vma", "error": {"kind": "request", "message": "...", "file": "..."}},
    ]
    assert _reasons(prune(archives, {"last": 1})) == [
        "protected",
        "has a problem: extent_digest",
        "last 2020-11-20 03:00:00",
        "not a standard name",
    ]


def test_paths_and_results_may_be_mixed_and_come_from_a_generator() -> None:
    archives: list[object] = [NEW, {"path": MIDDLE, "protected": "no"}, {"path": OLD}]
    assert [item["keep"] for item in prune((item for item in archives), {"last": 2})] == [True, True, False]


def test_verified() -> None:
    assert _reasons(prune([NEW, MIDDLE, OLD], {"last": 1}, verified=[OLD])) == [
        "last 2020-11-22 03:00:00",
        "no rule keeps it",
        "last verified",
    ]


def test_numbers_and_booleans_that_templates_made_into_text() -> None:
    assert _reasons(prune([NEW, OLD], {"last": "1", "daily": "0"})) == ["last 2020-11-22 03:00:00", "no rule keeps it"]
    assert _reasons(prune([OLD], {"all": "true", "daily": "0"})) == ["everything is kept"]
    assert _reasons(prune([OLD], {"all": "False"})) == ["everything is kept"]


def test_now() -> None:
    assert _reasons(prune([NEW, MIDDLE, OLD], {"last": 1}, now="2020-11-21 03:00:00")) == [
        "from the future",
        "last 2020-11-21 03:00:00",
        "no rule keeps it",
    ]


@pytest.mark.parametrize(("hours", "reason"), [(13, "last"), (27, "from the future")])
def test_the_present_is_that_of_the_zone_farthest_ahead(hours: int, reason: str) -> None:
    when = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(hours=hours)
    path = f"/srv/vzdump-qemu-100-{when:%Y_%m_%d-%H_%M_%S}.vma.zst"
    assert _reasons(prune([path], {"last": 1}))[0].startswith(reason)


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        ((NEW, {"last": 1}), {}, f"expected the input to be a list, found '{NEW}'"),
        (({"path": NEW}, {"last": 1}), {}, "expected the input to be a list"),
        ((None, {"last": 1}), {}, "expected the input to be a list, found None"),
        (([NEW, 7], {"last": 1}), {}, "expected paths, or archives with a 'path', found 7"),
        (([{"vmid": 100}], {"last": 1}), {}, "expected paths, or archives with a 'path', found {'vmid': 100}"),
        (([""], {"last": 1}), {}, "expected paths, or archives with a 'path', found ''"),
        (([{"path": NEW, "protected": "?"}], {"last": 1}), {}, "expected 'protected' to be true or false, found '?'"),
        (([NEW, NEW], {"last": 1}), {}, f"{NEW}: this archive is listed twice"),
        (([NEW], 7), {}, "expected keep to be a dict like {'daily': 7}, found 7"),
        (([NEW], {"daily": "-1"}), {}, "expected 'daily' to be a whole number of 0 or more, found -1"),
        (([NEW], {"daily": "many"}), {}, "expected 'daily' to be a whole number of 0 or more, found 'many'"),
        (([NEW], {"daily": ""}), {}, "expected 'daily' to be a whole number of 0 or more, found ''"),
        (([NEW], {"keep_daily": 7}), {}, "found 'keep_daily'"),
        (([NEW], {"all": "maybe"}), {}, "expected 'all' to be true or false, found 'maybe'"),
        (([NEW], {"all": "yes", "daily": "7"}), {}, "'all' is true and 'daily' is 7"),
        (([NEW], {"last": 1}), {"verified": NEW}, "expected verified to be a list"),
        (([NEW], {"last": 1}), {"now": "2020-11-21T03:00:00Z"}, "without a time zone"),
    ],
)
def test_what_is_not_of_its_kind_is_refused(
    arguments: tuple[object, ...], options: dict[str, object], said: str
) -> None:
    with pytest.raises(AnsibleFilterError, match=re.escape(said)):
        prune(*arguments, **options)
