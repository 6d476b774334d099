"""What the translator promises of its translations: no exit where none is needed, and what a process sees of it."""

from __future__ import annotations

import pytest

from tests.machines import DATA, MEMORY, Lab, assemble, enable_paging, gate, lab
from vmm.image.asm import assemble_text
from vmm.isa.words import EFlags
from vmm.monitor.translator import layout
from vmm.monitor.translator.monitor import TranslatingMonitor

WARM, MORE = 20, 40  # rounds

# body: what a round costs, by reason; each leaves ESP as it was. EBP holds it.
FREE = {
    "CLI and STI": "cli\n sti\n nop\n cli",
    "STI before a jump": "sti\n jmp %%there\n%%there: cli",
    "PUSHF and POPF": "pushfd\n popfd\n pushfd\n pop eax",
    "POPF that changes IF": "push dword 0x246\n popfd\n push dword 2\n popfd",
    "MOV from CR": "mov eax, cr0\n mov eax, cr2\n mov eax, cr3\n mov eax, cr4",
    "MOV and PUSH of CS and SS": "mov eax, cs\n mov ecx, ss\n push cs\n pop eax\n push ss\n pop eax\n mov [DATA], cs",
    "SGDT SIDT SLDT STR SMSW": "sgdt [DATA]\n sidt [DATA]\n sldt eax\n str eax\n smsw eax",
    "segment loads": "mov eax, ds\n mov es, eax\n push ds\n pop es\n push fs\n pop fs",
    "CALL and RET": "call routine\n call routine",
    "RET n": "push eax\n push eax\n call returns_8",
    "CALL indirect": "mov eax, routine\n call eax\n call [pointer]",
    "JMP indirect": "mov eax, %%there\n jmp eax\n nop\n%%there:",
    "JMP indirect, elsewhere each time": "mov eax, %%even\n test byte [DATA + 0x100], 1\n jz %%now\n"
    " mov eax, %%odd\n%%now: jmp eax\n%%odd: nop\n%%even:",
    "one RET to two callers": "call routine\n nop\n call routine",
    "RET that is a jump": "push dword %%there\n ret\n%%there:",
    "IRET to the kernel": "pushfd\n push cs\n push dword %%there\n iretd\n%%there:",
    "IRET that changes IF": "push dword 0x246\n push cs\n push dword %%there\n iretd\n%%there: cli",
    "LOOP and JECXZ": "mov ecx, 3\n%%again: loop %%again\n jecxz %%there\n nop\n%%there:",
}
ONE_EXIT = {
    "INT and IRET in the kernel": ("int 0x30", "INT 0x30"),
    "a system call": (
        "mov esi, %%back\n to_ring USER_CODE, USER_DATA, 0x202\n int 0x80\n%%back:",
        "INT 0x80",
    ),
}


def rounds(body: str, count: int) -> Lab:
    """A guest after `count` rounds of `body`."""
    text = f"""
%macro body 0
{body}
%endmacro
        jmp begin
on_30:  iretd
on_80:  mov eax, KERNEL_DATA
        mov ds, eax
        mov es, eax
        mov esp, ebp
        jmp esi
routine: ret
returns_8: ret 8
begin:  mov ebp, esp
        mov dword [DATA + 0x100], {count}
again:  body
        dec dword [DATA + 0x100]
        jnz again
        mov dword [DATA + 0x104], 1
over:   jmp over
        align 4096
pointer: dd routine
"""
    symbols = assemble(text).symbols
    made = lab(text, "bt", idt={v: gate(symbols[f"on_{v:x}"]) for v in (0x30, 0x80)})
    made.run(40 * (count + 5))
    assert made.read(DATA + 0x104) == 1, "it did not come to its end"
    return made


def cost(body: str) -> dict[str, int]:
    """Exits of `MORE` rounds after `WARM` others, by reason."""
    few, many = (rounds(body, n).machine.exits.rows for n in (WARM, WARM + MORE))
    counts = {reason: row.count - (few[reason].count if reason in few else 0) for reason, row in many.items()}
    return {reason: count for reason, count in counts.items() if count}


@pytest.mark.parametrize("name", FREE)
def test_an_in_cache_sequence_never_exits_once_it_is_warm(name: str) -> None:
    """Rounds of it cost no exit at all."""
    assert cost(FREE[name]) == {}


@pytest.mark.parametrize("name", ONE_EXIT)
def test_a_round_trip_costs_one_exit(name: str) -> None:
    """Into the handler by an exit, out of it by IRET without one."""
    body, reason = ONE_EXIT[name]
    assert cost(body) == {reason: MORE}


# The cells that in-cache code writes are the guest kernel's to write as well

CORRUPT = """
        jmp begin
on_d:   add esp, 4
on_e:   add esp, 4
        mov esp, STACK
        inc dword [DATA + 0x108]
        jmp done
on_30:  iretd
begin:  mov ecx, 200
next:   imul eax, [DATA + 0x10C], 1664525
        add eax, 1013904223
        mov [DATA + 0x10C], eax
        mov ebx, eax
        shr ebx, 12
        and ebx, 0x3FFF                 ; DATA, FLAG, RISE, CONSTANTS
        add ebx, {cells:#x}
        inc dword [DATA + 0x110]
        mov [ebx], eax
done:   sti
        pushfd
        pop edx
        cli
        call routine
        mov eax, routine
        call eax
        int 0x30
        push dword 0x246
        popfd
        push edx
        popfd
        dec ecx
        jnz next
over:   jmp over
routine: ret
"""


def translator(made: Lab) -> TranslatingMonitor:
    assert isinstance(made.control, TranslatingMonitor)
    return made.control


@pytest.mark.parametrize("paging", (False, True))
@pytest.mark.parametrize("seed", range(6))
def test_whatever_a_kernel_stores_into_the_monitors_cells_hurts_only_itself(seed: int, paging: bool) -> None:
    """Random stores over all cells, while sequences use them: no traceback, the constants and the code stay."""
    slot = 0xFFC00000
    text = CORRUPT.format(cells=slot + layout.DATA)
    if paging:
        text = text.replace(
            "begin: ",
            "begin: mov eax, 0x120000\n mov cr3, eax\n mov eax, cr0\n bts eax, 31\n mov cr0, eax\n",
            1,
        )
    symbols = assemble(text).symbols
    idt = {v: gate(symbols[f"on_{v:x}"]) for v in (0xD, 0xE, 0x30)}
    made = lab(text, "bt", idt=idt, memory=enable_paging(size=MEMORY))
    control = translator(made)
    assert control.slot == slot
    made.machine.memory.load(DATA + 0x10C, (0x9E3779B9 * (seed + 1) & 0xFFFFFFFF).to_bytes(4, "little"))
    constants = control.cache.view[layout.CONSTANTS + 0x200 : layout.CONSTANTS + 0x1000].tobytes()
    assert made.run(30_000).kind in ("budget", "triple-fault", "halt", "error")
    assert control.cache.view[layout.CONSTANTS + 0x200 : layout.CONSTANTS + 0x1000].tobytes() == constants
    cache = control.cache
    assert not any(cache.view[layout.CODE + cache.cursor :])
    assert (
        sum(map(bool, cache.view[layout.TAGS + 4 : layout.TRANSLATIONS].cast("I")))
        <= cache.statistics.lookups
    )
    assert made.read(DATA + 0x110) > 20, "it did not get far"


def test_the_virtual_if_is_one_byte_and_any_value_but_0_means_on() -> None:
    """A kernel that stores rubbish where the virtual IF is has interrupts on: an interrupt comes, and clears it."""
    text = f"mov byte [0xFFC00000 + {layout.FLAG:#x}], 0xAA\n nop\n jmp $"
    made = lab(text, "bt")
    made.run(50)
    assert made.reg("eflags") & EFlags.IF
    made.machine.bus.write(0x21, 1, 0xF7)
    made.machine.devices.pics.set_irq(3, True)
    made.run(100)
    assert made.vector == 11
    assert not made.reg("eflags") & EFlags.IF
    assert made.stack(3)[2] & ~0xFF == EFlags.IF


# What a process sees

USER_SEES = {
    "SIDT": "sidt [USER_STACK]",
    "SLDT": "sldt eax\n sldt [USER_STACK]",
    "STR": "str eax\n str [USER_STACK]",
    "SMSW": "smsw eax\n smsw [USER_STACK]",
    "PUSHF": "pushfd\n pop eax\n stc\n pushfd\n pop ecx",
    "MOV and PUSH from segments": "mov eax, cs\n mov ecx, ss\n mov edx, ds\n push cs\n"
    " push ss\n pop ebx\n pop esi\n mov edi, fs",
    "LAR and LSL of its own": "mov eax, USER_CODE\n lar ecx, eax\n lsl edx, eax\n mov eax, USER_DATA\n lar esi, eax",
    "VERR and VERW of its own": "mov eax, USER_DATA\n verr ax\n pushfd\n verw ax\n pushfd\n pop ecx\n pop edx",
    "CLI is refused": "cli",
    "HLT is refused": "hlt",
    "MOV from CR is refused": "mov eax, cr0",
    "LGDT is refused": "lgdt [USER_STACK]",
    "IN is refused": "in al, 0x21",
    "a POPF that changes nothing": "push dword 0x3202\n popfd\n pushfd\n pop eax",
}
DIFFERENT = {"SGDT": "sgdt [USER_STACK]"}


def process(body: str, mode: str, flags: int) -> dict[str, object]:
    made = lab(f"to_ring USER_CODE, USER_DATA, {flags:#x}\n {body}\n int 0x40", mode)
    made.run(60)
    return made.everything()


@pytest.mark.parametrize("flags", (0x2, 0x202, 0x3202))
@pytest.mark.parametrize("name", USER_SEES)
def test_a_process_sees_of_the_machine_what_it_sees_bare(name: str, flags: int) -> None:
    """IDTR, LDTR, TR, the low word of CR0, flags, selectors, its own descriptors: the guest's values."""
    assert process(USER_SEES[name], "bt", flags) == process(USER_SEES[name], "native", flags)


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_a_process_sees_of_the_monitor_is_listed(name: str) -> None:
    """GDTR is the monitor's: user-sensitive and not privileged, so theorem 3 gives no way to hide it."""
    assert process(DIFFERENT[name], "bt", 0x202) != process(DIFFERENT[name], "native", 0x202)


# Targets that agree in their low 16 bits

NEAR, FAR = 0x150000, 0x160000
ALIASES = {
    "RET": ("mov eax, callee\n call eax\n", "callee: ret"),
    "RET n": ("mov eax, callee\n push eax\n call eax\n", "callee: ret 4"),
    "JMP indirect": ("mov esi, $ + 12\n mov eax, callee\n jmp eax\n", "callee: jmp esi"),
    "IRET": ("pushfd\n push cs\n mov eax, callee\n call eax\n", "callee: iretd"),
}


@pytest.mark.parametrize("way", ALIASES)
def test_targets_with_the_same_low_bits_are_told_apart(way: str) -> None:
    """The tables go by the low 16 bits of an address; where two targets share them, each is still found.

    The same code lies twice, 64 KiB apart, with another increment behind the way back: both must count.
    """
    there, callee = ALIASES[way]
    made = {}
    for mode in ("native", "bt"):
        symbols = assemble(f"{_TWICE.format(callee=callee)}").symbols
        routine = symbols["callee"]
        pieces = []
        for base, cell in ((NEAR, DATA), (FAR, DATA + 4)):
            body = there.replace("callee", f"{routine:#x}")
            text = f"org {base:#x}\n{body} inc dword [{cell:#x}]\n mov edi, {symbols['joined']:#x}\n jmp edi\n"
            pieces.append((base, assemble_text(f"bits 32\n{text}").data))
        made[mode] = lab(_TWICE.format(callee=callee), mode, memory=pieces)
        made[mode].run(4_000)
    assert made["bt"].everything() == made["native"].everything()
    assert made["bt"].read(DATA) == made["bt"].read(DATA + 4) == 8


_TWICE = f"""
        mov ebx, 16
again:  mov eax, {NEAR:#x}
        test bl, 1
        jz go
        mov eax, {FAR:#x}
go:     jmp eax
joined: dec ebx
        jnz again
over:   jmp over
{{callee}}
"""
