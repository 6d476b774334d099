"""An IDE channel with one ATA disk, by programmed I/O.

The hard part is that the protocol is all in when DRQ and the interrupt come. A read interrupts when a block
waits in the buffer, and not when the last one has been taken; a write asks for its first block without an
interrupt, and interrupts when each has been written. Nothing takes time here, so BUSY is seen only while
the software reset is held. Where the drive would be busy for a moment, between two blocks, the line drops
and rises, and so does an edge-triggered controller's request.

The disk is device 0 and alone on its cable: it answers for device 1 as ATA has it, with status 0 and its own
registers, so that software finds nothing there at once.

A block is what is moved by one DRQ: one sector, or up to `multiple` of them. `DataPort` also moves a whole
block at a time (`bus.DataRegister`), because REP INSW is how every driver reads a sector.

Source: ATA/ATAPI-5 (T13/1321D): 7 (registers), 8 (commands), 9.5 to 9.7 (protocols), 9.16 (device 0 alone).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vmm.machine.devices.disk import SECTOR, Disk, DiskError
from vmm.machine.devices.identify import MOST_MULTIPLE, Geometry, identify, translated
from vmm.machine.devices.signals import Line

# Offsets in the command block, which begins after the data register.
ERROR_FEATURES, COUNT, LOW, MID, HIGH, DEVICE, STATUS_COMMAND = range(7)

BUSY, READY, SEEK_DONE, REQUEST, FAILED = 1 << 7, 1 << 6, 1 << 4, 1 << 3, 1 << 0  # status
IDLE = READY | SEEK_DONE
UNCORRECTABLE, WRITE_PROTECTED, NOT_FOUND, ABORTED = 1 << 6, 1 << 6, 1 << 4, 1 << 2  # error
DIAGNOSED = 1  # of the error register: device 0 has passed its test
LBA, SECOND_DEVICE, OBSOLETE = 1 << 6, 1 << 4, 0xA0  # device
RESET, NO_INTERRUPT = 1 << 2, 1 << 1  # device control

IDLE_TIMERS = (0xE0, 0xE1, 0xE2, 0xE3, 0xE6, 0x94, 0x95, 0x96, 0x97, 0x99)


@dataclass
class IdeState:
    """The registers as the host reads them, and the transfer under way."""

    error: int = DIAGNOSED
    features: int = 0
    count: int = 1
    low: int = 1
    mid: int = 0
    high: int = 0
    device: int = 0
    status: int = IDLE
    control: int = 0
    asks: bool = False  # INTRQ, but for nIEN
    buffer: bytes = b""
    position: int = 0  # of the next byte in the buffer
    writing: bool = False  # the buffer is filled by the host
    left: int = 0  # sectors after this block
    block: int = 0  # sectors in a block, of this command
    multiple: int = MOST_MULTIPLE  # sectors in a block, of the MULTIPLE commands, as firmware sets it; 0: none
    heads: int = 16  # of the geometry that the host has chosen
    track: int = 63
    write_cache: bool = True
    look_ahead: bool = True


class Ide:
    """A channel: seven ports (primary: 0x1F1), `data` (0x1F0), `control` (0x3F6), and a line (IRQ14)."""

    def __init__(self, line: Line, disk: Disk) -> None:
        self._line, self._disk = line, disk
        self.state = IdeState()
        self.data, self.control = DataPort(self), ControlPort(self)

    def reset(self) -> None:
        """As at power-on; the medium is as it was."""
        self.state = IdeState()
        self._update()

    # Registers

    def read(self, offset: int, size: int) -> int:
        state = self.state
        if offset == STATUS_COMMAND:
            if not self._second():
                state.asks = False
                self._update()
            return self.status()
        values = (state.error, state.count, state.low, state.mid, state.high, state.device | OBSOLETE)
        return values[offset]

    def status(self) -> int:
        """The alternate status: the same, and no interrupt is acknowledged by it."""
        return 0 if self._second() else self.state.status

    def write(self, offset: int, size: int, value: int) -> None:
        state = self.state
        if state.status & BUSY:
            return
        if offset == STATUS_COMMAND:
            if not self._second() or value == 0x90:
                self._command(value)
        elif not state.status & REQUEST:
            if offset == ERROR_FEATURES:
                state.features = value
            elif offset == DEVICE:
                state.device = value
                self._update()
            else:
                setattr(state, _REGISTERS[offset], value)

    def write_control(self, value: int) -> None:
        """Device control: a software reset lasts while its bit is set."""
        state = self.state
        was, state.control = state.control, value
        if value & RESET:
            self._stop()
            state.status, state.asks = BUSY, False
        elif was & RESET:
            self._sign()
        self._update()

    def _second(self) -> bool:
        """Whether device 1 is selected, which is not there."""
        return bool(self.state.device & SECOND_DEVICE)

    def _update(self) -> None:
        self._line(self.state.asks and not self.state.control & NO_INTERRUPT and not self._second())

    # How commands end

    def _stop(self) -> None:
        state = self.state
        state.buffer, state.position, state.left, state.writing = b"", 0, 0, False

    def _sign(self) -> None:
        """The registers by which an ATA disk is known after a reset or its diagnostic."""
        state = self.state
        state.error, state.count, state.low, state.mid, state.high = DIAGNOSED, 1, 1, 0, 0
        state.device, state.status = 0, IDLE

    def _interrupt(self) -> None:
        """INTRQ, once more if it is up already: the drive was busy in between."""
        self.state.asks = False
        self._update()
        self.state.asks = True
        self._update()

    def _done(self) -> None:
        self._stop()
        self.state.status = IDLE
        self._interrupt()

    def _fail(self, error: int) -> None:
        self._stop()
        self.state.error, self.state.status = error, IDLE | FAILED
        self._interrupt()

    # Commands

    def _command(self, command: int) -> None:
        state = self.state
        self._stop()
        state.error, state.asks = 0, False
        self._update()
        handler = COMMANDS.get(command)
        if handler is None:
            self._fail(ABORTED)
        else:
            handler(self)

    def geometry(self) -> Geometry:
        """As the host has chosen it."""
        return translated(self._disk.sectors, self.state.heads, self.state.track)

    def _address(self) -> int:
        """The number of the sector that the registers name; below 0 if there is none."""
        state = self.state
        head = state.device & 0x0F
        if state.device & LBA:
            return head << 24 | state.high << 16 | state.mid << 8 | state.low
        return self.geometry().number(state.high << 8 | state.mid, head, state.low)

    def _set_address(self, number: int) -> None:
        state = self.state
        if state.device & LBA:
            state.low, state.mid, state.high = number & 0xFF, number >> 8 & 0xFF, number >> 16 & 0xFF
            head = number >> 24
        else:
            cylinder, rest = divmod(number, state.heads * state.track)
            head, sector = divmod(rest, state.track)
            state.low, state.mid, state.high = sector + 1, cylinder & 0xFF, cylinder >> 8 & 0xFF
        state.device = state.device & 0xF0 | head & 0x0F

    def _here(self, sectors: int) -> int | None:
        """The address, if so many sectors are there; else the command has failed, at the first that is not."""
        address, last = self._address(), self._disk.sectors
        if 0 <= address <= last - sectors:
            return address
        if 0 <= address < last:
            self._advance(last - address)
        self._fail(NOT_FOUND)
        return None

    def _advance(self, sectors: int) -> None:
        """Let the registers tell of so many sectors done."""
        self._set_address(self._address() + sectors)
        self.state.count = self.state.count - sectors & 0xFF

    def _start(self, block: int, writing: bool) -> None:
        state = self.state
        state.left, state.block, state.writing = state.count or 256, block, writing
        if not writing:
            self._read_block()
        elif self._here(min(block, state.left)) is not None:
            self._ask_for_block()

    def _read_block(self) -> None:
        state = self.state
        sectors = min(state.block, state.left)
        address = self._here(sectors)
        if address is None:
            return
        try:
            state.buffer = self._disk.read(address, sectors)
        except DiskError:
            self._fail(UNCORRECTABLE)
            return
        state.position = 0
        state.left -= sectors
        state.status = IDLE | REQUEST
        if state.left:
            self._advance(sectors)
        else:
            state.count = 0  # the address stays that of the last block: there may be none after it
        self._interrupt()

    def _ask_for_block(self) -> None:
        state = self.state
        state.buffer, state.position = bytes(min(state.block, state.left) * SECTOR), 0
        state.status = IDLE | REQUEST

    def block_moved(self) -> None:
        """The host has moved the last byte of the block."""
        state = self.state
        if not state.writing:
            if state.left:
                self._read_block()
            else:
                self._stop()
                state.status = IDLE
            return
        sectors = len(state.buffer) // SECTOR
        address = self._here(sectors)
        if address is None:
            return
        try:
            self._disk.write(address, state.buffer)
        except DiskError:
            self._fail(UNCORRECTABLE if self._disk.writable else WRITE_PROTECTED | ABORTED)
            return
        state.left -= sectors
        if not state.left:
            state.count = 0
            self._done()
            return
        self._advance(sectors)
        if self._here(min(state.block, state.left)) is not None:
            self._ask_for_block()
            self._interrupt()

    def _read_sectors(self) -> None:
        self._start(1, False)

    def _write_sectors(self) -> None:
        self._start(1, True)

    def _read_multiple(self) -> None:
        if self.state.multiple:
            self._start(self.state.multiple, False)
        else:
            self._fail(ABORTED)

    def _write_multiple(self) -> None:
        if self.state.multiple:
            self._start(self.state.multiple, True)
        else:
            self._fail(ABORTED)

    def _verify(self) -> None:
        address = self._here(self.state.count or 256)
        if address is None:
            return
        try:
            self._disk.read(address, self.state.count or 256)
        except DiskError:
            self._fail(UNCORRECTABLE)
            return
        self._done()

    def _seek(self) -> None:
        if self._here(1) is not None:
            self._done()

    def _identify(self) -> None:
        state = self.state
        state.buffer = identify(
            self._disk.sectors, self.geometry(), state.multiple, state.write_cache, state.look_ahead
        )
        state.position, state.left = 0, 0
        state.status = IDLE | REQUEST
        self._interrupt()

    def _set_multiple(self) -> None:
        count = self.state.count
        if count & count - 1 or count > MOST_MULTIPLE:
            self.state.multiple = 0
            self._fail(ABORTED)
        else:
            self.state.multiple = count
            self._done()

    def _set_parameters(self) -> None:
        """INITIALIZE DEVICE PARAMETERS: heads and sectors a track of the geometry."""
        state = self.state
        if not state.count:
            self._fail(ABORTED)
            return
        state.heads, state.track = (state.device & 0x0F) + 1, state.count
        self._done()

    def _set_features(self) -> None:
        state = self.state
        match state.features:
            case 0x02 | 0x82:
                state.write_cache = state.features == 0x02
            case 0xAA | 0x55:
                state.look_ahead = state.features == 0xAA
            case 0x03 if state.count in (0, 1, *range(8, 13)):
                pass  # PIO, by default or up to mode 4: all as fast as the host
            case 0x66 | 0xCC:
                pass  # whether a software reset undoes settings: it never does
            case _:
                self._fail(ABORTED)
                return
        self._done()

    def _flush(self) -> None:
        try:
            self._disk.flush()
        except DiskError:
            self._fail(UNCORRECTABLE)
            return
        self._done()

    def _power(self) -> None:
        self.state.count = 0xFF  # active
        self._done()

    def _diagnose(self) -> None:
        self._sign()
        self._interrupt()


class DataPort:
    """The data register: as wide as the host likes, and, where the bus can, a block at a time."""

    def __init__(self, ide: Ide) -> None:
        self._ide = ide

    def read(self, offset: int, size: int) -> int:
        if self.room(False) < size:
            return 0
        return int.from_bytes(self.take(size), "little")

    def write(self, offset: int, size: int, value: int) -> None:
        if self.room(True) >= size:
            self.put(value.to_bytes(size, "little"))

    def room(self, writing: bool) -> int:
        """Bytes that can be moved in this direction before anything else happens."""
        state = self._ide.state
        if not state.status & REQUEST or state.writing is not writing:
            return 0
        return len(state.buffer) - state.position

    def take(self, length: int) -> bytes:
        state = self._ide.state
        start, state.position = state.position, state.position + length
        data = state.buffer[start : state.position]
        if state.position == len(state.buffer):
            self._ide.block_moved()
        return data

    def put(self, data: bytes) -> None:
        state = self._ide.state
        start, state.position = state.position, state.position + len(data)
        state.buffer = state.buffer[:start] + data + state.buffer[state.position :]
        if state.position == len(state.buffer):
            self._ide.block_moved()


class ControlPort:
    """One port: the alternate status when read, device control when written."""

    def __init__(self, ide: Ide) -> None:
        self._ide = ide

    def read(self, offset: int, size: int) -> int:
        return self._ide.status()

    def write(self, offset: int, size: int, value: int) -> None:
        self._ide.write_control(value)


_REGISTERS = {COUNT: "count", LOW: "low", MID: "mid", HIGH: "high"}

COMMANDS: dict[int, Callable[[Ide], None]] = {
    **dict.fromkeys(range(0x10, 0x20), Ide._done),  # RECALIBRATE
    **dict.fromkeys((0x20, 0x21), Ide._read_sectors),
    **dict.fromkeys((0x30, 0x31), Ide._write_sectors),
    **dict.fromkeys((0x40, 0x41), Ide._verify),
    **dict.fromkeys(range(0x70, 0x80), Ide._seek),
    0x90: Ide._diagnose,
    0x91: Ide._set_parameters,
    0xC4: Ide._read_multiple,
    0xC5: Ide._write_multiple,
    0xC6: Ide._set_multiple,
    **dict.fromkeys(IDLE_TIMERS, Ide._done),  # there is nothing that could spin down
    **dict.fromkeys((0x98, 0xE5), Ide._power),
    0xE7: Ide._flush,
    0xEC: Ide._identify,
    0xEF: Ide._set_features,
}
"""One row a command; any other is aborted."""
