"""KVM's paravirtual interface: what a guest finds, in every mode alike, and what a wrong one gets."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.guest_expectations import GUESTS, timeless
from tests.machines import DATA, MEMORY, Lab, assemble, gate, lab
from vmm.cli.main import main
from vmm.image.load import load_image
from vmm.isa.vectors import Vector
from vmm.machine.clock import TSC_HZ, Clock, HostClock
from vmm.machine.control import Control
from vmm.machine.cpuid import cpuid
from vmm.machine.delivery import Fault
from vmm.machine.devices import apic
from vmm.machine.kvm import abi
from vmm.machine.kvm.clock import MULTIPLIER, SHIFT, time_info, write_time, write_wall_clock
from vmm.machine.kvm.eoi import PvEoi
from vmm.machine.kvm.interface import FEATURES, Kvm
from vmm.machine.machine import Machine
from vmm.machine.memory import Memory
from vmm.machine.pvclock import GUEST_STOPPED, SIZE, TSC_STABLE, TimeInfo, scale
from vmm.vm import MODES, UNMODIFIED, VirtualMachine, hardware

WIDE = (1 << 64) - 1
words = st.integers(0, WIDE)
RECORD = DATA + 0x100
EPOCH_2000 = 946_684_800
MSRS = ((abi.SYSTEM_TIME, abi.WALL_CLOCK), (abi.SYSTEM_TIME_NEW, abi.WALL_CLOCK_NEW))


def offered(mode: str = "native", policy: str | None = None) -> Callable[[Machine], Control]:
    """How to attach a mode to a machine that offers the interface."""

    def attach(machine: Machine) -> Control:
        Kvm(machine)
        return MODES[mode].attach(machine) if policy is None else hardware(policy)(machine)

    return attach


def guest(source: str, mode: str = "native", clock: Clock | None = None) -> Lab:
    """A guest that finds the interface."""
    return lab(source, mode, attach=offered(mode), clock=clock)


def set_msr(number: int, value: int) -> str:
    return f"mov ecx, {number:#x}\n mov eax, {value & 0xFFFFFFFF:#x}\n mov edx, {value >> 32:#x}\n wrmsr\n"


def record(found: Lab, address: int = RECORD) -> TimeInfo:
    return TimeInfo.unpack(found.data(address, SIZE))


# The arithmetic


@given(st.integers(1, 1 << 50))
def test_the_multiplier_has_all_its_bits(frequency: int) -> None:
    """For any counter the multiplier fits into 32 bits and has its highest, so it is right to a part in 2**31."""
    multiplier, shift = scale(frequency)
    assert 1 << 31 <= multiplier < 1 << 32
    assert -128 <= shift < 128
    exact = 10**9 << 32 + 64
    found = multiplier << 64 + shift if shift >= 0 else multiplier << 64 >> -shift
    assert 0 <= exact // frequency - found <= (exact // frequency >> 31) + 1


@given(start=st.integers(0, 1 << 62), offset=words, elapsed=st.integers(0, 1 << 60))
def test_a_record_gives_the_machines_own_time_for_any_counter(start: int, offset: int, elapsed: int) -> None:
    """Whatever the guest has set its counter to, and as long after as anyone waits, the time that it computes is the
    machine's, to the last tick of the counter."""

    def tsc(now: int) -> int:  # as `Machine.tsc` has it
        return now // 10 + offset & WIDE

    info = time_info(start, tsc(start))
    now = start + elapsed
    assert info.nanoseconds(tsc(now)) == now // 10 * 10


def test_the_scale_is_that_of_the_machines_counter() -> None:
    """100 MHz, in Linux's own way with it."""
    assert (MULTIPLIER, SHIFT) == (0xA000_0000, 4)
    assert TSC_HZ == 100_000_000


@given(st.tuples(*(st.integers(0, 0xFFFFFFFF) for _ in range(8))), words, st.integers(0, 1 << 62))
@settings(deadline=None)
def test_no_reader_takes_a_torn_record(before: tuple[int, ...], tsc: int, now: int) -> None:
    """Over whatever lies there: a reader that looks between any two stores finds an odd version, or all of the old
    record, or all of the new one; and the new version is neither the old one nor odd."""
    memory = Memory(2 << 20)
    old = struct.pack("<8I", *before)
    memory.load(RECORD, old)
    seen: list[bytes] = [old]
    memory.on_host_write = lambda _address, _size: seen.append(bytes(memory.bytes[RECORD : RECORD + SIZE]))
    write_time(memory, RECORD, now, tsc)
    new = seen[-1]
    assert TimeInfo.unpack(new).version % 2 == 0
    assert new[:4] != old[:4]
    kept = TimeInfo.unpack(old).flags & GUEST_STOPPED
    assert TimeInfo.unpack(new).flags == TSC_STABLE | kept
    assert all(look in (old, new) or look[0] & 1 for look in seen)
    # A reader takes what lies between two equal, even versions; it may look at any two moments, in order.
    for i, first in enumerate(seen):
        for second in seen[i:]:
            if not first[0] & 1 and first[:4] == second[:4]:
                assert first == second


# What a guest finds


@pytest.mark.parametrize("mode", UNMODIFIED)
def test_cpuid_tells_of_kvm_where_it_is_offered_and_only_there(mode: str) -> None:
    """The hypervisor bit, the signature with the last leaf, and the features; without the option, none of them."""
    source = "".join(
        f"mov eax, {leaf:#x}\n cpuid\n mov [DATA + {16 * i}], eax\n mov [DATA + {16 * i + 4}], ebx\n"
        f" mov [DATA + {16 * i + 8}], ecx\n mov [DATA + {16 * i + 12}], edx\n"
        for i, leaf in enumerate((1, abi.SIGNATURE_LEAF, abi.FEATURES_LEAF))
    )
    with_it, without = guest(source + "hlt", mode), lab(source + "hlt", mode)
    with_it.run()
    without.run()
    one, signature, features = (with_it.data(DATA + 16 * i, 16) for i in range(3))
    plain = without.data(DATA, 16)
    assert signature == struct.pack("<I", abi.FEATURES_LEAF) + abi.SIGNATURE
    assert features == struct.pack("<4I", FEATURES, 0, 0, 0)
    assert struct.unpack("<4I", one)[2] == struct.unpack("<4I", plain)[2] | abi.HYPERVISOR
    assert (one[:8], one[12:]) == (plain[:8], plain[12:])
    last = struct.pack("<4I", *cpuid(cpuid(0, 0)[0], 0))
    for i in (1, 2):
        assert without.data(DATA + 16 * i, 16) == last  # leaves past the last answer as that does


@pytest.mark.parametrize("mode", UNMODIFIED)
@pytest.mark.parametrize(("system_time", "wall_clock"), MSRS)
def test_the_records_are_there_when_wrmsr_is_over(mode: str, system_time: int, wall_clock: int) -> None:
    """By the old numbers and the new; the guest's next instruction finds the time in them, RDMSR what was written."""
    found = guest(
        set_msr(system_time, RECORD | 1)
        + set_msr(wall_clock, RECORD + 64)
        + "rdtsc\nseen: nop\n"
        + f"mov ecx, {system_time:#x}\n rdmsr\n mov esi, eax\n mov ecx, {wall_clock:#x}\n rdmsr\nend: hlt",
        mode,
    )
    found.run_to("seen")
    info = record(found)
    assert (info.version, info.multiplier, info.shift, info.flags) == (2, MULTIPLIER, SHIFT, TSC_STABLE)
    assert info.nanoseconds(found.reg("eax") | found.reg("edx") << 32) == (found.retired - 1) * 10
    assert struct.unpack("<3I", found.data(RECORD + 64, 12)) == (2, EPOCH_2000, 0)
    found.run_to("end")
    assert (found.reg("esi"), found.reg("eax"), found.reg("edx")) == (RECORD | 1, RECORD + 64, 0)


@pytest.mark.parametrize("mode", UNMODIFIED)
def test_time_goes_on_when_the_guest_writes_its_counter(mode: str) -> None:
    """The record is made anew, inside that WRMSR, and only while it is enabled."""
    value = 0x1234_5678_9ABC
    found = guest(
        set_msr(abi.SYSTEM_TIME_NEW, RECORD | 1)
        + set_msr(0x10, value)
        + "rdtsc\nseen: nop\n"
        + set_msr(abi.SYSTEM_TIME_NEW, RECORD)
        + set_msr(0x10, 0)
        + "end: hlt",
        mode,
    )
    found.run_to("seen")
    info = record(found)
    assert (info.version, info.tsc) == (4, value)
    assert info.nanoseconds(found.reg("eax") | found.reg("edx") << 32) == (found.retired - 1) * 10
    found.run_to("end")
    assert record(found) == info


@pytest.mark.parametrize("mode", UNMODIFIED)
def test_the_record_holds_by_the_wall_clock_too(mode: str) -> None:
    """Where guest time is the host's, the time of the record for the counter's value lies between two looks at it."""
    found = guest(set_msr(abi.SYSTEM_TIME_NEW, RECORD | 1) + set_msr(0x10, 5) + "end: hlt", mode, HostClock())
    found.run()
    machine, info = found.machine, record(found)
    before = machine.now()
    computed = info.nanoseconds(machine.tsc())
    assert before - 10 < computed <= machine.now()


def test_every_mode_ends_in_the_same_state() -> None:
    """Memory, registers, console and time of a guest that uses all of the interface are the bare machine's."""
    source = (
        set_msr(abi.SYSTEM_TIME_NEW, RECORD | 1)
        + set_msr(abi.WALL_CLOCK_NEW, RECORD + 64)
        + set_msr(0x10, 77)
        + "mov eax, 9\n mov ebx, DATA\n xor ecx, ecx\n vmcall\n mov ebp, eax\n mov eax, 99\n vmmcall\n"
        + "to_user\n mov eax, 1\n vmcall\n mov edi, eax\n mov eax, 1\n vmmcall\nend: jmp end"
    )
    runs = {}
    for mode in UNMODIFIED:
        found = guest(source, mode)
        found.run_to("end")
        runs[mode] = found.everything()
        assert runs[mode] == runs["native"], mode
    shadow = lab(source, attach=lambda m: (Kvm(m), hardware("", "shadow")(m))[1])
    shadow.run_to("end")
    assert shadow.everything() == runs["native"]


# Hypercalls


@pytest.mark.parametrize("mode", UNMODIFIED)
@pytest.mark.parametrize("instruction", ("vmcall", "vmmcall"))
def test_hypercalls_answer_as_kvm_does(mode: str, instruction: str) -> None:
    """By Intel's instruction or AMD's: a poll and a kick are nothing, an unknown one is -ENOSYS, and a process's is
    -EPERM; no other register changes, and each counts as one instruction."""
    for number, result in ((1, 0), (5, 0), (2, -1000), (0, -1000), (0xFFFFFFFF, -1000)):
        found = guest(f"mov eax, {number:#x}\n {instruction}\nend: hlt", mode)
        before = {**found.registers}
        found.run_to("end")
        after = {**found.registers}
        assert after.pop("eax") == result & 0xFFFFFFFF
        changed = {name for name, value in after.items() if value != before[name]}
        assert changed == {"eip"}
        assert found.retired == 2
    process = guest(f"to_user\n mov eax, 1\n {instruction}\nend: jmp end", mode)
    process.run_to("end")
    assert process.reg("eax") == -abi.EPERM & 0xFFFFFFFF


@pytest.mark.parametrize("mode", UNMODIFIED)
@pytest.mark.parametrize("ring", ("", "to_user"))
def test_without_the_interface_there_are_no_hypercalls_and_no_registers(mode: str, ring: str) -> None:
    """VMCALL and VMMCALL are undefined in every ring, KVM's MSRs are #GP."""
    for instruction in ("vmcall", "vmmcall"):
        found = lab(f"{ring}\n mov eax, 1\n {instruction}\n hlt", mode)
        found.run(20)
        assert found.vector == Vector.UD
    if not ring:
        for number in (*MSRS[0], *MSRS[1], abi.PV_EOI_EN):
            found = lab(set_msr(number, RECORD | 1), mode)
            found.run(20)
            assert found.vector == Vector.GP


@pytest.mark.parametrize("mode", UNMODIFIED)
def test_a_hypercall_may_be_stepped(mode: str) -> None:
    """With TF set there is a trap after it, as after any instruction."""
    found = guest("push dword 0x102\n popfd\n vmcall\nend: hlt", mode)
    found.run(20)
    if mode != "trap":  # whose POPF is not the guest's
        assert found.vector == Vector.DB
        assert found.stack(1) == [found.symbol("end")]


@pytest.mark.parametrize("mode", UNMODIFIED)
def test_lock_before_a_hypercall_is_undefined(mode: str) -> None:
    """LOCK belongs to few instructions, and these are none of them."""
    for code in (b"\xf0\x0f\x01\xc1", b"\xf0\x0f\x01\xd9"):
        found = lab(code, mode, attach=offered(mode))
        found.run(20)
        assert found.vector == Vector.UD


@pytest.mark.parametrize("mode", UNMODIFIED)
def test_clock_pairing_gives_the_time_of_day_and_the_counter_of_one_moment(mode: str) -> None:
    """Seconds and nanoseconds since 1970, and the counter then; another clock or a bad address is refused."""
    call = f"mov eax, {abi.HC_CLOCK_PAIRING}\n mov ebx, {{:#x}}\n mov ecx, {{}}\n vmcall\nend: hlt"
    found = guest("nop\n" + call.format(DATA, 0), mode)
    found.run_to("end")
    assert found.reg("eax") == 0
    seconds, nanoseconds, tsc, flags = abi.PAIRING_RECORD.unpack(found.data(DATA, 64))
    assert (seconds, nanoseconds, tsc, flags) == (EPOCH_2000, 40, 4, 0)
    for address, clock, error in (
        (DATA, 1, abi.EOPNOTSUPP),
        (MEMORY, 0, abi.EFAULT),
        (DATA + 0xFF0, 0, abi.EFAULT),
    ):
        found = guest(call.format(address, clock), mode)
        before = found.memory
        found.run_to("end")
        assert found.reg("eax") == -error & 0xFFFFFFFF
        assert found.memory == before


def test_exits_name_the_hypercall() -> None:
    """By KVM's names where the CPU has no exit for it; under AMD-V by the #VMEXIT's."""
    source = "mov eax, 1\n vmmcall\n mov eax, 2\n vmmcall\n mov eax, 9\n vmcall\nend: hlt"
    for mode in UNMODIFIED:
        found = guest(source, mode)
        found.run_to("end")
        exits = {name: row.count for name, row in found.machine.exits.rows.items() if "call" in name.lower()}
        if mode == "hvm":
            assert exits == {"VMEXIT_VMMCALL": 2, "hypercall CLOCK_PAIRING": 1}
        else:
            assert exits == {
                "hypercall VAPIC_POLL_IRQ": 1,
                "hypercall unknown": 1,
                "hypercall CLOCK_PAIRING": 1,
            }


def test_intercepted_exceptions_and_registers_change_nothing() -> None:
    """Under AMD-V, with all that can be intercepted intercepted, the guest finds the same."""
    source = (
        set_msr(abi.SYSTEM_TIME, RECORD | 1) + "mov eax, 1\n vmcall\n mov eax, 3\n vmmcall\n rdtsc\nend: hlt"
    )
    plain = guest(source, "hvm")
    plain.run_to("end")
    watched = lab(source, "hvm", attach=offered("hvm", "all"))
    watched.run_to("end")
    assert watched.everything() == plain.everything()
    assert "VMEXIT_RDTSC" in watched.machine.exits.rows


# A guest that chooses


@pytest.mark.parametrize(
    ("way", "by", "reason"),
    (
        (0, "the record that KVM keeps", "RDTSC"),
        (3, "a hypercall", "hypercall CLOCK_PAIRING"),
        (1, "the PIT", "IN"),
    ),
)
def test_the_clock_guest_takes_the_best_way_and_each_is_right(way: int, by: str, reason: str) -> None:
    """Offered KVM's record it computes the time from that, without any exit but RDTSC's; in every mode it comes to
    the same to the last byte and instruction, and by the wall clock, too, time never goes back."""
    defines = {"WAY": str(way), "READINGS": "300"}
    image = load_image(GUESTS / "clock.asm", memory=16 << 20, defines=defines)
    results = {mode: VirtualMachine(image, mode, paravirt="kvm").run(10**6) for mode in UNMODIFIED}
    native = results["native"]
    printed = f"clock: by {by}\nclock: 300 readings, and time never went back\n"
    assert timeless(native.console.decode()) == printed
    for result in results.values():
        assert (result.console, result.registers) == (native.console, native.registers)
        assert (result.instructions, result.memory_sha256) == (native.instructions, native.memory_sha256)
    count = native.exits.rows[reason].count
    assert count >= 602 if way == 1 else count == 301
    by_wall_clock = VirtualMachine(image, "native", clock="host", paravirt="kvm").run(timeout=30)
    assert timeless(by_wall_clock.console.decode()) == printed


# Bad input

BAD = {
    "past the end of memory": MEMORY,
    "in the hole below one megabyte": 0xA0000,
    "in the emptiness where a BIOS would be": 0xF0000,
    "past four gigabytes": 1 << 32,
    "past everything": WIDE - 15,
    "in the last bytes of memory": MEMORY - 16,
    "over the end of a page": DATA + 0xFF0,
}


@pytest.mark.parametrize("mode", UNMODIFIED)
@pytest.mark.parametrize("place", BAD)
def test_a_record_where_no_memory_is_is_ignored(mode: str, place: str) -> None:
    """The MSRs take any value, as KVM's do, and nothing is written; the guest goes on."""
    source = "".join(set_msr(n, BAD[place] | 1) for n in (abi.SYSTEM_TIME, abi.SYSTEM_TIME_NEW))
    source += "".join(set_msr(n, BAD[place] + 8) for n in (abi.WALL_CLOCK, abi.WALL_CLOCK_NEW))
    found = guest(source + set_msr(0x10, 1) + "end: hlt", mode)
    before = found.memory
    found.run_to("end")
    assert found.memory == before


def test_a_record_need_not_be_aligned() -> None:
    """KVM documents four bytes, and does not look."""
    found = guest(set_msr(abi.SYSTEM_TIME_NEW, RECORD + 2 | 1) + "end: hlt")
    found.run_to("end")
    assert record(found, RECORD + 2).version == 2


def test_a_wall_clock_at_zero_is_none() -> None:
    """Address 0 means that the guest wants none."""
    memory = Memory(2 << 20)
    write_wall_clock(memory, 0, 10**18)
    assert not any(memory.bytes[:16])


@pytest.mark.parametrize("mode", ("native", "hvm", "bt"))
def test_a_record_in_code_is_code(mode: str) -> None:
    """A guest that has the record written over instructions which it has executed executes what was written."""
    found = guest(
        f"""
        call patch
        {set_msr(abi.WALL_CLOCK_NEW, 0x100100 - 4)}
        call patch
end:    hlt
        times 0x100 - ($ - start) db 0x90
patch:  nop
        nop
        nop
        nop
        nop
        ret
""",
        mode,
    )
    assert found.symbol("patch") == 0x100100
    code = EPOCH_2000.to_bytes(4, "little")  # 80 43 6D 38
    found.machine.state.set(3, DATA)
    found.machine.state.store()
    found.machine.memory.load(0x100104, b"\x90" * 4 + b"\xc3")
    found.run(40)
    assert found.data(0x100100, 4) == code
    # 80 43 6D 38: add byte [ebx + 0x6d], 0x38; then the nanoseconds, which are zero: add [eax], al
    assert found.read(DATA + 0x6D, 1) == 0x38


# The end of an interrupt


@dataclasses.dataclass
class Apic:
    """As much of one as matters: interrupts in service."""

    silent: bool = True
    ended: int = 0

    def ends_silently(self) -> bool:
        return self.silent

    def eoi(self) -> None:
        self.ended += 1


@given(st.lists(st.sampled_from(("interrupt", "end", "look", "busy")), max_size=30))
def test_each_interrupt_ends_once_whichever_way(acts: list[str]) -> None:
    """The guest clears the bit where it is set, and writes EOI where not; however the two sides take turns, whoever
    looks at the APIC finds each interrupt ended that the guest has ended, once, and no other."""
    memory, apic = Memory(2 << 20), Apic()
    byte = PvEoi(memory, apic)
    byte.write(DATA | 1)
    served = ended = 0
    for act in acts:
        if act == "interrupt" and served == ended:
            byte.take_back()
            served += 1
            byte.offer()
            assert memory.read(DATA, 1) == (abi.EOI_PENDING if apic.silent else 0)
        elif act == "end" and served > ended:
            ended += 1
            if memory.read(DATA, 1) & abi.EOI_PENDING:
                memory.write(DATA, 1, 0)
            else:
                byte.take_back()
                apic.eoi()
        elif act == "busy":
            apic.silent = not apic.silent
        elif act == "look":
            byte.take_back()
            assert apic.ended == ended
            assert not memory.read(DATA, 1)
    byte.take_back()
    assert apic.ended == ended


@pytest.mark.parametrize("value", (DATA | 3, DATA + 2, MEMORY | 1, 0xA0000 | 1, WIDE))
def test_a_bad_address_for_the_byte_is_refused(value: int) -> None:
    """#GP, as KVM has it: misaligned, or not in RAM; the register stays as it was."""
    byte = PvEoi(Memory(MEMORY), Apic())
    with pytest.raises(Fault) as refused:
        byte.write(value)
    assert (refused.value.vector, refused.value.error_code) == (Vector.GP, 0)
    assert byte.read() == 0


# Vector 0x41 sends 0x51 (above it) to itself, and ends first; each ends by the byte where it is set.
INTERRUPTS = f"""
        mov dword [{apic.BASE + apic.SVR:#x}], {apic.ENABLE | 0xFF:#x}
        {set_msr(abi.PV_EOI_EN, DATA | 1)}
        sti
        mov dword [{apic.BASE + apic.ICR_LOW:#x}], 0x40041
        nop
        nop
        cli
        mov edx, [{apic.BASE + apic.ISR + 0x20:#x}]
end:    jmp end
low:    mov ebx, [DATA]
        mov dword [{apic.BASE + apic.ICR_LOW:#x}], 0x40051
        mov ecx, [DATA]
        sti
        nop
        cli
        call finish
        iretd
high:   mov ebp, [DATA]
        call finish
        iretd
finish: btr dword [DATA], 0
        jc silent
        inc esi
        mov dword [{apic.BASE + apic.EOI:#x}], 0
        ret
silent: inc edi
        ret
"""


def interrupted(mode: str, *, offer: bool = True) -> Lab:
    """`INTERRUPTS`, at their end."""
    code = assemble(INTERRUPTS).symbols
    gates = {0x41: gate(code["low"]), 0x51: gate(code["high"])}
    attach = offered(mode) if offer else None
    found = lab(INTERRUPTS, mode, idt=gates, attach=attach, model="pc")
    found.run_to("end")
    return found


@pytest.mark.parametrize("mode", UNMODIFIED)
def test_an_interrupt_ends_without_a_store_to_the_apic(mode: str) -> None:
    """The processor takes a vector, and the byte is set: the guest needs no EOI. That the APIC is looked at takes it
    back, and then it does: so of two nested ones the outer is ended by the store, the inner by the byte, and nothing
    stays in service. It is the same in every mode."""
    found = interrupted(mode)
    assert (found.reg("ebx"), found.reg("ecx"), found.reg("ebp")) == (1, 0, 1)
    assert (found.reg("edi"), found.reg("esi")) == (1, 1)
    assert found.reg("edx") == 0
    assert found.read(DATA) == 0
    assert found.everything() == interrupted("native").everything()


@pytest.mark.parametrize("mode", UNMODIFIED)
@pytest.mark.parametrize("value", (DATA | 3, MEMORY | 1))
def test_a_guest_that_gives_a_bad_address_for_the_byte_gets_a_fault(mode: str, value: int) -> None:
    """#GP(0) in every mode; so it does where the machine has no APIC, whatever the address."""
    for model, good in (("pc", value), ("isapc", DATA | 1)):
        found = lab(set_msr(abi.PV_EOI_EN, good), mode, attach=offered(mode), model=model)  # type: ignore[arg-type]
        found.run(20)
        assert found.vector == Vector.GP


def test_the_feature_is_told_of_where_there_is_an_apic() -> None:
    """CPUID offers the byte to a guest that has a local APIC, and to no other."""
    for model, bit in (("pc", abi.PV_EOI), ("isapc", 0)):
        source = f"mov eax, {abi.FEATURES_LEAF:#x}\n cpuid\n hlt"
        found = lab(source, attach=offered(), model=model)  # type: ignore[arg-type]
        found.run(20)
        assert found.reg("eax") == FEATURES | bit


# The command line


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    (
        ("run guests/hello.asm --mode pv --paravirt kvm", "a guest of pv has no machine"),
        ("compare guests/hello.asm --modes native,pv --paravirt kvm", "a guest of pv has no machine"),
        ("run guests/hello.asm --paravirt xen", "--paravirt xen: no such interface: choose kvm"),
        ("compare guests/hello.asm --paravirt ''", "no such interface"),
    ),
)
def test_where_it_cannot_be_it_is_refused_in_a_line(
    arguments: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Status 2, one line, before anything runs."""
    assert main([word.strip("'") for word in arguments.split()]) == 2
    told = capsys.readouterr().err
    assert complaint in told
    assert told.count("\n") == 1
