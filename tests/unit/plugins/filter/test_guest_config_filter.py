# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What Ansible hands to the filters, and what it gets back. The configuration itself is tested beside its function."""

from __future__ import annotations

import typing as t

import pytest
from ansible.errors import AnsibleFilterError

from ansible_collections.vmbackup.vma.plugins.filter import guest_config as guest_config_plugin
from ansible_collections.vmbackup.vma.plugins.filter import vmid as vmid_plugin

guest_config: t.Callable[..., dict[str, t.Any]] = guest_config_plugin.FilterModule().filters()["guest_config"]
vmid: t.Callable[..., int] = vmid_plugin.FilterModule().filters()["vmid"]

XML = (
    "<domain type='kvm'><name>web</name><uuid>c7a5fdbd-edaf-9455-926a-d65c16db1809</uuid>"
    "<memory unit='GiB'>1</memory><os><type>hvm</type></os><devices>"
    "<disk type='block'><source dev='/dev/vg0/web'/><target dev='vda' bus='virtio'/></disk>"
    "<disk type='block'><source dev='/dev/vg0/swap'/><target dev='vdb' bus='virtio'/></disk>"
    "<interface type='network'><source network='default'/></interface></devices></domain>"
)


def test_configuration() -> None:
    result = guest_config(
        XML, 120, disk_sizes={"vda": 8 << 30}, exclude=["vdb"], storage="zfs", bridges={"default": "vmbr1"}, onboot=True
    )
    lines = result["config"].splitlines()
    assert {
        "onboot: 1",
        "net0: rtl8139,bridge=vmbr1",
        "virtio0: zfs:vm-120-disk-0,size=8G",
        "#qmdump#map:virtio0:drive-virtio0:zfs:raw:",
    } < set(lines)
    assert result["devices"] == {"virtio0": {"name": "drive-virtio0", "disk": "vda", "size": 8 << 30}}
    assert "disk vdb (virtio1) was excluded and is not in the archive" in result["unmapped"]


def test_the_vmid_is_that_of_the_uuid() -> None:
    number = vmid(" c7a5fdbd-edaf-9455-926a-d65c16db1809\n")
    assert number == 302201504
    assert f"local-lvm:vm-{number}-disk-0" in guest_config(XML)["config"]


@pytest.mark.parametrize(
    ("xml", "options", "message"),
    [
        (None, {}, "the domain's XML cannot be of type NoneType"),
        ("<network/>", {}, "expected <domain>, found <network>"),
        (XML, {"vmid": "120"}, "vmid cannot be of type str"),
        (XML, {"vmid": True}, "vmid cannot be of type bool"),
        (XML, {"vmid": 99}, "the VMID is 99"),
        (XML, {"exclude": "vdb"}, "exclude cannot be of type str"),
        (XML, {"exclude": ["sdz"]}, "domain web has no disk sdz to exclude"),
        (XML, {"onboot": 1}, "onboot cannot be of type int"),
        (XML, {"disk_sizes": {"vda": "8G"}}, "the size of vda cannot be of type str"),
        (XML, {"args": "-device x"}, "has no option args: it has disk_sizes, exclude, "),
    ],
)
def test_what_the_filter_does_not_take(xml: t.Any, options: dict[str, t.Any], message: str) -> None:
    with pytest.raises(AnsibleFilterError) as caught:
        guest_config(xml, **options)
    assert message in str(caught.value)


@pytest.mark.parametrize(("value", "message"), [(7, "takes a UUID, not int"), ("web", "'web' is none")])
def test_what_is_no_uuid(value: t.Any, message: str) -> None:
    with pytest.raises(AnsibleFilterError, match=message):
        vmid(value)
