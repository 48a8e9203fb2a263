# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""libvirt, as far as backups need it, by its own command: it is on every host that runs libvirt.

A domain is named by its UUID here: virsh takes a name that is a number for the number of a running domain.
"""

from __future__ import annotations

import os
import shutil
import time
import typing as t

from ..vma.errors import ToolError
from .command import CommandError, run
from .errors import GuestError

RUNNING_STATES = ("running", "idle", "paused", "pmsuspended", "crashed", "in shutdown")
"""States in which a QEMU has the disks open."""
_PURPOSE = "to back up a libvirt domain"
_AGENT_TIMEOUT = 60.0
_JOB_TIMEOUT = 60.0
_COMMIT_TIMEOUT = 24 * 3600.0
_POLL = 0.1
_NO_BLOCK_JOB = ("not found", "no active", "No active", "not have an active")
"""How libvirt says that there is no job on a disk: the last is libvirt 7's."""

_NO_AGENT = ("agent is not configured", "agent is not connected")
_SILENT_AGENT = ("respond to synchronization", "not available for now")
"""How libvirt says that no agent runs in the guest, and that it asked an agent for nothing, as that did not answer."""


class State(t.NamedTuple):
    """The state of a domain as C(virsh domstate --reason) tells it."""

    name: str
    reason: str

    @property
    def has_process(self) -> bool:
        """Whether a QEMU has the disks open."""
        return self.name in RUNNING_STATES

    @property
    def is_starved(self) -> bool:
        """Whether the guest was paused because a write failed, as it is where a scratch file cannot grow."""
        return self.name == "paused" and self.reason == "I/O error"


def _virsh(*arguments: str, timeout: float = 120, remedy: str | None = None) -> str:
    uri = os.environ.get("LIBVIRT_DEFAULT_URI", "qemu:///system")
    return run(["virsh", "-q", "-c", uri, *arguments], purpose=_PURPOSE, timeout=timeout, remedy=remedy)


def list_domains() -> dict[str, str]:
    """All domains of the host: names and UUIDs. Raises: ToolError."""
    lines = (line.strip().partition(" ") for line in _virsh("list", "--all", "--uuid", "--name").splitlines())
    return {name.strip(): uuid for uuid, _blank, name in lines if name}


def find_domain(name: str) -> str | None:
    """The UUID of the domain called so; None where the host has no libvirt, or libvirt no such domain.

    Raises: ToolError where libvirt does not answer.
    """
    return None if shutil.which("virsh") is None else list_domains().get(name)


def get_state(domain: str) -> State | None:
    """The state of a domain; None where libvirt knows no such domain. Raises: ToolError."""
    try:
        said = _virsh("domstate", "--reason", "--domain", domain).strip()
    except CommandError as error:
        if "failed to get domain" in error.said or "Domain not found" in error.said:
            return None
        raise
    state, _blank, reason = said.partition(" (")
    return State(state, reason.rstrip(")"))


def dump_xml(domain: str, *, inactive: bool = False, secrets: bool = False) -> str:
    """The definition of a domain as it runs now, or C(inactive) as it will be started. Raises: ToolError.

    C(secrets) includes passwords, without which it must not be defined anew.
    """
    options = ["--inactive"] * inactive + ["--security-info"] * secrets
    return _virsh("dumpxml", "--domain", domain, *options)


def define(path: str) -> None:
    """Define a domain by the XML in a file, in place of its old definition. Raises: ToolError."""
    _virsh("define", path)


def get_disk_size(domain: str, target: str) -> tuple[int, int]:
    """The size of a domain's disk, and what is allocated of it, in bytes. Raises: ToolError, GuestError."""
    said = _virsh("domblkinfo", "--domain", domain, "--device", target)
    values = dict(line.split(":", 1) for line in said.splitlines() if ":" in line)
    try:
        return int(values["Capacity"]), int(values["Allocation"])
    except (KeyError, ValueError) as error:
        raise GuestError(f"libvirt does not tell the size of the disk {target} of {domain}: {said!r}") from error


def freeze(domain: str) -> int:
    """Let the guest agent freeze the guest's file systems. Returns how many. Raises: ToolError."""
    said = _virsh("domfsfreeze", "--domain", domain, timeout=_AGENT_TIMEOUT)
    return int("".join(filter(str.isdigit, said)) or 0)


def is_without_agent(error: ToolError, *, unasked: bool = False) -> bool:
    """Whether a command to the agent failed as there is none, or C(unasked) as a silent one was not told of it."""
    known = _NO_AGENT + _SILENT_AGENT * unasked
    return isinstance(error, CommandError) and any(said in error.said for said in known)


def thaw(domain: str) -> None:
    """Let the guest agent thaw the guest's file systems, also where they were not frozen. Raises: ToolError."""
    remedy = f"The guest may stand still: start its agent anew, or restart it, or run: virsh domfsthaw {domain}"
    _virsh("domfsthaw", "--domain", domain, timeout=_AGENT_TIMEOUT, remedy=remedy)


def suspend(domain: str) -> None:
    """Let the guest stand still. Raises: ToolError."""
    _virsh("suspend", "--domain", domain)


def resume(domain: str) -> None:
    """Let a guest that stands still go on. Raises: ToolError."""
    _virsh("resume", "--domain", domain, remedy=f"Look at the guest, then run: virsh resume {domain}")


def begin_backup(domain: str, xml_path: str) -> None:
    """Start a backup job. Raises: CommandError."""
    _virsh("backup-begin", "--domain", domain, "--backupxml", xml_path)


def describe_backup(domain: str) -> str | None:
    """The XML of the backup job that runs, whoever began it; None where there is none. Raises: ToolError."""
    try:
        return _virsh("backup-dumpxml", "--domain", domain)
    except CommandError as error:
        # A virsh that does not know the command has no backup jobs.
        if any(said in error.said for said in ("no domain backup job", "domain is not running", "unknown command")):
            return None
        raise


def abort_backup(domain: str) -> None:
    """End the backup job, and wait until it is gone, which libvirt does not. Raises: ToolError, GuestError."""
    _virsh("domjobabort", "--domain", domain)
    deadline = time.monotonic() + _JOB_TIMEOUT
    while describe_backup(domain) is not None:
        if time.monotonic() > deadline:
            raise GuestError(f"the backup job of {domain} does not end", remedy=f"Run: virsh domjobabort {domain}")
        time.sleep(_POLL)


def put_overlays(domain: str, overlays: t.Mapping[str, str], others: t.Iterable[str]) -> None:
    """Put an overlay file on each of some disks (target device to new file), all at once; the others stay as they are.

    Raises: CommandError.
    """
    specs = [f"{target},snapshot=external,file={path.replace(',', ',,')}" for target, path in overlays.items()]
    specs += [f"{target},snapshot=no" for target in others]
    arguments = [argument for spec in specs for argument in ("--diskspec", spec)]
    _virsh("snapshot-create-as", "--domain", domain, "--disk-only", "--atomic", "--no-metadata", *arguments)


def abort_block_job(domain: str, target: str) -> None:
    """End a commit that is under way, if there is one: the guest goes on with its overlay. Raises: ToolError."""
    try:
        _virsh("blockjob", "--domain", domain, "--path", target, "--abort")
    except CommandError as error:
        if not any(words in error.said for words in _NO_BLOCK_JOB):
            raise


def commit_overlay(domain: str, target: str) -> None:
    """Write what an overlay holds into the file below, and let the guest go on with that. Raises: ToolError."""
    # Without --shallow libvirt commits into the lowest image of the chain, which other domains may share.
    how = ("--shallow", "--active", "--pivot", "--wait")
    _virsh("blockcommit", "--domain", domain, "--path", target, *how, timeout=_COMMIT_TIMEOUT)


def settle(domain: str) -> None:
    """Wait until libvirt has done with a running domain what it was asked for, by a virsh that is gone as well.

    Raises: ToolError, where that takes more than libvirt's half a minute too.
    """
    _virsh("dommemstat", "--domain", domain)  # any question that libvirt answers only between two changes


def get_process(name: str) -> int | None:
    """The number of the QEMU that libvirt began last for the domain called so; None where there is none any more."""
    for folder in ("/run/libvirt/qemu", "/var/run/libvirt/qemu"):
        try:
            with open(f"{folder}/{name}.pid", encoding="ascii") as file:
                pid = int(file.read())
            os.stat(f"/proc/{pid}")
        except (OSError, ValueError):
            continue
        return pid
    return None


def get_process_owner(name: str) -> int | None:
    """The user as which the QEMU of the running domain called so runs; None where that cannot be found out."""
    pid = get_process(name)
    try:
        return None if pid is None else os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return None


__all__ = (
    "State",
    "abort_backup",
    "abort_block_job",
    "begin_backup",
    "commit_overlay",
    "define",
    "describe_backup",
    "dump_xml",
    "find_domain",
    "freeze",
    "get_disk_size",
    "get_process",
    "get_process_owner",
    "get_state",
    "is_without_agent",
    "list_domains",
    "put_overlays",
    "resume",
    "settle",
    "suspend",
    "thaw",
)
