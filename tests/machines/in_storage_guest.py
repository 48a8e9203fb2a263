# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A plugin for pytest: marked tests run on a host that has their storage, an emulated guest; see storage_guest.py.

A test module names this one in C(pytest_plugins) and marks such tests with C(@in_storage_guest). All those that were
chosen run in the guest by one pytest there, as root, when the first of them has its turn. They see the modules of the
collection, this folder and their own file, and no conftest. What they report is reported here.

C(VMBACKUP_STORAGE_GUEST) may name the folder of a guest that is up already; it stays up. C(VMBACKUP_STORAGE_ZFS=1)
asks for a guest with ZFS; without it, the tests that are marked with C(@in_storage_guest_with_zfs) are left out.

PYTEST_DONT_REWRITE: test modules import this one before pytest does.
"""

from __future__ import annotations

import contextlib
import io
import os
import pathlib
import shutil
import tarfile
import tempfile
import typing as t
from xml.etree import ElementTree

import pytest

from ansible_collections.vmbackup.vma.tests.machines import storage_guest, writer

ROOT = pathlib.Path(__file__).resolve().parents[2]
IN_GUEST = "VMBACKUP_IN_STORAGE_GUEST"
PLACE = "/root/ansible_collections/vmbackup/vma"
SHIPPED = ("plugins/module_utils", "tests/machines", "extensions/molecule/tools/check_instant.py")
RUN_SECONDS = 1200
"""What the first test may take, which waits for all of them, and for the guest to be built."""
WITH_ZFS = os.environ.get("VMBACKUP_STORAGE_ZFS") == "1"


class Outcome(t.NamedTuple):
    """What became of a test in the guest: C(kind) is passed, failed or skipped."""

    kind: str
    text: str = ""


class FailedInGuestError(Exception):
    """A test failed in the guest; the message is what pytest said there."""


class GuestItem(pytest.Item):
    """A test as it is here: its outcome in the guest."""

    def __init__(self, *, run: GuestRun, test: tuple[str, str], **kwargs: t.Any) -> None:
        super().__init__(**kwargs)
        self._run = run
        self._test = test
        self.add_marker(pytest.mark.timeout(RUN_SECONDS))

    def runtest(self) -> None:
        """Fail or skip as the test did in the guest."""
        outcome = self._run.outcome(self._test)
        if outcome.kind == "skipped":
            pytest.skip(outcome.text)
        if outcome.kind == "failed":
            raise FailedInGuestError(outcome.text)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], *args: t.Any, **kwargs: t.Any) -> t.Any:
        """Show what pytest said in the guest, not where that is told here."""
        if isinstance(excinfo.value, FailedInGuestError):
            return str(excinfo.value)
        return super().repr_failure(excinfo, *args, **kwargs)


class GuestRun:
    """The tests that are to run in the guest, each known by its file and its name, and what became of them."""

    def __init__(self) -> None:
        self._tests: list[tuple[str, str]] = []
        self._outcomes: dict[tuple[str, str], Outcome] | None = None

    def add(self, test: tuple[str, str]) -> None:
        """Have a test run with the others."""
        self._tests.append(test)

    def outcome(self, test: tuple[str, str]) -> Outcome:
        """What became of a test."""
        if self._outcomes is None:
            self._outcomes = self._run()
        return self._outcomes.get(test, Outcome("failed", "the test did not run in the guest"))

    def _run(self) -> dict[tuple[str, str], Outcome]:
        try:
            with _some_guest() as guest:
                _ship(guest, {path for path, _name in self._tests})
                return self._run_in(guest)
        except storage_guest.MachineError as error:
            return dict.fromkeys(self._tests, Outcome("failed", str(error)))

    def _run_in(self, guest: storage_guest.Guest) -> dict[tuple[str, str], Outcome]:
        names = [f"{path}::{name}" for path, name in self._tests]
        settings = f"PYTHONPATH=/root PYTHONDONTWRITEBYTECODE=1 {IN_GUEST}=1 VMBACKUP_STORAGE_ZFS={int(WITH_ZFS)}"
        options = "--noconftest -q -p no:cacheprovider --rootdir=. --junitxml=/tmp/junit.xml"
        arguments = "\n".join(names).encode() + b"\n"
        guest.run("cat > /tmp/tests", stdin=arguments)
        command = f"cd {PLACE} && rm -f /tmp/junit.xml && env {settings} xargs -d '\\n' python3 -m pytest {options}"
        done = guest.run(f"{command} < /tmp/tests", check=False)
        report = guest.run("cat /tmp/junit.xml", check=False)
        if report.returncode:
            said = done.stdout.decode(errors="replace") + done.stderr.decode(errors="replace")
            return dict.fromkeys(self._tests, Outcome("failed", f"pytest did not run in the guest:\n{said[-4000:]}"))
        return _read_report(report.stdout)


@contextlib.contextmanager
def _some_guest() -> t.Iterator[storage_guest.Guest]:
    present = os.environ.get("VMBACKUP_STORAGE_GUEST")
    if present is not None:
        yield storage_guest.Guest(pathlib.Path(present), 0)
        return
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="vma-storage-guest-"))
        yield stack.enter_context(storage_guest.running(pathlib.Path(folder, "guest"), zfs=WITH_ZFS))


def _ship(guest: storage_guest.Guest, files: t.Iterable[str]) -> None:
    """Bring to the guest what its tests import."""
    packed = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder, tarfile.open(fileobj=packed, mode="w") as archive:
        for name in (*SHIPPED, *sorted(files)):
            archive.add(ROOT / name, arcname=name, filter=_without_caches)
        archive.add(writer.compile_writer(pathlib.Path(folder)), arcname="writer")
    guest.run(f"rm -rf {PLACE} && mkdir -p {PLACE} && tar -x -C {PLACE}", stdin=packed.getvalue())


def _without_caches(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if "__pycache__" in member.name else member


def _read_report(report: bytes) -> dict[tuple[str, str], Outcome]:
    outcomes = {}
    for case in ElementTree.fromstring(report).iter("testcase"):
        path = case.get("classname", "").replace(".", "/") + ".py"
        outcome = Outcome("passed")
        for child in case:
            if child.tag == "skipped":
                outcome = Outcome("skipped", child.get("message", ""))
            elif child.tag in ("failure", "error"):
                outcome = Outcome("failed", child.text or child.get("message") or "")
        outcomes[path, case.get("name", "")] = outcome
    return outcomes


Test = t.TypeVar("Test", bound=t.Callable[..., None])


def in_storage_guest(test: Test) -> Test:
    """Have a test run in the guest."""
    test._storage_guest = "lvm"  # type: ignore[attr-defined]
    return test


def in_storage_guest_with_zfs(test: Test) -> Test:
    """Have a test run in the guest, where that has ZFS."""
    test._storage_guest = "zfs"  # type: ignore[attr-defined]
    return test


def _wanted(item: pytest.Item) -> str | None:
    return getattr(getattr(item, "function", None), "_storage_guest", None)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the guest's outcomes in the place of the marked tests, once the choice among all tests was made."""
    if IN_GUEST in os.environ:
        return
    if not WITH_ZFS:
        config.hook.pytest_deselected(items=[item for item in items if _wanted(item) == "zfs"])
        items[:] = [item for item in items if _wanted(item) != "zfs"]
    lacking = storage_guest.missing_tools() + ([] if shutil.which("cc") else ["cc of gcc and libc6-dev"])
    run = GuestRun()
    for position, item in enumerate(items):
        if _wanted(item) is None:
            continue
        if lacking:
            item.add_marker(pytest.mark.skip(reason=f"the storage guest needs {', '.join(lacking)}"))
        else:
            path = item.path.resolve().relative_to(ROOT)
            test = str(path), item.nodeid.partition("::")[2]
            run.add(test)
            assert item.parent is not None
            items[position] = GuestItem.from_parent(item.parent, name=item.name, run=run, test=test)
