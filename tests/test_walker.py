"""The machine code that walks page tables, against the same walk in Python; and when it must not answer."""

from __future__ import annotations

import ctypes
import functools
import mmap
import operator

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from vmm.machine.cpu import stub, walker
from vmm.machine.cpu.engine import FETCH, PROT_EXEC, PROT_READ, PROT_WRITE, READ, WRITE, Engine
from vmm.machine.cpu.verify import TlbEntry
from vmm.machine.cpu.walker import DROPPING, MIXED, NX, RW, SEALED, STORABLE, US, P, Walker

MANY = settings(deadline=None, max_examples=500, suppress_health_check=list(HealthCheck))
BASE = 0xE000_0000  # what the entries call the tables
FRAME = 0x0012_3000
HOOK = ctypes.CFUNCTYPE(
    ctypes.c_bool, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int, *([ctypes.c_void_p] * 2)
)


class Bench:
    """The hook's machine code, called from here; the callback behind it notes what comes through."""

    def __init__(self) -> None:
        self.walker = Walker()
        self._map = mmap.mmap(-1, 8 * 4096)
        self.tables = memoryview(self._map).cast("Q")
        self.host = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.walker.use(self.tables, self.host, BASE)
        self.registers = ctypes.c_uint32(0)
        self.collapsed = ctypes.c_uint32(0)
        self.walker.connect(ctypes.addressof(self.registers), ctypes.addressof(self.collapsed))
        self.missed: list[tuple[int, int, int, int]] = []
        self._miss = HOOK(self._on_miss)
        self._page = stub.CodePage()
        code = walker.fill_code(ctypes.cast(self._miss, ctypes.c_void_p).value or 0)
        self._hook = HOOK(self._page.add(code))

    def _on_miss(self, engine: int, address: int, access: int, entry: int, data: int) -> bool:
        self.missed.append((engine, address, access, data))
        return False

    def link(self, address: int, upper: int, leaf: int, top: int = 0, page: int = 1) -> None:
        """Tables at `page` and the one after it that lead to `leaf`."""
        self.tables[top + (address >> 30)] = BASE + page * 4096 | P
        self.tables[page * 512 + (address >> 21 & 511)] = BASE + (page + 1) * 4096 | upper
        self.tables[(page + 1) * 512 + (address >> 12 & 511)] = leaf

    def ask(self, address: int, access: int, ring: int) -> tuple[int, int] | None:
        self.registers.value = 0xFFFFFFFC & 0x00400050 | ring
        entry = TlbEntry()
        if not self._hook(0x1234, address, access, ctypes.addressof(entry), self.walker.address):
            assert self.missed.pop() == (0x1234, address, access, self.walker.address)
            return None
        return entry.paddr, entry.perms


_BITS = st.lists(st.sampled_from((P, P, P, RW, US, STORABLE, MIXED, NX, 1 << 5, 1 << 6))).map(
    lambda bits: functools.reduce(operator.or_, bits, 0)
)


@MANY
@given(
    st.integers(0, 0xFFFFF).map(lambda page: page << 12),
    st.sampled_from((READ, WRITE, FETCH)),
    st.integers(0, 3),
    _BITS,
    _BITS,
    st.booleans(),
    st.sampled_from(("none", "same", "own")),
    st.sampled_from((0, 0, 0, 0x1000, 0x40000000)),
)
@example(0xFFFFF000, WRITE, 1, P, P | STORABLE, True, "same", 0)
@example(0xFFC00000, FETCH, 1, P, P, False, "own", 0)
@example(0x40000000, FETCH, 3, P | US | RW, P | US | RW | MIXED, False, "own", 0)
def test_machine_code_and_python_walk_alike(
    address: int, access: int, ring: int, upper: int, leaf: int, everywhere: bool, fetch: str, off: int
) -> None:
    """For every entry, access, ring and root the code answers what `Walker.look` does, or asks Python."""
    bench = Bench()
    bench.link(address, upper, leaf | FRAME)
    bench.link(address, P, leaf | FRAME + 0x5000, 4, 3)
    bench.walker.let_supervisor_store(everywhere)
    bench.walker.set_roots(0, {"none": -1, "same": 0, "own": 4}[fetch])
    asked = (address ^ off) & 0xFFFFFFFF
    expected = bench.walker.look(asked, access, ring == 3)
    assert bench.ask(asked, access, ring) == expected
    assert bench.walker.hits == (expected is not None)


RIGHTS = (
    # upper, leaf, ring, access, WP clear: what is given
    (P | RW | US, P | RW | US, 3, WRITE, False, PROT_READ | PROT_WRITE),
    (P | RW | US, P | US, 3, WRITE, False, None),
    (P | US, P | RW | US, 3, WRITE, False, None),
    (P | RW | US, P | US, 3, READ, False, PROT_READ),
    (P | RW, P | RW | US, 3, READ, False, None),
    (P | RW | US, P | RW, 3, READ, False, None),
    (P | RW | US, P | RW, 1, READ, False, PROT_READ | PROT_WRITE),
    (P | US, P | US | STORABLE, 1, WRITE, False, None),
    (P | US, P | US | STORABLE, 1, WRITE, True, PROT_READ | PROT_WRITE),
    (P | US, P | US | STORABLE, 3, WRITE, True, None),
    (P | US, P | US, 1, WRITE, True, None),
    (P | US, P | US, 3, FETCH, False, PROT_READ | PROT_EXEC),
    (P | US, P | US | NX, 3, FETCH, False, None),
    (P | RW | US, P | RW | US | MIXED, 3, FETCH, False, PROT_READ | PROT_WRITE | PROT_EXEC),
    (P | RW, P | RW, 1, FETCH, False, PROT_READ | PROT_EXEC),
    (P, 0, 1, READ, False, None),
    (0, P, 1, READ, False, None),
)


@pytest.mark.parametrize(("upper", "leaf", "ring", "access", "everywhere", "perms"), RIGHTS)
def test_rights(upper: int, leaf: int, ring: int, access: int, everywhere: bool, perms: int | None) -> None:
    """Rights of both levels are combined, a supervisor stores by WP's rule, and code and data are kept apart."""
    bench = Bench()
    bench.link(0x1234_5000, upper, leaf | FRAME)
    bench.walker.let_supervisor_store(everywhere)
    bench.walker.set_roots(0, 0)
    assert bench.ask(0x1234_5000, access, ring) == (None if perms is None else (FRAME, perms))


def test_a_kernel_that_fetches_from_its_own_root_gets_the_right_to_fetch_only() -> None:
    """With a fetch root of its own ring 1 fetches there, and only there; ring 3 where it reads."""
    bench = Bench()
    bench.link(0x1000, P | US, P | US | FRAME)
    bench.link(0x2000, P, P | FRAME + 0x1000, 4, 3)
    bench.walker.set_roots(0, 4)
    assert bench.ask(0x1000, FETCH, 1) is None
    assert bench.ask(0x2000, FETCH, 1) == (FRAME + 0x1000, PROT_EXEC)
    assert bench.ask(0x2000, READ, 1) is None
    assert bench.ask(0x1000, FETCH, 3) == (FRAME, PROT_READ | PROT_EXEC)


def test_closed_it_answers_nothing() -> None:
    """While the engine drops code, is sealed or collapses, every question goes to Python; then it answers again."""
    bench = Bench()
    bench.link(0x1000, P | US, P | US | FRAME)
    bench.walker.set_roots(0, 0)
    for why in (DROPPING, SEALED):
        bench.walker.close(why)
        assert bench.ask(0x1000, READ, 3) is None
        bench.walker.close(DROPPING)
        bench.walker.open(DROPPING)
        assert (bench.ask(0x1000, READ, 3) is None) == (why == SEALED)
        bench.walker.open(why)
        assert bench.ask(0x1000, READ, 3) == (FRAME, PROT_READ)
    bench.collapsed.value = 1
    assert bench.ask(0x1000, READ, 3) is None


def test_an_engine_without_tables_asks_python() -> None:
    """Until somebody gives it tables the walker answers nothing."""
    engine = Engine()
    assert engine.walker.hits == 0
    assert engine.walker.look(0x1000, READ, False) is None
