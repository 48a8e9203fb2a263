#!/usr/bin/python

# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: vma_create
short_description: Create a VMA archive from disk images and configs
version_added: 0.1.0
author:
  - The vmbackup.vma contributors (@vmbackup)
description:
  - Make an archive in the VMA format of Proxmox VE from disk images, block devices and configuration files, without
    Proxmox VE's own tools.
  - The archive appears under its name only when it is complete and on disk. A source that changes or cannot be read
    fails the task, and nothing is left behind.
  - An archive that holds exactly these devices and configs already is not written again.
requirements:
  - libzstd (package C(libzstd1) or C(libzstd)), or the command C(zstd), for archives that end in C(.vma.zst)
  - qemu-img or qemu-storage-daemon (package C(qemu-utils) or C(qemu-img)), for devices in another format than V(raw)
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
      - Where there is an archive at O(dest), it is compared with the sources, which reads both.
  diff_mode:
    support: full
    details:
      - Shows devices by name and size, and configs by name, size and digest; contents only with O(config_content=true).
  idempotent:
    support: partial
    details:
      - With O(overwrite=always) each run writes the archive.
  safe_file_operations:
    support: full
options:
  dest:
    description:
      - The archive. Its folder must exist.
      - The ending tells the compression, V(.vma), V(.vma.zst) or V(.vma.gz), because Proxmox VE goes by it.
      - Proxmox VE lists and prunes only names like C(vzdump-qemu-100-2026_01_31-22_15_00.vma.zst), in local time.
    type: path
    required: true
  devices:
    description:
      - The disks to archive, in this order. Without any, the archive holds configs alone.
      - They must not change meanwhile. Use a snapshot of a disk that a running VM writes to.
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description:
          - The device's name in the archive. Proxmox VE expects V(drive-scsi0) for the drive C(scsi0).
          - The device V(vmstate) is a VM's RAM state.
        type: str
        required: true
      path:
        description:
          - The image, a file or a block device.
        type: path
        required: true
      format:
        description:
          - The image's format. It is never guessed, because a guest can write the marks of another format to its disk.
          - Formats other than V(raw) are read through QEMU's tools.
        type: str
        choices: [raw, qcow2, qed, vdi, vhdx, vmdk, vpc]
        default: raw
  configs:
    description:
      - The configuration files to archive, in this order.
      - Proxmox VE restores a VM from V(qemu-server.conf), and its firewall rules from V(qemu-server.fw).
      - Exactly one of O(configs[].src) and O(configs[].content) is needed for each.
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description:
          - The config's name in the archive.
        type: str
        required: true
      src:
        description:
          - The file on the managed host that holds the config.
        type: path
      content:
        description:
          - The config itself. It is kept out of logs, and out of results unless O(config_content=true).
        type: str
  compression:
    description:
      - How to compress. V(auto) goes by the ending of O(dest).
      - An ending that tells of another compression than this is refused.
    type: str
    choices: [auto, none, zstd, gzip]
    default: auto
  compression_level:
    description:
      - From 1, the fastest, to 19 for zstd, and to 9 for gzip. By default 3 for zstd, and 6 for gzip.
      - It has no part in the decision whether an archive is written again.
    type: int
  integrity:
    description:
      - With V(sha256) each extent of the archive carries a digest of its data, which M(vmbackup.vma.vma_info) and
        M(vmbackup.vma.vma_extract) check. Other readers of the format do not look at where it stands.
      - With V(none) damaged data goes unnoticed, unless the compression notices it.
    type: str
    choices: [sha256, none]
    default: sha256
  overwrite:
    description:
      - What becomes of a file that is at O(dest) already.
      - V(changed) replaces it unless it is a whole archive of exactly these devices and configs, in this compression
        and O(integrity), and of this O(uuid) and O(ctime) where they are given.
      - V(never) leaves it alone. The task fails where it is no archive.
      - V(always) replaces it.
    type: str
    choices: [changed, never, always]
    default: changed
  uuid:
    description:
      - The archive's UUID, random by default.
      - Together with O(ctime), a fixed one gives the same archive, byte for byte, from the same input with the same
        version of the compressor. Stores that deduplicate want that.
    type: str
  ctime:
    description:
      - When the archive was created, in seconds since the epoch; the present time by default.
    type: int
notes:
  - A run that is killed outright may leave a hidden file ending in C(.vma-part) beside O(dest). The next run for the
    same O(dest) removes it.
seealso:
  - module: vmbackup.vma.vma_extract
  - module: vmbackup.vma.vma_info
"""

EXAMPLES = r"""
---
- name: Archive a VM so that Proxmox VE can restore it
  vmbackup.vma.vma_create:
    dest: /srv/backup/dump/vzdump-qemu-100-2026_01_31-22_15_00.vma.zst
    devices:
      - name: drive-scsi0
        path: /dev/vg0/web-snapshot
      - name: drive-scsi1
        path: /srv/images/web-data.qcow2
        format: qcow2
    configs:
      - name: qemu-server.conf
        content: |
          name: web
          memory: 2048
          cores: 2
          ostype: l26
          scsihw: virtio-scsi-single
          scsi0: local-lvm:vm-100-disk-0,size=32G
          scsi1: local-lvm:vm-100-disk-1,size=100G
          #qmdump#map:scsi0:drive-scsi0:local-lvm:raw:
          #qmdump#map:scsi1:drive-scsi1:local-lvm:raw:
    bandwidth_limit: 200M

- name: Make the same bytes from the same disk each time
  vmbackup.vma.vma_create:
    dest: /srv/golden/base.vma
    devices:
      - name: drive-scsi0
        path: /srv/golden/base.raw
    uuid: 5d6417dd-461f-44a9-8553-14f8d37622f8
    ctime: 0
    mode: "0640"
    group: backup
"""

RETURN = r"""
archive:
  description:
    - The archive at O(dest), described as in RV(vmbackup.vma.vma_info#module:archives), without a verification.
    - In check mode, where the archive would be written, it is described as far as that is known before. What is not is
      V(null), for example RV(archive.size).
    - The keys C(content) of its configs are V(null) without O(config_content=true).
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
    size:
      description: The size of the file in bytes.
      returned: success
      type: int
      sample: 1287651328
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
reason:
  description:
    - Why the archive was, or in check mode would be, written; V(null) where it stays as it is.
  returned: success
  type: str
  sample: "the device 'drive-scsi0' differs at offset 1048576"
read_bytes:
  description:
    - How many bytes were read from the sources to write the archive; V(0) where it was not written.
    - Holes in the sources are not read.
  returned: success
  type: int
  sample: 2147483648
data_bytes:
  description:
    - How many bytes of the devices the archive stores, before compression; V(0) where it was not written.
  returned: success
  type: int
  sample: 1999634432
elapsed:
  description:
    - How long the comparison and the writing took, in seconds.
  returned: success
  type: float
  sample: 12.345
error:
  description:
    - What went wrong, for playbooks to go by.
  returned: failure in the work itself, not in the options' form
  type: dict
  sample:
    kind: source
    message: expected 1048576 bytes, but the file now ends at 524288
    file: /srv/images/web.raw
  contains:
    kind:
      description:
        - What kind of error it is.
        - V(request) is something that cannot be done as asked, V(source) a source that cannot be read or changes
          meanwhile, V(target) an archive that cannot be written, V(space) a full file system, V(busy) another run that
          writes the same archive, V(tool) a tool that is missing or failed, V(interrupted) a signal.
        - Of a file at O(dest) that is left alone and is no archive, also a kind of
          RV(vmbackup.vma.vma_info#module:archives[].error.kind).
      returned: always
      type: str
      sample: source
    message:
      description: What is wrong.
      returned: always
      type: str
      sample: expected 1048576 bytes, but the file now ends at 524288
    file:
      description: The file or block device that it is about.
      returned: where known
      type: str
      sample: /srv/images/web.raw
    remedy:
      description: What to do about it.
      returned: where known
      type: str
      sample: "It shrank while it was read: back up a snapshot, or stop what writes to it."
"""

import os
import typing as t
import uuid as uuid_module

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.common.text.converters import to_bytes

from ansible_collections.vmbackup.vma.plugins.module_utils._vma_module import (
    check_positive,
    content_diff,
    failing,
    fingerprint,
    read_header,
    set_attributes,
    text_diff,
)
from ansible_collections.vmbackup.vma.plugins.module_utils.vma import vzdump
from ansible_collections.vmbackup.vma.plugins.module_utils.vma.archive_file import compression_of
from ansible_collections.vmbackup.vma.plugins.module_utils.vma.create import OVERWRITE, SourceDevice, create
from ansible_collections.vmbackup.vma.plugins.module_utils.vma.errors import ArchiveError, SourceError, VmaError
from ansible_collections.vmbackup.vma.plugins.module_utils.vma.info import describe
from ansible_collections.vmbackup.vma.plugins.module_utils.vma.layout import (
    BLOB_LIMIT,
    SECTOR_SIZE,
    VERSION,
    Config,
    Device,
    Header,
)
from ansible_collections.vmbackup.vma.plugins.module_utils.vma.qemu import FORMATS, open_source


def _read_config(item: dict[str, t.Any]) -> Config:
    if item["src"] is None:
        return Config(item["name"], to_bytes(item["content"]))
    try:
        with open(item["src"], "rb") as file:
            # One byte more than fits is enough for the codec to refuse it.
            return Config(item["name"], file.read(BLOB_LIMIT + 1))
    except OSError as error:
        remedy = "Check the path, and that the user may read it."
        message = f"the config {item['name']!r} cannot be read: {error.strerror}"
        raise SourceError(message, file=item["src"], remedy=remedy) from error


class _Task:
    """The task's options, as the codec takes them."""

    def __init__(self, module: AnsibleModule) -> None:
        params = module.params
        self.module = module
        self.dest = os.path.abspath(params["dest"])
        self.compression = compression_of(self.dest, params["compression"])
        self.devices = [SourceDevice(item["name"], item["path"], item["format"]) for item in params["devices"]]
        self.configs = [_read_config(item) for item in params["configs"]]
        self.uuid: str | None = params["uuid"]
        self.ctime: int | None = params["ctime"]
        self.with_content: bool = params["config_content"]

    def foresee(self) -> Header:
        """The header that the archive would get; zero stands for what only the writing decides."""
        devices = []
        for number, device in enumerate(self.devices, 1):
            with open_source(device.path, device.format, os.path.dirname(self.dest)) as image:
                devices.append(Device(number, device.name, -(-image.size // SECTOR_SIZE) * SECTOR_SIZE))
        uuid = bytes(16) if self.uuid is None else uuid_module.UUID(self.uuid).bytes
        return Header(uuid, self.ctime or 0, tuple(devices), tuple(self.configs), 0)

    def describe_foreseen(self, header: Header) -> dict[str, t.Any]:
        """The archive as it would be: what is not known yet is None."""
        standard = vzdump.parse_name(self.dest)
        conf = next((config.data for config in self.configs if config.name == vzdump.CONFIG_NAME), None)
        return {
            "path": self.dest,
            "size": None,
            "compression": self.compression,
            "version": VERSION,
            "uuid": None if self.uuid is None else header.uuid_text,
            "ctime": self.ctime,
            "header_size": None,
            "integrity": self.module.params["integrity"],
            "devices": [
                {"dev_id": device.dev_id, "name": device.name, "size": device.size} for device in header.devices
            ],
            "configs": [
                {
                    "name": config.name,
                    "size": len(config.data),
                    "content": config.data.decode("utf-8", "replace") if self.with_content else None,
                }
                for config in self.configs
            ],
            "vmid": None if standard is None else standard.vmid,
            "timestamp": None if standard is None else standard.timestamp,
            "vm": None if conf is None else vzdump.parse_config(conf),
            "notes": vzdump.read_notes(self.dest),
            "protected": vzdump.is_protected(self.dest),
        }

    def read_before(self) -> tuple[Header | None, str]:
        """The header of the archive that is there, if any, and the text that stands for it in the diff."""
        if not os.path.lexists(self.dest):
            return None, ""
        try:
            header, compression, _problems = read_header(self.dest)
        except VmaError as error:
            return None, f"{error}\n"
        return header, _text(header, compression, header.uuid_text, header.ctime)


def _text(header: Header, compression: str, uuid: str | None, ctime: int | None) -> str:
    """An archive as the diff shows it, a line for each part."""
    lines = [
        f"compression: {compression}",
        f"uuid: {'decided when it is written' if uuid is None else uuid}",
        f"ctime: {'decided when it is written' if ctime is None else ctime}",
        *(f"device {device.name}: {device.size} bytes" for device in header.devices),
        *(f"config {config.name}: {fingerprint(config.data)}" for config in header.configs),
    ]
    return "".join(f"{line}\n" for line in lines)


def _diff_contents(before: Header | None, after: Header) -> list[dict[str, str]]:
    old = {} if before is None else {config.name: config.data for config in before.configs}
    new = {config.name: config.data for config in after.configs}
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return [content_diff(name, old.get(name), new.get(name)) for name in names]


def run(module: AnsibleModule) -> dict[str, t.Any]:
    """Make the archive, if need be, and return the task's results."""
    check_positive(module, "bandwidth_limit", "threads")
    params = module.params
    task = _Task(module)
    before, text_before = task.read_before() if module._diff else (None, "")
    created = create(
        task.dest,
        task.devices,
        task.configs,
        compression=params["compression"],
        level=params["compression_level"],
        threads=params["threads"],
        integrity=params["integrity"],
        overwrite=params["overwrite"],
        uuid=params["uuid"],
        ctime=params["ctime"],
        bytes_per_second=params["bandwidth_limit"],
        dry_run=module.check_mode,
    )
    if created.changed and module.check_mode:
        header = task.foresee()
        archive = task.describe_foreseen(header)
        uuid, ctime = archive["uuid"], archive["ctime"]
    else:
        header, compression, problems = read_header(task.dest)
        if problems:
            raise ArchiveError(problems[0], file=task.dest)
        # With overwrite=never nothing was read that would tell whether there are digests.
        integrity = None if params["overwrite"] == "never" and not created.changed else params["integrity"]
        archive = describe(task.dest, header, compression, integrity=integrity, with_content=task.with_content)
        uuid, ctime = header.uuid_text, header.ctime
    differs, differences = set_attributes(module, task.dest, is_new=created.is_new)
    result = {
        "archive": archive,
        "changed": created.changed or differs,
        "reason": created.reason,
        "read_bytes": created.read_bytes,
        "data_bytes": created.data_bytes,
        "elapsed": round(created.elapsed, 3),
    }
    if module._diff:
        contents = _diff_contents(before, header) if task.with_content else []
        text_after = _text(header, archive["compression"], uuid, ctime)
        result["diff"] = [text_diff(task.dest, text_before, text_after), *contents, *differences]
    return result


def main() -> t.NoReturn:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "dest": {"type": "path", "required": True},
            "devices": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "name": {"type": "str", "required": True},
                    "path": {"type": "path", "required": True},
                    "format": {"type": "str", "choices": list(FORMATS), "default": "raw"},
                },
            },
            "configs": {
                "type": "list",
                "elements": "dict",
                "default": [],
                # Ansible logs a list of dicts as one text, in which it does not find a secret of several lines.
                "no_log": True,
                "options": {
                    "name": {"type": "str", "required": True},
                    "src": {"type": "path"},
                    "content": {"type": "str", "no_log": True},
                },
                "mutually_exclusive": [("src", "content")],
                "required_one_of": [("src", "content")],
            },
            "compression": {"type": "str", "choices": ["auto", "none", "zstd", "gzip"], "default": "auto"},
            "compression_level": {"type": "int"},
            "threads": {"type": "int"},
            "integrity": {"type": "str", "choices": ["sha256", "none"], "default": "sha256"},
            "overwrite": {"type": "str", "choices": list(OVERWRITE), "default": "changed"},
            "uuid": {"type": "str"},
            "ctime": {"type": "int"},
            "bandwidth_limit": {"type": "bytes"},
            "config_content": {"type": "bool", "default": False},
        },
        add_file_common_args=True,
        supports_check_mode=True,
    )
    # The names of configs are no secrets, and neither are contents that the task asks to see.
    module.no_log_values = (
        set()
        if module.params["config_content"]
        else {item["content"] for item in module.params["configs"] if item["content"]}
    )
    with failing(module):
        result = run(module)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
