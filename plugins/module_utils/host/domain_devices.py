# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The devices of a libvirt domain that a backup or its configuration tells of, each beside its parser. No I/O."""

from __future__ import annotations

import dataclasses
import xml.etree.ElementTree as ET

from ..vma.errors import RequestError
from .domain_values import REMEDY, attribute, number, text_of


@dataclasses.dataclass(frozen=True)
class Host:
    """A server of network storage. C(port) is None where the protocol's own is meant."""

    name: str
    port: int | None = None


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a disk's bytes are.

    C(kind) is libvirt's: C(file), C(block), C(network), C(volume), or one that no other program can read.
    C(path) is there for C(file) and C(block), C(protocol) and C(name) for C(network), C(pool) and C(name) for
    C(volume).
    """

    kind: str
    path: str | None = None
    protocol: str | None = None
    name: str | None = None
    hosts: tuple[Host, ...] = ()
    user: str | None = None
    pool: str | None = None

    @property
    def location(self) -> str:
        """The source in one word: a path, C(rbd:pool/image), or C(pool/volume)."""
        if self.kind == "network":
            return f"{self.protocol}:{self.name or ''}"
        if self.kind == "volume":
            return f"{self.pool}/{self.name}"
        return self.path or self.kind


@dataclasses.dataclass(frozen=True)
class Disk:
    """A disk or drive of the guest.

    C(target) is libvirt's name for it, such as C(vda). C(device) is C(disk), C(lun), C(cdrom) or C(floppy).
    C(format) is that of the file, such as C(qcow2). C(cache) is None where the hypervisor's default is meant.
    """

    target: str
    bus: str
    device: str = "disk"
    source: Source | None = None
    format: str = "raw"
    readonly: bool = False
    shareable: bool = False
    transient: bool = False
    encrypted: bool = False
    limited: bool = False
    serial: str | None = None
    wwn: str | None = None
    boot_order: int | None = None
    cache: str | None = None
    discard: bool = False
    iothread: bool = False
    ssd: bool = False

    @property
    def has_data(self) -> bool:
        """Whether it is more than a drive for removable media, or an empty one."""
        return self.device in ("disk", "lun") and self.source is not None

    @property
    def obstacle(self) -> str | None:
        """Why the disk has nothing that a backup could hold; None for one that is backed up."""
        if self.device not in ("disk", "lun"):
            return f"it is a {self.device} drive"
        if self.source is None:
            return "it has no source"
        if self.source.kind not in ("file", "block", "network", "volume"):
            return f"its source of type {self.source.kind} can be read by its guest alone"
        return None


@dataclasses.dataclass(frozen=True)
class Nic:
    """A network interface. C(kind) is libvirt's; C(network) is a virtual network's name, C(bridge) a bridge's.

    C(tags) are VLANs; with C(trunk) the guest sees them tagged, all but C(native_tag).
    """

    kind: str
    model: str | None = None
    mac: str | None = None
    bridge: str | None = None
    network: str | None = None
    device: str | None = None
    tags: tuple[int, ...] = ()
    trunk: bool = False
    native_tag: int | None = None
    link_down: bool = False
    mtu: int | None = None
    queues: int | None = None
    boot_order: int | None = None
    limited: bool = False
    filtered: bool = False


@dataclasses.dataclass(frozen=True)
class Tpm:
    """C(version) is C(1.2) or C(2.0), C(backend) C(emulator), C(passthrough) or C(external)."""

    version: str = "2.0"
    backend: str = "emulator"
    model: str = "tpm-crb"
    encrypted: bool = False


@dataclasses.dataclass(frozen=True)
class Video:
    """A display adapter."""

    model: str
    heads: int = 1
    accelerated: bool = False


@dataclasses.dataclass(frozen=True)
class Rng:
    """A random number generator: its source on the host, and how many bytes a period of milliseconds it may take."""

    backend: str
    path: str | None = None
    max_bytes: int | None = None
    period: int | None = None


@dataclasses.dataclass(frozen=True)
class Watchdog:
    """A watchdog, and what the host does when the guest does not answer it."""

    model: str
    action: str = "reset"


def parse_disk(element: ET.Element) -> Disk:
    """The disk of a C(<disk>). Raises: RequestError where it has no target."""
    device = element.get("device", "disk")
    source = _source(element)
    target = element.find("target")
    name = "" if target is None else target.get("dev", "").strip()
    if target is None or not name:
        where = "no source" if source is None else f"source {source.location}"
        raise RequestError(f"the domain's XML has a {device} with {where} that has no target", remedy=REMEDY)
    driver = element.find("driver")
    options = {} if driver is None else driver.attrib
    boot = element.find("boot")
    return Disk(
        target=name,
        bus=target.get("bus") or _bus(name),
        device=device,
        source=source,
        format=options.get("type", "raw"),
        readonly=element.find("readonly") is not None,
        shareable=element.find("shareable") is not None,
        transient=element.find("transient") is not None,
        encrypted=element.find("encryption") is not None or element.find("source/encryption") is not None,
        limited=element.find("iotune") is not None,
        serial=text_of(element.find("serial")),
        wwn=text_of(element.find("wwn")),
        boot_order=None if boot is None else number(boot, "order"),
        cache=None if options.get("cache") == "default" else options.get("cache"),
        discard=options.get("discard") == "unmap",
        iothread="iothread" in options,
        ssd=target.get("rotation_rate") == "1",
    )


def _bus(target: str) -> str:
    """The bus that libvirt takes for a target whose bus is not told."""
    return {"hd": "ide", "sd": "scsi", "vd": "virtio", "fd": "fdc", "xv": "xen", "ub": "usb"}.get(target[:2], "ide")


def _source(disk: ET.Element) -> Source | None:
    """Where the bytes are; None for a drive without a medium."""
    element = disk.find("source")
    kind = disk.get("type", "file")
    if element is None:
        return None
    if kind in ("file", "block"):
        path = element.get("file" if kind == "file" else "dev")
        return Source(kind, path=path) if path else None
    if kind == "network":
        auth = element.find("auth")
        auth = disk.find("auth") if auth is None else auth
        hosts = tuple(
            Host(host.get("name") or host.get("socket") or "", number(host, "port"))
            for host in element.iterfind("host")
        )
        return Source(
            kind,
            protocol=element.get("protocol"),
            name=element.get("name"),
            hosts=hosts,
            user=None if auth is None else auth.get("username"),
        )
    if kind == "volume":
        return Source(kind, pool=element.get("pool"), name=element.get("volume"))
    return Source(kind, path=element.get("dir") or element.get("path"))


def parse_nic(element: ET.Element) -> Nic:
    """The network interface of an C(<interface>)."""
    source = element.find("source")
    attributes = {} if source is None else source.attrib
    vlan = element.find("vlan")
    tags = [] if vlan is None else vlan.findall("tag")
    native = [tag for tag in tags if tag.get("nativeMode")]
    mtu = element.find("mtu")
    boot = element.find("boot")
    driver = element.find("driver")
    return Nic(
        kind=element.get("type", "network"),
        model=attribute(element, "model", "type"),
        mac=attribute(element, "mac", "address"),
        bridge=attributes.get("bridge"),
        network=attributes.get("network"),
        device=attributes.get("dev"),
        tags=tuple(number(tag, "id") or 0 for tag in tags),
        trunk=vlan is not None and (vlan.get("trunk") == "yes" or len(tags) > 1),
        native_tag=number(native[0], "id") if native else None,
        link_down=attribute(element, "link", "state") == "down",
        mtu=None if mtu is None else number(mtu, "size"),
        queues=None if driver is None else number(driver, "queues"),
        boot_order=None if boot is None else number(boot, "order"),
        limited=element.find("bandwidth") is not None,
        filtered=element.find("filterref") is not None,
    )


def parse_tpm(element: ET.Element | None) -> Tpm | None:
    """The TPM of a C(<tpm>), if there is one."""
    if element is None:
        return None
    backend = element.find("backend")
    if backend is None:
        return Tpm(model=element.get("model", "tpm-crb"))
    return Tpm(
        version=backend.get("version", "2.0"),
        backend=backend.get("type", "emulator"),
        model=element.get("model", "tpm-crb"),
        encrypted=backend.find("encryption") is not None,
    )


def parse_video(model: ET.Element) -> Video:
    """The display adapter of the C(<model>) in a C(<video>)."""
    return Video(
        model.get("type", ""), number(model, "heads") or 1, attribute(model, "acceleration", "accel3d") == "yes"
    )


def parse_rng(element: ET.Element) -> Rng:
    """The random number generator of an C(<rng>)."""
    backend = element.find("backend")
    rate = element.find("rate")
    return Rng(
        "builtin" if backend is None else backend.get("model", "random"),
        text_of(backend),
        None if rate is None else number(rate, "bytes"),
        None if rate is None else number(rate, "period"),
    )


__all__ = (
    "Disk",
    "Host",
    "Nic",
    "Rng",
    "Source",
    "Tpm",
    "Video",
    "Watchdog",
    "parse_disk",
    "parse_nic",
    "parse_rng",
    "parse_tpm",
    "parse_video",
)
