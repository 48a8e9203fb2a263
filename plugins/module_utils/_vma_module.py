# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Private to this collection: what the modules over the codec share, between its plain Python and Ansible."""

from __future__ import annotations

import contextlib
import hashlib
import signal
import typing as t

from .vma.errors import ArchiveError, Problem, RequestError, VmaError
from .vma.layout import Header
from .vma.pending_file import remove_unfinished
from .vma.reader import Reader

if t.TYPE_CHECKING:
    from types import FrameType

    from ansible.module_utils.basic import AnsibleModule

_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """A signal asks the module to end. Not an Exception, so that nothing on the way takes it for a failure."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.name = signal.Signals(number).name


@contextlib.contextmanager
def _interruptible() -> t.Iterator[None]:
    """Raise Interrupted in the main thread when a signal comes: what is unfinished is then removed on the way out.

    From then on signals change nothing any more until the process ends, which it is about to do.
    """
    previous = {number: signal.getsignal(number) for number in _SIGNALS}
    # A signal that is ignored from outside, as by nohup, stays so.
    taken = [number for number in _SIGNALS if previous[number] is not signal.SIG_IGN]
    interrupted: list[int] = []

    def interrupt(number: int, _frame: FrameType | None) -> None:
        # A second signal must not end the cleaning up that the first one started. To have it ignored by SIG_IGN is no
        # way: of one that has come already, and finds that in place of its handler, Python complains on stderr.
        if interrupted:
            return
        interrupted.append(number)
        raise Interrupted(number)

    for number in taken:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        if interrupted:
            # Before Python ends it takes its handlers away, and a signal would end it then.
            signal.pthread_sigmask(signal.SIG_BLOCK, taken)
        else:
            for number in taken:
                signal.signal(number, previous[number] or signal.SIG_DFL)


def error_fields(error: VmaError) -> dict[str, t.Any]:
    """An error as results show it: C(kind), C(message), and file, place and remedy as far as they are known."""
    if isinstance(error, ArchiveError):
        fields = error.problem.as_dict()
    else:
        fields = {"kind": error.kind, "message": error.message}
    if error.file is not None:
        fields["file"] = error.file
    if error.remedy is not None:
        fields["remedy"] = error.remedy
    return fields


@contextlib.contextmanager
def failing(module: AnsibleModule) -> t.Iterator[None]:
    """Run the module's work: errors of the codec, and signals, become a failed task."""
    try:
        with _interruptible():
            yield
    except VmaError as error:
        module.fail_json(msg=str(error), error=error_fields(error))
    except Interrupted as interrupted:
        remove_unfinished()
        message = f"interrupted by {interrupted.name}; files that were not finished were removed"
        module.fail_json(msg=message, error={"kind": "interrupted", "message": message})


def check_positive(module: AnsibleModule, *names: str) -> None:
    """Raises: RequestError for an option of these that is below 1, which would mean something else further down."""
    for name in names:
        value = module.params[name]
        if value is not None and value < 1:
            raise RequestError(
                f"expected a number above 0 for {name}, got {value}", remedy="Leave it out for the default."
            )


def read_header(path: str) -> tuple[Header, str, list[Problem]]:
    """The header of an archive, its compression, and what is wrong with the header but does not hinder reading it.

    Raises: ArchiveError where there is no header to be read; RequestError, ToolError.
    """
    problems: list[Problem] = []
    with Reader(path, problems.append) as reader:
        return reader.header, reader.stream.compression, problems


def set_attributes(module: AnsibleModule, path: str, *, is_new: bool) -> tuple[bool, list[dict[str, t.Any]]]:
    """Give a file the attributes that the task asks for. Returns whether any was another, and the difference.

    A file that C(is_new) also gets the SELinux label that the host's policy has for its path, as all modules of
    ansible-core see to; so far it has its folder's.
    """
    arguments = module.load_file_common_arguments(module.params, path=path)
    # A name from an archive may look like a variable or a home folder, and must not be taken for one.
    arguments["path"] = path
    if is_new:
        default = module.selinux_default_context(path)
        arguments["secontext"] = [asked or usual for asked, usual in zip(arguments["secontext"], default)]
    difference: dict[str, t.Any] = {}
    changed = bool(module.set_fs_attributes_if_different(arguments, False, difference, expand=False))
    return changed, [{"before_header": path, "after_header": path, **difference}] if difference else []


def text_diff(path: str, before: str, after: str) -> dict[str, str]:
    """A difference between two texts, as diff mode shows it."""
    return {"before_header": path, "after_header": path, "before": before, "after": after}


def content_diff(path: str, before: bytes | None, after: bytes | None) -> dict[str, str]:
    """A difference between two configs, contents and all."""
    return text_diff(path, (before or b"").decode("utf-8", "replace"), (after or b"").decode("utf-8", "replace"))


def fingerprint(data: bytes) -> str:
    """What tells one config from another, without telling what is in it."""
    return f"{len(data)} bytes, SHA-256 {hashlib.sha256(data).hexdigest()}"


__all__ = (
    "Interrupted",
    "check_positive",
    "content_diff",
    "error_fields",
    "failing",
    "fingerprint",
    "read_header",
    "set_attributes",
    "text_diff",
)
