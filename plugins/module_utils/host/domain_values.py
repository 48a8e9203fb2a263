# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Values in the XML of a domain: found, or refused with words that say what is wrong. No I/O."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from ..vma.errors import RequestError

REMEDY = "Give what `virsh dumpxml` prints for the domain, whole and unchanged."
_MAX_DIGITS = 20


def required(value: str | None, what: str) -> str:
    """The value without white space around it. Raises: RequestError where nothing is left."""
    text = (value or "").strip()
    if not text:
        raise RequestError(f"the domain's XML has no {what}", remedy=REMEDY)
    return text


def integer(value: str, what: str) -> int:
    """The number, 0 or above. Raises: RequestError where the value is none."""
    if not (value.isascii() and value.isdigit() and len(value) <= _MAX_DIGITS):
        raise RequestError(f"the domain's XML has a {what} that is no number: {value!r}", remedy=REMEDY)
    return int(value)


def number(element: ET.Element, name: str) -> int | None:
    """The number in an element's attribute, None where there is no such attribute. Raises: RequestError."""
    value = element.get(name)
    return None if value is None else integer(value.strip(), f"{element.tag} {name}")


def text_of(element: ET.Element | None) -> str | None:
    """The element's text without white space around it, None where there is none."""
    return None if element is None else (element.text or "").strip() or None


def attribute(element: ET.Element, path: str, name: str) -> str | None:
    """The attribute of the first element at the path, None where there is none."""
    found = element.find(path)
    return None if found is None else found.get(name)


__all__ = ("REMEDY", "attribute", "integer", "number", "required", "text_of")
