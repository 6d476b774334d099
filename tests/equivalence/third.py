"""QEMU as the third opinion on a guest: the same console, the same memory.

A guest made for it (`Guest.dump`) writes its memory to the debug console before it ends. Compared is what the
architecture defines: the log of exceptions, data, code, page tables, descriptor tables. Not compared are RF in
a saved EFLAGS (QEMU saves it clear where the manual has it set for a fault), and stacks, which hold it, too.
"""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

from tests.equivalence import layout as at
from tests.equivalence.kernel import RECORD, skeleton
from tests.equivalence.run import Observation
from tests.oracles import require
from vmm.image.build import elf_bytes
from vmm.image.image import Image
from vmm.isa.words import EFlags

SECONDS = 5
BUDGET = 300_000  # instructions here: writing memory out takes one a byte


def on_qemu(image: Image, folder: Path) -> bytes | None:
    """What the guest wrote to the debug console; None if it did not end by itself."""
    path, log = folder / "guest.elf", folder / "log"
    path.write_bytes(elf_bytes(image.segments, image.entry, {}))
    command = [
        *(require("qemu-system-i386"), "-M", "pc", "-m", "16", "-kernel", str(path), "-display", "none"),
        *("-monitor", "none", "-serial", "none", "-net", "none", "-no-reboot", "-debugcon", f"file:{log}"),
        *("-device", "isa-debug-exit,iobase=0xf4,iosize=4"),
    ]
    try:
        done = subprocess.run(command, timeout=SECONDS, capture_output=True)
    except subprocess.TimeoutExpired:
        return None
    return log.read_bytes() if done.returncode == 1 else None


def regions() -> list[tuple[int, int]]:
    """(address, size) of what a guest dumps."""
    assembly = skeleton()
    found: list[tuple[int, int]] = []
    here = assembly.symbols["regions"] - assembly.origin
    while True:
        address, size = struct.unpack_from("<II", assembly.data, here)
        if not address:
            return found
        found.append((address, size))
        here += 8


def differences(image: Image, mine: Observation, theirs: bytes) -> list[str]:
    """In what QEMU's run was another."""
    areas = regions()
    total = sum(size for _, size in areas)
    ours = mine.console
    lines = []
    if len(ours) != len(theirs):
        lines.append(f"console: {len(ours) - total} bytes, QEMU {len(theirs) - total}")
    if ours[:-total] != theirs[:-total]:
        first = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), -1)
        lines.append(f"console: differs at byte {first}")
    here, there = len(ours) - total, len(theirs) - total
    for address, size in areas:
        a, b = bytearray(ours[here : here + size]), bytearray(theirs[there : there + size])
        if address == at.LOG:
            _clear_resume(a)
            _clear_resume(b)
        unlike = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]
        if unlike:
            i = unlike[0]
            where = f"{address + i:#x}"
            if address == at.LOG:
                where = f"record {i // RECORD} word {i % RECORD // 4}, {a[i & ~63 : (i & ~63) + 32 :].hex(' ', 4)}"
            lines.append(f"memory: {len(unlike)} bytes from {where}: {a[i]:02x}, QEMU {b[i]:02x}")
        here, there = here + size, there + size
    return lines


def _clear_resume(log: bytearray) -> None:
    for record in range(16, len(log), RECORD):
        flags = struct.unpack_from("<I", log, record)[0]
        struct.pack_into("<I", log, record, flags & ~int(EFlags.RF))
