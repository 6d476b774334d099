"""What CPUID tells is true: an instruction of every feature, and the exceptions that belong to it, in every mode.

Sources: SDM volume 2, each instruction's exceptions; volume 3A, 2.5 and table 13-1 (CR0.EM, MP, TS and CR4.OSFXSR).
"""

from __future__ import annotations

import functools
import operator

import pytest

from tests import domains
from tests.machines import DATA, run
from vmm.isa.vectors import Vector
from vmm.machine import cpuid as told

MODES = ("native", "trap", "bt", "hvm")
MODE = pytest.mark.parametrize("mode", MODES)

MP, EM, TS, NE, TSD, OSFXSR, OSXMMEXCPT = 1 << 1, 1 << 2, 1 << 3, 1 << 5, 1 << 2, 1 << 9, 1 << 10
NM, UD, GP, MF, XM = Vector.NM, Vector.UD, Vector.GP, Vector.MF, Vector.XM


def control(cr0: int = 0, cr4: int = 0) -> str:
    """Code that sets bits of the control registers, which are clear before."""
    text = ""
    if cr0:
        text += f"mov eax, cr0\n or eax, {cr0:#x}\n mov cr0, eax\n"
    if cr4:
        text += f"mov eax, cr4\n or eax, {cr4:#x}\n mov cr4, eax\n"
    return text


# feature: (its bit, code that leaves its result in EBX, that result, bits of CR4 that it needs)
WORKS: dict[str, tuple[int, str, int, int]] = {
    "FPU": (told.FPU, "fninit\n fldpi\n fld1\n faddp st1, st0\n fistp dword [DATA]\n mov ebx, [DATA]", 4, 0),
    "TSC": (
        told.TSC,
        "rdtsc\n mov ebx, eax\n rdtsc\n sub eax, ebx\n xor ebx, ebx\n cmp eax, 0\n setg bl",
        1,
        0,
    ),
    "MSR": (
        told.MSR,
        "mov ecx, 0x175\n mov eax, 0x1234\n xor edx, edx\n wrmsr\n xor eax, eax\n rdmsr\n mov ebx, eax",
        0x1234,
        0,
    ),
    "CX8": (
        told.CX8,
        "xor eax, eax\n xor edx, edx\n mov ebx, 5\n mov ecx, 6\n cmpxchg8b [DATA]\n mov ebx, [DATA + 4]",
        6,
        0,
    ),
    "CMOV": (told.CMOV, "mov ecx, 7\n xor ebx, ebx\n cmovz ebx, ecx", 7, 0),
    "FCMOV": (
        told.CMOV | told.FPU,
        "fninit\n fldz\n fld1\n xor eax, eax\n db 0xda, 0xc9\n fistp dword [DATA]\n mov ebx, [DATA]",
        0,
        0,
    ),
    "MMX": (
        told.MMX,
        "mov eax, 0x01020304\n movd mm0, eax\n paddb mm0, mm0\n movd ebx, mm0\n emms",
        0x02040608,
        0,
    ),
    "FXSR": (
        told.FXSR,
        "fninit\n fld1\n fxsave [DATA]\n fninit\n fxrstor [DATA]\n fistp dword [DATA]\n mov ebx, [DATA]",
        1,
        0,
    ),
    "SSE": (
        told.SSE,
        "mov dword [DATA], 0x40000000\n movss xmm0, [DATA]\n mulss xmm0, xmm0\n movss [DATA], xmm0\n mov ebx, [DATA]",
        0x40800000,
        OSFXSR,
    ),
    "SSE2": (
        told.SSE2,
        "mov eax, 0x01020304\n movd xmm1, eax\n paddd xmm1, xmm1\n movd ebx, xmm1\n lfence\n mfence",
        0x02040608,
        OSFXSR,
    ),
    "SSE3": (
        told.SSE3 << 32,
        "mov dword [DATA], 0x3f800000\n movss xmm0, [DATA]\n haddps xmm0, xmm0\n movss [DATA], xmm0\n"
        " mov ebx, [DATA]",
        0x3F800000,
        OSFXSR,
    ),
    "PSE": (told.PSE, "mov eax, 0x10\n mov cr4, eax\n mov ebx, cr4", 0x10, 0),
    "PGE": (told.PGE, "mov eax, 0x80\n mov cr4, eax\n mov ebx, cr4", 0x80, 0),
    "SEP": (
        told.SEP,
        "mov ecx, 0x174\n mov eax, KERNEL_CODE\n xor edx, edx\n wrmsr\n inc ecx\n mov eax, STACK\n wrmsr\n"
        " inc ecx\n mov eax, there\n wrmsr\n to_user\n sysenter\n there: mov ebx, 5",
        5,
        0,
    ),
}


@MODE
@pytest.mark.parametrize("name", WORKS)
def test_a_feature_that_is_told_is_there(name: str, mode: str) -> None:
    """CPUID says so, and an instruction of it does what it is for."""
    bit, code, result, cr4 = WORKS[name]
    asked = "mov eax, 1\n cpuid\n mov [DATA + 0x800], edx\n mov [DATA + 0x804], ecx\n"
    made = run(asked + control(cr4=cr4) + code + "\nend: jmp end", mode, limit=200)
    features = made.read(DATA + 0x800) | made.read(DATA + 0x804) << 32
    assert features & bit == bit
    assert (made.vector, made.control.where()) == (None, made.symbol("end"))
    assert made.reg("ebx") == result


def test_every_feature_that_is_told_is_among_them() -> None:
    """No bit of leaf 1 is without an instruction here, and leaf 0x80000001 tells nothing."""
    _, _, ecx, edx = told.cpuid(1, 0)
    assert edx | ecx << 32 == functools.reduce(operator.or_, (bit for bit, *_ in WORKS.values()))
    assert told.cpuid(0x80000001, 0) == (0, 0, 0, 0)


FLOAT, MULTIMEDIA, SSE, SSE2 = (
    "fld1",
    "db 0x0f, 0xfc, 0xc0",
    "db 0x0f, 0x58, 0xc0",
    "db 0x66, 0x0f, 0xfc, 0xc0",
)
SAVE, RESTORE = "fxsave [DATA]", "fxrstor [DATA]"

# name: (bits of CR0, bits of CR4, the instruction, the vector or None)
RAISES: dict[str, tuple[int, int, str, Vector | None]] = {
    "FPU": (0, 0, FLOAT, None),
    "FPU with TS": (TS, 0, FLOAT, NM),
    "FPU with EM": (EM, 0, FLOAT, NM),
    "FPU with MP alone": (MP, 0, FLOAT, None),
    "FNINIT with TS": (TS, 0, "fninit", NM),
    "FNSTSW with EM": (EM, 0, "fnstsw ax", NM),
    "FWAIT with TS": (TS, 0, "fwait", None),
    "FWAIT with TS and MP": (TS | MP, 0, "fwait", NM),
    "FWAIT with EM": (EM, 0, "fwait", None),
    "MMX with TS": (TS, 0, MULTIMEDIA, NM),
    "MMX with EM": (EM, 0, MULTIMEDIA, UD),
    "EMMS with TS": (TS, 0, "emms", NM),
    "EMMS with EM": (EM, 0, "emms", UD),
    "FXSAVE": (0, 0, SAVE, None),
    "FXSAVE with TS": (TS, 0, SAVE, NM),
    "FXSAVE with EM": (EM, 0, SAVE, NM),
    "FXRSTOR with TS": (TS, 0, RESTORE, NM),
    "FXRSTOR with EM": (EM, 0, RESTORE, NM),
    "FXSAVE off its alignment": (0, 0, "fxsave [DATA + 8]", GP),
    "FXRSTOR off its alignment": (0, 0, "fxrstor [DATA + 8]", GP),
    "SSE without OSFXSR": (0, 0, SSE, UD),
    "SSE": (0, OSFXSR, SSE, None),
    "SSE with TS": (TS, OSFXSR, SSE, NM),
    "SSE with EM": (EM, OSFXSR, SSE, UD),
    "SSE2 without OSFXSR": (0, 0, SSE2, UD),
    "SSE2 with TS": (TS, OSFXSR, SSE2, NM),
    "SSE2 with EM": (EM, OSFXSR, SSE2, UD),
    "LDMXCSR with TS": (TS, OSFXSR, "ldmxcsr [DATA]", NM),
    "LDMXCSR without OSFXSR": (0, 0, "ldmxcsr [DATA]", UD),
    "MOVUPS off its alignment": (0, OSFXSR, "movups xmm0, [DATA + 4]", None),
    "MOVNTI needs nobody's leave": (EM | TS, 0, "movnti [DATA], eax", None),
    "SFENCE needs nobody's leave": (EM | TS, 0, "sfence", None),
    "PREFETCH needs nobody's leave": (EM | TS, 0, "prefetchnta [DATA]", None),
    "RDTSC in ring 0 with TSD": (0, TSD, "rdtsc", None),
    "RDTSC in ring 3": (0, 0, "to_user\n at: rdtsc", None),
    "RDTSC in ring 3 with TSD": (0, TSD, "to_user\n at: rdtsc", GP),
    "FPU in ring 3 with TS": (TS, 0, "to_user\n at: fld1", NM),
    "SSE in ring 3 with TS": (TS, OSFXSR, f"to_user\n at: {SSE}", NM),
    "SSE in ring 3 without OSFXSR": (0, 0, f"to_user\n at: {SSE}", UD),
    "CMPXCHG8B of a register": (0, 0, "db 0x0f, 0xc7, 0xc8", UD),
    "SYSENTER without a selector": (0, 0, "to_user\n at: sysenter", GP),
    "SYSEXIT without a selector": (0, 0, "sysexit", GP),
    "SYSEXIT in ring 3": (0, 0, "to_user\n at: sysexit", GP),
    "RDMSR in ring 3": (0, 0, "to_user\n at: rdmsr", GP),
    "a pending FPU exception": (
        NE,
        0,
        "fninit\n push dword 0x37b\n fldcw [esp]\n fld1\n fldz\n fdivp st1, st0\n at: fwait",
        MF,
    ),
}


@MODE
@pytest.mark.parametrize("name", RAISES)
def test_what_the_control_registers_forbid(name: str, mode: str) -> None:
    """#NM, #UD or #GP where the manual has it, at the instruction, and nothing where it has not."""
    cr0, cr4, code, vector = RAISES[name]
    if "at:" not in code:
        code = f"at: {code}"
    made = run(f"{control(cr0, cr4)}\n{code}\nend: jmp end", mode, limit=200)
    assert made.vector == vector
    if vector is None:
        assert made.control.where() == made.symbol("end")
    else:
        frame = made.stack(2)
        assert frame[vector == GP] == made.symbol("at")


# What the engine does not do: the manual's vector, and what happens.
ENGINE = {
    "MMX with EM and TS": (EM | TS, 0, MULTIMEDIA, UD, NM),
    "SSE with TS, without OSFXSR": (TS, 0, SSE, UD, NM),
    "MOVAPS off its alignment": (0, OSFXSR, "movaps xmm0, [DATA + 4]", GP, None),
    "LDMXCSR of a reserved bit": (0, OSFXSR, "mov dword [DATA], 0x80000000\n ldmxcsr [DATA]", GP, None),
    "FXRSTOR of a bad MXCSR": (0, OSFXSR, "mov byte [DATA + 27], 0x80\n fxrstor [DATA]", GP, None),
    "an SSE exception": (
        0,
        OSFXSR | OSXMMEXCPT,
        "push dword 0x1d80\n ldmxcsr [esp]\n xorps xmm0, xmm0\n xorps xmm1, xmm1\n divps xmm0, xmm1",
        XM,
        None,
    ),
}


@MODE
@pytest.mark.parametrize("name", ENGINE)
def test_what_the_engine_does_instead(name: str, mode: str) -> None:
    """What docs/real-guests.md says that is not as in the manual; when the engine learns it, this fails."""
    cr0, cr4, code, manual, vector = ENGINE[name]
    made = run(f"{control(cr0, cr4)}\n{code}\nend: jmp end", mode, limit=200)
    assert made.vector == vector != manual


# Instructions of features that CPUID does not tell.
ABSENT = {
    "SSSE3 PSHUFB": "660f3800c0",
    "SSE4.1 PTEST": "660f3817c0",
    "SSE4.1 PEXTRD": "660f3a16c000",
    "SSE4.2 CRC32": "f20f38f1c0",
    "POPCNT": "f30fb8c0",
    "MOVBE": "0f38f000",
    "AESENC": "660f38dcc0",
    "PCLMULQDQ": "660f3a44c000",
    "XGETBV": "0f01d0",
    "XSAVE": "0fae20",
    "RDRAND": "0fc7f0",
    "RDSEED": "0fc7f8",
    "RDTSCP": "0f01f9",
    "CLFLUSH": "0fae38",
    "MONITOR": "0f01c8",
    "MWAIT": "0f01c9",
    "CLAC": "0f01ca",
    "STAC": "0f01cb",
    "INVPCID": "660f388200",
    "SHA1NEXTE": "0f38c8c0",
    "AVX VADDPS": "c5f858c0",
    "AVX VMOVAPS": "c4e17828c1",
    "AVX VZEROUPPER": "c5f877",
    "BMI1 ANDN": "c4e278f2c0",
    "ADX": "660f38f6c0",
    "3DNow! PFADD": "0f0fc09e",
    "FEMMS": "0f0e",
    "VMXON": "f30fc730",
    "SKINIT": "0f01de",
    "VMRUN": "0f01d8",
    "RDPMC": "0f33",
    "SYSCALL": "0f05",
    "SYSRET": "0f07",
}


def bytes_of(code: str) -> str:
    """The statement that makes them."""
    return "db " + ", ".join(str(byte) for byte in bytes.fromhex(code))


@MODE
@pytest.mark.parametrize("name", ABSENT)
def test_a_feature_that_is_not_told_is_not_there(name: str, mode: str) -> None:
    """Its instructions raise #UD, whether SSE may be used or not."""
    for cr4 in (0, OSFXSR):
        code = f"{control(cr4=cr4)} mov eax, DATA\nat: {bytes_of(ABSENT[name])}\n jmp $"
        made = run(code, mode, limit=20)
        assert made.vector == UD
        assert made.stack(1) == [made.symbol("at")]


# What RDMSR gives, or None for #GP(0). Linux reads those of the first group on a processor of this family; of the
# second it knows that they may be missing.
MSRS = {
    0x10: "the time",
    0x17: 0,  # the socket
    0x8B: 0,  # the microcode's update: none
    0x174: 0,
    0x175: 0,
    0x176: 0,
    0x1B: None,  # the APIC's base
    0x3A: None,  # VMX's lock
    0x140: None,  # CPUID faulting
    0x179: None,  # machine checks
    0x186: None,  # performance counters
    0x1A0: None,  # miscellaneous enables
    0xFE: None,  # MTRRs
    0x277: None,  # PAT
    0xC0000080: None,  # EFER
    0xC0000081: None,  # STAR
    0xC0000103: None,  # TSC_AUX
    0xC0011029: None,  # an AMD's
    0x4B564D01: None,  # KVM's clock, unless it is asked for
}


@MODE
@pytest.mark.parametrize("number", MSRS, ids=hex)
def test_each_msr_is_there_or_general_protection(number: int, mode: str) -> None:
    """A register that this processor has is read, and another raises #GP(0): read or written."""
    value = MSRS[number]
    made = run(f"mov ecx, {number:#x}\n mov edx, -1\n at: rdmsr\nend: jmp end", mode, limit=20)
    if value is None:
        assert (made.vector, made.stack(2)) == (GP, [0, made.symbol("at")])
        made = run(f"mov ecx, {number:#x}\n xor edx, edx\n at: wrmsr\nend: jmp end", mode, limit=20)
        assert (made.vector, made.stack(2)) == (GP, [0, made.symbol("at")])
    else:
        assert made.vector is None
        assert made.reg("edx") == 0
        assert value == "the time" or made.reg("eax") == value


@MODE
def test_the_microcode_has_no_update_and_the_socket_cannot_be_changed(mode: str) -> None:
    """Zero may be written to 0x8B, as Linux does before it asks; 0x17 is read only."""
    ask = "mov ecx, 0x8b\n xor eax, eax\n xor edx, edx\n wrmsr\n mov eax, 1\n cpuid\n mov ecx, 0x8b\n rdmsr\n"
    made = run(ask + "end: jmp end", mode, limit=30)
    assert (made.vector, made.reg("eax"), made.reg("edx")) == (None, 0, 0)
    assert run("mov ecx, 0x17\n wrmsr\nend: jmp end", mode, limit=20).vector == GP


# The same for a kernel of Xen's interface, as far as it is the kernel's: control registers are the hypervisor's,
# which has made SSE ready, and sets TS when it is asked.
DOMAIN = """
        mov ebx, traps
        hypercall 0             ; set_trap_table
        mov esp, kernel_stack
        {code}
        jmp stop
undefined: mov dword [seen], 6
        jmp stop
no_device: mov dword [seen], 7
        {again}
stop:   mov [seen + 4], ebx
        jmp $
section .data
traps:  trap 6, 0, undefined
        trap 7, 0, no_device
        dd 0, 0
section .bss
        alignb 16
scratch: resb 512
section .text
"""
KERNELS = ("FPU", "TSC", "CX8", "CMOV", "FCMOV", "MMX", "FXSR", "SSE", "SSE2", "SSE3")
FORBID = "mov ebx, 1\n hypercall 5\n"  # fpu_taskswitch


def in_domain(code: str, again: str = "jmp stop") -> tuple[int, int]:
    """The vector that was raised, 0 for none, and EBX at the end."""
    source = DOMAIN.format(code=code.replace("DATA", "scratch"), again=again)
    made = domains.run(source, 1_000)
    return made.read("seen"), made.words("seen", 2)[1]


@pytest.mark.parametrize("name", KERNELS)
def test_a_paravirtual_kernel_has_the_same_features(name: str) -> None:
    """CPUID tells them to it, and they work."""
    bit, code, result, _ = WORKS[name]
    vector, told_to_it = in_domain("mov eax, 1\n cpuid\n mov ebx, edx")
    assert (vector, told_to_it & bit) == (0, bit & 0xFFFFFFFF)
    assert in_domain(code) == (0, result)


@pytest.mark.parametrize("name", ABSENT)
def test_nor_has_it_any_other(name: str) -> None:
    """What CPUID does not tell raises #UD in a domain, too."""
    assert in_domain(f"mov eax, DATA\n {bytes_of(ABSENT[name])}")[0] == UD


@pytest.mark.parametrize("instruction", (FLOAT, MULTIMEDIA, SSE, SSE2, "fxsave [DATA]", "emms"))
def test_fpu_taskswitch_makes_the_next_use_raise_nm_once(instruction: str) -> None:
    """The hypervisor sets TS, and clears it before it calls the kernel for #NM: then the instruction is executed."""
    assert in_domain(f"{FORBID} mov ebx, 3\n {instruction}\n mov ebx, 4", "iret") == (NM, 4)
    assert in_domain(f"{FORBID} xor ebx, ebx\n hypercall 5\n mov ebx, 3\n {instruction}") == (0, 3)
