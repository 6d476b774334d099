"""The tables that a guest finds its hardware by, read as an operating system reads them."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

from tests.machines import lab
from vmm.machine.devices import apic, ioapic
from vmm.machine.firmware import aml, tables
from vmm.machine.machine import Machine
from vmm.machine.memory import BIOS_START

MEMORY = 64 << 20
PC_FEATURES = 0x0387_AB39


@pytest.fixture
def machine() -> Machine:
    """A machine as its firmware leaves it."""
    return lab("hlt", model="pc").machine


def area(machine: Machine) -> bytes:
    return bytes(machine.memory.bytes[0xE0000:0x100000])


def at(machine: Machine, address: int, size: int) -> bytes:
    return bytes(machine.memory.bytes[address : address + size])


def table(machine: Machine, address: int) -> tuple[bytes, bytes]:
    """Signature and body of a table, checked."""
    signature, length = struct.unpack("<4sI", at(machine, address, 8))
    whole = at(machine, address, length)
    assert sum(whole) % 256 == 0
    return signature, whole[36:]


def root(machine: Machine) -> dict[bytes, bytes]:
    """The bodies of the tables that the RSDT names, the way there checked."""
    found = area(machine)
    places = [i for i in range(0, len(found), 16) if found[i : i + 8] == b"RSD PTR "]
    assert len(places) == 1 and sum(found[places[0] : places[0] + 20]) % 256 == 0
    (rsdt,) = struct.unpack_from("<I", found, places[0] + 16)
    signature, body = table(machine, rsdt)
    assert signature == b"RSDT"
    return dict(table(machine, address) for (address,) in struct.iter_unpack("<I", body))


def test_a_scan_of_the_firmwares_area_finds_acpi(machine: Machine) -> None:
    """RSDP on a boundary of sixteen, RSDT, FADT and MADT, each with a checksum of zero."""
    assert set(root(machine)) == {b"FACP", b"APIC"}


def test_the_fadt_names_the_hardware(machine: Machine) -> None:
    """DSDT, FACS, the power management blocks, SCI, and the reset register with its value."""
    fadt = root(machine)[b"FACP"]
    facs, dsdt = struct.unpack_from("<II", fadt, 0)
    assert at(machine, facs, 4) == b"FACS" and facs % 64 == 0
    assert table(machine, dsdt)[0] == b"DSDT"
    assert struct.unpack_from("<H", fadt, 46 - 36) == (9,)
    assert struct.unpack_from("<I", fadt, 48 - 36) == (0,)  # no SMI command: ACPI from the start
    assert struct.unpack_from("<8I", fadt, 56 - 36) == (0x600, 0, 0x604, 0, 0, 0x608, 0, 0)
    assert fadt[88 - 36 : 92 - 36] == bytes((4, 2, 0, 4))
    assert struct.unpack_from("<BBBBQB", fadt, 116 - 36) == (1, 8, 0, 1, 0xCF9, 6)
    assert len(fadt) == 244 - 36


def test_the_madt_names_the_apics(machine: Machine) -> None:
    """One enabled processor, one IO-APIC, the timer on pin 2, the SCI by level, NMI on LINT1."""
    madt = root(machine)[b"APIC"]
    assert struct.unpack_from("<II", madt) == (apic.BASE, 1)
    entries, i = [], 8
    while i < len(madt):
        entries.append(madt[i : i + madt[i + 1]])
        i += madt[i + 1]
    assert entries == [
        struct.pack("<BBBBI", 0, 8, 0, 0, 1),
        struct.pack("<BBBBII", 1, 12, 1, 0, ioapic.BASE, 0),
        struct.pack("<BBBBIH", 2, 10, 0, 0, 2, 0),
        struct.pack("<BBBBIH", 2, 10, 0, 9, 9, 0xD),
        struct.pack("<BBBHB", 4, 6, 0xFF, 0, 1),
    ]


def _terms(code: bytes) -> Iterator[tuple[str, bytes]]:
    """The named objects of AML and their contents, those inside of others too; AssertionError if it is malformed."""
    i = 0
    while i < len(code):
        opcode = code[i : i + 2] if code[i] == 0x5B else code[i : i + 1]
        i += len(opcode)
        if opcode == b"\x08":
            path, i = _path(code, i)
            end = _skip(code, i)
            yield path, code[i:end]
            i = end
        else:
            assert opcode in (b"\x10", b"\x5b\x82"), opcode
            start, end = _package(code, i)
            path, start = _path(code, start)
            yield path, code[start:end]
            yield from _terms(code[start:end])
            i = end
    assert i == len(code)


def _path(code: bytes, i: int) -> tuple[str, int]:
    size = 5 if code[i : i + 1] == b"\\" else 4
    return code[i : i + size].decode(), i + size


def _package(code: bytes, i: int) -> tuple[int, int]:
    """Where what a PkgLength at `i` counts begins, and where it ends."""
    more = code[i] >> 6
    length = code[i] & 0x3F if not more else code[i] & 0xF
    for n in range(more):
        length |= code[i + 1 + n] << 4 + 8 * n
    assert i + length <= len(code)
    return i + 1 + more, i + length


def _skip(code: bytes, i: int) -> int:
    """The end of the data object at `i`."""
    if code[i] in (0x11, 0x12):
        return _package(code, i + 1)[1]
    return i + {0x00: 1, 0x01: 1, 0x0A: 2, 0x0B: 3, 0x0C: 5}[code[i]]


@pytest.mark.parametrize("keyboard", (True, False))
def test_the_namespace_is_well_formed_and_says_what_is_there(keyboard: bool) -> None:
    """Every length adds up; soft-off is type 5, the bus is a PNP0A03, and the keyboard is there if it is."""
    built = tables.build(MEMORY, PC_FEATURES, keyboard)
    start = built.index(b"DSDT")
    (length,) = struct.unpack_from("<I", built, start + 4)
    terms = list(_terms(built[start + 36 : start + length]))
    assert dict(terms)["\\_S5_"] == b"\x12\x08\x04\x0a\x05\x0a\x05\x00\x00"
    identities = [value for path, value in terms if path == "_HID"]
    assert identities[0] == aml.eisa("PNP0A03") == b"\x0c\x41\xd0\x0a\x03"
    assert (aml.eisa("PNP0303") in identities) == keyboard
    for path, value in terms:
        if path == "_CRS":
            begin, end = _package(value, 1)
            size = {0: 0, 1: 1, 0x0A: value[begin + 1]}[value[begin]]
            resources = value[begin + (2 if value[begin] == 0x0A else 1) : end]
            assert len(resources) == size and resources.endswith(b"\x79\0")


def test_a_scan_finds_the_multiprocessor_tables_too(machine: Machine) -> None:
    """The same hardware again: a processor with CPUID's features, two buses, the IO-APIC, its lines, LINT0, LINT1."""
    found = area(machine)
    places = [i for i in range(0, len(found), 16) if found[i : i + 4] == b"_MP_"]
    assert len(places) == 1 and sum(found[places[0] : places[0] + 16]) % 256 == 0
    (address,) = struct.unpack_from("<I", found, places[0] + 4)
    signature, length = struct.unpack("<4sH", at(machine, address, 6))
    whole = at(machine, address, length)
    assert signature == b"PCMP" and sum(whole) % 256 == 0
    count, local = struct.unpack_from("<HI", whole, 34)
    kinds, i = [], 44
    while i < length:
        kinds.append(whole[i])
        if whole[i] == 0:
            assert struct.unpack_from("<BBBII", whole, i + 1) == (
                0,
                0x11,
                3,
                0x683,
                machine.cpuid.answer(1, 0)[3],
            )
        i += 20 if whole[i] == 0 else 8
    assert i == length and len(kinds) == count and local == apic.BASE
    assert [kinds.count(kind) for kind in range(5)] == [1, 2, 1, 16, 2]


def test_the_firmwares_area_is_memory_of_the_machine_that_has_one(machine: Machine) -> None:
    """A guest can look at it and even write there; the small PC has nothing at that place."""
    free = BIOS_START + 0x8000
    source = f"mov eax, [{BIOS_START:#x}]\n mov dword [{free:#x}], 7\n mov ebx, [{free:#x}]"
    for mode in ("native", "hvm", "bt", "trap"):
        made = lab(source + "\nstop: jmp stop", mode, model="pc")
        made.run(50)
        assert (made.reg("eax"), made.reg("ebx")) == (int.from_bytes(b"RSD ", "little"), 7)
    small = lab(source + "\nstop: jmp stop")
    small.run(50)
    assert (small.reg("eax"), small.reg("ebx")) == (0xFFFFFFFF, 0xFFFFFFFF)


def test_numbers_too_large_for_their_place_are_refused() -> None:
    """The encoder knows numbers of up to 32 bits, and packages of up to 4 KiB."""
    assert aml.integer(1) == b"\x01" and aml.integer(0x1234) == b"\x0b\x34\x12"
    with pytest.raises(ValueError, match="more than 32 bits"):
        aml.integer(1 << 32)
    with pytest.raises(ValueError, match="longer than any here"):
        aml.scope("\\_SB_", bytes(4096))
