"""A stock Linux in trouble: a damaged kernel, crashing processes, too little memory, a panic, code that changes.

What a boot costs is the reason that most of it is among the campaigns; what is told of a kernel that cannot unpack
itself is not.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

from tests.oracles import require_linux
from tests.test_linux import printed
from tools.linux.logs import SMALL_PC
from vmm.cli.main import main
from vmm.image.load import ModuleFile, load_image
from vmm.machine.devices.disk import Access, FileDisk
from vmm.vm import Result, VirtualMachine

MODES = ("native", "hvm", "bt")
IN_EVERY_MODE = pytest.mark.parametrize("mode", MODES)
LITTLE = 48 << 20
PAYLOAD_OFFSET, PAYLOAD_LENGTH, SETUP_SECTS = 0x248, 0x24C, 0x1F1


def payload(kernel: bytes | bytearray) -> tuple[int, int]:
    """Where the compressed kernel lies in a bzImage, and how long it is."""
    offset, length = struct.unpack_from("<II", kernel, PAYLOAD_OFFSET)
    return (kernel[SETUP_SECTS] + 1) * 512 + offset, length


def machine(mode: str, line: str, memory: int = LITTLE, disk: FileDisk | None = None) -> VirtualMachine:
    kernel, initrd = require_linux()
    image = load_image(kernel, memory=memory, command_line=f"{SMALL_PC} {line}", modules=[ModuleFile(initrd)])
    return VirtualMachine(image, mode, memory=memory, disk=disk)


@IN_EVERY_MODE
def test_a_kernel_compressed_in_a_way_that_it_does_not_know_says_so_and_halts(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], mode: str
) -> None:
    """Its own words are on its screen, and one line of ours repeats them; the run is at an end."""
    kernel = bytearray(require_linux()[0].read_bytes())
    at, _ = payload(kernel)
    kernel[at : at + 6] = b"\x28\xb5\x2f\xfd\0\0"  # as Zstandard begins
    path = tmp_path / "vmlinuz"
    path.write_bytes(kernel)
    assert main(["run", str(path), "--mode", mode, "--append", "console=ttyS0", "-m", "48M"]) == 0
    *_, end, words = capfd.readouterr().err.splitlines()
    assert f"{mode}: halted with interrupts off; status 0" in end
    assert words.endswith("ends with: Input is not in the XZ format (wrong magic bytes) / -- System halted")


@pytest.mark.long
def test_crashes_patches_and_a_crash_of_the_kernel_in_little_memory_are_the_same_in_every_mode() -> None:
    """In 48 MB: processes end by each kind of fault, one by the lack of memory; the kernel patches its functions,
    branches, calls and a program, and crashes when asked to, which resets the machine. To the last byte of the log
    and the last instruction it is the same bare, under hardware assist, and translated."""
    results: dict[str, Result] = {}
    for mode in MODES:
        line = 'panic=-1 vmm.run="trouble; patching; echo c > /proc/sysrq-trigger"'
        results[mode] = result = machine(mode, line).run(None, 1200)
        assert (result.outcome.kind, result.outcome.detail) == ("halt", "the guest reset the machine"), mode
        assert b"Kernel panic - not syncing: sysrq triggered crash" in result.console
    native = results["native"]
    lines = printed(native.console)
    assert "trouble: writes to address 0: status 139" in lines
    assert "trouble: divides by zero: status 136" in lines
    assert "trouble: executes what is no instruction: status 132" in lines
    assert "trouble: goes on: status 7" in lines
    assert "trouble: wants more memory than there is: status 137" in lines
    assert {"trouble: done", "patching: done", "patching: opened: 3", "patching: named: 3"} <= {*lines}
    assert {"patching: entered, within, left: 9", "patching: started: 2"} <= {*lines}
    log = native.console.decode()
    assert re.search(r"crash\[\d+\]: segfault at 0 ip 08048054 sp \w+ error 6 in crash\[8048000\+1000\]", log)
    assert "Out of memory: Killed process" in log
    for mode in MODES[1:]:
        assert results[mode].console == native.console, mode
        assert results[mode].instructions == native.instructions
        assert results[mode].registers == native.registers


@pytest.mark.long
@IN_EVERY_MODE
def test_a_kernel_that_panics_says_so_and_spins_until_it_is_ended(mode: str) -> None:
    """Without panic= there is no reset: the console has the kernel's last words, and a bound ends the run."""
    vm = machine(mode, "mitigations=off rdinit=/nothing")
    seen = vm.run_until("---[ end Kernel panic - not syncing: VFS: Unable to mount root fs", timeout=1200)
    assert seen.outcome.kind == "seen", seen.console[-500:]
    after = vm.run(None, 5)
    assert after.outcome.kind == "timeout"
    assert after.instructions > seen.instructions


@pytest.mark.long
@pytest.mark.parametrize(
    ("mode", "access", "command", "end"),
    [
        ("native", "write", "halt", "halted with interrupts off"),
        ("hvm", "snapshot", "reboot", "the guest reset the machine"),
        ("bt", "write", "reboot", "the guest reset the machine"),
    ],
)
def test_a_disk_holds_what_was_written_when_linux_ends(
    tmp_path: Path, mode: str, access: Access, command: str, end: str
) -> None:
    """Whether it resets the machine or halts it: what was synced is in the file, and of a snapshot nothing."""
    path = tmp_path / "disk"
    path.write_bytes(b"before".ljust(1 << 20, b"\0"))
    disk = FileDisk(str(path), access)
    line = f'vmm.run="modprobe pata_legacy; modprobe sd_mod; sleep 1; echo after > /dev/sda; sync; {command}"'
    result = machine(mode, line, disk=disk).run(None, 1200)
    disk.close()
    assert (result.outcome.kind, result.outcome.detail) == ("halt", end), result.console[-500:]
    assert path.read_bytes()[:6] == (b"after\n" if access == "write" else b"before")
    assert path.stat().st_size == 1 << 20
