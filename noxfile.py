# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The test stages of the collection: tools/test sets up what they need and runs them all.

The checks of form (lint, license-check, extra-checks, docs-check, ansible-lint) are antsibull-nox's and configured in
antsibull-nox.toml; the stages that run code are here. A stage that counts tests leaves the counts for tools/stages.py.
"""

from __future__ import annotations

import glob
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import typing as t
from xml.etree import ElementTree

import nox

try:
    import antsibull_nox
    from antsibull_nox.sessions.collections import CollectionSetup, prepare_collections
except ImportError:
    sys.exit("antsibull-nox is missing beside nox: run tools/test, which installs both.")

NAMESPACE, NAME = "vmbackup", "vma"
CODEC_TESTS = "tests/unit/plugins/module_utils/vma"
HOST_TESTS = "tests/unit/plugins/module_utils/host"
MODULE_TESTS = "tests/unit/plugins/modules"
PLAYBOOK_TESTS = "tests/unit/playbooks"
# No test takes half of it, on a machine as small as CI has. What waits for other tests has a limit of its own.
TEST_SECONDS = 300
SHEBANG = b"#!/usr/bin/env bash\n"
VECTORS = pathlib.Path("tests/unit/vectors")
# tools/stages.py reads them here
TALLIES = pathlib.Path(__file__).resolve().parent / ".nox/.cache/tally"

MODULE_PYTHONS = ["3.9", "3.10", "3.11", "3.12", "3.13"]

# The oldest supported ansible-core, the one of most installations, the newest; each with the Pythons it runs on, the
# preferred one first. The oldest runs on the oldest, the newest where there is a newer Python than Debian 12's.
CORES = {
    "2.17": ["3.10", "3.11", "3.12"],
    "2.19": ["3.11", "3.12", "3.13"],
    "2.21": ["3.12", "3.13"],
}
CORE = "2.19"

# The Python of the managed host in the integration tests of a core, where it is not the controller's: the newest and
# the oldest that the modules support.
HOST_PYTHONS = {"2.19": MODULE_PYTHONS[-1], "2.21": MODULE_PYTHONS[0]}

# What a run of the stage molecule has by itself.
SCENARIOS = ["hosts", "vm_backup", "failures", "restore"]

# Targets that boot many guests, and the one core that they run with; the stage examples drills with another.
TARGETS_OF_ONE_CORE = {"role_restore_drill": "2.21"}

# The versions of pip that ansible-test of these cores bootstraps its environments with.
BOOTSTRAPPED_PIPS = ["23.1.2", "24.2", "25.2"]


def use_real_interpreters() -> None:
    """Put the interpreters behind pyenv's shims on PATH: the shim of a version that is not active exits with 127."""
    folders = [folder for folder in os.environ["PATH"].split(os.pathsep) if pathlib.Path(folder).name != "shims"]
    pyenv = os.environ.get("PYENV_ROOT", os.path.expanduser("~/.pyenv"))
    folders += sorted(glob.glob(f"{glob.escape(pyenv)}/versions/3.*/bin"))
    os.environ["PATH"] = os.pathsep.join(folders)


def first_python(versions: list[str]) -> str:
    """Return the first version that is here, or else the first, for nox to say that it is missing."""
    return next((version for version in versions if shutil.which(f"python{version}")), versions[0])


def seed_pip_bootstrap() -> None:
    """Spare ansible-test the download of its pip bootstrap script: Python's own ensurepip does as well."""
    cache = pathlib.Path.home() / ".ansible/test/cache"
    cache.mkdir(parents=True, exist_ok=True)
    for version in BOOTSTRAPPED_PIPS:
        script = cache / f"get_pip_{version.replace('.', '_')}.py"
        if not script.exists():
            script.write_text("import ensurepip; ensurepip.bootstrap()\n", encoding="utf-8")


class Tally:
    """The counts of one stage, left where tools/stages.py finds them even if the stage fails."""

    def __init__(self, session: nox.Session) -> None:
        self.passed = 0
        self.failed: list[str] = []
        self.skipped: list[tuple[str, str]] = []
        self._path = TALLIES / f"{session.name}.json"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.unlink(missing_ok=True)

    def __enter__(self) -> Tally:
        return self

    def __exit__(self, *_failure: object) -> None:
        counts = {"passed": self.passed, "failed": self.failed, "skipped": self.skipped}
        self._path.write_text(json.dumps(counts), encoding="utf-8")

    def add_junit(self, *paths: pathlib.Path) -> None:
        """Count the test cases of JUnit files."""
        for path in paths:
            for case in ElementTree.parse(path).iter("testcase"):
                name = f"{case.get('classname')}::{case.get('name')}"
                skipped = case.find("skipped")
                # ansible-test says so where there is nothing in the collection that a sanity test looks at.
                if skipped is not None and skipped.text == "No tests applicable.":
                    continue
                if case.find("failure") is not None or case.find("error") is not None:
                    self.failed.append(name)
                elif skipped is not None:
                    self.skipped.append((name, skipped.get("message") or (skipped.text or "").strip()))
                else:
                    self.passed += 1


def files_of_git(session: nox.Session) -> list[str]:
    """List the files of the checkout, without those that git ignores."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    return [path for path in str(session.run(*command, external=True, silent=True)).split("\0") if path]


def run_pytest(session: nox.Session, *args: str) -> None:
    """Run pytest and count its tests. One that hangs fails, with the place where it hangs."""
    # Disks of tests that passed, kept for five Pythons, once filled the disk of CI.
    options = ["-q", "-p", "no:cacheprovider", f"--timeout={TEST_SECONDS}", "-o", "tmp_path_retention_policy=failed"]
    report = pathlib.Path(session.create_tmp(), "junit.xml")
    report.unlink(missing_ok=True)
    with Tally(session) as tally:
        try:
            session.run("pytest", *options, f"--junitxml={report}", *args, *session.posargs)
        finally:
            if report.exists():
                tally.add_junit(report)


def prepare_tree(session: nox.Session, core: str, *packages: str) -> CollectionSetup:
    """Install ansible-core and copy the collection into a tree of the shape that Ansible's tools ask for."""
    session.install(f"ansible-core~={core}.0", *packages)
    tree = prepare_collections(
        session, ansible_core_version=core, install_in_site_packages=False, install_out_of_tree=True
    )
    if tree is None:
        session.skip("nox was asked to run nothing")
    return tree


def ansible_test(session: nox.Session, core: str, kind: str, *options: str) -> None:
    """Run ansible-test sanity or units, and count."""
    tree = prepare_tree(session, core)
    seed_pip_bootstrap()
    with session.chdir(tree.current_path), Tally(session) as tally:
        try:
            session.run("ansible-test", kind, "--local", "--requirements", "--color=no", *options, *session.posargs)
        finally:
            tally.add_junit(*sorted(pathlib.Path("tests/output/junit").glob("*.xml")))


def python_version(session: nox.Session) -> str:
    """Return the version of the stage's Python, as ansible-test wants it."""
    code = "import sys; print('{}.{}'.format(*sys.version_info))"
    return str(session.run("python", "-c", code, silent=True)).strip()


def why_excluded(aliases: list[str]) -> str | None:
    """Return the alias by which ansible-test leaves a target out, if there is one."""
    for alias in aliases:
        if alias == "needs/root" and os.geteuid() != 0:
            return "needs root"
        if alias.startswith(("destructive", "disabled", "skip/", "unstable", "unsupported")):
            return f"has the alias {alias}"
    return None


def count_targets(tally: Tally, chosen: set[str]) -> None:
    """Count the targets that were to run, those that ansible-test left out, and what the targets could not test.

    A target without the means for one of its tests says so by a task's name: "Not tested here: <what>, <why>".
    """
    output = pathlib.Path("tests/output")
    ran: set[str] = set()
    for path in output.glob("data/integration-*.json"):
        ran.update(json.loads(path.read_text(encoding="utf-8"))["targets"])
    tally.passed += len(ran)
    tally.failed += sorted(chosen - ran)
    for path in sorted(pathlib.Path("tests/integration/targets").glob("*/aliases")):
        reason = why_excluded(path.read_text(encoding="utf-8").split())
        if reason and path.parent.name not in chosen:
            tally.skipped.append((path.parent.name, reason))
    for path in sorted(output.glob("junit/*.xml")):
        for case in ElementTree.parse(path).iter("testcase"):
            found = re.search("Not tested here: (.*?)( msg=|$)", case.get("name", ""))
            if found and case.find("skipped") is None:
                tally.skipped.append((path.name.split("-")[0], found[1]))


use_real_interpreters()
os.environ.setdefault("ANTSIBULL_NOX_IGNORE_INSTALLED_COLLECTIONS", "true")
antsibull_nox.load_antsibull_nox_toml()
nox.options.download_python = "never"
nox.options.error_on_missing_interpreters = False
nox.options.reuse_venv = "yes"


@nox.session(python=False)
def shell(session: nox.Session) -> None:
    """Check the shell scripts."""
    if not shutil.which("shellcheck"):
        session.skip("shellcheck is not installed")
    files = [path for path in map(pathlib.Path, files_of_git(session)) if path.is_file()]
    scripts = [str(path) for path in files if path.read_bytes().startswith(SHEBANG)]
    session.run("shellcheck", *scripts, external=True)


@nox.session
def changelog(session: nox.Session) -> None:
    """Check the changelog and its fragments."""
    tree = prepare_tree(session, CORE, "antsibull-changelog")
    with session.chdir(tree.current_path):
        session.run("antsibull-changelog", "lint")


@nox.session
def docsite(session: nox.Session) -> None:
    """Build the documentation as a site, warnings being errors."""
    tree = prepare_tree(session, CORE, "antsibull-docs", "ansible-pygments", "sphinx", "sphinx-ansible-theme")
    site = pathlib.Path(session.create_tmp(), "site")
    shutil.rmtree(site, ignore_errors=True)
    # antsibull-docs insists on a folder of its own
    site.mkdir(mode=0o700)
    env = {"ANSIBLE_COLLECTIONS_PATH": str(tree.current_place)}
    session.run("antsibull-docs", "sphinx-init", "--use-current", f"--dest-dir={site}", f"{NAMESPACE}.{NAME}", env=env)
    # References into other sites are docs-check's to judge: here they would need the network.
    with (site / "conf.py").open("a", encoding="utf-8") as conf:
        conf.write("\nintersphinx_mapping = {}\nsuppress_warnings = ['ref.ref']\n")
    session.run(str(site / "build.sh"), env={**env, "NO_COLOR": "1"}, external=True)


@nox.session
def package(session: nox.Session) -> None:
    """Build the tarball, have Galaxy's importer judge it, install it elsewhere and use it there."""
    session.install(f"ansible-core~={CORE}.0", "galaxy-importer")
    folder = pathlib.Path(session.create_tmp(), "package").resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    session.run("ansible-galaxy", "collection", "build", f"--output-path={folder}")
    (tarball,) = folder.glob("*.tar.gz")
    refuse_stray_files(session, tarball)
    archives = {str(path.resolve()): path.stem for path in sorted(VECTORS.glob("*.vma.*"))}
    manifest = json.loads((VECTORS / "manifest.json").read_text(encoding="utf-8"))["archives"]

    with session.chdir(folder), Tally(session) as tally:
        log = str(session.run("python", "-m", "galaxy_importer.main", tarball.name, silent=True))
        complaints = [line for line in log.splitlines() if line.startswith(("ERROR", "WARNING"))]
        if complaints:
            session.error("Galaxy's importer complains:\n" + "\n".join(complaints))

        session.run("ansible-galaxy", "collection", "install", "--offline", "-p", "collections", tarball.name)
        env = {"ANSIBLE_COLLECTIONS_PATH": str(folder / "collections"), "ANSIBLE_LOCALHOST_WARNING": "false"}
        module = f"{NAMESPACE}.{NAME}.vma_info"
        session.run("ansible", "localhost", "-m", module, "-a", f"path={next(iter(archives))}", env=env)

        args = json.dumps({"path": list(archives), "verify": "content"})
        output = str(session.run("ansible", "localhost", "-m", module, "-a", args, env=env, silent=True))
        results = {archive["path"]: archive for archive in json.loads(output.partition("=>")[2])["archives"]}
        for path, name in archives.items():
            if path in results and results[path]["uuid"] == manifest[name]["uuid"]:
                tally.passed += 1
            else:
                tally.failed.append(name)
        if tally.failed:
            session.error(f"The installed module misreads {', '.join(tally.failed)}:\n{output}")


def refuse_stray_files(session: nox.Session, tarball: pathlib.Path) -> None:
    """Fail if the tarball holds a file that git does not: build_ignore in galaxy.yml then lacks an entry."""
    ours = {*files_of_git(session), "FILES.json", "MANIFEST.json"}
    with tarfile.open(tarball) as archive:
        strays = sorted(member.name for member in archive if member.isfile() and member.name not in ours)
    if strays:
        session.error(f"The tarball holds what git does not: {', '.join(strays)}")


@nox.session
def examples(session: nox.Session) -> None:
    """Check the CI files that users copy, and run their steps with the collection as it is packed."""
    session.install(f"ansible-core~={CORE}.0", "check-jsonschema")
    for schema, name in (("github-workflows", "github-actions"), ("gitlab-ci", "gitlab-ci")):
        session.run("check-jsonschema", "--builtin-schema", f"vendor.{schema}", f"examples/ci/{name}.yml")
    folder = pathlib.Path(session.create_tmp(), "examples").resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    session.run("ansible-galaxy", "collection", "build", f"--output-path={folder}")
    (tarball,) = folder.glob("*.tar.gz")
    session.run("python", "tests/examples/ci_files.py", str(tarball), str(folder / "runs"))


@nox.session
def host(session: nox.Session) -> None:
    """Test what hypervisors need: snapshots on real storage, disks that boot, and their configurations."""
    session.install("-r", "tests/unit/requirements.txt")
    run_pytest(session, HOST_TESTS)


@nox.session(python=MODULE_PYTHONS)
def codec(session: nox.Session) -> None:
    """Test the codec under plain pytest, without Ansible."""
    session.install("-r", "tests/unit/requirements.txt")
    code = "import importlib.util, sys; sys.exit('Ansible is here' if importlib.util.find_spec('ansible') else 0)"
    session.run("python", "-c", code)
    run_pytest(session, CODEC_TESTS)


@nox.session
def filters(session: nox.Session) -> None:
    """Test the filters and what else runs on the control node; modules warn otherwise in a process that has these."""
    session.install(f"ansible-core~={CORE}.0", "-r", "tests/unit/requirements.txt")
    run_pytest(
        session,
        "tests/unit",
        *(f"--ignore={folder}" for folder in (CODEC_TESTS, HOST_TESTS, MODULE_TESTS, PLAYBOOK_TESTS)),
    )


@nox.session
def playbooks(session: nox.Session) -> None:
    """Test the restore onto volumes, in an emulated guest with libvirt; onto files the stage molecule does."""
    session.install(f"ansible-core~={CORE}.0", "-r", "tests/unit/requirements.txt")
    run_pytest(session, PLAYBOOK_TESTS)


@nox.session(default=False)
def zfs(session: nox.Session) -> None:
    """Test snapshots of ZFS, and restoring onto it, in an emulated guest; many minutes, as its modules are compiled."""
    session.install(f"ansible-core~={CORE}.0", "-r", "tests/unit/requirements.txt")
    session.env["VMBACKUP_STORAGE_ZFS"] = "1"
    run_pytest(session, f"{HOST_TESTS}/test_zfs.py", PLAYBOOK_TESTS)


@nox.session
def molecule(session: nox.Session) -> None:
    """Run scenarios of extensions/molecule on hosts in namespaces; after "--", other arguments for molecule.

    VMA_TEST_FAILURES=.* walks over all points of failure, and the scenario "crowd" has 30 hosts; both take long.
    """
    if os.geteuid() != 0:
        session.skip("needs root")
    missing = [tool for tool in ("gcc", "ip", "mmdebstrap", "qemu-img", "ssh") if not shutil.which(tool)]
    if missing:
        session.skip(f"not installed: {', '.join(missing)}")
    tree = prepare_tree(session, CORE, "molecule")
    with session.chdir(tree.current_path), Tally(session) as tally:
        scenarios = [f"--scenario-name={name}" for name in SCENARIOS]
        session.run(
            "extensions/molecule/tools/fleet",
            # Molecule looks for its base configuration at the root of a checkout, and this is a copy of one.
            *("wrap", "molecule", "--base-config=.config/molecule/config.yml"),
            *(session.posargs or ["test", *scenarios, "--continue-on-failure", "--report"]),
            env={
                "ANSIBLE_COLLECTIONS_PATH": str(tree.current_place),
                # Without hosts every scenario would succeed.
                "ANSIBLE_INVENTORY_UNPARSED_FAILED": "true",
                "NO_COLOR": "1",
            },
            external=True,
        )
        if not session.posargs:
            tally.passed = len(SCENARIOS)


@nox.session
def fuzz(session: nox.Session) -> None:
    """Give the codec some thousand mutants of archives; after "--", --mutants 1000000 makes it a long run."""
    session.run("python", "tests/fuzz/fuzz.py", *(session.posargs or ["--mutants", "10000"]))


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """Measure the codec beside its peers, on an idle machine; after "--", the options of the script."""
    session.install(f"ansible-core~={CORE}.0", "matplotlib")
    session.run("python", "tests/benchmarks/benchmarks.py", *session.posargs)


def sanity(session: nox.Session, core: str) -> None:
    """Run ansible-test sanity."""
    ansible_test(session, core, "sanity", "--junit")


def units(session: nox.Session, core: str) -> None:
    """Run the modules' unit tests in ansible-test's harness; the codec knows nothing of Ansible."""
    ansible_test(session, core, "units", "--python", python_version(session), f"{MODULE_TESTS}/")


def integration(session: nox.Session, core: str) -> None:
    """Run ansible-test integration."""
    tree = prepare_tree(session, core)
    python = host_python = python_version(session)
    with session.chdir(tree.current_path), Tally(session) as tally:
        wanted = HOST_PYTHONS.get(core, python)
        if shutil.which(f"python{wanted}"):
            host_python = wanted
        else:
            tally.skipped.append((f"the modules under Python {wanted}", f"Python {wanted} not found"))
        left_out = [f"--exclude={target}" for target, its_core in TARGETS_OF_ONE_CORE.items() if its_core != core]
        command = ["ansible-test", "integration", "--color=no", *left_out, *session.posargs]
        hosts = [f"--controller=origin:python={python}", f"--target=controller:python={host_python}"]
        listing = session.run(*command, "--list-targets", silent=True, stderr=subprocess.DEVNULL)
        try:
            session.run(*command, "--continue-on-error", *hosts)
        finally:
            count_targets(tally, set(str(listing).split()))
        if not tally.passed:
            session.error("No target ran.")


def add_stage(name: str, function: t.Callable[[nox.Session, str], None], core: str) -> None:
    """Make a stage of a function and the ansible-core that it is run with."""

    def stage(session: nox.Session) -> None:
        function(session, core)

    stage.__doc__ = function.__doc__
    nox.session(stage, name=f"{name}-{core}", python=first_python(CORES[core]))


for supported in reversed(CORES):
    add_stage("integration", integration, supported)
for supported in CORES:
    add_stage("sanity", sanity, supported)
    add_stage("units", units, supported)


if __name__ == "__main__":
    nox.main()
