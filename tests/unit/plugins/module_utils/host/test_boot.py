# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Real disks on a real QEMU: they come up, or fail for the right reason, are never written, and leave nothing."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import shutil
import socket
import struct
import subprocess
import threading
import time
import typing as t
import zlib

import pytest

from ansible_collections.vmbackup.vma.plugins.module_utils.host import boot, firmware
from ansible_collections.vmbackup.vma.plugins.module_utils.host.boot_scratch import PID_FILE, PREFIX
from ansible_collections.vmbackup.vma.plugins.module_utils.host.qemu_command import Disk
from ansible_collections.vmbackup.vma.plugins.module_utils.vma.errors import (
    RequestError,
    SourceError,
    ToolError,
    VmaError,
)
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.host import boot_disks
from ansible_collections.vmbackup.vma.tests.unit.plugins.module_utils.host.boot_disks import ALIVE, UP, Forge

Boot = t.Callable[..., boot.Outcome]

PATIENCE = 180
"""Seconds for a guest that is to come up, on a machine that is busy with other things."""


@pytest.fixture(scope="session")
def forge(tmp_path_factory: pytest.TempPathFactory) -> Forge:
    """Makes the disks."""
    return Forge(tmp_path_factory.mktemp("forge"))


@pytest.fixture
def scratch(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "scratch"
    path.mkdir()
    return path


@pytest.fixture
def boot_disks_of(scratch: pathlib.Path) -> Boot:
    """Boots disks; they are what they were and the scratch folder is empty afterwards."""

    def run(*disks: pathlib.Path | Disk, **options: t.Any) -> boot.Outcome:
        given = [disk if isinstance(disk, Disk) else Disk(str(disk)) for disk in disks]
        before = [_sha256(disk.path) for disk in given]
        settings = {"expect": ALIVE, "timeout": PATIENCE, "memory": 256, "scratch_dir": str(scratch), **options}
        outcome = boot.boot(boot.Request(disks=given, **settings))
        assert [_sha256(disk.path) for disk in given] == before
        assert os.listdir(scratch) == []
        return outcome

    return run


def _sha256(path: str | os.PathLike[str]) -> str:
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()


def _check_alive(outcome: boot.Outcome, marker: str = "intact") -> None:
    assert outcome.failure is None, f"{outcome.failure}\n{outcome.console.text}"
    assert outcome.match == f"ALIVE marker={marker}"
    assert outcome.seconds == outcome.signs["expect"] > 0


def _check_failed(outcome: boot.Outcome, kind: str, says: str) -> None:
    assert outcome.failure is not None, outcome.console.text
    assert outcome.failure.kind == kind, f"{outcome.failure}\n{outcome.console.text}"
    assert says in outcome.failure.message
    assert outcome.failure.remedy in str(outcome.failure)


# --- what comes up ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_format", ["raw", "qcow2", "vmdk"])
def test_a_bios_disk_boots(boot_disks_of: Boot, forge: Forge, tmp_path: pathlib.Path, image_format: str) -> None:
    disk = forge.bios()
    if image_format != "raw":
        converted = tmp_path / f"disk, with a comma.{image_format}"
        subprocess.run(["qemu-img", "convert", "-O", image_format, disk, converted], check=True)
        disk = converted
    outcome = boot_disks_of(Disk(str(disk), image_format))
    _check_alive(outcome)
    assert outcome.accelerator in ("kvm", "tcg")
    assert "SeaBIOS" in outcome.console.text
    assert outcome.console.tail(1) == "ALIVE marker=intact" or "test login:" in outcome.console.tail(1)
    assert len(outcome.console.tail(2).splitlines()) == 2
    assert (outcome.notes, outcome.plan.changes, outcome.has_screenshot) == ([], [], False)


@pytest.mark.parametrize(("bus", "machine"), [("scsi", "pc"), ("ide", "pc"), ("virtio", "q35")])
def test_each_bus(boot_disks_of: Boot, forge: Forge, bus: str, machine: str) -> None:
    _check_alive(boot_disks_of(Disk(str(forge.bios()), bus=bus), machine=machine))


@pytest.mark.parametrize(
    ("bus", "machine", "controller"),
    [
        ("sata", "pc", "virtio-scsi-pci"),
        ("sata", "q35", "virtio-scsi-pci"),
        ("ide", "q35", "virtio-scsi-pci"),
        ("scsi", "pc", "lsi"),
        ("scsi", "q35", "megasas"),
        ("scsi", "pc", "pvscsi"),
    ],
)
def test_each_controller(boot_disks_of: Boot, forge: Forge, bus: str, machine: str, controller: str) -> None:
    """Here the firmware finds the disk; a kernel for clouds has no drivers for what clouds do not have."""
    disk = Disk(str(forge.bios()), bus=bus)
    outcome = boot_disks_of(disk, machine=machine, scsi_controller=controller, expect=UP)
    assert outcome.failure is None, outcome.console.text


@pytest.mark.parametrize(("machine", "own"), [("pc", None), ("q35", 0x84000), ("q35", 0x20000)])
def test_a_uefi_disk_boots(
    boot_disks_of: Boot, forge: Forge, tmp_path: pathlib.Path, machine: str, own: int | None
) -> None:
    disk = forge.uefi()
    variables = None
    if own is not None:
        found = [place for size, _code, place in firmware.PLACES if size == own and os.path.exists(place)]
        if not found:
            pytest.skip(f"the package ovmf has no firmware with {firmware.SIZES[own]} of flash memory here")
        variables = tmp_path / "efi-vars"
        # A disk for them may be larger than they are, as on LVM.
        variables.write_bytes(pathlib.Path(found[0]).read_bytes() + bytes(1 << 20))
    before = variables and _sha256(variables)
    outcome = boot_disks_of(disk, firmware="uefi", machine=machine, efi_vars=variables and str(variables))
    _check_alive(outcome)
    assert before == (variables and _sha256(variables))
    assert "BdsDxe: starting" in outcome.console.text


@pytest.mark.parametrize("first", ["one", "two"])
def test_the_first_disk_is_booted(boot_disks_of: Boot, forge: Forge, first: str) -> None:
    disks = {name: forge.bios(marker=name) for name in ("one", "two")}
    second = "two" if first == "one" else "one"
    _check_alive(boot_disks_of(disks[first], disks[second]), marker=first)


def test_a_bios_boots_from_the_first_disk_alone(boot_disks_of: Boot, tmp_path: pathlib.Path) -> None:
    good = boot_disks.make_tiny_disk(tmp_path / "good.raw", "alive")
    empty = tmp_path / "empty.raw"
    empty.write_bytes(bytes(1 << 20))
    _check_failed(boot_disks_of(empty, good, expect="alive"), "no_boot_device", "No bootable device")
    assert boot_disks_of(good, empty, expect="alive").failure is None


def test_uefi_goes_on_to_the_next_disk(boot_disks_of: Boot, forge: Forge, tmp_path: pathlib.Path) -> None:
    """It complains of the first one, and that is no failure."""
    empty = tmp_path / "empty.raw"
    empty.write_bytes(bytes(1 << 20))
    outcome = boot_disks_of(empty, forge.uefi(), firmware="uefi", machine="q35", expect=UP)
    assert outcome.failure is None, outcome.console.text
    assert "BdsDxe: failed to load" in outcome.console.text


def test_uefi_leaves_alone_what_is_not_to_boot(boot_disks_of: Boot, forge: Forge, tmp_path: pathlib.Path) -> None:
    """Else a disk that boots hides that the one before it does not."""
    empty = tmp_path / "empty.raw"
    empty.write_bytes(bytes(1 << 20))
    other = Disk(str(forge.uefi()), boot=False)
    _check_failed(
        boot_disks_of(empty, other, firmware="uefi", machine="q35"), "no_boot_device", "BdsDxe: failed to load"
    )


def test_without_a_sign_a_login_prompt_is_waited_for(boot_disks_of: Boot, forge: Forge) -> None:
    outcome = boot_disks_of(forge.bios(), expect=None)
    assert outcome.failure is None
    assert outcome.match == "login:"


def test_the_guest_agent_answers(boot_disks_of: Boot, forge: Forge) -> None:
    outcome = boot_disks_of(forge.bios("test.agent", agent=True), expect=None, expect_agent=True)
    assert outcome.failure is None, outcome.console.text
    assert list(outcome.signs) == ["expect_agent"]
    assert outcome.match is None


def test_all_signs_have_to_come(boot_disks_of: Boot, forge: Forge) -> None:
    outcome = boot_disks_of(forge.bios("test.stop"), expect_agent=True)
    _check_failed(outcome, "shutdown", "before there was a sign of life")
    assert list(outcome.signs) == ["expect"]
    assert outcome.seconds > outcome.signs["expect"] + 5


def test_a_port_takes_connections(boot_disks_of: Boot, forge: Forge) -> None:
    outcome = boot_disks_of(forge.bios("test.network"), expect=None, expect_port=8080)
    assert outcome.failure is None, outcome.console.text
    assert list(outcome.signs) == ["expect_port"]


def test_a_port_that_nobody_listens_on(boot_disks_of: Boot, forge: Forge) -> None:
    """QEMU itself takes the connection; that is not the guest."""
    outcome = boot_disks_of(forge.bios("test.network test.stop"), expect_port=8081)
    _check_failed(outcome, "shutdown", "before there was a sign of life")
    assert list(outcome.signs) == ["expect"]


def test_nobody_is_reached_from_inside(boot_disks_of: Boot, forge: Forge) -> None:
    """The user-mode network would let the guest reach this host, and so its living twin."""
    with socket.create_server(("127.0.0.1", 0)) as twin:
        disk = forge.bios(f"test.network test.twin={twin.getsockname()[1]}")
        outcome = boot_disks_of(disk, expect="TWIN .*", expect_port=8080)
        assert outcome.match == "TWIN not met"
        twin.settimeout(0)
        with pytest.raises(BlockingIOError):
            twin.accept()


# --- what does not ----------------------------------------------------------------------------------------------------


def _without_boot_sector(disk: pathlib.Path) -> None:
    boot_disks.zero(disk, 0, 512)


def _with_endless_code(disk: pathlib.Path) -> None:
    # Zeros would be instructions too and lead anywhere: QEMU 7.2 itself has crashed on the way.
    jump_to_itself = b"\xeb\xfe"
    with disk.open("r+b") as image:
        image.write(jump_to_itself)


def _without_file_system(disk: pathlib.Path) -> None:
    boot_disks.zero(disk, boot_disks.DATA_START, 64 << 10)


def _without_boot_partition(disk: pathlib.Path) -> None:
    boot_disks.zero(disk, boot_disks.BOOT_START, 1 << 20)


def test_no_boot_sector(boot_disks_of: Boot, forge: Forge, tmp_path: pathlib.Path) -> None:
    disk = forge.broken(forge.bios(), tmp_path / "broken", _without_boot_sector)
    outcome = boot_disks_of(disk)
    _check_failed(outcome, "no_boot_device", "No bootable device")
    assert outcome.signs == {}
    assert outcome.seconds < PATIENCE


def test_code_in_the_boot_sector_that_never_ends(boot_disks_of: Boot, forge: Forge, tmp_path: pathlib.Path) -> None:
    """The firmware hands over to it, and nobody says a word any more."""
    disk = forge.broken(forge.bios(), tmp_path / "broken", _with_endless_code)
    _check_failed(boot_disks_of(disk, timeout=5), "timeout", "none within 5 seconds of expect")


def test_no_boot_partition(boot_disks_of: Boot, forge: Forge, tmp_path: pathlib.Path) -> None:
    disk = forge.broken(forge.bios(), tmp_path / "broken", _without_boot_partition)
    _check_failed(boot_disks_of(disk), "boot_loader", "Missing operating system")


def test_no_kernel(boot_disks_of: Boot, forge: Forge, tmp_path: pathlib.Path) -> None:
    kernel = boot_disks.need_everything().image.read_bytes()
    disk = forge.broken(forge.bios(), tmp_path / "broken", lambda path: boot_disks.zero_content(path, kernel))
    _check_failed(boot_disks_of(disk), "boot_loader", "Booting kernel failed")


def test_a_damaged_system(boot_disks_of: Boot, forge: Forge, tmp_path: pathlib.Path) -> None:
    system = forge.system().read_bytes()
    disk = forge.broken(forge.bios(), tmp_path / "broken", lambda path: boot_disks.zero_content(path, system))
    _check_failed(boot_disks_of(disk), "kernel_panic", "VFS: Unable to mount root fs on unknown-block(0,0)")


def test_no_system(boot_disks_of: Boot, forge: Forge) -> None:
    outcome = boot_disks_of(forge.bios(with_system=False))
    _check_failed(outcome, "kernel_panic", "Kernel panic - not syncing")


def test_a_system_whose_init_is_missing(boot_disks_of: Boot, forge: Forge) -> None:
    _check_failed(boot_disks_of(forge.bios("rdinit=/nowhere root=/dev/none")), "kernel_panic", "Kernel panic")


def test_a_broken_file_system(boot_disks_of: Boot, forge: Forge, tmp_path: pathlib.Path) -> None:
    disk = forge.broken(forge.bios("test.stop"), tmp_path / "broken", _without_file_system)
    outcome = boot_disks_of(disk)
    _check_failed(outcome, "shutdown", "before there was a sign of life")
    assert "no marker was found" in outcome.console.text


def test_a_system_that_hangs(boot_disks_of: Boot, forge: Forge) -> None:
    outcome = boot_disks_of(forge.bios("test.hang"), timeout=8)
    _check_failed(outcome, "timeout", "none within 8 seconds of expect")
    assert outcome.seconds > 8


def test_a_system_that_shuts_itself_down(boot_disks_of: Boot, forge: Forge) -> None:
    _check_failed(boot_disks_of(forge.bios("test.poweroff")), "shutdown", "shut itself down")


def test_a_sign_right_before_the_end_counts(boot_disks_of: Boot, forge: Forge) -> None:
    outcome = boot_disks_of(forge.bios("test.poweroff"), expect=UP)
    assert outcome.failure is None


def test_a_system_that_starts_again_and_again(boot_disks_of: Boot, forge: Forge) -> None:
    _check_failed(boot_disks_of(forge.bios("test.reset"), timeout=40), "timeout", "the guest was reset")


def test_no_efi_system_partition(boot_disks_of: Boot, forge: Forge, tmp_path: pathlib.Path) -> None:
    disk = forge.broken(forge.uefi(), tmp_path / "broken", _without_boot_partition)
    outcome = boot_disks_of(disk, firmware="uefi", machine="q35")
    _check_failed(outcome, "no_boot_device", "BdsDxe: failed to load Boot0001")


def test_a_damaged_efi_program(boot_disks_of: Boot, forge: Forge, tmp_path: pathlib.Path) -> None:
    program = forge.unified_kernel().read_bytes()
    disk = forge.broken(forge.uefi(), tmp_path / "broken", lambda path: boot_disks.zero_content(path, program))
    _check_failed(boot_disks_of(disk, firmware="uefi"), "no_boot_device", "BdsDxe: failed to")


def test_a_bios_disk_under_uefi(boot_disks_of: Boot, forge: Forge) -> None:
    boot_disks.need_everything(uefi=True)
    _check_failed(boot_disks_of(forge.bios(), firmware="uefi"), "no_boot_device", "BdsDxe: failed to load")


def test_a_screenshot_of_a_failure(boot_disks_of: Boot, forge: Forge, tmp_path: pathlib.Path) -> None:
    picture = tmp_path / "screen.png"
    disk = forge.broken(forge.bios(), tmp_path / "broken", _without_boot_sector)
    outcome = boot_disks_of(disk, screenshot=str(picture))
    assert outcome.has_screenshot
    width, height, pixels = _read_png(picture)
    assert (width, height) == (720, 400)
    assert len(set(pixels)) == 2  # grey words on black


def _read_png(path: pathlib.Path) -> tuple[int, int, bytes]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    at, chunks = 8, {}
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        content = data[at + 4 : at + 8 + length]
        assert struct.unpack_from(">I", data, at + 8 + length)[0] == zlib.crc32(content)
        chunks[content[:4]] = content[4:]
        at += 12 + length
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    width, height, *rest = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert rest == [8, 2, 0, 0, 0]
    rows = zlib.decompress(chunks[b"IDAT"])
    assert len(rows) == height * (1 + 3 * width)
    return width, height, rows


def test_a_guest_that_is_gone_has_no_screen(boot_disks_of: Boot, forge: Forge, tmp_path: pathlib.Path) -> None:
    picture = tmp_path / "screen.png"
    outcome = boot_disks_of(forge.bios("test.poweroff"), screenshot=str(picture))
    _check_failed(outcome, "shutdown", "shut itself down")
    assert not outcome.has_screenshot
    assert "There is no screenshot" in outcome.notes[0]
    assert not picture.exists()


# --- the host's failures ----------------------------------------------------------------------------------------------


def test_a_format_that_the_image_has_not(boot_disks_of: Boot, forge: Forge) -> None:
    with pytest.raises(ToolError) as raised:
        boot_disks_of(Disk(str(forge.bios()), "qcow2"))
    assert raised.value.file == str(forge.bios())
    assert "qemu-img cannot read it as qcow2" in raised.value.message


def test_a_disk_that_a_running_vm_writes(forge: Forge, tmp_path: pathlib.Path, scratch: pathlib.Path) -> None:
    disk = forge.broken(forge.bios(), tmp_path / "living", lambda _path: None)
    command = [boot.find_qemu(), "-nodefaults", "-display", "none", "-machine", "none", "-monitor", "stdio"]
    node = f"driver=raw,node-name=disk,file.driver=file,file.filename={disk}"
    drive = ["-blockdev", node, "-machine", "pc", "-m", "64", "-S", "-device", "virtio-blk-pci,drive=disk"]
    with subprocess.Popen(
        [*command, *drive], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as vm:
        assert vm.stdout is not None
        assert vm.stdout.read(1)  # it is there, and has the disk
        try:
            with pytest.raises(SourceError, match="a running VM writes to this disk"):
                boot.boot(boot.Request([Disk(str(disk))], scratch_dir=str(scratch)))
        finally:
            vm.kill()
    assert os.listdir(scratch) == []


def test_a_qemu_that_ends_early(boot_disks_of: Boot, scratch: pathlib.Path, tmp_path: pathlib.Path) -> None:
    def kill() -> None:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, ValueError, StopIteration):
                pid = int((next(scratch.glob(f"{PREFIX}*")) / PID_FILE).read_text())
                os.kill(pid, 9)
                return
            time.sleep(0.01)

    killer = threading.Thread(target=kill)
    killer.start()
    outcome = boot_disks_of(boot_disks.make_tiny_disk(tmp_path / "disk.raw", "alive"))
    killer.join()
    _check_failed(outcome, "qemu_failed", "signal 9")


def test_a_full_scratch_folder(forge: Forge, tmp_path: pathlib.Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("a small file system needs root")
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", small], check=True)
    try:
        request = boot.Request([Disk(str(forge.bios("test.fill")))], expect=ALIVE, scratch_dir=str(small), memory=256)
        _check_failed(boot.boot(request), "scratch_full", "no room in scratch_dir")
        assert os.listdir(small) == []
    finally:
        subprocess.run(["umount", small], check=True)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"disks": []}, RequestError, "at least one disk"),
        ({"disks": [Disk("/nonexistent/disk")]}, SourceError, "cannot be opened"),
        ({"disks": [Disk("/dev/null")]}, SourceError, "expected a file or a block device"),
        ({"expect": "("}, RequestError, "expected a regular expression"),
        ({"efi_vars": __file__}, RequestError, "no use to a BIOS"),
        ({"efi_vars": __file__, "firmware": "uefi"}, RequestError, "expected EFI variables"),
        ({"efi_vars": "/nonexistent/vars", "firmware": "uefi"}, SourceError, "cannot be read"),
        ({"expect_port": 65536}, RequestError, "expected a port"),
        ({"memory": 0}, RequestError, "above 0 for memory"),
        ({"timeout": -1}, RequestError, "above 0 for timeout"),
        ({"machine": "toaster"}, RequestError, "family pc or q35"),
        ({"disks": [Disk(__file__, bus="ide")] * 5}, RequestError, "at most 4 disks on the bus ide"),
        ({"scratch_dir": "/nonexistent"}, RequestError, "does not exist"),
    ],
)
def test_what_cannot_be_booted_is_refused(
    options: dict[str, t.Any], error: type[VmaError], says: str, scratch: pathlib.Path
) -> None:
    boot_disks.need_everything()
    settings = {"disks": [Disk(__file__)], "scratch_dir": str(scratch), **options}
    with pytest.raises(error, match=says):
        boot.plan(boot.Request(**settings))


@pytest.mark.parametrize("has_qemu", [False, True])
def test_a_host_without_qemu(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, has_qemu: bool) -> None:
    if os.path.exists("/usr/libexec/qemu-kvm"):
        pytest.skip("QEMU cannot be hidden on this host")
    package = "qemu-system-x86 [(]Debian[)]"
    if has_qemu:
        (tmp_path / "qemu-system-x86_64").symlink_to(shutil.which("true") or "/bin/true")
        package = "qemu-utils [(]Debian[)]"
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolError, match=f"Install the package {package}"):
        boot.plan(boot.Request([Disk(__file__)]))


def test_a_machine_that_the_host_cannot_give(scratch: pathlib.Path) -> None:
    boot_disks.need_everything()
    planned = boot.plan(boot.Request([Disk(__file__)], memory=1 << 30, cores=1 << 20, machine="pc-q35-99.0+pve1"))
    assert planned.machine.type == "q35"
    assert planned.machine.memory < 1 << 30
    assert planned.machine.cores == len(os.sched_getaffinity(0))
    assert [change.split()[0] for change in planned.changes] == ["machine", "memory", "cores"]
    assert os.listdir(scratch) == []
