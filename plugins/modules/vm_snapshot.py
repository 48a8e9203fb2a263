#!/usr/bin/python

# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: vm_snapshot
short_description: Freeze the disks of a VM at one instant, to be read by a backup
version_added: 0.1.0
author:
  - The vmbackup.vma contributors (@vmbackup)
description:
  - Freeze the disks of a VM at one instant, tell where to read them, and let go of them afterwards.
  - The VM goes on meanwhile. All disks are frozen at one instant, or the task fails.
  - A small process on the host keeps the snapshot until O(state=absent). By itself it lets go of a snapshot that is in
    trouble, such as one whose scratch file system fills up, before the guest is harmed; of one that nobody reads any
    more, because the control node died; and of one whose making was interrupted.
  - Whatever a killed run or a reboot has left of a VM, the next run for that VM clears first. It knows its own by a
    journal in C(/var/lib/vmbackup-vma), and touches nothing else.
  - Usually P(vmbackup.vma.vm_backup#role) runs this module.
requirements:
  - virsh (package C(libvirt-clients)), for domains of libvirt
  - qemu-storage-daemon and FUSE (package C(qemu-system-common), or C(qemu-img) on Fedora), for the backup jobs of
    libvirt, and for Ceph
  - the tools of the storage, for the other providers
extends_documentation_fragment:
  - vmbackup.vma._attributes
  - vmbackup.vma._attributes.actiongroup_vma
attributes:
  check_mode:
    support: full
    details:
      - Returns what would be done, with the sizes of the disks, and touches nothing.
  diff_mode:
    support: none
    details:
      - A snapshot is not a text.
  idempotent:
    support: partial
    details:
      - O(state=absent) is. O(state=present) takes another snapshot, or fails while another run holds one.
options:
  name:
    description:
      - The VM. For libvirt this is the name of the domain.
    type: str
    required: true
  state:
    description:
      - V(present) freezes the disks, after clearing what a killed run has left of this VM.
      - V(absent) lets go of them, and clears what a killed run has left.
    type: str
    choices: [present, absent]
    default: present
  id:
    description:
      - With O(state=absent), let go only of the snapshot with this RV(id), not of one that another run has taken since.
    type: str
  provider:
    description:
      - Who freezes the disks.
      - V(libvirt) takes the disks of a domain as libvirt knows them. Of one that runs, it starts a backup job, or where
        libvirt has none, as on Debian 11, it puts overlays on the disks and commits them afterwards. Of one that is
        off, it holds QEMU's own locks, so that it cannot be started onto a disk that is being read.
      - V(lvm), V(zfs) and V(rbd) take snapshots of volumes, V(reflink) copies files on Btrfs and XFS that share their
        blocks with the original.
      - V(none) is for disks that nothing writes to.
      - V(auto) is V(libvirt) without O(disks), else what the paths in O(disks) tell.
    type: str
    choices: [auto, libvirt, lvm, zfs, rbd, reflink, none]
    default: auto
  disks:
    description:
      - The disks, if not all those that libvirt knows of the domain.
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description:
          - What the disk is called on Proxmox VE, for example V(scsi0).
        type: str
        required: true
      path:
        description:
          - The file, the block device, or for Ceph V(rbd:pool/image).
        type: str
        required: true
      format:
        description:
          - The format of the image.
        type: str
        choices: [raw, qcow2, qed, vdi, vhdx, vmdk, vpc]
        default: raw
  exclude_disks:
    description:
      - Disks of the domain to leave out, by drive, such as V(scsi1), or by libvirt's target, such as V(vdb).
      - V(efidisk0) leaves out the UEFI variables, V(tpmstate0) the state of the TPM.
    type: list
    elements: str
    default: []
  quiesce:
    description:
      - Whether the guest's file systems are frozen for the instant of the snapshot, by the QEMU guest agent in it.
      - V(auto) tries it, V(always) fails where it does not work, V(never) does not try.
    type: str
    choices: [auto, always, never]
    default: auto
  scratch_dir:
    description:
      - An existing folder for what is needed while the snapshot is held, above all for what the guest overwrites
        meanwhile. The user that QEMU runs as must be able to pass through it.
    type: path
    default: /var/tmp
  timeout:
    description:
      - The most seconds that the snapshot is kept.
    type: int
    default: 86400
  idle_timeout:
    description:
      - The seconds after which a snapshot goes that no process has open.
      - With Ansible's C(linear) strategy a host waits for all others between two tasks, so give it time.
    type: int
    default: 3600
  vmid:
    description:
      - The VM's number on Proxmox VE, for RV(config). By default one with nine digits is made of the domain's UUID.
    type: int
  storage:
    description:
      - The storage of Proxmox VE that RV(config) puts the disks on.
    type: str
    default: local-lvm
  bridge:
    description:
      - The bridge that RV(config) gives to network interfaces whose network is none.
    type: str
    default: vmbr0
seealso:
  - module: vmbackup.vma.vma_create
  - plugin: vmbackup.vma.guest_config
    plugin_type: filter
"""

EXAMPLES = r"""
---
- name: Archive a running libvirt domain
  block:
    - name: Freeze its disks
      vmbackup.vma.vm_snapshot:
        name: web
      register: snapshot

    - name: Archive them
      vmbackup.vma.vma_create:
        dest: /var/backups/web.vma.zst
        devices: "{{ snapshot.devices }}"
        configs:
          - name: qemu-server.conf
            content: "{{ snapshot.config }}"
  always:
    - name: Let go of the disks
      vmbackup.vma.vm_snapshot:
        name: web
        id: "{{ snapshot.id | default(omit) }}"
        state: absent

- name: Freeze two volumes of a VM, with its file systems quiesced
  vmbackup.vma.vm_snapshot:
    name: db
    provider: lvm
    quiesce: always
    disks:
      - name: scsi0
        path: /dev/vg0/db-root
      - name: scsi1
        path: /dev/vg0/db-data

- name: Clear what killed runs have left of a VM
  vmbackup.vma.vm_snapshot:
    name: web
    state: absent
"""

RETURN = r"""
id:
  description: What identifies the snapshot; empty in check mode.
  returned: O(state=present)
  type: str
  sample: 5e0cd71f
provider:
  description: Who froze the disks.
  returned: O(state=present)
  type: str
  sample: libvirt
method:
  description: How, in words.
  returned: O(state=present)
  type: str
  sample: backup job
consistency:
  description:
    - V(application) if the guest's file systems were quiesced, V(crash) if the disks are as after a power failure,
      V(offline) if the VM is off.
    - In check mode it is the least that is to be expected.
  returned: O(state=present)
  type: str
  sample: application
disks:
  description: Where to read the disks.
  returned: O(state=present)
  type: list
  elements: dict
  contains:
    name:
      description: The drive.
      type: str
      sample: virtio0
    path:
      description: What to read. In check mode it is the disk itself, which must not be read.
      type: str
      sample: /var/tmp/vmbackup-vma-5e0cd71f/vda.raw
    format:
      description: The format of what is at RV(disks[].path).
      type: str
      sample: raw
    size:
      description: The size of the virtual disk in bytes, if known.
      type: int
      sample: 10737418240
    allocated:
      description: The bytes that the disk takes up, if known; an archive without compression is hardly larger.
      type: int
      sample: 4294967296
devices:
  description: The disks as O(vmbackup.vma.vma_create#module:devices) takes them, with the names that Proxmox VE wants.
  returned: O(state=present)
  type: list
  elements: dict
  sample: [{"name": "drive-virtio0", "path": "/var/tmp/vmbackup-vma-5e0cd71f/vda.raw", "format": "raw"}]
config:
  description: A C(qemu-server.conf) for the VM, made from its libvirt domain; null where libvirt does not know it.
  returned: O(state=present)
  type: str
  sample: "name: web\nmemory: 2048\n"
vmid:
  description: The VM's number on Proxmox VE; null where none was given and libvirt does not know the VM.
  returned: O(state=present)
  type: int
  sample: 100
unmapped:
  description: What the restored VM would have otherwise than the domain, a sentence each.
  returned: O(state=present)
  type: list
  elements: str
  sample: ["hostdev pci 0000:01:00.0 is not in the configuration"]
cleared:
  description: What an earlier run had left, and was removed.
  returned: O(state=present)
  type: list
  elements: str
  sample: []
removed:
  description: What was removed; in check mode, what would be.
  returned: O(state=absent)
  type: list
  elements: str
  sample: ["the backup job of 0a6ed0c2-6d1c-4c43-a7a8-63f2f1e9f2b1", "the folder /var/tmp/vmbackup-vma-5e0cd71f"]
trouble:
  description:
    - Why the snapshot went, or went bad, before the task asked for it; null if all was well.
    - What was read from a snapshot that was in trouble is not a copy of one instant, and of no use.
  returned: O(state=absent)
  type: str
  sample: "the scratch file system at /var/tmp/vmbackup-vma-5e0cd71f is nearly full: 12 MiB are free, 64 are needed"
error:
  description: What went wrong.
  returned: failure
  type: dict
  contains:
    kind:
      description: The kind of error, such as V(snapshot), V(busy), V(space), V(tool), V(source) or V(request).
      returned: always
      type: str
      sample: busy
    message:
      description: What is wrong.
      returned: always
      type: str
      sample: another run has frozen the disks of web, since 2026-01-31T22:15:00+01:00
    file:
      description: The file or device concerned.
      returned: where known
      type: str
      sample: /dev/vg0/web
    remedy:
      description: What to do about it.
      returned: where known
      type: str
      sample: Wait for it.
"""

import typing as t

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.vmbackup.vma.plugins.module_utils._vma_module import check_positive, failing
from ansible_collections.vmbackup.vma.plugins.module_utils.host.keeper import Limits
from ansible_collections.vmbackup.vma.plugins.module_utils.host.provider import Disk, device_name
from ansible_collections.vmbackup.vma.plugins.module_utils.host.snapshot import (
    PROVIDERS,
    Request,
    describe_leftovers,
    freeze_disks,
    let_go,
    plan,
)
from ansible_collections.vmbackup.vma.plugins.module_utils.host.stand_still import QUIESCE
from ansible_collections.vmbackup.vma.plugins.module_utils.vma.qemu import FORMATS


def freeze(module: AnsibleModule) -> dict[str, t.Any]:
    """Freeze the disks, or in check mode tell what that would do."""
    params = module.params
    request = Request(
        name=params["name"],
        provider=params["provider"],
        disks=tuple(Disk(disk["name"], disk["path"], disk["format"]) for disk in params["disks"]),
        exclude=tuple(params["exclude_disks"]),
        quiesce=params["quiesce"],
        scratch=params["scratch_dir"],
        limits=Limits(params["timeout"], params["idle_timeout"]),
        vmid=params["vmid"],
        storage=params["storage"],
        bridge=params["bridge"],
    )
    snapshot = plan(request) if module.check_mode else freeze_disks(request)
    disks = snapshot.frozen.disks
    return {
        "changed": True,
        "id": snapshot.id,
        "provider": snapshot.provider,
        "method": snapshot.frozen.method,
        "consistency": snapshot.frozen.consistency,
        "disks": [disk.as_dict() for disk in disks],
        "devices": [
            {"name": device_name(disk.name), "path": disk.path, "format": disk.format} for disk in snapshot.frozen.disks
        ],
        "config": None if snapshot.config is None else snapshot.config.text,
        "vmid": snapshot.vmid,
        "unmapped": [] if snapshot.config is None else list(snapshot.config.unmapped),
        "cleared": snapshot.cleared,
    }


def release(module: AnsibleModule) -> dict[str, t.Any]:
    """Let go of the disks, or in check mode tell what that would remove."""
    name = module.params["name"]
    if module.check_mode:
        leftovers = describe_leftovers(name, module.params["id"])
        return {"changed": bool(leftovers), "removed": leftovers, "trouble": None}
    released = let_go(name, module.params["id"])
    return {"changed": bool(released.removed), "removed": released.removed, "trouble": released.trouble}


def main() -> t.NoReturn:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "id": {"type": "str"},
            "provider": {"type": "str", "choices": list(PROVIDERS), "default": "auto"},
            "disks": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "name": {"type": "str", "required": True},
                    "path": {"type": "str", "required": True},
                    "format": {"type": "str", "choices": list(FORMATS), "default": "raw"},
                },
            },
            "exclude_disks": {"type": "list", "elements": "str", "default": []},
            "quiesce": {"type": "str", "choices": list(QUIESCE), "default": "auto"},
            "scratch_dir": {"type": "path", "default": "/var/tmp"},
            "timeout": {"type": "int", "default": 86400},
            "idle_timeout": {"type": "int", "default": 3600},
            "vmid": {"type": "int"},
            "storage": {"type": "str", "default": "local-lvm"},
            "bridge": {"type": "str", "default": "vmbr0"},
        },
        supports_check_mode=True,
    )
    with failing(module):
        check_positive(module, "timeout", "idle_timeout")
        result = freeze(module) if module.params["state"] == "present" else release(module)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
