"""The 16550A serial port.

The hard part is that the interrupt line is one for four causes of which one, "transmitter empty", is
remembered rather than seen, and that an edge-triggered controller behind it must get an edge for each thing
that hardware would tell apart in time. Nothing takes time here: a byte written is sent at once, and input
is on an infinitely fast wire. So where the chip would drop its line for a moment, the line drops and rises:
when a byte is written while "transmitter empty" still asks, and when a read empties the receiver or takes
it below its trigger level.

Input waits in a queue of the host's, which has no bound, and moves in as the guest makes room, up to the
trigger level only; the rest of the FIFO fills by loopback alone. The four characters' silence after which
a FIFO below its trigger level asks for service has always just passed. Clearing the FIFO throws away
what came by loopback but puts bytes from the wire back into the queue, as if they had come a moment later:
a guest loses no input by setting up its port after the user has typed.

Not modelled: speed and framing, hence no parity or framing errors and no break; DMA mode.
Interrupts reach the line only while OUT2 is set, as PCs are wired, and not in loopback, where the chip
holds OUT2 inactive.

Source: National Semiconductor PC16550D data sheet, section 8.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from vmm.machine.devices.signals import Line, Sink

# Offsets. With DLAB set, 0 and 1 are the divisor's bytes.
DATA, IER, IIR_FCR, LCR, MCR, LSR, MSR, SCR = range(8)

IER_RECEIVED, IER_TRANSMIT, IER_LINE_STATUS, IER_MODEM = 1 << 0, 1 << 1, 1 << 2, 1 << 3
IIR_NONE, IIR_MODEM, IIR_TRANSMIT, IIR_RECEIVED, IIR_LINE_STATUS, IIR_TIMEOUT = 1, 0, 2, 4, 6, 0xC
IIR_FIFOS = 0xC0
FCR_ENABLE, FCR_CLEAR_RECEIVER, FCR_CLEAR_TRANSMITTER = 1 << 0, 1 << 1, 1 << 2
TRIGGERS = (1, 4, 8, 14)  # by FCR's upper two bits
LCR_DLAB = 1 << 7
MCR_DTR, MCR_RTS, MCR_OUT1, MCR_OUT2, MCR_LOOP = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 4
LSR_READY, LSR_OVERRUN, LSR_SENT = 1 << 0, 1 << 1, 3 << 5  # sent: the holding register and the shifter
MSR_CTS, MSR_DSR, MSR_RI, MSR_DCD = 1 << 4, 1 << 5, 1 << 6, 1 << 7
CONNECTED = MSR_CTS | MSR_DSR | MSR_DCD  # what the other end of the cable always says
LOOPED = ((MCR_RTS, MSR_CTS), (MCR_DTR, MSR_DSR), (MCR_OUT1, MSR_RI), (MCR_OUT2, MSR_DCD))

FIFO_DEPTH = 16
FROM_WIRE = 1 << 8  # marks a byte in the receiver that did not come by loopback


@dataclass
class UartState:
    ier: int = 0
    fcr: int = 0
    lcr: int = 0
    mcr: int = 0
    scr: int = 0
    divisor: int = 12  # 9600 baud
    overrun: bool = False
    transmit_asks: bool = False  # "transmitter empty" has not been taken note of
    modem: int = CONNECTED  # the modem inputs, in MSR's upper half
    deltas: int = 0  # which of them have changed, in MSR's lower half
    receiver: list[int] = field(default_factory=list)  # oldest first, each perhaps with FROM_WIRE
    last: int = 0  # what an empty receiver reads as
    queue: bytes = b""  # input of the host ...
    taken: int = 0  # ... of which so many bytes have moved in


class Uart:
    """A serial port: eight ports (COM1: 0x3F8), a line (COM1: IRQ4), and `sink` for what the guest sends."""

    def __init__(self, line: Line, sink: Sink) -> None:
        self._line, self._sink = line, sink
        self.state = UartState()
        self.on_arrival: Callable[[], None] = lambda: None  # for whoever reads it without a guest's driver

    def reset(self) -> None:
        """As at power-on, but for the host's input, which was never the device's."""
        state = self.state
        self._clear_receiver()
        self.state = UartState(queue=state.queue, taken=state.taken)
        self._fill()
        self._update()

    def receive(self, data: bytes) -> None:
        """Input from the host, of any length."""
        state = self.state
        state.queue, state.taken = state.queue[state.taken :] + data, 0
        self._fill()
        self._update()
        self.on_arrival()

    def backlog(self) -> int:
        """Bytes of the host's input that have not moved in."""
        return len(self.state.queue) - self.state.taken

    # The receiver

    def _fill(self) -> None:
        """Let the wire deliver."""
        state = self.state
        if state.mcr & MCR_LOOP:
            return
        room = min(self._trigger() - len(state.receiver), len(state.queue) - state.taken)
        if room > 0:
            start, state.taken = state.taken, state.taken + room
            state.receiver.extend(byte | FROM_WIRE for byte in state.queue[start : state.taken])

    def _trigger(self) -> int:
        """How many bytes the receiver holds before it asks; without FIFOs, one."""
        return TRIGGERS[self.state.fcr >> 6] if self.state.fcr & FCR_ENABLE else 1

    def _clear_receiver(self) -> None:
        state = self.state
        back = bytes(byte & 0xFF for byte in state.receiver if byte & FROM_WIRE)
        state.queue, state.taken = back + state.queue[state.taken :], 0
        state.receiver = []

    def _read_data(self) -> int:
        state = self.state
        if state.receiver:
            state.last = state.receiver.pop(0) & 0xFF
            if len(state.receiver) < self._trigger():
                # Here the chip's line would be down until the next byte, or the silence that stands for one.
                self._update(received=False)
                self._fill()
            self._update()
        return state.last

    def _loop_back(self, byte: int) -> None:
        state = self.state
        depth = FIFO_DEPTH if state.fcr & FCR_ENABLE else 1
        if len(state.receiver) < depth:
            state.receiver.append(byte)
            return
        state.overrun = True
        if depth == 1:
            state.receiver = [byte]  # without a FIFO the new byte overwrites; with one it is lost

    # The interrupt

    def _cause(self) -> int:
        """The cause of highest priority, as the low four bits of IIR."""
        state = self.state
        if state.ier & IER_LINE_STATUS and state.overrun:
            return IIR_LINE_STATUS
        if state.ier & IER_RECEIVED and state.receiver:
            return IIR_RECEIVED if len(state.receiver) >= self._trigger() else IIR_TIMEOUT
        if state.ier & IER_TRANSMIT and state.transmit_asks:
            return IIR_TRANSMIT
        if state.ier & IER_MODEM and state.deltas:
            return IIR_MODEM
        return IIR_NONE

    def _update(self, received: bool = True) -> None:
        """Drive the line; without `received`, the receiver's cause counts for nothing."""
        gate = self.state.mcr & (MCR_OUT2 | MCR_LOOP) == MCR_OUT2
        cause = self._cause()
        asks = cause != IIR_NONE and (received or cause not in (IIR_RECEIVED, IIR_TIMEOUT))
        self._line(gate and asks)

    # The bus

    def read(self, offset: int, size: int) -> int:
        state = self.state
        if offset == LSR:
            value = LSR_SENT | LSR_READY * bool(state.receiver) | LSR_OVERRUN * state.overrun
            if state.overrun:
                state.overrun = False
                self._update()
            return value
        if offset in (DATA, IER) and state.lcr & LCR_DLAB:
            return state.divisor >> 8 * offset & 0xFF
        if offset == DATA:
            return self._read_data()
        if offset == IIR_FCR:
            cause = self._cause()
            if cause == IIR_TRANSMIT:
                state.transmit_asks = False
                self._update()
            return cause | (IIR_FIFOS if state.fcr & FCR_ENABLE else 0)
        if offset == MSR:
            value = state.modem | state.deltas
            state.deltas = 0
            self._update()
            return value
        return {IER: state.ier, LCR: state.lcr, MCR: state.mcr, SCR: state.scr}[offset]

    def write(self, offset: int, size: int, value: int) -> None:
        state = self.state
        if offset in (DATA, IER) and state.lcr & LCR_DLAB:
            shift = 8 * offset
            state.divisor = state.divisor & ~(0xFF << shift) | value << shift
        elif offset == DATA:
            self._transmit(value)
        elif offset == IER:
            if value & ~state.ier & IER_TRANSMIT:
                state.transmit_asks = True  # the transmitter is empty, always
            state.ier = value & 0x0F
            self._update()
        elif offset == IIR_FCR:
            self._control_fifos(value)
        elif offset == LCR:
            state.lcr = value
        elif offset == MCR:
            state.mcr = value & 0x1F
            self._move_modem()
            self._fill()
            self._update()
        elif offset == SCR:
            state.scr = value

    def _transmit(self, byte: int) -> None:
        state = self.state
        if state.ier & IER_TRANSMIT and state.transmit_asks:
            state.transmit_asks = False
            self._update()
        if state.mcr & MCR_LOOP:
            self._loop_back(byte)
        else:
            self._sink(bytes((byte,)))
        state.transmit_asks = True
        if state.ier:
            self._update()

    def _control_fifos(self, fcr: int) -> None:
        """FCR: other bits count only together with the enable bit; a change of that clears the FIFOs."""
        state = self.state
        switched = (state.fcr ^ fcr) & FCR_ENABLE
        if not fcr & FCR_ENABLE:
            fcr = 0
        if switched or fcr & FCR_CLEAR_RECEIVER:
            self._clear_receiver()
        if switched or fcr & FCR_CLEAR_TRANSMITTER:
            state.transmit_asks = True  # emptied anew; the data sheet leaves it open, QEMU does so
        state.fcr = fcr
        self._fill()
        self._update()

    def _move_modem(self) -> None:
        """The modem inputs after a write to MCR: in loopback they are its outputs."""
        state = self.state
        now = CONNECTED
        if state.mcr & MCR_LOOP:
            now = sum(status for control, status in LOOPED if state.mcr & control)
        moved = now ^ state.modem
        # RI's bit tells of its end only, the other three of any change.
        state.deltas |= (moved & (MSR_CTS | MSR_DSR | MSR_DCD) | moved & state.modem & MSR_RI) >> 4
        state.modem = now
