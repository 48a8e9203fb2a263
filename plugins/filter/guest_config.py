# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The filter vmbackup.vma.guest_config: its documentation, and a call of the pure function behind it."""

from __future__ import annotations

DOCUMENTATION = r"""
name: guest_config
short_description: Make a qemu-server.conf of a libvirt domain
version_added: 0.1.0
author:
  - The vmbackup.vma contributors (@vmbackup)
description:
  - Make the configuration that Proxmox VE's C(qmrestore) reads in an archive, from what C(virsh dumpxml) prints.
  - Whatever the restored VM has otherwise than the domain, or not at all, is said in RV(_value.unmapped).
  - Nothing is read but the filter's input, so it works for domains of any host.
positional: _input
options:
  _input:
    description:
      - A domain's XML, as C(virsh dumpxml --inactive) prints it. Of a running domain without C(--inactive), the CPU
        shows as what it became on its host.
    type: str
    required: true
  vmid:
    description:
      - The VMID, between V(100) and V(999999999). By default one is made of the domain's UUID, as
        P(vmbackup.vma.vmid#filter) does it.
    type: int
  disk_sizes:
    description:
      - The sizes of disks in bytes, by their targets, such as V(vda). Under V(nvram) stands the size of the
        UEFI variables. Proxmox VE shows sizes and does without.
    type: dict
    default: {}
  exclude:
    description:
      - Disks that are not in the archive, each by its target such as V(vdb) or its drive such as V(virtio1). The UEFI
        variables are V(efidisk0).
      - Other disks keep their drives.
    type: list
    elements: str
    default: []
  storage:
    description:
      - The storage of Proxmox VE that disks are restored to, unless C(qmrestore) is told another one.
    type: str
    default: local-lvm
  bridge:
    description:
      - Proxmox VE's bridge for network interfaces that have none in the domain.
    type: str
    default: vmbr0
  bridges:
    description:
      - Proxmox VE's bridges for the networks, bridges and devices that the domain names. A bridge that is not among
        them keeps its name.
    type: dict
    default: {}
  notes:
    description:
      - Text for the VM's notes, below the domain's title and description.
    type: str
    default: ""
  onboot:
    description:
      - Whether the restored VM starts with its host. The XML does not tell whether the domain does.
    type: bool
    default: false
  tpm_state:
    description:
      - Whether the archive holds the TPM's state as Proxmox VE keeps it, 4 MiB in the device V(drive-tpmstate0-backup).
    type: bool
    default: false
seealso:
  - module: vmbackup.vma.vma_create
  - plugin: vmbackup.vma.vmid
    plugin_type: filter
"""

EXAMPLES = r"""
---
- name: Read the definition of a domain
  ansible.builtin.command: virsh dumpxml --inactive web
  register: domain
  changed_when: false

- name: Back up its disk
  vmbackup.vma.vma_create:
    dest: /srv/backup/vzdump-qemu-120-2026_01_31-22_15_00.vma.zst
    devices:
      - name: "{{ guest.devices.virtio0.name }}"
        path: /dev/vg0/web-snapshot
    configs:
      - name: qemu-server.conf
        content: "{{ guest.config }}"
  vars:
    guest: "{{ domain.stdout | vmbackup.vma.guest_config(vmid=120, bridges={'default': 'vmbr1'}) }}"
"""

RETURN = r"""
_value:
  description: The configuration, and what belongs to it.
  type: dict
  contains:
    config:
      description: The text of C(qemu-server.conf).
      type: str
      sample: |
        boot: order=virtio0
        cores: 1
        virtio0: local-lvm:vm-120-disk-0,size=8G
        #qmdump#map:virtio0:drive-virtio0:local-lvm:raw:
    devices:
      description:
        - The devices that the archive must hold, by drive. C(qmrestore) refuses an archive that lacks one of them, or
          has one more.
        - Each has C(name), the device's name in the archive; C(disk), the domain's target, or V(nvram) or V(tpm); and
          C(size) in bytes, null where it was not given.
      type: dict
      sample:
        virtio0:
          disk: vda
          name: drive-virtio0
          size: 8589934592
    unmapped:
      description: What the restored VM has otherwise than the domain, or not at all; a sentence each.
      type: list
      elements: str
      sample:
        - "net0 is on bridge vmbr0: it was on network default, which is no bridge"
        - "disk vdb (virtio1) was excluded and is not in the archive"
"""

import dataclasses
import typing as t
from collections.abc import Mapping

from ansible.errors import AnsibleFilterError

from ansible_collections.vmbackup.vma.plugins.module_utils.host import guest_config
from ansible_collections.vmbackup.vma.plugins.module_utils.host.domain import Domain
from ansible_collections.vmbackup.vma.plugins.module_utils.vma.errors import VmaError

_TYPES: dict[str, tuple[t.Any, ...]] = {
    "disk_sizes": (Mapping,),
    "exclude": (list, tuple),
    "storage": (str,),
    "bridge": (str,),
    "bridges": (Mapping,),
    "notes": (str,),
    "onboot": (bool,),
    "tpm_state": (bool,),
}


def make_guest_config(xml: t.Any, vmid: t.Any = None, **options: t.Any) -> dict[str, t.Any]:
    """The result of the filter for a domain's XML and the options of the documentation.

    Raises: AnsibleFilterError for anything else, and for what cannot be done.
    """
    _check("the domain's XML", xml, (str,))
    _check("vmid", vmid, (int, type(None)))
    for name, value in options.items():
        if name not in _TYPES:
            raise AnsibleFilterError(f"vmbackup.vma.guest_config has no option {name}: it has {', '.join(_TYPES)}")
        _check(name, value, _TYPES[name])
    for target, size in options.get("disk_sizes", {}).items():
        _check(f"the size of {target}", size, (int,))
    try:
        result = guest_config.guest_config(Domain.parse(xml), vmid, guest_config.Options(**options))
    except VmaError as error:
        raise AnsibleFilterError(f"vmbackup.vma.guest_config: {error}") from error
    return {
        "config": result.text,
        "devices": {drive: dataclasses.asdict(device) for drive, device in result.devices.items()},
        "unmapped": list(result.unmapped),
    }


def _check(name: str, value: t.Any, types: tuple[t.Any, ...]) -> None:
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise AnsibleFilterError(f"vmbackup.vma.guest_config: {name} cannot be of type {type(value).__name__}")


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        return {"guest_config": make_guest_config}
