# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The disks of a domain, as a play that must not overwrite them has to know them."""

from __future__ import annotations

import typing as t

import pytest
from ansible.errors import AnsibleFilterError

from ansible_collections.vmbackup.vma.plugins.filter import domain_disks

name: t.Callable[..., list[str]] = domain_disks.FilterModule().filters()["domain_disks"]

DEFINITION = """
<domain type='kvm'>
  <os><nvram template='/usr/share/OVMF/OVMF_VARS.fd'>/var/lib/libvirt/qemu/nvram/web_VARS.fd</nvram></os>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/>
      <source file='/srv/R&amp;D &lt;new&gt;/it&apos;s.qcow2' index='1'/>
      <backingStore type='file'><format type='qcow2'/><source file='/srv/golden.qcow2'/><backingStore/></backingStore>
      <target dev='vda' bus='virtio'/>
    </disk>
    <disk type='block' device='disk'><source dev="/dev/vg0/web"/><target dev='vdb' bus='virtio'/></disk>
    <disk type='volume' device='disk'><source pool='fast' volume='data'/><target dev='vdc' bus='virtio'/></disk>
    <disk type='file' device='cdrom'><source file='/srv/iso/debian.iso'/><target dev='sda' bus='sata'/></disk>
    <disk type='file' device='cdrom'><target dev='sdb' bus='sata'/></disk>
    <disk type='block'><source dev='/dev/sdx'/><target dev='vdd' bus='virtio'/></disk>
  </devices>
</domain>
"""
FIRST = "/srv/R&D <new>/it's.qcow2"


def test_disks() -> None:
    assert name(DEFINITION) == [FIRST, "/dev/vg0/web", "/dev/sdx"]


def test_all_that_a_domain_uses() -> None:
    assert name(DEFINITION, everything=True) == [
        FIRST,
        "/srv/golden.qcow2",
        "/dev/vg0/web",
        "data",
        "/srv/iso/debian.iso",
        "/dev/sdx",
        "/var/lib/libvirt/qemu/nvram/web_VARS.fd",
    ]


def test_uefi_variables_of_newer_libvirt() -> None:
    definition = "<domain><os><nvram type='file'><source file='/srv/web_VARS.fd'/></nvram></os></domain>"
    assert name(definition, everything=True) == ["/srv/web_VARS.fd"]


@pytest.mark.parametrize("definition", ["", "error: Domain not found", "<domain><devices>"])
def test_what_is_no_definition_is_refused(definition: str) -> None:
    """Nothing found would mean that nothing can be overwritten."""
    with pytest.raises(AnsibleFilterError, match="Give what virsh dumpxml prints"):
        name(definition, everything=True)


def test_what_is_no_text_is_refused() -> None:
    with pytest.raises(AnsibleFilterError, match="expected a text, found list"):
        name([DEFINITION])
