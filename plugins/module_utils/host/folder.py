# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The folder in which everything lies that a snapshot needs for a while: scratch files, sockets, views."""

from __future__ import annotations

import os
import shutil
import typing as t

from ..vma.errors import RequestError, SpaceError
from ..vma.pending_file import target_errors
from .journal import Fields, Journal
from .provider import MARK, StepKind
from .scratch_space import find_shortage


def make_folder(journal: Journal, parent: str, run_id: str, owner: int | None = None) -> str:
    """Make the run's folder below C(parent), which must be there. It belongs to the user C(owner), if given.

    Raises: RequestError where the parent is no folder; TargetError, SpaceError.
    """
    if not os.path.isdir(parent):
        raise RequestError("this folder for scratch files does not exist", file=parent, remedy="Make it first.")
    shortage = find_shortage(parent)
    if shortage is not None:
        raise SpaceError(shortage, remedy="Make room there, or choose another folder.")
    path = os.path.join(os.path.realpath(parent), f"{MARK}-{run_id}")
    journal.add("folder", path=path)
    with target_errors(path):
        os.mkdir(path, 0o700)
        if owner is not None:
            os.chown(path, owner, -1)
    return path


def _remove_folder(fields: Fields) -> str | None:
    path = fields["path"]
    if not os.path.basename(path).startswith(f"{MARK}-") or not os.path.lexists(path):
        return None
    with target_errors(path):
        shutil.rmtree(path)
    return f"the folder {path}"


KINDS: t.Mapping[str, StepKind] = {"folder": StepKind(undo=_remove_folder, is_ground=True)}

__all__ = ("KINDS", "make_folder")
