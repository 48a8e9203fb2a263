#!/usr/bin/python

# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: vm_boot
short_description: Boot disks on a throw-away VM and wait for a sign of life
version_added: 0.1.0
author:
  - The vmbackup.vma contributors (@vmbackup)
description:
  - Prove that disks, for example those that M(vmbackup.vma.vma_extract) restored, boot. The task fails where they do
    not, and tells why.
  - QEMU is started with the disks on the managed host. It needs neither libvirt nor root.
  - The disks are never written. What the guest writes goes to O(scratch_dir) and is thrown away.
  - The guest has no network, so a restored VM never meets its living twin. With O(expect_port) there is one, in which
    nothing but that port is reached, from the managed host alone, and nothing is reached from inside.
  - Nothing is left of the guest in the end, also after a signal. If the module is killed, QEMU ends with it, and the
    next run removes what was left in O(scratch_dir).
requirements:
  - qemu-system-x86_64 (package C(qemu-system-x86) or C(qemu-kvm))
  - qemu-img (package C(qemu-utils) or C(qemu-img))
  - OVMF (package C(ovmf) or C(edk2-ovmf)), for O(firmware=uefi)
  - setpriv (package C(util-linux)), without which a QEMU outlives a module that is killed, until the next run
extends_documentation_fragment:
  - vmbackup.vma._attributes
  - vmbackup.vma._attributes.actiongroup_vma
attributes:
  check_mode:
    support: full
    details:
      - The options, the disks and the tools are checked, and the result tells what would be booted. Nothing is started.
  diff_mode:
    support: N/A
    details:
      - Nothing but O(screenshot) is written.
  idempotent:
    support: partial
    details:
      - The guest is booted each time. Nothing changes by it but O(screenshot).
options:
  disks:
    description:
      - The disks of the guest, in the order of booting. A BIOS boots from the first one alone; UEFI goes on to the next
        one where a disk has nothing to boot from.
      - Give all disks that the VM had, else its system may wait for one that is missing.
    type: list
    elements: dict
    required: true
    suboptions:
      path:
        description: The image or the block device. It is only read.
        type: path
        required: true
      format:
        description: The format of the image.
        type: str
        choices: [raw, qcow2, qed, vdi, vhdx, vmdk, vpc]
        default: raw
      bus:
        description:
          - How the disk is attached; C(scsi0) in C(qemu-server.conf) means V(scsi), and so on.
          - There can be at most 16 disks with V(virtio), 16 with V(scsi), 6 with V(sata) and 4 with V(ide).
        type: str
        choices: [virtio, scsi, sata, ide]
        default: virtio
      boot:
        description:
          - Whether the firmware may boot from the disk, as it may from those that C(boot) in C(qemu-server.conf) names.
          - Say V(false) for what is not to boot, such as the disk of an old system, else UEFI boots that where the
            right one is broken, and the guest seems to be alive.
        type: bool
        default: true
  firmware:
    description:
      - V(bios) is SeaBIOS, V(uefi) is OVMF; in C(qemu-server.conf) they are called C(seabios) and C(ovmf).
      - Secure boot is not enforced.
    type: str
    choices: [bios, uefi]
    default: bios
  efi_vars:
    description:
      - The VM's own EFI variables, as raw bytes, for O(firmware=uefi). In an archive this is the device
        C(drive-efidisk0). They are copied, and never written.
      - By default the guest gets empty variables. A system that does not lie at the standard place of removable media
        then does not boot.
    type: path
  machine:
    description:
      - The type of the machine, V(pc), V(q35), or a certain version of them such as V(pc-q35-8.1).
      - Of a version that the host's QEMU does not know, the newest of its family is taken.
    type: str
    default: pc
  memory:
    description: The memory in MiB. It is lowered to what the host has free.
    type: int
    default: 1024
  cores:
    description: The number of processors. It is lowered to what the host has.
    type: int
    default: 1
  scsi_controller:
    description: The controller of disks with the bus V(scsi); C(scsihw) in C(qemu-server.conf).
    type: str
    choices: [virtio-scsi-pci, virtio-scsi-single, lsi, lsi53c810, megasas, pvscsi]
    default: virtio-scsi-pci
  network_card:
    description: The network card with O(expect_port); without that option there is none.
    type: str
    choices: [virtio, e1000, e1000e, rtl8139, vmxnet3]
    default: virtio
  accelerator:
    description:
      - What runs the guest. V(kvm) is fast; V(tcg) is an emulation that works everywhere, and many times slower.
      - With V(auto) it is tried whether KVM runs a guest. That C(/dev/kvm) exists does not say so.
    type: str
    choices: [auto, kvm, tcg]
    default: auto
  expect:
    description:
      - A regular expression of Python that the serial console has to show. C(^) and C($) stand for the ends of lines.
        Colours and other control sequences are removed before.
      - One that matches even an empty text, as V(.*) and an empty one do, is refused, as any output would be it.
      - The guest has to write on its first serial port; Linux does so with C(console=ttyS0) on its command line.
      - All signs of life that are asked for have to come. If none is asked for, this one is V(login:).
    type: str
  expect_agent:
    description: Whether QEMU's guest agent has to answer a ping.
    type: bool
    default: false
  expect_port:
    description:
      - A TCP port inside the guest that has to take a connection, for example V(22).
      - The guest has to get its address by DHCP, and QEMU must have the user-mode network, which that of Red Hat lacks.
    type: int
  timeout:
    description: How many seconds after the guest's start all signs of life must have come.
    type: int
    default: 300
  scratch_dir:
    description:
      - A folder for what the guest writes. Where it gets full, the task fails.
    type: path
    default: /var/tmp
  screenshot:
    description:
      - A PNG file that gets a picture of the guest's screen, taken after its last sign of life or its failure.
      - A guest that has shut down has no screen any more, and an older picture is left as it is.
    type: path
  console_lines:
    description: How many of the console's last lines RV(console) shows. Empty lines do not count.
    type: int
    default: 50
notes:
  - The console may show secrets, and results are printed at higher verbosity and kept by callback plugins. Use
    O(console_lines=0) or C(no_log) where that matters.
  - A TPM is not restored. A system whose disk is unlocked by one asks for its recovery key and does not boot.
  - Only guests for x86_64 are booted.
seealso:
  - module: vmbackup.vma.vma_extract
  - module: vmbackup.vma.vma_info
"""

EXAMPLES = r"""
---
- name: Restore the disks of a backup to a scratch folder
  vmbackup.vma.vma_extract:
    src: /srv/backup/vzdump-qemu-100-2026_01_31-22_15_00.vma.zst
    dest: /srv/drill/web

- name: Boot them, and wait for the login prompt
  vmbackup.vma.vm_boot:
    disks:
      - path: /srv/drill/web/disk-drive-scsi0.raw
        bus: scsi
    memory: 2048
    scratch_dir: /srv/drill
  register: drill

- name: Show how long it took
  ansible.builtin.debug:
    msg: "web shows life after {{ drill.seconds }} seconds"

- name: Boot a VM with UEFI and its own EFI variables, and wait for its guest agent
  vmbackup.vma.vm_boot:
    disks:
      - path: /srv/drill/db/disk-drive-virtio0.raw
      - path: /srv/drill/db/disk-drive-virtio1.raw
    firmware: uefi
    efi_vars: /srv/drill/db/disk-drive-efidisk0.raw
    machine: q35
    expect_agent: true
    timeout: 600
    screenshot: /srv/drill/db.png

- name: Wait until a service says that it has started, and takes connections
  vmbackup.vma.vm_boot:
    disks:
      - path: /srv/drill/shop.qcow2
        format: qcow2
    expect: Started .*PostgreSQL
    expect_port: 5432
"""

RETURN = r"""
booted:
  description: Whether all signs of life came.
  returned: always, but in check mode and where it did not come to booting
  type: bool
  sample: true
seconds:
  description: How many seconds after the guest's start the last sign of life came, or the failure.
  returned: always, but in check mode and where it did not come to booting
  type: float
  sample: 14.212
signs:
  description: For each sign of life that came, by the option that asks for it, after how many seconds.
  returned: always, but in check mode and where it did not come to booting
  type: dict
  sample:
    expect: 12.87
    expect_agent: 14.212
match:
  description: What O(expect) matched; V(null) where nothing did.
  returned: always, but in check mode and where it did not come to booting
  type: str
  sample: "login:"
console:
  description: The last lines of the serial console.
  returned: always, but in check mode and where it did not come to booting
  type: str
  sample: "Debian GNU/Linux 12 web ttyS0\nweb login: "
accelerator:
  description: What ran the guest, V(kvm) or V(tcg).
  returned: always, but in check mode and where it did not come to booting
  type: str
  sample: kvm
machine:
  description: The type of the machine.
  returned: always, but where the options, the disks or the tools are at fault
  type: str
  sample: q35
memory:
  description: The memory in MiB.
  returned: always, but where the options, the disks or the tools are at fault
  type: int
  sample: 2048
cores:
  description: The number of processors.
  returned: always, but where the options, the disks or the tools are at fault
  type: int
  sample: 2
firmware:
  description: The file with the UEFI firmware; V(null) with O(firmware=bios).
  returned: always, but where the options, the disks or the tools are at fault
  type: str
  sample: /usr/share/OVMF/OVMF_CODE_4M.fd
adjusted:
  description: What is otherwise than requested, because the host or its QEMU cannot do it, in words.
  returned: always, but where the options, the disks or the tools are at fault
  type: list
  elements: str
  sample:
    - memory is 1536 instead of 4096
error:
  description: Why the guest did not boot, or was not booted.
  returned: failure
  type: dict
  sample:
    kind: kernel_panic
    message: "the guest's kernel panicked: [    1.2] Kernel panic - not syncing: VFS: Unable to mount root fs"
    remedy: The console says why. Check that all disks are given with the buses that the VM had.
  contains:
    kind:
      description:
        - The kind of failure.
        - These are the guest's. V(no_boot_device), the firmware found nothing to boot from. V(boot_loader), the boot
          loader came and could not start a system. V(kernel_panic). V(emergency_shell), the system came no further than
          that. V(shutdown), the guest shut itself down. V(timeout), the signs of life did not come in time.
        - These are the host's. V(scratch_full), O(scratch_dir) has no more room. V(qemu_failed), QEMU does not start or
          ended by itself.
        - Before anything was booted, V(request), V(source), V(space), V(target) or V(tool). After a signal
          V(interrupted).
      returned: always
      type: str
      sample: kernel_panic
    message:
      description: What happened, with the line of the console that says so.
      returned: always
      type: str
      sample: "the guest's kernel panicked: [    1.2] Kernel panic - not syncing: VFS: Unable to mount root fs"
    remedy:
      description: What to do about it.
      returned: where known
      type: str
      sample: The console says why. Check that all disks are given with the buses that the VM had.
    file:
      description: The file that it is about.
      returned: where known
      type: str
      sample: /srv/drill/web/disk-drive-scsi0.raw
"""

import typing as t

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.vmbackup.vma.plugins.module_utils._vma_module import failing
from ansible_collections.vmbackup.vma.plugins.module_utils.host.accelerator import ACCELERATORS
from ansible_collections.vmbackup.vma.plugins.module_utils.host.boot import Outcome, Plan, Request, boot, plan
from ansible_collections.vmbackup.vma.plugins.module_utils.host.qemu_command import (
    BUSES,
    NETWORK_CARDS,
    SCSI_CONTROLLERS,
    Disk,
)
from ansible_collections.vmbackup.vma.plugins.module_utils.vma.qemu import FORMATS

DISK_SPEC: dict[str, t.Any] = {
    "path": {"type": "path", "required": True},
    "format": {"type": "str", "choices": list(FORMATS), "default": "raw"},
    "bus": {"type": "str", "choices": list(BUSES), "default": "virtio"},
    "boot": {"type": "bool", "default": True},
}
ARGUMENT_SPEC: dict[str, t.Any] = {
    "disks": {"type": "list", "elements": "dict", "required": True, "options": DISK_SPEC},
    "firmware": {"type": "str", "choices": ["bios", "uefi"], "default": "bios"},
    "efi_vars": {"type": "path"},
    "machine": {"type": "str", "default": "pc"},
    "memory": {"type": "int", "default": 1024},
    "cores": {"type": "int", "default": 1},
    "scsi_controller": {"type": "str", "choices": list(SCSI_CONTROLLERS), "default": "virtio-scsi-pci"},
    "network_card": {"type": "str", "choices": list(NETWORK_CARDS), "default": "virtio"},
    "accelerator": {"type": "str", "choices": list(ACCELERATORS), "default": "auto"},
    "expect": {"type": "str"},
    "expect_agent": {"type": "bool", "default": False},
    "expect_port": {"type": "int"},
    "timeout": {"type": "int", "default": 300},
    "scratch_dir": {"type": "path", "default": "/var/tmp"},
    "screenshot": {"type": "path"},
    "console_lines": {"type": "int", "default": 50},
}


def make_request(params: dict[str, t.Any]) -> Request:
    """What the options ask for."""
    options = {key: value for key, value in params.items() if key not in ("disks", "console_lines")}
    return Request(disks=[Disk(**disk) for disk in params["disks"]], **options)


def planned_result(planned: Plan) -> dict[str, t.Any]:
    """What is known before the guest is booted, as the module returns it."""
    return {
        "machine": planned.machine.type,
        "memory": planned.machine.memory,
        "cores": planned.machine.cores,
        "firmware": None if planned.firmware is None else planned.firmware.code,
        "adjusted": list(planned.changes),
    }


def result(outcome: Outcome, console_lines: int) -> dict[str, t.Any]:
    """How it went, as the module returns it."""
    return {
        **planned_result(outcome.plan),
        "booted": outcome.failure is None,
        "seconds": outcome.seconds,
        "signs": dict(outcome.signs),
        "match": outcome.match,
        "console": outcome.console.tail(console_lines),
        "accelerator": outcome.accelerator,
        "changed": outcome.has_screenshot,
    }


def main() -> t.NoReturn:
    """Run the module."""
    module = AnsibleModule(argument_spec=ARGUMENT_SPEC, supports_check_mode=True)
    request = make_request(module.params)
    with failing(module):
        if module.check_mode:
            module.exit_json(changed=request.screenshot is not None, **planned_result(plan(request)))
        outcome = boot(request)
    for note in outcome.notes:
        module.warn(note)
    shown = result(outcome, module.params["console_lines"])
    if outcome.failure is not None:
        what = "cannot be booted here" if outcome.failure.is_of_the_host else "does not boot"
        message = f"{request.disks[0].path} {what}: {outcome.failure}"
        module.fail_json(msg=message, error=outcome.failure.as_dict(), **shown)
    module.exit_json(**shown)


if __name__ == "__main__":
    main()
