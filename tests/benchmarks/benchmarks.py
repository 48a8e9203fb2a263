# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Measure the codec beside the tools that administrators know, pair by pair, and say on what machine.

Run it by C(tools/test bench), which brings what it needs. Each row runs an operation of the codec and its peer in turn
and gives the median of the ratios of their wall times; the codec's own times leave out the start of the interpreter.
No row passes or fails: the table shows the ratio beside the goal.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import typing as t
from pathlib import Path
from xml.etree import ElementTree

GIB = 1 << 30
TIB = 1 << 40
BLOCK = 4096
CLUSTER = 65536
CPUS = len(os.sched_getaffinity(0))
ROOT = Path(__file__).resolve().parents[2]

# The drawing has the same licence as this file
SVG_LICENCE = "\n".join(["<!--", *(line[2:] for line in Path(__file__).read_text().splitlines()[:3]), "-->"])

PRELUDE = """
import json, os, sys, time
from ansible_collections.vmbackup.vma.plugins.module_utils.vma import create, extract, image, info, layout, verify
def make(dest, *images, **options):
    devices = [create.SourceDevice(f'drive-scsi{n}', path) for n, path in enumerate(images)]
    return create.create(dest, devices, **options)
def restore(src, dest, **options):
    wanted = [extract.DeviceRequest('drive-scsi0', dest)]
    return extract.extract(src, os.path.dirname(dest), devices=wanted, configs=[], check_space=False, **options)
def tell(**more):
    with open('/proc/self/status') as status:  # ru_maxrss also counts what the parent had before the exec
        peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith('VmHWM'))
    print(json.dumps({'seconds': time.perf_counter() - began, 'peak': peak, **more}))
began = time.perf_counter()
"""


@dataclasses.dataclass
class Row:
    """A line of the table. C(goal) is the highest ratio, or the highest value in C(unit), that is aimed at."""

    name: str
    value: float
    low: float
    high: float
    goal: float
    unit: str
    peer: str
    note: str = ""


class Bench:
    """The folders, the data in them, and the measuring."""

    def __init__(self, memory_dir: Path, disk_dir: Path, pairs: int, tree: Path) -> None:
        self.memory = memory_dir
        self.disk = disk_dir
        self.pairs = pairs
        self._environment = {**os.environ, "PYTHONPATH": str(tree)}
        self._sizes: dict[Path, int] = {}
        self.rows: list[Row] = []

    # --- measuring ----------------------------------------------------------------------------------------------------

    def codec(self, statement: str) -> dict[str, t.Any]:
        """Run a statement of the codec in an interpreter of its own. Returns what its C(tell()) told."""
        command = [sys.executable, "-c", f"{PRELUDE}\n{statement}"]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=self._environment)
        return t.cast("dict[str, t.Any]", json.loads(done.stdout.splitlines()[-1]))

    def ours(self, statement: str, *outputs: Path) -> t.Callable[[], float]:
        """A measurement of the codec; C(outputs) are removed before."""

        def measure() -> float:
            self._clear(outputs)
            return float(self.codec(f"{statement}\ntell()")["seconds"])

        return measure

    def peer(self, command: str, *outputs: Path) -> t.Callable[[], float]:
        """A measurement of a shell command; C(outputs) are removed before."""

        def measure() -> float:
            self._clear(outputs)
            began = time.perf_counter()
            subprocess.run(["bash", "-c", command], check=True, stdout=subprocess.DEVNULL)
            return time.perf_counter() - began

        return measure

    def _clear(self, outputs: t.Sequence[Path]) -> None:
        """Remove what is to be written anew, and take as much memory as it needs into use for a moment.

        A virtual machine gives memory that has been free for some seconds back to its host. To get it again can take
        longer than all that is measured here, and would fall on whoever writes next.
        """
        for path in outputs:
            if path.parent == self.memory and path.exists():
                self._sizes[path] = path.stat().st_blocks * 512
        size = sum(self._sizes.get(path, 0) for path in outputs)
        _remove(outputs)
        spare = self.memory / "spare"
        with spare.open("wb") as file:
            for _part in range(size >> 20):
                file.write(bytes(1 << 20))
        spare.unlink()

    def compare(
        self,
        name: str,
        ours: t.Callable[[], float],
        peer: t.Callable[[], float],
        peer_name: str,
        goal: float,
        *,
        scale: float = 1.0,
    ) -> None:
        """Add a row: the median of the ratios of pairs, after one pair that does not count."""
        ratios = []
        seconds = []
        for number in range(self.pairs + 1):
            order = (ours, peer) if number % 2 else (peer, ours)
            times = {action: action() for action in order}
            if number:
                ratios.append(times[ours] / (times[peer] * scale))
                seconds.append((times[ours], times[peer]))
        note = "{:.2f} s and {:.2f} s".format(*(statistics.median(column) for column in zip(*seconds)))
        self.add(Row(name, statistics.median(ratios), min(ratios), max(ratios), goal, "x", peer_name, note))

    def absolute(self, name: str, values: t.Sequence[float], goal: float, unit: str, note: str = "") -> None:
        """Add a row without a peer."""
        self.add(Row(name, statistics.median(values), min(values), max(values), goal, unit, "", note))

    def add(self, row: Row) -> None:
        """Add a row and print it at once."""
        self.rows.append(row)
        print(_format(row), flush=True)


def _remove(paths: t.Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _format(row: Row) -> str:
    spread = f"{row.low:.2f} to {row.high:.2f}"
    versus = f"of {row.peer}" if row.peer else ""
    return f"{row.name:44} {row.value:8.2f} {row.unit:4} (goal {row.goal:g})  {spread:18} {versus:42} {row.note}"


# --- data -------------------------------------------------------------------------------------------------------------


def make_image(path: Path, size: int, share: float) -> None:
    """An image of C(size) bytes whose data is random, in stretches of 1 to 32 MiB that make up C(share) of it."""
    rng = random.Random(1)
    noise = rng.randbytes(4 << 20)
    with path.open("wb") as file:
        file.truncate(size)
        at = 0
        while at < size:
            length = min(rng.randint(1, 32) << 20, size - at)
            if rng.random() < share:
                file.seek(at)
                for part in range(0, length, 1 << 20):
                    start = rng.randrange(3 << 20)
                    file.write(noise[start : start + min(1 << 20, length - part)])
            at += length


def make_thin_image(path: Path, size: int, data: int) -> None:
    """An image of C(size) bytes with C(data) bytes of random data, a MiB here and there."""
    noise = random.Random(2).randbytes(1 << 20)
    with path.open("wb") as file:
        file.truncate(size)
        for number in range(data >> 20):
            file.seek(number * (size // (data >> 20)) + (number % 7 << 20))
            file.write(noise)


def make_striped_image(path: Path, size: int) -> None:
    """An image in which every other block is zero: the worst case for whatever works in runs of blocks."""
    noise = random.Random(3).randbytes(1 << 20)
    with path.open("wb") as file:
        for at in range(0, size, 2 * BLOCK):
            start = at // 2 % ((1 << 20) - BLOCK)
            file.write(noise[start : start + BLOCK] + bytes(BLOCK))


def make_system_image(path: Path, size: int) -> None:
    """An image made of this machine's own programs and documents, which compress as real disks do."""
    with path.open("wb") as file:
        tar = subprocess.Popen(
            ["tar", "-cf", "-", "--ignore-failed-read", "/usr"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        pipe = t.cast("t.IO[bytes]", tar.stdout)
        left = size
        while left:
            part = pipe.read(min(1 << 20, left))
            if not part:
                file.seek(0)
                again = path.read_bytes()[: min(left, file.seek(0, os.SEEK_END))]
                file.write(again)
                left -= len(again)
                continue
            file.write(part)
            left -= len(part)
        tar.kill()
        tar.wait()


SHUFFLE = """
import random
source, dest = {source!r}, {dest!r}
fd = os.open(source, os.O_RDONLY)
head = layout.parse_header(os.pread(fd, layout.parse_header_size(os.pread(fd, 12288, 0)), 0), print)
places, at = [], head.size
while raw := os.pread(fd, 512, at):
    extent = layout.parse_extent(raw, head.uuid, at)
    data_at = at + 512
    for run in extent.runs:
        size = bin(run.mask).count('1') * 4096
        for n in range(run.clusters):
            places.append((run.dev_id, run.cluster + n, run.mask, data_at, size))
            data_at += size
    at = data_at
random.Random(5).shuffle(places)
with open(dest, 'wb') as out:
    out.write(os.pread(fd, head.size, 0))
    for first in range(0, len(places), 59):
        group = places[first:first + 59]
        stored = sum(mask << 16 * n for n, (_d, _c, mask, _a, _s) in enumerate(group))
        header = layout.build_extent(head.uuid, [(d, c, 1) for d, c, _m, _a, _s in group], stored)
        data = b''.join(os.pread(fd, size, place) for _d, _c, _m, place, size in group)
        layout.seal_extent(header, layout.extent_digest(header + data))
        out.write(header + data)
tell()
"""

FULL_TIB = """
import uuid
dest = {dest!r}
devices = [layout.Device(1, 'drive-scsi0', 1 << 40)]
ident = uuid.uuid4().bytes
at = 0
with open(dest, 'wb') as out:
    out.write(layout.build_header(ident, 0, devices, []))
    clusters = devices[0].clusters
    for first in range(0, clusters, 59):
        count = min(59, clusters - first)
        header = layout.build_extent(ident, [(1, first, count)], (1 << 16 * count) - 1)
        layout.seal_extent(header, None)
        out.write(header)
        out.seek(count * 65536, 1)
    out.truncate(out.tell())
tell()
"""


# --- rows -------------------------------------------------------------------------------------------------------------


def plain_rows(bench: Bench) -> None:
    """Uncompressed archives beside cp and openssl."""
    folder = bench.memory
    image, archive, bare, out, copy = (folder / name for name in ("image", "a.vma", "n.vma", "out", "copy"))
    make_image(image, 4 * GIB, 0.66)
    cp = bench.peer(f"cp --sparse=always {image} {copy}", copy)
    create = f"make({str(archive)!r}, {str(image)!r})"
    create_bare = f"make({str(bare)!r}, {str(image)!r}, integrity='none')"
    bench.compare("create, digests", bench.ours(create, archive, copy), cp, "cp --sparse=always", 1.25)
    bench.compare("create, no digests", bench.ours(create_bare, bare, copy), cp, "cp --sparse=always", 0.9)
    copy.unlink()
    extract = f"restore({str(archive)!r}, {str(out)!r})"
    extract_bare = f"restore({str(bare)!r}, {str(out)!r})"
    bench.compare("extract, digests checked", bench.ours(extract, out, copy), cp, "cp --sparse=always", 1.15)
    bench.compare("extract, no digests", bench.ours(extract_bare, out, copy), cp, "cp --sparse=always", 0.85)
    verify = f"assert verify.verify({str(archive)!r}).verification.ok"
    bench.compare(
        "verify content",
        bench.ours(verify),
        bench.peer(f"openssl dgst -sha256 {archive}"),
        f"openssl dgst -sha256, divided by {CPUS} cores",
        1.2,
        scale=1 / CPUS,
    )
    copy.unlink()
    bench.codec(f"{extract}\ntell()")
    both = bench.peer(f"cat {archive} {out} > /dev/null")
    peer = "cat of both to /dev/null"
    again = f"assert not restore({str(archive)!r}, {str(out)!r}).changed"
    again_bare = f"assert not restore({str(bare)!r}, {str(out)!r}).changed"
    bench.compare("extract again, digests checked", bench.ours(again), both, peer, 1.0)
    bench.compare("extract again, no digests", bench.ours(again_bare), both, peer, 1.0)
    bench.compare("SHA-256 of the archive alone, for scale", bench.ours(verify), both, peer, 1.0)
    bare.unlink()
    out.unlink()
    shuffled = folder / "s.vma"
    bench.codec(SHUFFLE.format(source=str(archive), dest=str(shuffled)))
    bench.compare(
        "extract, clusters in random order",
        bench.ours(f"restore({str(shuffled)!r}, {str(out)!r})", out),
        bench.ours(extract, out),
        "the same archive in order",
        3.0,
    )
    _remove([shuffled, out, archive, image])


def striped_rows(bench: Bench) -> None:
    """Every other block zero, beside an image with as much data in one piece."""
    folder = bench.memory
    striped, dense, archive, other, out = (folder / name for name in ("striped", "dense", "s.vma", "d.vma", "out"))
    make_striped_image(striped, 2 * GIB)
    make_image(dense, GIB, 1.0)
    create = f"make({str(archive)!r}, {str(striped)!r})"
    plain = f"make({str(other)!r}, {str(dense)!r})"
    bench.compare(
        "create, alternating blocks", bench.ours(create, archive), bench.ours(plain, other), "as much data dense", 3.0
    )
    bench.compare(
        "extract, alternating blocks",
        bench.ours(f"restore({str(archive)!r}, {str(out)!r})", out),
        bench.ours(f"restore({str(other)!r}, {str(out)!r})", out),
        "as much data dense",
        3.0,
    )
    _remove([striped, dense, archive, other, out])


def compressed_rows(bench: Bench) -> None:
    """zstd and gzip beside zstd and pigz."""
    folder = bench.memory
    image, plain, out, result = (folder / name for name in ("system", "p.vma", "out", "result"))
    tools = [("zst", 2 * GIB, "zstd -q -T0 -3 -c", "zstd -T0 -3", "zstd -q -d -c", "zstd -d")]
    if shutil.which("pigz"):
        tools.append(("gz", GIB // 2, "pigz -6 -c", "pigz -6", "pigz -d -c", "pigz -d"))
    for ending, size, pack, pack_name, unpack, unpack_name in tools:
        make_system_image(image, size)
        bench.codec(f"make({str(plain)!r}, {str(image)!r})\ntell()")
        archive = folder / f"c.vma.{ending}"
        bench.compare(
            f"create .vma.{ending}, digests",
            bench.ours(f"make({str(archive)!r}, {str(image)!r})", archive),
            bench.peer(f"{pack} {plain} > {result}", result),
            f"{pack_name} of the plain archive",
            1.25,
        )
        note = f"{os.path.getsize(plain) / os.path.getsize(archive):.2f} to 1"
        _remove([result, plain, image])
        bench.compare(
            f"extract .vma.{ending}, digests checked",
            bench.ours(f"restore({str(archive)!r}, {str(out)!r})", out),
            bench.peer(f"{unpack} {archive} > /dev/null"),
            f"{unpack_name} to /dev/null, data {note}",
            1.5,
        )
        _remove([archive, out])


def large_rows(bench: Bench) -> None:
    """A TiB: time and memory must follow the data, not the size."""
    folder = bench.memory
    full, thin, archive, out = (folder / name for name in ("full.vma", "thin", "t.vma", "out"))
    bench.codec(FULL_TIB.format(dest=str(full)))
    statement = f"v = verify.verify({str(full)!r}, 'structure').verification\nassert v.ok\ntell(read=v.read_bytes)"
    told = [bench.codec(statement) for _n in range(bench.pairs)]
    share = 100 * told[0]["read"] / full.stat().st_size
    bench.absolute("verify structure, 1 TiB of data", [run["seconds"] for run in told], 5, "s", f"{share:.3f} % read")
    full.unlink()
    make_thin_image(thin, TIB, GIB)
    peaks: dict[str, list[float]] = {}
    empty = bench.codec("tell()")["peak"]
    for name, size, source in (("1 TiB", TIB, thin), ("1 GiB", GIB, folder / "gib")):
        if size == GIB:
            make_image(source, GIB, 1.0)
        create = f"make({str(archive)!r}, {str(source)!r})\ntell()"
        extract = f"restore({str(archive)!r}, {str(out)!r})\ntell()"
        times: dict[str, list[float]] = {"create": [], "extract": []}
        for _n in range(bench.pairs):
            for step, statement, output in (("create", create, archive), ("extract", extract, out)):
                _remove([output])
                run = bench.codec(statement)
                times[step].append(run["seconds"])
                peaks.setdefault(f"{step}, {name}", []).append((run["peak"] - empty) / (1 << 20))
        if size == TIB:
            data = archive.stat().st_size / (1 << 20)
            bench.absolute("create, 1 TiB with 1 GiB of data", times["create"], 10, "s", f"archive of {data:.0f} MiB")
            bench.absolute("extract, 1 TiB with 1 GiB of data", times["extract"], 10, "s")
        _remove([archive, out, source])
    for name, values in peaks.items():
        bench.absolute(f"memory over the interpreter's, {name}", values, 64, "MiB")


def info_rows(bench: Bench) -> None:
    """A header alone, by the codec and by the module."""
    folder = bench.memory
    image = folder / "small"
    make_image(image, 256 << 20, 1.0)
    for ending in (".vma", ".vma.gz", ".vma.zst"):
        archive = folder / f"i{ending}"
        bench.codec(f"make({str(archive)!r}, {str(image)!r})\ntell()")
        once = f"began = time.perf_counter()\ninfo.read_info({str(archive)!r})\ntell()"
        values = [
            1000 * bench.codec(f"info.read_info({str(archive)!r})\n{once}")["seconds"] for _n in range(bench.pairs)
        ]
        bench.absolute(f"read a header, {ending}", values, 5, "ms")
    _module_row(bench, folder / "i.vma")
    _remove([image, *(folder / f"i{ending}" for ending in (".vma", ".vma.gz", ".vma.zst"))])


def _module_row(bench: Bench, archive: Path) -> None:
    playbook = shutil.which("ansible-playbook", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if playbook is None:
        print("left out: the module beside ansible.builtin.stat; ansible-playbook is not here")
        return
    tasks = []
    for _n in range(10 * bench.pairs):
        tasks.append({"name": "stat", "ansible.builtin.stat": {"path": str(archive), "get_checksum": False}})
        tasks.append({"name": "info", "vmbackup.vma.vma_info": {"path": [str(archive)]}})
    play = bench.disk / "play.yml"
    play.write_text(json.dumps([{"hosts": "localhost", "connection": "local", "gather_facts": False, "tasks": tasks}]))
    environment = {
        **os.environ,
        "ANSIBLE_COLLECTIONS_PATH": bench._environment["PYTHONPATH"],
        "ANSIBLE_CALLBACKS_ENABLED": "ansible.builtin.junit",
        "JUNIT_OUTPUT_DIR": str(bench.disk),
        "ANSIBLE_LOCALHOST_WARNING": "False",
    }
    subprocess.run([playbook, str(play)], check=True, env=environment, stdout=subprocess.DEVNULL)
    report = next(bench.disk.glob("play-*.xml"))
    times: dict[str, list[float]] = {"stat": [], "info": []}
    for case in ElementTree.parse(report).iter("testcase"):
        task = re.search(r": (stat|info)\b", case.get("name", ""))
        if task is not None:
            times[task[1]].append(float(case.get("time", "nan")))
    report.unlink()
    ratios = [info / stat for info, stat in zip(times["info"], times["stat"])]
    note = f"{1000 * statistics.median(times['info']):.0f} ms and {1000 * statistics.median(times['stat']):.0f} ms"
    bench.add(
        Row(
            "vma_info as a task",
            statistics.median(ratios),
            min(ratios),
            max(ratios),
            1.2,
            "x",
            "ansible.builtin.stat",
            note,
        )
    )


def cache_rows(bench: Bench) -> None:
    """What a backup leaves of itself in the host's page cache, and what it costs to leave nothing."""
    image, archive = bench.disk / "image", bench.disk / "a.vma"
    make_image(image, 2 * GIB, 0.66)
    subprocess.run(["sync"], check=True)
    keep = "from ansible_collections.vmbackup.vma.plugins.module_utils.vma import reader\n"
    keep += "create.drop_behind = image.drop_behind = reader.drop_behind = lambda *_a: None\n"
    warm = bench.peer(f"cat {image}")
    create = f"make({str(archive)!r}, {str(image)!r})"

    def measured(statement: str) -> t.Callable[[], float]:
        run = bench.ours(statement, archive)

        def measure() -> float:
            warm()
            return run()

        return measure

    bench.compare("create, page cache given back", measured(create), measured(keep + create), "keeping it", 1.1)
    warm()
    _remove([archive])
    bench.codec(f"{create}\ntell()")
    for name, path in (("image", image), ("archive", archive)):
        left = int(subprocess.check_output(["fincore", "-b", "-n", "-o", "RES", str(path)], text=True))
        bench.absolute(f"page cache left of the {name}", [100 * left / path.stat().st_size], 5, "%")
    _remove([image, archive])


GROUPS: dict[str, t.Callable[[Bench], None]] = {
    "plain": plain_rows,
    "striped": striped_rows,
    "compressed": compressed_rows,
    "large": large_rows,
    "info": info_rows,
    "cache": cache_rows,
}


# --- results ----------------------------------------------------------------------------------------------------------


def describe_machine(bench: Bench) -> str:
    """The machine, as far as it decides these figures."""
    model = "an unknown processor"
    with open("/proc/cpuinfo", encoding="utf-8") as info:
        for line in info:
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    with open("/proc/meminfo", encoding="utf-8") as info:
        memory = int(info.readline().split()[1]) / (1 << 20)
    kind, disk = (
        subprocess.check_output(["findmnt", "-f", "-n", "-o", "FSTYPE", "-T", str(folder)], text=True).strip()
        for folder in (bench.memory, bench.disk)
    )
    kernel = platform.release().partition("-")[0]
    return (
        f"{CPUS} cores of {model}, {memory:.0f} GiB, Linux {kernel}, CPython {platform.python_version()}; "
        f"data on {kind}, the page cache's rows on {disk}; medians of {bench.pairs} pairs"
    )


def markdown(rows: t.Sequence[Row], machine: str) -> str:
    """The table as the documentation shows it."""
    lines = ["| operation | measured | goal | spread | beside | |", "|---|---|---|---|---|---|"]
    for row in rows:
        lines.append(
            f"| {row.name} | {row.value:.2f} {row.unit} | {row.goal:g} {row.unit} | {row.low:.2f} to {row.high:.2f} "
            f"| {row.peer} | {row.note} |"
        )
    return "\n".join([*lines, "", f"Measured on {machine}.", ""])


def plot(rows: t.Sequence[Row], machine: str, path: Path) -> None:
    """Draw the ratios as bars beside their goals."""
    from matplotlib import pyplot

    shown = [row for row in rows if row.unit == "x"][::-1]
    figure, axes = pyplot.subplots(figsize=(10, 0.45 * len(shown) + 1.6))
    colours = ["#2e7d32" if row.value <= row.goal else "#c62828" for row in shown]
    axes.barh([f"{row.name}\nof {row.peer}" for row in shown], [row.value for row in shown], color=colours, height=0.6)
    for place, row in enumerate(shown):
        axes.plot([row.goal, row.goal], [place - 0.4, place + 0.4], color="black", linewidth=2)
        axes.plot([row.low, row.high], [place, place], color="#555555", linewidth=1)
    axes.axvline(1, color="#999999", linewidth=0.8, linestyle=":")
    axes.tick_params(axis="y", labelsize=7)
    axes.set_xlabel("ratio of wall times, lower is better; black: the goal; grey: the spread of the pairs")
    axes.set_title(machine.replace("; ", "\n"), fontsize=7)
    figure.tight_layout()
    drawing = io.StringIO()
    with pyplot.rc_context({"svg.fonttype": "none", "svg.hashsalt": "vma"}):
        figure.savefig(drawing, format="svg", metadata={"Date": None})
    first, _newline, rest = drawing.getvalue().partition("\n")
    lines = [first, SVG_LICENCE, *rest.splitlines()]
    path.write_text("\n".join(line.rstrip() for line in lines) + "\n", encoding="utf-8")


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", choices=[[], *GROUPS], help="groups of rows, all by default")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--memory-dir", default="/dev/shm", help="where the data goes; 16 GiB must be free")
    parser.add_argument("--disk-dir", default="/var/tmp", help="where the page cache's rows work; 5 GiB must be free")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    parser.add_argument("--plot", type=Path, help="draw the ratios here, as SVG (needs matplotlib)")
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="vma-bench-", dir=arguments.memory_dir) as memory,
        tempfile.TemporaryDirectory(prefix="vma-bench-", dir=arguments.disk_dir) as disk,
    ):
        tree = Path(disk, "tree")
        (tree / "ansible_collections" / "vmbackup").mkdir(parents=True)
        (tree / "ansible_collections" / "vmbackup" / "vma").symlink_to(ROOT)
        bench = Bench(Path(memory), Path(disk), arguments.pairs, tree)
        machine = describe_machine(bench)
        print(machine)
        for name in arguments.rows or GROUPS:
            GROUPS[name](bench)
        if arguments.markdown:
            arguments.markdown.write_text(markdown(bench.rows, machine))
        if arguments.plot:
            plot(bench.rows, machine, arguments.plot)


if __name__ == "__main__":
    main()
