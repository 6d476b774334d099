"""Kernels that do whatever they like in a domain: they end themselves, and touch nothing of the hypervisor's."""

from __future__ import annotations

import random

import pytest

from tests import domains
from vmm.errors import GuestError
from vmm.monitor.paravirt.abi.memory import FIRST_RESERVED_GDT_BYTE, HYPERVISOR_VIRT_START

KINDS = {"exit", "halt", "budget", "error"}
GDT = 0xFFE00000

# What a kernel might try on its hypervisor: each a few lines; `seen` afterwards says whether it was stopped.
ATTEMPTS = {
    "store to the machine-to-physical table": f"mov dword [{HYPERVISOR_VIRT_START:#x}], 0",
    "store to the hypervisor's descriptors": f"mov dword [{GDT + FIRST_RESERVED_GDT_BYTE + 0x18:#x}], 0",
    "fill the descriptors": f"mov edi, {GDT + FIRST_RESERVED_GDT_BYTE:#x}\nmov ecx, 64\nxor eax, eax\nrep stosd",
    "store to the task state": "str ax\nmov dword [0xFFE20004], 0x1234",
    "push into the descriptors": f"mov esp, {GDT + FIRST_RESERVED_GDT_BYTE + 0x40:#x}\npush eax",
    "call with a stack there": f"mov esp, {GDT + FIRST_RESERVED_GDT_BYTE + 0x40:#x}\ncall stop",
    "jump to ring 0": "jmp 8:stop",
    "return to ring 0": "push dword 2\npush dword 8\npush dword stop\niret",
    "far return to ring 0": "push dword 8\npush dword stop\nretf",
    "load the task register": "mov ax, 0xE040\nltr ax",
    "load SS with the wrong ring": "mov ax, 0xE033\nmov ss, ax",
    "go through an own gate": "call 0xE040:0",
    "sysenter": "sysenter",
    "store to a page table": "mov esi, [start_info]\nmov edi, [esi + 60]\nmov dword [edi], 0x1007",
    "return to another task": "pushfd\nor dword [esp], 0x4000\npopfd\n"
    "push dword 2\npush dword KERNEL_CS\npush dword stop\niret",
    "virtual-8086 mode": "push dword 0\npush dword 0\npush dword 0\npush dword 0\npush dword 0\npush dword 0x1000\n"
    "push dword 0x23202\npush dword 0xFFFF\npush dword 0x10\niret",
    "execute the shared table": f"jmp {HYPERVISOR_VIRT_START:#x}",
}


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_a_kernel_is_stopped(attempt: str) -> None:
    """Each way to the hypervisor ends in the kernel's own handler, and nothing of its own has changed."""
    guest = domains.build(
        f"""
        mov ebx, traps
        hypercall 0
        mov ebx, KERNEL_DS
        mov ecx, kernel_stack
        hypercall 3
        mov esp, kernel_stack
begin:  {ATTEMPTS[attempt]}
stop:   jmp stop
caught: mov dword [seen], 1
        jmp $
section .data
traps:
        trap 10, 0, caught
        trap 11, 0, caught
        trap 12, 0, caught
        trap 13, 0, caught
        trap 14, 0, caught
        dd 0, 0
"""
    )
    guest.run_to("begin")
    before = own(guest)
    outcome = guest.run(2_000)
    assert own(guest) == before
    assert outcome.kind in ("budget", "error")
    assert guest.read("seen") == 1 or outcome.kind == "error", "it was not stopped"


def own(guest: domains.Guest) -> bytes:
    """The hypervisor's descriptors and task state, and its page tables' part of the address space."""
    area = guest.domain.paging.domain.area
    frames = [area.shown(14), area.shown(32), *area.m2p, area._private]
    memory = guest.machine.memory.bytes
    return b"".join(bytes(memory[mfn << 12 : (mfn + 1) << 12]) for mfn in frames)


PIECES = (
    b"\xcd\x82", b"\xcd\x80",
    b"\xcd\x03", b"\xcc", b"\xce", b"\xf4", b"\xfa", b"\xfb", b"\x9c\x9d", b"\xcf", b"\x0f\x0b",
    b"\x0f\x0bxen\x0f\xa2", b"\x8e\xd8", b"\x8e\xd0", b"\x8e\xe8", b"\x0f\x20\xc0", b"\x0f\x22\xd8", b"\x0f\x22\xc0",
    b"\x0f\x30", b"\x0f\x32", b"\x0f\x06", b"\xe4\x60", b"\xe6\xf4", b"\x6c", b"\x6e", b"\xf3\xab", b"\x89\x07",
    b"\x8b\x07", b"\x50", b"\x58", b"\xc3", b"\xb8\x1d\x00\x00\x00\xcd\x82", b"\xb8\x0e\x00\x00\x00\xcd\x82",
    b"\xb8\x01\x00\x00\x00\xcd\x82", b"\xb8\x17\x00\x00\x00\xcd\x82", b"\xb8\x0d\x00\x00\x00\xcd\x82", b"\x06\x07",
    b"\xb8\x18\x00\x00\x00\xcd\x82", b"\xb8\x20\x00\x00\x00\xcd\x82", b"\x0f\x00\xd8", b"\x0f\x01\x10", b"\x0f\x34",
    b"\xea\x00\x00\x10\x00\x19\xe0", b"\x9a\x00\x00\x10\x00\x19\xe0", b"\xcb", b"\x81\x0c\x24\x00\x01\x00\x00\x9d",
)  # fmt: skip
VALUES = (
    0,
    1,
    2,
    3,
    7,
    16,
    0x100000,
    0x101000,
    0xE019,
    0xE021,
    0xE033,
    0xF5800000,
    0xFFE0E018,
    0xFFFFFFFF,
    0x7FF0,
)


def program(chance: random.Random) -> str:
    """Bytes of a kernel: registers loaded with what might matter, and pieces, or noise, in between."""
    code = b""
    while len(code) < 300:
        pick = chance.random()
        if pick < 0.3:
            register, value = chance.randrange(8), chance.choice((*VALUES, chance.randrange(1 << 32)))
            if register != 4 or chance.random() < 0.2:
                code += bytes((0xB8 + register,)) + value.to_bytes(4, "little")
        elif pick < 0.85:
            code += chance.choice(PIECES)
        else:
            code += chance.randbytes(chance.randrange(1, 6))
    return "        db " + ", ".join(str(byte) for byte in code)


SHELL = """
        mov ebx, traps
        hypercall 0
        mov ebx, KERNEL_CS
        mov ecx, random
        mov edx, KERNEL_CS
        mov esi, random
        hypercall 4
        mov ebx, KERNEL_DS
        mov ecx, kernel_stack
        hypercall 3
        mov esp, kernel_stack
random:
{code}
stop:   jmp stop
section .data
traps:
{rows}
        dd 0, 0
"""


@pytest.mark.parametrize("seed", range(12))
def test_any_kernel_ends_itself_or_its_budget(seed: int) -> None:
    """Random code in ring 1: no error of ours, and nothing of the hypervisor's is written."""
    chance = random.Random(seed)
    for _ in range(5):
        rows = "\n".join(
            f"        trap {v}, {chance.randrange(8)}, random + {chance.randrange(250)}" for v in range(20)
        )
        guest = domains.build(SHELL.format(code=program(chance), rows=rows))
        guest.run_to("random")
        before = own(guest)[:8192]
        try:
            outcome = guest.run(3_000)
        except GuestError as error:
            pytest.fail(f"seed {seed}: a guest's error got out: {error}")
        assert outcome.kind in KINDS and "\n" not in outcome.detail
        assert own(guest)[:8192] == before
