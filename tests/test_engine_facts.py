"""What the machine relies on of its CPU engine: a new Unicorn cannot break it unnoticed.

Each fact was measured once on the engine itself; here it is a promise of the machine built on it.
"""

from __future__ import annotations

import dataclasses
import functools
import threading

import pytest
import unicorn
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.guest_expectations import EXPECTATIONS, Expectation
from tests.machines import (
    CODE,
    FREE,
    INNER_STACKS,
    KERNEL_CODE,
    PAGING_ON,
    RING1_CODE,
    RING1_DATA,
    USER_CODE,
    USER_DATA,
    enable_paging,
    handler,
    lab,
    run,
)
from tests.programs import ATOMS, COMPUTE, DESCRIPTORS, Program, programs
from vmm.errors import EngineError
from vmm.image.image import Image
from vmm.image.load import load_image
from vmm.isa.descriptors import Descriptor, SystemType
from vmm.isa.vectors import Vector
from vmm.isa.words import EFlags
from vmm.machine.boot import boot
from vmm.machine.clock import HostClock
from vmm.machine.cpu import layout as at
from vmm.machine.cpu import verify
from vmm.machine.cpu.engine import Engine
from vmm.machine.machine import Machine
from vmm.vm import MODES, UNMODIFIED

MODE_NAMES = UNMODIFIED

# Rings are real

TRAPPING = {
    "cli": "fa", "sti": "fb", "hlt": "f4", "mov eax, cr0": "0f20c0", "mov cr0, eax": "0f22c0",
    "mov cr3, eax": "0f22d8", "mov cr4, eax": "0f22e0", "lgdt": "0f011500501100", "lidt": "0f011d00501100",
    "ltr": "0f00d8", "lldt": "0f00d0", "lmsw": "0f01f0", "clts": "0f06", "invlpg": "0f0138", "rdmsr": "0f32",
    "wrmsr": "0f30", "invd": "0f08", "wbinvd": "0f09", "mov eax, dr0": "0f21c0", "mov dr0, eax": "0f23c0",
    "sysexit": "0f35",
}  # fmt: skip
SILENT = {
    "sgdt": "0f010500501100", "sidt": "0f010d00501100", "sldt": "0f00c0", "smsw": "0f01e0", "str": "0f00c8",
    "pushf": "9c", "popf": "9c9d", "lar": "0f02c1", "lsl": "0f03c1", "verr": "0f00e1", "verw": "0f00e9",
    "mov ax, cs": "668cc8", "push cs": "0e", "cpuid": "0fa2", "rdtsc": "0f31",
}  # fmt: skip
RINGS = {1: (RING1_CODE, RING1_DATA), 3: (USER_CODE, USER_DATA)}


def _in_ring(ring: int, code: str) -> str:
    selectors = RINGS[ring]
    data = ", ".join(str(byte) for byte in bytes.fromhex(code))
    return f"to_ring {selectors[0]}, {selectors[1]}, 2\nhere:   db {data}\n int 0x40"


@pytest.mark.parametrize("ring", RINGS)
@pytest.mark.parametrize("name", TRAPPING)
def test_privileged_instructions_trap_in_rings_1_and_3(name: str, ring: int) -> None:
    """Outside ring 0 each privileged instruction raises #GP(0), with EIP on it."""
    made = run(_in_ring(ring, TRAPPING[name]), limit=40)
    assert made.vector == Vector.GP
    assert made.stack(3) == [0, made.symbol("here"), RINGS[ring][0]]


@pytest.mark.parametrize("ring", RINGS)
@pytest.mark.parametrize("name", SILENT)
def test_sensitive_but_unprivileged_instructions_run_in_rings_1_and_3(name: str, ring: int) -> None:
    """Outside ring 0 the critical instructions run without a trap: they are why trap-and-emulate fails."""
    assert run(_in_ring(ring, SILENT[name]), limit=40).vector == 0x40


@pytest.mark.parametrize("ring", RINGS)
def test_popf_drops_if_silently_outside_ring_0(ring: int) -> None:
    """POPF of IF set leaves IF clear in rings 1 and 3, and sets it in ring 0; nothing traps."""
    made = run(_in_ring(ring, "68020200009d"), limit=40)
    assert made.vector == 0x40
    assert not made.stack(3)[2] & EFlags.IF
    assert run("push dword 0x202\n popfd\n int 0x40", limit=40).stack(3)[2] & EFlags.IF


def test_rings_change_inside_the_cpu() -> None:
    """IRET outward, a call gate inward with its stack from the TSS, and RETF outward cause no exit at all."""
    inward = Descriptor.gate(RING1_CODE & ~3, 0x7000, SystemType.CALL_GATE32, 3)
    made = run(
        f"to_user\n call {FREE | 3}:0\n inc ebx\n hlt",
        gdt={FREE: inward},
        memory=[(0x7000, bytes.fromhex("668cc8 89e6 cb"))],  # mov ax, cs; mov esi, esp; retf
        limit=40,
    )
    assert (made.reg("eax") & 0xFFFF, made.reg("ebx")) == (RING1_CODE, 1)
    assert made.reg("esi") == INNER_STACKS[1] - 16
    assert set(made.machine.exits.rows) == {"exception #GP"}  # the HLT in ring 3


# Exits


def test_faults_in_a_row_are_not_double_faults() -> None:
    """A hundred exceptions, each resumed, arrive as themselves: exception state is cleared at each exit."""
    skip = bytes.fromhex("83c404 ff0424 cf")  # add esp, 4; inc dword [esp]; iretd
    made = run(
        "to_user\n" + " cli\n" * 100 + " mov ebx, 7\n int 0x40", memory=[(handler(13), skip)], limit=1000
    )
    assert (made.vector, made.reg("ebx")) == (0x40, 7)
    assert made.machine.exits.rows["exception #GP"].count == 100


@pytest.mark.parametrize("mode", MODE_NAMES)
def test_a_fault_after_int_n_is_a_fault(mode: str) -> None:
    """INT 13 and #GP are told apart, also right after each other."""
    returns = bytes.fromhex("cf")
    made = lab("int 0x40\n mov eax, 0xFFF8\nat:     mov ds, eax", mode, memory=[(handler(0x40), returns)])
    made.run(40)
    assert made.vector == Vector.GP
    assert made.stack(2) == [0xFFF8, made.symbol("at")]


@pytest.mark.parametrize("mode", MODE_NAMES)
def test_what_a_handler_raises_comes_out_once(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of ours inside a callback stops the CPU and is raised by `run`, once."""
    made = lab("mov eax, 1\n out 0x80, al\nagain:  jmp again", mode)

    def broken(port: int, size: int, value: int) -> None:
        raise RuntimeError(f"port {port:#x}")

    monkeypatch.setattr(made.machine.bus, "write", broken)
    with pytest.raises(RuntimeError, match="port 0x80"):
        made.run()
    assert made.run(made.retired + 10).kind == "budget"


def test_cr2_is_the_guests_alone() -> None:
    """Stopping and going on in a guest with paging never changes CR2, nor makes a double fault of a fault."""
    made = lab(
        f"{PAGING_ON}\n mov eax, 0x1234\n mov cr2, eax\nloop_:  inc ebx\n cmp ebx, 50\n jne loop_\n"
        "at:     mov eax, [0x1F0004]",
        memory=enable_paging({0x1F0000: 0}),
    )
    while made.vector is None:
        assert made.reg("cr2") in (0, 0x1234)
        made.run(made.retired + 7)
    assert made.vector == Vector.PF
    assert made.reg("cr2") == 0x1F0004


FAULTING = {
    "read absent": (4, 0x40000, "a100000400"),
    "write absent": (6, 0x40004, "a304000400"),
    "write read-only": (7, 0x41010, "a310100400"),
    "read supervisor's": (5, 0x42000, "a100200400"),
    "fetch absent": (4, 0x40000, "b800000400ffe0"),
}


@pytest.mark.parametrize("name", FAULTING)
def test_a_page_fault_has_its_address_and_error_code(name: str) -> None:
    """#PF comes with the full address in CR2 and the access in its error code."""
    error, address, code = FAULTING[name]
    pages = enable_paging({0x40000: 0, 0x41000: 0x41005, 0x42000: 0x42003})
    made = run(f"{PAGING_ON}\n{_in_ring(3, code)}", memory=pages, limit=60)
    assert made.vector == Vector.PF
    assert (made.reg("cr2"), made.stack(1)) == (address, [error])


@pytest.mark.parametrize("mode", MODE_NAMES)
def test_flags_survive_leaving_the_engine(mode: str) -> None:
    """However the engine is left between two instructions, the flags, lazy or not, are the next one's."""
    for first in (
        "cmp eax, 1",
        "add al, 0x7F\n add al, 1",
        "xor ebx, ebx",
        "std",
        "stc",
        "shl eax, 1",
        "dec edi",
    ):
        program = f"mov eax, 0x80000000\n {first}\n lahf\n mov ecx, eax\n pushfd\n pop edx\n cld\n hlt"
        once, stepped = run(program, mode), lab(program, mode)
        while stepped.run(stepped.retired + 1).kind == "budget":
            pass
        assert stepped.registers == once.registers, first


@pytest.mark.parametrize("mode", MODE_NAMES)
def test_what_the_host_writes_is_what_runs(mode: str) -> None:
    """After the host has changed code that has been executed, the new code is executed."""
    made = lab("there:  mov eax, 1\n nop\n jmp there", mode)
    made.run(4)
    assert made.reg("eax") == 1
    made.machine.memory.write(CODE + 1, 1, 2)
    made.run(8)
    assert made.reg("eax") == 2
    made.machine.memory.load(CODE, b"\xb8\x03\0\0\0")
    made.run(12)
    assert made.reg("eax") == 3


def test_machines_do_not_disturb_each_other() -> None:
    """Two machines run in turn as each would alone."""
    program = "again:  add eax, 3\n imul ebx, eax, 5\n mov [DATA], ebx\n jmp again"
    alone = run(program, limit=1000)
    first, second = lab(program), lab(program)
    for total in range(10, 1001, 10):
        first.run(total)
        second.run(total)
    assert first.everything() == second.everything() == alone.everything()


# Nothing that a guest does ends the process


@pytest.mark.parametrize("mode", MODE_NAMES)
@pytest.mark.parametrize("kind", range(16))
def test_no_task_register_ends_the_process(kind: int, mode: str) -> None:
    """An inner-ring transfer after LTR of any type of descriptor is served, or a fault of the guest's."""
    odd = Descriptor.segment(0x4000, 0x67, 0x80 | kind, 0)
    inward = Descriptor.gate(KERNEL_CODE, 0x7000, SystemType.CALL_GATE32, 3)
    made = lab(
        f"mov eax, {FREE + 8}\n ltr ax\n to_user\n call {FREE | 3}:0\n int 0x40",
        mode,
        gdt={FREE: inward, FREE + 8: odd},
        memory=[(0x7000, b"\xcb")],
    )
    expected = "triple-fault" if kind == 1 else "budget"  # a 16-bit TSS has other fields where the stacks are
    assert made.run(60).kind == expected
    if kind != 1:
        assert made.vector == (0x40 if kind == 9 else Vector.GP)


# The layout


_VERIFIED = (
    "REGS", "EIP", "EFLAGS", "CC_SRC", "CC_OP", "DF", "HFLAGS", "SEGMENTS", "SEGMENT_STRIDE", "BASE", "LIMIT",
    "FLAGS", "CR0", "CR2", "CR3", "CR4", "EFER", "SYSENTER_CS", "SYSENTER_ESP", "SYSENTER_EIP", "ERROR_CODE",
    "EXCEPTION_IS_INT", "NEXT_EIP", "DR0", "DR6", "DR7", "OLD_EXCEPTION", "INVALID_ADDRESS", "SIZE", "HEADER",
    "CC_OP_EFLAGS", "HF_OSFXSR",
)  # fmt: skip


@pytest.mark.parametrize("name", _VERIFIED)
def test_another_layout_is_an_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the library kept a register elsewhere than expected, making a machine says so in one line."""
    monkeypatch.setattr(verify, "_verified", [])
    monkeypatch.setattr(at, name, getattr(at, name) + 4)
    with pytest.raises(EngineError, match=r"unicorn==2\.1\.4") as raised:
        Engine()
    assert "\n" not in str(raised.value)


def test_another_version_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another Unicorn than the pinned one is refused by its version, before anything else."""
    monkeypatch.setattr(unicorn, "__version__", "2.2.0")
    with pytest.raises(EngineError, match=r"unicorn 2\.2\.0 is installed: install unicorn==2\.1\.4"):
        Engine()


# The fallbacks

FALLBACKS = {"registers through a copy": {"live": False}, "no machine code": {"native_code": False}}


@functools.cache
def _image(expectation: int) -> Image:
    return load_image(
        EXPECTATIONS[expectation].path, memory=16 << 20, defines=EXPECTATIONS[expectation].defines
    )


def _run_guest(expectation: Expectation, mode: str, engine: Engine) -> tuple[object, ...]:
    console = bytearray()
    machine = Machine(16 << 20, engine=engine, console=console.extend)
    image = _image(EXPECTATIONS.index(expectation))
    for segment in image.segments:
        machine.memory.load(segment.address, segment.data)
    boot(machine, image.entry, image.registers)
    control = MODES[mode].attach(machine)
    machine.attach(control)
    machine.devices.uart.receive(expectation.input)
    outcome = machine.run(5_000_000)
    return outcome, bytes(console), machine.retired(), control.registers(), bytes(machine.memory.bytes)


@pytest.mark.parametrize("mode", MODE_NAMES)
@pytest.mark.parametrize("fallback", FALLBACKS)
@pytest.mark.parametrize("expectation", EXPECTATIONS, ids=str)
def test_a_guest_runs_the_same_without_the_fast_ways(
    expectation: Expectation, fallback: str, mode: str
) -> None:
    """Where the host allows no live registers or no machine code, every guest gives the same to the byte."""
    usual = _run_guest(expectation, mode, Engine())
    assert _run_guest(expectation, mode, Engine(**FALLBACKS[fallback])) == usual


@pytest.mark.parametrize("mode", MODE_NAMES)
@pytest.mark.parametrize("fallback", FALLBACKS)
@settings(deadline=None, max_examples=50, suppress_health_check=list(HealthCheck))
@given(program=programs())
def test_a_random_program_runs_the_same_without_the_fast_ways(
    fallback: str, mode: str, program: Program
) -> None:
    """The same for random programs with a timer."""
    usual, other = program.lab(mode), program.lab(mode, Engine(**FALLBACKS[fallback]))
    assert usual.run(1500) == other.run(1500)
    assert other.everything() == usual.everything()


@pytest.mark.parametrize("fallback", FALLBACKS)
@settings(deadline=None, max_examples=50, suppress_health_check=list(HealthCheck))
@given(program=programs((*ATOMS, *["evict"] * 8), paged=True))
def test_demand_paging_is_the_same_without_the_fast_ways(fallback: str, program: Program) -> None:
    """The same with pages that come and go."""
    usual, other = program.lab(), program.lab(engine=Engine(**FALLBACKS[fallback]))
    assert usual.run(1500) == other.run(1500)
    assert other.everything() == usual.everything()


# What does not depend on time.
_TIMELESS = (
    *COMPUTE,
    "software",
    "single step",
    "stack segment",
    "segment",
    "string port",
    "fault",
    "interrupts",
)


@pytest.mark.parametrize("mode", MODE_NAMES)
@settings(deadline=None, max_examples=50, suppress_health_check=list(HealthCheck))
@given(program=st.one_of(programs((*_TIMELESS, *DESCRIPTORS)), programs(_TIMELESS, user=True)))
def test_a_program_runs_the_same_uncounted(mode: str, program: Program) -> None:
    """With the host clock and no bound, where nothing is counted, a guest that does not look at time is the same."""
    program = dataclasses.replace(program, period=0)
    counted, free = program.lab(mode), program.lab(mode, clock=HostClock())
    outcome = counted.run(1500)
    assume(outcome.kind == "halt")
    timer = threading.Timer(10, free.machine.poke, ("timeout",))
    timer.start()
    assert free.machine.run() == outcome
    timer.cancel()
    ours, theirs = free.everything(), counted.everything()
    for name in ("registers", "memory", "console"):
        assert ours[name] == theirs[name]
