"""The tables by which an operating system finds this PC's hardware: ACPI's, and the MultiProcessor Specification's.

All lie in the firmware's area below 1 MiB, where both are looked for, and are nothing but numbers; what the numbers
mean is in the devices. Every table ends up with bytes that sum to zero, which is how it is known for one.

Sources: ACPI Specification 2.0, 5.2; Intel MultiProcessor Specification 1.4, chapter 4.
"""

from __future__ import annotations

import struct

from vmm.machine import cpuid
from vmm.machine.devices import apic, ioapic, pci, power
from vmm.machine.firmware import aml
from vmm.machine.memory import BIOS_START

POWER_PORTS = 0x600
RESET_PORT = 0xCF9
SCI_IRQ, TIMER_IRQ, TIMER_PIN = 9, 0, 2
IOAPIC_ID = 1
_OEM, _OEM_TABLE = b"VMM   ", b"VMMPC   "
_RSDP, _MP, _FIRST = BIOS_START, BIOS_START + 0x20, BIOS_START + 0x40
_HIGH_EDGE, _HIGH_LEVEL = 0x5, 0xD  # flags of an interrupt input, in both kinds of table
_FLAGS = (
    1 << 0 | 1 << 2 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 10
)  # WBINVD, C1, no buttons, no RTC wake, reset register
_LEGACY, _KEYBOARD = 1 << 0, 1 << 1  # IAPC_BOOT_ARCH
_BYTE_PORT = struct.pack("<BBBBQ", 1, 8, 0, 1, RESET_PORT)


def build(memory_size: int, features: int, keyboard: bool = True) -> bytes:
    """What lies at `BIOS_START`. `features` is what CPUID.1 says in EDX."""
    area = bytearray()

    def place(data: bytes, alignment: int = 16) -> int:
        area.extend(bytes(-len(area) % alignment) + data)
        return _FIRST + len(area) - len(data)

    facs = place(struct.pack("<4sI", b"FACS", 64).ljust(64, b"\0"), 64)
    dsdt = place(_table(b"DSDT", 1, _namespace(memory_size, keyboard)))
    fadt = place(_table(b"FACP", 3, _fadt(facs, dsdt, keyboard)))
    madt = place(_table(b"APIC", 1, _madt()))
    rsdt = place(_table(b"RSDT", 1, struct.pack("<II", fadt, madt)))
    configuration = place(_configuration(features))
    rsdp = _summed(struct.pack("<8sB6sBI", b"RSD PTR ", 0, _OEM, 0, rsdt), 8)
    pointer = _summed(struct.pack("<4sIBBBBBBBB", b"_MP_", configuration, 1, 4, 0, 0, 0, 0, 0, 0), 10)
    return rsdp.ljust(_MP - _RSDP, b"\0") + pointer.ljust(_FIRST - _MP, b"\0") + bytes(area)


def _summed(table: bytes, checksum: int) -> bytes:
    """The table with the byte at offset `checksum` such that all sum to zero."""
    return table[:checksum] + bytes((-sum(table) & 0xFF,)) + table[checksum + 1 :]


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    head = struct.pack(
        "<4sIBB6s8sI4sI", signature, 36 + len(body), revision, 0, _OEM, _OEM_TABLE, 1, b"VMM ", 1
    )
    return _summed(head + body, 9)


def _fadt(facs: int, dsdt: int, keyboard: bool) -> bytes:
    """Without an SMI command port: the hardware is ACPI's from the start."""
    event, control, timer = (POWER_PORTS + block for block in (power.EVENT, power.CONTROL, power.TIMER))
    blocks = struct.pack("<8I", event, 0, control, 0, 0, timer, 0, 0)
    lengths = struct.pack("<BBBBBBBB", 4, 2, 0, 4, 0, 0, 0, 0)
    idle = struct.pack("<HHHHBBBBB", 0xFFF, 0xFFF, 0, 0, 0, 0, 0, 0, 0x32)  # no C2, no C3; the century's byte
    head = struct.pack("<IIBBHIBBBB", facs, dsdt, 0, 0, SCI_IRQ, 0, 0, 0, 0, 0)
    boot = struct.pack("<HBI", _LEGACY | (_KEYBOARD if keyboard else 0), 0, _FLAGS)
    body = head + blocks + lengths + idle + boot + _BYTE_PORT + bytes((pci.RESET_CPU | pci.RESET_SYSTEM,))
    return body.ljust(244 - 36, b"\0")


def _madt() -> bytes:
    """One processor, one IO-APIC; the timer is on another pin than its line, and the SCI is level-triggered."""
    return struct.pack("<II", apic.BASE, 1) + b"".join(
        (
            struct.pack("<BBBBI", 0, 8, 0, 0, 1),
            struct.pack("<BBBBII", 1, 12, IOAPIC_ID, 0, ioapic.BASE, 0),
            struct.pack("<BBBBIH", 2, 10, 0, TIMER_IRQ, TIMER_PIN, 0),
            struct.pack("<BBBBIH", 2, 10, 0, SCI_IRQ, SCI_IRQ, _HIGH_LEVEL),
            struct.pack("<BBBHB", 4, 6, 0xFF, 0, 1),
        )
    )


def _namespace(memory_size: int, keyboard: bool) -> bytes:
    """Soft-off, the PCI bus with what passes through its bridge, and what is on ISA. No interrupt is routed."""
    ff = aml.integer(power.SOFT_OFF)
    resources = aml.template(
        aml.words(aml.BUS, 0, 0xFF),
        aml.ports(0xCF8, 8),
        aml.words(aml.IO, 0, 0xCF7),
        aml.words(aml.IO, 0xD00, 0xFFFF),
        aml.memory(0xA0000, 0xBFFFF),
        aml.memory(memory_size, ioapic.BASE - 1),
    )
    isa = [
        _isa("RTC_", "PNP0B00", aml.ports(0x70, 2), aml.irq(8)),
        _isa("COM1", "PNP0501", aml.ports(0x3F8, 8), aml.irq(4)),
        _isa("MBRD", "PNP0C02", aml.ports(POWER_PORTS, power.SIZE)),
    ]
    if keyboard:
        isa.append(_isa("KBD_", "PNP0303", aml.ports(0x60, 1), aml.ports(0x64, 1), aml.irq(1)))
        isa.append(_isa("MOU_", "PNP0F13", aml.irq(12)))
    bridge = aml.device("ISA_", aml.name("_ADR", aml.integer(1 << 16)), *isa)
    bus = aml.device(
        "PCI0",
        aml.name("_HID", aml.eisa("PNP0A03")),
        aml.name("_ADR", aml.integer(0)),
        aml.name("_UID", aml.integer(0)),
        aml.name("_CRS", resources),
        bridge,
    )
    return aml.name("\\_S5_", aml.package(ff, ff, aml.integer(0), aml.integer(0))) + aml.scope("\\_SB_", bus)


def _isa(segment: str, identity: str, *resources: bytes) -> bytes:
    return aml.device(
        segment, aml.name("_HID", aml.eisa(identity)), aml.name("_CRS", aml.template(*resources))
    )


# The MultiProcessor Specification's

_PCI_BUS, _ISA_BUS = 0, 1
_INT, _NMI, _EXTINT = 0, 1, 3


def _configuration(features: int) -> bytes:
    """The same machine again: a processor, two buses, the IO-APIC, its sixteen ISA lines, and LINT0 and LINT1."""
    enabled, boot_processor = 1, 2
    entries = [
        struct.pack(
            "<BBBBIIII", 0, 0, apic.VERSION & 0xFF, enabled | boot_processor, cpuid.SIGNATURE, features, 0, 0
        ),
        struct.pack("<BB6s", 1, _PCI_BUS, b"PCI   "),
        struct.pack("<BB6s", 1, _ISA_BUS, b"ISA   "),
        struct.pack("<BBBBI", 2, IOAPIC_ID, ioapic.VERSION & 0xFF, enabled, ioapic.BASE),
    ]
    for line in range(16):
        if line != TIMER_PIN:
            pin = TIMER_PIN if line == TIMER_IRQ else line
            flags = _HIGH_LEVEL if line == SCI_IRQ else 0
            entries.append(struct.pack("<BBHBBBB", 3, _INT, flags, _ISA_BUS, line, IOAPIC_ID, pin))
    entries.append(struct.pack("<BBHBBBB", 3, _EXTINT, 0, _ISA_BUS, 0, IOAPIC_ID, 0))
    entries.append(struct.pack("<BBHBBBB", 4, _EXTINT, 0, _ISA_BUS, 0, 0, 0))
    entries.append(struct.pack("<BBHBBBB", 4, _NMI, 0, _ISA_BUS, 0, 0xFF, 1))
    body = b"".join(entries)
    head = struct.pack(
        "<4sHBB8s12sIHHIHBB", b"PCMP", 44 + len(body), 4, 0, _OEM_TABLE, b"VMM PC      ", 0, 0, len(entries),
        apic.BASE, 0, 0, 0,
    )  # fmt: skip
    return _summed(head + body, 7)
