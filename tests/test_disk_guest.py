"""The disk as a guest has it: the same in every mode and on QEMU, and the file is safe from the machine's end."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.guest_expectations import GUESTS
from tests.oracles import require
from tests.test_cli import Cli
from tests.test_cli_process import PATIENCE, finish, start
from vmm.image.build import build_elf
from vmm.image.image import Image
from vmm.image.load import load_image
from vmm.machine.devices.disk import SECTOR, FileDisk
from vmm.vm import UNMODIFIED, Result, VirtualMachine

MEMORY = 16 << 20
SECTORS = 100
CONSOLE = """\
disk: 100 sectors
written, with one interrupt: right
read, with one interrupt: right
read back as it was written: right
four sectors with one command, an interrupt each, the second put back: right
a sector past the end is refused: right
verdict: RIGHT
"""

# Fills sectors 0 to 7 with one byte, again and again with the next, TIMES; then reads 8 sectors.
WRITER = """
bits 32
org 0x100000
start:  mov esp, 0x180000
        mov edx, 0x3F6
        mov al, 2                       ; no interrupts
        out dx, al
        mov ebx, TIMES
again:  mov eax, ebx
        mov edi, 0x200000
        mov ecx, 8 * 512
        rep stosb
        mov al, 0x30
        call command
        mov esi, 0x200000
        mov ecx, 8 * 256
        rep outsw
        dec ebx
        jnz again
        mov al, 0x20
        call command
        mov edi, 0x200000
        mov ecx, 8 * 256
        rep insw
        mov edx, 0x1F7
        in al, dx
        out 0xF4, al
command:
        push eax
        mov edx, 0x1F2
        mov al, 8
        out dx, al
        xor eax, eax
        inc edx
        out dx, al
        inc edx
        out dx, al
        inc edx
        out dx, al
        inc edx
        mov al, 0xE0
        out dx, al
        inc edx
        pop eax
        out dx, al
        mov edx, 0x1F0
        ret
"""


@pytest.fixture(scope="module")
def guest() -> Image:
    return load_image(GUESTS / "disk.asm", memory=MEMORY)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(SECTORS * SECTOR))
    return path


@pytest.fixture
def vmm(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Cli:
    return Cli(capfd, tmp_path)


def run(guest: Image, mode: str, disk: FileDisk, blocks: bool = True, limit: int = 1_000_000) -> Result:
    machine = VirtualMachine(guest, mode, memory=MEMORY, disk=disk)
    if not blocks:
        machine.machine.bus.data_registers.clear()
    result = machine.run(limit, timeout=30)
    disk.close()
    return result


@pytest.mark.parametrize("mode", sorted(UNMODIFIED))
def test_the_guest_finds_its_disk_right_in_every_mode(guest: Image, disk: Path, mode: str) -> None:
    """Each mode prints what the table has, writes one sector, puts it back, and is one with native."""
    before = disk.read_bytes()
    result = run(guest, mode, FileDisk(str(disk)))
    assert (result.console.decode(), result.outcome.status) == (CONSOLE, 1)
    assert disk.read_bytes() == before
    native = run(guest, "native", FileDisk(str(disk), "snapshot"))
    for name in ("instructions", "console", "memory_sha256", "registers"):
        assert getattr(native, name) == getattr(result, name), name


def test_qemu_agrees(guest: Image, disk: Path, tmp_path: Path) -> None:
    """On QEMU, with the same file as its IDE disk, the guest prints the same."""
    build_elf(guest, tmp_path / "disk.elf")
    command = [require("qemu-system-i386"), "-M", "isapc", "-m", "16", "-kernel", str(tmp_path / "disk.elf")]
    command += ["-display", "none", "-monitor", "none", "-serial", "stdio", "-no-reboot"]
    command += ["-device", "isa-debug-exit,iobase=0xf4,iosize=4"]
    command += ["-drive", f"file={disk},format=raw,if=ide,snapshot=on"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False)
    assert (done.stdout.decode(), done.returncode) == (CONSOLE, 1)


@pytest.mark.parametrize("mode", ("native", "bt"))
def test_many_passes_at_once_are_the_same_passes(guest: Image, disk: Path, mode: str) -> None:
    """Wherever a budget ends the run, in a sector or not, nothing tells whether words went one by one."""
    whole = run(guest, mode, FileDisk(str(disk), "snapshot")).instructions
    first = run(guest, mode, FileDisk(str(disk), "snapshot"), False)
    assert first.instructions == whole
    for limit in range(whole // 3, whole, whole // 23):
        results = [run(guest, mode, FileDisk(str(disk), "snapshot"), b, limit) for b in (True, False)]
        for name in ("outcome", "instructions", "console", "memory_sha256", "registers"):
            assert getattr(results[0], name) == getattr(results[1], name), (name, limit)


def test_a_snapshot_is_forgotten_and_a_read_only_disk_is_refused(vmm: Cli, disk: Path) -> None:
    """`,snapshot` and `,readonly` leave the file; with the latter the guest sees that it cannot write."""
    before = disk.read_bytes()
    guest = GUESTS / "disk.asm"
    assert vmm("run", guest, "--mode", "native", "--disk", f"{disk},snapshot") == 1
    assert vmm.out == CONSOLE
    assert vmm("run", guest, "--mode", "native", "--disk", f"{disk},readonly") == 3
    assert "written, with one interrupt: WRONG" in vmm.out
    assert disk.read_bytes() == before


def test_bad_disks_are_told_in_one_line(vmm: Cli, disk: Path, tmp_path: Path) -> None:
    """Missing, odd, empty, nameless, the guest itself, or where the report goes: status 2 and a line."""
    odd, empty = tmp_path / "odd.img", tmp_path / "empty.img"
    odd.write_bytes(bytes(700))
    empty.touch()
    guest = vmm.guest(bytes(512), "guest.bin")
    for name in (tmp_path / "none", tmp_path, odd, empty, ",snapshot", "", guest, "/dev/null"):
        assert vmm("run", guest, "--disk", name) == 2, name
        assert vmm.err.count("\n") == 1 and "disk" in vmm.err, vmm.err
    assert vmm("run", guest, "--disk", disk, "--report", disk) == 2
    assert "that is the guest's disk" in vmm.err
    assert disk.stat().st_size == SECTORS * SECTOR


def writer(tmp_path: Path, times: int) -> Path:
    path = tmp_path / "writer.asm"
    path.write_text(WRITER.replace("TIMES", str(times)))
    return path


def test_a_disk_that_shrinks_under_its_guest_is_told(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vmm: Cli
) -> None:
    """The guest gets an error of the medium and goes on; the user gets one line, after the run."""
    read = FileDisk.read

    def shrinking(self: FileDisk, sector: int, count: int) -> bytes:
        os.truncate(disk, 5 * SECTOR)
        return read(self, sector, count)

    monkeypatch.setattr(FileDisk, "read", shrinking)
    assert vmm("run", writer(tmp_path, 1), "--mode", "native", "--disk", disk) == (0x51 << 1 | 1) & 0xFF
    assert f"vmm: disk {disk}: sector 5 is gone: the file has become shorter\n" in vmm.err


@pytest.mark.parametrize("kill", (False, True), ids=("ctrl-c", "kill"))
def test_the_disk_is_whole_when_the_machine_is_stopped(disk: Path, tmp_path: Path, kill: bool) -> None:
    """Ctrl-C or a kill amidst writes leaves each sector as one write left it, and the file free for the next."""
    before = disk.read_bytes()
    process = start("run", writer(tmp_path, 1 << 30), "--disk", disk)
    deadline = time.monotonic() + PATIENCE
    while disk.read_bytes()[: 8 * SECTOR] == before[: 8 * SECTOR]:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    time.sleep(0.2)
    if kill:
        process.kill()
        process.communicate()
    else:
        process.send_signal(signal.SIGINT)
        code, error = finish(process)
        assert code == 130 and "interrupted" in error
    after = disk.read_bytes()
    assert after[8 * SECTOR :] == before[8 * SECTOR :]
    for sector in range(8):
        assert len(set(after[sector * SECTOR : (sector + 1) * SECTOR])) == 1, "half of one write, half of another"
    FileDisk(str(disk)).close()
