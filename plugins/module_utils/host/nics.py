# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a domain's network interface becomes on Proxmox VE. No I/O."""

from __future__ import annotations

import re
import typing as t

from ..vma.errors import RequestError
from .domain import Nic
from .drives import Say

_BRIDGE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{1,14}")
_MAC = re.compile(r"[0-9A-Fa-f][02468ACEace](?::[0-9A-Fa-f]{2}){5}")
_VLANS = range(1, 4095)
_MAX_MTU = 65520
_MAX_QUEUES = 64

_MODELS = (
    "e1000 e1000-82540em e1000-82544gc e1000-82545em e1000e i82551 i82557b i82559er ne2k_isa ne2k_pci pcnet rtl8139 "
    "virtio vmxnet3"
)
_ALIASES = {"virtio-transitional": "virtio", "virtio-non-transitional": "virtio"}
_DEFAULT_MODEL = "rtl8139"
"""What libvirt takes where no model is told."""


class Bridges:
    """Which bridge of Proxmox VE each interface is on.

    C(names) has it for the domain's networks, bridges and devices; C(default) is for those that have none.
    """

    def __init__(self, names: t.Mapping[str, str], default: str) -> None:
        for bridge in (default, *names.values()):
            if not _BRIDGE.fullmatch(bridge):
                raise RequestError(
                    f"{bridge!r} is no name of a bridge",
                    remedy="Give 2 to 15 letters, digits, dots, dashes and underscores.",
                )
        self._names = names
        self._default = default

    def of(self, key: str, nic: Nic, say: Say) -> str | None:
        """The bridge of an interface; None for one that its hypervisor connects by itself."""
        if nic.kind == "user":
            return None
        for name in (nic.network, nic.bridge, nic.device):
            if name is not None and name in self._names:
                return self._names[name]
        # A network's bridge is one of the host's own making where libvirt routes or translates addresses
        is_private = nic.kind == "network" and (nic.bridge or "virbr").startswith("virbr")
        if nic.bridge is not None and not is_private and _BRIDGE.fullmatch(nic.bridge):
            return nic.bridge
        origin = nic.network or nic.bridge or nic.device or ""
        say(f"{key} is on bridge {self._default}: it was on {nic.kind} {origin}".rstrip() + ", which is no bridge")
        return self._default


def setting(key: str, nic: Nic, bridges: Bridges, say: Say) -> str:
    """The setting of an interface; C(key) is its name there, such as C(net0)."""
    model = _model(key, nic, say)
    has_mac = nic.mac is not None and _MAC.fullmatch(nic.mac)
    if nic.mac is not None and not has_mac:
        say(f"{key} gets another MAC address: {nic.mac} is none that Proxmox VE takes")
    bridge = bridges.of(key, nic, say)
    is_virtio = model == "virtio"
    options = {
        "bridge": bridge,
        "link_down": 1 if nic.link_down else None,
        "mtu": nic.mtu if nic.mtu and is_virtio and nic.mtu <= _MAX_MTU else None,
        "queues": nic.queues if nic.queues and is_virtio and nic.queues <= _MAX_QUEUES else None,
        **_vlans(key, nic, say),
    }
    if nic.limited or nic.filtered:
        say(f"{key} has neither the bandwidth limits nor the filters that the domain has")
    parts = [f"{model}={nic.mac.upper()}" if nic.mac and has_mac else model]
    return ",".join([*parts, *(f"{name}={value}" for name, value in options.items() if value is not None)])


def _model(key: str, nic: Nic, say: Say) -> str:
    wanted = nic.model or _DEFAULT_MODEL
    model = _ALIASES.get(wanted, wanted)
    if model in _MODELS.split():
        return model
    say(f"{key} has the model e1000: Proxmox VE has no {wanted}")
    return "e1000"


def _vlans(key: str, nic: Nic, say: Say) -> dict[str, object]:
    tags = [tag for tag in nic.tags if tag in _VLANS]
    if len(tags) != len(nic.tags):
        say(f"{key} has VLANs that Proxmox VE does not take")
    if not nic.trunk:
        return {"tag": tags[0] if tags else None}
    trunks = ";".join(str(tag) for tag in tags if tag != nic.native_tag)
    return {"tag": nic.native_tag if nic.native_tag in tags else None, "trunks": trunks or None}


__all__ = ("Bridges", "setting")
