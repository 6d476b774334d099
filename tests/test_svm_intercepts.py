"""Intercepts as a policy: what a name means, what cannot be asked, and that the real CPU agrees on each bit."""

from __future__ import annotations

import struct

import pytest
import unicorn
from hypothesis import given
from hypothesis import strategies as st
from unicorn import x86_const

from vmm.errors import UsageError
from vmm.monitor.hardware.checks import check
from vmm.monitor.hardware.exits import ExitCode
from vmm.monitor.hardware.intercepts import (
    EFER,
    EVERY_MSR,
    HOOKED_EXCEPTIONS,
    MINIMUM,
    MISC,
    MSR_MAP_SIZE,
    NAMES,
    VM_CR,
    VM_HSAVE_PA,
    By,
    Intercepts,
    msr_place,
)
from vmm.monitor.hardware.vmcb import SEGMENTS, Vmcb

words = st.sampled_from(sorted(NAMES)) | st.builds(
    lambda msr, way: f"msr:{msr:#x}{way}",
    st.sampled_from([0, 0x10, 0x174, 0x1FFF, 0xC000_0000, EFER, 0xC000_1FFF, 0xC001_0000, 0xC001_1FFF]),
    st.sampled_from(["", "-read", "-write"]),
)

# Names and parsing


@given(st.lists(words, max_size=6))
def test_a_policy_reads_as_it_prints(asked: list[str]) -> None:
    """What a policy prints is what parses to it again, and it never asks for less than the minimum."""
    policy = Intercepts.parse(",".join(asked))
    assert Intercepts.parse(str(policy)) == policy
    assert policy | MINIMUM == policy
    for word in asked:
        assert policy | Intercepts.parse(word) == policy


def test_names_mean_what_they_say() -> None:
    """A register's name is its reads and its writes; an exception's its vector; an instruction's its exit code."""
    assert NAMES["cr3"] == Intercepts(cr_reads=frozenset({3}), cr_writes=frozenset({3}))
    assert NAMES["cr0-write"] == NAMES["clts"] == NAMES["lmsw"] == Intercepts(cr_writes=frozenset({0}))
    assert NAMES["dr7-read"] == Intercepts(dr_reads=frozenset({7}))
    assert NAMES["pf"] == Intercepts(exceptions=frozenset({14}))
    assert NAMES["sgdt"] == Intercepts(misc=frozenset({ExitCode.VMEXIT_GDTR_READ}))
    assert Intercepts.parse("msr:0x174-write").msr_writes == {0x174, EFER, VM_CR, VM_HSAVE_PA}
    assert Intercepts.parse("msr").msr_reads == EVERY_MSR
    assert Intercepts.parse(" CR3 ,, cpuid ") == Intercepts.parse("cpuid,cr3")
    assert Intercepts.parse("") == MINIMUM


def test_the_minimum_contains_the_guest() -> None:
    """Everything that reaches past the monitor is intercepted without being asked for."""
    names = ["vmrun", "vmload", "vmsave", "stgi", "clgi", "skinit", "invlpga", "hlt", "shutdown", "ioio"]
    assert MINIMUM.misc == {ExitCode[f"VMEXIT_{n.upper()}"] for n in names} | {ExitCode.VMEXIT_MSR}
    assert MINIMUM.msr_reads == MINIMUM.msr_writes == {0xC000_0080, 0xC001_0114, 0xC001_0117}


def test_all_is_everything_that_is_not_refused() -> None:
    """`all` leaves out only what this CPU cannot do, the endless VINTR above all."""
    everything = NAMES["all"]
    assert everything.misc == {code for code, row in MISC.items() if row.by is not By.NOBODY}
    assert ExitCode.VMEXIT_VINTR not in everything.misc
    assert all(everything | policy == everything for policy in NAMES.values())


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("vintr", "--intercept vintr: this CPU would report the same virtual interrupt without end"),
        ("cr0-sel-write", "--intercept cr0-sel-write: this CPU never reports it: take cr0-write"),
        ("cpuidd", "--intercept cpuidd: no such intercept; did you mean cpuid?"),
        ("", None),
        ("???", "--intercept ???: no such intercept; give names such as cr3, cpuid, pf, msr:0x174 or all"),
        ("msr:", "--intercept msr:: give a register's number, such as msr:0x174 or msr:0x174-read"),
        (
            "msr:0x174-",
            "--intercept msr:0x174-: give a register's number, such as msr:0x174 or msr:0x174-read",
        ),
        ("msr:-1", "--intercept msr:-1: give a register's number, such as msr:0x174 or msr:0x174-read"),
        (
            "msr:0x40000000",
            "--intercept msr:0x40000000: no bit of the MSR permission map is for it: it always exits",
        ),
    ],
)
def test_what_cannot_be_asked(word: str, says: str | None) -> None:
    """A wrong name gets one line with what is near, a refused one the reason."""
    if says is None:
        assert Intercepts.parse(word) == MINIMUM
        return
    with pytest.raises(UsageError) as error:
        Intercepts.parse(f"cr3,{word}")
    assert str(error.value) == says


@given(st.text())
def test_any_text_is_a_policy_or_one_line(text: str) -> None:
    """Whatever stands after --intercept, it is understood or answered in one line."""
    try:
        Intercepts.parse(text)
    except UsageError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 200


# The bits


def test_msr_places_are_the_manuals() -> None:
    """APM 2, 15.11: two bits a register, ranges at 0, 0x800 and 0x1000 of the map."""
    places = {
        0x0: (0, 0),
        0x1: (0, 2),
        0x1FFF: (0x7FF, 6),
        0xC000_0000: (0x800, 0),
        0xC000_0080: (0x820, 0),
        0xC001_0000: (0x1000, 0),
        0xC001_0117: (0x1045, 6),
        0xC001_1FFF: (0x17FF, 6),
    }
    assert {msr: msr_place(msr) for msr in places} == places
    for outside in (0x2000, 0xBFFF_FFFF, 0xC000_2000, 0xC001_2000):
        with pytest.raises(KeyError):
            msr_place(outside)


def test_the_msr_map_has_a_bit_for_each_way() -> None:
    """Reads are the lower bit of a register, writes the upper, and nothing else is set."""
    policy = Intercepts(msr_reads=frozenset({0x174, EFER}), msr_writes=frozenset({0x175, EFER}))
    page = policy.msr_map()
    assert len(page) == MSR_MAP_SIZE
    assert {i: b for i, b in enumerate(page) if b} == {0x5D: 0b1001, 0x820: 0b11}


def test_the_vectors_are_the_policy() -> None:
    """Writing a policy sets its bits and clears all others."""
    vmcb = Vmcb.new()
    vmcb.load(b"\xff" * 0x1000)
    Intercepts.parse("cr3-write,cr0-read,dr7-write,pf,gp,cpuid").write(vmcb)
    assert (vmcb.intercept_cr_reads, vmcb.intercept_cr_writes) == (1 << 0, 1 << 3)
    assert (vmcb.intercept_dr_reads, vmcb.intercept_dr_writes) == (0, 1 << 7)
    assert vmcb.intercept_exceptions == 1 << 13 | 1 << 14
    assert vmcb.intercept_misc1 == 1 << 18 | 1 << 24 | 1 << 26 | 1 << 27 | 1 << 28 | 1 << 31
    assert vmcb.intercept_misc2 == 0b1111101
    assert vmcb.intercept_misc3 == 0


# The real CPU

HOST_CODE, CONTROL, HOST_SAVE, MSR_MAP, IO_MAP, GUEST = 0x1000, 0x10000, 0x11000, 0x12000, 0x15000, 0x20000
HLT = ExitCode.VMEXIT_HLT

# An instruction for each name, and its exit where that has another name.
INSTRUCTIONS = {
    "idtr-read": "0f010d00500000",
    "gdtr-read": "0f010500500000",
    "ldtr-read": "0f00c0",
    "tr-read": "0f00c8",
    "idtr-write": "0f011d00500000",
    "gdtr-write": "0f011500500000",
    "ldtr-write": "0f00d0",
    "tr-write": "0f00d8",
    "rdtsc": "0f31",
    "rdpmc": "0f33",
    "pushf": "9c",
    "popf": "9d",
    "cpuid": "0fa2",
    "rsm": "0faa",
    "iret": "cf",
    "swint": "cd80",
    "invd": "0f08",
    "pause": "f390",
    "hlt": "f4",
    "invlpg": "0f0138",
    "invlpga": "0f01df",
    "vmrun": "0f01d8",
    "vmmcall": "0f01d9",
    "vmload": "0f01da",
    "vmsave": "0f01db",
    "stgi": "0f01dc",
    "clgi": "0f01dd",
    "skinit": "0f01de",
    "wbinvd": "0f09",
    **{f"cr{n}-read": f"0f20{0xC0 | n << 3:02x}" for n in (0, 2, 3, 4)},
    **{f"cr{n}-write": f"0f22{0xC0 | n << 3:02x}" for n in (0, 2, 3, 4)},
    **{f"dr{n}-read": f"0f21{0xC0 | n << 3:02x}" for n in range(8)},
    **{f"dr{n}-write": f"0f23{0xC0 | n << 3:02x}" for n in range(8)},
    "smsw": "0f01e0",
    "lmsw": "0f01f0",
    "clts": "0f06",
    "de": "31c0f7f0",
    "ud": "0f0b",
    "gp": "66b8ff008ed8",
}
CODES = {
    "smsw": "CR0_READ",
    "lmsw": "CR0_WRITE",
    "clts": "CR0_WRITE",
    "de": "EXCP0",
    "ud": "EXCP6",
    "gp": "EXCP13",
}


def guest_exit(code: str, policy: Intercepts, ecx: int = 0) -> int | None:
    """Run the bytes `code`, then HLT, as a guest of a bare CPU under `policy`.

    The exit code; a vector as a negative number -1 - vector; None if the CPU took nothing.
    """
    uc = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_32)
    uc.ctl_set_cpu_model(x86_const.UC_CPU_X86_EPYC)
    uc.mem_map(0, 0x40000)
    uc.msr_write(EFER, uc.msr_read(EFER) | 1 << 12)
    uc.msr_write(VM_HSAVE_PA, HOST_SAVE)
    vmcb = Vmcb.new()
    policy.write(vmcb)
    vmcb.msrpm_base_pa, vmcb.iopm_base_pa, vmcb.guest_asid = MSR_MAP, IO_MAP, 1
    vmcb.efer, vmcb.cr0, vmcb.rflags, vmcb.rip, vmcb.rsp = 1 << 12, 0x11, 2, GUEST, 0x30000
    data, code_segment = (0x10, 0xC93, 0xFFFF_FFFF, 0), (0x08, 0xC9B, 0xFFFF_FFFF, 0)
    tables, task = (0, 0, 0x3F, 0x2000) * 3, (0x28, 0x89, 0x67, 0x3000)
    SEGMENTS.write(vmcb, *data, *code_segment, *data * 4, *tables, *task)
    refused = {failure.field for failure in check(vmcb)}
    assert refused <= {"intercept_misc2"}, "what VMRUN itself would refuse proves nothing"
    uc.mem_write(CONTROL, bytes(vmcb))
    uc.mem_write(MSR_MAP, policy.msr_map())
    uc.mem_write(IO_MAP, b"\xff" * 0x3000)
    uc.mem_write(GUEST, bytes.fromhex(code + "f4"))
    uc.mem_write(HOST_CODE, b"\xb8" + struct.pack("<I", CONTROL) + bytes.fromhex("0f01d8"))
    uc.reg_write(x86_const.UC_X86_REG_ECX, ecx)
    seen: list[int] = []

    def stop(uc: unicorn.Uc, vector: int, _: object) -> None:
        seen.append(vector - 0x100 if vector >= 0x100 else -1 - vector)
        uc.emu_stop()

    uc.hook_add(unicorn.UC_HOOK_INTR, stop)
    try:
        uc.emu_start(HOST_CODE, 0, timeout=5_000_000)
    except unicorn.UcError as error:
        if error.errno != unicorn.UC_ERR_INSN_INVALID:
            raise
        seen.append(-1 - 6)
    return seen[0] if seen else None


@pytest.mark.parametrize("word", INSTRUCTIONS)
def test_a_bit_is_the_cpus(word: str) -> None:
    """The bit that a name sets is the one by which the real CPU exits, with the manual's exit code."""
    policy = Intercepts(misc=frozenset({HLT})) | NAMES[word]
    code = ExitCode[f"VMEXIT_{CODES.get(word, word.upper().replace('-', '_'))}"]
    if code in MISC:
        code = MISC[code].arrives_as or code
    assert guest_exit(INSTRUCTIONS[word], policy) == code


# These need more than the empty machine above to get by without their intercept.
NOT_WITHOUT = {"hlt", "iret", "skinit", "vmload", "vmsave", "vmrun", "popf", "rsm"}


@pytest.mark.parametrize("word", sorted(set(INSTRUCTIONS) - NOT_WITHOUT))
def test_without_its_bit_nothing_exits(word: str) -> None:
    """With every other intercept set but its own, an instruction does not exit as itself."""
    code = ExitCode[f"VMEXIT_{CODES.get(word, word.upper().replace('-', '_'))}"]
    own = {code, MISC[code].arrives_as or code} if code in MISC else {code}
    policy = NAMES["all"]
    named = NAMES[word]
    rest = Intercepts(
        policy.cr_reads - named.cr_reads,
        policy.cr_writes - named.cr_writes,
        policy.dr_reads - named.dr_reads,
        policy.dr_writes - named.dr_writes,
        policy.exceptions - named.exceptions,
        frozenset(c for c in policy.misc if c not in own and MISC[c].arrives_as not in own),
        policy.msr_reads,
        policy.msr_writes,
    )
    assert guest_exit(INSTRUCTIONS[word], rest) not in own


@pytest.mark.parametrize("msr", [0x174, 0x1FFF, EFER, 0xC000_1FFF, 0xC001_0000, VM_CR, VM_HSAVE_PA])
def test_msr_bits_are_the_cpus(msr: int) -> None:
    """A register's two bits of the map are where the real CPU looks for its reads and its writes."""
    for way, code, other in (("read", "0f32", "0f30"), ("write", "0f30", "0f32")):
        policy = Intercepts(misc=frozenset({HLT})) | Intercepts.parse(f"msr:{msr:#x}-{way}")
        if msr not in MINIMUM.msr_reads:
            assert guest_exit(other, policy, msr) == HLT
        assert guest_exit(code, policy, msr) == ExitCode.VMEXIT_MSR
        assert guest_exit(code, policy, 0x4000_0000) == ExitCode.VMEXIT_MSR, "outside the map: always"


@pytest.mark.parametrize(
    ("word", "code"),
    [
        ("cr0-sel-write", "0f22c0"),
        ("ferr-freeze", "d9d0"),
        ("icebp", "f1"),
        ("xsetbv", "0f01d1"),
        ("rdpru", "0f01fd"),
    ],
)
def test_what_is_refused_is_not_reported(word: str, code: str) -> None:
    """An intercept is refused because the real CPU, with its bit set, does not exit for it."""
    exit_code = ExitCode["VMEXIT_" + word.upper().replace("-", "_")]
    assert MISC[exit_code].by is By.NOBODY
    policy = Intercepts(misc=frozenset({HLT, exit_code}))
    assert guest_exit(code, policy) in (HLT, -1 - 6)


@pytest.mark.parametrize("code", ["ec", "ee", "e420", "e620", "ed", "66ef", "6c", "6e", "f36e"])
def test_the_io_map_is_dead(code: str) -> None:
    """Why ports come from hooks: with IOIO intercepted and every bit of the map set, no port access exits."""
    assert guest_exit(code, NAMES["ioio"] | MINIMUM) == HLT
    assert MISC[ExitCode.VMEXIT_IOIO].by is By.HOOK


@pytest.mark.parametrize(("code", "vector"), [("cc", 3), ("b07f0401ce", 4)])
def test_breakpoint_and_overflow_pass_by_their_bits(code: str, vector: int) -> None:
    """INT3 and INTO arrive as their vectors whether intercepted or not: the machine's hook must tell."""
    assert vector in HOOKED_EXCEPTIONS
    policy = Intercepts(misc=frozenset({HLT}), exceptions=frozenset({vector}))
    assert guest_exit(code, policy) == -1 - vector
    assert guest_exit(code, policy | NAMES["swint"]) == ExitCode.VMEXIT_SWINT
