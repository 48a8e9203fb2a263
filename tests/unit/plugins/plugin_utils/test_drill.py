# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Which archives are drilled, and how the results look as a JUnit document."""

from __future__ import annotations

import typing as t
import xml.etree.ElementTree as ET

import pytest
from ansible.errors import AnsibleFilterError

from ansible_collections.vmbackup.vma.plugins.filter import boot_options as boot_options_plugin
from ansible_collections.vmbackup.vma.plugins.filter import domain_xml as domain_xml_plugin
from ansible_collections.vmbackup.vma.plugins.filter import junit as junit_plugin
from ansible_collections.vmbackup.vma.plugins.filter import newest as newest_plugin

newest: t.Callable[..., list[t.Any]] = newest_plugin.FilterModule().filters()["newest"]
junit: t.Callable[..., str] = junit_plugin.FilterModule().filters()["junit"]
boot_options: t.Callable[..., dict[str, t.Any]] = boot_options_plugin.FilterModule().filters()["boot_options"]
domain_xml: t.Callable[..., dict[str, t.Any]] = domain_xml_plugin.FilterModule().filters()["domain_xml"]


def test_the_newest_of_each_vm_in_each_folder() -> None:
    archives = [
        "/a/vzdump-qemu-100-2026_11_22-03_00_00.vma.zst",
        "/a/vzdump-qemu-100-2026_11_21-23_00_00.vma.zst",
        "/a/vzdump-qemu-100-2026_11_22-03_00_01.vma",
        "/a/vzdump-qemu-1000-2026_01_01-00_00_00.vma.gz",
        "/b/vzdump-qemu-100-2020_01_01-00_00_00.vma.zst",
        "/b/web.vma",
        "/b/old-web.vma",
    ]
    expected = [archives[6], archives[2], archives[3], archives[4], archives[5]]
    assert sorted(newest(archives)) == sorted(expected)
    # What vma_info returns stays as it is, also of what cannot be read
    found = [{"path": path, "error": {"kind": "not_vma"}} for path in archives]
    assert [archive["path"] for archive in newest(found)] == newest(archives)
    assert all("error" in archive for archive in newest(reversed(found)))


@pytest.mark.parametrize("value", ["/a/x.vma", {"path": "/a/x.vma"}, [{"name": "x"}], [""], 7])
def test_what_is_no_list_of_archives(value: t.Any) -> None:
    with pytest.raises(AnsibleFilterError, match="expected"):
        newest(value)


RESULTS: list[dict[str, t.Any]] = [
    {"archive": "/a/one.vma", "vm": "web", "result": "ok", "seconds_to_verified": 2.5, "seconds_to_life": 14.25},
    {
        "archive": "/a/two.vma",
        "vm": None,
        "vmid": 101,
        "result": "failed",
        "kind": "kernel_panic",
        "reason": 'it panicked: "<&>"',
        "console": "\x1b[31m[ 1.2] Kernel panic\x00",
    },
    {"archive": "/a/three.vma", "vm": "db", "result": "failed", "kind": "space", "reason": "no room"},
    {"archive": "", "vm": "gone", "result": "failed", "kind": "no_archive", "reason": "it has no archive"},
    {"archive": "/a/four.vma", "vm": "later", "result": "planned", "reason": ""},
]


def test_a_document_tells_failures_of_backups_from_errors_of_hosts() -> None:
    root = ET.fromstring(junit(RESULTS, suite="nightly <drill>"))
    suite = root[0]
    assert suite.attrib == {
        "name": "nightly <drill>",
        "tests": "5",
        "failures": "2",
        "errors": "1",
        "skipped": "1",
        "time": "14.250",
    }
    assert [[child.tag for child in test] for test in suite] == [
        [],
        ["failure", "system-out"],
        ["error"],
        ["failure"],
        ["skipped"],
    ]
    assert [test.get("name") for test in suite] == [
        "web one.vma",
        "101 two.vma",
        "db three.vma",
        "gone",
        "later four.vma",
    ]
    assert suite[0].get("time") == "14.250"
    failure = suite[1][0]
    assert (failure.get("type"), failure.get("message")) == ("kernel_panic", 'it panicked: "<&>"')
    assert suite[1][1].text == "\ufffd[31m[ 1.2] Kernel panic\ufffd"


def test_no_results_are_no_tests() -> None:
    assert ET.fromstring(junit([])).get("tests") == "0"


@pytest.mark.parametrize("results", [None, "x", {"result": "ok"}, ["x"]])
def test_what_is_no_list_of_results(results: t.Any) -> None:
    with pytest.raises(AnsibleFilterError, match="expected a list of results"):
        junit(results)


def test_filters_take_what_vma_extract_returns() -> None:
    devices = [{"name": "drive-virtio0", "path": "/dev/vg0/web", "format": "raw", "size": 512, "changed": True}]
    assert boot_options("memory: 1024", devices)["disks"] == [
        {"path": "/dev/vg0/web", "format": "raw", "bus": "virtio", "boot": True}
    ]
    result = domain_xml("name: web", devices, name="copy", networks={"vmbr0": "default"}, keep_identity=False)
    assert result["name"] == "copy"
    assert 'dev="/dev/vg0/web"' in result["xml"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: boot_options(None, []), "expected a text, found NoneType"),
        (lambda: boot_options("", [{"name": "x"}]), "expected devices with a name and a path"),
        (lambda: boot_options("", []), "the archive holds no disk"),
        (lambda: domain_xml("name: a", "x"), "expected devices with a name and a path"),
        (lambda: domain_xml("name: a", [], keep_identity="no"), "keep_identity cannot be of type str"),
        (lambda: domain_xml("name: a", [], hypervisor="xen"), "hypervisor is kvm or qemu"),
        (lambda: domain_xml("name: a", [], uuid="x"), "has no option uuid: it has name, networks"),
        (lambda: domain_xml("", []), "the configuration has no name"),
    ],
)
def test_what_the_filters_do_not_take(call: t.Callable[[], object], message: str) -> None:
    with pytest.raises(AnsibleFilterError, match=message):
        call()
