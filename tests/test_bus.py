"""The port bus: who is asked, in which pieces, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.machine.bus import PortBus


@dataclass
class Recorder:
    """Answers with its own bytes, and remembers what it was asked."""

    contents: dict[int, int] = field(default_factory=dict)
    asked: list[tuple[str, int, int]] = field(default_factory=list)

    def read(self, offset: int, size: int) -> int:
        self.asked.append(("read", offset, size))
        return sum(self.contents.get(offset + i, 0) << 8 * i for i in range(size))

    def write(self, offset: int, size: int, value: int) -> None:
        assert 0 <= value < 1 << 8 * size
        self.asked.append(("write", offset, size))
        for i in range(size):
            self.contents[offset + i] = value >> 8 * i & 0xFF


@pytest.mark.parametrize("size", (1, 2, 4))
def test_nobody_there(size: int) -> None:
    """Unclaimed ports read as ones, and writes to them vanish."""
    bus = PortBus()
    bus.write(0x80, size, 0)
    assert bus.read(0x80, size) == (1 << 8 * size) - 1
    assert bus.read(0xFFFF, size) == (1 << 8 * size) - 1


def test_overlap_names_both() -> None:
    """A range that touches another is refused, in a sentence with both names, and nothing is attached."""
    bus = PortBus()
    bus.attach(0x60, 5, Recorder(), "keyboard")
    with pytest.raises(ValueError, match=r"timer: port 0x60 already belongs to keyboard"):
        bus.attach(0x5E, 4, Recorder(), "timer")
    assert bus.owner(0x5E) is None
    assert bus.owner(0x64) == "keyboard"


@pytest.mark.parametrize(("base", "count"), ((-1, 2), (0xFFFF, 2), (0x10000, 1), (0x60, 0)))
def test_ranges_stay_in_port_space(base: int, count: int) -> None:
    """A range must lie within the 65,536 ports, and not be empty."""
    with pytest.raises(ValueError, match="odd: ports"):
        PortBus().attach(base, count, Recorder(), "odd")


def test_wide_access_is_cut_into_bytes() -> None:
    """A dword to a byte device is four bytes, low port first."""
    bus, device = PortBus(), Recorder()
    bus.attach(0x3F0, 4, device, "bytes")
    bus.write(0x3F0, 4, 0x44332211)
    assert device.asked == [("write", i, 1) for i in range(4)]
    assert bus.read(0x3F0, 4) == 0x44332211


def test_wide_devices_take_what_fits() -> None:
    """A device of width 4 takes a dword whole, and an access that runs over its end in pieces."""
    bus, device = PortBus(), Recorder()
    bus.attach(0xF4, 4, device, "exit", width=4)
    bus.write(0xF4, 4, 0x12345678)
    assert device.asked == [("write", 0, 4)]
    device.asked.clear()
    assert bus.read(0xF6, 4) == 0xFFFF1234
    assert device.asked == [("read", 2, 2)]


def test_a_data_register_is_wider_than_its_port() -> None:
    """It gets accesses of any width whole, though its neighbour has a port in their range."""
    bus = PortBus()

    class Register(Recorder):
        def room(self, writing: bool) -> int:
            return 0

        def take(self, length: int) -> bytes:
            return bytes(length)

        def put(self, data: bytes) -> None:
            pass

    device, neighbour = Register(), Recorder()
    bus.attach_data(0x1F0, device, "data")
    bus.attach(0x1F1, 7, neighbour, "registers")
    for size in (1, 2, 4):
        bus.write(0x1F0, size, 0x11223344 & (1 << 8 * size) - 1)
    assert device.asked == [("write", 0, size) for size in (1, 2, 4)] and not neighbour.asked
    assert bus.data_registers == {0x1F0: device}
    with pytest.raises(ValueError, match="already belongs to data"):
        bus.attach_data(0x1F0, device, "again")


ranges = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 6), st.sampled_from((1, 2, 4))), max_size=6)


@given(
    ranges=ranges, port=st.integers(0, 48), size=st.sampled_from((1, 2, 4)), value=st.integers(0, 2**32 - 1)
)
def test_every_byte_reaches_its_own_port(
    ranges: list[tuple[int, int, int]], port: int, size: int, value: int
) -> None:
    """Whatever is attached where, each byte of an access goes to the device that claims that byte's port."""
    bus = PortBus()
    owner: dict[int, tuple[Recorder, int]] = {}
    for base, count, width in ranges:
        device = Recorder()
        span = range(base, base + count)
        if any(p in owner for p in span):
            with pytest.raises(ValueError, match="belongs to"):
                bus.attach(base, count, device, "late", width)
        else:
            bus.attach(base, count, device, f"from {base}", width)
            owner.update({p: (device, p - base) for p in span})
    bus.write(port, size, value)
    expected = 0
    for i in range(size):
        byte = value >> 8 * i & 0xFF
        if port + i in owner:
            device, offset = owner[port + i]
            assert device.contents[offset] == byte
        else:
            byte = 0xFF
        expected |= byte << 8 * i
    assert bus.read(port, size) == expected
    assert [p for span in bus.ranges() for p in span] == sorted(owner)
    assert all(bus.owner(p) == f"from {span.start}" for span in bus.ranges() for p in span)
