# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The filter vmbackup.vma.domain_xml: its documentation, and a call of the pure functions behind it."""

from __future__ import annotations

DOCUMENTATION = r"""
name: domain_xml
short_description: Make a libvirt domain of a qemu-server.conf
version_added: 0.1.0
author:
  - The vmbackup.vma contributors (@vmbackup)
description:
  - Make the XML that C(virsh define) reads, from the C(qemu-server.conf) of an archive and from where its devices were
    restored to.
  - Whatever the domain has otherwise than the VM, or not at all, is said in RV(_value.unmapped).
positional: _input, devices
options:
  _input:
    description:
      - The text of C(qemu-server.conf).
    type: str
    required: true
  devices:
    description:
      - Where the devices of the archive are, as RV(vmbackup.vma.vma_extract#module:devices) has them. Each has a
        C(name), a C(path), and C(format), V(raw) by default. A path below C(/dev) is a block device.
    type: list
    elements: dict
    required: true
  name:
    description:
      - The name of the domain. By default that of the configuration.
    type: str
  networks:
    description:
      - Networks of libvirt for the bridges of the configuration. A bridge that is not among them is taken for a bridge
        of the host.
    type: dict
    default: {}
  keep_identity:
    description:
      - Whether the domain has the VM's UUID and MAC addresses. With V(false) libvirt makes new ones, for a copy beside
        the original.
    type: bool
    default: true
  hypervisor:
    description:
      - V(kvm), or V(qemu), an emulation for hosts without KVM.
    type: str
    choices: [kvm, qemu]
    default: kvm
seealso:
  - module: vmbackup.vma.vma_extract
  - plugin: vmbackup.vma.guest_config
    plugin_type: filter
"""

EXAMPLES = r"""
---
- name: Restore a disk onto a logical volume
  vmbackup.vma.vma_extract:
    src: /srv/backup/dump/vzdump-qemu-100-2026_01_31-22_15_00.vma.zst
    dest: /srv/restore/web
    devices:
      - name: drive-scsi0
        path: /dev/vg0/web
  register: extracted

- name: Read the configuration
  ansible.builtin.slurp:
    src: /srv/restore/web/qemu-server.conf
  register: config

- name: Write the definition
  ansible.builtin.copy:
    content: "{{ domain.xml }}"
    dest: /srv/restore/web/domain.xml
    mode: "0600"
  vars:
    domain: >-
      {{ config.content | b64decode | vmbackup.vma.domain_xml(extracted.devices, networks={'vmbr0': 'default'}) }}

- name: Define the domain
  ansible.builtin.command:
    cmd: virsh define --validate /srv/restore/web/domain.xml
  changed_when: true
"""

RETURN = r"""
_value:
  description: The definition, and what belongs to it.
  type: dict
  contains:
    xml:
      description: The domain's XML.
      type: str
      sample: |
        <domain type="kvm">
          <name>web</name>
        </domain>
    name:
      description: The name of the domain.
      type: str
      sample: web
    uuid:
      description: The UUID of the domain; V(null) where libvirt makes one.
      type: str
      sample: 6f1c2f0e-0000-4000-8000-000000000001
    unmapped:
      description: What the domain has otherwise than the VM, or not at all; a sentence each.
      type: list
      elements: str
      sample:
        - "net0 is not in VLAN 20: connect it to a bridge that is"
"""

import dataclasses
import typing as t
from collections.abc import Mapping

from ansible.errors import AnsibleFilterError

from ansible_collections.vmbackup.vma.plugins.module_utils.vma.errors import VmaError
from ansible_collections.vmbackup.vma.plugins.plugin_utils import guest
from ansible_collections.vmbackup.vma.plugins.plugin_utils.domain_xml import Options, Target, domain_xml

_TYPES: dict[str, tuple[t.Any, ...]] = {
    "name": (str, type(None)),
    "networks": (Mapping,),
    "keep_identity": (bool,),
    "hypervisor": (str,),
}


def make_domain_xml(config: t.Any, devices: t.Any, **options: t.Any) -> dict[str, t.Any]:
    """The result of the filter. Raises: AnsibleFilterError for anything else, and for what cannot be defined."""
    if not isinstance(config, str):
        raise AnsibleFilterError(f"vmbackup.vma.domain_xml: expected a text, found {type(config).__name__}")
    if not isinstance(devices, (list, tuple)) or not all(map(_is_device, devices)):
        raise AnsibleFilterError(
            "vmbackup.vma.domain_xml: expected devices with a name and a path. Give what vma_extract returns."
        )
    for name, value in options.items():
        if name not in _TYPES:
            raise AnsibleFilterError(f"vmbackup.vma.domain_xml has no option {name}: it has {', '.join(_TYPES)}")
        if not isinstance(value, _TYPES[name]):
            raise AnsibleFilterError(f"vmbackup.vma.domain_xml: {name} cannot be of type {type(value).__name__}")
    if options.get("hypervisor", "kvm") not in ("kvm", "qemu"):
        raise AnsibleFilterError(f"vmbackup.vma.domain_xml: hypervisor is kvm or qemu, not {options['hypervisor']}")
    targets = {device["name"]: Target(device["path"], device.get("format", "raw")) for device in devices}
    try:
        return dataclasses.asdict(domain_xml(guest.parse(config, targets), targets, Options(**options)))
    except VmaError as error:
        raise AnsibleFilterError(f"vmbackup.vma.domain_xml: {error}") from error


def _is_device(device: t.Any) -> bool:
    return isinstance(device, Mapping) and all(isinstance(device.get(key), str) for key in ("name", "path"))


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        return {"domain_xml": make_domain_xml}
