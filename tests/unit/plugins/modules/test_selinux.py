# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""SELinux labels, where the kernel need not have SELinux: the labels are real, the policy is made up."""

from __future__ import annotations

import errno
import os
import pathlib
import typing as t

import pytest

from ansible_collections.vmbackup.vma.plugins.modules import vma_create, vma_extract
from ansible_collections.vmbackup.vma.tests.unit.plugins.modules.helpers import Run

BINDING: t.Any = pytest.importorskip(
    "ansible.module_utils.compat.selinux", reason="libselinux is not installed", exc_type=ImportError
)

FOLDERS = "system_u:object_r:var_t:s0"
POLICYS = "system_u:object_r:virt_image_t:s0"
TASKS = "system_u:object_r:svirt_image_t:s0"
OLD = "staff_u:object_r:tmp_t:s0:c1,c2"


def label_of(path: str) -> str:
    return os.getxattr(path, "security.selinux").rstrip(b"\0").decode()


@pytest.fixture
def selinux(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host with SELinux: a file without a label has its folder's, as the kernel would have given it."""
    try:
        os.setxattr(tmp_path, "security.selinux", FOLDERS.encode() + b"\0")
    except OSError as error:
        pytest.skip(f"labels cannot be set here: {error.strerror}")
    real: t.Callable[[str], list[t.Any]] = BINDING.lgetfilecon_raw

    def get_label(path: str) -> list[t.Any]:
        try:
            return real(path)
        except OSError as error:
            if error.errno == errno.ENODATA:
                return [0, FOLDERS]
            raise

    for name, function in {
        "is_selinux_enabled": lambda: 1,
        "is_selinux_mls_enabled": lambda: 1,
        "lgetfilecon_raw": get_label,
        "matchpathcon": lambda _path, _mode: [0, POLICYS],
    }.items():
        monkeypatch.setattr(BINDING, name, function)


@pytest.mark.usefixtures("selinux")
@pytest.mark.parametrize(
    ("old", "options", "label"),
    [
        pytest.param(None, {}, POLICYS, id="new"),
        pytest.param(None, {"setype": "svirt_image_t"}, TASKS, id="new, as the task says"),
        pytest.param(OLD, {}, OLD, id="replaced"),
        pytest.param(OLD, {"setype": "tape_t"}, OLD.replace("tmp_t", "tape_t"), id="replaced, as the task says"),
        pytest.param(
            OLD,
            {"seuser": "_default", "serole": "_default", "setype": "_default", "selevel": "_default"},
            POLICYS,
            id="replaced, as the policy says",
        ),
    ],
)
def test_labels(
    old: str | None, options: dict[str, str], label: str, run: Run, tmp_path: pathlib.Path, image: pathlib.Path
) -> None:
    archive = str(tmp_path / "a.vma")
    folder = tmp_path / "out"
    folder.mkdir()
    paths = [archive, str(folder / "disk-d.raw"), str(folder / "a.conf")]
    for path in paths if old is not None else []:
        pathlib.Path(path).write_bytes(b"old")
        os.setxattr(path, "security.selinux", t.cast(str, old).encode() + b"\0")
    making = {"devices": [{"name": "d", "path": str(image)}], "configs": [{"name": "a.conf", "content": "name: a\n"}]}
    assert run(vma_create, dest=archive, **making, **options)["changed"] is True
    assert run(vma_extract, src=archive, dest=str(folder), **options)["changed"] is True
    assert [label_of(path) for path in paths] == [label] * 3
    # once more, nothing is left to do
    assert run(vma_create, dest=archive, **making, **options)["changed"] is False
    assert run(vma_extract, src=archive, dest=str(folder), **options)["changed"] is False
