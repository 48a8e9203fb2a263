# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Let plain pytest import the collection by its full name, wherever the checkout lies and without Ansible."""

from __future__ import annotations

import importlib.util
import pathlib
import sys
import tempfile


def _is_importable() -> bool:
    """Tell whether ansible-test, or a checkout inside ansible_collections, has made the collection known already."""
    try:
        return importlib.util.find_spec("ansible_collections.vmbackup.vma") is not None
    except ModuleNotFoundError:
        return False


if not _is_importable():
    # The folder goes when its object goes, so a name has to hold it until the tests end.
    _TREE = tempfile.TemporaryDirectory(prefix="vma-collections-")
    _NAMESPACE = pathlib.Path(_TREE.name, "ansible_collections", "vmbackup")
    _NAMESPACE.mkdir(parents=True)
    (_NAMESPACE / "vma").symlink_to(pathlib.Path(__file__).resolve().parents[2], target_is_directory=True)
    sys.path.insert(0, _TREE.name)
