# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The filter vmbackup.vma.boot_options: its documentation, and a call of the pure functions behind it."""

from __future__ import annotations

DOCUMENTATION = r"""
name: boot_options
short_description: Tell how vm_boot boots the VM of an archive
version_added: 0.1.0
author:
  - The vmbackup.vma contributors (@vmbackup)
description:
  - Derive the options of M(vmbackup.vma.vm_boot) from the C(qemu-server.conf) of an archive, and from where its devices
    were extracted to.
  - The disks come in the boot order of the configuration, and the firmware tries only those that it names. The present
    form of C(boot) is known, the older one with C(bootdisk), and what Proxmox VE does without either.
positional: _input, devices
options:
  _input:
    description:
      - The text of C(qemu-server.conf). It may be empty; then the names of the devices tell the drives, and all else is
        Proxmox VE's default.
    type: str
    required: true
  devices:
    description:
      - The extracted devices, as RV(vmbackup.vma.vma_extract#module:devices) has them. Each has a C(name), a C(path),
        and C(format), V(raw) by default.
    type: list
    elements: dict
    required: true
seealso:
  - module: vmbackup.vma.vm_boot
  - module: vmbackup.vma.vma_extract
  - plugin: vmbackup.vma.domain_xml
    plugin_type: filter
"""

EXAMPLES = r"""
---
- name: Restore to a scratch folder
  vmbackup.vma.vma_extract:
    src: /srv/backup/dump/vzdump-qemu-100-2026_01_31-22_15_00.vma.zst
    dest: /srv/drill/web
  register: extracted

- name: Read the configuration
  ansible.builtin.slurp:
    src: /srv/drill/web/qemu-server.conf
  register: config

- name: Boot
  vmbackup.vma.vm_boot:
    disks: "{{ guest.disks }}"
    firmware: "{{ guest.firmware }}"
    efi_vars: "{{ guest.efi_vars or omit }}"
    machine: "{{ guest.machine }}"
    memory: "{{ guest.memory }}"
    cores: "{{ guest.cores }}"
    scsi_controller: "{{ guest.scsi_controller }}"
    expect_agent: "{{ guest.agent }}"
  vars:
    guest: "{{ config.content | b64decode | vmbackup.vma.boot_options(extracted.devices) }}"
"""

RETURN = r"""
_value:
  description: The options of M(vmbackup.vma.vm_boot) by their names, and two more.
  type: dict
  contains:
    disks:
      description: The disks, as O(vmbackup.vma.vm_boot#module:disks) takes them.
      type: list
      elements: dict
      sample:
        - path: /srv/drill/web/disk-drive-scsi0.raw
          format: raw
          bus: scsi
          boot: true
    firmware:
      description: V(bios) or V(uefi).
      type: str
      sample: bios
    efi_vars:
      description: The VM's own EFI variables; V(null) without.
      type: str
      sample: /srv/drill/web/disk-drive-efidisk0.raw
    machine:
      description: The type of the machine.
      type: str
      sample: pc
    memory:
      description: The memory in MiB.
      type: int
      sample: 2048
    cores:
      description: The number of processors.
      type: int
      sample: 2
    scsi_controller:
      description: The controller of disks on the bus V(scsi).
      type: str
      sample: virtio-scsi-pci
    network_card:
      description: The first network card, or V(virtio).
      type: str
      sample: virtio
    agent:
      description: Whether the configuration says that the guest agent runs in the guest.
      type: bool
      sample: true
    notes:
      description: What the booted VM has otherwise than the configuration, a sentence each.
      type: list
      elements: str
      sample:
        - "scsi1 is not in the archive: it is left out of backups"
"""

import typing as t
from collections.abc import Mapping

from ansible.errors import AnsibleFilterError

from ansible_collections.vmbackup.vma.plugins.module_utils.vma.errors import VmaError
from ansible_collections.vmbackup.vma.plugins.plugin_utils import guest
from ansible_collections.vmbackup.vma.plugins.plugin_utils.boot_options import Image, boot_options


def make_boot_options(config: t.Any, devices: t.Any) -> dict[str, t.Any]:
    """The result of the filter. Raises: AnsibleFilterError for anything else, and for what cannot be booted."""
    if not isinstance(config, str):
        raise AnsibleFilterError(f"vmbackup.vma.boot_options: expected a text, found {type(config).__name__}")
    if not isinstance(devices, (list, tuple)) or not all(map(_is_device, devices)):
        raise AnsibleFilterError(
            "vmbackup.vma.boot_options: expected devices with a name and a path. Give what vma_extract returns."
        )
    images = {device["name"]: Image(device["path"], device.get("format", "raw")) for device in devices}
    try:
        return boot_options(guest.parse(config, images), images)
    except VmaError as error:
        raise AnsibleFilterError(f"vmbackup.vma.boot_options: {error}") from error


def _is_device(device: t.Any) -> bool:
    return isinstance(device, Mapping) and all(isinstance(device.get(key), str) for key in ("name", "path"))


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        return {"boot_options": make_boot_options}
