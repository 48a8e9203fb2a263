# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""VMIDs, names and kinds of operating system."""

from __future__ import annotations

import dataclasses
import re
import uuid

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ansible_collections.vmbackup.vma.plugins.module_utils.host.domain import Domain
from ansible_collections.vmbackup.vma.plugins.module_utils.host.guest_names import dns_name, os_type, vmid_of
from ansible_collections.vmbackup.vma.plugins.module_utils.vma.errors import RequestError
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.host.domains import make


@settings(deadline=None)
@given(st.uuids())
def test_vmids_have_nine_digits_however_the_uuid_is_written(value: uuid.UUID) -> None:
    assert 100_000_000 <= vmid_of(str(value)) <= 999_999_999
    assert vmid_of(str(value)) == vmid_of(str(value).upper()) == vmid_of(value.hex)


def test_vmids_stay_what_they_were() -> None:
    assert vmid_of("c7a5fdbd-edaf-9455-926a-d65c16db1809") == 302201504


@pytest.mark.parametrize("text", ["", "web", "100"])
def test_no_uuid_no_vmid(text: str) -> None:
    with pytest.raises(RequestError, match="a VMID is made of a UUID"):
        vmid_of(text)


@pytest.mark.parametrize(
    ("name", "valid"),
    [
        ("web", "web"),
        ("Web-1.example.com", "Web-1.example.com"),
        ("a--b", "a--b"),
        ("web_1", "web-1"),
        ("web 1 (old)", "web-1-old"),
        ("-web-", "web"),
        (".web..b.", "web.b"),
        ("Büro", "Buro"),
        ("\u65e5\u672c", ""),
        ("web\nargs: x", "web-args-x"),
        ("x" * 64, "x" * 63),
    ],
)
def test_names(name: str, valid: str) -> None:
    assert dns_name(name) == valid


@settings(deadline=None)
@given(st.text())
def test_names_are_valid_or_empty(name: str) -> None:
    valid = dns_name(name)
    label = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
    assert not valid or re.fullmatch(rf"{label}(?:\.{label})*", valid)
    assert dns_name(valid) == valid


@pytest.mark.parametrize(
    ("os_id", "hyperv", "kind"),
    [
        ("http://debian.org/debian/12", False, "l26"),
        ("http://ubuntu.com/ubuntu/24.04", False, "l26"),
        ("http://microsoft.com/win/11", True, "win11"),
        ("http://microsoft.com/win/2k22", True, "win11"),
        ("http://microsoft.com/win/10", True, "win10"),
        ("http://microsoft.com/win/2k12r2", True, "win8"),
        ("http://microsoft.com/win/7", False, "win7"),
        ("http://microsoft.com/win/xp", False, "wxp"),
        ("http://microsoft.com/win/99", True, "win10"),
        ("http://microsoft.com/win/3.1", False, "other"),
        ("http://freebsd.org/freebsd/14.0", False, "other"),
        ("http://oracle.com/solaris/11", False, "solaris"),
        (None, True, "win10"),
        (None, False, "other"),
    ],
)
def test_operating_systems(os_id: str | None, hyperv: bool, kind: str) -> None:
    assert os_type(dataclasses.replace(Domain.parse(make()), os_id=os_id, hyperv=hyperv)) == kind
