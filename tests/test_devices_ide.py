"""The ATA disk: each protocol's interrupts and status, its addresses, and a plain array of sectors as its model."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.machine.bus import PortBus
from vmm.machine.devices.disk import SECTOR, DiskError
from vmm.machine.devices.ide import Ide

DATA, ERROR, COUNT, LOW, MID, HIGH, DEVICE, STATUS = range(0x1F0, 0x1F8)
CONTROL = 0x3F6
BUSY, READY, REQUEST, FAILED = 0x80, 0x40, 0x08, 0x01
IDLE, WAITING = 0x50, 0x58
ABORTED, NOT_FOUND, UNCORRECTABLE = 0x04, 0x10, 0x40
READ, WRITE, VERIFY, READ_MULTIPLE, WRITE_MULTIPLE, SET_MULTIPLE = 0x20, 0x30, 0x40, 0xC4, 0xC5, 0xC6
IDENTIFY, SET_FEATURES, FLUSH, DIAGNOSE, SET_PARAMETERS, SEEK = 0xEC, 0xEF, 0xE7, 0x90, 0x91, 0x70
SECTORS = 3000  # two cylinders of 16 heads and 63 sectors, and a rest


@dataclass
class Medium:
    """A disk in memory, of which some sectors may be bad."""

    sectors: int = SECTORS
    writable: bool = True
    data: bytearray = field(default_factory=bytearray)
    bad: set[int] = field(default_factory=set)
    flushed: int = 0

    def __post_init__(self) -> None:
        self.data = bytearray(b"".join(content(n) for n in range(self.sectors)))

    def _check(self, sector: int, count: int) -> None:
        assert sector >= 0 and sector + count <= self.sectors, "the drive asks for what is there"
        if self.bad & set(range(sector, sector + count)):
            raise DiskError("bad")

    def read(self, sector: int, count: int) -> bytes:
        self._check(sector, count)
        return bytes(self.data[sector * SECTOR : (sector + count) * SECTOR])

    def write(self, sector: int, data: bytes) -> None:
        self._check(sector, len(data) // SECTOR)
        if not self.writable:
            raise DiskError("read only")
        self.data[sector * SECTOR : sector * SECTOR + len(data)] = data

    def flush(self) -> None:
        self._check(0, 1)
        self.flushed += 1


def content(sector: int) -> bytes:
    return (b"%8d" % sector) * (SECTOR // 8)


@dataclass
class Bench:
    medium: Medium
    bus: PortBus = field(default_factory=PortBus)
    level: bool = False
    rises: int = 0

    def __post_init__(self) -> None:
        self.ide = Ide(self._line, self.medium)
        self.bus.attach_data(DATA, self.ide.data, "data")
        self.bus.attach(DATA + 1, 7, self.ide, "disk")
        self.bus.attach(CONTROL, 1, self.ide.control, "control")

    def _line(self, level: bool) -> None:
        self.rises += level and not self.level
        self.level = level

    def out(self, port: int, value: int) -> None:
        self.bus.write(port, 1, value)

    def inp(self, port: int) -> int:
        return self.bus.read(port, 1)

    def command(self, command: int, sector: int = 0, count: int = 1, features: int = 0) -> int:
        """By LBA; the alternate status after it."""
        self.out(ERROR, features)
        self.out(COUNT, count & 0xFF)
        for port, shift in ((LOW, 0), (MID, 8), (HIGH, 16)):
            self.out(port, sector >> shift & 0xFF)
        self.out(DEVICE, 0xE0 | sector >> 24)
        self.out(STATUS, command)
        return self.inp(CONTROL)

    def chs(self, command: int, cylinder: int, head: int, sector: int, count: int = 1) -> int:
        for port, value in ((COUNT, count), (LOW, sector), (MID, cylinder & 0xFF), (HIGH, cylinder >> 8)):
            self.out(port, value)
        self.out(DEVICE, 0xA0 | head)
        self.out(STATUS, command)
        return self.inp(CONTROL)

    def address(self) -> int:
        low, mid, high, device = (self.inp(port) for port in (LOW, MID, HIGH, DEVICE))
        return (device & 15) << 24 | high << 16 | mid << 8 | low

    def take(self, sectors: int = 1, size: int = 2) -> bytes:
        """That many sectors from the data port."""
        return b"".join(
            self.bus.read(DATA, size).to_bytes(size, "little") for _ in range(sectors * SECTOR // size)
        )

    def put(self, data: bytes, size: int = 2) -> None:
        for at in range(0, len(data), size):
            self.bus.write(DATA, size, int.from_bytes(data[at : at + size], "little"))


@pytest.fixture
def bench() -> Bench:
    return Bench(Medium())


def test_it_is_found_by_its_signature(bench: Bench) -> None:
    """After power-on and software reset the registers are an ATA disk's, and nothing has interrupted."""
    for _ in range(2):
        assert [bench.inp(p) for p in (ERROR, COUNT, LOW, MID, HIGH, DEVICE)] == [1, 1, 1, 0, 0, 0xA0]
        assert bench.inp(STATUS) == IDLE
        bench.command(READ, 5)
        bench.out(CONTROL, 4)
        assert bench.inp(STATUS) == BUSY and not bench.level
        bench.out(LOW, 7)
        bench.out(STATUS, READ)
        assert bench.inp(STATUS) == BUSY, "a drive in reset listens to nothing"
        bench.out(CONTROL, 0)
    assert bench.rises == 2


def test_a_read_interrupts_when_a_sector_waits_and_not_after_the_last(bench: Bench) -> None:
    """Each sector has an interrupt, taken back by the status but not by the alternate one; then all is quiet."""
    assert bench.command(READ, 40, 3) == WAITING
    for n in range(3):
        assert bench.rises == n + 1 and bench.level
        assert bench.inp(CONTROL) == WAITING and bench.level
        assert bench.inp(STATUS) == WAITING and not bench.level
        assert bench.take() == content(40 + n)
    assert (bench.inp(STATUS), bench.rises, bench.level) == (IDLE, 3, False)
    assert bench.inp(COUNT) == 0
    assert bench.bus.read(DATA, 2) == 0, "nothing more to read"


def test_a_read_by_polling_needs_no_interrupt(bench: Bench) -> None:
    """With nIEN set the line stays down; cleared, it shows what has been waiting."""
    bench.out(CONTROL, 2)
    bench.command(READ, 1, 2)
    assert bench.take() == content(1) and not bench.rises
    bench.out(CONTROL, 0)
    assert bench.level
    assert bench.take() == content(2)


def test_a_status_that_nobody_read_still_makes_an_edge_for_each_sector(bench: Bench) -> None:
    """An edge-triggered controller sees every block, though the driver never took an interrupt back."""
    bench.command(READ, 0, 5)
    bench.take(5)
    assert bench.rises == 5


def test_a_write_interrupts_when_each_sector_is_taken(bench: Bench) -> None:
    """The first sector is asked for without an interrupt; one comes after each, the last with no request."""
    assert bench.command(WRITE, 7, 2) == WAITING and not bench.rises
    bench.put(b"a" * SECTOR)
    assert bench.medium.read(7, 1) == b"a" * SECTOR
    assert (bench.inp(STATUS), bench.rises) == (WAITING, 1)
    bench.put(b"b" * SECTOR)
    assert (bench.inp(STATUS), bench.rises) == (IDLE, 2)
    assert bench.medium.read(6, 4) == content(6) + b"a" * SECTOR + b"b" * SECTOR + content(9)


def test_a_sector_is_written_whole_or_not_at_all(bench: Bench) -> None:
    """A write that is cut off in the middle of a sector by a reset or another command changes nothing."""
    for stop in ((CONTROL, 4), (STATUS, IDENTIFY)):
        bench.command(WRITE, 7)
        bench.put(b"a" * (SECTOR - 2))
        bench.out(*stop)
        bench.out(CONTROL, 0)
        assert bench.medium.read(7, 1) == content(7)


@pytest.mark.parametrize("count", (1, 8, 9, 255, 0))
def test_multiple_moves_blocks(bench: Bench, count: int) -> None:
    """Between two interrupts a MULTIPLE command moves as many sectors as were set; zero sectors are 256."""
    assert bench.command(READ_MULTIPLE) == WAITING and bench.take(1) == content(0), "firmware has set 16"
    assert bench.command(SET_MULTIPLE, count=0) == IDLE
    assert bench.command(READ_MULTIPLE) == IDLE | FAILED and bench.inp(ERROR) == ABORTED
    assert bench.command(SET_MULTIPLE, count=3) == IDLE | FAILED
    assert bench.command(SET_MULTIPLE, count=8) == IDLE
    before, sectors = bench.rises, count or 256
    bench.command(READ_MULTIPLE, 100, count)
    assert bench.take(sectors) == bench.medium.read(100, sectors)
    assert bench.rises - before == -(-sectors // 8)
    bench.command(WRITE_MULTIPLE, 1000, count)
    bench.put(bench.medium.read(100, sectors))
    assert bench.inp(STATUS) == IDLE
    assert bench.medium.read(1000, sectors) == bench.medium.read(100, sectors)
    assert bench.rises - before == 2 * -(-sectors // 8)


def test_identify_tells_what_the_disk_does(bench: Bench) -> None:
    """Size, geometry and capabilities; every setting that it claims to have shows."""

    def words() -> list[int]:
        assert bench.command(IDENTIFY) == WAITING
        data = bench.take()
        return [int.from_bytes(data[at : at + 2], "little") for at in range(0, SECTOR, 2)]

    found = words()
    assert found[60] | found[61] << 16 == SECTORS
    assert (found[1], found[3], found[6]) == (found[54], found[55], found[56]) == (2, 16, 63)
    assert found[57] | found[58] << 16 == 2 * 16 * 63
    assert found[49] & 1 << 9 and not found[49] & 1 << 8, "LBA, no DMA"
    assert found[83] & 0xC000 == 0x4000 and not found[83] & 1 << 10, "no 48-bit addresses"
    text = b"".join(word.to_bytes(2, "big") for word in found[27:47])
    assert text.decode().rstrip() == "VMM ATA DISK"
    bench.command(SET_MULTIPLE, count=4)
    bench.command(SET_FEATURES, features=0x82)
    bench.out(COUNT, 9)
    bench.out(DEVICE, 0xE3)
    bench.out(STATUS, SET_PARAMETERS)
    changed = words()
    assert (found[59], changed[59]) == (0x110, 0x104)
    assert found[85] & ~changed[85] == 1 << 5
    assert (changed[54], changed[55], changed[56]) == (SECTORS // 36, 4, 9)
    assert (changed[1], changed[3], changed[6]) == (2, 16, 63), "the default stays what it was"


@given(number=st.integers(0, 2 * 16 * 63 - 1), heads=st.integers(1, 16), track=st.integers(1, 255))
@settings(deadline=None, max_examples=60)
def test_chs_and_lba_name_the_same_sectors(number: int, heads: int, track: int) -> None:
    """In any geometry that the host sets, cylinder, head and sector count through the disk in order."""
    bench = Bench(SHARED)
    bench.out(COUNT, track)
    bench.out(DEVICE, 0xA0 | heads - 1)
    bench.out(STATUS, SET_PARAMETERS)
    head, sector = number // track % heads, number % track + 1
    cylinder = number // track // heads
    if cylinder >= (SECTORS // (heads * track) or 1):
        assert bench.chs(READ, cylinder, head, sector) == IDLE | FAILED
        return
    assert bench.chs(READ, cylinder, head, sector) == WAITING
    assert bench.take() == content(number)


SHARED = Medium()  # for tests that only read


@pytest.mark.parametrize("place", ((0, 0, 0), (0, 0, 64), (2, 0, 1), (65535, 15, 63)))
def test_sectors_that_the_geometry_has_not(bench: Bench, place: tuple[int, int, int]) -> None:
    """Sector 0, one past the track, and a cylinder past the last are not found."""
    assert bench.chs(READ, *place) == IDLE | FAILED
    assert bench.inp(ERROR) == NOT_FOUND and bench.rises == 1


@pytest.mark.parametrize("command", (READ, WRITE, VERIFY))
def test_an_error_names_the_first_sector_that_fails(bench: Bench, command: int) -> None:
    """Past the end the sectors before are moved, the error is ID not found, at the first that is not there."""
    bench.command(command, SECTORS - 2, 4)
    for _ in range(2):
        if command == READ:
            bench.take()
        elif command == WRITE:
            bench.put(bytes(SECTOR))
    assert bench.inp(STATUS) == IDLE | FAILED
    assert (bench.inp(ERROR), bench.address(), bench.inp(COUNT)) == (NOT_FOUND, SECTORS, 2)
    assert bench.command(READ, 0) == WAITING and bench.inp(ERROR) == 0


def test_a_medium_that_fails_is_told(bench: Bench) -> None:
    """A sector that cannot be read or written gives an uncorrectable error; the drive goes on."""
    bench.medium.bad = {1}
    bench.command(READ, 0, 2)
    bench.take()
    assert bench.inp(STATUS) == IDLE | FAILED and bench.inp(ERROR) == UNCORRECTABLE
    assert bench.address() == 1
    bench.command(WRITE, 1)
    bench.put(bytes(SECTOR))
    assert bench.inp(STATUS) == IDLE | FAILED and bench.inp(ERROR) == UNCORRECTABLE
    assert bench.command(VERIFY, 0, 2) == IDLE | FAILED
    bench.medium.bad = {0}
    assert bench.command(FLUSH) == IDLE | FAILED
    bench.medium.bad = set()
    assert bench.command(READ, 0) == WAITING


def test_a_disk_that_may_not_be_written(bench: Bench) -> None:
    """A write to it is aborted as write-protected, after the sector was offered, and changes nothing."""
    bench.medium.writable = False
    bench.command(WRITE, 3)
    bench.put(bytes(SECTOR))
    assert bench.inp(STATUS) == IDLE | FAILED and bench.inp(ERROR) == 0x40 | ABORTED
    assert bench.medium.read(3, 1) == content(3)


def test_a_flush_reaches_the_medium(bench: Bench) -> None:
    """FLUSH CACHE ends with an interrupt when the medium has flushed."""
    assert bench.command(FLUSH) == IDLE
    assert (bench.medium.flushed, bench.rises) == (1, 1)


def test_small_commands(bench: Bench) -> None:
    """Seek, recalibrate, diagnostic and power commands succeed; what the disk has not is aborted."""
    for command in (SEEK, 0x10, 0xE0, 0xE1, 0xE2, 0xE3, VERIFY):
        assert bench.command(command) == IDLE, hex(command)
    assert bench.command(0xE5) == IDLE and bench.inp(COUNT) == 0xFF
    assert bench.command(DIAGNOSE) == IDLE and bench.inp(ERROR) == 1
    for command in (0x00, 0x08, 0x24, 0xA0, 0xA1, 0xC8, 0xCA, 0xB0, 0xEA, 0xF5):
        assert bench.command(command) == IDLE | FAILED and bench.inp(ERROR) == ABORTED, hex(command)
    assert bench.command(SET_FEATURES, count=0x0C, features=3) == IDLE
    assert bench.command(SET_FEATURES, count=0x42, features=3) == IDLE | FAILED, "no DMA"
    assert bench.command(SET_FEATURES, features=0x77) == IDLE | FAILED


def test_the_absent_second_device(bench: Bench) -> None:
    """Device 1 has status 0 and takes no command but the diagnostic, which is for both; it never interrupts."""
    bench.command(READ, 9)
    bench.out(CONTROL, 4)
    bench.out(CONTROL, 0)
    bench.out(DEVICE, 0xB0)
    assert (bench.inp(STATUS), bench.inp(CONTROL)) == (0, 0)
    before = bench.rises
    bench.out(STATUS, IDENTIFY)
    assert (bench.inp(STATUS), bench.rises) == (0, before)
    bench.out(STATUS, DIAGNOSE)
    assert bench.inp(STATUS) == IDLE and bench.rises == before + 1, "it selects device 0"


def test_the_line_is_the_selected_devices(bench: Bench) -> None:
    """While device 1 is selected the disk's interrupt is not on the cable; it comes back with it."""
    bench.command(SEEK)
    assert bench.level
    bench.out(DEVICE, 0xF0)
    assert not bench.level
    assert bench.inp(STATUS) == 0, "which acknowledges nothing"
    bench.out(DEVICE, 0xE0)
    assert bench.level


accesses = st.lists(
    st.tuples(
        st.sampled_from(("read", "write", "multiple read", "multiple write")),
        st.integers(0, 40),
        st.integers(1, 20),
        st.sampled_from((1, 2, 4)),
    ),
    max_size=8,
)


@given(accesses=accesses)
@settings(deadline=None, max_examples=40)
def test_it_is_an_array_of_sectors(accesses: list[tuple[str, int, int, int]]) -> None:
    """Any reads and writes, in any width and kind, give what the same ones give on plain bytes."""
    medium = Medium(64)
    bench, model = Bench(medium), bytearray(medium.data)
    bench.command(SET_MULTIPLE, count=4)
    for number, (what, sector, count, size) in enumerate(accesses):
        start, end = sector * SECTOR, (sector + count) * SECTOR
        multiple = what.startswith("multiple")
        if what.endswith("read"):
            bench.command(READ_MULTIPLE if multiple else READ, sector, count)
            assert bench.take(count, size) == model[start:end]
        else:
            data = bytes((number + at // 7) & 0xFF for at in range(end - start))
            bench.command(WRITE_MULTIPLE if multiple else WRITE, sector, count)
            bench.put(data, size)
            model[start:end] = data
        assert bench.inp(STATUS) == IDLE
    assert medium.data == model


ports = st.sampled_from((*range(DATA, STATUS + 1), STATUS, STATUS, CONTROL))
steps = st.lists(st.tuples(ports, st.one_of(st.none(), st.integers(0, 255))), max_size=60)


@given(before=steps, after=steps)
@settings(deadline=None)
def test_the_state_is_everything(
    before: list[tuple[int, int | None]], after: list[tuple[int, int | None]]
) -> None:
    """Any accesses are survived, and a disk restored from its state has the same future."""

    def do(bench: Bench, port: int, value: int | None) -> int | None:
        if value is None:
            return bench.bus.read(port, 2 if port == DATA else 1)
        if port == DEVICE:
            value |= 0x40
        bench.bus.write(port, 1, value)
        return None

    bench = Bench(Medium(300))
    for port, value in before:
        do(bench, port, value)
    twin = Bench(copy.deepcopy(bench.medium))
    twin.ide.state, twin.level, twin.rises = copy.deepcopy(bench.ide.state), bench.level, bench.rises
    for port, value in after:
        assert do(bench, port, value) == do(twin, port, value)
        assert (bench.level, bench.rises, bench.ide.state) == (twin.level, twin.rises, twin.ide.state)
    assert bench.medium.data == twin.medium.data


@given(chunks=st.lists(st.integers(1, 300), max_size=30), writing=st.booleans())
@settings(deadline=None)
def test_blocks_are_many_accesses_at_once(chunks: list[int], writing: bool) -> None:
    """Moving as much as there is room for gives the bytes, registers and interrupts of moving each word."""
    fast, slow = Bench(Medium(64)), Bench(Medium(64))
    for it in (fast, slow):
        it.command(WRITE if writing else READ, 3, 4)
    for number, chunk in enumerate(chunks):
        length = min(chunk * 2, fast.ide.data.room(writing))
        if not length:
            break
        if writing:
            data = bytes((number + i) & 0xFF for i in range(length))
            fast.ide.data.put(data)
            slow.put(data)
        else:
            assert fast.ide.data.take(length) == b"".join(
                slow.bus.read(DATA, 2).to_bytes(2, "little") for _ in range(length // 2)
            )
        assert (fast.level, fast.rises, fast.ide.state) == (slow.level, slow.rises, slow.ide.state)
    assert fast.medium.data == slow.medium.data
    assert fast.ide.data.room(not writing) == 0
