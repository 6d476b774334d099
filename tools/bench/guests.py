"""The loops that are timed: each ends in HLT with interrupts off, and is flat code for 1 MiB."""

from __future__ import annotations

import struct


def _loop(count: int, body: str) -> bytes:
    code = bytes.fromhex(body)
    distance = -(len(code) + 1 + 6)
    return b"\xb9" + struct.pack("<I", count) + code + b"\x49\x0f\x85" + struct.pack("<i", distance) + b"\xf4"


def compute(count: int) -> bytes:
    """add eax,ecx; xor ebx,eax; rol ebx,3; add edx,ebx: registers only."""
    return _loop(count, "01c8 31c3 c1c303 01da")


def stores(count: int) -> bytes:
    """Two stores, a call and a return in each round, data on other pages than the code."""
    return (
        b"\xb9" + struct.pack("<I", count)
        + bytes.fromhex("bf00003000 eb01 c3")  # mov edi, 0x300000; jmp l; f: ret
        + bytes.fromhex("890f 894f04 e8f5ffffff 49 75f3 f4")  # l: two stores; call f; dec ecx; jnz l; hlt
    )  # fmt: skip


def cli(count: int) -> bytes:
    """A privileged instruction a round."""
    return _loop(count, "fa")


def out(count: int) -> bytes:
    """OUT to a port that nobody answers."""
    return _loop(count, "e6e0")


def tiny_blocks(count: int) -> bytes:
    """Nothing but blocks of one and two instructions: the worst for a hook at every block."""
    return b"\xb9" + struct.pack("<I", count) + bytes.fromhex("eb00 eb00 49 75f9 f4")


def wbinvd(count: int) -> bytes:
    """WBINVD: privileged, and there is nothing to do for it."""
    return _loop(count, "0f09")


def hypercall(count: int) -> bytes:
    """A hypercall that does not exist, and then the one by which a domain powers itself off."""
    loop = _loop(count, "b83f000000 cd82")[:-1]  # mov eax, 63; int 0x82
    return loop + bytes.fromhex("6a00 89e1 bb02000000 b81d000000 cd82")  # push POWEROFF; sched_op(shutdown)
