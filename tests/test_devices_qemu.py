"""All devices on one bus against QEMU's: the same port accesses, the same answers.

A script of port accesses runs on our bus, and as a multiboot guest on QEMU, which prints each answer to
its debug console. Only what does not depend on time is compared, and not where QEMU is known to differ
from the data sheets; each such mask says why.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from random import Random

from tests.oracles import require
from vmm.machine.bus import PortBus
from vmm.machine.devices import firmware
from vmm.machine.devices.disk import SECTOR
from vmm.machine.devices.i8042 import I8042
from vmm.machine.devices.ide import Ide
from vmm.machine.devices.identify import default_geometry
from vmm.machine.devices.keyboard import Keyboard
from vmm.machine.devices.pic import PicPair
from vmm.machine.devices.pit import Pit, SpeakerPort
from vmm.machine.devices.rtc import Rtc
from vmm.machine.devices.system import A20Gate, DebugConsole, DebugExit, Port92
from vmm.machine.devices.uart import Uart
from vmm.machine.devices.vga import Crtc

MEMORY = 64 << 20
BUSY = 0x100  # in place of a mask: read until bit 7 is clear, which takes QEMU's disk time, and compare nothing

# A step is (port, byte to write) or (port, None, mask of the bits of a read to compare).
Step = tuple[int, int] | tuple[int, None, int]


def read(port: int, mask: int = 0xFF) -> Step:
    return (port, None, mask)


class Pattern:
    """A disk, and in `content` what is on it: each sector its own number."""

    sectors, writable = 2016, True
    content = b"".join(number.to_bytes(4, "little") * (SECTOR // 4) for number in range(sectors))

    def __init__(self) -> None:
        self._bytes = bytearray(self.content)

    def read(self, sector: int, count: int) -> bytes:
        return bytes(self._bytes[sector * SECTOR : (sector + count) * SECTOR])

    def write(self, sector: int, data: bytes) -> None:
        self._bytes[sector * SECTOR : sector * SECTOR + len(data)] = data

    def flush(self) -> None:
        pass


def board() -> PortBus:
    """Every device where a PC has it, as its firmware leaves it. Time stands still."""

    def clock() -> int:
        return 0

    bus, pic = PortBus(), PicPair(lambda level: None)
    pit = Pit(pic.line(0), clock)
    crtc, gate = Crtc(), A20Gate(lambda level: None)
    bus.attach(0x20, 2, pic.master, "master PIC")
    bus.attach(0xA0, 2, pic.slave, "slave PIC")
    bus.attach(0x4D0, 2, pic.elcr, "ELCR")
    bus.attach(0x40, 4, pit, "timer")
    bus.attach(0x61, 1, SpeakerPort(pit, clock), "speaker")
    rtc_chip = Rtc(pic.line(8), clock, MEMORY)
    rtc_chip.describe_disk(default_geometry(Pattern.sectors))
    bus.attach(0x70, 2, rtc_chip, "clock")
    bus.attach(0x92, 1, Port92(gate, lambda: None), "port 92")
    controller = I8042(pic.line(1), pic.line(12), Keyboard(), gate, lambda: None)
    bus.attach(0x60, 1, controller.data, "keyboard data")
    bus.attach(0x64, 1, controller, "keyboard")
    bus.attach(0xE9, 1, DebugConsole(lambda data: None), "debug console")
    ide = Ide(pic.line(14), Pattern())
    bus.attach_data(0x1F0, ide.data, "disk data")
    bus.attach(0x1F1, 7, ide, "disk")
    bus.attach(0x3F6, 1, ide.control, "disk control")
    bus.attach(0xF4, 4, DebugExit(lambda value: None), "debug exit", width=4)
    bus.attach(0x3F8, 8, Uart(pic.line(4), lambda data: None), "COM1")
    bus.attach(0x3D4, 2, crtc, "CRTC")
    bus.attach(0x3DA, 1, crtc.status, "VGA status")
    for port, value in firmware.WRITES:
        bus.write(port, 1, value)
    return bus


def ours(steps: list[Step]) -> list[int]:
    bus, answers = board(), []
    for step in steps:
        if step[1] is None:
            answers.append(bus.read(step[0], 1) & step[2])
        else:
            bus.write(step[0], 1, step[1])
    return answers


GUEST = """
bits 32
org 0x100000
header: dd 0x1BADB002, 0x00010000, -(0x1BADB002 + 0x00010000), header, 0x100000, 0, 0, start
start:  cli
        mov esi, script
next:   movzx edx, word [esi]       ; port, byte, what to do: 0 end, 1 write, 2 read, 3 read until bit 7 is clear
        mov al, [esi + 2]
        mov cl, [esi + 3]
        add esi, 4
        cmp cl, 1
        jb done
        ja input
        out dx, al
        jmp next
input:  in al, dx
        test al, al
        jns output
        cmp cl, 3
        je input
output: out 0xE9, al
        jmp next
done:   mov al, 0
        out 0xF4, al
        hlt
script:
"""


def kind(step: Step) -> int:
    """What the guest has to do for a step."""
    if step[1] is not None:
        return 1
    return 3 if step[2] == BUSY else 2


def theirs(steps: list[Step], folder: Path) -> list[int]:
    nasm, qemu = require("nasm"), require("qemu-system-i386")
    rows = [f"dw {s[0]:#x}\ndb {s[1] or 0:#x}, {kind(s)}" for s in steps]
    source, image = folder / "script.asm", folder / "script.bin"
    source.write_text(GUEST + "\n".join(rows) + "\ndd 0\n")
    subprocess.run([nasm, "-f", "bin", source, "-o", image], check=True, timeout=60)
    command = [qemu, "-kernel", str(image), "-m", str(MEMORY >> 20), "-display", "none", "-no-reboot"]
    disk = folder / "disk.img"
    disk.write_bytes(Pattern.content)
    command += ["-drive", f"file={disk},format=raw,if=ide"]
    command += ["-debugcon", "stdio", "-serial", "null", "-monitor", "none", "-net", "none"]
    command += ["-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-rtc", "base=2000-01-01T00:00:00"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False)
    assert done.returncode == 1, done.stderr.decode()
    reads = [step for step in steps if step[1] is None]
    assert len(done.stdout) == len(reads)
    return [byte & step[2] for byte, step in zip(done.stdout, reads, strict=True)]


def indexed(index: int, data: int, at: int) -> list[Step]:
    return [(index, at), read(data)]


def as_found() -> list[Step]:
    """What firmware has left."""
    steps = [read(port) for port in (0x21, 0xA1, 0x4D0, 0x92, 0xE9, 0xF4, 0x70, 0x80, 0x2FD)]
    # Not the second ELCR, where QEMU's firmware has its PCI interrupts.
    steps += [(0x43, 0xE2), read(0x40, 0x3F)]
    steps += [(0x64, 0x20), read(0x60, 0x63), read(0x64, 0x35)]
    steps += [read(0x3F8 + offset) for offset in range(1, 8)]
    for at in (0x0A, 0x0B, 0x0D, 0x15, 0x16, 0x17, 0x18, 0x30, 0x31, 0x32, 0x34, 0x35):
        # The date is today's, but not UIP: time runs there.
        steps += [(0x70, at), read(0x71, 0x7F if at == 0x0A else 0xFF)]
    # Not 0x10: QEMU has a floppy drive.
    for at in (0x11, 0x12, 0x19, 0x1A, *range(0x1B, 0x24)):
        steps += indexed(0x70, 0x71, at)
    for at in (0x06, 0x07, 0x08, 0x09):
        steps += indexed(0x70, 0x71, at)
    return steps


def pic(random: Random) -> list[Step]:
    """Initialization and masks; no line moves with all of them masked."""
    steps: list[Step] = [(0x43, 0x30)]
    for _ in range(60):
        base = random.choice((0x20, 0xA0))
        icw4 = random.choice((1, 3, 0x11))
        what = random.choice(("icw", "mask", "read", "eoi", "elcr"))
        if what == "icw":
            steps += [(base, 0x11), read(base + 1), (base + 1, 0x40), (base + 1, 4), (base + 1, icw4)]
            steps += [(base + 1, 0xFF)]
        elif what == "mask":
            mask = random.randrange(256)
            steps += [(base + 1, mask), read(base + 1), (base + 1, 0xFF)]
        elif what == "read":
            steps += [(base, 0x0B), read(base), (base, 0x0A)]
        elif what == "eoi":
            steps += [(base, random.choice((0x20, 0xA0, 0x60, 0xC3, 0xE5, 0x80, 0x00)))]
        else:
            port = random.choice((0x4D0, 0x4D1))
            steps += [(port, random.randrange(256)), read(port), (port, 0)]
    return steps


def waiting(steps: list[Step]) -> bool:
    """Whether, after these steps, the serial port has a byte to read."""
    return bool(ours([*steps, read(0x3FD)])[-1] & 1)


def uart(random: Random) -> list[Step]:
    """Registers, FIFOs and interrupt causes, all in loopback."""
    com1 = 0x3F8
    steps: list[Step] = [(com1 + 4, 0x10), (com1 + 2, 0), (com1 + 3, 3), read(com1), read(com1 + 5)]
    for _ in range(250):
        what = random.choice(("send", "send", "receive", "lsr", "iir", "ier", "fcr", "lcr", "mcr", "scratch"))
        byte = random.randrange(256)
        if what == "send":
            steps += [(com1, byte)]
        elif what == "receive":
            # What an empty receiver reads as is not defined.
            steps += [read(com1 + 5), read(com1)] if waiting(steps) else [read(com1 + 5)]
        elif what == "lsr":
            steps += [read(com1 + 5)]
        elif what == "iir":
            steps += [read(com1 + 2)]
        elif what == "ier":
            # Without modem status, whose deltas QEMU does not give in loopback.
            steps += [(com1 + 1, byte & 0x07), read(com1 + 1)]
        elif what == "fcr":
            # Trigger level 1: above it, QEMU's time-out needs time.
            steps += [(com1 + 2, random.choice((0x00, 0x01, 0x03, 0x07)))]
        elif what == "lcr":
            steps += [
                (com1 + 3, 0x83),
                (com1, byte),
                (com1 + 1, 0),
                read(com1),
                read(com1 + 1),
                (com1 + 3, 3),
            ]
        elif what == "mcr":
            steps += [(com1 + 4, 0x10 | byte & 0x0F), read(com1 + 4), read(com1 + 6, 0xF0)]
        else:
            steps += [(com1 + 7, byte), read(com1 + 7)]
    return steps


def rtc(random: Random) -> list[Step]:
    """CMOS memory, and the time set and read back in every format while it is held."""
    steps: list[Step] = []
    for _ in range(20):
        at, byte = random.randrange(0x40, 0x80), random.randrange(256)
        steps += [(0x70, at), (0x71, byte), *indexed(0x70, 0x71, at)]
    for b in (0x82, 0x86, 0x80, 0x84):
        steps += [(0x70, 0x0B), (0x71, b), *indexed(0x70, 0x71, 0x0B)]
        binary = b & 4
        for at, low, high in ((0, 0, 59), (2, 0, 59), (4, 1, 11), (7, 1, 28), (8, 1, 12), (9, 0, 99)):
            value = random.randint(low, high)
            steps += [(0x70, at), (0x71, value if binary else int(str(value), 16))]
        # The seconds are read last and time is let go for the rest of that second.
        steps += [step for at in (9, 8, 7, 4, 2, 0) for step in indexed(0x70, 0x71, at)]
    return steps


def small(random: Random) -> list[Step]:
    """The timer's control words, the speaker's bits, the CRTC's cursor and start registers."""
    steps: list[Step] = []
    for _ in range(20):
        counter, mode, access = random.randrange(3), random.randrange(6), random.randint(1, 3)
        steps += [(0x43, counter << 6 | access << 4 | mode << 1), (0x43, 0xE0 | 2 << counter)]
        steps += [read(0x40 + counter, 0x3F)]
        steps += [(0x61, random.randrange(4)), read(0x61, 0x03)]
        at = random.randint(0x0C, 0x0F)
        steps += [(0x3D4, at), read(0x3D4), (0x3D5, random.randrange(256)), read(0x3D5)]
    return steps


def ide(random: Random) -> list[Step]:
    """Reset, and commands without data, each with what is in the registers after it. `disk.asm` has the data."""
    base = 0x1F0
    # QEMU's reset leaves selected what firmware last looked for, device 1.
    steps: list[Step] = [(base + 6, 0xA0), (0x3F6, 0x02), (0x3F6, 0x06), (0x3F6, 0x02), read(0x3F6, BUSY)]
    steps += [read(base + at) for at in range(1, 8)]

    def command(code: int, count: int, number: int, features: int = 0) -> list[Step]:
        places = [(base + 3 + at, number >> 8 * at & 0xFF) for at in range(3)]
        device = [(base + 6, 0xE0 | number >> 24)]
        return [(base + 1, features), (base + 2, count), *places, *device, (base + 7, code), read(0x3F6, BUSY)]

    for _ in range(10):
        number = random.randrange(2000)
        what = random.choice(("verify", "seek", "set", "features", "flush", "unknown", "power", "place"))
        if what == "verify":
            steps += command(0x40, 4, number)
        elif what == "seek":
            steps += command(random.choice((0x70, 0x10)), 1, number)
        elif what == "set":
            steps += command(0xC6, random.choice((1, 2, 4, 8, 16, 3)), number)
        elif what == "features":
            steps += command(0xEF, 0x0B, number, random.choice((0x03, 0x02, 0x82, 0xAA, 0x55, 0x77)))
        elif what == "flush":
            steps += command(0xE7, 0, number)
        elif what == "power":
            steps += [*command(0xE5, 0, number), read(base + 2)]
        elif what == "unknown":
            steps += command(random.choice((0x00, 0xA1, 0xFF)), 1, number)
        else:
            values = [random.randrange(256) for _ in range(4)]
            steps += [(base + 2 + at, value) for at, value in enumerate(values)]
            steps += [read(base + 2 + at) for at in range(4)]
        # DRDY, DRQ and ERR: QEMU has no seek to be complete with after an error.
        steps += [read(base + 7, 0xC9), read(base + 1, 0x04)]
    return steps


def keyboard(random: Random) -> list[Step]:
    """The controller's commands and the keyboard's, translated or not, each answer with the status before it."""
    steps: list[Step] = [(0x64, 0xAD), (0x64, 0xA7), (0x64, 0x60), (0x60, 0x34)]
    steps += [read(0x60, 0)] * 4

    def answer(count: int, mask: int = 0xFF) -> list[Step]:
        # Not the status' "last was a command", which QEMU keeps.
        return [read(0x64, 0x35), read(0x60, mask)] * count + [read(0x64, 0x35)]

    one, two = random.randrange(256), random.randrange(256)
    steps += [(0x64, 0x20), *answer(1), (0x64, 0xAA), *answer(1), (0x64, 0xAB), *answer(1)]
    steps += [(0x64, 0xA9), *answer(1), (0x64, 0xC0), *answer(1)]
    steps += [(0x64, 0xD2), (0x60, one), *answer(1), (0x64, 0xD3), (0x60, two), *answer(1)]
    # A20 stays open: the guest lies above it.
    steps += [(0x64, 0xD1), (0x60, 0xCF), (0x64, 0xD0), *answer(1, 0x0F), read(0x92, 0x02)]
    for on, off in ((0xAE, 0xAD), (0xA8, 0xA7)):
        for command in (on, off):
            steps += [(0x64, command), (0x64, 0x20), *answer(1)]
    for translate in (0x00, 0x40):
        steps += [(0x64, 0x60), (0x60, 0x24 | translate)]
        steps += [(0x60, 0xEE), *answer(1), (0x60, 0xF2), *answer(3), (0x60, 0xF5), *answer(1)]
        steps += [(0x60, 0xED), *answer(1), (0x60, 0x02), *answer(1), (0x60, 0xF3), *answer(1)]
        steps += [(0x60, 0x20), *answer(1), (0x60, 0xF0), *answer(1), (0x60, 0x00), *answer(2)]
        steps += [(0x60, 0xF6), *answer(1), (0x60, 0xF4), *answer(1), (0x60, 0x99), *answer(1)]
        steps += [(0x60, 0xFF), *answer(2)]  # and not 0xFE, resend, which QEMU's keyboard does not know
    return steps


def test_qemu_answers_the_same(tmp_path: Path) -> None:
    """What is not a matter of time reads on our bus, access for access, as it does on QEMU's `pc`."""
    random = Random(1)
    steps = as_found()
    for part in (pic, uart, rtc, small, ide, keyboard):
        steps += part(random)
    expected, found = theirs(steps, tmp_path), ours(steps)
    reads = [index for index, step in enumerate(steps) if step[1] is None]
    wrong = [
        f"QEMU {e:#04x}, ours {f:#04x} at the end of {steps[max(0, at - 5) : at + 1]}"
        for at, e, f in zip(reads, expected, found, strict=True)
        if e != f
    ]
    assert not wrong, f"{len(wrong)} of {len(reads)}:\n" + "\n".join(wrong[:10])
