# Copyright (c) The vmbackup.vma contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The state of a TPM on its way between libvirt and Proxmox VE, with real TPMs at both ends."""

from __future__ import annotations

import contextlib
import pathlib
import shutil
import socket
import struct
import subprocess
import typing as t

import pytest

from ansible_collections.vmbackup.vma.plugins.module_utils.host import tpm_state
from ansible_collections.vmbackup.vma.plugins.module_utils.vma.errors import RequestError

needs_swtpm = pytest.mark.skipif(shutil.which("swtpm") is None, reason="swtpm is not installed (package swtpm)")

# An owner's password that is empty, as TPM 2.0 wants it with a command
_NO_PASSWORD = bytes.fromhex("00000009 40000009 0000 00 0000")
_OWNER = 0x40000001
_NV_DEFINE, _NV_READ_PUBLIC, _SHUTDOWN = 0x12A, 0x169, 0x145
_CREATE_ENDORSEMENT_KEY = 0x78


class Tpm:
    """A running TPM, of version 2.0 but where it is told otherwise."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def _run(self, tag: int, command: int, body: bytes) -> tuple[int, bytes]:
        self._connection.sendall(struct.pack(">HII", tag, 10 + len(body), command) + body)
        response = self._connection.recv(4096)
        return struct.unpack_from(">I", response, 6)[0], response[10:]

    def define(self, index: int, size: int) -> None:
        """Make room for some bytes in the TPM, which outlasts its being off."""
        public = struct.pack(">IHIHH", index, 0x000B, 0x00020002, 0, size)
        body = struct.pack(">I", _OWNER) + _NO_PASSWORD + bytes(2) + struct.pack(">H", len(public)) + public
        assert self._run(0x8002, _NV_DEFINE, body)[0] == 0

    def size(self, index: int) -> int | None:
        """How much room there is at an index; None where it was not defined."""
        code, body = self._run(0x8001, _NV_READ_PUBLIC, struct.pack(">I", index))
        return None if code else struct.unpack_from(">H", body, 14)[0]

    def make_endorsement_key(self) -> bool:
        """Make the key that a TPM 1.2 has for life; one that has it already makes none."""
        rsa_2048 = struct.pack(">IHHIIII", 1, 3, 1, 12, 2048, 2, 0)
        return self._run(0x00C1, _CREATE_ENDORSEMENT_KEY, bytes(20) + rsa_2048)[0] == 0

    def shut_down(self) -> None:
        assert self._run(0x8001, _SHUTDOWN, bytes(2))[0] == 0


@contextlib.contextmanager
def running(state: str, *flags: str, version: str = "2.0") -> t.Iterator[Tpm]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(60)
        command = ["swtpm", "socket", "--tpmstate", state, "--fd", str(theirs.fileno()), *flags]
        command += ["--tpm2"] if version == "2.0" else []
        with subprocess.Popen(
            [*command, "--flags", "not-need-init,startup-clear"], pass_fds=[theirs.fileno()]
        ) as process:
            theirs.close()
            try:
                tpm = Tpm(ours)
                yield tpm
                if version == "2.0":
                    tpm.shut_down()
            finally:
                ours.close()
                assert process.wait(60) == 0


@needs_swtpm
def test_a_tpm_of_libvirt_runs_on_proxmox_and_back(tmp_path: pathlib.Path) -> None:
    folder, image = tmp_path / "tpm2", tmp_path / "image"
    folder.mkdir()
    file = tmp_path / tpm_state.FILES["2.0"]
    with running(f"dir={folder}") as tpm:
        assert tpm.size(0x01500001) is None
        tpm.define(0x01500001, 17)

    image.write_bytes(tpm_state.to_linear(file.read_bytes()))
    with running(f"backend-uri=file://{image}") as tpm:
        assert tpm.size(0x01500001) == 17
        for number in range(2, 30):
            tpm.define(0x01500000 + number, number)

    file.write_bytes(tpm_state.from_linear(image.read_bytes()))
    with running(f"dir={folder}") as tpm:
        assert [tpm.size(0x01500000 + number) for number in (1, 2, 29, 30)] == [17, 2, 29, None]


@needs_swtpm
def test_a_tpm_1_2_keeps_its_key_on_proxmox(tmp_path: pathlib.Path) -> None:
    file, image = tmp_path / tpm_state.FILES["1.2"], tmp_path / "image"
    file.parent.mkdir()
    with running(f"dir={file.parent}", version="1.2") as tpm:
        assert tpm.make_endorsement_key()
    state = file.read_bytes()
    image.write_bytes(tpm_state.to_linear(state))
    with running(f"backend-uri=file://{image}", version="1.2") as tpm:
        assert not tpm.make_endorsement_key()
    assert tpm_state.from_linear(image.read_bytes()) == state


@needs_swtpm
def test_an_image_is_what_swtpm_makes_of_the_same_state(tmp_path: pathlib.Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(tpm_state.IMAGE_SIZE))
    with running(f"backend-uri=file://{image}") as tpm:
        tpm.define(0x01500001, 17)
    made = image.read_bytes()
    state = tpm_state.from_linear(made)
    assert tpm_state.to_linear(state)[: 192 + len(state)] == made[: 192 + len(state)]


@needs_swtpm
def test_an_encrypted_state_is_refused(tmp_path: pathlib.Path) -> None:
    folder, key = tmp_path / "tpm2", tmp_path / "key"
    folder.mkdir()
    key.write_text("00112233445566778899aabbccddeeff")
    with running(f"dir={folder}", "--key", f"file={key},format=hex,mode=aes-cbc"):
        pass
    with pytest.raises(RequestError, match="encrypted with a key of its host"):
        tpm_state.to_linear((tmp_path / tpm_state.FILES["2.0"]).read_bytes())


def state_of(size: int, *, oldest: int = 1, told: int | None = None) -> bytes:
    return struct.pack(">BBHHI", 2, oldest, 10, 0, size if told is None else told) + b"s" * (size - 10)


@pytest.mark.parametrize("size", [10, 11, 4096, 4097, 1 << 20])
def test_a_state_comes_back(size: int) -> None:
    image = tpm_state.to_linear(state_of(size))
    assert len(image) == tpm_state.IMAGE_SIZE
    assert tpm_state.from_linear(image) == state_of(size)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (b"", "expected the state of a TPM, found 0 bytes"),
        (state_of(100)[:-1], "tells of version 1 and 100 bytes, and has 99 bytes"),
        (state_of(100, told=101), "tells of version 1 and 101 bytes, and has 100 bytes"),
        (state_of(100, oldest=3), "tells of version 3"),
        (state_of((2 << 20) + 1), "does not fit into 4194304"),
    ],
)
def test_what_is_no_state(state: bytes, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        tpm_state.to_linear(state)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"", "found 0 bytes"),
        (bytes(4096), "another magic number"),
        (struct.pack("<QBxH", 0x737774706D6C696E, 2, 192).ljust(4096, b"\0"), "a newer version"),
        (struct.pack("<QBxH", 0x737774706D6C696E, 1, 192).ljust(4096, b"\0"), "no permanent state"),
        (tpm_state.to_linear(state_of(4096))[:4200], "or not all of it"),
    ],
)
def test_what_is_no_image(image: bytes, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        tpm_state.from_linear(image)
