#!/usr/bin/python

# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: vma_info
short_description: Describe and verify VMA archives
version_added: 0.1.0
author:
  - The vmbackup.vma contributors (@vmbackup)
description:
  - Tell what VMA archives hold, from their headers alone, in milliseconds at any size.
  - With O(verify), tell whether they are whole, and name every problem with its place.
  - All archives are looked at, whatever is wrong with one of them. The task then fails if any has a problem, with all
    results returned.
requirements:
  - libzstd (package C(libzstd1) or C(libzstd)), or the command C(zstd), for archives that are compressed with zstd
  - lzop, for archives that are compressed with it
extends_documentation_fragment:
  - vmbackup.vma._attributes
  - vmbackup.vma._attributes.actiongroup_vma
attributes:
  check_mode:
    support: full
    details:
      - The module never changes anything.
  diff_mode:
    support: N/A
    details:
      - The module never changes anything.
  idempotent:
    support: full
    details:
      - The module never changes anything.
options:
  path:
    description:
      - Archives, globs such as V(/srv/backup/dump/vzdump-qemu-100-*.vma.zst), or folders.
      - Of a folder, the files are meant that are named like archives, C(*.vma) with or without the ending of a
        compression. Folders in it are not searched.
      - Whether an archive is compressed is told by its content.
      - Give a path that contains a comma as an element of a list, because Ansible splits a plain string there.
    type: list
    elements: path
    required: true
  verify:
    description:
      - How closely to look at each archive.
      - V(none) reads its header alone.
      - V(structure) checks the header of every extent and that every device is complete. The data is not read, unless
        the archive is compressed.
      - V(content) reads everything and checks the data against the digests in the archive, if it has any. What
        M(vmbackup.vma.vma_create) made has them by default. Archives without them, like those of Proxmox VE, can hold
        changed data that nothing reveals; RV(archives[].integrity) tells them apart.
    type: str
    choices: [none, structure, content]
    default: none
  config_content:
    description:
      - Whether RV(archives[].configs[].content) shows the content of configs. They may hold secrets, for example a
        password for cloud-init.
    type: bool
    default: true
  threads:
    description:
      - How many threads check the data with O(verify=content). By default as many as there are processors that the
        module may use.
    type: int
notes:
  - Configs may hold secrets, and results are printed at higher verbosity and kept by callback plugins. Use
    O(config_content=false) or C(no_log) where that matters.
seealso:
  - module: vmbackup.vma.vma_create
  - module: vmbackup.vma.vma_extract
"""

EXAMPLES = r"""
---
- name: See what an archive holds
  vmbackup.vma.vma_info:
    path: /srv/backup/dump/vzdump-qemu-100-2026_01_31-22_15_00.vma.zst
  register: backup

- name: Show the VM's name and its disks
  ansible.builtin.debug:
    msg: "{{ backup.archives[0].vm.name }}: {{ backup.archives[0].devices | map(attribute='name') | join(', ') }}"

- name: Prove that all archives of a folder are whole
  vmbackup.vma.vma_info:
    path: /srv/backup/dump
    verify: content
    config_content: false

- name: Find damaged archives and go on
  vmbackup.vma.vma_info:
    path: /srv/backup/dump/*.vma.zst
    verify: structure
  register: checked
  ignore_errors: true

- name: Name them
  ansible.builtin.debug:
    msg: "{{ checked.archives | selectattr('error', 'defined') | map(attribute='path') }}"
"""

RETURN = r"""
archives:
  description:
    - The archives, in the order in which O(path) names them, each once.
    - Of what cannot be opened there are RV(archives[].path) and RV(archives[].error) alone.
  returned: success, and failure where an archive has a problem
  type: list
  elements: dict
  contains:
    path:
      description: The file.
      returned: always
      type: str
      sample: /srv/backup/dump/vzdump-qemu-100-2026_01_31-22_15_00.vma.zst
    size:
      description: The size of the file in bytes.
      returned: where the file can be opened
      type: int
      sample: 1287651328
    compression:
      description:
        - V(none), V(zstd), V(gzip), V(lzo) or V(bzip2), as the content tells; V(null) where the header cannot be read.
      returned: where the file can be opened
      type: str
      sample: zstd
    version:
      description: The version of the format; V(null) where the header cannot be read.
      returned: where the file can be opened
      type: int
      sample: 1
    uuid:
      description: The archive's UUID; V(null) where the header cannot be read.
      returned: where the file can be opened
      type: str
      sample: 5d6417dd-461f-44a9-8553-14f8d37622f8
    ctime:
      description: When the archive was created, in seconds since the epoch; V(null) where the header cannot be read.
      returned: where the file can be opened
      type: int
      sample: 1769894100
    header_size:
      description: The size of the header in bytes; V(null) where it cannot be read.
      returned: where the file can be opened
      type: int
      sample: 12800
    integrity:
      description:
        - V(sha256) where every extent carries a digest of its data, V(none) where not.
        - V(null) where no extent was looked at, as with O(verify=none).
      returned: where the file can be opened
      type: str
      sample: sha256
    devices:
      description: The devices in the archive.
      returned: where the file can be opened
      type: list
      elements: dict
      sample:
        - dev_id: 1
          name: drive-scsi0
          size: 34359738368
      contains:
        dev_id:
          description: The number of the device within the archive.
          returned: always
          type: int
          sample: 1
        name:
          description: The device's name.
          returned: always
          type: str
          sample: drive-scsi0
        size:
          description: The device's size in bytes.
          returned: always
          type: int
          sample: 34359738368
    configs:
      description: The configs in the archive.
      returned: where the file can be opened
      type: list
      elements: dict
      sample:
        - name: qemu-server.conf
          size: 20
          content: "name: web\ncores: 2\n"
      contains:
        name:
          description: The config's name.
          returned: always
          type: str
          sample: qemu-server.conf
        size:
          description: The config's size in bytes.
          returned: always
          type: int
          sample: 20
        content:
          description: The config as text; V(null) with O(config_content=false).
          returned: always
          type: str
          sample: "name: web\ncores: 2\n"
    vmid:
      description: The VM's number, from a standard file name of Proxmox VE; V(null) for other names.
      returned: where the file can be opened
      type: int
      sample: 100
    timestamp:
      description:
        - The time of the backup in seconds since the epoch, from a standard file name, which has the managed host's
          local time; V(null) for other names.
      returned: where the file can be opened
      type: int
      sample: 1769894100
    vm:
      description: What the config V(qemu-server.conf) says of the VM; V(null) without one.
      returned: where the file can be opened
      type: dict
      sample:
        name: web
        memory: 2048
        cores: 2
        ostype: l26
        disks:
          - drive: scsi0
            setting: local-lvm:vm-100-disk-0,size=32G
            device: drive-scsi0
            storage: local-lvm
            format: raw
      contains:
        name:
          description: The VM's name.
          returned: always, V(null) where it is not set
          type: str
          sample: web
        memory:
          description: The memory in MiB. So too C(balloon).
          returned: always, V(null) where it is not set
          type: int
          sample: 2048
        cores:
          description: The cores of each socket. So too C(sockets) and C(vcpus).
          returned: always, V(null) where it is not set
          type: int
          sample: 2
        ostype:
          description: The guest's system. So too C(bios), C(machine), C(cpu), C(scsihw), C(boot) and C(agent).
          returned: always, V(null) where it is not set
          type: str
          sample: l26
        description:
          description: The VM's notes.
          returned: always, V(null) where it is not set
          type: str
          sample: Serves the intranet
        disks:
          description:
            - The drives, each with its C(setting) in the config, and, where the config has a map line for it, the
              C(device) in the archive, the C(storage) and the C(format).
          returned: always
          type: list
          elements: dict
          sample:
            - drive: scsi0
              setting: local-lvm:vm-100-disk-0,size=32G
              device: drive-scsi0
              storage: local-lvm
              format: raw
    notes:
      description: The text of the file with the ending C(.notes) beside the archive; V(null) without one.
      returned: where the file can be opened
      type: str
      sample: before the upgrade
    protected:
      description: Whether a file with the ending C(.protected) stands beside the archive.
      returned: where the file can be opened
      type: bool
      sample: false
    error:
      description:
        - Why the archive, or a part of its header, cannot be read; with O(verify), its first problem.
      returned: where there is a problem
      type: dict
      sample:
        kind: not_vma
        message: expected an archive, plain or compressed with zstd, gzip, lzo or bzip2; it begins with 89 50 4e 47
        offset: 0
        file: /srv/backup/dump/picture.vma
      contains:
        kind:
          description:
            - The kind of problem.
            - One of V(not_vma), V(header_checksum), V(header_invalid), V(unsafe_name), V(extent_magic),
              V(extent_checksum), V(extent_uuid), V(extent_block_count), V(extent_digest), V(truncated),
              V(trailing_data), V(unknown_device), V(cluster_out_of_range), V(cluster_duplicate), V(cluster_missing),
              V(vmstate_order), V(decompression) and V(read_error).
            - Or V(request) where the file cannot be opened, V(tool) where a tool is missing.
          returned: always
          type: str
          sample: not_vma
        message:
          description: What is wrong.
          returned: always
          type: str
          sample: expected an archive, plain or compressed with zstd, gzip, lzo or bzip2; it begins with 89 50 4e 47
        offset:
          description: Where in the uncompressed archive, in bytes from its start.
          returned: where known
          type: int
          sample: 0
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
        file:
          description: The file that it is about.
          returned: always
          type: str
          sample: /srv/backup/dump/picture.vma
        remedy:
          description: What to do about it.
          returned: where known
          type: str
          sample: Name a file that Proxmox VE or vma_create made; other archive formats are not read.
    verification:
      description: What the verification found.
      returned: with O(verify), where the file can be opened
      type: dict
      sample:
        level: content
        ok: false
        problems:
          - kind: extent_digest
            message: the extent's bytes do not match its digest
            offset: 3879424
        counts:
          extent_digest: 1
        devices:
          - name: drive-scsi0
            whole: false
        good_until: 3879424
        extents: 2
        clusters: 118
        data_bytes: 3866624
        zero_bytes: 3866624
        read_bytes: 3880448
        elapsed: 0.021
      contains:
        level:
          description: The level that was asked for with O(verify).
          returned: always
          type: str
          sample: content
        ok:
          description: Whether nothing is wrong, as far as this level tells.
          returned: always
          type: bool
          sample: false
        problems:
          description:
            - The problems by offset, at most 1000 of them.
            - Each has C(kind), C(message) and, where they are known, C(offset), C(device) and C(cluster), with the same
              meaning as in RV(archives[].error).
          returned: always
          type: list
          elements: dict
          sample:
            - kind: extent_digest
              message: the extent's bytes do not match its digest
              offset: 3879424
        counts:
          description: How many problems there are of each kind, those beyond the first 1000 included.
          returned: always
          type: dict
          sample:
            extent_digest: 1
        devices:
          description: For each device, whether all of it is there and nothing of it is known to be wrong.
          returned: always
          type: list
          elements: dict
          sample:
            - name: drive-scsi0
              whole: false
        good_until:
          description: The offset in the uncompressed archive up to which nothing is wrong.
          returned: always
          type: int
          sample: 3879424
        extents:
          description: How many extents were found.
          returned: always
          type: int
          sample: 2
        clusters:
          description: How many clusters they hold.
          returned: always
          type: int
          sample: 118
        data_bytes:
          description: How many bytes of the devices the archive stores.
          returned: always
          type: int
          sample: 3866624
        zero_bytes:
          description: How many bytes of the devices are zero blocks, which the archive leaves out.
          returned: always
          type: int
          sample: 3866624
        read_bytes:
          description: How many bytes of the uncompressed archive were read.
          returned: always
          type: int
          sample: 3880448
        elapsed:
          description: How long it took, in seconds.
          returned: always
          type: float
          sample: 0.021
  sample:
    - path: /srv/backup/dump/vzdump-qemu-100-2026_01_31-22_15_00.vma.zst
      size: 1287651328
      compression: zstd
      version: 1
      uuid: 5d6417dd-461f-44a9-8553-14f8d37622f8
      ctime: 1769894100
      header_size: 12800
      integrity:
      devices:
        - dev_id: 1
          name: drive-scsi0
          size: 34359738368
      configs:
        - name: qemu-server.conf
          size: 20
          content: "name: web\ncores: 2\n"
      vmid: 100
      timestamp: 1769894100
      vm:
        name: web
        cores: 2
      notes: before the upgrade
      protected: false
error:
  description:
    - What ended the task before all archives were looked at.
  returned: where a signal or an option did that
  type: dict
  sample:
    kind: interrupted
    message: interrupted by SIGTERM; files that were not finished were removed
"""

import typing as t

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.vmbackup.vma.plugins.module_utils._vma_module import (
    check_positive,
    error_fields,
    failing,
    read_header,
)
from ansible_collections.vmbackup.vma.plugins.module_utils.vma.errors import ArchiveError, VmaError
from ansible_collections.vmbackup.vma.plugins.module_utils.vma.info import describe, find_archives
from ansible_collections.vmbackup.vma.plugins.module_utils.vma.verify import LEVELS, Verification, verify

_PROBLEMS_SHOWN = 3


class _Collection:
    """The archives that were looked at: a result for each, and a paragraph for each that has a problem."""

    def __init__(self) -> None:
        self.archives: dict[str, dict[str, t.Any]] = {}
        self.complaints: list[str] = []

    def add(self, path: str, archive: dict[str, t.Any]) -> None:
        """Keep the result of an archive that nothing is wrong with."""
        self.archives[path] = archive

    def add_bad(self, path: str, archive: dict[str, t.Any], error: VmaError) -> None:
        """Keep the result of one that has a problem."""
        self.archives[path] = {"path": path, **archive, "error": {"file": path, **error_fields(error)}}
        self.complaints.append(str(error))

    def add_verified(self, path: str, archive: dict[str, t.Any], verification: Verification) -> None:
        """Keep the result of a verification."""
        archive["verification"] = verification.as_dict()
        if verification.ok:
            self.add(path, archive)
            return
        self.add_bad(path, archive, ArchiveError(verification.problems[0], file=path))
        self.complaints[-1] = _complaint(path, verification)


def _complaint(path: str, verification: Verification) -> str:
    """What to tell whoever is woken up by it: the first problems, how many more there are, and what is still good."""
    shown = verification.problems[:_PROBLEMS_SHOWN]
    rest = sum(verification.counts.values()) - len(shown)
    lines = [f"{path}:", *(f"  {problem}" for problem in shown)]
    if rest:
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(verification.counts.items()))
        lines.append(f"  and {rest} more; in all {counts}")
    whole = [name for name, is_whole in verification.whole.items() if is_whole]
    if whole:
        lines.append(f"  Still whole: {', '.join(whole)}.")
    lines.append(f"  {ArchiveError(shown[0]).remedy}")
    return "\n".join(lines)


def _look_at(path: str, params: dict[str, t.Any], collection: _Collection) -> None:
    """Describe one archive, verify it where that is asked for, and keep the result."""
    with_content = params["config_content"]
    try:
        if params["verify"] != "none":
            found = verify(path, params["verify"], threads=params["threads"])
            archive = describe(
                path, found.header, found.compression, integrity=found.integrity, with_content=with_content
            )
            collection.add_verified(path, archive, found.verification)
            return
        header, compression, problems = read_header(path)
        archive = describe(path, header, compression, with_content=with_content)
        if problems:
            collection.add_bad(path, archive, ArchiveError(problems[0], file=path))
        else:
            collection.add(path, archive)
    except ArchiveError as error:
        collection.add_bad(path, describe(path, None, None, with_content=with_content), error)
    except VmaError as error:
        collection.add_bad(path, {}, error)


def run(module: AnsibleModule) -> tuple[list[dict[str, t.Any]], list[str]]:
    """Look at all archives. Returns a result for each, and the complaints about those that have problems."""
    check_positive(module, "threads")
    collection = _Collection()
    for path in module.params["path"]:
        try:
            found = find_archives([path])
        except VmaError as error:
            collection.add_bad(path, {}, error)
            continue
        if not found:
            module.warn(f"No archives were found at {path}.")
        for archive in found:
            if archive not in collection.archives:
                _look_at(archive, module.params, collection)
    return list(collection.archives.values()), collection.complaints


def main() -> t.NoReturn:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "list", "elements": "path", "required": True},
            "verify": {"type": "str", "choices": list(LEVELS), "default": "none"},
            "config_content": {"type": "bool", "default": True},
            "threads": {"type": "int"},
        },
        supports_check_mode=True,
    )
    with failing(module):
        archives, complaints = run(module)
    if complaints:
        summary = f"{len(complaints)} of {len(archives)} archives have problems."
        module.fail_json(msg="\n".join([summary, *complaints]), archives=archives)
    module.exit_json(changed=False, archives=archives)


if __name__ == "__main__":
    main()
