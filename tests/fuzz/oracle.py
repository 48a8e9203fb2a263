# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What must hold for any file that is given to the codec as an archive, however it was made."""

from __future__ import annotations

import os
import resource
import time
import typing as t
from pathlib import Path

from ansible_collections.vmbackup.vma.plugins.module_utils.vma import extract, layout, verify
from ansible_collections.vmbackup.vma.plugins.module_utils.vma.errors import KINDS, ArchiveError, VmaError

SECONDS_LIMIT = 10.0
"""Seconds of processor time; a machine that is busy with something else does not count."""
MEMORY_LIMIT = 4 << 30
"""Bytes of address space. A reader that allocates what a header tells it to runs into this."""


class Violation(AssertionError):
    """Something that must hold does not."""


def limit_memory() -> None:
    """Let the kernel refuse what an archive must not make the reader allocate."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, hard))


def check(mutant: bytes, folder: Path) -> str:
    """Verify and extract the mutant below C(folder), which is empty. Returns the outcome in a word, for counting.

    Raises: Violation, and whatever the codec raises that is no error of the domain.
    """
    began = time.process_time()
    archive = folder / "in" / "mutant"
    archive.parent.mkdir(exist_ok=True)
    archive.write_bytes(mutant)
    out = folder / "out"
    structure = verify.verify(str(archive), "structure", threads=1).verification
    content = verify.verify(str(archive), "content", threads=1).verification
    _require(set(content.counts) <= set(KINDS), "only known kinds of problems", content.counts)
    _require(structure.ok or not content.ok, "what structure finds, content finds", structure.problems)
    _require(content.good_until <= _stream_size(mutant) or content.ok, "nothing is good behind the end", content)
    outcome = "ok"
    try:
        extract.extract(str(archive), str(out), threads=1)
    except ArchiveError as error:
        outcome = error.problem.kind
        _require(not content.ok, "what verifies is extracted", error)
        _require(error.file == str(archive) and bool(error.remedy), "the error tells the file and what to do", error)
    except VmaError as error:
        outcome = type(error).__name__
        _require(bool(error.file), "the error tells the file", error)
    written = sorted(path.relative_to(out) for path in out.rglob("*")) if out.exists() else []
    if outcome == "ok":
        _require(content.ok, "what does not verify is not extracted", content.problems)
        _compare(mutant, out, written)
    else:
        _require(not written, "a failure leaves nothing", written)
    _require(
        {path.name for path in folder.iterdir()} <= {"in", "out"} and os.listdir(archive.parent) == ["mutant"],
        "nothing is written anywhere else",
        sorted(folder.rglob("*")),
    )
    for name in written:
        (out / name).unlink()
    elapsed = time.process_time() - began
    _require(elapsed < SECONDS_LIMIT, f"it takes no longer than {SECONDS_LIMIT} s", elapsed)
    return outcome


def _require(condition: bool, what: str, found: object) -> None:
    if not condition:
        raise Violation(f"expected that {what}; found {found}")


def _stream_size(mutant: bytes) -> int:
    """The length of the archive where it is not compressed; of others it is not known here."""
    return len(mutant) if mutant.startswith(b"VMA\x00") else 1 << 62


def _compare(mutant: bytes, out: Path, written: t.Sequence[Path]) -> None:
    """Read a sound, uncompressed archive in the simplest way there is, and compare what was extracted."""
    if not mutant.startswith(b"VMA\x00"):
        return
    header = layout.parse_header(mutant[: layout.parse_header_size(mutant[:12288])], _refuse)
    images = {device.dev_id: bytearray() for device in header.devices}
    at = header.size
    while at < len(mutant):
        data_at = at + 512
        for slot in range(at + 40, at + 512, 8):
            mask, dev_id, cluster = (
                int.from_bytes(mutant[slot : slot + 2], "big"),
                mutant[slot + 3],
                int.from_bytes(mutant[slot + 4 : slot + 8], "big"),
            )
            for block in range(16 if dev_id else 0):
                start = cluster * 65536 + block * 4096
                if mask >> block & 1:
                    image = images[dev_id]
                    image.extend(bytes(max(0, start + 4096 - len(image))))
                    image[start : start + 4096] = mutant[data_at : data_at + 4096]
                    data_at += 4096
        at = data_at
    expected = {Path(config.name) for config in header.configs}
    for device in header.devices:
        name = Path("vmstate.bin" if device.name == "vmstate" else f"disk-{device.name}.raw")
        expected.add(name)
        size = (out / name).stat().st_size
        _require(size == device.size or device.name == "vmstate", "a device has its size", (device, size))
        if size < 1 << 24:
            stored = bytes(images[device.dev_id][:size]).ljust(size, b"\x00")
            _require((out / name).read_bytes() == stored, "a device has its bytes", device)
    _require(set(written) == expected, "just what the archive holds is written", written)


def _refuse(problem: object) -> None:
    raise Violation(f"an archive that was extracted has a problem: {problem}")
