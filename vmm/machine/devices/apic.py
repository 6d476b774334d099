"""The local APIC of a P6 processor: which of 240 vectors interrupts the CPU, and a timer.

As with the 8259A, a request is not a bit that somebody sets: it is worked out from IRR, ISR and the task priority
at each change, and what comes out is nothing but the level of the processor's interrupt pin. Beside its own vectors
stands the old controller's INTR, which comes in by LINT0: with that entry in ExtINT mode the APIC passes the pin on
and the vector is the 8259A's ("virtual wire").

There is one processor, so a message goes to itself or to nobody. What is not a vector goes nowhere: this machine
has no NMI, SMI, INIT or start-up. The TSC-deadline timer and x2APIC are later inventions and not there.

Registers are 32 bits wide, at each multiple of 16. A narrower store, or one elsewhere, is ignored and such a load
gives zero (the manual leaves both open); an access to a register that does not exist is noted in the error status
register.

Source: SDM volume 3A, chapter 10 (APIC), 10.4.8 and table 10-1 (registers), 10.5 (local interrupts), 10.8
(priorities).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from vmm.machine.devices.signals import Line
from vmm.machine.devices.timer import ApicTimer, TimerState

BASE = 0xFEE0_0000
BASE_MSR = 0x1B
BASE_ENABLE, BASE_BSP = 1 << 11, 1 << 8
_BASE_BITS = 0xF_FFFF_F000 | BASE_ENABLE  # what may be written, of 36 bits of address

ID, VERSION_REGISTER, TPR, APR, PPR, EOI, LDR, DFR, SVR = 0x20, 0x30, 0x80, 0x90, 0xA0, 0xB0, 0xD0, 0xE0, 0xF0
ISR, TMR, IRR, ESR, ICR_LOW, ICR_HIGH = 0x100, 0x180, 0x200, 0x280, 0x300, 0x310
LVT_TIMER, LVT_COUNTER, LVT_LINT0, LVT_LINT1, LVT_ERROR = 0x320, 0x340, 0x350, 0x360, 0x370
INITIAL_COUNT, CURRENT_COUNT, DIVIDE = 0x380, 0x390, 0x3E0

VERSION = 0x11 | 4 << 16  # integrated, five entries of the local vector table
ENABLE = 1 << 8  # in SVR
VECTOR, MODE, REMOTE_IRR, LEVEL, MASKED, PERIODIC = 0xFF, 7 << 8, 1 << 14, 1 << 15, 1 << 16, 1 << 17
FIXED, LOWEST, NMI, EXTINT = 0 << 8, 1 << 8, 4 << 8, 7 << 8
LOGICAL = 1 << 11  # the destination's kind, in ICR and redirection entries
_SELF, _ALL = 1, 2  # destination shorthands in ICR
# In the error status register.
SEND_ACCEPT, SEND_ILLEGAL, RECEIVE_ILLEGAL, ILLEGAL_REGISTER = 1 << 2, 1 << 5, 1 << 6, 1 << 7
LOWEST_VECTOR = 16

# What each entry of the local vector table lets be written.
_LVT_BITS = {
    LVT_TIMER: VECTOR | MASKED | PERIODIC,
    LVT_COUNTER: VECTOR | MODE | MASKED,
    LVT_LINT0: VECTOR | MODE | 1 << 13 | LEVEL | MASKED,
    LVT_LINT1: VECTOR | MODE | 1 << 13 | LEVEL | MASKED,
    LVT_ERROR: VECTOR | MASKED,
}
_ICR_BITS = VECTOR | MODE | LOGICAL | 1 << 14 | LEVEL | 3 << 18
_WIDE = 0xFFFF_FFFF


def page_of(base: int) -> int:
    """The physical page that IA32_APIC_BASE names, 0 for none: it is off, or where no address line goes."""
    return base & 0xFFFF_F000 if base & BASE_ENABLE and base < 1 << 32 else 0


@dataclass
class ApicState:
    """The registers. Bit n of `irr`, `isr` and `tmr` is vector n; `extint` is INTR, and `pin` the output."""

    id: int = 0
    base: int = BASE | BASE_ENABLE | BASE_BSP
    tpr: int = 0
    ldr: int = 0
    dfr: int = _WIDE
    svr: int = 0xFF
    irr: int = 0
    isr: int = 0
    tmr: int = 0
    esr: int = 0
    errors: int = 0  # since ESR was last written
    icr: int = 0
    destination: int = 0
    lvt: dict[int, int] = field(default_factory=lambda: dict.fromkeys(_LVT_BITS, MASKED))
    timer: TimerState = field(default_factory=TimerState)
    extint: bool = False
    redirected: bool = False  # INTR as an IO-APIC's ExtINT entry passes it on
    pin: bool = False


class LocalApic:
    """The memory device of its page. `output` is the processor's interrupt pin, called when its level changes.

    `acknowledge_extint` is the old controller's INTA cycle; `on_eoi` hears of the end of a level-triggered vector.
    `moved` is called with the new address of the page, 0 for none, when the guest changes it.
    """

    def __init__(
        self,
        output: Line,
        now: Callable[[], int],
        acknowledge_extint: Callable[[], int],
        moved: Callable[[int], None] = lambda _page: None,
    ) -> None:
        self._output, self._acknowledge_extint, self._moved = output, acknowledge_extint, moved
        self.on_eoi: Callable[[int], None] = lambda _vector: None
        # For who ends interrupts in another way: before anything is looked at or changed; after a vector was taken.
        self.look: Callable[[], None] = lambda: None
        self.taken: Callable[[], None] = lambda: None
        self._now = now
        self.restore(ApicState())

    def restore(self, state: ApicState) -> None:
        """Go on from there; the page, if it is elsewhere, has to be moved by whoever does this (`page_of`)."""
        self.state = state
        self.timer = ApicTimer(state.timer, self._now)

    def wire(self) -> None:
        """As a PC's firmware leaves it: on, INTR let through, NMI on LINT1."""
        state = self.state
        state.svr = ENABLE | 0x0F
        state.lvt[LVT_LINT0], state.lvt[LVT_LINT1] = EXTINT, NMI
        self._update()

    # Lines and messages

    def set_extint(self, level: bool) -> None:
        """LINT0, which is the 8259A's INTR."""
        self.look()
        state = self.state
        rose, state.extint = level and not state.extint, level
        self._local_line(rose)
        self._update()

    def set_redirected(self, level: bool) -> None:
        """The same INTR by way of an IO-APIC."""
        self.look()
        self.state.redirected = level
        self._update()

    def _local_line(self, rose: bool) -> None:
        """LINT0 in fixed mode: by its edge, or by its level until the vector's end."""
        state = self.state
        entry = state.lvt[LVT_LINT0]
        if entry & MASKED or entry & MODE != FIXED:
            return
        if not entry & LEVEL:
            if rose:
                self.request(entry & VECTOR)
        elif state.extint and not entry & REMOTE_IRR:
            state.lvt[LVT_LINT0] |= REMOTE_IRR
            self.request(entry & VECTOR, level=True)

    def request(self, vector: int, level: bool = False) -> None:
        """A vector arrives. Below 16 it is an error, and while the APIC is off it is lost."""
        self.look()
        state = self.state
        if not state.svr & ENABLE or not state.base & BASE_ENABLE:
            return
        if vector < LOWEST_VECTOR:
            self._error(RECEIVE_ILLEGAL)
            return
        bit = 1 << vector
        state.irr |= bit
        state.tmr = state.tmr | bit if level else state.tmr & ~bit
        self._update()

    def accepts(self, destination: int, logical: bool) -> bool:
        """Whether a message with this destination is for this APIC."""
        state = self.state
        if not logical:
            return destination in (state.id, 0xFF) or destination & 0xF == 0xF
        if destination == 0xFF:
            return True
        own = state.ldr >> 24
        if state.dfr >> 28 == 0xF:
            return bool(own & destination)
        return own >> 4 == destination >> 4 and bool(own & destination & 0xF)

    def _error(self, bit: int) -> None:
        state = self.state
        fresh = bit & ~state.errors
        state.errors |= bit
        entry = state.lvt[LVT_ERROR]
        if fresh and not entry & MASKED and entry & VECTOR >= LOWEST_VECTOR:
            self.request(entry & VECTOR)

    # The processor's side

    def _ready(self) -> int:
        """The vector that may interrupt now, or -1."""
        state = self.state
        highest = state.irr.bit_length() - 1
        return highest if highest >> 4 > self.priority() >> 4 else -1

    def priority(self) -> int:
        """The processor's priority (PPR)."""
        state = self.state
        serving = max(state.isr.bit_length() - 1, 0)
        return state.tpr if state.tpr >> 4 >= serving >> 4 else serving & 0xF0

    def _passes_extint(self) -> bool:
        state = self.state
        if not state.base & BASE_ENABLE:
            return state.extint
        entry = state.lvt[LVT_LINT0]
        direct = state.extint and not entry & MASKED and entry & MODE == EXTINT
        return direct or state.redirected and bool(state.svr & ENABLE)

    def _update(self) -> None:
        state = self.state
        enabled = state.svr & ENABLE and state.base & BASE_ENABLE
        pin = bool(enabled) and self._ready() >= 0 or self._passes_extint()
        if pin != state.pin:
            state.pin = pin
            self._output(pin)

    def acknowledge(self) -> int:
        """The processor takes the interrupt: its vector, 0..255. With nothing ready any more, the spurious one."""
        self.look()
        state = self.state
        vector = self._ready() if state.svr & ENABLE and state.base & BASE_ENABLE else -1
        if vector >= 0:
            state.irr &= ~(1 << vector)
            state.isr |= 1 << vector
            self._update()
            self.taken()
            return vector
        if self._passes_extint():
            return self._acknowledge_extint()
        return state.svr & VECTOR

    def ends_silently(self) -> bool:
        """Whether the end of what is being served would change nothing else: none waits, no line is looked at."""
        state = self.state
        vector = state.isr.bit_length() - 1
        return vector >= 0 and not state.irr and not state.tmr >> vector & 1

    def eoi(self) -> None:
        """The end of the interrupt that is being served, whoever says so."""
        state = self.state
        vector = state.isr.bit_length() - 1
        if vector < 0:
            return
        state.isr &= ~(1 << vector)
        if state.tmr >> vector & 1:
            if state.lvt[LVT_LINT0] & VECTOR == vector:
                state.lvt[LVT_LINT0] &= ~REMOTE_IRR
                self._local_line(False)
            self.on_eoi(vector)
        self._update()

    # Time

    def deadline(self) -> int | None:
        """See `signals.Timed`."""
        return None if self.state.lvt[LVT_TIMER] & MASKED else self.timer.deadline()

    def tick(self) -> None:
        if self.timer.expire():
            entry = self.state.lvt[LVT_TIMER]
            if not entry & MASKED:
                self.request(entry & VECTOR)

    # The address

    def read_base(self) -> int:
        return self.state.base

    def write_base(self, value: int) -> bool:
        """IA32_APIC_BASE; False for a value that the register does not take. Once off, only a reset puts it on."""
        self.look()
        state = self.state
        if value & ~(_BASE_BITS | BASE_BSP):
            return False
        was, value = state.base, value & _BASE_BITS | BASE_BSP
        if not was & BASE_ENABLE:
            value &= ~BASE_ENABLE
        state.base = value
        if page_of(was) != page_of(value):
            self._moved(page_of(value))
        self._update()
        return True

    # Registers

    def read(self, offset: int, size: int) -> int:
        if size != 4 or offset & 0xF:
            return 0
        self.look()
        self.tick()
        state = self.state
        bank, word = offset & 0xF80, (offset & 0x70) << 1
        if bank in _BANKS:
            return int(getattr(state, _BANKS[bank])) >> word & _WIDE
        if offset in state.lvt:
            return state.lvt[offset]
        reader = _READERS.get(offset)
        if reader is None:
            self._error(ILLEGAL_REGISTER)
            return 0
        return reader(self)

    def write(self, offset: int, size: int, value: int) -> None:
        if size != 4 or offset & 0xF:
            return
        self.look()
        self.tick()
        if offset in self.state.lvt:
            self._write_lvt(offset, value)
        elif offset in _WRITERS:
            _WRITERS[offset](self, value)
        elif offset not in _READERS and offset & 0xF80 not in _BANKS:
            self._error(ILLEGAL_REGISTER)
        self._update()

    def _write_lvt(self, offset: int, value: int) -> None:
        state = self.state
        value &= _LVT_BITS[offset]
        if not state.svr & ENABLE:
            value |= MASKED
        state.lvt[offset] = value | state.lvt[offset] & REMOTE_IRR
        if offset == LVT_TIMER:
            self.timer.set_periodic(bool(value & PERIODIC))
        elif offset == LVT_LINT0:
            self._local_line(False)

    def _write_svr(self, value: int) -> None:
        state = self.state
        state.svr = value & 0x3FF
        if not value & ENABLE:
            for offset in state.lvt:
                state.lvt[offset] |= MASKED

    def _write_esr(self, _value: int) -> None:
        """What has been noted becomes what is read."""
        self.state.esr, self.state.errors = self.state.errors, 0

    def _send(self, value: int) -> None:
        """The interrupt command register: a message, to itself or to nobody."""
        state = self.state
        state.icr = value & _ICR_BITS
        mode, vector, shorthand = value & MODE, value & VECTOR, value >> 18 & 3
        if mode not in (FIXED, LOWEST):
            return
        if vector < LOWEST_VECTOR:
            self._error(SEND_ILLEGAL)
            return
        reached = shorthand in (_SELF, _ALL)
        if not shorthand:
            reached = self.accepts(state.destination >> 24, bool(value & LOGICAL))
        if reached:
            self.request(vector)
        else:
            self._error(SEND_ACCEPT)

    def _set(self, name: str, value: int) -> None:
        setattr(self.state, name, value)


_BANKS = {ISR: "isr", TMR: "tmr", IRR: "irr"}
_READERS: dict[int, Callable[[LocalApic], int]] = {
    ID: lambda a: a.state.id << 24,
    VERSION_REGISTER: lambda _a: VERSION,
    TPR: lambda a: a.state.tpr,
    APR: lambda a: a.priority(),  # without rivals on the bus
    PPR: lambda a: a.priority(),
    EOI: lambda _a: 0,
    LDR: lambda a: a.state.ldr,
    DFR: lambda a: a.state.dfr,
    SVR: lambda a: a.state.svr,
    ESR: lambda a: a.state.esr,
    ICR_LOW: lambda a: a.state.icr,
    ICR_HIGH: lambda a: a.state.destination,
    INITIAL_COUNT: lambda a: a.state.timer.initial,
    CURRENT_COUNT: lambda a: a.timer.current(),
    DIVIDE: lambda a: a.state.timer.divide,
}
_WRITERS: dict[int, Callable[[LocalApic, int], None]] = {
    ID: lambda a, v: a._set("id", v >> 24 & 0xF),
    TPR: lambda a, v: a._set("tpr", v & 0xFF),
    EOI: lambda a, _v: a.eoi(),
    LDR: lambda a, v: a._set("ldr", v & 0xFF00_0000),
    DFR: lambda a, v: a._set("dfr", v | 0x0FFF_FFFF),
    SVR: LocalApic._write_svr,
    ESR: LocalApic._write_esr,
    ICR_LOW: LocalApic._send,
    ICR_HIGH: lambda a, v: a._set("destination", v & 0xFF00_0000),
    INITIAL_COUNT: lambda a, v: a.timer.start(v),
    DIVIDE: lambda a, v: a.timer.set_divide(v & 0xB),
}
