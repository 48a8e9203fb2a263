# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A Ceph cluster for tests: one monitor, one OSD that keeps its objects in memory, one pool called rbd.

    python3 tests/machines/ceph_cluster.py up /var/tmp/ceph      start one; 10 s
    rbd --conf /var/tmp/ceph/ceph.conf ls -l                     use it
    python3 tests/machines/ceph_cluster.py down /var/tmp/ceph    stop it; nothing is left

It listens on 127.0.0.1 at a free port, knows no passwords, and needs the packages ceph-mon, ceph-osd and ceph-common.
It ends with the process that has it as a context; one that was started by hand stays until it is stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
import typing as t
import uuid

TIMEOUT = 60
"""Seconds that the cluster may take until its OSD is up. It takes 3 on an idle machine."""
ANSWER_TIMEOUT = 10
"""Seconds until a question is asked again."""
_POLL = 0.1

CONF = """\
[global]
fsid = {fsid}
mon host = v1:127.0.0.1:{port}
auth cluster required = none
auth service required = none
auth client required = none
osd pool default size = 1
osd pool default min size = 1
mon allow pool size one = true
osd crush chooseleaf type = 0
ms bind ipv4 = true
run dir = {folder}
admin socket = {folder}/$name.asok
pid file = {folder}/$name.pid
log file = {folder}/$name.log
crash dir = {folder}
mon data avail crit = -1
rbd default features = {features}
[mon.a]
mon data = {folder}/mon
[osd.0]
osd data = {folder}/osd
osd objectstore = memstore
memstore device bytes = 1073741824
osd memory target = 939524096
osd class update on start = false
osd crush update on start = false
"""
# A monitor refuses to start where no more of the file system is free than "mon data avail crit", in whole percent.
# An OSD that asks the monitor for something as it starts now and then does so before it knows the fsid of its cluster:
# then it is refused, and ends.
FEATURES = 1 + 4 + 8 + 16
"""Layering, exclusive-lock, object-map and fast-diff: what images have by default, without deep-flatten."""


class ClusterError(Exception):
    """The cluster cannot be started."""


class Cluster:
    """A cluster whose files are in a folder."""

    def __init__(self, folder: pathlib.Path, *, outlive: bool = False) -> None:
        """It ends with this process unless it is to C(outlive) it."""
        self.folder = folder.resolve()
        self.conf = self.folder / "ceph.conf"
        self._guard = [] if outlive else ["setpriv", "--pdeathsig", "KILL"]
        self._daemons: list[subprocess.Popen[bytes]] = []

    def run(self, *command: str, timeout: float = TIMEOUT) -> str:
        """Run one of Ceph's tools. Raises: ClusterError."""
        environment = {**os.environ, "CEPH_CONF": str(self.conf), "CEPH_ARGS": ""}
        try:
            done = subprocess.run(
                command, check=False, capture_output=True, text=True, env=environment, timeout=timeout
            )
        except subprocess.TimeoutExpired as error:
            raise ClusterError(f"{' '.join(command)} gave no answer in {timeout} seconds") from error
        if done.returncode:
            raise ClusterError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr.strip()}")
        return done.stdout

    def start(self) -> None:
        """Start it in the folder, which must be new. Raises: ClusterError."""
        self.folder.mkdir(parents=True)
        fsid, osd = str(uuid.uuid4()), str(uuid.uuid4())
        port = _free_port()
        self.conf.write_text(CONF.format(fsid=fsid, port=port, folder=self.folder, features=FEATURES), encoding="utf-8")
        monmap = str(self.folder / "monmap")
        self.run("monmaptool", "--create", "--addv", "a", f"[v1:127.0.0.1:{port}]", "--fsid", fsid, monmap)
        self.run("ceph-mon", "-i", "a", "--mkfs", "--monmap", monmap)
        self._start_daemon("ceph-mon", "-i", "a")
        self._wait_until("quorum", "ceph", "mon", "stat")
        self._wait_until("0", "ceph", "osd", "create", osd)
        (self.folder / "osd").mkdir()
        self.run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd, "--no-mon-config")
        self._start_daemon("ceph-osd", "-i", "0")
        self._wait_until("1 up", "ceph", "osd", "stat")
        self._wait_until("", "ceph", "osd", "crush", "add", "osd.0", "1.0", "root=default", "host=here")
        self._wait_until("", "ceph", "osd", "pool", "create", "rbd", "8")
        self._wait_until("", "ceph", "osd", "pool", "application", "enable", "rbd", "rbd")

    def _wait_until(self, words: str, *command: str) -> None:
        """Ask until the answer has these words. A monitor that is just starting refuses what it later allows."""
        deadline = time.monotonic() + TIMEOUT
        while True:
            try:
                answer = self.run(*command, timeout=ANSWER_TIMEOUT)
                if words in answer:
                    return
            except ClusterError as error:
                answer = str(error)
            if any(daemon.poll() is not None for daemon in self._daemons):
                raise ClusterError(f"a daemon has ended:\n{self._ends_of_logs()}")
            if time.monotonic() > deadline:
                raise ClusterError(f"no {words!r} after {TIMEOUT} seconds: {answer}\n{self._ends_of_logs()}")
            time.sleep(_POLL)

    def _ends_of_logs(self) -> str:
        logs = sorted([*self.folder.glob("*.log"), *self.folder.glob("*.out")])
        ends = [(path.name, path.read_text(encoding="utf-8", errors="replace").splitlines()[-20:]) for path in logs]
        return "\n".join(f"{name}: {line}" for name, lines in ends for line in lines)

    def _start_daemon(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.out").open("wb") as log:
            process = subprocess.Popen(
                [*self._guard, *command, "--foreground", "--conf", str(self.conf)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._daemons.append(process)
        (self.folder / f"{command[0]}.started").write_text(f"{process.pid}\n", encoding="ascii")

    def stop(self) -> None:
        """Stop it, if it runs, and remove its folder."""
        # Without its monitor an OSD waits for it before it ends.
        for daemon in ("ceph-osd", "ceph-mon"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError):
                pid = int((self.folder / f"{daemon}.started").read_text(encoding="ascii"))
                # Process numbers come again.
                while str(self.conf).encode() in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)
                    with contextlib.suppress(ChildProcessError):
                        os.waitpid(pid, 0)
                    time.sleep(_POLL)
        shutil.rmtree(self.folder, ignore_errors=True)


def missing_tools() -> list[str]:
    """What the machine lacks, in words; nothing where all is there."""
    tools = {"ceph-mon": "ceph-mon", "ceph-osd": "ceph-osd", "ceph": "ceph-common", "rbd": "ceph-common"}
    return [f"{tool} of {package}" for tool, package in tools.items() if shutil.which(tool) is None]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(folder: pathlib.Path) -> t.Iterator[Cluster]:
    """A cluster for as long as the context lasts. Raises: ClusterError."""
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def main() -> None:
    """Start or stop a cluster."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["up", "down"])
    parser.add_argument("folder", type=pathlib.Path, help="a new folder for the cluster's files")
    options = parser.parse_args()
    cluster = Cluster(options.folder, outlive=True)
    if options.action == "down":
        cluster.stop()
        return
    began = time.monotonic()
    try:
        cluster.start()
    except ClusterError as error:
        cluster.stop()
        sys.exit(str(error))
    print(f"up after {time.monotonic() - began:.0f} s: rbd --conf {cluster.conf} ls")


if __name__ == "__main__":
    main()
