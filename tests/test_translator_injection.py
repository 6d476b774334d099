"""The translator, interrupted everywhere: whatever comes between two bytes of the cache, the guest does not see it.

One guest goes through every in-cache sequence, some rounds, first on a page of code, then (`mixed`) on a page that it
also stores to, where units are checked each time they are entered. It is stopped, stepped and interrupted at each
instruction of the guest's and each one of the cache's, its stack and operands are taken away, and each time it has to
come to what the bare machine comes to.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from tests.machines import MEMORY, PAGES, PAGING_ON, Lab, assemble, enable_paging, gate, lab
from vmm.events import Event
from vmm.isa.disassemble import sizes
from vmm.machine.cpu import stub
from vmm.monitor.translator import layout
from vmm.monitor.translator.emitter import TRAP
from vmm.monitor.translator.monitor import TranslatingMonitor
from vmm.monitor.translator.units import Kind, Unit

# Each leaves ESP as it was; EBP holds it. DI is the sum of what was seen.
SEQUENCES: dict[str, str] = {
    "CLI and STI": "cli\n sti\n nop\n cli\n nop\n sti\n inc edi\n cli",
    "STI before a jump": "sti\n jmp %%there\n nop\n%%there: inc edi\n cli",
    "PUSHF": "stc\n pushfd\n pop eax\n add edi, eax\n sti\n nop\n pushfd\n pop eax\n add edi, eax\n cli",
    "POPF": "push dword 0xAD7\n popfd\n adc edi, 1\n cld\n push dword 2\n popfd\n pushfd\n"
    " add edi, [esp]\n popfd",
    "POPF of IOPL": "push dword 0x3202\n popfd\n sti\n nop\n pushfd\n pop eax\n add edi, eax\n"
    " push dword 2\n popfd",
    "IRET to the kernel": "std\n pushfd\n cld\n push cs\n push dword %%there\n iretd\n nop\n"
    "%%there: pushfd\n pop eax\n add edi, eax\n cld",
    "IRET that sets IF": "push dword 0x246\n push dword KERNEL_CODE\n push dword %%there\n iretd\n nop\n"
    "%%there: inc edi\n cli",
    "INT and IRET": "int 0x30\n add edi, eax",
    "IRET to a process": "mov esi, %%back\n to_ring USER_CODE, USER_DATA, 0x202\n pushfd\n pop eax\n"
    " int 0x80\n"
    "%%back: add edi, eax",
    "IRET to a process, interrupts off": "mov esi, %%back\n to_ring USER_CODE, USER_DATA, 0xA\n"
    " int 0x80\n%%back:",
    "CALL and RET": "call near_routine\n call near_routine",
    "CALL indirect": "mov eax, near_routine\n call eax\n call [pointer]\n mov ecx, pointer\n call [ecx]",
    "JMP indirect": "mov ecx, %%there\n jmp ecx\n nop\n%%there: push dword %%on\n jmp [esp]\n nop\n"
    "%%on: pop ecx",
    "other targets each time": "mov ecx, %%odd\n test byte [rounds], 1\n jz %%now\n mov ecx, %%even\n"
    "%%now: jmp ecx\n"
    "%%odd: call returns_8_odd\n inc edi\n jmp %%over\n%%even: call returns_8_even\n%%over:",
    "RET n": "push eax\n push ecx\n call returns_8\n inc edi",
    "RET that is a jump": "push dword %%there\n ret\n nop\n%%there: inc edi",
    "RETs that share a place in the table": "mov ecx, %%first + 0x40000 - 5\n mov byte [ecx], 0xE8\n"
    " mov dword [ecx + 1], near_routine - %%first - 0x40000\n mov byte [ecx + 5], 0xC3\n call ecx\n"
    "%%first: mov eax, near_routine\n mov ecx, %%second + 0x40000 - 2\n mov word [ecx], 0xD0FF\n"
    " mov byte [ecx + 2], 0xC3\n call ecx\n call near_routine\n%%second: inc edi",
    "LOOP": "mov ecx, 3\n%%again: inc edi\n loop %%again\n add edi, ecx",
    "LOOPE": "mov ecx, 5\n%%again: test ecx, 2\n loope %%again\n add edi, ecx\n mov ecx, 5\n"
    "%%more: test ecx, 2\n loopne %%more",
    "JECXZ": "mov ecx, 1\n jecxz %%there\n dec ecx\n jecxz %%there\n inc edi\n%%there: inc edi",
    "Jcc": "cmp edi, 5\n jb %%there\n inc edi\n%%there: jo %%on\n add edi, 2\n%%on:",
    "MOV from CR": "mov eax, cr0\n add edi, eax\n mov eax, cr2\n xor edi, eax\n mov ecx, cr3\n"
    " add edi, ecx\n mov eax, cr4",
    "MOV from CS and SS": "stc\n mov eax, cs\n mov ecx, ss\n adc edi, eax\n mov [cell], cs\n"
    " add edi, ecx\n mov ax, ss\n add edi, eax",
    "PUSH CS and SS": "stc\n push cs\n push ss\n adc edi, [esp]\n pop eax\n pop ecx\n add edi, ecx",
    "SGDT": "sgdt [cell]\n add edi, [cell + 2]\n sgdt [esp - 8]\n add edi, [esp - 8]",
    "segment loads": "mov eax, ds\n mov es, eax\n push ds\n pop es\n push fs\n pop gs\n"
    " mov word [cell], KERNEL_DATA\n"
    " stc\n mov es, [cell]\n adc edi, 0",
    "MOV SS": "mov eax, ss\n mov ss, eax\n inc edi\n push ss\n pop ss\n inc edi",
    "LAR and VERR": "mov eax, USER_CODE\n lar ecx, eax\n add edi, ecx\n verr ax\n jnz %%no\n inc edi\n%%no:",
    "string": "mov ecx, 3\n push edi\n mov edi, cell\n rep stosb\n pop edi\n add edi, [cell]",
    "far": "push cs\n push dword %%there\n retf\n%%there: jmp KERNEL_CODE:%%on\n nop\n%%on: inc edi",
}  # fmt: skip

ROUNDS = 4  # a page of mixed use settles after three turns
TIMER = 8

COMMON = """
on_30:  add eax, [esp + 8]
        iretd
on_80:  mov ecx, KERNEL_DATA
        mov ds, ecx
        mov es, ecx
        mov esp, ebp
        jmp esi
on_1:   inc dword [ss:steps]            ; the trace: a sum over EIP and flags of each step
        push eax
        mov eax, [esp + 4]
        add eax, [esp + 12]
        rol dword [ss:trace], 5
        add [ss:trace], eax
        pop eax
        iretd
on_8:   push eax
        inc dword [ss:ticks]
        mov al, 0x20
        out 0x20, al
        pop eax
        iretd
on_d:   add esp, 4
        add dword [esp], 2
        inc dword [ss:steps]
        iretd
near_routine:
        inc edi
        ret
returns_8:
        ret 8
returns_8_odd:
        mov ecx, near_routine
        jmp popped
returns_8_even:
        mov ecx, near_routine_2
popped: call ecx
        push eax
        push eax
        call returns_8
        ret
near_routine_2:
        dec edi
        ret
pointer: dd near_routine
"""
WORDS = """
        align 4
cell:   dd 0, 0, 0
steps:  dd 0
trace:  dd 0
ticks:  dd 0
"""


def source(names: tuple[str, ...], mixed: bool, each: str = "", before: str = "") -> str:
    """The guest: `each` is put in front of every sequence; `mixed`: the page of the code is stored to as well."""
    store = "inc dword [cell + 8]" if mixed else ""
    text = [f"%macro sequence_{number} 0\n{SEQUENCES[name]}\n%endmacro" for number, name in enumerate(names)]
    body = "\n".join(f"{each}\n{store}\nsequence_{number}" for number in range(len(names)))
    return (
        "\n".join(text)
        + f"""
        jmp begin
{COMMON}
{WORDS if mixed else ""}
begin:  mov ebp, esp
{before}
        mov dword [rounds], {ROUNDS}
next:
{body}
        dec dword [rounds]
        jnz next
over:   jmp over
{"" if mixed else "align 4096" + WORDS}
rounds: dd 0
"""
    )


def board(text: str, mode: str, **options: object) -> Lab:
    """A lab whose gates lead to the program's own `on_...` labels."""
    symbols = assemble(text).symbols
    idt = {int(name[3:], 16): gate(at) for name, at in symbols.items() if name.startswith("on_")}
    return lab(text, mode, idt=idt, **options)  # type: ignore[arg-type]


ALL = tuple(
    name for name in SEQUENCES if name != "POPF of IOPL"
)  # which empties the table of look-ups each time
MIXED = pytest.mark.parametrize("mixed", (False, True), ids=("own page", "page with data"))


@dataclass
class Course:
    """What a native run was at each instruction count, and at its end."""

    states: dict[int, dict[str, int]] = field(default_factory=dict)
    end: dict[str, object] = field(default_factory=dict)
    length: int = 0


@functools.cache
def course(mixed: bool) -> Course:
    made, found = board(source(ALL, mixed), "native"), Course()
    over = made.symbol("over")
    while made.machine.state.eip != over:
        found.states[made.retired] = made.registers
        made.run(made.retired + 1)
        assert made.retired < 10_000
    found.states[made.retired] = made.registers
    found.length, found.end = made.retired, made.everything()
    return found


# Stops at instructions of the guest


@MIXED
def test_stopped_at_each_instruction_the_guest_is_as_it_would_be_bare(mixed: bool) -> None:
    """With a budget of one at a time, registers and memory are native's after each."""
    text = source(ALL, mixed)
    native, other = board(text, "native"), board(text, "bt")
    for count in range(1, course(mixed).length + 1):
        native.run(count)
        other.run(count)
        assert other.retired == native.retired
        assert other.registers == native.registers, hex(native.reg("eip"))
        assert other.machine.memory.bytes.tobytes() == native.machine.memory.bytes.tobytes(), hex(
            native.reg("eip")
        )


@MIXED
@pytest.mark.parametrize("seed", range(6))
def test_stopped_at_random_moments_the_guest_is_as_it_would_be_bare(seed: int, mixed: bool) -> None:
    """The same for longer stretches, in which units are chained and looked up."""
    r, native = random.Random(seed), course(mixed)
    made, count = board(source(ALL, mixed), "bt"), 0
    while count < native.length:
        count = min(count + r.choice((1, 2, 3, 7, 20, 100)), native.length)
        made.run(count)
        assert made.registers == native.states[made.retired], hex(made.reg("eip"))
    assert made.everything() == native.end


# Stops at instructions of the cache


def inject(made: Lab, choose: Callable[[], bool], seen: Callable[[], None]) -> None:
    """Before each entry to the CPU for which `choose` says so, have it stop after one instruction of its own."""
    machine = made.machine
    enter = machine._before_entry

    def before_entry(limit: int) -> None:
        seen()
        enter(limit)
        if machine.run_state.outcome is not None or not choose():
            return
        instruction = machine.decode_here()
        if instruction is not None and instruction.repeat:
            machine.retirement.arm(1)  # a pass of it in a shadow counts otherwise (`machine.clock`)
        else:
            machine.run_state.step = True
            machine.engine.meter.poll = stub.STOP_NOW

    machine._before_entry = before_entry  # type: ignore[method-assign]


def stop_everywhere(made: Lab, native: Course, choose: Callable[[], bool]) -> set[int]:
    """Run with such stops, and compare at all that are settled; the offsets in the cache where it stood."""
    control = made.control
    assert isinstance(control, TranslatingMonitor)
    offsets: set[int] = set()

    def seen() -> None:
        where = control._position()
        if where is not None:
            offsets.add(where[2])
        if control.settled() and made.machine.run_state.fault is None and made.retired in native.states:
            assert made.registers == native.states[made.retired], hex(made.reg("eip"))

    inject(made, choose, seen)
    made.run(native.length)
    assert made.everything() == native.end
    return offsets


UNREACHED = {("E0", 2)}  # LOOPNE's jump: the machine executes that instruction itself
Place = tuple[str, int]  # what of the guest's it stands for, and which instruction of its sequence


def watch(control: TranslatingMonitor) -> dict[int, Place]:
    """Will be all offsets of the cache's instructions that are within in-cache sequences, but their traps."""
    places: dict[int, Place] = {}

    def made(unit: Unit) -> None:
        ends = [*unit.starts[1:], unit.origin + unit.size]
        for index, piece in unit.special.items():
            if piece.kind is not Kind.SEQUENCE or piece.instruction is None:
                continue
            start, end = unit.starts[index], ends[index]
            code = control.cache.view[layout.CODE + start : layout.CODE + end].tobytes()
            into = 0
            for number, size in enumerate(sizes(code, 200)):
                if code[into] != TRAP[0]:
                    places[start + into] = piece.instruction.key, number
                into += size

    control.observers.append(made)
    return places


@MIXED
def test_stopped_at_each_address_of_the_cache_it_goes_on_as_if_it_had_not(mixed: bool) -> None:
    """The CPU is stopped after each instruction of its own; what is called settled is a state of the guest's."""
    made = board(source(ALL, mixed), "bt")
    assert isinstance(made.control, TranslatingMonitor)
    places = watch(made.control)
    offsets = stop_everywhere(made, course(mixed), lambda: True)
    missed = set(places.values()) - {places[at] for at in offsets if at in places}
    # LOOPNE is taken by the machine itself; with checked units STI is a call-out, and some jumps go elsewhere.
    assert mixed or missed <= UNREACHED


@MIXED
@pytest.mark.parametrize("seed", range(12))
def test_stopped_at_some_addresses_of_the_cache_it_goes_on_as_if_it_had_not(seed: int, mixed: bool) -> None:
    """The same, and after a stop it often goes on by itself: to the end of what it was in, or out of it."""
    r = random.Random(seed)
    often = (0.9, 0.5, 0.2)[seed % 3]
    stop_everywhere(board(source(ALL, mixed), "bt"), course(mixed), lambda: r.random() < often)


# Interrupts from outside

SLIDE = 180  # more than two periods of the timer's clock, in instructions


def with_timer(mixed: bool, mode: str, late: int) -> tuple[list[tuple[int, int, int]], dict[str, object]]:
    """Deliveries (vector, EIP, moment) and the end, with a timer that was started `late` instructions sooner."""
    slide = f"mov ax, [start_at]\n movzx eax, ax\n add eax, slide\n jmp eax\nslide: times {SLIDE} nop"
    made = board(source(ALL, mixed, before=slide) + "start_at: dd 0\n", mode)
    made.machine.memory.load(made.symbol("start_at"), (SLIDE - late).to_bytes(4, "little"))
    bus = made.machine.bus
    bus.write(0x43, 1, 0x34)  # channel 0, mode 2
    bus.write(0x40, 1, 2)
    bus.write(0x40, 1, 0)
    bus.write(0x21, 1, 0xFE)
    taken: list[tuple[int, int, int]] = []

    def note(event: Event) -> None:
        if event.kind == "delivered":
            taken.append((int(event.data["vector"]), event.eip, event.at))

    made.machine.run_state.listeners.append(note)
    made.run(course(mixed).length + 2 * SLIDE)
    return taken, made.everything()


@MIXED
@pytest.mark.parametrize("part", range(6))
def test_a_timer_due_at_any_instruction_interrupts_the_same_one(part: int, mixed: bool) -> None:
    """Swept over a period: each interrupt is taken at the instruction and the moment that it is taken at bare."""
    for late in range(part, SLIDE, 12):
        bare = with_timer(mixed, "native", late)
        assert with_timer(mixed, "bt", late) == bare, late
        assert any(vector == TIMER for vector, _, _ in bare[0])


# Single steps


@MIXED
@pytest.mark.parametrize("name", SEQUENCES)
def test_single_steps_through_a_sequence_are_those_of_the_bare_machine(name: str, mixed: bool) -> None:
    """With TF set before it, #DB comes after the same instructions with the same flags, three times over."""
    text = source((name,), mixed, each="push dword 0x102\n popfd")
    taken: dict[str, list[tuple[int, int, int]]] = {"native": [], "bt": []}
    ends = {}
    for mode, events in taken.items():
        made = board(text, mode)

        def note(event: Event, events: list[tuple[int, int, int]] = events) -> None:
            if event.kind == "delivered":
                events.append((int(event.data["vector"]), event.eip, event.at))

        made.machine.run_state.listeners.append(note)
        made.run(1500)
        ends[mode] = made.everything()
    assert taken["bt"] == taken["native"]
    assert ends["bt"] == ends["native"]
    assert len(taken["native"]) >= ROUNDS


# Faults of the guest's own accesses

EDGE = 0x170000  # of a page that is absent or read-only; the page below it is neither, unless it is the one
ENTRY = PAGES + 0x1000 + (EDGE >> 12) * 4
PRESENT, WRITABLE = 1, 2

# What faults, with ESP or EBX where the page begins, or some bytes before: stack contents come first.
POPS = {
    "POPF": ("", ["0x8D7"], "popfd"),
    "POPF that sets IF": ("", ["0x246"], "popfd"),
    "RET": ("", ["there"], "ret"),
    "RET n": ("", ["there"], "ret 8"),
    "IRET to the kernel": ("", ["there", "KERNEL_CODE", "0x2D7"], "iretd"),
    "IRET to a process": ("", ["user", "USER_CODE", "0x2D7", "USER_STACK", "USER_DATA"], "iretd"),
    "POP ES": ("", ["KERNEL_DATA"], "pop es"),
    "POP SS": ("", ["KERNEL_DATA"], "pop ss"),
    "RETF": ("", ["there", "KERNEL_CODE"], "retf"),
}
PUSHES = {
    "PUSHF": "pushfd",
    "CALL": "call callee",
    "CALL indirect": "mov ecx, callee\n call ecx",
    "PUSH CS": "push cs",
    "PUSH SS": "push ss",
    "INT": "int 0x30",
}
OPERANDS = {
    "CALL": (["callee"], "call [ebx]"),
    "JMP": (["there"], "jmp [ebx]"),
    "JMP, prefixed": (["there"], "jmp [es:ebx]"),
    "MOV from CS": (["0"], "mov [ebx], cs"),
    "MOV from SS": (["0"], "mov [ebx], ss"),
    "SGDT": (["0", "0"], "sgdt [ebx]"),
    "SIDT": (["0", "0"], "sidt [ebx]"),
    "SMSW": (["0"], "smsw [ebx]"),
    "STR": (["0"], "str [ebx]"),
    "MOV to ES": (["KERNEL_DATA"], "mov es, [ebx]"),
    "LES": (["5", "KERNEL_DATA"], "les ecx, [ebx]"),
    "LAR": (["USER_CODE"], "lar ecx, [ebx]"),
    "VERW": (["USER_CODE"], "verw [ebx]"),
    "LGDT": (["0x2000FF", "0"], "lgdt [ebx]"),
}


def faulting(words: list[str], act: str, register: str, offset: int) -> str:
    """The guest: twice `act` with `register` at `offset` from EDGE, `words` there; #PF gives the page back."""
    fill = "\n".join(f"mov dword [ebx + {4 * n}], {word}" for n, word in enumerate(words))
    return f"""
        jmp begin
callee: inc edi
        ret
on_30:  iretd
user:   pushfd
        pop ecx
        int 0x80
on_e:   push eax
        mov eax, [esp + 4]
        mov [ss:log], eax               ; error code, EIP, flags, CR2, ESP
        mov eax, [esp + 8]
        mov [ss:log + 4], eax
        mov eax, [esp + 16]
        mov [ss:log + 8], eax
        mov eax, cr2
        mov [ss:log + 12], eax
        mov [ss:log + 16], esp
        inc dword [ss:log + 20]
        or dword [ss:{ENTRY:#x}], {PRESENT | WRITABLE}
        mov eax, cr3
        mov cr3, eax
        pop eax
        add esp, 4
        iretd
on_80:  mov eax, KERNEL_DATA
        mov ds, eax
        mov es, eax
        jmp there
begin:
{PAGING_ON}
        or eax, 0x10000                 ; WP
        mov cr0, eax
        mov edi, 2
again:  mov ebx, {EDGE} + {offset}
        or dword [{ENTRY:#x}], {PRESENT | WRITABLE}
        mov eax, cr3
        mov cr3, eax
{fill}
        mov eax, [changed]
        and [{ENTRY:#x}], eax
        mov eax, cr3
        mov cr3, eax
        mov esp, STACK
        mov {register}, {EDGE} + {offset}
        mov eax, 0x89ABCDEF
        mov ecx, 0x11223344
        mov edx, 0x55667788
        cmp eax, 1
        stc
        {act}
there:  mov [result], esp
        mov esp, STACK
        pushfd
        cli
        dec edi
        jnz again
        mov edi, 100
over:   jmp over
        align 4096
changed: dd 0
result: dd 0
log:    dd 0, 0, 0, 0, 0, 0
"""


CASES = (
    [("pop", name, offset) for name, (_, words, _) in POPS.items() for offset in range(-4 * len(words), 1, 2)]
    + [("push", name, offset) for name in PUSHES for offset in (0, 2, 4, 8)]
    + [("operand", name, offset) for name, (words, _) in OPERANDS.items() for offset in (-5, -4, -2, -1, 0)]
)


@pytest.mark.parametrize("away", (PRESENT, WRITABLE), ids=("absent", "read-only"))
@pytest.mark.parametrize("kind", ("pop", "push", "operand"))
def test_an_instruction_whose_memory_is_taken_away_faults_as_it_does_bare(kind: str, away: int) -> None:
    """CR2, error code, saved EIP, registers, memory: native's, wherever its access runs over the page's edge."""
    different = []
    for which, name, offset in CASES:
        if which != kind:
            continue
        if kind == "pop":
            text = faulting(POPS[name][1], POPS[name][2], "esp", offset)
        elif kind == "push":
            text = faulting([], PUSHES[name], "esp", offset)
        else:
            text = faulting(*OPERANDS[name], "ebx", offset)
        runs = []
        for mode in ("native", "bt"):
            made = board(text, mode, memory=enable_paging(size=MEMORY))
            made.machine.memory.load(made.symbol("changed"), (0xFFFFFFFF & ~away).to_bytes(4, "little"))
            runs.append((made.run(400).kind, made.everything()))
        if runs[1] != runs[0]:
            different.append((name, offset))
    assert not different, different
