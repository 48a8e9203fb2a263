# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Which archives a retention keeps, by Proxmox VE's rules. Pure: no I/O, no clock, no time zone; it removes nothing.

The times are the digits of the names, which are local time of the host that made the archives.
"""

from __future__ import annotations

import dataclasses
import datetime
import os.path
import typing as t

from . import vzdump
from .errors import RequestError

BUCKETS: dict[str, str] = {
    "last": "%Y-%m-%d %H:%M:%S",
    "hourly": "%Y-%m-%d %H",
    "daily": "%Y-%m-%d",
    "weekly": "%G-W%V",
    "monthly": "%Y-%m",
    "yearly": "%Y",
}
"""The rules in the order in which they apply, and what the archives of one bucket have in common."""

_KEEP_ALL = "all"
_TIMES = ("%Y-%m-%d %H:%M:%S", "%Y-%m-%dT%H:%M:%S", "%Y%m%dT%H%M%S", "%Y_%m_%d-%H_%M_%S")


@dataclasses.dataclass(frozen=True)
class Archive:
    """An archive on a host. C(error) is the kind of problem that it is known to have."""

    path: str
    protected: bool = False
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Decision:
    """What becomes of an archive, and why."""

    path: str
    keep: bool
    reason: str

    @property
    def beside(self) -> list[str]:
        """The paths of the log and the notes, whether or not they are there, where they go with the archive."""
        if self.keep:
            return []
        return [self.path[: self.path.rindex(".vma")] + ".log", self.path + vzdump.NOTES_SUFFIX]


@dataclasses.dataclass
class _Candidate:
    """An archive that the rules are about. C(keep) is None as long as none has decided on it."""

    path: str
    time: datetime.datetime
    keep: bool | None = None
    reason: str = "no rule keeps it"


def choose(
    archives: t.Iterable[Archive],
    keep: t.Mapping[str, object],
    *,
    verified: t.Collection[str] = (),
    now: datetime.datetime | None = None,
) -> list[Decision]:
    """Decide which archives stay, in the order in which they are given.

    C(keep) has a number of 0 or more for any of BUCKETS, or C(all) being true; None is as if the key were not there.
    C(verified) are those archives that are known to have verified: a path, or a file name, which counts in any folder.
    C(now) is local time as in names. Without it, no archive is taken to be from the future.

    The archives of one VM in one folder are a group. Neither counted nor removed are those whose names are not
    standard, those that are protected, those that have an error, and those from the future.

    Raises: RequestError where C(keep) makes no sense, or an archive is listed twice.
    """
    quotas = _quotas(keep)
    decided: dict[str, Decision] = {}
    groups: dict[tuple[str, int], list[_Candidate]] = {}
    order: dict[str, None] = {}
    for archive in archives:
        path = os.path.normpath(archive.path)
        if path in order:
            raise RequestError(
                "this archive is listed twice, where each should be listed once",
                file=archive.path,
                remedy="Remove the repeated path from the list.",
            )
        order[path] = None
        named = _parse(path)
        if named is None:
            decided[path] = Decision(archive.path, True, "not a standard name")
            continue
        vmid, time = named
        exempt = _exemption(archive, time, now)
        if exempt is not None:
            decided[path] = Decision(archive.path, True, exempt)
        else:
            groups.setdefault((os.path.dirname(path), vmid), []).append(_Candidate(archive.path, time))
    names = {os.path.normpath(name) for name in verified}
    for group in groups.values():
        group.sort(key=lambda candidate: (candidate.time, candidate.path), reverse=True)
        _decide(group, quotas, names)
        for candidate in group:
            decided[os.path.normpath(candidate.path)] = Decision(candidate.path, bool(candidate.keep), candidate.reason)
    return [decided[path] for path in order]


def local_time(text: str) -> datetime.datetime:
    """The time that C(text) writes as C(2026-01-31 22:15:00), C(2026-01-31T22:15:00), C(20260131T221500) or as in
    archive names. Raises: RequestError, also where it has a time zone.
    """
    for form in _TIMES:
        try:
            return datetime.datetime.strptime(text, form)
        except ValueError:
            continue
    raise RequestError(
        f"expected a local time without a time zone, like '2026-01-31 22:15:00', found '{text}'",
        remedy="Use the local time of the host that keeps the archives, as its facts tell it.",
    )


def _quotas(keep: t.Mapping[str, object]) -> dict[str, int]:
    """The positive numbers of C(keep) in the order of the rules. Without any, everything is kept."""
    quotas: dict[str, int] = {}
    for key, value in keep.items():
        if key not in BUCKETS and key != _KEEP_ALL:
            raise RequestError(
                f"keep: expected {', '.join(BUCKETS)} or {_KEEP_ALL}, found '{key}'",
                remedy=f"Remove '{key}' from keep.",
            )
        if value is None:
            continue
        if key == _KEEP_ALL:
            if not isinstance(value, bool):
                raise RequestError(f"keep: expected '{key}' to be true or false, found {value!r}")
        elif isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise RequestError(f"keep: expected '{key}' to be a whole number of 0 or more, found {value!r}")
        elif value > 0:
            quotas[key] = value
    if keep.get(_KEEP_ALL) and quotas:
        rule, quota = next(iter(quotas.items()))
        raise RequestError(
            f"keep: '{_KEEP_ALL}' is true and '{rule}' is {quota}, which contradict each other",
            remedy="Give one or the other.",
        )
    return {rule: quotas[rule] for rule in BUCKETS if rule in quotas}


def _parse(path: str) -> tuple[int, datetime.datetime] | None:
    """The VM and the local time in a standard name; None for other names."""
    standard = vzdump.parse_name(path)
    if standard is None:
        return None
    vmid, time = os.path.basename(path).partition(".")[0].split("-", 3)[2:]
    if vmid != str(standard.vmid):
        return None
    try:
        return standard.vmid, datetime.datetime.strptime(time, "%Y_%m_%d-%H_%M_%S")
    except ValueError:
        return None


def _exemption(archive: Archive, time: datetime.datetime, now: datetime.datetime | None) -> str | None:
    """Why the rules leave this archive alone, or None where they do not."""
    if archive.protected:
        return "protected"
    if archive.error is not None:
        return f"has a problem: {archive.error}"
    if now is not None and time > now:
        return "from the future"
    return None


def _decide(newest_first: list[_Candidate], quotas: dict[str, int], verified: set[str]) -> None:
    """Decide on the archives of one group. What is left undecided goes."""
    if not quotas:
        for candidate in newest_first:
            candidate.keep, candidate.reason = True, "everything is kept"
    for rule, quota in quotas.items():
        _apply(rule, quota, newest_first)
    for candidate in newest_first:
        path = os.path.normpath(candidate.path)
        if path in verified or os.path.basename(path) in verified:
            if not candidate.keep:
                candidate.keep, candidate.reason = True, "last verified"
            break


def _apply(rule: str, quota: int, newest_first: list[_Candidate]) -> None:
    """Keep the newest archive of each of C(quota) buckets from which no earlier rule keeps one.

    The others of these buckets are decided on for good. That matters where a week lies in two months: what is in the
    week and older than the one kept is not there for the rule of the months.
    """
    form = BUCKETS[rule]
    covered = {candidate.time.strftime(form) for candidate in newest_first if candidate.keep}
    taken: set[str] = set()
    for candidate in newest_first:
        bucket = candidate.time.strftime(form)
        if candidate.keep is not None or bucket in covered:
            continue
        if bucket in taken:
            candidate.keep = False
        elif len(taken) == quota:
            break
        else:
            taken.add(bucket)
            candidate.keep, candidate.reason = True, f"{rule} {bucket}"


__all__ = (
    "BUCKETS",
    "Archive",
    "Decision",
    "choose",
    "local_time",
)
