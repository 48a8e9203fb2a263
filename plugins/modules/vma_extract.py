#!/usr/bin/python

# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: vma_extract
short_description: Extract disk images and configs from a VMA archive
version_added: 0.1.0
author:
  - The vmbackup.vma contributors (@vmbackup)
description:
  - Bring devices and configs of a VMA archive to files or block devices, without Proxmox VE's own tools.
  - Everything is checked on the way. Each device that is asked for is extracted whole, or the task fails.
  - Files get their names together, after the last byte was read and found sound. Zero blocks become holes.
  - Of a block device, only what differs is written. What the archive has as zeros is discarded or zeroed there, so that
    nothing stale is left within the size of the device.
requirements:
  - libzstd (package C(libzstd1) or C(libzstd)), or the command C(zstd), for archives that are compressed with zstd
  - lzop, for archives that are compressed with it
  - qemu-img (package C(qemu-utils) or C(qemu-img)), for targets in another format than V(raw)
extends_documentation_fragment:
  - vmbackup.vma._files
  - ansible.builtin.files
  - vmbackup.vma._attributes
  - vmbackup.vma._attributes.files
  - vmbackup.vma._attributes.actiongroup_vma
attributes:
  check_mode:
    support: full
    details:
      - Targets that are there are compared with the archive, which reads both.
  diff_mode:
    support: full
    details:
      - Shows targets by path and size, and of configs a digest as well; contents only with O(config_content=true).
  idempotent:
    support: partial
    details:
      - With O(overwrite=always) each run writes the targets.
  safe_file_operations:
    support: partial
    details:
      - Block devices, and with O(in_place=true) files, are written where they lie.
options:
  src:
    description:
      - The archive on the managed host. Its content tells whether it is compressed, with zstd, gzip, lzo or bzip2.
    type: path
    required: true
  dest:
    description:
      - The folder for what has no path of its own. It is made where it is missing, with mode V(0700).
    type: path
    required: true
  devices:
    description:
      - The devices to extract, all by default. An empty list extracts none.
      - Where some are asked for, reading ends as soon as they are whole. The rest of the archive is not checked then.
    type: list
    elements: dict
    suboptions:
      name:
        description:
          - The device's name in the archive.
        type: str
        required: true
      path:
        description:
          - A file, or a block device that is at least as large.
          - By default C(disk-<name>.<format>) in O(dest), and C(vmstate.bin) for the device V(vmstate).
        type: path
      format:
        description:
          - The format to write. Formats other than V(raw) are written by qemu-img, with room for a raw copy needed
            meanwhile, and never in place.
        type: str
        choices: [raw, qcow2, qed, vdi, vhdx, vmdk, vpc]
        default: raw
  configs:
    description:
      - The names of the configs to extract to O(dest), or V(all), or V(none).
    type: list
    elements: str
    default: [all]
  overwrite:
    description:
      - What becomes of targets that are there already.
      - V(changed) leaves alone a target that holds what it should. Of one that differs, only what differs is written,
        where the file system can make reflink copies or the target is written in place.
      - V(never) leaves all of them alone, whatever they hold.
      - V(always) writes them anew.
    type: str
    choices: [changed, never, always]
    default: changed
  in_place:
    description:
      - Whether files that are there are patched where they lie, for want of space. A crash meanwhile leaves a mixture.
      - Block devices are always written in place.
    type: bool
    default: false
  check_space:
    description:
      - Whether to fail before the first write where the targets may not fit into their file systems.
      - A disk needs at most its size, and less where it holds zeros. Switch this off where you know that it fits.
    type: bool
    default: true
notes:
  - The file attributes, such as O(mode) and O(owner), are those of the extracted files, whether they were written or
    not. Block devices and the folder O(dest) keep theirs.
  - A name from an archive becomes a part of a path only where it is safe. Extract a device with an unsafe name to a
    path of your own.
  - A run that is killed outright may leave hidden files ending in C(.vma-part) beside the targets. The next run for the
    same targets removes them.
seealso:
  - module: vmbackup.vma.vma_create
  - module: vmbackup.vma.vma_info
"""

EXAMPLES = r"""
---
- name: Extract all of an archive into a folder
  vmbackup.vma.vma_extract:
    src: /srv/backup/dump/vzdump-qemu-100-2026_01_31-22_15_00.vma.zst
    dest: /srv/restore/web

- name: Restore one disk onto a logical volume, and the VM's configuration beside it
  vmbackup.vma.vma_extract:
    src: /srv/backup/dump/vzdump-qemu-100-2026_01_31-22_15_00.vma.zst
    dest: /srv/restore/web
    devices:
      - name: drive-scsi0
        path: /dev/vg0/web
    configs:
      - qemu-server.conf

- name: Extract a disk as qcow2 for libvirt
  vmbackup.vma.vma_extract:
    src: /srv/backup/web.vma
    dest: /var/lib/libvirt/images
    devices:
      - name: drive-scsi0
        path: /var/lib/libvirt/images/web.qcow2
        format: qcow2
    configs: none
    owner: libvirt-qemu
    group: libvirt-qemu
"""

RETURN = r"""
devices:
  description: The devices that were asked for, and what became of their targets.
  returned: success
  type: list
  elements: dict
  sample:
    - name: drive-scsi0
      path: /srv/restore/web/disk-drive-scsi0.raw
      format: raw
      size: 34359738368
      written_bytes: 1048576
      changed: true
      reason: it differs at offset 1048576
  contains:
    name:
      description: The device's name in the archive.
      returned: success
      type: str
      sample: drive-scsi0
    path:
      description: The file or block device.
      returned: success
      type: str
      sample: /srv/restore/web/disk-drive-scsi0.raw
    format:
      description: The format of the target.
      returned: success
      type: str
      sample: raw
    size:
      description: The device's size in bytes.
      returned: success
      type: int
      sample: 34359738368
    written_bytes:
      description: How many bytes of the target were written or zeroed; V(0) in check mode.
      returned: success
      type: int
      sample: 1048576
    changed:
      description: Whether the target was, or in check mode would be, changed, its file attributes included.
      returned: success
      type: bool
      sample: true
    reason:
      description: Why the target was, or in check mode would be, written; V(null) where it was not.
      returned: success
      type: str
      sample: it differs at offset 1048576
configs:
  description: The configs that were asked for, and what became of their files.
  returned: success
  type: list
  elements: dict
  sample:
    - name: qemu-server.conf
      path: /srv/restore/web/qemu-server.conf
      size: 324
      changed: false
  contains:
    name:
      description: The config's name in the archive.
      returned: success
      type: str
      sample: qemu-server.conf
    path:
      description: The file.
      returned: success
      type: str
      sample: /srv/restore/web/qemu-server.conf
    size:
      description: The config's size in bytes.
      returned: success
      type: int
      sample: 324
    changed:
      description: Whether the file was, or in check mode would be, changed, its file attributes included.
      returned: success
      type: bool
      sample: false
archive:
  description:
    - The archive at O(src), described as in RV(vmbackup.vma.vma_info#module:archives), without a verification.
    - RV(archive.integrity) is V(null) where no extent was looked at, as in check mode with no targets there yet.
  returned: success
  type: dict
  sample:
    path: /srv/backup/dump/vzdump-qemu-100-2026_01_31-22_15_00.vma.zst
    size: 1287651328
    compression: zstd
    version: 1
    uuid: 5d6417dd-461f-44a9-8553-14f8d37622f8
    ctime: 1769894100
    header_size: 12800
    integrity: sha256
    devices:
      - dev_id: 1
        name: drive-scsi0
        size: 34359738368
    configs:
      - name: qemu-server.conf
        size: 324
        content:
    vmid: 100
    timestamp: 1769894100
    vm:
      name: web
      memory: 2048
      cores: 2
    notes:
    protected: false
  contains:
    integrity:
      description: V(sha256) where the archive's data carries digests, which were checked; V(none) where it does not.
      returned: success
      type: str
      sample: sha256
    configs:
      description: The configs in the archive.
      returned: success
      type: list
      elements: dict
      contains:
        name:
          description: The config's name.
          returned: success
          type: str
          sample: qemu-server.conf
        size:
          description: The config's size in bytes.
          returned: success
          type: int
          sample: 324
        content:
          description: The config itself; V(null) without O(config_content=true).
          returned: success
          type: str
          sample:
elapsed:
  description: How long the comparison and the writing took, in seconds.
  returned: success
  type: float
  sample: 12.345
error:
  description:
    - What went wrong, for playbooks to go by.
  returned: failure in the work itself, not in the options' form
  type: dict
  sample:
    kind: extent_digest
    message: the extent's bytes do not match its digest
    offset: 3879424
    file: /srv/backup/web.vma.zst
  contains:
    kind:
      description:
        - What kind of error it is.
        - A kind of problem that an archive can have, see RV(vmbackup.vma.vma_info#module:archives[].error.kind).
        - Or V(request), something that cannot be done as asked; V(source), a target that cannot be read to compare it;
          V(target), one that cannot be written; V(space), a full file system; V(busy), another run that writes the same
          target; V(tool), a tool that is missing or failed; V(interrupted), a signal.
      returned: always
      type: str
      sample: extent_digest
    message:
      description: What is wrong.
      returned: always
      type: str
      sample: the extent's bytes do not match its digest
    file:
      description: The file or block device that it is about.
      returned: where known
      type: str
      sample: /srv/backup/web.vma.zst
    offset:
      description: Where in the uncompressed archive, in bytes from its start.
      returned: where known
      type: int
      sample: 3879424
    device:
      description: The device in the archive.
      returned: where known
      type: str
      sample: drive-scsi0
    cluster:
      description: The 64 KiB cluster of the device.
      returned: where known
      type: int
      sample: 59
    remedy:
      description: What to do about it.
      returned: where known
      type: str
      sample: "The data changed after the archive was written: use another archive, check the storage."
"""

import os
import stat
import typing as t

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.vmbackup.vma.plugins.module_utils._vma_module import (
    check_positive,
    content_diff,
    failing,
    fingerprint,
    read_header,
    set_attributes,
    text_diff,
)
from ansible_collections.vmbackup.vma.plugins.module_utils.vma.errors import RequestError
from ansible_collections.vmbackup.vma.plugins.module_utils.vma.extract import (
    OVERWRITE,
    DeviceRequest,
    Extracted,
    ExtractedConfig,
    ExtractedDevice,
    extract,
)
from ansible_collections.vmbackup.vma.plugins.module_utils.vma.info import describe
from ansible_collections.vmbackup.vma.plugins.module_utils.vma.qemu import FORMATS

_ALL = "all"
_NONE = "none"


def _wanted_configs(names: list[str]) -> list[str] | None:
    """The names of the configs that are asked for; None stands for all."""
    special = {_ALL, _NONE}.intersection(names)
    if special and len(names) > 1:
        raise RequestError(f"{special.pop()!r} does not go together with other configs: {', '.join(names)}")
    if names == [_ALL]:
        return None
    return [] if names == [_NONE] else names


def _set_attributes(module: AnsibleModule, extracted: Extracted) -> list[dict[str, t.Any]]:
    """Give all extracted files the attributes that the task asks for; note which change. Returns the differences."""
    differences: list[dict[str, t.Any]] = []
    items: list[ExtractedDevice | ExtractedConfig] = [*extracted.devices, *extracted.configs]
    for item in items:
        if os.path.exists(item.path) and stat.S_ISBLK(os.stat(item.path).st_mode):
            continue
        differs, difference = set_attributes(module, item.path, is_new=item.is_new)
        item.changed = item.changed or differs
        differences += difference
    return differences


def _text_diffs(extracted: Extracted, with_content: bool) -> list[dict[str, str]]:
    """What was written, as diff mode shows it."""
    diffs = []
    for device in extracted.devices:
        if device.reason is not None:
            after = f"device {device.name}: {device.size} bytes, {device.format}\n"
            diffs.append(text_diff(device.path, f"{device.reason}\n", after))
    for config in extracted.configs:
        if not config.changed:
            continue
        if with_content:
            diffs.append(content_diff(config.path, config.before, config.data))
        else:
            before = "" if config.before is None else f"{fingerprint(config.before)}\n"
            diffs.append(text_diff(config.path, before, f"config {config.name}: {fingerprint(config.data)}\n"))
    return diffs


def run(module: AnsibleModule) -> dict[str, t.Any]:
    """Extract what is asked for, and return the task's results."""
    check_positive(module, "bandwidth_limit", "threads")
    params = module.params
    src = os.path.abspath(params["src"])
    devices = params["devices"]
    if devices is not None:
        devices = [DeviceRequest(item["name"], item["path"], item["format"]) for item in devices]
    extracted = extract(
        src,
        os.path.abspath(params["dest"]),
        devices=devices,
        configs=_wanted_configs(params["configs"]),
        overwrite=params["overwrite"],
        in_place=params["in_place"],
        check_space=params["check_space"],
        bytes_per_second=params["bandwidth_limit"],
        threads=params["threads"],
        dry_run=module.check_mode,
    )
    diffs: list[dict[str, t.Any]] = [*_text_diffs(extracted, params["config_content"])]
    diffs += _set_attributes(module, extracted)
    # Unsafe names are a danger only where a path is made of them, which extract() has seen to.
    header, compression, _problems = read_header(src)
    result: dict[str, t.Any] = {
        "devices": [
            {
                "name": device.name,
                "path": device.path,
                "format": device.format,
                "size": device.size,
                "written_bytes": device.written_bytes,
                "changed": device.changed,
                "reason": device.reason,
            }
            for device in extracted.devices
        ],
        "configs": [
            {"name": config.name, "path": config.path, "size": config.size, "changed": config.changed}
            for config in extracted.configs
        ],
        "archive": describe(
            src, header, compression, integrity=extracted.integrity, with_content=params["config_content"]
        ),
        "changed": extracted.changed,
        "elapsed": round(extracted.elapsed, 3),
    }
    if module._diff:
        result["diff"] = diffs
    return result


def main() -> t.NoReturn:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "src": {"type": "path", "required": True},
            "dest": {"type": "path", "required": True},
            "devices": {
                "type": "list",
                "elements": "dict",
                "options": {
                    "name": {"type": "str", "required": True},
                    "path": {"type": "path"},
                    "format": {"type": "str", "choices": list(FORMATS), "default": "raw"},
                },
            },
            "configs": {"type": "list", "elements": "str", "default": [_ALL]},
            "overwrite": {"type": "str", "choices": list(OVERWRITE), "default": "changed"},
            "in_place": {"type": "bool", "default": False},
            "check_space": {"type": "bool", "default": True},
            "threads": {"type": "int"},
            "bandwidth_limit": {"type": "bytes"},
            "config_content": {"type": "bool", "default": False},
        },
        add_file_common_args=True,
        supports_check_mode=True,
    )
    with failing(module):
        result = run(module)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
