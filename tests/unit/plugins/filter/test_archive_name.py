# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The names that the filter builds are standard names, and what cannot be one is refused."""

from __future__ import annotations

import re
import typing as t

import pytest
from ansible.errors import AnsibleFilterError

from ansible_collections.vmbackup.vma.plugins.filter import archive_name
from ansible_collections.vmbackup.vma.plugins.module_utils.vma import vzdump

build: t.Callable[..., str] = archive_name.FilterModule().filters()["archive_name"]

STEM = "vzdump-qemu-100-2026_01_31-22_15_00"


@pytest.mark.parametrize(
    ("arguments", "options", "name"),
    [
        ((100, "2026-01-31 22:15:00"), {}, f"{STEM}.vma.zst"),
        (("100", "2026-01-31T22:15:00"), {}, f"{STEM}.vma.zst"),
        ((100, "20260131T221500", "gzip"), {}, f"{STEM}.vma.gz"),
        ((100, "2026_01_31-22_15_00", "none"), {}, f"{STEM}.vma"),
        ((100, "2026-01-31 22:15:00"), {"log": True}, f"{STEM}.log"),
        ((100, "2026-01-31 22:15:00", "none"), {"log": True}, f"{STEM}.log"),
        ((100, 1769894100), {"tz_offset": "+0100"}, f"{STEM}.vma.zst"),
        ((100, "1769894100"), {"tz_offset": "+0100"}, f"{STEM}.vma.zst"),
        ((100, 1769894100), {"tz_offset": "+0000"}, "vzdump-qemu-100-2026_01_31-21_15_00.vma.zst"),
        ((100, 1769894100), {"tz_offset": "-0330"}, "vzdump-qemu-100-2026_01_31-17_45_00.vma.zst"),
        ((100, 1769894100), {"tz_offset": "+05:45"}, "vzdump-qemu-100-2026_02_01-03_00_00.vma.zst"),
        ((100, 0), {"tz_offset": "-0100"}, "vzdump-qemu-100-1969_12_31-23_00_00.vma.zst"),
        ((999999999, "2026-01-31 22:15:00"), {}, "vzdump-qemu-999999999-2026_01_31-22_15_00.vma.zst"),
        # an hour that has no place in some time zones
        ((100, "2026-03-29 02:30:00"), {}, "vzdump-qemu-100-2026_03_29-02_30_00.vma.zst"),
    ],
)
def test_names(arguments: tuple[object, ...], options: dict[str, object], name: str) -> None:
    assert build(*arguments, **options) == name


def test_the_name_is_standard() -> None:
    parsed = vzdump.parse_name(build(4711, "2026-01-31 22:15:00", "gzip"))
    assert parsed is not None
    assert parsed.vmid == 4711


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        ((99, "2026-01-31 22:15:00"), {}, "100 to 999999999, found 99"),
        ((1000000000, "2026-01-31 22:15:00"), {}, "100 to 999999999, found 1000000000"),
        (("web", "2026-01-31 22:15:00"), {}, "100 to 999999999, found 'web'"),
        (("-100", "2026-01-31 22:15:00"), {}, "found '-100'"),
        ((100.0, "2026-01-31 22:15:00"), {}, "found 100.0"),
        ((None, "2026-01-31 22:15:00"), {}, "found None"),
        ((100, "2026-01-31 22:15:00", "lzo"), {}, "expected a compression of none, zstd, gzip, found 'lzo'"),
        ((100, "2026-01-31T22:15:00Z"), {}, "without a time zone"),
        ((100, "2026-02-30 22:15:00"), {}, "found '2026-02-30 22:15:00'"),
        ((100, None), {}, "expected a time as text or as whole seconds since the epoch, found None"),
        ((100, 1769894100), {}, "expected a tz_offset like '+0100' beside seconds since the epoch, found None"),
        ((100, 1769894100), {"tz_offset": "CET"}, "found 'CET'"),
        ((100, 1769894100), {"tz_offset": "+2400"}, "found '+2400'"),
        ((100, 10**12), {"tz_offset": "+0100"}, "up to the year 9999, found 1000000000000"),
        ((100, 10**30), {"tz_offset": "+0100"}, "up to the year 9999"),
        ((100, "2026-01-31 22:15:00"), {"tz_offset": "+0100"}, "is local time already"),
    ],
)
def test_what_cannot_be_a_name_is_refused(arguments: tuple[object, ...], options: dict[str, object], said: str) -> None:
    with pytest.raises(AnsibleFilterError, match=re.escape(said)):
        build(*arguments, **options)
