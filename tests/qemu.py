"""Running a guest on real QEMU, the independent machine that ours is compared with."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.oracles import require

ENDLESS = -1  # the status of a guest that had not ended when its time was over


def run_qemu(elf: Path, input: bytes = b"", timeout: float = 20) -> tuple[bytes, int]:
    """The console (COM1) and exit status of an ELF; `ENDLESS` if `timeout` seconds were not enough."""
    command = [
        *(require("qemu-system-i386"), "-M", "pc", "-m", "16", "-kernel", str(elf)),
        *("-display", "none", "-monitor", "none", "-serial", "stdio", "-net", "none", "-no-reboot"),
        *("-device", "isa-debug-exit,iobase=0xf4,iosize=4"),
    ]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        console, errors = process.communicate(input, timeout)
        status = process.returncode
    except subprocess.TimeoutExpired:
        process.kill()
        console, errors = process.communicate()
        status = ENDLESS
    assert not errors, f"QEMU complained: {errors.decode(errors='replace')}"
    return console, status
