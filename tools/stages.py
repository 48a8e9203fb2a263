# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Run test stages through nox and sum them up; tools/test calls this in the environment that it makes."""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import typing as t

ROOT = pathlib.Path(__file__).resolve().parents[1]
NOX = [sys.executable, "-m", "nox", "--noxfile", str(ROOT / "noxfile.py")]
CACHE = ROOT / ".nox" / ".cache"

LOGS = CACHE / "logs"

# How many run at the same time: more would slow down guests that are emulated, and have to answer in time.
AT_ONCE = 2

# What takes longest begins first, so that nothing else has to wait for it at the end.
FIRST = ("molecule",)

# Stages that run only when they are named, and why.
LEFT_OUT = {
    "zfs": "compiles the modules of ZFS, for many minutes, before it takes snapshots and restores in a guest",
    "bench": "wants a machine that does nothing else",
}

# Of the log of a stage that failed.
SHOWN_LINES = 100
SHOWN_WIDTH = 1000
TELLS_OF_FAILURE = re.compile(r"^(fatal|failed|FAILED|ERROR|E  )(?!.*RETRYING)")

# The one thing that CI may lack; a test that is skipped for anything else has not been run, and CI has failed.
INTERPRETER_IS_ABSENT = re.compile(r"\bPython (interpreter )?3\.\d+", re.IGNORECASE)


class Stage(t.NamedTuple):
    """What became of a stage; skipped and failed tests by their names."""

    name: str
    seconds: float
    passed: int
    failed: list[str]
    skipped: list[tuple[str, str]]

    @classmethod
    def from_report(cls, result: dict[str, t.Any]) -> Stage:
        """Read nox's report of a stage, and the counts that the stage left if it counts its tests."""
        name = result["signatures"][0]
        if result["result"] == "skipped":
            return cls(name, result["duration"], 0, [], [("the whole stage", result["reason"])])
        ok = result["result"] == "success"
        tally = CACHE / "tally" / f"{name}.json"
        counts: dict[str, t.Any] = json.loads(tally.read_text(encoding="utf-8")) if tally.exists() else {}
        failed = counts.get("failed", []) or ([] if ok else ["the stage itself"])
        return cls(name, result["duration"], counts.get("passed", int(ok)), failed, counts.get("skipped", []))

    def line(self) -> str:
        """Say in one line how the stage ended, and when, and below it what failed."""
        verdict = f"{len(self.failed)} FAILED, {self.passed} passed" if self.failed else f"{self.passed} passed"
        line = f"{time.strftime('%H:%M:%S')} {self.name}: {verdict}, {self.seconds:.0f} s"
        return "\n    ".join((line, *self.failed))


def known_stages() -> dict[str, str]:
    """Return the stages that run by default, with what they do."""
    listing = subprocess.run([*NOX, "--list", "--json"], check=False, stdout=subprocess.PIPE, cwd=ROOT)
    if listing.returncode != 0:
        sys.exit("nox cannot read the noxfile, see above")
    known = {stage["session"]: stage["description"] for stage in json.loads(listing.stdout)}
    # It does nothing but ask for stages that are listed themselves.
    known.pop("lint", None)
    return known


def choose(wanted: list[str]) -> list[str]:
    """Resolve what the caller named: stages, or the beginnings of their names up to a dash."""
    known = known_stages()
    chosen = []
    for name in wanted:
        matches = [stage for stage in known if stage.startswith(f"{name}-")]
        # nox knows more stages than those that run by default, and says what it does not know
        chosen += [name] if name in known or not matches else matches
    return chosen or list(known)


def run(stages: list[str], args: list[str]) -> list[Stage]:
    """Run the stages, some at the same time, and return what became of them, in their order.

    A single stage prints as it goes. Of several, each prints a line at its end, and the log of one that failed follows
    at the end of all, where a reader of a long output looks first.
    """
    LOGS.mkdir(parents=True, exist_ok=True)
    for leftover in (*CACHE.glob("*.json"), *CACHE.glob("tally/*.json"), *LOGS.iterdir()):
        leftover.unlink()
    if len(stages) == 1:
        return [run_stage(stages[0], args, None)]
    running: set[str] = set()
    failed: list[str] = []

    def run_with_log(name: str) -> Stage:
        running.add(name)
        with (LOGS / name).open("w", encoding="utf-8") as log:
            stage = run_stage(name, args, log)
        running.discard(name)
        if stage.failed:
            failed.append(name)
        print(stage.line(), flush=True)
        return stage

    def end(number: int, _frame: object) -> None:
        show_logs([*failed, *sorted(running)])
        print(f"\nEnded by {signal.Signals(number).name} in {', '.join(sorted(running))}", flush=True)
        # What runs has had the signal too: it went to the whole group.
        os._exit(1)

    signal.signal(signal.SIGTERM, end)
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        done = list(pool.map(run_with_log, sorted(stages, key=lambda name: name not in FIRST)))
    show_logs(failed)
    return done


def run_stage(name: str, args: list[str], log: t.TextIO | None) -> Stage:
    """Run one stage through nox, and return what became of it. The output goes to C(log), if given."""
    report = CACHE / f"{name}.json"
    command = [*NOX, "--no-error-on-missing-interpreters", "--report", str(report), "--sessions", name, "--", *args]
    # With CI in their environment the formatters check and do not edit.
    environment = {**os.environ, "CI": "true"}
    subprocess.run(command, check=False, cwd=ROOT, env=environment, stdout=log, stderr=log and subprocess.STDOUT)
    if not report.exists():
        return Stage(name, 0, 0, ["nox left no report of it"], [])
    (result,) = json.loads(report.read_text(encoding="utf-8"))["sessions"]
    return Stage.from_report(result)


def show_logs(names: list[str]) -> None:
    """Print the ends of stages' logs, and before them the lines that tell of a failure further up."""
    for name in names:
        lines = (LOGS / name).read_text(encoding="utf-8", errors="replace").splitlines()
        print(f"\n===== {name}: the end of its {len(lines)} lines in {LOGS / name} =====")
        failures = [line[:SHOWN_WIDTH] for line in lines[:-SHOWN_LINES] if TELLS_OF_FAILURE.search(line)]
        print(*failures[-SHOWN_LINES:], *lines[-SHOWN_LINES:], sep="\n", flush=True)


def sum_up(stages: list[Stage], *, skips_fail: bool) -> bool:
    """Print what ran, what did not and why, and the counts; return whether all is well."""
    width = max(len(stage.name) for stage in stages)
    print(f"\n{'stage':{width}} {'seconds':>8} {'passed':>7} {'failed':>7} {'skipped':>8}")
    for stage in stages:
        counts = f"{stage.passed:7} {len(stage.failed):7} {len(stage.skipped):8}"
        print(f"{stage.name:{width}} {stage.seconds:8.1f} {counts}")
    print(f"{'all':{width}} {sum(stage.seconds for stage in stages):8.1f}, some at the same time")

    failed = [f"{stage.name}: {test}" for stage in stages for test in stage.failed]
    skipped: list[str] = []
    for stage in stages:
        for test, reason in stage.skipped:
            line = f"{stage.name}: {test}: {reason}"
            (failed if skips_fail and not INTERPRETER_IS_ABSENT.search(reason) else skipped).append(line)
    for title, lines in (("Skipped", skipped), ("Failed (under CI a test that is skipped fails)", failed)):
        if lines:
            print(f"\n{title}:", *lines, sep="\n  ")

    if len(stages) > 1:
        print("\nNot among the stages that run by default:", *map(": ".join, LEFT_OUT.items()), sep="\n  ")

    passed = sum(stage.passed for stage in stages)
    print(f"\n{passed} passed, {len(failed)} failed" + (f", {len(skipped)} skipped" if skipped else ""))
    return bool(passed) and not failed


def main() -> None:
    """Run the tests of the collection."""
    parser = argparse.ArgumentParser(prog="tools/test", description=main.__doc__)
    parser.add_argument("stages", nargs="*", metavar="stage", help="a stage, or the first part of the names of several")
    parser.add_argument("--list", action="store_true", help="list the stages and exit")
    separator = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options = parser.parse_args(sys.argv[1:separator])
    if options.list:
        for name, description in known_stages().items():
            print(f"{name:28} {description}")
        return
    in_ci = os.environ.get("CI", "").lower() in ("1", "true", "yes")
    stages = run(choose(options.stages), sys.argv[separator + 1 :])
    sys.exit(0 if sum_up(stages, skips_fail=in_ci) else 1)


if __name__ == "__main__":
    main()
