"""RDTSC answered in machine code: never another value than Python's, whatever happens in between."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.machines import CODE, DATA, gate, lab
from vmm.attribution import Attribution
from vmm.machine.clock import HostClock
from vmm.machine.cpu.stub import supported
from vmm.vm import UNMODIFIED

pytestmark = pytest.mark.skipif(not supported(), reason="on this host Python answers every RDTSC")
KEEP = "rdtsc\n stosd\n mov eax, edx\n stosd\n"  # where EDI points
SETUP = f"cld\n mov edi, {DATA:#x}\n mov ebp, 3\n"
# A block whose instructions stand otherwise before RDTSC the second time: as many bytes in all, as many instructions.
CHANGING = f"""
        mov ebx, 2
twice:  call patch
        stosd
        call patch
        stosd
        mov dword [patch], 0x310F9066   ; xchg ax, ax; rdtsc
        mov dword [patch + 4], 0x0FC39090
        dec ebx
        jnz twice
        jmp over
        align 16, db 0x90
patch:  nop
        nop
        rdtsc
        db 0x66, 0x90
        ret
over:   {KEEP}
"""
TIMER = "mov al, 0x34\n out 0x43, al\n"
ATOMS = {
    "twice in a block": KEEP + KEEP,
    "a wait": f"rdtsc\n mov esi, eax\n.wait%: rdtsc\n sub eax, esi\n cmp eax, 90\n jb .wait%\n{KEEP}",
    "a loop of blocks": f"mov ecx, 5\n.a%: {KEEP} nop\n dec ecx\n jz .b%\n jmp .a%\n.b%: nop\n",
    "the counter is set": f"{KEEP} mov ecx, 0x10\n xor edx, edx\n mov eax, 7\n wrmsr\n {KEEP}",
    "a port": f"{KEEP} mov al, 0x10\n out 0x80, al\n {KEEP} in al, 0x61\n {KEEP}",
    "the timer is set": f"{TIMER} mov al, 9\n out 0x40, al\n {KEEP} mov al, 0\n out 0x40, al\n {KEEP}",
    "an exception": f"{KEEP} int 0x40\n {KEEP}",
    "an interrupt may come": f"sti\n {KEEP} nop\n {KEEP} cli\n",
    "a shadow": f"sti\n rdtsc\n stosd\n mov ax, ss\n mov ss, ax\n {KEEP} cli\n",
}
GATES = {0x40: "hit", 0x20: "tick"}


def program(body: str) -> str:
    """`body`, three times; handlers behind it."""
    return f"""
        {SETUP}
        mov al, 0xFE
        out 0x21, al                    ; the timer's line
again:  {body}
        dec ebp
        jnz near again
        cli
end:    jmp end
hit:    iretd
tick:   push eax
        mov al, 0x20
        out 0x20, al
        pop eax
        iretd
"""


def run(
    body: str, mode: str, *, closed: bool, stops: tuple[int, ...] = (), limit: int = 4000
) -> dict[str, object]:
    """A body in a mode, RDTSC answered in Python only if `closed`, the run interrupted at `stops`."""
    source = program(body)
    plain = lab(source, mode)
    idt = {vector: gate(plain.symbol(name)) for vector, name in GATES.items()}
    found = lab(source, mode, idt=idt)
    if closed:
        found.machine.engine.counter.close()
    for port, value in ((0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1)):  # vectors from 0x20 on
        found.machine.bus.write(port, 1, value)
    for stop in sorted(stops):
        found.machine.run(stop)
    found.machine.run(limit)
    assert found.control.where() == found.symbol("end")
    exits = {name: row.count for name, row in found.machine.exits.rows.items()}
    return {**found.everything(), "exits": exits}


@given(
    st.lists(st.sampled_from(sorted(ATOMS)), min_size=1, max_size=6),
    st.sampled_from(("native", "hvm", "bt")),
    st.lists(st.integers(1, 1500), max_size=3).map(tuple),
)
@settings(deadline=None, max_examples=60)
def test_an_answer_is_never_another_than_pythons(names: list[str], mode: str, stops: tuple[int, ...]) -> None:
    """Waits, interrupts, a counter that is set, ports that end the block, runs that are cut short: memory, registers,
    time and exits are those of a run in which every RDTSC comes to Python."""
    body = "".join(ATOMS[name].replace("%", f"{i}") for i, name in enumerate(names))
    assert run(body, mode, closed=False, stops=stops) == run(body, mode, closed=True, stops=stops)


@pytest.mark.parametrize("told", (False, True), ids=("", "measured"))
@pytest.mark.parametrize("mode", UNMODIFIED)
def test_a_block_that_has_become_another_is_not_taken_for_the_old_one(mode: str, told: bool) -> None:
    """Same address, size and number of instructions, and RDTSC in the same place, but after one more instruction or
    one less: the answer is that of the block as it is now."""
    values = {}
    for closed in (False, True):
        found = lab(f"{SETUP} {CHANGING}\nend: jmp end", mode)
        if closed:
            found.machine.engine.counter.close()
        if told:  # as where the size of all code is measured
            found.machine.engine.tell_all_translations()
        found.run(200)
        assert found.control.where() == found.symbol("end")
        values[closed] = found.everything()
    assert values[False] == values[True]


# Reads in the same place between ticks, of which none is the first; and while the next tick is moved about.
TICKING = f"""
        {TIMER}
        mov al, 20
        out 0x40, al
        mov al, 0
        out 0x40, al
        sti
        mov ebx, 9000
.next:  rdtsc
        xor esi, eax
        rol esi, 5
        dec ebx
        jnz .next
        cli
"""
MOVED = f"""
        mov ebx, 60
.next:  {TIMER}
        mov al, 0
        out 0x40, al
        mov al, bl
        out 0x40, al                    ; sooner each time, by 256 of the timer's clocks
        rdtsc
        xor esi, eax
        rol esi, 5
        dec ebx
        jnz .next
"""


@pytest.mark.parametrize("mode", UNMODIFIED)
@pytest.mark.parametrize("source", (TICKING, MOVED), ids=("ticks", "moved"))
def test_an_answer_is_right_whenever_the_cpu_is_to_stop(source: str, mode: str) -> None:
    """Interrupts by the timer, and a deadline that comes nearer while the CPU runs on."""
    assert run(source, mode, closed=False, limit=200_000) == run(source, mode, closed=True, limit=200_000)


@pytest.mark.parametrize("mode", UNMODIFIED)
def test_a_wait_is_answered_without_python(mode: str) -> None:
    """A loop that reads the counter asks Python a few times and not each time, and all of it counts as exits."""
    found = lab("mov ecx, 500\n.next: rdtsc\n dec ecx\n jnz .next\nend: jmp end", mode)
    asked = 0
    on_rdtsc = found.machine.on_rdtsc

    def counted() -> int:
        nonlocal asked
        asked += 1
        return on_rdtsc()

    found.machine.on_rdtsc = counted  # type: ignore[method-assign]
    found.run(3000)
    assert found.machine.exits.rows["RDTSC"].count == 500
    assert 1 <= asked < 10


def test_nothing_is_remembered_where_time_is_the_hosts() -> None:
    """By the wall clock every RDTSC is answered anew, and never with less than before."""
    source = f"{SETUP} mov ecx, 200\n.next: rdtsc\n stosd\n dec ecx\n jnz .next\nend: hlt"
    found = lab(source, clock=HostClock())
    found.run()
    values = [found.read(DATA + 4 * i) for i in range(200)]
    assert values == sorted(values)
    assert len(set(values)) > 100


def test_who_asks_where_exits_come_from_is_told_of_each() -> None:
    """With an attribution every RDTSC has its place."""
    found = lab("mov ecx, 50\n.next: rdtsc\n dec ecx\n jnz .next\nend: jmp end")
    attribution = Attribution(found.machine)
    found.run(500)
    (site,) = (site for site in attribution.sites if "RDTSC" in site.exits.rows)
    assert (site.eip, site.exits.rows["RDTSC"].count) == (CODE + 5, 50)
