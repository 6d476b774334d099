"""IN and OUT: permission, and that an access which stops the guest stops it exactly there.

Nothing that the engine offers ends a block at a port instruction, so what follows one is where it could go
wrong: each kind of next instruction must be seen to do nothing before its time, and everything once afterwards.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.machines import DATA, STACK, TSS, Lab, handler, lab, run
from vmm.isa.descriptors import SystemType
from vmm.isa.vectors import Vector
from vmm.isa.words import EFlags

MODES = ("native", "trap")
PORT = 0x300  # of the test's own device
IRQ, IRQ_VECTOR = 3, 0x0B  # as firmware leaves the PIC
MANY = settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))


@dataclass
class Device:
    """Remembers its accesses, and raises its interrupt at the access with number `at`."""

    made: Lab
    at: int = -1
    log: list[tuple[str, int, int, int]] = field(default_factory=list)

    def _access(self, *what: object) -> None:
        self.log.append(what)  # type: ignore[arg-type]
        if len(self.log) - 1 == self.at:
            self.made.machine.devices.pics.set_irq(IRQ, True)

    def read(self, offset: int, size: int) -> int:
        self._access("in", offset, size, 0)
        return 0x44332211 + len(self.log) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        self._access("out", offset, size, value)


def with_device(made: Lab, at: int = -1) -> Device:
    """Put a device at `PORT`, whose interrupt the PIC lets through."""
    device = Device(made, at)
    made.machine.bus.attach(PORT, 8, device, "the test's", width=4)
    made.machine.bus.write(0x21, 1, ~(1 << IRQ) & 0xFF)
    return device


# What may follow. Registers: EBX and ESI count, ECX is a value, EDX the port.
FOLLOWERS = {
    "a register": "inc ebx",
    "a load": "add ebx, [DATA]",
    "a store": "mov [DATA], ecx",
    "a read-modify-write": "inc dword [DATA]",
    "a store to another page": "mov [DATA + 0x5000], ecx",
    "a push": "push ecx",
    "a pop": "pop ebx",
    "an exchange": "xchg ecx, [DATA]",
    "a string store": "stosd",
    "an x87 store": "fld1\n fstp dword [DATA]",
    "another OUT": "out dx, al",
    "an IN": "in eax, dx",
    "two INs and an OUT": "in al, dx\n out dx, eax\n in ax, dx",
    "a call": "call there\n inc ebx\nthere:  inc esi",
    "a jump": "jmp there\n inc ebx\nthere:  inc esi",
    "flags": "adc ebx, 0\n pushfd",
    "CPUID": "mov eax, 1\n push ebx\n cpuid\n pop ebx",
    "a fault": "ud2",
    "an INT": "int 0x41",
    "an OUTS": "mov esi, DATA\n outsd",
    "a segment load": "push es\n pop ds",
}
SETUP = "mov eax, 0x11223344\n mov ecx, 0x55667788\n mov edx, 0x304\n mov edi, DATA + 0x40\n cmp eax, ecx"
WARM = "mov [DATA], eax\n mov [DATA + 0x5000], eax\n mov ebx, [DATA]\n push eax\n mov [DATA + 0x40], eax"
TAIL = "done:   int 0x40"


def _effects(made: Lab, device: Device) -> dict[str, object]:
    """All that the next instruction could have changed."""
    names = ("eax", "ebx", "ecx", "esi", "edi", "ds")
    return {
        "registers": {name: made.registers[name] for name in names},
        "data": made.data(DATA, 0x6000),
        "pushed": made.data(STACK - 64, 64),
        "user pushed": made.data(0x98000 - 64, 64),
        "ports": list(device.log),
    }


def _scene(ring: str, port_instruction: str, follower: str, warm: bool) -> str:
    return "\n".join(
        (ring, SETUP, WARM if warm else "", f"there_it_is: {port_instruction}", "next_one:", follower, TAIL)
    )


WARMTH = pytest.mark.parametrize("warm", (False, True), ids=("cold TLB", "warm TLB"))
FOLLOWER = pytest.mark.parametrize("follower", FOLLOWERS)
MODE = pytest.mark.parametrize("mode", MODES)


@dataclass(frozen=True)
class Event:
    """A port instruction at which the guest is stopped. `kind`: refused, exit, or interrupt."""

    kind: str
    instruction: str
    ring: str = ""


EVENTS = {
    "a refused OUT": Event("refused", "out 0x80, al", "to_user"),
    "a refused IN": Event("refused", "in al, 0x80", "to_user"),
    "a refused 32-bit OUT": Event("refused", "out 0x80, eax", "to_user"),
    "isa-debug-exit": Event("exit", "out 0xF4, al"),
    "an OUT that interrupts": Event("interrupt", "out dx, al", "sti"),
    "an IN that interrupts": Event("interrupt", "in eax, dx", "sti"),
    "an OUT to the PIC that lets one through": Event("unmask", "out 0x21, al", "sti"),
}


def _prepare(event: Event, program: str, mode: str, returns: bool) -> tuple[Lab, Device]:
    """The scene, whose handlers loop, or return behind the port instruction."""
    bitmap = bytearray(b"\xff" * 0x80)
    bitmap[PORT // 8] = 0  # ring 3 may reach the device, and nothing else
    memory = [(TSS + 0x68, bytes(bitmap))]
    if returns:
        skip = bytes.fromhex("83c404 83042402 cf")  # add esp, 4; add dword [esp], 2; iretd
        acknowledge = bytes.fromhex(
            "50 b020 e620 58 cf"
        )  # push eax; mov al, 0x20; out 0x20, al; pop eax; iretd
        memory += [(handler(Vector.GP), skip), (handler(IRQ_VECTOR), acknowledge)]
    made = lab(program, mode, memory=memory, task=(0xE7, SystemType.TSS32_AVAILABLE))
    device = with_device(made, 0 if event.kind == "interrupt" else -1)
    if event.kind == "unmask":
        made.machine.bus.write(0x21, 1, 0xFF)
        made.machine.devices.pics.set_irq(IRQ, True)
    return made, device


@MODE
@WARMTH
@FOLLOWER
@pytest.mark.parametrize("name", EVENTS)
def test_a_port_access_that_stops_the_guest_stops_it_there(
    name: str, follower: str, warm: bool, mode: str
) -> None:
    """Nothing of what follows the port instruction has happened when the guest is stopped, and all of it once after.

    The frame, or EIP after isa-debug-exit, is exactly at the instruction (refused) or behind it (done).
    """
    event = EVENTS[name]
    program = _scene(event.ring, event.instruction, FOLLOWERS[follower], warm)
    before, device_before = _prepare(event, program, mode, returns=False)
    before.run_to("there_it_is")
    expected = _effects(before, device_before)

    made, device = _prepare(event, program, mode, returns=False)
    outcome = made.run(500)
    found = _effects(made, device)
    if event.kind == "exit":
        assert (outcome.kind, outcome.status) == ("exit", 0x44 << 1 | 1)
        assert made.machine.state.eip == made.symbol("next_one")
        assert found == expected
        made.run(made.retired + 500)
    elif event.kind == "refused":
        assert made.vector == Vector.GP
        assert made.stack(2) == [0, made.symbol("there_it_is")]
        assert found == expected
    else:
        assert made.vector == IRQ_VECTOR
        assert made.stack(1) == [made.symbol("next_one")]
        if event.kind == "interrupt":
            kind, size = ("in", 4) if event.instruction.startswith("in") else ("out", 1)
            expected["ports"] = [(kind, 4, size, 0x44 if kind == "out" else 0)]
        if event.instruction.startswith("in"):
            expected["registers"]["eax"] = 0x44332211  # type: ignore[index]
        for key in ("registers", "data", "ports", "user pushed"):
            assert found[key] == expected[key]

    # The same with the port instruction out of the way: what must have happened in the end.
    end, device_end = (made, device) if event.kind == "exit" else _prepare(event, program, mode, returns=True)
    end.run(end.retired + 500)
    plain = "nop" if event.kind in ("refused", "exit") else event.instruction
    reference, device_reference = _prepare(
        Event("none", plain), _scene(event.ring, plain, FOLLOWERS[follower], warm), mode, returns=True
    )
    reference.run(500)
    assert end.vector == reference.vector
    for key in ("registers", "data", "ports"):
        ours, theirs = _effects(end, device_end)[key], _effects(reference, device_reference)[key]
        assert ours == theirs, key


# Permission


def test_io_privilege_lets_a_process_reach_ports() -> None:
    """In ring 3 with IOPL 3 no bitmap is looked at; with IOPL 2 it is."""
    for iopl, vector in ((3, 0x40), (2, Vector.GP)):
        made = run(f"to_ring USER_CODE, USER_DATA, {iopl << 12 | 2:#x}\n in al, 0x80\n int 0x40", limit=30)
        assert made.vector == vector


def test_virtual_8086_mode_asks_the_bitmap_whatever_iopl_is() -> None:
    """In virtual-8086 mode IOPL 3 does not open a port that the bitmap closes."""
    flags = EFlags.VM | EFlags.IOPL | EFlags.ONE
    frame = "\n".join(f"push dword {value:#x}" for value in (0, 0, 0, 0, 0x1000, 0x800, flags, 0x700, 0))
    for bitmap, vector in ((b"\xff" * 32, Vector.GP), (bytes(32), 0x40)):
        made = run(
            f"{frame}\n iretd",
            memory=((0x7000, b"\xe4\x80\xcd\x40"), (TSS + 0x66, b"\x68\0" + bitmap)),
            task=(0x87, SystemType.TSS32_AVAILABLE),
            limit=20,
        )
        assert made.vector == vector


def _manual_allows(limit: int, base: int, bitmap: bytes, port: int, size: int) -> bool:
    """SDM volume 1, 18.5.2: two bytes of the map are read; what lies past the TSS's limit counts as set."""
    tss = bytes(base) + bitmap + bytes(0x3000)
    if base + port // 8 + 1 > limit:
        return False
    return not any(tss[base + p // 8] >> (p % 8) & 1 for p in range(port, port + size))


@MODE
@MANY
@given(
    st.integers(0x67, 0x90),
    st.integers(0x68, 0x80),
    st.binary(min_size=16, max_size=16).map(lambda noise: bytes(a & 0x55 if a & 2 else 0 for a in noise)),
    st.integers(0, 200),
    st.sampled_from((1, 2, 4)),
    st.booleans(),
)
@example(0x78, 0x68, bytes(16), 0x7F, 1, False)
@example(0x79, 0x68, bytes(16), 0x7F, 1, False)
@example(0x90, 0x68, b"\xff" + bytes(15), 7, 1, True)
@example(0x90, 0x68, b"\x7f\x01" + bytes(14), 7, 1, True)
@example(0x90, 0x68, b"\x7f\x01" + bytes(14), 7, 2, True)
def test_the_io_bitmap_is_the_manuals(
    mode: str, limit: int, base: int, bitmap: bytes, port: int, size: int, out: bool
) -> None:
    """A process reaches exactly those ports that the TSS's bitmap and limit open, each byte of the access."""
    opcode = (0xEC if size == 1 else 0xED) + 2 * out
    code = f"to_user\n mov edx, {port}\n db {', '.join(['0x66'] * (size == 2) + [str(opcode)])}\n int 0x40"
    made = run(
        code,
        mode,
        memory=((TSS + 0x66, struct.pack("<H", base)), (TSS + base, bitmap)),
        task=(limit, SystemType.TSS32_AVAILABLE),
        limit=30,
    )
    assert made.vector == (0x40 if _manual_allows(limit, base, bitmap, port, size) else Vector.GP)


def test_a_16_bit_tss_or_none_opens_no_port() -> None:
    """Without a 32-bit TSS of at least 104 bytes a process reaches no port."""
    for task in ((0x90, SystemType.TSS16_AVAILABLE), (0x66, SystemType.TSS32_AVAILABLE)):
        made = run(
            "to_user\n in al, 0x80\n int 0x40",
            memory=((TSS + 0x66, b"\0\0"), (TSS + 2, struct.pack("<HH", 0x9800, 0x10))),
            task=task,
            limit=30,
        )
        assert made.vector == Vector.GP


@MODE
@pytest.mark.parametrize("size", (1, 2, 4))
@pytest.mark.parametrize("immediate", (False, True))
def test_every_form_reaches_the_bus_with_its_width(size: int, immediate: bool, mode: str) -> None:
    """IN and OUT by DX and by immediate: port, width and value are the instruction's, other bits of EAX stay."""
    port = 0xC0 if immediate else PORT + 2
    prefix = "db 0x66\n" if size == 2 else ""
    forms = {(1, False): ("0xec", "0xee"), (1, True): ("0xe4, 0xc0", "0xe6, 0xc0"),
             (4, False): ("0xed", "0xef"), (4, True): ("0xe5, 0xc0", "0xe7, 0xc0")}  # fmt: skip
    in_, out = forms[size if size != 2 else 4, immediate]
    made = lab(f"mov edx, {port}\n mov eax, 0xAABBCCDD\n {prefix} db {out}\n {prefix} db {in_}\n hlt", mode)
    device = Device(made)
    made.machine.bus.attach(PORT, 8, device, "the test's", width=4)
    made.machine.bus.attach(0xC0, 8, device, "the test's", width=4)
    made.run()
    mask = (1 << 8 * size) - 1
    offset = 0 if immediate else 2
    assert device.log == [("out", offset, size, 0xAABBCCDD & mask), ("in", offset, size, 0)]
    assert made.reg("eax") == 0xAABBCCDD & ~mask | 0x44332212 & mask


@MODE
def test_debug_exit_gives_qemus_status(mode: str) -> None:
    """isa-debug-exit ends the run with value << 1 | 1."""
    for value in (0, 1, 0x10, 0x7F):
        outcome = lab(f"mov eax, {value}\n out 0xF4, al\n hlt", mode).run()
        assert (outcome.kind, outcome.status) == ("exit", value << 1 | 1)
