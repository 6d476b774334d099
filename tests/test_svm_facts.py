"""What hvm mode relies on of the engine's SVM, on the engine alone: a new Unicorn cannot change it unnoticed.

DESIGN of the world switch (`vmm.monitor.hardware.world`): VMRUN checks nothing, injects one type of event only, and
begins every #VMEXIT without completing it.
"""

from __future__ import annotations

import struct

import pytest
import unicorn
from unicorn import unicorn_const as uc_const
from unicorn import x86_const as x86

from vmm.machine.cpu import layout as at
from vmm.monitor.hardware.checks import check
from vmm.monitor.hardware.exits import ExitCode
from vmm.monitor.hardware.injection import EventInjection, EventType
from vmm.monitor.hardware.intercepts import EFER, MINIMUM, NAMES, VM_HSAVE_PA, Intercepts
from vmm.monitor.hardware.vmcb import SEGMENTS, SYSENTER, Segment, Vmcb

HOST_CODE, FIRST, SECOND, HOST_SAVE, MSR_MAP, IO_MAP = 0x1000, 0x10000, 0x11000, 0x12000, 0x13000, 0x16000
GUEST, STACK, IDT, GDT, HANDLERS = 0x20000, 0x30000, 0x4000, 0x2000, 0x28000
VECTOR, IF = 0x30, 1 << 9
VMRUN = bytes.fromhex("0f01d8")
INTERCEPT = 0x100


class Cpu:
    """A CPU with SVM on, a guest's tables in memory, and a record of what its hook is told."""

    def __init__(self) -> None:
        self.uc = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_32)
        self.uc.ctl_set_cpu_model(x86.UC_CPU_X86_EPYC)
        self.uc.ctl_exits_enabled(True)
        self.uc.ctl_set_exits([])
        self.uc.mem_map(0, 0x40000)
        self.uc.msr_write(EFER, self.uc.msr_read(EFER) | 1 << 12)
        self.uc.msr_write(VM_HSAVE_PA, HOST_SAVE)
        self.uc.mem_write(GDT, struct.pack("<QQQ", 0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF))
        for vector in range(64):
            offset = HANDLERS + 16 * vector
            gate = struct.pack("<HHHH", offset & 0xFFFF, 8, 0x8E00, offset >> 16)
            self.uc.mem_write(IDT + 8 * vector, gate)
            self.uc.mem_write(offset, b"\xf4")  # hlt
        self.seen: list[int] = []
        self.exitinfo: list[bytes] = []
        self.eips: list[int] = []
        self.uc.hook_add(uc_const.UC_HOOK_INTR, self._stop)

    def _stop(self, uc: unicorn.Uc, vector: int, _: object) -> None:
        self.seen.append(vector - INTERCEPT if vector >= INTERCEPT else -1 - vector)
        self.eips.append(uc.reg_read(x86.UC_X86_REG_EIP))
        uc.emu_stop()

    def vmcb(self, code: bytes, policy: Intercepts = MINIMUM, place: int = FIRST, where: int = GUEST) -> Vmcb:
        v = Vmcb.new()
        policy.write(v)
        v.msrpm_base_pa, v.iopm_base_pa, v.guest_asid = MSR_MAP, IO_MAP, 1
        v.efer, v.cr0, v.rflags, v.rip, v.rsp = 1 << 12, 0x11, 2, where, STACK
        data, code_segment = (0x10, 0xC93, 0xFFFF_FFFF, 0), (0x08, 0xC9B, 0xFFFF_FFFF, 0)
        SEGMENTS.write(
            v,
            *data,
            *code_segment,
            *data * 4,
            0,
            0,
            0x17,
            GDT,
            0,
            0,
            0,
            0,
            0,
            0,
            0x1FF,
            IDT,
            0x28,
            0x89,
            0x67,
            0x3000,
        )
        self.uc.mem_write(where, code)
        self.write(v, place)
        return v

    def write(self, vmcb: Vmcb, place: int = FIRST) -> None:
        self.uc.mem_write(place, bytes(vmcb))

    def read(self, place: int = FIRST) -> Vmcb:
        return Vmcb(memoryview(self.uc.mem_read(place, 0x1000)))

    def enter(self, place: int = FIRST, before: bytes = b"") -> int | None:
        """VMRUN: the exit code that comes, -1 - n for a vector, None if the CPU stops by itself."""
        self.seen.clear()
        self.eips.clear()
        self.uc.mem_write(HOST_CODE, before + VMRUN)
        self.uc.reg_write(x86.UC_X86_REG_EAX, place)
        self.uc.emu_start(HOST_CODE, 0, timeout=5_000_000)
        return self.seen[0] if self.seen else None

    @property
    def context(self) -> bytes:
        context = self.uc.context_save()
        return bytes(context)[at.HEADER :]

    def word(self, offset: int) -> int:
        return int.from_bytes(self.context[offset : offset + 4], "little")


def test_an_exit_is_begun_and_not_completed() -> None:
    """The guest's registers are still in the processor, HF_GUEST is set, and the VMCB knows nothing of the exit."""
    cpu = Cpu()
    before = bytes(cpu.vmcb(bytes.fromhex("b834120000 bc78560200 0fa2"), NAMES["cpuid"] | MINIMUM))
    assert cpu.enter() == ExitCode.VMEXIT_CPUID
    assert cpu.uc.reg_read(x86.UC_X86_REG_EAX) == 0x1234
    assert cpu.uc.reg_read(x86.UC_X86_REG_ESP) == 0x25678
    after = cpu.read()
    assert (after.exitcode, after.exitinfo1) == (0, 0)
    assert (after.rip, after.rsp, after.rax) == (GUEST, STACK, 0), "the save area is as it was"
    assert Vmcb(memoryview(bytearray(before))).rip == GUEST


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("cr0", 1 << 29 | 0x11), ("cr4", 1 << 30), ("dr7", 1 << 40), ("guest_asid", 0), ("intercept_misc2", 0x7C),
        ("cpl", 2), ("iopm_base_pa", 1 << 50), ("tr", Segment(0x28, 0x8B, 0x67, 0x3000)), ("rip", 1 << 40 | GUEST),
    ],
)  # fmt: skip
def test_vmrun_checks_nothing(field: str, value: object) -> None:
    """A state that `checks` refuses enters all the same, if it is not worse: so all checks have to be ours."""
    cpu = Cpu()
    vmcb = cpu.vmcb(b"\xf4")
    setattr(vmcb, field, value)
    cpu.write(vmcb)
    assert any(failure.field.partition(".")[0] == field for failure in check(vmcb))
    assert cpu.enter() == ExitCode.VMEXIT_HLT


def test_an_external_interrupt_is_injected() -> None:
    """EVENTINJ of type INTR goes through the guest's IDT, whatever IF says, and is cleared when that is done."""
    for flags in (2, 2 | IF):
        cpu = Cpu()
        vmcb = cpu.vmcb(b"\x90\xf4")
        vmcb.rflags, vmcb.eventinj = flags, EventInjection.make(EventType.INTR, VECTOR)
        cpu.write(vmcb)
        cpu.enter()
        assert cpu.seen == [ExitCode.VMEXIT_HLT]
        assert cpu.eips == [HANDLERS + 16 * VECTOR]
        frame = struct.unpack("<III", cpu.uc.mem_read(STACK - 12, 12))
        assert frame == (GUEST, 8, flags)
        assert not cpu.read().eventinj & EventInjection.V


@pytest.mark.parametrize(
    ("kind", "vector", "error"),
    [
        (EventType.NMI, 2, None), (EventType.EXCEPTION, 13, 8), (EventType.EXCEPTION, 0, None),
        (EventType.SOFTWARE, VECTOR, None),
    ],
)  # fmt: skip
def test_no_other_type_is_delivered(kind: EventType, vector: int, error: int | None) -> None:
    """NMI, exceptions and INT n come back to the hook, the guest where it was and its stack untouched."""
    cpu = Cpu()
    vmcb = cpu.vmcb(b"\x90\xf4")
    vmcb.eventinj = EventInjection.make(kind, vector, error)
    cpu.write(vmcb)
    cpu.enter()
    assert cpu.seen and cpu.seen[0] == -1 - vector
    assert cpu.uc.mem_read(STACK - 16, 16) == bytes(16)
    assert cpu.eips[0] in (GUEST, 0)


@pytest.mark.parametrize(("code", "flags", "where"), [
    (b"\x90\x90\xf4", IF, GUEST), (b"\xfb\x90\x90\xf4", 0, GUEST + 2), (b"\x90\x90\xf4", 0, None),
])  # fmt: skip
def test_a_virtual_interrupt_waits_for_if(code: bytes, flags: int, where: int | None) -> None:
    """V_IRQ is delivered when IF allows, after the shadow of STI, and not before."""
    cpu = Cpu()
    vmcb = cpu.vmcb(code)
    vmcb.rflags, vmcb.v_irq, vmcb.v_intr_vector, vmcb.v_intr_prio = 2 | flags, 1, VECTOR, 15
    cpu.write(vmcb)
    exit_code = cpu.enter()
    if where is None:
        assert exit_code == ExitCode.VMEXIT_HLT and cpu.eips == [GUEST + 2]
        return
    (pushed,) = struct.unpack("<I", cpu.uc.mem_read(STACK - 12, 4))
    assert pushed == where


@pytest.mark.parametrize("switched", (False, True))
def test_a_pending_virtual_interrupt_cannot_be_withdrawn(switched: bool) -> None:
    """Clearing V_IRQ does not take it back; after a world switch it is another guest that gets it.

    That is why interrupts are injected by EVENTINJ, at a moment when the guest can take them, and V_IRQ is not used.
    """
    cpu = Cpu()
    vmcb = cpu.vmcb(b"\x0f\xa2\xfb\x90\x90\xf4", NAMES["cpuid"] | MINIMUM)
    vmcb.v_irq, vmcb.v_intr_vector, vmcb.v_intr_prio = 1, VECTOR, 15
    cpu.write(vmcb)
    host = cpu.uc.context_save()
    assert cpu.enter() == ExitCode.VMEXIT_CPUID, "IF is clear: it is pending"
    assert cpu.uc.mem_read(STACK - 12, 12) == bytes(12)
    if switched:
        cpu.uc.context_restore(host)
        other = cpu.vmcb(b"\x90\x90\xf4", place=SECOND, where=GUEST + 0x1000)
        other.rflags = 2 | IF
        cpu.write(other, SECOND)
        assert not other.v_irq
        assert cpu.enter(SECOND) == ExitCode.VMEXIT_HLT
    else:
        vmcb = cpu.read()
        vmcb.v_irq = 0
        cpu.write(vmcb)
        cpu.uc.emu_start(GUEST + 2, 0, timeout=5_000_000)
    (pushed,) = struct.unpack("<I", cpu.uc.mem_read(STACK - 12, 4))
    assert pushed == (GUEST + 0x1000 if switched else GUEST + 4)


def test_what_vmrun_leaves_to_vmload() -> None:
    """FS, GS, LDTR, TR and SYSENTER state are not VMRUN's: the world switch executes VMLOAD before it."""
    for before, loaded in ((b"", False), (bytes.fromhex("0f01da"), True)):
        cpu = Cpu()
        vmcb = cpu.vmcb(b"\xf4")
        vmcb.fs, vmcb.tr = Segment(0x10, 0xC93, 0xFFFF_FFFF, 0x12340000), Segment(0x28, 0x89, 0x67, 0x3000)
        SYSENTER.write(vmcb, 8, 0x5555, 0x6666, 0)
        cpu.write(vmcb)
        assert cpu.enter(before=before) == ExitCode.VMEXIT_HLT
        stride = at.SEGMENT_STRIDE
        found = (
            cpu.word(at.SEGMENTS + at.FS * stride + at.BASE),
            cpu.word(at.SEGMENTS + at.TR * stride + at.BASE),
            cpu.word(at.SYSENTER_EIP),
        )
        assert found == ((0x12340000, 0x3000, 0x6666) if loaded else (0, 0, 0))


@pytest.mark.parametrize("name", ("vmsave", "vmload"))
def test_vmsave_and_vmload_reach_any_physical_address(name: str) -> None:
    """Not intercepted, a guest's VMSAVE stores to whatever EAX names, its own VMCB too: why they always are."""
    code = (
        b"\xb8"
        + struct.pack("<I", FIRST)
        + bytes.fromhex({"vmsave": "0f01db", "vmload": "0f01da"}[name])
        + b"\xf4"
    )
    cpu = Cpu()
    bare = Intercepts(misc=frozenset({ExitCode.VMEXIT_HLT, ExitCode.VMEXIT_VMRUN}))
    vmcb = cpu.vmcb(code, bare)
    vmcb.gs = Segment(0x10, 0xC93, 0xFFFF_FFFF, 0x7777000)
    cpu.write(vmcb)
    assert cpu.enter() == ExitCode.VMEXIT_HLT
    base = cpu.word(at.SEGMENTS + at.GS * at.SEGMENT_STRIDE + at.BASE)
    if name == "vmsave":
        assert cpu.read().gs.base == base == 0, "its control block has been written over"
    else:
        assert base == 0x7777000
    cpu = Cpu()
    cpu.vmcb(code)
    assert cpu.enter() == ExitCode[f"VMEXIT_{name.upper()}"]


def test_the_intercepts_in_force_are_in_the_context() -> None:
    """What VMRUN loaded is where `layout.INTERCEPTS` says, in the order that `Intercepts.vectors` gives."""
    cpu = Cpu()
    policy = Intercepts.parse("cr3-write,cr0-read,dr7-write,pf,gp,cpuid")
    cpu.vmcb(b"\xf4", policy)
    assert cpu.enter() == ExitCode.VMEXIT_HLT
    assert cpu.context[at.INTERCEPTS.start : at.INTERCEPTS.stop] == policy.vectors()
    assert cpu.word(at.VM_VMCB) == FIRST
    assert cpu.word(at.HFLAGS) & at.HF_GUEST
