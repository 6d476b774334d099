"""Two 8259A interrupt controllers in cascade: which of fifteen lines interrupts the CPU, and as which vector.

The hard part is that a request is not a bit that somebody sets. It is worked out anew, from the lines, the
edges caught, the mask, what is in service and who is first in the rotation, at each change; INTR is nothing
but its result. So a chip here is a handful of registers, `winner` is the one function of them that matters,
and the rest only edits registers.

As the data sheet has it, and unlike QEMU: an edge whose line falls again before the acknowledge is
withdrawn, so a device holds its line up until it is served; acknowledging nothing gives the chip's level 7
with nothing in service (the spurious IRQ7 and IRQ15); and in special fully nested mode the slave's level may
interrupt itself, while lower levels stay locked out.
As on PCs: the cascade is wired to IRQ2 whatever ICW3 says, and ICW4's MCS-80 and buffered modes are ignored.

Sources: Intel 8259A data sheet (231468); Intel 82371SB (PIIX3) data sheet for the ELCR.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vmm.machine.devices.signals import Line

CASCADE = 2
LINES = 16
# Timer, keyboard and cascade, and RTC and FPU, can be nothing but edge-triggered (PIIX3, ELCR1 and ELCR2).
ELCR_WRITABLE = (0xF8, 0xDE)

ICW1 = 1 << 4  # in a write to the command port: this is ICW1
ICW1_IC4, ICW1_SNGL, ICW1_LTIM = 1 << 0, 1 << 1, 1 << 3
ICW4_AEOI, ICW4_SFNM = 1 << 1, 1 << 4
OCW2_EOI, OCW2_SL, OCW2_R = 1 << 5, 1 << 6, 1 << 7
OCW3 = 1 << 3  # in a write to the command port without ICW1: this is OCW3
OCW3_RIS, OCW3_RR, OCW3_P, OCW3_SMM, OCW3_ESMM = 1 << 0, 1 << 1, 1 << 2, 1 << 5, 1 << 6
POLL_FOUND = 1 << 7


@dataclass
class Chip:
    """The registers of one 8259A, and what it does to them. Bit n of each mask is input IRn."""

    lines: int = 0  # the inputs' levels
    edges: int = 0  # rising edges caught and neither served nor withdrawn
    elcr: int = 0  # inputs that are level-triggered
    imr: int = 0
    isr: int = 0
    lowest: int = 7  # the level that is last in the rotation
    base: int = 0  # the vector of IR0 (ICW2)
    slaves: int = 0  # inputs that are another chip's INT: wired, so no reset changes it
    next_icw: int = 0  # the ICW that the data port expects; 0: it is the mask register
    wants_icw4: bool = False
    single: bool = False
    level_triggered: bool = False
    auto_eoi: bool = False
    rotate_on_auto_eoi: bool = False
    special_mask: bool = False
    special_fully_nested: bool = False
    read_isr: bool = False
    poll: bool = False

    @property
    def irr(self) -> int:
        """The interrupt request register: held levels, and edges that wait."""
        by_level = 0xFF if self.level_triggered else self.elcr
        return self.lines & by_level | self.edges & ~by_level

    def set_line(self, level: int, high: bool) -> None:
        bit = 1 << level
        if not high:
            self.lines &= ~bit
            self.edges &= ~bit
        elif not self.lines & bit:
            self.lines |= bit
            self.edges |= bit

    def first(self, mask: int) -> int:
        """The level of `mask` that has the highest priority; -1 if `mask` is empty."""
        if not mask:
            return -1
        top = self.lowest + 1
        rotated = (mask | mask << 8) >> top & 0xFF
        return ((rotated & -rotated).bit_length() - 1 + top) & 7

    def winner(self) -> int:
        """The level that INT asks service for, or -1."""
        request = self.first(self.irr & ~self.imr)
        if request < 0:
            return -1
        serving = self.first(self.isr & ~self.imr if self.special_mask else self.isr)
        if serving < 0:
            return request
        if request == serving:
            return request if self.special_fully_nested and self.slaves >> request & 1 else -1
        return request if self.first(1 << request | 1 << serving) == request else -1

    def acknowledge(self) -> int:
        """The INTA cycle, or a poll: the level served, which is 7 with nothing in service if none asks."""
        level = self.winner()
        if level < 0:
            return 7
        self.edges &= ~(1 << level)
        if not self.auto_eoi:
            self.isr |= 1 << level
        elif self.rotate_on_auto_eoi:
            self.lowest = level
        return level

    def command(self, value: int) -> None:
        """A write with A0 low: ICW1, OCW2 or OCW3."""
        if value & ICW1:
            self._initialize(value)
        elif value & OCW3:
            if value & OCW3_ESMM:
                self.special_mask = bool(value & OCW3_SMM)
            self.poll = bool(value & OCW3_P)
            if value & OCW3_RR:
                self.read_isr = bool(value & OCW3_RIS)
        else:
            self._end_of_interrupt(value)

    def _initialize(self, icw1: int) -> None:
        self.edges = 0  # an input that is high now must fall before it can ask again
        self.imr = self.isr = 0
        self.lowest = 7
        self.special_mask = self.read_isr = self.poll = False
        self.auto_eoi = self.rotate_on_auto_eoi = self.special_fully_nested = False
        self.wants_icw4 = bool(icw1 & ICW1_IC4)
        self.single = bool(icw1 & ICW1_SNGL)
        self.level_triggered = bool(icw1 & ICW1_LTIM)
        self.next_icw = 2

    def _end_of_interrupt(self, ocw2: int) -> None:
        rotate, specific, level = bool(ocw2 & OCW2_R), bool(ocw2 & OCW2_SL), ocw2 & 7
        if not ocw2 & OCW2_EOI:
            if not specific:
                self.rotate_on_auto_eoi = rotate
            elif rotate:
                self.lowest = level
            return
        if not specific:
            # A level whose service the special mask hides is not found by a non-specific EOI.
            level = self.first(self.isr & ~self.imr if self.special_mask else self.isr)
            if level < 0:
                return
        self.isr &= ~(1 << level)
        if rotate:
            self.lowest = level

    def data(self, value: int) -> None:
        """A write with A0 high: the next ICW, or OCW1."""
        if self.next_icw == 0:
            self.imr = value
            return
        if self.next_icw == 2:
            self.base = value & 0xF8
        elif self.next_icw == 4:
            self.auto_eoi = bool(value & ICW4_AEOI)
            self.special_fully_nested = bool(value & ICW4_SFNM)
        after_2 = 4 if self.single and self.wants_icw4 else 0 if self.single else 3
        self.next_icw = {2: after_2, 3: 4 if self.wants_icw4 else 0, 4: 0}[self.next_icw]

    def read(self, a0: int) -> int:
        """A read of the command port (0) or the data port (1)."""
        if self.poll:
            self.poll = False
            return POLL_FOUND | self.acknowledge() if self.winner() >= 0 else 0
        if a0:
            return self.imr
        return self.isr if self.read_isr else self.irr


@dataclass
class PicState:
    """`intr` is the level of the output."""

    master: Chip = field(default_factory=lambda: Chip(slaves=1 << CASCADE))
    slave: Chip = field(default_factory=Chip)
    intr: bool = False


class PicPair:
    """The PC's pair: lines 0..15 without 2 come in, INTR goes out to `output`, called when its level changes.

    `master`, `slave` and `elcr` are the port devices for 0x20, 0xA0 and 0x4D0, two ports each.
    """

    def __init__(self, output: Line) -> None:
        self._output = output
        self.state = PicState()
        self.master = _ChipPorts(self, slave=False)
        self.slave = _ChipPorts(self, slave=True)
        self.elcr = _ElcrPorts(self)

    def reset(self) -> None:
        """Registers as at power-on; the lines, which are others' outputs, stay as they are."""
        was, self.state = self.state, PicState(intr=self.state.intr)
        self.state.master.lines = was.master.lines & ~(1 << CASCADE)
        self.state.slave.lines = was.slave.lines
        self.update()

    def set_irq(self, line: int, level: bool) -> None:
        """Drive input `line`, 0..15 without 2, which is the slave's; ValueError for any other."""
        if not 0 <= line < LINES or line == CASCADE:
            raise ValueError(f"IRQ {line} is not an input of the PIC pair (0..15 without {CASCADE})")
        chip = self.state.slave if line & 8 else self.state.master
        if bool(chip.lines >> (line & 7) & 1) != level:
            chip.set_line(line & 7, level)
            self.update()

    def line(self, n: int) -> Line:
        """Input `n` as a line to hand to a device."""
        return lambda level: self.set_irq(n, level)

    def pending(self) -> bool:
        """The level of INTR."""
        return self.state.intr

    def acknowledge(self) -> int:
        """The CPU's INTA cycles: the vector, 0..255. With nothing pending, a spurious IRQ7 or IRQ15."""
        master, slave = self.state.master, self.state.slave
        level = master.acknowledge()
        # A spurious level 7 is never the cascade's, so `level` alone tells whose vector it is.
        if level != CASCADE:
            vector = master.base + level
        else:
            vector = slave.base + slave.acknowledge()
            # INT drops in INTA: if the slave has more to ask, the master sees a new edge.
            master.set_line(CASCADE, False)
        self.update()
        return vector

    def update(self) -> None:
        """Carry the slave's INT to the master and the master's to the CPU."""
        state = self.state
        state.master.set_line(CASCADE, state.slave.winner() >= 0)
        intr = state.master.winner() >= 0
        if intr != state.intr:
            state.intr = intr
            self._output(intr)


class _ChipPorts:
    def __init__(self, pair: PicPair, *, slave: bool) -> None:
        self._pair, self._slave = pair, slave

    def _chip(self) -> Chip:
        return self._pair.state.slave if self._slave else self._pair.state.master

    def read(self, offset: int, size: int) -> int:
        value = self._chip().read(offset)
        self._pair.update()
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        if offset:
            self._chip().data(value)
        else:
            self._chip().command(value)
        self._pair.update()


class _ElcrPorts:
    """The edge/level control registers, the master's and the slave's."""

    def __init__(self, pair: PicPair) -> None:
        self._pair = pair

    def read(self, offset: int, size: int) -> int:
        return self._pair.state.slave.elcr if offset else self._pair.state.master.elcr

    def write(self, offset: int, size: int, value: int) -> None:
        chip = self._pair.state.slave if offset else self._pair.state.master
        chip.elcr = value & ELCR_WRITABLE[offset]
        self._pair.update()
