"""The classification's claims, put to the real CPU with random operands."""

from __future__ import annotations

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vmm.census import visible
from vmm.isa.classification import TABLE
from vmm.isa.classify import Kind, classify
from vmm.isa.decode import decode
from vmm.isa.row import Row, Trap
from vmm.machine.experiments import CASES, TIGHT, Case
from vmm.machine.hostile import ABORTS
from vmm.machine.probe import CODE, DATA, End, Outcome, Probe, State

PROBE = Probe()

REGISTERS = st.tuples(
    *[st.one_of(st.integers(0, 0xFF), st.integers(DATA, DATA + 0xFFC), st.integers(0, 0xFFFFFFFF))] * 8
)
# Arithmetic flags, DF, NT and ID at will; IF and IOPL as a monitor keeps them.
FLAGS = st.lists(st.sampled_from([0x1, 0x4, 0x10, 0x40, 0x80, 0x400, 0x800, 0x200000]), max_size=8).map(
    lambda bits: sum(set(bits)) | TIGHT.flags
)

# Different every time by definition, in any ring.
RANDOM = ("RDRAND", "RDSEED")

PRIVILEGED = [
    (row, case)
    for row in TABLE
    if row.trap is Trap.ALWAYS
    and not (row.needs and row.name not in ("MONITOR", "MWAIT", "CLAC", "STAC", "XSETBV"))
    for case in CASES[row.name]
]


@given(st.sampled_from(PRIVILEGED), st.sampled_from([1, 3]), REGISTERS, FLAGS)
@settings(max_examples=400, deadline=None)
def test_privileged_means_a_fault_outside_ring_0(
    experiment: tuple[Row, Case], ring: int, registers: tuple[int, ...], flags: int
) -> None:
    """A privileged instruction raises #GP(0) outside ring 0, whatever the registers, and changes nothing."""
    row, case = experiment
    run = PROBE.run(case.code, ring, State(registers, flags, memory=case.memory, setup=TIGHT.setup))
    expected = 6 if row.name in ("MONITOR", "MWAIT", "CLAC", "STAC") else 13
    assert (run.end, run.vector, run.eip) == (End.FAULT, expected, CODE)
    assert run.error_code == 0 or expected == 6
    assert run.registers == registers and not run.memory and not run.changed


@given(st.sampled_from(["fa", "fb"]), st.sampled_from([1, 3]), st.integers(0, 3))
@settings(deadline=None)
def test_cli_and_sti_go_by_iopl(code: str, ring: int, iopl: int) -> None:
    """CLI and STI raise #GP(0) exactly when CPL is above IOPL."""
    run = PROBE.run(bytes.fromhex(code), ring, State(flags=2 | iopl << 12))
    assert (run.vector == 13) == (ring > iopl)


def _innocuous(code: bytes) -> bytes | None:
    """The instruction at the start of `code`, if it is innocuous and repeatable and the engine survives it."""
    classified = classify(code)
    instruction = decode(code)
    if instruction is None or classified.kind is not Kind.INNOCUOUS or ABORTS.search(instruction.bytes):
        return None
    return None if instruction.mnemonic in RANDOM else instruction.bytes


def _opcodes() -> st.SearchStrategy[bytes]:
    """Random code, two-byte opcodes as often as others, prefixes now and then."""
    prefixes = st.lists(st.sampled_from(b"\x26\x36\x64\x66\x67\xf0\xf2\xf3"), max_size=2).map(bytes)
    tail = st.binary(min_size=13, max_size=13)
    one = st.tuples(prefixes, st.just(b""), tail)
    two = st.tuples(prefixes, st.just(b"\x0f"), tail)
    return st.one_of(one, two).map(b"".join)


def _all_rings(code: bytes, state: State) -> list[Outcome]:
    return [PROBE.run(code, ring, state, limit=100) for ring in (0, 1, 3)]


@given(_opcodes(), REGISTERS, FLAGS)
@settings(max_examples=1500, deadline=None)
def test_an_innocuous_instruction_is_the_same_in_every_ring(
    code: bytes, registers: tuple[int, ...], flags: int
) -> None:
    """Any innocuous instruction does the same to registers, flags and memory in rings 0, 1 and 3."""
    instruction = _innocuous(code)
    assume(instruction is not None)
    assert instruction is not None
    inner, *outer = _all_rings(instruction, State(registers, flags, setup=TIGHT.setup))
    assert not inner.changed, "it changed what the monitor owns"
    for run in outer:
        assert visible(run) == visible(inner)


_FXSAVE = bytes.fromhex("0fae0500b00000")  # FXSAVE [B000h]: the x87, MMX and SSE registers, into memory
_BRANCHES = (
    0xC2,
    0xC3,
    0xE8,
    0xE9,
    0xEB,
    0xFF,
    *range(0x70, 0x80),
    *range(0xE0, 0xE4),
    *range(0x0F80, 0x0F90),
)


@given(st.lists(_opcodes(), min_size=4, max_size=12), REGISTERS, FLAGS)
@settings(max_examples=500, deadline=None)
def test_an_innocuous_block_is_the_same_in_every_ring(
    codes: list[bytes], registers: tuple[int, ...], flags: int
) -> None:
    """A straight-line run of innocuous instructions does the same in rings 0, 1 and 3, FPU and SSE included."""
    block = b""
    for code in codes:
        instruction = _innocuous(code)
        decoded = decode(code)
        if instruction and decoded and decoded.opcode not in _BRANCHES:
            block += instruction
    assume(block and not ABORTS.search(block))
    block += _FXSAVE
    inner, *outer = _all_rings(block, State(registers, flags, setup=TIGHT.setup))
    for run in outer:
        assert visible(run) == visible(inner)


@given(_opcodes(), REGISTERS)
@settings(max_examples=1000, deadline=None)
def test_the_decoder_knows_lengths_as_the_cpu_does(code: bytes, registers: tuple[int, ...]) -> None:
    """An instruction that completes and does not branch leaves EIP exactly its decoded length further on."""
    instruction = _innocuous(code)
    decoded = decode(code)
    assume(instruction is not None and decoded is not None and decoded.opcode not in _BRANCHES)
    assert instruction is not None
    run = PROBE.run(instruction, 0, State(registers))
    if run.end is End.DONE:
        assert run.eip == CODE + len(instruction)
