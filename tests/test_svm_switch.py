"""Several guests on one processor, in turns: each comes to what it comes to alone, and sees nothing of the others.

Each has a machine of its own (memory, devices, time), a VMCB, nested tables and host pages of its own, and RAM at
another place of the one engine's physical memory; a world switch is all that they share.
"""

from __future__ import annotations

import time

import pytest

from tests.equivalence.guest import MEMORY
from tests.equivalence.run import observe
from tests.guest_expectations import EXPECTATIONS
from tests.test_equivalence import numbered
from vmm.errors import GuestError
from vmm.image.asm import Encoder, Keystone, assemble_text
from vmm.image.image import Image
from vmm.image.load import from_assembly, load_image
from vmm.machine.boot import boot
from vmm.machine.cpu import layout as at
from vmm.machine.cpu.engine import Engine
from vmm.machine.machine import Machine, Outcome
from vmm.machine.memory import ONES
from vmm.monitor.hardware import host, nested
from vmm.monitor.hardware.intercepts import Intercepts
from vmm.monitor.hardware.monitor import HardwareMonitor
from vmm.monitor.hardware.vmcb import Vmcb
from vmm.monitor.hardware.world import Guest

SPACING = 64 << 20  # from one guest's RAM to the next one's
FRAME = 0x000F_FFFF_FFFF_F000
FPU_AND_SSE = slice(at.SYSTEM_STATE.stop, at.SYSENTER_CS)


class Turn:
    """One guest among several."""

    def __init__(self, engine: Engine, fresh: bytes, image: Image, number: int, policy: str = "") -> None:
        engine.state.restore(fresh)
        self.console = bytearray()
        self.machine = Machine(MEMORY, engine=engine, base=number * SPACING, console=self.console.extend)
        for segment in image.segments:
            self.machine.memory.load(segment.address, segment.data)
        boot(self.machine, image.entry, image.registers, image.selectors)
        self.monitor = HardwareMonitor(self.machine, Intercepts.parse(policy), number=number)
        self.monitor.start()
        self.limit = 0
        self.outcome: Outcome | None = None
        self.guest = self.monitor.take()

    def go(self, instructions: int) -> None:
        """On the processor for so many instructions."""
        self.monitor.put(self.guest)
        self.limit += instructions
        self.outcome = self.machine.run(self.limit)
        self.registers, self.state = self.monitor.registers(), self.machine.state.save()
        self.guest = self.monitor.take()

    @property
    def ended(self) -> bool:
        return self.outcome is not None and self.outcome.kind != "budget"

    def everything(self) -> dict[str, object]:
        """What can be seen of it."""
        vmcb = Vmcb(memoryview(bytearray(self.guest.vmcb)))
        return {
            "outcome": self.outcome, "registers": self.registers, "memory": bytes(self.machine.memory.bytes),
            "console": bytes(self.console), "retired": self.machine.retired(), "fpu": self.state[FPU_AND_SSE],
            "hidden": [getattr(vmcb, name) for name in ("fs", "gs", "tr", "ldtr", "gdtr", "idtr")],
            "sysenter": (vmcb.sysenter_cs, vmcb.sysenter_esp, vmcb.sysenter_eip), "dr": (vmcb.dr6, vmcb.dr7),
        }  # fmt: skip


def turns(*images: Image, policy: str = "") -> list[Turn]:
    engine = Engine()
    fresh = engine.state.save()
    return [Turn(engine, fresh, image, number, policy) for number, image in enumerate(images)]


def take_turns(guests: list[Turn], slices: tuple[int, ...], most: int = 20_000) -> None:
    number = 0
    while not all(guest.ended for guest in guests) and number < most:
        for guest in guests:
            if not guest.ended:
                guest.go(slices[number % len(slices)])
            number += 1


def alone(image: Image, slices: tuple[int, ...] = (1_000_000,), policy: str = "") -> Turn:
    (guest,) = turns(image, policy=policy)
    take_turns([guest], slices)
    return guest


def program(text: str) -> Image:
    return from_assembly(
        "program", assemble_text(f"bits 32\norg 0x100000\nstart:\n{text}\n", encoder=Encoder(Keystone()))
    )


@pytest.mark.parametrize("policy", ("", "cr3,pushf,popf,pf,iret"))
@pytest.mark.parametrize("slices", ((300,), (1, 7, 100, 2), (997, 13)))
def test_guests_that_take_turns_come_to_what_they_come_to_alone(slices: tuple[int, ...], policy: str) -> None:
    """Registers, FPU, FS to SYSENTER, memory, console and time: two random guests each, by turns."""
    for number in range(0, 6, 2):
        images = [numbered("turns", number + n).image() for n in range(2)]
        together = turns(*images, policy=policy)
        take_turns(together, slices)
        for image, guest in zip(images, together, strict=True):
            assert guest.everything() == alone(image, policy=policy).everything()
            bare = observe(image, "native")
            assert (guest.registers, bytes(guest.console)) == (bare.registers, bare.console)


def test_a_guest_beside_itself() -> None:
    """Three of the same guest, at the same addresses: what they share is none of it."""
    image = numbered("turns", 11).image()
    together = turns(image, image, image)
    take_turns(together, (211, 500, 3))
    for guest in together:
        assert guest.everything() == alone(image).everything()


SECRET = """
        mov esp, 0x180000
        mov eax, {value:#x}
        mov fs, [selector]
        mov ecx, 0x175
        xor edx, edx
        wrmsr
        mov cr2, eax
        mov [0x150000], eax
        push eax
        fild dword [0x150000]
        mov ebx, {count}
more:   add [0x150000 + ebx * 4], eax
        call changed
        inc byte [changed + 1]
        dec ebx
        jnz more
        fistp dword [0x14F000]
        rdmsr
        mov esi, cr2
        hlt
changed: mov dl, {value:#x} & 0x7F
        ret
selector: dw 0x10
"""


def test_no_guest_sees_what_another_one_is() -> None:
    """Two guests with the same addresses in use keep their own values in memory, code, FPU, MSRs and CR2."""
    values = (0x11111111, 0x22222222)
    together = turns(*(program(SECRET.format(value=value, count=50)) for value in values))
    take_turns(together, (17,))
    for value, guest in zip(values, together, strict=True):
        memory, registers = guest.machine.memory, guest.registers
        assert {memory.read(a, 4) for a in (0x150000, 0x150004, 0x1500C8, 0x17FFFC, 0x14F000)} == {value}
        assert (registers["eax"], registers["esi"], registers["edx"]) == (value, value, 0)
        assert values[0] + values[1] - value not in [
            memory.read(address, 4) for address in range(0x140000, 0x190000, 4)
        ]


REACH = "\n".join(
    f" mov eax, [{address:#x}]\n mov dword [{address:#x}], 0x5A5A5A5A\n mov ebx, {address:#x}\n"
    " cmp eax, -1\n jne wrong"
    for address in (
        MEMORY, SPACING, SPACING + 0x100000, 2 * SPACING - 4, 2 * SPACING, host.BASE, host.BASE + host.STRIDE,
        host.BASE + host.STRIDE + host.VMCB, nested.BASE + nested.STRIDE, nested.BASE + nested.STRIDE + 0x5000, ONES,
    )
)  # fmt: skip


def test_no_guest_reaches_what_another_one_has() -> None:
    """Addresses of the other's RAM, VMCB and nested tables are an empty bus; its pages are as they were."""
    other = numbered("turns", 3).image()
    reach, victim = turns(program(f"{REACH}\n xor ebx, ebx\nwrong:  hlt"), other)
    take_turns([reach, victim], (5, 300))
    assert reach.ended and reach.registers["ebx"] == 0
    assert victim.everything() == alone(other).everything()
    for guest, number in ((reach, 0), (victim, 1)):
        tables = guest.monitor.nested
        assert tables is not None
        for page, entry in enumerate(tables.entries):
            assert not entry or entry & FRAME in ((page << 12) + number * SPACING, ONES)


@pytest.mark.parametrize("name", ("processes", "smc"))
def test_an_operating_system_beside_another(name: str) -> None:
    """Real guests, with timers and page tables of their own, beside a random one."""
    expectation = next(e for e in EXPECTATIONS if e.guest == name)
    image = load_image(expectation.path, memory=MEMORY)
    neighbour = numbered("turns", 5).image()
    system, other = turns(image, neighbour)
    take_turns([system, other], (40_009, 700))
    by_itself = alone(image, (10_000_000,))
    assert system.everything() == by_itself.everything()
    assert other.everything() == alone(neighbour).everything()
    assert system.outcome is not None and system.outcome.kind == "exit"


def test_a_guest_that_is_away_is_a_plain_value() -> None:
    """It can be taken back to what it was: from its bytes and its memory, it does the same again."""
    image = numbered("turns", 7).image()
    (guest,) = turns(image)
    guest.go(400)
    kept = Guest(bytes(guest.guest.vmcb), bytes(guest.guest.registers))
    memory = bytes(guest.machine.memory.bytes)
    guest.go(1)
    once = guest.registers
    guest.guest = kept
    guest.machine.memory.load(0, memory)
    guest.go(1)
    assert guest.registers == once


def test_what_is_no_guest_does_not_hurt_its_neighbour() -> None:
    """A guest whose VMCB has become noise is refused, and the other goes on."""
    image = numbered("turns", 3).image()
    bad, good = turns(image, image)
    bad.guest = Guest(b"\x5a" * 0x1000, bad.guest.registers)
    with pytest.raises(GuestError, match="VMRUN refuses the guest"):
        bad.go(100)
    take_turns([good], (250,))
    assert good.everything() == alone(image).everything()


def test_a_switch_is_quick() -> None:
    """A guest is put on the processor and taken off in some hundred microseconds (2 ms leave room for any host)."""
    (guest,) = turns(program("jmp $"))
    best = 1.0
    for _ in range(20):
        started = time.perf_counter()
        guest.monitor.put(guest.guest)
        guest.guest = guest.monitor.take()
        best = min(best, time.perf_counter() - started)
    assert best < 2e-3
