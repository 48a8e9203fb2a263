# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The serial console as text, and what it tells of a failure."""

from __future__ import annotations

import re

import pytest

from ansible_collections.vmbackup.vma.plugins.module_utils.host import boot_failure, boot_signs
from ansible_collections.vmbackup.vma.plugins.module_utils.host.console import Console
from ansible_collections.vmbackup.vma.plugins.module_utils.vma.errors import RequestError

SEABIOS = "\x1b[2J\x1b[1;1HBooting from Hard Disk...\r\nBoot failed: not a bootable disk\r\n\r\n"
OVMF = 'BdsDxe: failed to load Boot0001 "UEFI Misc Device" from PciRoot(0x0)/Pci(0x2,0x0): Not Found\r\n'

FAILURES = [
    (SEABIOS + "No bootable device.\r\n", "no_boot_device", "No bootable device."),
    (OVMF + "BdsDxe: No bootable option or device was found.\r\n", "no_boot_device", OVMF.strip()),
    (OVMF + "UEFI Interactive Shell v2.2\r\nEDK II\r\n", "no_boot_device", OVMF.strip()),
    ("Missing operating system.", "boot_loader", "Missing operating system."),
    ("error: no such partition.\nEntering rescue mode...\ngrub rescue> ", "boot_loader", "grub rescue>"),
    ("error: you need to load the kernel first.\n", "boot_loader", "error: you need to load the kernel first."),
    ("  Minimal BASH-like line editing is supported. For\n", "boot_loader", "Minimal BASH-like line editing"),
    ("BOOTMGR is missing\r\nPress Ctrl+Alt+Del", "boot_loader", "BOOTMGR is missing"),
    (
        "[  1.2] Kernel panic - not syncing: No working init found.",
        "kernel_panic",
        "[  1.2] Kernel panic - not syncing",
    ),
    ("You are in emergency mode. After logging in, type", "emergency_shell", "You are in emergency mode."),
    ("ALERT!  UUID=1 does not exist.  Dropping to a shell!\r\n", "emergency_shell", "ALERT!  UUID=1 does not exist."),
    ("Give root password for maintenance\n(or press Control-D", "emergency_shell", "Give root password"),
]


def _read(text: str, size: int) -> Console:
    console = Console()
    data = text.encode()
    for start in range(0, len(data), size):
        console.feed(data[start : start + size])
    return console


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize(("text", "kind", "evidence"), FAILURES, ids=[text.strip()[-20:] for text, _k, _e in FAILURES])
def test_a_failure_is_recognised(text: str, kind: str, evidence: str, size: int) -> None:
    failure = _read("before\r\n" + text, size).failure()
    assert failure is not None
    assert failure.kind == kind
    assert failure.evidence.startswith(evidence)


@pytest.mark.parametrize(
    "text",
    [
        SEABIOS + "Booting from Hard Disk...\r\n",
        OVMF + 'BdsDxe: starting Boot0003 "debian"\r\n',
        "error: no suitable video mode found.\r\nBooting in blind mode\r\n",
        "kernel.panic = 10\r\n",
        "echo grub> /tmp/x",
        "[  OK  ] Stopped target Emergency Mode.\r\n",
    ],
)
def test_what_a_guest_survives_is_no_failure(text: str) -> None:
    assert _read(text, 5).failure() is None


def test_the_evidence_grows_with_its_line() -> None:
    console = _read("Kernel panic - not syn", 3)
    assert console.failure() is None
    console.feed(b"cing: VFS: Unable")
    console.feed(b" to mount root fs\r\n---[ end Kernel panic - not syncing ]---\r\n")
    failure = console.failure()
    assert failure is not None
    assert failure.evidence == "Kernel panic - not syncing: VFS: Unable to mount root fs"


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_control_sequences_are_left_out(size: int) -> None:
    text = "[\x1b[0;32m  OK  \x1b[0m] Started \x1b[0;1;39mgetty\x1b[0m.\r\n\x1b]0;title\x07\x1b[3;1Hwéb login: "
    console = _read(text, size)
    assert console.text == "[  OK  ] Started getty.\n\nwéb login: "
    assert console.tail(2) == "[  OK  ] Started getty.\nwéb login:"
    assert (console.tail(1), console.tail(0)) == ("wéb login:", "")


def test_bytes_that_are_no_text_do_no_harm() -> None:
    console = Console()
    console.feed(bytes(range(256)) * 3 + b"\nlogin: ")
    assert console.tail(1) == "login:"


def test_only_so_much_is_kept() -> None:
    console = Console()
    console.feed(b"Kernel panic - not syncing: early\n")
    for _n in range(300):
        console.feed(b"x" * 8191 + b"\n")
    assert len(console.text) == 1 << 20
    assert console.failed_at == 0
    console.feed(b"alive\n")
    found = console.search(re.compile("^alive$", re.MULTILINE))
    assert found is not None
    assert found.end() == len(console.text) - 1


def test_a_pattern_may_come_in_pieces() -> None:
    console = Console()
    sign = boot_signs.ConsoleSign(console, "^READY .*$")
    for piece in (b"not READY\nREA", b"DY to ", b"serve"):
        console.feed(piece)
        sign.look()
    assert not sign.is_seen()  # the line may go on
    console.feed(b"\nmore")
    sign.look()
    assert sign.is_seen()
    assert sign.match == "READY to serve"


@pytest.mark.parametrize("text", ["alive\nKernel panic - not syncing: x\n", "\n(initramfs) "])
def test_a_sign_counts_if_it_comes_first(text: str) -> None:
    console = Console()
    sign = boot_signs.ConsoleSign(console, r"alive|\(initramfs\)")
    console.feed(text.encode())
    sign.look()
    assert console.failed_at is not None
    console.feed(b"\n")
    sign.look()
    assert sign.is_seen()


def test_a_sign_after_the_end_is_none() -> None:
    console = Console()
    sign = boot_signs.ConsoleSign(console, "alive")
    console.feed(b"Kernel panic - not syncing: x\nI was alive\n")
    sign.look()
    assert sign.match == "alive"
    assert not sign.is_seen()


@pytest.mark.parametrize("pattern", ["", "login:|", ".*", "^", "$", "(?:up)?"])
def test_a_pattern_that_any_guest_matches_is_no_sign(pattern: str) -> None:
    with pytest.raises(RequestError, match="any output of any guest"):
        boot_signs.ConsoleSign(Console(), pattern)


def test_a_prompt_has_no_end() -> None:
    console = Console()
    sign = boot_signs.ConsoleSign(console, "login: $")
    assert sign.match is None
    console.feed(b"web login: ")
    sign.look()
    assert not sign.is_seen()
    while not sign.is_seen():
        pass
    assert sign.match == "login: "


@pytest.mark.parametrize("kind", boot_failure.KINDS)
def test_each_failure_says_what_to_do(kind: str) -> None:
    failure = boot_failure.Failure(kind, "that")
    assert str(failure) == f"{boot_failure.KINDS[kind].what}: that. {failure.remedy}"
    assert failure.remedy.endswith(".")
    assert failure.as_dict() == {"kind": kind, "message": failure.message, "remedy": failure.remedy}
    # Whoever reads it must not throw a backup away because of the host.
    assert ("nothing of the backup" in failure.remedy) is failure.is_of_the_host
