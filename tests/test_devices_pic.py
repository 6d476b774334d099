"""The interrupt controllers, against the data sheet and a second model that keeps lists, not masks."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.machine.devices.pic import PicPair


@dataclass
class Wire:
    """INTR, as a CPU would see it."""

    level: bool = False
    moves: int = 0

    def __call__(self, level: bool) -> None:
        assert level != self.level, "INTR is reported when it changes, and only then"
        self.level = level
        self.moves += 1


def pair(icw1: int = 0x11, icw4: int = 0x01) -> PicPair:
    """A pair as an operating system sets it up: vectors 0x20 and 0x28, nothing masked."""
    pic = PicPair(Wire())
    initialize(pic, icw1, icw4, icw4)
    return pic


def initialize(pic: PicPair, icw1: int, master_icw4: int, slave_icw4: int) -> None:
    for ports, words in ((pic.master, (0x20, 4, master_icw4)), (pic.slave, (0x28, 2, slave_icw4))):
        ports.write(0, 1, icw1)
        for word in words:
            ports.write(1, 1, word)


def registers(pic: PicPair) -> list[tuple[int, int]]:
    """(IRR, ISR) of master and slave, read as a guest reads them."""
    found = []
    for ports in (pic.master, pic.slave):
        ports.write(0, 1, 0x0A)
        irr = ports.read(0, 1)
        ports.write(0, 1, 0x0B)
        found.append((irr, ports.read(0, 1)))
    return found


def test_an_interrupt_from_request_to_eoi() -> None:
    """A raised line interrupts, is in service after INTA, and asks again only after EOI and a new edge."""
    pic = pair()
    pic.set_irq(3, True)
    assert pic.pending() and registers(pic)[0] == (8, 0)
    assert pic.acknowledge() == 0x23
    assert not pic.pending() and registers(pic)[0] == (0, 8)
    pic.set_irq(3, False)
    pic.set_irq(3, True)
    assert not pic.pending(), "in service"
    pic.master.write(0, 1, 0x20)
    assert pic.pending() and pic.acknowledge() == 0x23
    pic.master.write(0, 1, 0x63)
    assert not pic.pending(), "the line is still up, but that edge is served"


def test_the_slave_interrupts_through_irq_2() -> None:
    """A slave's line gives the slave's vector, and leaves IRQ2 in service in the master."""
    pic = pair()
    pic.line(12)(True)
    assert pic.acknowledge() == 0x2C
    assert registers(pic) == [(0, 4), (0, 0x10)]
    pic.slave.write(0, 1, 0x20)
    pic.master.write(0, 1, 0x20)
    assert registers(pic) == [(0, 0), (0, 0)]


@pytest.mark.parametrize("line", (-1, 2, 16))
def test_there_is_no_such_line(line: int) -> None:
    """IRQ2 is the cascade; it and lines beyond 15 cannot be driven, and the error says so."""
    with pytest.raises(ValueError, match=f"IRQ {line} "):
        pair().set_irq(line, True)


def test_lower_lines_go_first_and_nest() -> None:
    """IRQ0 before IRQ1 before 8..15 before 3..7; a higher one interrupts service, a lower one waits."""
    pic = pair()
    for line in (7, 3, 15, 8, 1, 0):
        pic.set_irq(line, True)
    served = []
    while pic.pending():
        vector = pic.acknowledge()
        served.append(vector - 0x20)
        assert not pic.pending(), "all others are lower"
        if vector >= 0x28:
            pic.slave.write(0, 1, 0x20)
        pic.master.write(0, 1, 0x20)
    assert served == [0, 1, 8, 15, 3, 7]
    pic.set_irq(6, True)
    assert pic.acknowledge() == 0x26
    pic.set_irq(5, True)
    assert pic.acknowledge() == 0x25
    pic.master.write(0, 1, 0x20)
    assert registers(pic)[0][1] == 1 << 6, "a non-specific EOI ends the highest in service"


def test_masked_lines_wait() -> None:
    """A masked request shows in IRR, does not interrupt, and does so once unmasked."""
    pic = pair()
    pic.master.write(1, 1, 0x10)
    assert pic.master.read(1, 1) == 0x10
    pic.set_irq(4, True)
    assert not pic.pending() and registers(pic)[0] == (0x10, 0)
    pic.master.write(1, 1, 0)
    assert pic.acknowledge() == 0x24


def test_an_edge_that_falls_is_withdrawn() -> None:
    """A line that drops before INTA asks for nothing any more, through the cascade as well."""
    pic = pair()
    for line in (5, 13):
        pic.set_irq(line, True)
        assert pic.pending()
        pic.set_irq(line, False)
        assert not pic.pending()
    assert registers(pic) == [(0, 0), (0, 0)]


def test_spurious_irq_7() -> None:
    """INTA with nothing pending gives the master's level 7 and puts nothing in service."""
    pic = pair()
    pic.set_irq(5, True)
    pic.set_irq(5, False)
    assert pic.acknowledge() == 0x27
    assert registers(pic) == [(0, 0), (0, 0)]


def test_spurious_irq_15() -> None:
    """A slave's request lost between the two chips' INTA gives its level 7: only the master needs an EOI."""
    pic = pair()
    pic.set_irq(10, True)
    pic.state.slave.imr = 0xFF  # lost too late for the master to see INT drop
    assert pic.acknowledge() == 0x2F
    assert registers(pic) == [(0, 4), (4, 0)]


def test_level_triggered_lines_ask_until_they_drop() -> None:
    """A line set to level in ELCR asks again after EOI while it is up, without a new edge."""
    pic = pair()
    pic.elcr.write(1, 1, 0x0C)
    pic.set_irq(11, True)
    for _ in range(3):
        assert pic.acknowledge() == 0x2B
        assert not pic.pending()
        pic.slave.write(0, 1, 0x20)
        pic.master.write(0, 1, 0x20)
        assert pic.pending()
    pic.set_irq(11, False)
    assert not pic.pending()


def test_elcr_keeps_the_system_lines_on_edges() -> None:
    """IRQ 0, 1, 2, 8 and 13 cannot be made level-triggered."""
    pic = pair()
    for offset in (0, 1):
        pic.elcr.write(offset, 1, 0xFF)
    assert (pic.elcr.read(0, 1), pic.elcr.read(1, 1)) == (0xF8, 0xDE)


def test_automatic_eoi() -> None:
    """With AEOI nothing stays in service; with rotation the level served becomes the last."""
    pic = pair(icw4=0x03)
    for line in (3, 4):
        pic.set_irq(line, True)
    assert [pic.acknowledge(), pic.acknowledge()] == [0x23, 0x24]
    assert registers(pic)[0] == (0, 0)
    for line in (3, 4):
        pic.set_irq(line, False)
        pic.set_irq(line, True)
    pic.master.write(0, 1, 0x80)
    assert pic.acknowledge() == 0x23
    pic.set_irq(3, False)
    pic.set_irq(3, True)
    assert [pic.acknowledge(), pic.acknowledge()] == [0x24, 0x23]


def test_automatic_eoi_of_a_busy_slave() -> None:
    """Every one of several slave requests reaches the CPU when both chips end interrupts by themselves."""
    pic = pair(icw4=0x03)
    for line in (8, 9, 15):
        pic.set_irq(line, True)
    assert [pic.acknowledge() for _ in range(3)] == [0x28, 0x29, 0x2F]
    assert not pic.pending()


def test_rotation() -> None:
    """Rotate on EOI makes the level served the last; set priority makes the named level the last."""
    pic = pair()
    pic.set_irq(4, True)
    assert pic.acknowledge() == 0x24
    pic.master.write(0, 1, 0xA0)
    for line in (0, 5):
        pic.set_irq(line, True)
    assert pic.acknowledge() == 0x25, "5 is first after 4"
    pic.master.write(0, 1, 0xE0 | 5)
    pic.master.write(0, 1, 0xC0 | 7)
    assert pic.acknowledge() == 0x20


def test_special_mask_mode() -> None:
    """In special mask mode a masked level in service holds no lower one back; only EOI by name ends it."""
    pic = pair()
    pic.set_irq(1, True)
    assert pic.acknowledge() == 0x21
    pic.set_irq(6, True)
    pic.master.write(1, 1, 0x02)
    assert not pic.pending()
    pic.master.write(0, 1, 0x68)
    assert pic.acknowledge() == 0x26
    pic.master.write(0, 1, 0x20)
    assert registers(pic)[0][1] == 0x02
    pic.master.write(0, 1, 0x61)
    assert registers(pic)[0][1] == 0


def test_special_fully_nested_mode() -> None:
    """With SFNM the slave's higher line interrupts its lower one's service; the master's lower lines wait."""
    pic = pair(icw4=0x11)
    pic.set_irq(12, True)
    assert pic.acknowledge() == 0x2C
    pic.set_irq(5, True)
    pic.set_irq(13, True)
    assert not pic.pending()
    pic.set_irq(9, True)
    assert pic.pending() and pic.acknowledge() == 0x29
    assert registers(pic) == [(0x20, 4), (0x20, 0x12)]


def test_poll() -> None:
    """After the poll command the next read is an INTA: the level and bit 7, and that level is in service."""
    pic = pair()
    pic.master.write(0, 1, 0x0C)
    assert pic.master.read(0, 1) == 0
    pic.set_irq(6, True)
    pic.master.write(0, 1, 0x0C)
    assert pic.master.read(0, 1) == 0x86
    assert not pic.pending() and registers(pic)[0] == (0, 0x40)


def test_initialization_wants_new_edges() -> None:
    """ICW1 forgets requests, service, mask and modes; a line that is up must fall before it can ask again."""
    pic = pair()
    pic.set_irq(3, True)
    pic.set_irq(5, True)
    pic.acknowledge()
    pic.master.write(1, 1, 0xFF)
    initialize(pic, 0x11, 1, 1)
    assert pic.master.read(1, 1) == 0 and not pic.pending()
    assert registers(pic)[0] == (0, 0)
    pic.set_irq(3, True)
    assert not pic.pending()
    pic.set_irq(3, False)
    pic.set_irq(3, True)
    assert pic.acknowledge() == 0x23


@pytest.mark.parametrize(("icw1", "words"), ((0x13, 2), (0x12, 1), (0x10, 2), (0x11, 3)))
def test_the_sequence_of_icws(icw1: int, words: int) -> None:
    """ICW1 says whether ICW3 and ICW4 follow; after the last one the data port is the mask."""
    pic = pair()
    pic.master.write(0, 1, icw1)
    for word in (0x40, 0x01, 0x01)[:words]:
        pic.master.write(1, 1, word)
    pic.master.write(1, 1, 0xAA)
    assert pic.master.read(1, 1) == 0xAA
    pic.set_irq(0, True)
    assert pic.acknowledge() == 0x40


def test_level_mode_by_icw1() -> None:
    """LTIM makes all of a chip's lines level-triggered."""
    pic = pair(icw1=0x19)
    pic.set_irq(0, True)
    pic.acknowledge()
    pic.master.write(0, 1, 0x20)
    assert pic.pending()


@dataclass
class Model:
    """One chip thought through again: a list of levels in priority order, and sets."""

    order: list[int] = field(default_factory=lambda: list(range(8)))
    up: set[int] = field(default_factory=set)
    caught: set[int] = field(default_factory=set)
    masked: set[int] = field(default_factory=set)
    serving: set[int] = field(default_factory=set)
    by_level: set[int] = field(default_factory=set)
    aeoi: bool = False
    rotate_aeoi: bool = False
    special: bool = False
    nested: bool = False
    cascade: int | None = None

    def requests(self) -> set[int]:
        return {n for n in self.up if n in self.by_level or n in self.caught}

    def drive(self, n: int, level: bool) -> None:
        if level and n not in self.up:
            self.up.add(n)
            self.caught.add(n)
        elif not level:
            self.up.discard(n)
            self.caught.discard(n)

    def best(self) -> int | None:
        """Walk down the order until a request, or a level in service that stops the walk."""
        for n in self.order:
            if n in self.serving and not (self.special and n in self.masked):
                again = self.nested and n == self.cascade and n in self.requests() - self.masked
                return n if again else None
            if n in self.requests() - self.masked:
                return n
        return None

    def last(self, n: int) -> None:
        while self.order[-1] != n:
            self.order.append(self.order.pop(0))

    def take(self) -> int:
        n = self.best()
        if n is None:
            return 7
        self.caught.discard(n)
        if not self.aeoi:
            self.serving.add(n)
        elif self.rotate_aeoi:
            self.last(n)
        return n

    def ocw2(self, value: int) -> None:
        what, n = value >> 5, value & 7
        if what in (1, 5):
            found = [m for m in self.order if m in self.serving and not (self.special and m in self.masked)]
            if found:
                self.serving.discard(found[0])
                if what == 5:
                    self.last(found[0])
        elif what in (3, 7):
            self.serving.discard(n)
            if what == 7:
                self.last(n)
        elif what == 6:
            self.last(n)
        elif what in (0, 4):
            self.rotate_aeoi = what == 4


@dataclass
class ModelPair:
    master: Model = field(default_factory=lambda: Model(cascade=2))
    slave: Model = field(default_factory=Model)

    def settle(self) -> bool:
        self.master.drive(2, self.slave.best() is not None)
        return self.master.best() is not None

    def take(self) -> int:
        n = self.master.take()
        if n != 2:
            return 0x20 + n
        vector = 0x28 + self.slave.take()
        self.master.drive(2, False)
        return vector


def bits(levels: set[int]) -> int:
    return sum(1 << n for n in levels)


chips = st.booleans()
steps = st.lists(
    st.one_of(
        st.tuples(st.just("line"), st.sampled_from([n for n in range(16) if n != 2]), st.booleans()),
        st.tuples(st.just("acknowledge"), st.just(0), st.just(0)),
        st.tuples(st.just("acknowledge"), st.just(0), st.just(0)),
        st.tuples(st.just("ocw2"), chips, st.integers(0, 7).flatmap(lambda n: st.just(n << 5 | n))),
        st.tuples(
            st.just("ocw2"), chips, st.builds(lambda r, n: r << 5 | n, st.integers(0, 7), st.integers(0, 7))
        ),
        st.tuples(st.just("mask"), chips, st.integers(0, 255)),
        st.tuples(st.just("special"), chips, st.booleans()),
        st.tuples(st.just("elcr"), chips, st.integers(0, 255)),
        st.tuples(st.just("poll"), chips, st.just(0)),
    ),
    max_size=60,
)


@settings(max_examples=400, deadline=None)
@given(steps=steps, icw4=st.tuples(*[st.sampled_from((0x01, 0x01, 0x03, 0x11))] * 2), cut=st.integers(0, 60))
def test_the_pair_is_its_model(steps: list[tuple[str, int, int]], icw4: tuple[int, int], cut: int) -> None:
    """In any history INTR, vectors, IRR and ISR are the model's, though saved and put back on the way."""
    pic, model = PicPair(Wire()), ModelPair()
    initialize(pic, 0x11, *icw4)
    for chip, word in zip((model.master, model.slave), icw4, strict=True):
        chip.aeoi, chip.nested = bool(word & 2), bool(word & 16)
    for number, (what, first, second) in enumerate(steps):
        if number == cut:
            saved, pic = copy.deepcopy(pic.state), PicPair(Wire(pic.pending()))
            pic.state = saved
        chip, ports = (model.slave, pic.slave) if first else (model.master, pic.master)
        if what == "line":
            (model.slave if first & 8 else model.master).drive(first & 7, bool(second))
            pic.set_irq(first, bool(second))
        elif what == "acknowledge":
            assert pic.acknowledge() == model.take()
        elif what == "ocw2":
            chip.ocw2(second)
            ports.write(0, 1, second)
        elif what == "mask":
            chip.masked = {n for n in range(8) if second >> n & 1}
            ports.write(1, 1, second)
        elif what == "special":
            chip.special = bool(second)
            ports.write(0, 1, 0x68 if second else 0x48)
        elif what == "elcr":
            chip.by_level = {n for n in range(8) if (second & (0xDE if first else 0xF8)) >> n & 1}
            pic.elcr.write(int(first), 1, second)
        elif what == "poll":
            ports.write(0, 1, 0x0C)
            best = chip.best()
            if best is not None:
                chip.take()
            assert ports.read(0, 1) == (0 if best is None else 0x80 | best)
        assert pic.pending() == model.settle()
        assert registers(pic) == [(bits(c.requests()), bits(c.serving)) for c in (model.master, model.slave)]


def test_power_on_and_reset() -> None:
    """Reset forgets everything but the levels of the lines, which are not the chip's."""
    pic = pair()
    pic.set_irq(4, True)
    pic.set_irq(12, True)
    pic.reset()
    assert not pic.pending()
    assert pic.state.master.lines == 0x10 and pic.state.slave.lines == 0x10
    assert registers(pic) == [(0, 0), (0, 0)]
