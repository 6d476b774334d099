"""What CPUID answers: the same processor in every mode, and no feature that the machine does not have.

Source: SDM volume 2A, CPUID. Leaf 1's features: what a 32-bit guest may use here. Left out, because the
machine does not do it: VME, DE's breakpoints, PAE, MCE, APIC, MTRR, PAT, PSE-36; and everything 64-bit.
"""

from __future__ import annotations

import struct

VENDOR = b"GenuineIntel"
SIGNATURE = 0x0683  # family 6, model 8, stepping 3
BRAND = b"vmm emulated x86 processor"

FPU, DE, PSE, TSC, MSR, CX8, SEP = 1 << 0, 1 << 2, 1 << 3, 1 << 4, 1 << 5, 1 << 8, 1 << 11
PGE, CMOV, MMX, FXSR, SSE, SSE2 = 1 << 13, 1 << 15, 1 << 23, 1 << 24, 1 << 25, 1 << 26
FEATURES = FPU | PSE | TSC | MSR | CX8 | SEP | PGE | CMOV | MMX | FXSR | SSE | SSE2

Registers = tuple[int, int, int, int]

_EBX, _EDX, _ECX = struct.unpack("<3I", VENDOR)
_LEAVES: dict[int, Registers] = {
    0: (1, _EBX, _ECX, _EDX),
    1: (SIGNATURE, 0, 0, FEATURES),
    0x80000000: (0x80000004, 0, 0, 0),
    0x80000001: (0, 0, 0, 0),
}
for _i in range(3):
    _LEAVES[0x80000002 + _i] = struct.unpack_from("<4I", BRAND.ljust(48, b"\0"), 16 * _i)


def cpuid(leaf: int, _subleaf: int) -> Registers:
    """(EAX, EBX, ECX, EDX). A leaf past the highest answers as the highest basic one, as Intel's do."""
    return _LEAVES.get(leaf, _LEAVES[1])
