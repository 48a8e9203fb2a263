# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The results of a drill as a JUnit document, the XML that CI systems show as tests. Pure: no I/O, no clock."""

from __future__ import annotations

import re
import typing as t
import xml.etree.ElementTree as ET

OF_THE_HOST = frozenset(("busy", "interrupted", "qemu_failed", "request", "scratch_full", "space", "target", "tool"))
"""Kinds that say something of the host, or of what was asked for, and nothing of the backup: errors, not failures."""
_NOT_IN_XML = re.compile("[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(results: t.Sequence[t.Mapping[str, t.Any]], suite: str) -> str:
    """The document, with a test for each result; see the role restore_drill for what a result has."""
    tests = [_test(result, suite) for result in results]
    counts = {
        "tests": str(len(tests)),
        "failures": str(sum(test.find("failure") is not None for test in tests)),
        "errors": str(sum(test.find("error") is not None for test in tests)),
        "skipped": str(sum(test.find("skipped") is not None for test in tests)),
        "time": f"{sum(float(test.get('time', '0')) for test in tests):.3f}",
    }
    root = ET.Element("testsuites", counts)
    ET.SubElement(root, "testsuite", {"name": _clean(suite), **counts}).extend(tests)
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _test(result: t.Mapping[str, t.Any], suite: str) -> ET.Element:
    archive = str(result.get("archive") or "")
    vm = str(result.get("vm") or result.get("vmid") or "unknown")
    seconds = next((result[key] for key in ("seconds_to_life", "seconds_to_verified") if result.get(key)), 0)
    names = [vm, archive.rsplit("/", 1)[-1]]
    test = ET.Element("testcase", classname=_clean(suite), name=_clean(" ".join(name for name in names if name)))
    test.set("time", f"{float(seconds):.3f}")
    reason = _clean(str(result.get("reason") or ""))
    kind = str(result.get("kind") or "unknown")
    if result.get("result") == "failed":
        tag = "error" if kind in OF_THE_HOST else "failure"
        ET.SubElement(test, tag, type=_clean(kind), message=reason).text = _clean(f"{reason}\n{archive}")
    elif result.get("result") != "ok":
        ET.SubElement(test, "skipped", message=reason)
    if result.get("console"):
        ET.SubElement(test, "system-out").text = _clean(str(result["console"]))
    return test


def _clean(text: str) -> str:
    """The text without what XML cannot hold at all, such as the control characters of a console."""
    return _NOT_IN_XML.sub("\ufffd", text)


__all__ = ("OF_THE_HOST", "junit")
