# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Power that fails, at every moment, on a file system that keeps no more than it must.

What an operation asks of the system is recorded and replayed on a model. In the model, bytes are safe once their file
was brought to disk after they were written, names once their folder was. Whatever else happened may survive or not,
each thing for itself: after a cut, a name stands for any of the files that it stood for since its folder was last
brought to disk, and a file that changed since it was last brought to disk holds anything.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import typing as t

import pytest

from ansible_collections.vmbackup.vma.plugins.module_utils.vma import create, extract, image, layout
from ansible_collections.vmbackup.vma.plugins.module_utils.vma.create import SourceDevice
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.vma import helpers, victim
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.vma.helpers import CLUSTER

DISK = helpers.make_image(70 * CLUSTER, "new")
OLD_DISK = helpers.make_image(66 * CLUSTER, "old")
EFI = helpers.make_image(540672, "efi")
CONFIGS = [layout.Config("qemu-server.conf", helpers.CONF)]


# --- the model --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Node:
    """A file, or without content a folder. C(safe) says that it did not change since it was brought to disk."""

    content: bytearray | None
    safe: bool = False


class Model:
    """A file system that forgets whatever it may."""

    def __init__(self, present: t.Mapping[str, bytes | None]) -> None:
        """C(present) are the paths that are there and safe; None is a folder."""
        self._now: dict[str, Node | None] = {}
        self._possible: dict[str, list[Node | None]] = {}
        self._opened: dict[int, tuple[str, Node]] = {}
        for path, content in present.items():
            node = Node(None if content is None else bytearray(content), safe=True)
            self._now[path] = node
            self._possible[path] = [node]

    def _bind(self, path: str, node: Node | None) -> None:
        self._now[path] = node
        self._possible.setdefault(path, [None]).append(node)

    def open(self, handle: int, path: str, flags: int) -> None:
        """Open a file or folder, or make a file."""
        node = self._now.get(path)
        if node is None:
            node = Node(bytearray())
            self._bind(path, node)
        elif flags & os.O_TRUNC:
            node.content, node.safe = bytearray(), False
        self._opened[handle] = (path, node)

    def write(self, handle: int, offset: int, data: bytes) -> None:
        """Write to an open file."""
        _path, node = self._opened[handle]
        assert node.content is not None
        node.content.extend(bytes(max(0, offset + len(data) - len(node.content))))
        node.content[offset : offset + len(data)] = data
        node.safe = False

    def truncate(self, handle: int, size: int) -> None:
        """Give an open file another size."""
        _path, node = self._opened[handle]
        assert node.content is not None
        del node.content[size:]
        node.content.extend(bytes(size - len(node.content)))
        node.safe = False

    def clone(self, handle: int, source: int) -> None:
        """Make an open file a reflink copy of another one."""
        content = self._opened[source][1].content
        assert content is not None
        self.truncate(handle, 0)
        self.write(handle, 0, bytes(content))

    def sync(self, handle: int) -> None:
        """Bring an open file or folder to disk."""
        path, node = self._opened[handle]
        node.safe = True
        if node.content is None:
            for name in self._now:
                if os.path.dirname(name) == path:
                    self._possible[name] = [self._now[name]]

    def rename(self, old: str, new: str) -> None:
        """Give a file another name."""
        self._bind(new, self._now[old])
        self._bind(old, None)

    def remove(self, path: str) -> None:
        """Take a name away."""
        self._bind(path, None)

    def make_folder(self, path: str) -> None:
        """Make a folder."""
        self._bind(path, Node(None))

    def outcomes(self, path: str) -> list[bytes | None]:
        """What may be found under a path if the power fails now. Raises: AssertionError where it may be anything."""
        found: list[bytes | None] = []
        for node in self._possible.get(path, [None]):
            assert node is None or node.safe or node.content is None, f"{path} may hold anything"
            found.append(None if node is None or node.content is None else bytes(node.content))
        return found

    def may_be_absent(self, path: str) -> bool:
        """Whether a file or folder may not be there if the power fails now."""
        return None in self._possible.get(path, [None])


Event = t.Callable[[Model], None]


class Recorder:
    """Notes what this process asks of the system that changes something below a folder."""

    def __init__(self, folder: pathlib.Path, patch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[str, Event]] = []
        self._folder = str(folder)
        self._handles: dict[int, int] = {}
        self._numbers = itertools.count()
        for module, name in (
            *((os, name) for name in ("open", "close", "pwrite", "ftruncate", "fsync")),
            *((os, name) for name in ("rename", "unlink", "mkdir", "rmdir")),
            (fcntl, "ioctl"),
            (image, "_punch_hole"),
        ):
            real = getattr(module, name)
            patch.setattr(module, name, functools.partial(self._call, real, getattr(self, f"_on_{name.strip('_')}")))

    def _call(self, real: t.Callable[..., t.Any], note: t.Callable[..., None], *args: t.Any, **options: t.Any) -> t.Any:
        result = real(*args, **options)
        note(result, *args)
        return result

    def _note(self, name: str, *args: t.Any) -> None:
        shown = ", ".join(repr(arg) if len(repr(arg)) < 200 else "..." for arg in args)
        self.events.append((f"{name}({shown})", lambda model: getattr(model, name)(*args)))

    def _is_below(self, path: str) -> bool:
        return os.path.abspath(path).startswith(self._folder)

    def _on_open(self, fd: int, path: str, flags: int, _mode: int = 0) -> None:
        self._handles.pop(fd, None)
        if isinstance(path, str) and self._is_below(path):
            self._handles[fd] = next(self._numbers)
            self._note("open", self._handles[fd], os.path.abspath(path), flags)

    def _on_close(self, _none: None, fd: int) -> None:
        self._handles.pop(fd, None)

    def _on_pwrite(self, count: int, fd: int, data: bytes, offset: int) -> None:
        if fd in self._handles:
            self._note("write", self._handles[fd], offset, bytes(data[:count]))

    def _on_ftruncate(self, _none: None, fd: int, size: int) -> None:
        if fd in self._handles:
            self._note("truncate", self._handles[fd], size)

    def _on_fsync(self, _none: None, fd: int) -> None:
        if fd in self._handles:
            self._note("sync", self._handles[fd])

    def _on_rename(self, _none: None, old: str, new: str) -> None:
        if self._is_below(new):
            self._note("rename", os.path.abspath(old), os.path.abspath(new))

    def _on_unlink(self, _none: None, path: str) -> None:
        if self._is_below(path):
            self._note("remove", os.path.abspath(path))

    _on_rmdir = _on_unlink

    def _on_mkdir(self, _none: None, path: str, _mode: int = 0) -> None:
        if self._is_below(path):
            self._note("make_folder", os.path.abspath(path))

    def _on_ioctl(self, _result: int, fd: int, request: int, source: t.Any = 0) -> None:
        if request == image._FICLONE:
            self._note("clone", self._handles[fd], self._handles[source])

    def _on_punch_hole(self, done: bool, fd: int, offset: int, length: int) -> None:
        if done and fd in self._handles:
            self._note("write", self._handles[fd], offset, bytes(length))


def _tree(folder: pathlib.Path) -> dict[str, bytes | None]:
    found = {str(path): None if path.is_dir() else path.read_bytes() for path in folder.rglob("*")}
    return {str(folder): None, **found}


def _check(folder: pathlib.Path, operation: t.Callable[[], object]) -> int:
    """Let the power fail after each event of an operation, and at its end. Returns how many events there were."""
    before = _tree(folder)
    with pytest.MonkeyPatch.context() as patch:
        recorder = Recorder(folder, patch)
        operation()
    after = _tree(folder)
    model = Model(before)
    for text, event in recorder.events:
        event(model)
        for path, content in after.items():
            if content is not None:
                outcomes = model.outcomes(path)
                assert all(found in (before.get(path), content) for found in outcomes), f"{path} after {text}"
    for path, content in after.items():
        assert not model.may_be_absent(path), f"{path} may be lost after the end"
        if content is not None:
            assert model.outcomes(path) == [content], f"{path} may be old after the end"
    return len(recorder.events)


# --- the operations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("old", [False, True], ids=["new archive", "over an archive"])
@pytest.mark.parametrize("ending", [".vma", ".vma.gz", ".vma.zst"])
def test_create(ending: str, old: bool, tmp_path: pathlib.Path) -> None:
    source = tmp_path / "disk"
    folder = tmp_path / "archives"
    folder.mkdir()
    path = str(folder / f"a{ending}")
    if old:
        source.write_bytes(OLD_DISK)
        create.create(path, [SourceDevice("disk", str(source))])
    source.write_bytes(DISK)
    events = _check(folder, lambda: create.create(path, [SourceDevice("disk", str(source))], CONFIGS, threads=2))
    assert events >= 7  # among them: made, written, brought to disk, named, its folder brought to disk
    assert helpers.look(path).ok


def test_create_after_a_run_that_was_killed(tmp_path: pathlib.Path) -> None:
    source = tmp_path / "disk"
    source.write_bytes(DISK)
    folder = tmp_path / "archives"
    folder.mkdir()
    (folder / ".a.vma.0123456789abcdef.vma-part").write_bytes(b"half")
    _check(folder, lambda: create.create(str(folder / "a.vma"), [SourceDevice("disk", str(source))]))
    assert os.listdir(folder) == ["a.vma"]


@pytest.fixture
def src(tmp_path: pathlib.Path) -> str:
    path = tmp_path / "archive.vma"
    images = {"disk": DISK, "efi": EFI}
    path.write_bytes(helpers.build_archive(images, configs={"qemu-server.conf": b"name: new\n"}).join())
    return str(path)


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "out"
    path.mkdir()
    return path


def _fill(folder: pathlib.Path) -> None:
    (folder / "disk-disk.raw").write_bytes(OLD_DISK)
    (folder / "disk-efi.raw").write_bytes(EFI)
    (folder / "qemu-server.conf").write_bytes(b"name: old\n")


def test_extract_to_new_files(src: str, folder: pathlib.Path) -> None:
    _check(folder, lambda: extract.extract(src, str(folder), threads=2))
    assert len(os.listdir(folder)) == 3


@pytest.mark.parametrize("overwrite", ["changed", "always"])
def test_extract_over_files(overwrite: str, src: str, folder: pathlib.Path) -> None:
    _fill(folder)
    _check(folder, lambda: extract.extract(src, str(folder), overwrite=overwrite, threads=2))
    assert (folder / "disk-disk.raw").read_bytes() == DISK


def test_extract_over_reflink_copies(src: str, reflinks: pathlib.Path) -> None:
    _fill(reflinks)
    with contextlib.suppress(FileNotFoundError):
        os.rmdir(reflinks / "lost+found")
    events = _check(reflinks, lambda: extract.extract(src, str(reflinks), threads=2))
    assert events
    assert (reflinks / "disk-disk.raw").read_bytes() == DISK


def test_extract_makes_a_folder(src: str, folder: pathlib.Path) -> None:
    _check(folder, lambda: extract.extract(src, str(folder / "vm"), threads=2))
    assert len(os.listdir(folder / "vm")) == 3


def test_extract_makes_folders_above(src: str, folder: pathlib.Path) -> None:
    _check(folder, lambda: extract.extract(src, str(folder / "site" / "host" / "vm"), threads=2))
    assert len(os.listdir(folder / "site" / "host" / "vm")) == 3


def test_extract_to_paths_in_several_folders(src: str, folder: pathlib.Path) -> None:
    (folder / "fast").mkdir()
    (folder / "slow").mkdir()
    requests = [
        extract.DeviceRequest("disk", str(folder / "fast" / "disk.raw")),
        extract.DeviceRequest("efi", str(folder / "slow" / "efi.raw")),
    ]
    _check(folder, lambda: extract.extract(src, str(folder / "configs"), devices=requests, threads=2))


# --- does the model notice? -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        ([0, 1], "may hold anything"),
        ([2], "may be lost after the end"),
        ([], None),
    ],
    ids=["the file is not brought to disk", "nor is the folder", "all is as it should be"],
)
def test_the_model_notices(
    lost: list[int], words: str | None, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An archive is brought to disk twice, before and after it gets its owner and mode, and its folder once."""
    source = tmp_path / "disk"
    source.write_bytes(DISK)
    folder = tmp_path / "archives"
    folder.mkdir()
    numbers = itertools.count()
    real = Model.sync

    def sync(model: Model, handle: int) -> None:
        if next(numbers) not in lost:
            real(model, handle)

    monkeypatch.setattr(Model, "sync", sync)
    expected = contextlib.nullcontext() if words is None else pytest.raises(AssertionError, match=words)
    with expected:
        _check(folder, lambda: create.create(str(folder / "a.vma"), [SourceDevice("disk", str(source))]))


# --- the kernel's view: other programs' writes included ---------------------------------------------------------------


class Call(t.NamedTuple):
    """A call as strace tells it. What changes a file counts from its end, what brings it to disk from its beginning."""

    name: str
    arguments: str
    paths: list[str]


_CALLS = (
    "open,openat,creat,write,pwrite64,writev,pwritev,pwritev2,ftruncate,fallocate,copy_file_range,sendfile,splice,"
    "io_submit,fsync,fdatasync,rename,renameat,renameat2,fchmod,fchmodat,chmod"
)
_SYNCS = ("fsync", "fdatasync")
_RENAMES = ("rename", "renameat", "renameat2")
_ATTRIBUTES = ("fchmod", "fchmodat", "chmod")


def _trace(task: victim.Task, log: pathlib.Path) -> list[Call]:
    """The calls of a task's process and of all that it starts, in order."""
    strace = helpers.need_tool("strace")
    code = f"import sys; sys.path[:] = {sys.path!r}; import {victim.__name__} as victim; victim.main()"
    traced = [sys.executable, "-c", code, json.dumps(dataclasses.asdict(task))]
    command = [strace, "-f", "-y", "-s", "0", "-e", "signal=none", "-e", f"trace={_CALLS}", "-o", str(log), *traced]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if "Operation not permitted" in done.stderr:
        pytest.skip("strace may not trace here")
    assert done.returncode == 0, done.stderr
    calls: list[Call] = []
    begun: dict[str, tuple[str, int]] = {}
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        process, _space, text = line.partition(" ")
        text = text.lstrip()
        if text.endswith("<unfinished ...>"):
            begun[process] = (text[: -len("<unfinished ...>")], len(calls))
            calls.append(Call("", "", []))
            continue
        place = len(calls)
        resumed = re.match(r"<\.\.\. \w+ resumed>", text)
        if resumed:
            start, begun_at = begun.pop(process)
            text = start + text[resumed.end() :]
            if text.startswith(_SYNCS):
                place = begun_at
        name, _paren, arguments = text.partition("(")
        if not re.search(r"= -1 E\w+", arguments):
            paths = re.findall(r'<(/[^>]*)>|"(/[^"]*)"', arguments)
            call = Call(name, arguments, [opened or given for opened, given in paths])
            calls[place:] = [call] if place == len(calls) else [call, *calls[place + 1 :]]
    return calls


TASKS = {
    "create": victim.Task("create", "disk", "a.vma"),
    "create, gzip": victim.Task("create", "disk", "a.vma.gz"),
    "create, zstd": victim.Task("create", "disk", "a.vma.zst"),
    "create, zstd's command": victim.Task("create", "disk", "a.vma.zst", without_libzstd=True),
    "extract": victim.Task("extract", "archive.vma", "."),
    "extract to qcow2": victim.Task("extract", "archive.vma", ".", "qcow2"),
}


@pytest.mark.parametrize("name", list(TASKS))
@pytest.mark.usefixtures("src")
def test_order_of_calls(name: str, folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Each file is made closed to others, written, brought to disk, named; then its folder is brought to disk."""
    task = TASKS[name]
    if task.without_libzstd:
        helpers.need_tool("zstd")
    if task.format != "raw":
        helpers.need_tool("qemu-img")
    (tmp_path / "disk").write_bytes(DISK)
    dest = str(folder) if task.dest == "." else str(folder / task.dest)
    calls = _trace(dataclasses.replace(task, src=str(tmp_path / task.src), dest=dest), tmp_path / "log")
    assert not [call for call in calls if call.name == "io_submit"], "writes that are not followed here"
    named = {call.paths[-1]: number for number, call in enumerate(calls) if call.name in _RENAMES}
    assert sorted(named) == sorted(str(path) for path in folder.iterdir())
    for path, number in named.items():
        hidden = calls[number].paths[-2]
        about = [(at, call) for at, call in enumerate(calls) if call.paths and {hidden, path} & set(call.paths)]
        (made,) = [call for _at, call in about if "O_CREAT" in call.arguments and "O_EXCL" in call.arguments]
        assert ", 0600)" in made.arguments
        passive = ("open", "openat", *_SYNCS, *_RENAMES, *_ATTRIBUTES)
        writes = [at for at, call in about if call.name not in passive]
        syncs = [at for at, call in about if call.name in _SYNCS]
        assert writes
        assert max(writes) < max(at for at in syncs if at < number), "brought to disk after the last write"
        folder_syncs = [at for at, call in enumerate(calls) if call.name in _SYNCS and call.paths == [str(folder)]]
        assert max(folder_syncs) > number, "the folder is brought to disk after that"
