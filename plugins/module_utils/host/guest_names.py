# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What Proxmox VE calls a guest: its VMID, its name, its kind of operating system, its description. No I/O."""

from __future__ import annotations

import hashlib
import re
import unicodedata
import urllib.parse
import uuid as uuids

from ..vma.errors import RequestError
from .domain import Domain

_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_DNS_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_COMMENT_SAFE = "".join(map(chr, range(0x20, 0x7F))).translate({ord(character): None for character in "%:#"})

_WINDOWS = {
    "11": "win11",
    "2k25": "win11",
    "2k22": "win11",
    "10": "win10",
    "2k19": "win10",
    "2k16": "win10",
    "8.1": "win8",
    "8": "win8",
    "2k12r2": "win8",
    "2k12": "win8",
    "7": "win7",
    "2k8r2": "win7",
    "2k8": "w2k8",
    "vista": "wvista",
    "2k3r2": "w2k3",
    "2k3": "w2k3",
    "xp": "wxp",
    "2k": "w2k",
}
_SOLARIS = ("oracle.com/solaris", "sun.com/", "illumos", "omnios", "openindiana", "smartos")
_NEITHER = ("apple.com", "dragonflybsd", "freebsd", "freedos", "haiku", "netbsd", "novell.com/netware", "openbsd")


def vmid_of(uuid: str) -> int:
    """The VMID of a domain that was given none: always the same for a UUID, in the range 100000000 to 999999999.

    VMIDs that people give are shorter, so they do not meet.

    Raises: RequestError where the UUID is none.
    """
    try:
        data = uuids.UUID(uuid).bytes
    except ValueError as error:
        raise RequestError(f"a VMID is made of a UUID, and {uuid!r} is none") from error
    return 100_000_000 + int.from_bytes(hashlib.sha256(data).digest(), "big") % 900_000_000


def comment(line: str) -> str:
    """A line of the description as Proxmox VE encodes it; C(#) too, so that no line reads as one of its own marks."""
    return urllib.parse.quote(line.encode("utf-8", "replace"), safe=_COMMENT_SAFE)


def dns_name(name: str) -> str:
    """The name with all changed that DNS does not take; empty where nothing is left."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    labels = (re.sub(r"[^A-Za-z0-9]+", "-", label).strip("-")[:63].rstrip("-") for label in plain.split("."))
    if _DNS_NAME.fullmatch(name):
        return name
    return ".".join(filter(None, labels))


def os_type(domain: Domain) -> str:
    """Proxmox VE's C(ostype): told by libosinfo's id, else by what a guest is offered."""
    os_id = (domain.os_id or "").lower()
    if not os_id:
        return "win10" if domain.hyperv else "other"
    if "microsoft.com/" in os_id:
        return _WINDOWS.get(os_id.rstrip("/").rsplit("/", 1)[1], "win10" if domain.hyperv else "other")
    if any(word in os_id for word in _SOLARIS):
        return "solaris"
    return "other" if any(word in os_id for word in _NEITHER) else "l26"


__all__ = ("comment", "dns_name", "os_type", "vmid_of")
