"""What CPUID tells of the processor is true in the machine, in every mode, and so are the registers beside it."""

from __future__ import annotations

import pytest

from vmm.image.asm import assemble_text
from vmm.image.load import from_assembly
from vmm.machine import cpuid
from vmm.vm import UNMODIFIED, VirtualMachine

MEMORY = 4 << 20

OSFXSR = "mov eax, cr4\n or eax, 0x200\n mov cr4, eax"

# By feature: code that leaves 7 in AL if it is there. Without it the CPU raises what nobody is prepared for.
WORKS = {
    "FPU": (
        cpuid.FPU,
        "fninit\n mov dword [word_], 7\n fild dword [word_]\n fistp dword [result]\n mov al, [result]",
    ),
    "PSE": (
        cpuid.PSE,
        "mov eax, cr4\n or eax, 0x10\n mov cr4, eax\n mov eax, cr4\n shr eax, 4\n imul eax, 7",
    ),
    "TSC": (
        cpuid.TSC,
        "rdtsc\n mov esi, eax\n nop\n rdtsc\n sub eax, esi\n cmp eax, 1\n mov al, 7\n jae done\n mov al, 0",
    ),
    "MSR": (cpuid.MSR, "mov ecx, 0x10\n rdmsr\n mov al, 7"),
    "CX8": (
        cpuid.CX8,
        "mov eax, 1\n xor edx, edx\n mov ebx, 7\n xor ecx, ecx\n mov dword [word_], 1\n mov dword [word_ + 4], 0\n"
        " cmpxchg8b [word_]\n mov al, [word_]",
    ),
    "SEP": (cpuid.SEP, "mov ecx, 0x176\n mov eax, 7\n xor edx, edx\n wrmsr\n xor eax, eax\n rdmsr"),
    "PGE": (
        cpuid.PGE,
        "mov eax, cr4\n or eax, 0x80\n mov cr4, eax\n mov eax, cr4\n shr eax, 7\n imul eax, 7",
    ),
    "CMOV": (cpuid.CMOV, "xor eax, eax\n mov ecx, 7\n cmovz eax, ecx"),
    "MMX": (cpuid.MMX, "mov eax, 7\n movd mm0, eax\n xor eax, eax\n movd eax, mm0\n emms"),
    "FXSR": (
        cpuid.FXSR,
        f"{OSFXSR}\n mov dword [image + 24], 7\n fxsave [image]\n mov eax, [image + 24]\n shr eax, 7\n and eax, 7",
    ),
    "SSE": (
        cpuid.SSE,
        f"{OSFXSR}\n mov dword [word_], 0x40e00000\n movss xmm1, [word_]\n cvttss2si eax, xmm1",
    ),
    "SSE2": (
        cpuid.SSE2,
        f"{OSFXSR}\n mov eax, 7\n movd xmm1, eax\n paddq xmm2, xmm1\n movd eax, xmm2",
    ),
}


def ends_with(code: str, mode: str) -> tuple[str, int]:
    """How a guest ends that exits with what this code leaves in AL."""
    text = (
        f"bits 32\norg 0x100000\nstart: mov esp, 0x200000\n{code}\n"
        "done: movzx eax, al\n out 0xf4, eax\nalign 16\nword_: dd 0, 0\n"
        "result: dd 0\nalign 16\nimage: times 512 db 0\n"
    )
    vm = VirtualMachine(from_assembly("feature", assemble_text(text, "feature.asm")), mode, memory=MEMORY)
    outcome = vm.run(10_000).outcome
    return outcome.kind, outcome.status >> 1


def test_each_feature_that_is_told_has_its_proof() -> None:
    """So a new flag needs one."""
    assert sum(bit for bit, _ in WORKS.values()) == cpuid.FEATURES


@pytest.mark.parametrize("mode", UNMODIFIED)
@pytest.mark.parametrize("name", WORKS)
def test_each_feature_that_is_told_is_there(name: str, mode: str) -> None:
    """Its instructions and the bits of its control registers work."""
    assert ends_with(WORKS[name][1], mode) == ("exit", 7)


@pytest.mark.parametrize("mode", UNMODIFIED)
def test_the_processor_has_no_microcode_update_and_says_so(mode: str) -> None:
    """As a kernel asks: 0 is written to BIOS_SIGN, CPUID leaves it, 0 is read; another value stays, too. The platform
    is 0 and cannot be changed."""
    ask = "mov ecx, 0x8b\n mov eax, {0}\n mov edx, {0}\n wrmsr\n mov eax, 1\n cpuid\n mov ecx, 0x8b\n rdmsr"
    ask += "\n or eax, edx"
    assert ends_with(ask.format(0), mode) == ("exit", 0)
    assert ends_with(ask.format(9), mode) == ("exit", 9)
    assert ends_with("mov eax, 5\n mov ecx, 0x17\n rdmsr\n or eax, edx", mode) == ("exit", 0)
    kind, _ = ends_with("mov ecx, 0x17\n xor eax, eax\n xor edx, edx\n wrmsr", mode)
    assert kind != "exit"
