"""Where Unicorn 2.1.4 keeps the x86 registers inside its CPU context, and the proof that it does.

The context is one private buffer of the library; reading it in place makes an exit five times cheaper
than one call per register. Private means that nothing promises these offsets, so `verify` writes a
marker through the public interface for every offset used and looks for it here, before the first
machine runs. Another layout is an `EngineError`, never garbage.

Offsets are in bytes from the first register; a context made by `uc_context_save` has a header before it.
"""

from __future__ import annotations

from collections.abc import Callable

from vmm.errors import EngineError

HEADER = 40  # bytes before the first register in a saved context
SIZE = 5568  # bytes of register state

REGS = 0  # eax ecx edx ebx esp ebp esi edi, eight bytes apart
EIP = 128
EFLAGS = 136  # without the arithmetic flags and DF while `cc_op` is lazy
CC_DST = 144
CC_SRC = 152
CC_SRC2 = 160
CC_OP = 168
DF = 172  # +1 or -1
HFLAGS = 176
SEGMENTS = 184  # es cs ss ds fs gs ldt tr gdt idt, SEGMENT_STRIDE apart
SEGMENT_STRIDE = 24  # selector u32, pad, base u64, limit u32, flags u32
SELECTOR, BASE, LIMIT, FLAGS = 0, 8, 16, 20
CR0 = 424  # eight bytes apart
CR2 = 440
CR3 = 448
CR4 = 456
A20_MASK = 496
EFER = 592
FCS = 754  # of the last x87 instruction, 16 bits: what FNSTENV stores
FIP = 760  # of the last x87 instruction: what FXSAVE and FNSTENV store
SYSTEM_STATE = range(EIP, 600)  # all that is neither a general register nor the FPU's or SSE's
SYSENTER_CS = 4800
SYSENTER_ESP = 4808
SYSENTER_EIP = 4816
ERROR_CODE = 5384
EXCEPTION_IS_INT = 5388
NEXT_EIP = 5392  # where INT n returns to
DR0 = 5400
DR6 = 5448
DR7 = 5456
OLD_EXCEPTION = 5496
VM_VMCB = 5504  # physical address of the control block that VMRUN was given
TSC_OFFSET = 5512
INTERCEPTS = range(5520, 5540)  # what VMRUN loaded from there: the intercepts of the guest that is live
RETADDR = 5560  # 0 where the last look-up that missed the TLB was for code to be translated

INVALID_ADDRESS = 1416  # in the engine itself, not in the context: the full address of a refused access

ES, CS, SS, DS, FS, GS, LDT, TR, GDT, IDT = range(10)

CC_OP_EFLAGS = 1  # the operation for which `cc_src` simply holds the flags

# hflags: what is known of the CPU when a block is translated
HF_CPL = 3
HF_INHIBIT_IRQ = 1 << 3
HF_CS32 = 1 << 4
HF_SS32 = 1 << 5
HF_ADDSEG = 1 << 6
HF_PE = 1 << 7
HF_MP = 1 << 9
HF_EM = 1 << 10
HF_TS = 1 << 11
HF_OSFXSR = 1 << 22
HF_SVME = 1 << 20
HF_GUEST = 1 << 21  # a VMRUN is in force

Write = Callable[[str, object], None]  # (register name, value), through the public interface
Save = Callable[[], bytes]  # a saved context, header included


def _word(data: bytes, offset: int) -> int:
    return int.from_bytes(data[HEADER + offset : HEADER + offset + 4], "little")


def verify(write: Write, save: Save) -> None:
    """Check every offset against the public register interface of a scratch engine.

    Raises `EngineError` naming the first register that is not where it is expected.
    """
    size = len(save()) - HEADER
    if size != SIZE:
        raise EngineError(f"this Unicorn keeps {size} bytes of CPU state, not {SIZE}: install unicorn==2.1.4")
    markers: list[tuple[str, object, int, int]] = [
        (name, 0x5A5A0000 + 0x111 * (i + 1), REGS + 8 * i, 0x5A5A0000 + 0x111 * (i + 1))
        for i, name in enumerate(("EAX", "ECX", "EDX", "EBX", "ESP", "EBP", "ESI", "EDI"))
    ]
    markers += [
        ("EIP", 0x5A5A1234, EIP, 0x5A5A1234),
        ("EFLAGS", 0x00200202, EFLAGS, 0x00200202),
        ("EFLAGS", 0x00000643, DF, 0xFFFFFFFF),
        ("EFLAGS", 0x00000203, CC_SRC, 0x00000001),
        ("EFLAGS", 0x00000603, CC_OP, CC_OP_EFLAGS),
        ("CR2", 0x5A5AC200, CR2, 0x5A5AC200),
        ("CR4", 0x00000200, CR4, 0x00000200),
        ("CR4", 0x00000200, HFLAGS, HF_OSFXSR),
        ("DR0", 0x5A5AD000, DR0, 0x5A5AD000),
        ("DR6", 0xFFFF4FF1, DR6, 0xFFFF4FF1),
        ("DR7", 0x00000400, DR7, 0x00000400),
        ("TR", (0x38, 0x5A5A3000, 0x67, 0x8900), SEGMENTS + TR * SEGMENT_STRIDE + BASE, 0x5A5A3000),
        ("TR", (0x38, 0x5A5A3000, 0x67, 0x8900), SEGMENTS + TR * SEGMENT_STRIDE + FLAGS, 0x8900),
        ("LDTR", (0x48, 0x5A5A4000, 0x77, 0x8200), SEGMENTS + LDT * SEGMENT_STRIDE + LIMIT, 0x77),
        ("GDTR", (0, 0x5A5A5000, 0x6F, 0), SEGMENTS + GDT * SEGMENT_STRIDE + BASE, 0x5A5A5000),
        ("IDTR", (0, 0x5A5A6000, 0x7FF, 0), SEGMENTS + IDT * SEGMENT_STRIDE + LIMIT, 0x7FF),
        ("MSR", (0x174, 0x1238), SYSENTER_CS, 0x1238),
        ("MSR", (0x175, 0x5A5A0175), SYSENTER_ESP, 0x5A5A0175),
        ("MSR", (0x176, 0x5A5A0176), SYSENTER_EIP, 0x5A5A0176),
        ("MSR", (0xC0000080, 0x800), EFER, 0x800),
        ("FCS", 0x5A5B, FCS, 0x5A5B),
        ("FIP", 0x5A5A0F1F, FIP, 0x5A5A0F1F),
        ("CR3", 0x5A5A3000, CR3, 0x5A5A3000),
        ("CR0", 0x00000013, CR0, 0x00000013),
    ]
    for name, value, offset, expected in markers:
        write(name, value)
        found = _word(save(), offset)
        bits = HF_OSFXSR if name == "CR4" and offset == HFLAGS else 0xFFFFFFFF
        if found & bits != expected & bits:
            raise EngineError(
                f"this Unicorn keeps {name} elsewhere (context byte {offset}: {found:#x} instead of "
                f"{expected:#x}): install unicorn==2.1.4"
            )


def verify_refusal(found: int, expected: int) -> None:
    """Check where the engine keeps the address of a refused access."""
    if found != expected:
        raise EngineError("this Unicorn keeps a refused address elsewhere: install unicorn==2.1.4")


def verify_fault(context: bytes, vector: int, error_code: int) -> None:
    """Check the exception fields, right after a fault that the engine has just reported."""
    if _word(context, OLD_EXCEPTION) != vector or _word(context, ERROR_CODE) != error_code:
        raise EngineError("this Unicorn keeps exception state elsewhere: install unicorn==2.1.4")


def verify_software(context: bytes, next_eip: int) -> None:
    """The same for what belongs to INT n."""
    if _word(context, EXCEPTION_IS_INT) != 1 or _word(context, NEXT_EIP) != next_eip:
        raise EngineError("this Unicorn keeps exception state elsewhere: install unicorn==2.1.4")
