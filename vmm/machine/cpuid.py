"""What CPUID answers: the same processor in every mode, and no feature that the machine does not have.

Source: SDM volume 2A, CPUID. Leaf 1's features: what a 32-bit guest may use here. Left out, because the
machine does not do it: VME, DE's breakpoints, PAE, MCE, MTRR, PAT, PSE-36; and everything 64-bit. A machine that has
one adds the APIC.
"""

from __future__ import annotations

import struct

VENDOR = b"GenuineIntel"
SIGNATURE = 0x0683  # family 6, model 8, stepping 3
BRAND = b"vmm emulated x86 processor"

FPU, DE, PSE, TSC, MSR, CX8, APIC, SEP = 1 << 0, 1 << 2, 1 << 3, 1 << 4, 1 << 5, 1 << 8, 1 << 9, 1 << 11
PGE, CMOV, MMX, FXSR, SSE, SSE2 = 1 << 13, 1 << 15, 1 << 23, 1 << 24, 1 << 25, 1 << 26
SSE3 = 1 << 0  # of ECX: the engine executes it whatever CPUID says
FEATURES = FPU | PSE | TSC | MSR | CX8 | SEP | PGE | CMOV | MMX | FXSR | SSE | SSE2

Registers = tuple[int, int, int, int]

_EBX, _EDX, _ECX = struct.unpack("<3I", VENDOR)
_LEAVES: dict[int, Registers] = {
    0: (4, _EBX, _ECX, _EDX),
    1: (SIGNATURE, 0, SSE3, FEATURES),
    2: (1, 0, 0, 0),  # one round of descriptors, and none in it
    3: (0, 0, 0, 0),  # no serial number
    4: (0, 0, 0, 0),  # no cache of any level: type 0 at once
    0x80000000: (0x80000004, 0, 0, 0),
    0x80000001: (0, 0, 0, 0),
}
for _i in range(3):
    _LEAVES[0x80000002 + _i] = struct.unpack_from("<4I", BRAND.ljust(48, b"\0"), 16 * _i)


class Cpuid:
    """What a machine answers: the processor's leaves, and what the machine around it adds to them."""

    def __init__(self) -> None:
        self._leaves = dict(_LEAVES)

    def answer(self, leaf: int, _subleaf: int) -> Registers:
        """(EAX, EBX, ECX, EDX). A leaf past the highest answers as the highest basic one, as Intel's do."""
        return self._leaves.get(leaf, self._leaves[4])

    def add(self, leaf: int, eax: int = 0, ebx: int = 0, ecx: int = 0, edx: int = 0) -> None:
        """Set these bits, too; a leaf that there is not has no others."""
        a, b, c, d = self._leaves.get(leaf, (0, 0, 0, 0))
        self._leaves[leaf] = a | eax, b | ebx, c | ecx, d | edx

    def remove(self, leaf: int, edx: int) -> None:
        """Clear these bits."""
        a, b, c, d = self._leaves[leaf]
        self._leaves[leaf] = a, b, c, d & ~edx


def cpuid(leaf: int, subleaf: int) -> Registers:
    """The processor's own answer, in no machine."""
    return Cpuid().answer(leaf, subleaf)
