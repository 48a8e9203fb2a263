# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Run the steps of the CI files in examples/ci as they are written there, over archives of the tests.

    python tests/examples/ci_files.py vmbackup-vma-0.1.0.tar.gz FOLDER

It needs ansible-core. The collection is installed from the tarball, not from Galaxy; that is the one difference. A run
over sound archives has to succeed, one with a damaged archive among them has to fail, and both have to write the tests
that the CI system collects.
"""

from __future__ import annotations

import gzip
import os
import pathlib
import shutil
import subprocess
import sys
import typing as t
import xml.etree.ElementTree as ET

import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
VECTORS = ROOT / "tests/unit/vectors"
INSTALL = "ansible-galaxy collection install vmbackup.vma"


def github_steps(document: t.Any) -> tuple[list[str], str]:
    """The commands of the workflow, and which files it keeps."""
    (job,) = document["jobs"].values()
    (kept,) = [step["with"]["path"] for step in job["steps"] if "upload-artifact" in step.get("uses", "")]
    return [step["run"] for step in job["steps"] if "run" in step], kept


def gitlab_steps(document: t.Any) -> tuple[list[str], str]:
    """The commands of the job, and which files it keeps."""
    (job,) = document.values()
    return job["script"], job["artifacts"]["reports"]["junit"]


FILES = {"github-actions.yml": github_steps, "gitlab-ci.yml": gitlab_steps}


def make_project(folder: pathlib.Path, *, damaged: bool) -> None:
    """What the files expect in the repository: an inventory and the variables of the drill; and archives."""
    for name in ("dump", "scratch"):
        (folder / name).mkdir(parents=True)
    for vmid, name in ((101, "single"), (102, "multi")):
        archive = folder / f"dump/vzdump-qemu-{vmid}-2026_11_20-03_00_00.vma"
        data = gzip.decompress((VECTORS / f"{name}.vma.gz").read_bytes())
        archive.write_bytes(data[: -len(data) // 2] if damaged and name == "multi" else data)
    host = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
    variables = {
        "restore_drill_dir": str(folder / "dump"),
        "restore_drill_scratch_dir": str(folder / "scratch"),
        "restore_drill_mode": "extract",
    }
    (folder / "inventory.yml").write_text(yaml.safe_dump({"all": {"hosts": {"backup1": host}}}))
    (folder / "drill.yml").write_text(yaml.safe_dump(variables))


def run_steps(folder: pathlib.Path, commands: list[str], tarball: pathlib.Path) -> int:
    """The exit code of the first command that fails, as a CI system runs them."""
    place = folder / "collections"
    environment = {**os.environ, "ANSIBLE_COLLECTIONS_PATH": str(place), "ANSIBLE_HOME": str(folder / "ansible")}
    for command in commands:
        offline = command.replace(INSTALL, f"ansible-galaxy collection install --offline -p {place} {tarball}")
        code = subprocess.run(["bash", "-e", "-c", offline], cwd=folder, env=environment, check=False).returncode
        if code != 0:
            return code
    return 0


def check(name: str, folder: pathlib.Path, tarball: pathlib.Path, *, damaged: bool) -> None:
    """Run one file. Raises: AssertionError where it does not do what it should."""
    commands, kept = FILES[name](yaml.safe_load((ROOT / "examples/ci" / name).read_text()))
    assert len(commands) == 2, commands
    assert commands[0] == INSTALL, commands[0]
    make_project(folder, damaged=damaged)
    code = run_steps(folder, commands, tarball)
    assert (code != 0) == damaged, f"{name} ended with {code}"
    (document,) = folder.glob(kept)
    suite = ET.parse(document).getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("2", str(int(damaged))), ET.tostring(suite)
    assert not list((folder / "scratch").iterdir())


def main() -> None:
    """Run all files."""
    tarball, place = (pathlib.Path(argument).resolve() for argument in sys.argv[1:])
    for name in FILES:
        for damaged in (False, True):
            folder = place / f"{pathlib.Path(name).stem}-{'damaged' if damaged else 'sound'}"
            shutil.rmtree(folder, ignore_errors=True)
            check(name, folder, tarball, damaged=damaged)
            print(f"{name}: {'fails over a damaged archive' if damaged else 'runs'}")


if __name__ == "__main__":
    main()
