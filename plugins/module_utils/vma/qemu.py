# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Images in other formats than raw, by QEMU's own tools: read through a raw view, written by conversion."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import subprocess
import time
import typing as t

from .errors import ToolError
from .image import SourceImage
from .pending_file import target_errors, unfinished
from .tools import bound_to_us, describe_exit, find_tool, open_scratch, start_tool

FORMATS: tuple[str, ...] = ("raw", "qcow2", "qed", "vdi", "vhdx", "vmdk", "vpc")
_VIEW_TIMEOUT = 20
"""Seconds that the storage daemon may take to open an image."""


_POLL = 0.01
_FOLDER_PREFIX = ".vma-view-"


@contextlib.contextmanager
def open_source(path: str, image_format: str, scratch: str) -> t.Iterator[SourceImage]:
    """The image at C(path), as raw bytes, for as long as the context lasts.

    A format other than raw is read through a view of qemu-storage-daemon, which knows the holes. Where the host cannot
    give one, the image is first converted to a sparse file below the folder C(scratch).

    Raises: SourceError, ToolError.
    """
    with contextlib.ExitStack() as stack:
        original = SourceImage(path)
        stack.callback(original.close)
        if image_format == "raw":
            yield original
            return
        folder = stack.enter_context(_scratch_folder(scratch))
        view = os.path.join(folder, "view")
        if not _start_view(stack, os.path.abspath(path), image_format, view):
            convert(path, image_format, view, "raw")
        image = SourceImage(view, original=original)
        stack.callback(image.close)
        yield image


@contextlib.contextmanager
def _scratch_folder(parent: str) -> t.Iterator[str]:
    """A folder that vanishes at the end, or when the next run finds that its maker was killed."""
    with target_errors(parent):
        for entry in os.listdir(parent):
            if entry.startswith(_FOLDER_PREFIX):
                _remove_leftover(os.path.join(parent, entry))
        folder = os.path.join(parent, _FOLDER_PREFIX + secrets.token_hex(8))
        unfinished[folder] = _clear
        os.mkdir(folder, 0o700)
    fd = -1
    try:
        with target_errors(folder):
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.pop(folder, None)
        if fd >= 0:
            os.close(fd)


def _remove_leftover(folder: str) -> None:
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _clear(folder)
        finally:
            os.close(fd)


def _clear(folder: str) -> None:
    """Remove a folder whose view may still be there."""
    _unmount(os.path.join(folder, "view"))
    shutil.rmtree(folder, ignore_errors=True)


def _unmount(path: str) -> None:
    """Take away a view that its daemon left behind, if there is one."""
    for tool in ("fusermount3", "fusermount"):
        found = shutil.which(tool)
        if found is not None:
            start_tool([found, "-u", "-z", path]).wait()
            return


def _start_view(stack: contextlib.ExitStack, path: str, image_format: str, view: str) -> bool:
    """Let qemu-storage-daemon show the image as the raw file C(view). False where it cannot, for whatever reason."""
    daemon = shutil.which("qemu-storage-daemon")
    if daemon is None:
        return False
    with target_errors(view):
        open(view, "wb").close()  # the export wants a file to mount on
    file = {"driver": "file", "filename": path}
    node = {"driver": image_format, "node-name": "image", "read-only": True, "file": file}
    export = {"type": "fuse", "id": "view", "node-name": "image", "mountpoint": view, "writable": False}
    ready = os.path.join(os.path.dirname(view), "pid")
    command = [daemon, "--blockdev", json.dumps(node), "--export", json.dumps(export), "--pidfile", ready]
    process = start_tool(bound_to_us(command))
    stack.callback(_stop, process, view)
    deadline = time.monotonic() + _VIEW_TIMEOUT
    while not os.path.exists(ready):
        if process.poll() is not None or time.monotonic() > deadline:
            return False
        time.sleep(_POLL)
    return True


def _stop(process: subprocess.Popen[bytes], view: str) -> None:
    process.terminate()
    try:
        process.wait(_VIEW_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.returncode < 0:
        _unmount(view)


def convert(source: str, source_format: str, dest: str, dest_format: str) -> None:
    """Write the image C(source) to the new file C(dest) in another format. Raises: ToolError."""
    tool = find_tool("qemu-img", f"for images in the format {dest_format if source_format == 'raw' else source_format}")
    with open_scratch() as stderr:
        command = bound_to_us([tool, "convert", "-f", source_format, "-O", dest_format, source, dest])
        process = start_tool(command, stdout=stderr, stderr=stderr)
        try:
            status = process.wait()
        finally:
            process.kill()
            process.wait()
        if status:
            how = describe_exit(status, stderr)
            remedy = "Check that the format is the image's, and that no running VM uses it."
            raise ToolError(f"qemu-img could not convert it to {dest_format}: {how}", file=source, remedy=remedy)


__all__ = ("FORMATS", "convert", "open_source")
