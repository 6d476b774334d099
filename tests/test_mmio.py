"""Devices in memory: whatever instruction reaches one, in every mode the same, and never worse than on hardware.

The device is mostly the local APIC, whose registers show what arrived; an exact one records each access.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

import pytest

from tests.machines import DATA, PAGING_ON, Lab, enable_paging, lab
from vmm.isa.vectors import Vector
from vmm.machine.clock import HostClock
from vmm.machine.control import Control
from vmm.machine.devices import apic, ioapic
from vmm.machine.machine import Machine
from vmm.machine.mmio import PAGE, WINDOW_PAGES, DeviceMemory
from vmm.vm import MODES, UNMODIFIED, hardware

WAYS = [*sorted(UNMODIFIED), "hvm by shadow"]
TPR, ESR = apic.BASE + apic.TPR, apic.BASE + apic.ESR
EXACT = 0xFED0_0000  # where a test's own device is

NAMES = f"""
%define APIC {apic.BASE:#x}
%define TPR {TPR:#x}
%define TIMER {apic.BASE + apic.INITIAL_COUNT:#x}
%define COUNT {apic.BASE + apic.CURRENT_COUNT:#x}
%define ICR {apic.BASE + apic.ICR_LOW:#x}
%define IOAPIC {ioapic.BASE:#x}
%define EXACT {EXACT:#x}
"""


@dataclass
class Exact:
    """A device that remembers: a word in each four bytes, and a list of what was done, when and how wide."""

    machine: Machine
    words: dict[int, int] = field(default_factory=dict)
    seen: list[tuple[int, str, int, int, int]] = field(default_factory=list)

    def read(self, offset: int, size: int) -> int:
        assert offset % size == 0 and size in (1, 2, 4)
        value = self.words.get(offset & ~3, 0) >> 8 * (offset & 3) & (1 << 8 * size) - 1
        self.seen.append((self.machine.retired(), "read", offset, size, value))
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        assert offset % size == 0 and size in (1, 2, 4) and value < 1 << 8 * size
        mask = (1 << 8 * size) - 1 << 8 * (offset & 3)
        self.words[offset & ~3] = self.words.get(offset & ~3, 0) & ~mask | value << 8 * (offset & 3)
        self.seen.append((self.machine.retired(), "write", offset, size, value))


def attach(way: str) -> Callable[[Machine], Control]:
    return hardware("", "shadow") if way == "hvm by shadow" else MODES[way].attach


class Ran(NamedTuple):
    """A guest that has run: its machine, the device, and how it ended."""

    made: Lab
    device: Exact
    kind: str


def run(source: str, way: str, limit: int = 3000, **options: object) -> Ran:
    """A guest on the machine `pc`, which also has an `Exact`."""
    devices: list[Exact] = []

    def with_device(machine: Machine) -> Control:
        devices.append(Exact(machine))
        machine.memory.devices.attach(EXACT, devices[0])
        return attach(way)(machine)

    made = lab(NAMES + source, attach=with_device, model="pc", **options)  # type: ignore[arg-type]
    return Ran(made, devices[0], made.run(limit).kind)


STOP = "\nstop: jmp stop\n"
PSE_ON = "        mov eax, cr4\n        or eax, 0x10\n        mov cr4, eax\n" + PAGING_ON

PROGRAMS = {
    "loads and stores of each width": """
        mov dword [EXACT], 0x11223344
        mov byte [EXACT + 1], 0x55
        mov word [EXACT + 2], 0x6677
        mov al, [EXACT + 3]
        movzx ecx, word [EXACT]
        movsx edx, byte [EXACT + 1]
        mov ebx, [EXACT]
        mov [EXACT + 8], bl
        mov [EXACT + 12], bx
        mov [EXACT + 16], ebx""",
    "misaligned loads and stores": """
        mov dword [EXACT], 0x11223344
        mov dword [EXACT + 4], 0x55667788
        mov eax, [EXACT + 1]
        mov bx, [EXACT + 3]
        mov dword [EXACT + 6], 0x99AABBCC
        mov word [EXACT + 9], 0xDDEE
        mov ecx, [EXACT + 5]""",
    "across the end of the page": """
        mov eax, [EXACT + 0xFFE]
        mov dword [EXACT + 0xFFD], 0x12345678
        mov ebx, [EXACT + 0xFFC]
        mov ecx, [EXACT - 2]
        mov dword [EXACT - 1], 0x87654321
        mov edx, [EXACT]""",
    "read, modify, write": """
        mov dword [EXACT], 5
        add dword [EXACT], 7
        mov eax, 3
        sub [EXACT], eax
        inc dword [EXACT]
        neg dword [EXACT]
        not word [EXACT]
        shl dword [EXACT], 3
        xor byte [EXACT + 1], 0xFF
        bts dword [EXACT], 30
        setc [EXACT + 4]
        adc dword [EXACT], 0""",
    "locked": """
        mov dword [EXACT], 5
        lock inc dword [EXACT]
        mov eax, 100
        xchg [EXACT], eax
        lock xadd [EXACT], eax
        mov ebx, 9
        lock cmpxchg [EXACT], ebx
        lock or dword [EXACT], 0x8000
        mov edx, 0
        mov eax, [EXACT]
        mov ecx, 0x1234
        lock cmpxchg8b [EXACT]
        lock bts dword [EXACT], 3""",
    "stack operands": """
        mov dword [EXACT], 0x1234
        push dword [EXACT]
        pop dword [EXACT + 4]
        push word [EXACT + 2]
        pop word [EXACT + 8]""",
    "the stack itself": """
        mov ebp, esp
        mov esp, EXACT + 0x100
        push dword 0x11223344
        push ebp
        pop eax
        pusha
        popa
        call there
there:  pop ecx
        push dword 0x55
        call other
        enter 8, 0
        leave
        mov esp, ebp
        jmp stop
other:  ret 4""",
    "string instructions": """
        cld
        mov esi, EXACT
        mov edi, DATA
        mov ecx, 5
        rep movsd
        mov esi, DATA - 3
        mov edi, EXACT + 2
        mov ecx, 7
        rep movsb
        mov edi, EXACT + 0x20
        mov eax, 0xAABBCCDD
        mov ecx, 4
        rep stosd
        stosw
        mov esi, EXACT + 0x20
        lodsd
        mov edi, EXACT + 0x20
        mov ecx, 9
        mov eax, 0
        repne scasd
        mov edi, EXACT + 0x20
        mov esi, EXACT + 0x24
        cmpsd
        std
        mov esi, EXACT + 0x40
        mov edi, EXACT + 0x60
        mov ecx, 3
        rep movsd
        cld""",
    "string ports": """
        cld
        mov edi, EXACT
        mov edx, 0x70
        mov ecx, 3
        rep insb
        mov esi, EXACT
        mov edx, 0xE9
        mov ecx, 3
        rep outsb
        insd""",
    "floating point and vectors": """
        mov eax, cr4
        or eax, 0x600
        mov cr4, eax
        fninit
        fld1
        fst dword [EXACT]
        fst qword [EXACT + 8]
        fistp word [EXACT + 2]
        fld qword [EXACT + 8]
        fnstcw [EXACT + 0x20]
        fldcw [EXACT + 0x20]
        movups xmm0, [EXACT]
        movups [EXACT + 0x40], xmm0
        movd [EXACT + 0x50], xmm0
        movq [EXACT + 0x58], xmm0""",
    "descriptor tables and segments": """
        sgdt [EXACT]
        lgdt [EXACT]
        sidt [EXACT + 8]
        lidt [EXACT + 8]
        mov word [EXACT + 0x10], KERNEL_DATA
        mov ds, [EXACT + 0x10]
        mov es, [EXACT + 0x10]
        mov [EXACT + 0x14], ss
        sldt [EXACT + 0x18]
        str [EXACT + 0x1C]
        smsw [EXACT + 0x20]
        mov dword [EXACT + 0x30], there
        mov word [EXACT + 0x34], KERNEL_CODE
        jmp far [EXACT + 0x30]
there:  lss esp, [EXACT + 0x40]""",
    "jumps through it": """
        mov dword [EXACT], there
        jmp [EXACT]
        ud2
there:  mov dword [EXACT], other
        call [EXACT]
        jmp stop
other:  ret""",
    "a bound": """
        mov dword [EXACT], 3
        mov dword [EXACT + 4], 9
        mov eax, 5
        bound eax, [EXACT]
        mov eax, 10
        bound eax, [EXACT]""",
    "an exception's frame": """
        mov esp, EXACT + 0x100
        ud2""",
    "a double fault's frame": """
        mov esp, EXACT + 0x100
        mov word [IDT + 6 * 8 + 2], 0x50
        ud2""",
    "a return through it": """
        mov esp, EXACT + 0x100
        mov dword [EXACT + 0x100], there
        mov dword [EXACT + 0x104], KERNEL_CODE
        mov dword [EXACT + 0x108], 0x202
        iretd
there:  mov esp, STACK""",
    "fetched": "        jmp EXACT",
    "fetched near its end": "        jmp EXACT + 0xFFE",
    "stepped over": """
        pushfd
        or dword [esp], 0x100
        popfd
        mov eax, [EXACT]""",
    "a null selector out of it": """
        mov dword [EXACT], 7
        mov es, [EXACT + 0x100]
        push dword [es:EXACT]""",
    "a register that is not there": """
        mov eax, [APIC + 0x40]
        mov dword [APIC + 0x280], 0
        mov ebx, [APIC + 0x280]
        mov dword [APIC + 0x3F0], 1
        mov byte [APIC + 0x80], 0x50
        mov word [APIC + 0x80], 0x50
        mov dword [APIC + 0x82], 0x50505050
        mov ecx, [APIC + 0x80]
        mov dword [APIC + 0x280], 0
        mov edx, [APIC + 0x280]""",
    "the IO-APIC past its table": """
        mov dword [IOAPIC], 0xFF
        mov dword [IOAPIC + 0x10], 0xFFFFFFFF
        mov eax, [IOAPIC + 0x10]
        mov ebx, [IOAPIC + 0x20]
        mov dword [IOAPIC], 0x3F
        mov dword [IOAPIC + 0x10], 0xFFFFFFFF
        mov ecx, [IOAPIC + 0x10]
        mov dword [IOAPIC], 0x3E
        mov dword [IOAPIC + 0x10], 0xFFFFFFFF
        mov edx, [IOAPIC + 0x10]""",
    "a message, and what comes right after it": """
        sti
        nop
        mov dword [ICR], 0x40080
        inc ebx
        inc ebx""",
    "a message in the shadow of STI": """
        sti
        mov dword [ICR], 0x40080
        inc ebx""",
    "a message to nobody": """
        mov dword [APIC + 0x310], 0x05000000
        mov dword [ICR], 0x80
        mov dword [ICR], 0xC0080
        mov dword [ICR], 0x40005
        mov dword [APIC + 0x280], 0
        mov eax, [APIC + 0x280]""",
    "the timer, counted": """
        mov dword [APIC + 0x3E0], 0xB
        mov dword [TIMER], 1000
        mov eax, [COUNT]
        nop
        nop
        mov ebx, [COUNT]
        mov esi, COUNT
        mov edi, DATA
        mov ecx, 6
        rep movsb
        push dword [COUNT]""",
    "the timer, due within a block": """
        mov dword [APIC + 0x3E0], 0xB
        mov dword [APIC + 0x320], 0x80
        sti
        mov dword [TIMER], 4
        inc ebx
        inc ebx
        inc ebx
        inc ebx
        inc ebx
        inc ebx
        inc ebx
        inc ebx""",
    "the address moved": """
        mov ecx, 0x1B
        rdmsr
        mov [DATA], eax
        mov eax, 0xFE700900
        xor edx, edx
        wrmsr
        mov dword [TPR], 0x30
        mov esi, [TPR]
        mov dword [0xFE700080], 0x40
        mov edi, [0xFE700080]
        mov eax, 0x900
        wrmsr
        mov ebp, [0xFE700080]
        mov eax, 0x100100
        wrmsr
        mov eax, 0xFEE00900
        wrmsr
        rdmsr
        mov edi, [TPR]
        push eax
        mov eax, 1
        cpuid
        pop eax""",
    "the address moved over other things": """
        mov ecx, 0x1B
        mov eax, IOAPIC | 0x900
        xor edx, edx
        wrmsr
        mov esi, [IOAPIC + 0x30]
        mov eax, 0x1F0900
        wrmsr
        mov dword [0x1F0080], 7
        mov edi, [0x1F0080]
        mov dword [IOAPIC], 1
        mov ebp, [IOAPIC + 0x10]
        mov eax, APIC | 0x900
        wrmsr
        mov ebx, [APIC + 0x30]""",
    "the address refused": """
        mov ecx, 0x1B
        mov eax, 0xFEE00901
        xor edx, edx
        wrmsr""",
}


# With paging on: these 4 MiB, devices and all, are mapped to themselves, for a process or not; the page at READ_ONLY
# by a table at 0x1F0000; and the page table for TABLE lies in the device itself.
REGION, READ_ONLY, ABSENT, TABLE = EXACT & 0xFFC0_0000, 0x0800_0000, 0x0C00_0000, 0x1000_0000
FOR_ALL, FOR_KERNEL = 0x87, 0x83
NAMES += f"""
%define READ_ONLY {READ_ONLY:#x}
%define ABSENT {ABSENT:#x}
%define TABLE {TABLE:#x}
"""

PAGED = {
    "by the kernel": (FOR_KERNEL, "mov dword [EXACT], 7\n mov eax, [EXACT]"),
    "by a process": (FOR_ALL, "to_user\n mov dword [EXACT], 7\n add dword [EXACT], 4\n mov eax, [EXACT]"),
    "by a process that may not": (FOR_KERNEL, "to_user\n mov eax, [EXACT]"),
    "a load where only loads are allowed": (FOR_ALL, "mov eax, [READ_ONLY]\n to_user\n mov eax, [READ_ONLY]"),
    "a store where only loads are allowed": (FOR_ALL, "to_user\n inc dword [READ_ONLY]"),
    "a kernel's store there, without CR0.WP": (FOR_ALL, "mov dword [READ_ONLY], 7\n mov eax, [READ_ONLY]"),
    "and with it": (FOR_ALL, "mov eax, cr0\n or eax, 0x10000\n mov cr0, eax\n mov dword [READ_ONLY], 7"),
    "from a page that is absent": (
        FOR_ALL,
        "cld\n mov esi, ABSENT\n mov edi, EXACT\n mov ecx, 3\n rep movsd",
    ),
    "to a page that is absent": (FOR_ALL, "cld\n mov esi, EXACT\n mov edi, ABSENT\n mov ecx, 3\n rep movsd"),
    "a push to a page that is absent": (FOR_ALL, "mov esp, ABSENT + 4\n push dword [EXACT]"),
    "fetched by a process": (FOR_ALL, "to_user\n jmp EXACT"),
    "a page of messages": (FOR_ALL, "sti\n nop\n mov dword [ICR], 0x40080\n inc ebx"),
    "its page flushed each time": (
        FOR_ALL,
        "mov ecx, 5\nagain: inc dword [EXACT]\n invlpg [EXACT]\n mov eax, cr3\n mov cr3, eax\n loop again",
    ),
}


def paged(rights: int) -> list[tuple[int, bytes]]:
    directory = {REGION >> 22: REGION | rights, READ_ONLY >> 22: 0x1F_0007, TABLE >> 22: EXACT | 7}
    return [*enable_paging(directory=directory), (0x1F_0000, (EXACT | 5).to_bytes(4, "little"))]


@pytest.mark.parametrize("way", [way for way in WAYS if way != "native"])
@pytest.mark.parametrize("name", PAGED)
def test_paging_guards_a_device_as_it_guards_memory(name: str, way: str) -> None:
    """Rights, faults, CR2 and what arrives at the device are as on the bare machine."""
    rights, source = PAGED[name]
    memory = paged(rights)
    native, other = (compared(*run(PSE_ON + source + STOP, w, memory=memory)) for w in ("native", way))
    for what in native:
        assert other[what] == native[what], what


@pytest.mark.parametrize("way", WAYS)
def test_a_page_table_in_a_device_is_walked(way: str) -> None:
    """Its entries are the device's words, and the marks that the processor makes there are stores to it."""
    source = f"""
        mov dword [EXACT], DATA | 7
        mov dword [DATA], 0x1234
{PSE_ON}
        mov eax, [TABLE]
        mov dword [TABLE + 4], 0x5678
        mov ebx, [DATA + 4]
        mov ecx, [TABLE + 0x1000]"""
    made, device, _ = run(source + STOP, way, memory=paged(FOR_ALL))
    assert (made.reg("eax"), made.reg("ebx")) == (0x1234, 0x5678)
    assert device.words[0] == DATA | 0x67
    assert (made.vector, made.reg("cr2")) == (Vector.PF, TABLE + 0x1000)


def compared(made: Lab, device: Exact, kind: str) -> dict[str, object]:
    return made.everything() | {
        "outcome": kind,
        "vector": made.vector,
        "seen": device.seen,
        "apic": made.machine.devices.chipset.apic.state,  # type: ignore[union-attr]
    }


# SGDT shows the monitor's table under trap-and-emulate.
CRITICAL = {("descriptor tables and segments", "trap")}

# A monitor emulates these, and then the device sees them a moment earlier, or twice: the processor has read the
# operand when it finds that it may not go on, and the monitor reads it again. No store is made twice.
READ_AGAIN = {
    ("descriptor tables and segments", "bt"),
    ("a return through it", "bt"),
    ("a return through it", "trap"),
    ("a null selector out of it", "bt"),
}


def stores(seen: list[tuple[int, str, int, int, int]]) -> list[tuple[int, int, int]]:
    return [(offset, size, value) for _, what, offset, size, value in seen if what == "write"]


@pytest.mark.parametrize(
    ("name", "way"), [(n, w) for n in PROGRAMS for w in WAYS if w != "native" and (n, w) not in CRITICAL]
)
def test_every_instruction_reaches_a_device_as_it_does_bare(name: str, way: str) -> None:
    """Each access arrives at the same instruction, with the same address, width and value; so does its answer."""
    source = PROGRAMS[name] + STOP
    native, other = compared(*run(source, "native")), compared(*run(source, way))
    if (name, way) in READ_AGAIN:
        seen = native.pop("seen"), other.pop("seen")
        assert seen[0] != seen[1]
        assert stores(seen[0]) == stores(seen[1])  # type: ignore[arg-type]
    for what in native:
        assert other[what] == native[what], what


# A kernel whose timer interrupts at every other prime number of instructions, whatever it does.
TICKING = f"""
        mov eax, isr
        mov [IDT + 0x80 * 8], ax
        shr eax, 16
        mov [IDT + 0x80 * 8 + 6], ax
        mov dword [APIC + {apic.DIVIDE:#x}], 0xB
        mov dword [APIC + {apic.LVT_TIMER:#x}], 0x20080
        mov dword [TIMER], PERIOD
        cld
        sti
"""
ISR = f"""
        jmp stop
isr:    inc dword [DATA + 0x100]
        add esi, [EXACT + 0x10]
        mov dword [APIC + {apic.EOI:#x}], 0
        iretd
"""
REGISTERS = ("eax", "ebx", "edx", "ebp")


def random_access(random: Random) -> str:
    """An instruction, or a few, that reach the device."""
    register, at = random.choice(REGISTERS), f"[EXACT + {random.randrange(64)}]"
    narrow = {"eax": "al", "ebx": "bl", "edx": "dl", "ebp": "bp"}[register]
    forms = (
        f"mov {at}, {register}", f"mov {register}, {at}", f"add {at}, {register}", f"sub {register}, {at}",
        f"mov {at}, {narrow}", f"mov {narrow}, {at}", f"xchg {at}, {register}", f"lock xadd {at}, {register}",
        f"inc dword {at}", f"neg word {at}", f"shl byte {at}, 3", f"push dword {at}\n pop {register}",
        f"push {register}\n pop dword {at}", f"cmp {register}, {at}\n sete {at}", f"imul {register}, {at}",
        f"movzx {register}, byte {at}", f"bts dword {at}, {random.randrange(32)}",
        f"mov ecx, {random.randrange(5)}\n lea edi, {at}\n rep stosd",
        f"mov ecx, {random.randrange(5)}\n lea edi, {at}\n mov esi, DATA\n rep movsb",
        f"mov ecx, {random.randrange(5)}\n lea esi, {at}\n mov edi, DATA\n rep movsd",
        f"inc {register}\n imul {register}, {register}, {random.randrange(2, 999)}",
        f"call [table]\n mov {register}, {at}", f"test {register}, {at}\n jz $ + 2",
    )  # fmt: skip
    return random.choice(forms)


@pytest.mark.parametrize("seed", range(4))
def test_any_program_is_interrupted_at_the_same_instruction(seed: int) -> None:
    """Random accesses, and a timer that never waits: in every mode each access and interrupt is where it is bare."""
    random = Random(seed)
    body = "\n".join(random_access(random) for _ in range(80))
    source = TICKING.replace("PERIOD", str(random.choice((61, 89, 127, 173)))) + body + ISR + STOP
    source += "\ndouble: add eax, eax\n ret\ntable: dd double\n"
    runs = {way: run(source, way, 4000) for way in WAYS}
    assert runs["native"].made.read(DATA + 0x100) > 10  # ticks
    results = {way: compared(*ran) for way, ran in runs.items()}
    native = results["native"]
    assert len(native["seen"]) > 100  # type: ignore[arg-type]
    for way, result in results.items():
        for what, value in native.items():
            assert result[what] == value, f"{way}: {what}"


FOUND = {
    "loads and stores of each width": [
        (1, "write", 0, 4, 0x11223344), (2, "write", 1, 1, 0x55), (3, "write", 2, 2, 0x6677), (4, "read", 3, 1, 0x66),
        (5, "read", 0, 2, 0x5544), (6, "read", 1, 1, 0x55), (7, "read", 0, 4, 0x66775544),
        (8, "write", 8, 1, 0x44), (9, "write", 12, 2, 0x5544), (10, "write", 16, 4, 0x66775544),
    ],
    "stack operands": [
        (1, "write", 0, 4, 0x1234), (2, "read", 0, 4, 0x1234), (3, "write", 4, 4, 0x1234), (4, "read", 2, 2, 0),
        (5, "write", 8, 2, 0),
    ],
    "across the end of the page": [
        (1, "read", 0xFFC, 4, 0),
        (2, "write", 0xFFD, 1, 0x78), (2, "write", 0xFFE, 1, 0x56), (2, "write", 0xFFF, 1, 0x34),
        (3, "read", 0xFFC, 4, 0x34567800), (4, "read", 0, 4, 0),
        (5, "write", 0, 1, 0x43), (5, "write", 1, 1, 0x65), (5, "write", 2, 1, 0x87), (6, "read", 0, 4, 0x876543),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_an_access_arrives_once_and_at_its_instruction(name: str) -> None:
    """As its number of instructions says, itself among the retired ones; it is cut off at the end of a page."""
    made, device, _ = run(PROGRAMS[name] + STOP, "native")
    assert device.seen == FOUND[name]
    if name == "across the end of the page":  # past it is an empty bus
        assert (made.reg("eax"), made.reg("ecx")) == (0xFFFF0000, 0x0000FFFF)


@pytest.mark.parametrize("way", WAYS)
def test_an_interrupt_that_a_store_causes_comes_before_the_next_instruction(way: str) -> None:
    """A message to itself, and a timer that is due four instructions later, inside a block, are exact."""
    made, _, _ = run(PROGRAMS["a message, and what comes right after it"] + STOP, way)
    assert (made.vector, made.reg("ebx")) == (0x80, 0)
    made, _, _ = run(PROGRAMS["the timer, due within a block"] + STOP, way)
    assert (made.vector, made.reg("ebx")) == (0x80, 4)


@pytest.mark.parametrize("way", WAYS)
def test_an_access_while_nothing_is_counted(way: str) -> None:
    """By the wall clock the CPU runs uncounted until the first access, which needs it stopped."""
    source = "mov dword [EXACT], 7\n inc dword [EXACT]\n add eax, [EXACT]\n cli\n hlt"
    devices: list[Exact] = []

    def with_device(machine: Machine) -> Control:
        devices.append(Exact(machine))
        machine.memory.devices.attach(EXACT, devices[0])
        return attach(way)(machine)

    made = lab(NAMES + source, attach=with_device, model="pc", clock=HostClock())
    assert made.machine.run(None, free=True).kind == "halt"
    assert made.reg("eax") == 8 and [entry[1:] for entry in devices[0].seen] == [
        ("write", 0, 4, 7),
        ("read", 0, 4, 7),
        ("write", 0, 4, 8),
        ("read", 0, 4, 8),
    ]


@pytest.mark.parametrize("way", WAYS)
def test_a_timer_counts_instructions(way: str) -> None:
    """One count is ten nanoseconds, and so is an instruction."""
    made, _, _ = run(PROGRAMS["the timer, counted"] + STOP, way)
    assert (made.reg("eax"), made.reg("ebx")) == (999, 996)


@pytest.mark.parametrize("way", WAYS)
def test_the_local_apic_can_be_moved_and_switched_off(way: str) -> None:
    """By its MSR, whose reserved bits fault; at the old address is an empty bus then, and off is off until reset."""
    made, _, _ = run(PROGRAMS["the address moved"] + STOP, way)
    assert made.data(DATA, 4) == (0xFEE00900).to_bytes(4, "little")
    assert (made.reg("esi"), made.reg("edi")) == (0xFFFFFFFF, 0xFFFFFFFF)
    assert made.reg("ebp") == 0xFFFFFFFF and made.reg("eax") == 0xFEE00100
    assert not made.reg("edx") & 1 << 9  # CPUID's
    made, _, _ = run(PROGRAMS["the address refused"] + STOP, way)
    assert made.vector == Vector.GP


@pytest.mark.parametrize("way", WAYS)
def test_the_local_apic_hides_the_io_apic_and_memory_hides_it(way: str) -> None:
    """Where the two meet the processor's own comes first, and moving on uncovers the other; RAM stays RAM."""
    made, _, _ = run(PROGRAMS["the address moved over other things"] + STOP, way)
    found = [made.reg(name) for name in ("esi", "edi", "ebp", "ebx")]
    assert found == [apic.VERSION, 7, ioapic.VERSION, apic.VERSION] and made.read(0x1F0080) == 7


def test_the_small_pc_has_none_of_it() -> None:
    """Without the chipset the page is empty, CPUID tells of no APIC, and its MSR is not there."""
    made = lab(NAMES + "mov eax, 1\n cpuid\n mov ebx, [TPR]\n mov ecx, 0x1B\n rdmsr" + STOP)
    made.run(100)
    assert (made.reg("edx") >> 9 & 1, made.reg("ebx"), made.vector) == (0, 0xFFFFFFFF, Vector.GP)


def test_there_is_room_for_so_many_devices() -> None:
    """One more than the engine's window has pages for is refused, in words."""
    memory = DeviceMemory()
    for number in range(WINDOW_PAGES):
        memory.attach(EXACT + number * PAGE, Nothing())
    with pytest.raises(ValueError, match="there is room for 4 devices"):
        memory.attach(EXACT - PAGE, Nothing())


class Nothing:
    """A device of which nothing is asked."""

    def read(self, offset: int, size: int) -> int:
        raise AssertionError("never read")

    def write(self, offset: int, size: int, value: int) -> None:
        raise AssertionError("never written")
