# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Give the codec mutants of archives by the thousand, and hold it to what must be true of each.

With C(--engine atheris) the choices that make a mutant are guided by the coverage that they reach; otherwise they are a
seeded generator's, and any mutant can be made again from its number.
"""

from __future__ import annotations

import argparse
import collections
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent


def import_collection() -> tempfile.TemporaryDirectory[str]:
    """Make this checkout importable by the collection's name."""
    tree = tempfile.TemporaryDirectory(prefix="vma-fuzz-tree-")
    namespace = Path(tree.name, "ansible_collections", "vmbackup")
    namespace.mkdir(parents=True)
    (namespace / "vma").symlink_to(HERE.parents[1])
    sys.path.insert(0, tree.name)
    return tree


def run_seeded(first: int, count: int, keep: str | None) -> collections.Counter[str]:
    """Check the mutants with the numbers from C(first) on; one that fails is kept in the folder C(keep)."""
    from ansible_collections.vmbackup.vma.tests.fuzz import mutants, oracle

    oracle.limit_memory()
    outcomes: collections.Counter[str] = collections.Counter()
    folder = Path(tempfile.mkdtemp(prefix="vma-fuzz-", dir=_fast_folder()))
    try:
        for number in range(first, first + count):
            mutant = mutants.make_mutant(mutants.SeededChoices(number))
            try:
                outcomes[oracle.check(mutant, folder)] += 1
            except BaseException as error:
                if not isinstance(error, KeyboardInterrupt):
                    _keep(mutant, number, keep)
                raise
    finally:
        shutil.rmtree(folder)
    return outcomes


def _keep(mutant: bytes, number: int, keep: str | None) -> None:
    print(f"the mutant number {number} fails", file=sys.stderr)
    if keep is not None:
        Path(keep).mkdir(parents=True, exist_ok=True)
        Path(keep, f"mutant-{number}.vma").write_bytes(mutant)


def _fast_folder() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _work(task: tuple[int, int, str | None]) -> collections.Counter[str]:
    return run_seeded(*task)


def run_many(first: int, count: int, jobs: int, keep: str | None) -> collections.Counter[str]:
    """Like run_seeded(), by several processes."""
    outcomes: collections.Counter[str] = collections.Counter()
    step = 2000
    tasks = [(at, min(step, first + count - at), keep) for at in range(first, first + count, step)]
    began = time.monotonic()
    with multiprocessing.Pool(jobs) as pool:
        for number, part in enumerate(pool.imap_unordered(_work, tasks), 1):
            outcomes.update(part)
            done = sum(outcomes.values())
            if number % 10 == 0 or number == len(tasks):
                print(f"{done} mutants, {done / (time.monotonic() - began):.0f} a second", flush=True)
    return outcomes


def run_guided(count: int, corpus: Path) -> None:
    """Let atheris guide the choices by the coverage of the codec. It ends the process itself."""
    import atheris

    with atheris.instrument_imports(include=["ansible_collections.vmbackup.vma.plugins.module_utils.vma"]):
        from ansible_collections.vmbackup.vma.tests.fuzz import mutants, oracle

    class GuidedChoices:
        def __init__(self, data: bytes) -> None:
            self._provider = atheris.FuzzedDataProvider(data)

        def below(self, limit: int) -> int:
            return int(self._provider.ConsumeIntInRange(0, limit - 1))

        def take(self, count: int) -> bytes:
            return bytes(self._provider.ConsumeBytes(count)).ljust(count, b"\x5a")

    folder = Path(tempfile.mkdtemp(prefix="vma-fuzz-", dir=_fast_folder()))

    def one(data: bytes) -> None:
        oracle.check(mutants.make_mutant(GuidedChoices(data)), folder)

    corpus.mkdir(parents=True, exist_ok=True)
    atheris.Setup(
        [sys.argv[0], f"-runs={count}", "-max_len=512", "-len_control=0", "-print_final_stats=1", str(corpus)], one
    )
    atheris.Fuzz()


def main() -> None:
    """Run as told and print the outcomes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0, help="the number of the first mutant")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--engine", choices=("seeded", "atheris"), default="seeded")
    parser.add_argument("--keep", help="a folder for mutants that fail, and for the corpus of the guided engine")
    arguments = parser.parse_args()
    tree = import_collection()
    if arguments.engine == "atheris":
        run_guided(arguments.mutants, Path(arguments.keep or tempfile.mkdtemp(prefix="vma-corpus-")))
        return
    outcomes = run_many(arguments.first, arguments.mutants, arguments.jobs, arguments.keep)
    print(json.dumps(dict(outcomes.most_common()), indent=2))
    print(f"{sum(outcomes.values())} mutants, none of them broke a rule")
    tree.cleanup()


if __name__ == "__main__":
    main()
