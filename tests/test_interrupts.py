"""External interrupts: taken exactly where hardware takes them, at the exact instruction, and only there."""

from __future__ import annotations

import threading
import time

import pytest

from tests.machines import DATA, IDT, INNER_STACKS, KERNEL_CODE, STACK, USER_CODE, Lab, gate, handler, lab
from vmm.events import Event
from vmm.isa.descriptors import SystemType
from vmm.isa.vectors import Vector
from vmm.isa.words import EFlags
from vmm.machine.clock import HostClock

MODES = ("native", "trap")
MODE = pytest.mark.parametrize("mode", MODES)
IRQ = 3
VECTOR = 8 + IRQ  # as firmware leaves the master PIC
TIMER = 8
ACKNOWLEDGE = bytes.fromhex("50 b020 e620 58 cf")  # push eax; mov al, 0x20; out 0x20, al; pop eax; iretd


# So that IF stays as it is in these handlers.
_TRAP_GATES = {vector: gate(handler(vector), kind=SystemType.TRAP_GATE32) for vector in (6, 0x41)}


def unmask(made: Lab, *lines: int) -> None:
    """Let these lines through, and no other."""
    mask = 0xFFFF
    for line in (*lines, *((2,) if any(line > 7 for line in lines) else ())):
        mask &= ~(1 << line)
    made.machine.bus.write(0x21, 1, mask & 0xFF)
    made.machine.bus.write(0xA1, 1, mask >> 8)


def pending(program: str, mode: str = "native", **options: object) -> Lab:
    """A machine with `IRQ` pending from the start."""
    made = lab(program, mode, **options)  # type: ignore[arg-type]
    unmask(made, IRQ)
    made.machine.devices.pics.set_irq(IRQ, True)
    return made


# Where IF rises

_FRAME = "push dword 0x202\n push dword KERNEL_CODE\n push dword here\n"
RISES = {  # code, and the label that the interrupt's frame holds
    "STI shadows one instruction": ("sti\n nop\nhere:   nop\n nop", "here"),
    "STI, whatever the instruction": ("sti\n mov [DATA], eax\nhere:   nop", "here"),
    "STI before a jump": ("sti\n jmp here\n nop\nhere:   nop", "here"),
    "STI twice": ("sti\n sti\nhere:   nop\n nop", "here"),
    "STI before an OUT": ("sti\n out 0x80, al\nhere:   nop", "here"),
    "STI before MOV SS": ("mov ecx, ss\n sti\n mov ss, ecx\nhere:   nop\n nop", "here"),
    "STI before a port string": ("mov edi, DATA\n sti\n insb\nhere:   nop", "here"),
    "STI before LOOPNE": ("mov ecx, 5\n sti\n loopne here\n nop\nhere:   nop", "here"),
    "STI before WRMSR": ("mov ecx, 0x174\n sti\n wrmsr\nhere:   nop", "here"),
    "STI before REP of one pass": ("mov edi, DATA\n mov ecx, 1\n sti\n rep stosb\nhere:   nop", "here"),
    "STI before REP of many": ("mov edi, DATA\n mov ecx, 9\n sti\nhere:   rep stosb\n nop", "here"),
    "STI before IRET": (f"{_FRAME} sti\n iretd\n nop\nhere:   nop", "here"),
    "IRET": (f"{_FRAME} iretd\n nop\nhere:   nop", "here"),
    "STI before INT n": ("sti\n int 0x41\n nop", "handler"),
}  # fmt: skip
NATIVE_RISES = {  # these are critical: under the trap monitor they leave IF as it is
    "POPF": ("push dword 0x202\n popfd\nhere:   nop\n nop", "here"),
    "POPF of words": ("push dword 0x202\n db 0x66, 0x9d\nhere:   nop\n nop", "here"),
    "IRET to a process": ("to_ring USER_CODE, USER_DATA, 0x202\nhere:   nop\n nop", "here"),
}


@pytest.mark.parametrize(
    ("name", "mode"), [(n, m) for n in RISES for m in MODES] + [(n, "native") for n in NATIVE_RISES]
)
def test_a_pending_interrupt_is_taken_as_soon_as_if_allows(name: str, mode: str) -> None:
    """Right after POPF and IRET; after STI one instruction later, and that instruction has been executed."""
    code, label = (RISES | NATIVE_RISES)[name]
    made = pending(code, mode, idt=_TRAP_GATES)
    made.run(60)
    assert made.vector == VECTOR
    eip = handler(0x41) if label == "handler" else made.symbol(label)
    assert made.stack(1) == [eip]
    assert made.stack(3)[2] & EFlags.IF


NEVER = {
    "STI and CLI": "sti\n cli\n nop\n nop\n int 0x40",
    "interrupts off": "nop\n nop\n int 0x40",
    "an interrupt gate": "int 0x40",
    "POPF that clears IF in the shadow": "push dword 2\n sti\n popfd\n nop\n int 0x40",
}


@pytest.mark.parametrize("name", NEVER)
def test_nothing_is_taken_while_if_is_clear(name: str) -> None:
    """With IF clear at every boundary that is not in a shadow, the interrupt keeps waiting."""
    made = pending(NEVER[name])
    made.run(60)
    assert made.vector == 0x40
    assert made.machine.interrupt_pending


SHADOWS = {
    "MOV SS": "mov ecx, ss\n mov ss, ecx",
    "POP SS": "push ss\n pop ss",
}


@MODE
@pytest.mark.parametrize("name", SHADOWS)
def test_a_load_of_ss_shadows_one_instruction(name: str, mode: str) -> None:
    """An interrupt that comes during MOV SS or POP SS is taken after the next instruction, never before it."""
    made = lab(f"sti\n nop\n {SHADOWS[name]}\nin_it:  mov esp, {STACK - 0x100}\nhere:   nop\n nop", mode)
    unmask(made, IRQ)
    made.run_to("in_it")
    made.machine.devices.pics.set_irq(IRQ, True)
    made.run(made.retired + 30)
    assert made.vector == VECTOR
    assert made.stack(1) == [made.symbol("here")]
    assert made.reg("esp") == STACK - 0x100 - 12


@MODE
def test_lss_has_no_shadow(mode: str) -> None:
    """LSS loads SS and ESP at once and needs none."""
    made = lab(
        "sti\n nop\n lss esp, [pointer]\nhere:   nop\n nop\npointer: dd 0x88000\n dw KERNEL_DATA", mode
    )
    unmask(made, IRQ)
    made.run_to("here")
    made.machine.devices.pics.set_irq(IRQ, True)
    made.run(made.retired + 30)
    assert made.stack(1) == [made.symbol("here")]


@MODE
def test_an_interrupt_in_a_process_switches_to_the_kernels_stack(mode: str) -> None:
    """An interrupt in ring 3 pushes the process's SS and ESP on the stack that the TSS names."""
    enter = (
        "to_ring USER_CODE, USER_DATA, 0x202"
        if mode == "native"
        else "sti\n nop\n to_ring USER_CODE, USER_DATA, 0x202"
    )
    made = lab(f"{enter}\nhere:   jmp here", mode)
    unmask(made, IRQ)
    made.run_to("here")
    made.machine.devices.pics.set_irq(IRQ, True)
    made.run(made.retired + 30)
    assert made.vector == VECTOR
    assert made.stack(2) == [made.symbol("here"), USER_CODE]
    assert made.stack(5)[2] & EFlags.IF
    assert made.reg("esp") == INNER_STACKS[0] - 20


# Time

_PROGRAM_PIT = """
        mov al, 0x30            ; counter 0, one-shot
        out 0x43, al
        mov al, {low}
        out 0x40, al
        mov al, {high}
        out 0x40, al
        sti
"""
BODIES = {
    "straight code": " nop\n" * 3000,
    "blocks of two": "again:  inc ebx\n jmp again",
    "a block that jumps to itself": "again:  jmp again",
    "a long block": "again:\n" + " inc ebx\n" * 57 + " jmp again",
    "REP STOS": "mov edi, DATA\n mov ecx, 100000\n rep stosb",
    "short REPs": "again:  mov edi, DATA\n mov ecx, 3\n rep stosd\n jmp again",
    "calls": "again:  call sub\n jmp again\nsub:    inc ebx\n ret",
    "loads and stores": "again:  mov [DATA], ebx\n add ebx, [DATA]\n push ebx\n pop eax\n jmp again",
    "ports": "again:  in al, 0x80\n out 0x80, al\n nop\n jmp again",
    "faults": "again:  ud2\n jmp again",
    "software interrupts": "again:  int 0x41\n jmp again",
    "stores into the block itself": "again:  mov byte [there + 1], 7\n nop\nthere:  mov al, 0\n nop\n jmp again",
    "privileged instructions": "again:  mov eax, cr0\n clts\n mov ecx, cr3\n jmp again",
    "what the machine executes": "again:  mov edi, DATA\n insb\n mov eax, cr0\n mov cr0, eax\n jmp again",
    "shadows": "again:  mov ecx, ss\n mov ss, ecx\n sti\n jmp again",
}
_HANDLERS = ((handler(6), bytes.fromhex("83042402 cf")), (handler(0x41), b"\xcf"))


def _timer_event(body: str, mode: str, pulses: int) -> tuple[Event, Lab]:
    """Where the timer, one-shot with that many pulses, interrupts `body`."""
    events: list[Event] = []
    program = _PROGRAM_PIT.format(low=pulses & 0xFF, high=pulses >> 8) + body
    made = lab(program, mode, memory=_HANDLERS, idt=_TRAP_GATES)
    unmask(made, 0)
    made.machine.run_state.listeners.append(lambda e: events.append(e) if e.kind == "interrupt" else None)
    made.run(10_000)
    assert made.vector == TIMER
    assert len(events) == 1
    return events[0], made


@MODE
@pytest.mark.parametrize("pulses", (9, 10, 23))
@pytest.mark.parametrize("body", BODIES)
def test_a_timer_interrupts_after_an_exact_count(body: str, pulses: int, mode: str) -> None:
    """However the code is made of blocks, the tick comes after the same number of instructions.

    Where that moment falls into a shadow the interrupt waits for its end, at most one instruction.
    """
    expected, _ = _timer_event(BODIES["straight code"], "native", pulses)
    event, made = _timer_event(BODIES[body], mode, pulses)
    late = 1 if body == "shadows" else 0
    assert expected.at <= event.at <= expected.at + late
    assert made.stack(1) == [event.eip]


def test_the_count_is_the_timers() -> None:
    """The tick comes at the first instruction boundary at which the 8254 has counted down."""
    event, _ = _timer_event(BODIES["straight code"], "native", 23)
    # The counter is loaded by the pulse after the sixth instruction; mode 0 ends one pulse later than it counts.
    pulse = 1e9 / 1_193_182
    loaded = 6 * 10
    first_pulse = -(-loaded // pulse)
    assert event.at * 10 >= (first_pulse + 23) * pulse > (event.at - 90) * 10


@MODE
def test_straight_code_is_interrupted_at_the_instruction_itself(mode: str) -> None:
    """The frame's EIP is that of the instruction with the event's number."""
    event, made = _timer_event(BODIES["straight code"], mode, 23)
    prefix = 7
    assert event.eip == made.assembly.origin + len(made.assembly.data) - 3000 + (event.at - prefix)


@MODE
def test_rep_is_interrupted_between_two_passes(mode: str) -> None:
    """A long REP STOS is interrupted with EIP at it, and goes on after IRET as if nothing had been."""
    program = (
        _PROGRAM_PIT.format(low=3, high=0)
        + "mov edi, DATA\n mov ecx, 3000\n mov al, 5\nat:     rep stosb\n int 0x40"
    )
    made = lab(program, mode)
    unmask(made, 0)
    made.run(5_000)
    assert made.vector == TIMER
    assert made.stack(1) == [made.symbol("at")]
    done = 3000 - made.reg("ecx")
    assert 0 < done < 3000
    assert made.data(DATA, 3001) == b"\x05" * done + bytes(3001 - done)
    made = lab(program, mode, memory=((handler(TIMER), ACKNOWLEDGE),))
    unmask(made, 0)
    made.run(5_000)
    assert (made.vector, made.data(DATA, 3001)) == (0x40, b"\x05" * 3000 + b"\0")


# HLT


@MODE
def test_hlt_sleeps_until_the_timer(mode: str) -> None:
    """HLT with interrupts on wakes at the tick, with EIP behind it, and time has gone on."""
    made = lab(_PROGRAM_PIT.format(low=0, high=16) + "hlt\nhere:   nop", mode)
    unmask(made, 0)
    made.run(60)
    assert made.vector == TIMER
    assert made.stack(1) == [made.symbol("here")]
    assert made.machine.now() > 4096 / 1_193_182 * 1e9
    assert made.retired == 60


@MODE
def test_hlt_with_an_interrupt_pending_does_not_sleep(mode: str) -> None:
    """STI; HLT with a pending interrupt: HLT is in the shadow, so the frame's EIP is behind it."""
    made = pending("sti\n hlt\nhere:   nop", mode)
    made.run(30)
    assert made.vector == VECTOR
    assert made.stack(1) == [made.symbol("here")]
    assert made.machine.clock.state.slept == 0


@MODE
def test_a_masked_interrupt_wakes_nobody(mode: str) -> None:
    """HLT with nothing unmasked has no end: the run says so."""
    made = lab("sti\n hlt", mode)
    made.machine.devices.pics.set_irq(IRQ, True)
    outcome = made.run()
    assert (outcome.kind, outcome.detail) == ("halt", "halted, and no device will interrupt")


@MODE
def test_hlt_with_interrupts_off_ends_the_guest(mode: str) -> None:
    """HLT with IF clear ends the run, whatever is pending, with EIP behind it."""
    made = pending("cli\n hlt\nhere:   nop", mode)
    outcome = made.run()
    assert (outcome.kind, outcome.detail) == ("halt", "halted with interrupts off")
    assert made.machine.state.eip == made.symbol("here")


# The controllers' part


@MODE
def test_a_masked_line_interrupts_when_it_is_unmasked(mode: str) -> None:
    """A request behind the mask is kept, and taken right after the OUT that opens the mask."""
    made = lab("sti\n nop\n nop\n in al, 0x21\n and al, 0xF7\n out 0x21, al\nhere:   nop", mode)
    made.machine.devices.pics.set_irq(IRQ, True)
    made.run(30)
    assert (made.vector, made.stack(1)) == (VECTOR, [made.symbol("here")])


@MODE
def test_a_withdrawn_interrupt_is_not_taken(mode: str) -> None:
    """A request that is withdrawn while IF is clear is never delivered."""
    made = pending("nop\nhere:   sti\n nop\n nop\n cli\n int 0x40", mode)
    made.run_to("here")
    made.machine.devices.pics.set_irq(IRQ, False)
    made.run(30)
    assert made.vector == 0x40


@MODE
def test_a_higher_priority_interrupts_a_handler_and_a_lower_one_waits(mode: str) -> None:
    """While IRQ 3 is served, IRQ 1 nests and IRQ 4 waits for the end of interrupt."""
    # The handler: say who we are, allow interrupts, let them come, say so again, end of interrupt, return.
    made = lab(
        """
        sti
        nop
        nop
        cli
        int 0x40
section .data
align 16
one:    push eax
        mov al, '1'
        out 0xE9, al
        mov al, 0x20
        out 0x20, al
        pop eax
        iretd
three:  push eax
        mov al, '3'
        out 0xE9, al
        sti
        nop
        nop
        mov al, 'e'
        out 0xE9, al
        cli
        mov al, 0x20
        out 0x20, al
        pop eax
        iretd
four:   push eax
        mov al, '4'
        out 0xE9, al
        mov al, 0x20
        out 0x20, al
        pop eax
        iretd
""",
        mode,
    )
    for line, label in ((1, "one"), (3, "three"), (4, "four")):
        made.machine.memory.load(IDT + 8 * (8 + line), bytes(gate(made.symbol(label))))
    unmask(made, 1, 3, 4)
    made.machine.devices.pics.set_irq(3, True)
    started: list[Event] = []

    def raise_others(event: Event) -> None:
        if event.kind == "interrupt" and not started:
            started.append(event)
            made.machine.devices.pics.set_irq(4, True)
            made.machine.devices.pics.set_irq(1, True)

    made.machine.run_state.listeners.append(raise_others)
    made.run(200)
    assert bytes(made.console) == b"31e4"
    assert made.vector == 0x40


@MODE
def test_the_second_controller_interrupts_through_the_first(mode: str) -> None:
    """IRQ 8 comes with the second controller's vector."""
    made = lab("sti\n nop\nhere:   nop\n jmp here", mode)
    unmask(made, 8)
    made.machine.devices.pics.set_irq(8, True)
    made.run(30)
    assert (made.vector, made.stack(1)) == (0x70, [made.symbol("here")])


# Repeatable, and not


@MODE
def test_two_runs_are_equal_to_the_byte(mode: str) -> None:
    """With the instruction clock a guest with a timer, ports and sleep does the same every time."""
    program = """
        mov al, 0x36
        out 0x43, al
        mov al, 50
        out 0x40, al
        mov al, 0
        out 0x40, al
        sti
again:  rdtsc
        add [DATA], eax
        in al, 0x40
        add [DATA + 4], al
        inc dword [DATA + 8]
        test byte [DATA + 8], 15
        jnz again
        hlt
        cmp dword [DATA + 8], 300
        jb again
        cli
        hlt
"""
    runs = []
    for _ in range(2):
        made = lab(program, mode, memory=((handler(TIMER), ACKNOWLEDGE),))
        unmask(made, 0)
        assert made.run(50_000).detail == "halted with interrupts off"
        runs.append(made.everything())
    assert runs[0] == runs[1]


@MODE
def test_the_host_clock_delivers_too(mode: str) -> None:
    """With wall time the timer interrupts a busy loop, and wakes HLT."""
    count = bytes.fromhex("36ff05 00001100") + ACKNOWLEDGE  # inc dword [ss:DATA]
    made = lab(
        _PROGRAM_PIT.format(low=0, high=4).replace("0x30", "0x34")
        + "again:  cmp dword [DATA], 3\n jb again\n hlt\n hlt\n cli\n hlt",
        mode,
        memory=((handler(TIMER), count),),
        clock=HostClock(),
    )
    unmask(made, 0)
    started = time.monotonic()
    assert made.machine.run().detail == "halted with interrupts off"
    assert made.read(DATA) >= 5
    assert 5 * 1024 / 1_193_182 <= time.monotonic() - started < 5


@MODE
@pytest.mark.parametrize("body", ("jmp again", "inc ebx\n cli\n jmp again", "ud2\n jmp again"))
def test_a_poke_from_outside_ends_any_loop(body: str, mode: str) -> None:
    """A loop with interrupts off ends when another thread says so, at an instruction boundary."""
    made = lab(f"cli\nagain:  {body}", mode, memory=_HANDLERS)
    timer = threading.Timer(0.05, made.machine.poke, ("timeout",))
    timer.start()
    outcome = made.machine.run()
    timer.join()
    assert outcome.kind == "timeout"
    assert made.run(made.retired + 100).kind == "budget"


@MODE
def test_an_interrupt_needs_a_good_gate(mode: str) -> None:
    """An interrupt through an absent gate is #NP with IDT and EXT set, and the request has been taken."""
    made = lab("sti\n nop\nhere:   nop", mode, idt={0x70: gate(handler(0x70), present=False)})
    unmask(made, 8)
    made.machine.devices.pics.set_irq(8, True)
    made.run(30)
    assert made.vector == Vector.NP
    assert made.stack(3) == [0x70 * 8 + 3, made.symbol("here"), KERNEL_CODE]
