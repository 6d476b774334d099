"""The IO-APIC: twenty-four pins, each with an entry that says which vector it is, and how it asks.

The hard part is the level-triggered pin, which must ask again for as long as it is held, but not before the
processor has ended the interrupt that it asked for: the entry's remote IRR bit remembers that, and the local APIC's
end of interrupt comes back here. An edge is seen only while its entry is not masked, as the data sheet has it
(others latch it).

All lines of a PC are high when asserted; an entry that calls its pin active low sees it the other way round.

Source: Intel 82093AA (IOAPIC) data sheet (290566).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vmm.machine.devices import apic
from vmm.machine.devices.apic import LocalApic
from vmm.machine.devices.signals import Line

BASE = 0xFEC0_0000
PINS = 24
SELECT, WINDOW = 0x00, 0x10
ID, VERSION_REGISTER, ARBITRATION, TABLE = 0x00, 0x01, 0x02, 0x10
VERSION = 0x11 | PINS - 1 << 16
ACTIVE_LOW = 1 << 13
# Of an entry's low word: all but delivery status and remote IRR.
_LOW_BITS = apic.VECTOR | apic.MODE | apic.LOGICAL | ACTIVE_LOW | apic.LEVEL | apic.MASKED
_WIDE = 0xFFFF_FFFF


@dataclass
class IoApicState:
    """`pins` has a bit for each line's level; `low` and `high` are the halves of the redirection table."""

    select: int = 0
    id: int = 0
    pins: int = 0
    low: list[int] = field(default_factory=lambda: [apic.MASKED] * PINS)
    high: list[int] = field(default_factory=lambda: [0] * PINS)


class IoApic:
    """The memory device of its page; messages go to `local`."""

    def __init__(self, local: LocalApic) -> None:
        self._local = local
        local.on_eoi = self.end
        self.state = IoApicState()

    def line(self, pin: int) -> Line:
        """A pin as a line to hand to a device."""
        return lambda level: self.set_pin(pin, level)

    def set_pin(self, pin: int, level: bool) -> None:
        state = self.state
        bit = 1 << pin
        if bool(state.pins & bit) != level:
            state.pins ^= bit
            self._look(pin, changed=True)

    def _asserted(self, pin: int) -> bool:
        return bool(self.state.pins >> pin & 1) != bool(self.state.low[pin] & ACTIVE_LOW)

    def _look(self, pin: int, changed: bool = False) -> None:
        """Send what this pin has to send; `changed` if its level has."""
        low, asserted = self.state.low[pin], self._asserted(pin)
        mode = low & apic.MODE
        if mode == apic.EXTINT:
            self._local.set_redirected(asserted and not low & apic.MASKED and self._reaches(pin))
            return
        if low & apic.MASKED or not asserted or mode not in (apic.FIXED, apic.LOWEST):
            return
        if not self._reaches(pin):
            return
        if not low & apic.LEVEL:
            if changed:
                self._local.request(low & apic.VECTOR)
        elif not low & apic.REMOTE_IRR:
            self.state.low[pin] |= apic.REMOTE_IRR
            self._local.request(low & apic.VECTOR, level=True)

    def _reaches(self, pin: int) -> bool:
        return self._local.accepts(self.state.high[pin] >> 24, bool(self.state.low[pin] & apic.LOGICAL))

    def end(self, vector: int) -> None:
        """The processor has ended a level-triggered interrupt: whose pin is still held asks again."""
        for pin in range(PINS):
            low = self.state.low[pin]
            if low & apic.REMOTE_IRR and low & apic.VECTOR == vector:
                self.state.low[pin] &= ~apic.REMOTE_IRR
                self._look(pin)

    # Registers

    def read(self, offset: int, size: int) -> int:
        if size != 4 or offset not in (SELECT, WINDOW):
            return 0
        state = self.state
        index = state.select
        if offset == SELECT:
            return index
        if index in (ID, ARBITRATION):
            return state.id << 24
        if index == VERSION_REGISTER:
            return VERSION
        pin = index - TABLE >> 1
        if not 0 <= pin < PINS:
            return 0
        return state.high[pin] if index & 1 else state.low[pin]

    def write(self, offset: int, size: int, value: int) -> None:
        if size != 4:
            return
        if offset == SELECT:
            self.state.select = value & 0xFF
        elif offset == WINDOW:
            self._write(self.state.select, value)

    def _write(self, index: int, value: int) -> None:
        state = self.state
        pin = index - TABLE >> 1
        if index == ID:
            state.id = value >> 24 & 0xF
        elif 0 <= pin < PINS and index & 1:
            state.high[pin] = value & 0xFF00_0000
        elif 0 <= pin < PINS:
            was = state.low[pin]
            state.low[pin] = value & _LOW_BITS | (was & apic.REMOTE_IRR if value & apic.LEVEL else 0)
            if was & apic.MODE == apic.EXTINT != value & apic.MODE:
                self._local.set_redirected(False)
            self._look(pin)
