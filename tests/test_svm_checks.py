"""The entry checks of VMRUN: every valid state enters, and one wrong field is named, by its rule."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.monitor.hardware.checks import CHECKS, ENGINE, MANUAL, Host, check
from vmm.monitor.hardware.intercepts import NAMES, Intercepts
from vmm.monitor.hardware.vmcb import Segment, Vmcb

# What is defined, written down from the manual and not from the code.
EFER_BITS = (0, 11, 14)  # SCE, NXE, FFXSR: free to choose; SVME, bit 12, is not
CR4_BITS = (*range(12), 20, 21)
CR0_BITS = (0, 1, 2, 3, 4, 5, 16, 18, 30, 31)
EXCEPTIONS_THAT_EXIST = (0, 1, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 14, 16, 17, 18, 19)
MEMORY_TYPES = (0, 1, 4, 5, 6, 7)
NARROW = (
    "rip",
    "rsp",
    "rax",
    "rflags",
    "cr2",
    "sysenter_cs",
    "sysenter_esp",
    "sysenter_eip",
    "cr3",
    "dr6",
    "dr7",
)
SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs", "gdtr", "ldtr", "idtr", "tr")

word = st.integers(0, (1 << 32) - 1)
quad = st.integers(0, (1 << 64) - 1)
high = quad.filter(lambda value: value >> 32)


def bits(numbers: tuple[int, ...]) -> st.SearchStrategy[int]:
    return st.sets(st.sampled_from(numbers)).map(lambda some: sum(1 << n for n in some))


@st.composite
def vmcbs(draw: st.DrawFn) -> Vmcb:
    """Any VMCB that may enter: every field drawn from all that the rules leave it."""
    v = Vmcb.new()
    policy = Intercepts.parse(
        ",".join(draw(st.lists(st.sampled_from(sorted(set(NAMES) - {"msr"})), max_size=4)))
    )
    policy.write(v)
    for field in NARROW:
        setattr(v, field, draw(word))
    for field in SEGMENTS:
        limit = draw(st.integers(0, 0xFFFF) if field in ("gdtr", "idtr") else word)
        setattr(
            v, field, Segment(draw(st.integers(0, 0xFFFF)), draw(st.integers(0, 0xFFF)), limit, draw(word))
        )
    v.tr = v.tr._replace(attrib=v.tr.attrib & 0xF60 | draw(st.sampled_from([0x81, 0x89])))
    v.cr0 = draw(bits(CR0_BITS))
    if v.cr0 & 1 << 30:
        v.cr0 |= draw(st.sampled_from([0, 1 << 29]))
    v.cr4, v.efer = draw(bits(CR4_BITS)), draw(bits(EFER_BITS)) | 1 << 12
    v.cpl = 0 if not v.cr0 & 1 else 3 if v.rflags & 1 << 17 else v.ss.attrib >> 5 & 3
    v.guest_asid = draw(st.integers(1, (1 << 32) - 1))
    v.tlb_control = draw(st.integers(0, 1))
    v.tsc_offset, v.star, v.lstar, v.kernel_gs_base, v.dbgctl = (draw(quad) for _ in range(5))
    v.exitcode, v.exitinfo1, v.exitinfo2, v.exitintinfo, v.nrip = (draw(quad) for _ in range(5))
    v.vmcb_clean = draw(word)
    v.v_tpr, v.v_irq, v.v_intr_vector = (
        draw(st.integers(0, 15)),
        draw(st.integers(0, 1)),
        draw(st.integers(0, 255)),
    )
    v.interrupt_shadow = draw(st.integers(0, 1))
    v.msrpm_base_pa = draw(st.integers(0, 0xFFFF_E)) << 12
    v.iopm_base_pa = draw(st.integers(0, 0xFFFF_DFFF))
    if draw(st.booleans()):
        v.np_enable, v.n_cr3 = 1, draw(word)
        v.g_pat = int.from_bytes(bytes(draw(st.lists(st.sampled_from(MEMORY_TYPES), min_size=8, max_size=8))))
    else:
        v.n_cr3, v.g_pat = draw(quad), draw(quad)
    v.eventinj = draw(st.integers(0, 255)) | draw(st.sampled_from([0, 1 << 31, 1 << 11])) | draw(word) << 32
    return v


def flip(field: str, wrong: st.SearchStrategy[int]) -> Callable[[Vmcb, st.DataObject], None]:
    """Give a field a value against its rule."""

    def corrupt(v: Vmcb, data: st.DataObject) -> None:
        name, _, part = field.partition(".")
        value = data.draw(wrong)
        setattr(v, name, getattr(v, name)._replace(**{part: value}) if part else value)

    return corrupt


def put(field: str, wrong: st.SearchStrategy[int]) -> Callable[[Vmcb, st.DataObject], None]:
    """Set bits against a field's rule, the others staying."""

    def corrupt(v: Vmcb, data: st.DataObject) -> None:
        setattr(v, field, getattr(v, field) | data.draw(wrong))

    return corrupt


def clear(field: str, mask: int) -> Callable[[Vmcb, st.DataObject], None]:
    def corrupt(v: Vmcb, data: st.DataObject) -> None:
        setattr(v, field, getattr(v, field) & ~mask)

    return corrupt


def one_of_bits(numbers: tuple[int, ...]) -> st.SearchStrategy[int]:
    return st.sampled_from(numbers).map(lambda n: 1 << n)


def event(kinds: tuple[int, ...], vectors: tuple[int, ...] = tuple(range(256))) -> st.SearchStrategy[int]:
    return st.builds(lambda k, v: 1 << 31 | k << 8 | v, st.sampled_from(kinds), st.sampled_from(vectors))


def nested_paging(field: str, wrong: st.SearchStrategy[int]) -> Callable[[Vmcb, st.DataObject], None]:
    def corrupt(v: Vmcb, data: st.DataObject) -> None:
        v.np_enable, v.n_cr3, v.g_pat = 1, 0, 0
        setattr(v, field, data.draw(wrong))

    return corrupt


def bad_privilege(v: Vmcb, data: st.DataObject) -> None:
    v.cpl = data.draw(st.integers(0, 255).filter(lambda cpl: cpl != v.cpl))


def _bit(low: int, high_: int) -> tuple[int, ...]:
    return tuple(range(low, high_))


# What is wrong, the field that has to be named, part of the rule.
WRONG: list[tuple[str, str, Callable[[Vmcb, st.DataObject], None]]] = [
    ("efer", "SVME must be set", clear("efer", 1 << 12)),
    ("efer", "a bit that must be zero", put("efer", one_of_bits((*_bit(1, 8), 9, 13, *_bit(15, 64))))),
    ("efer", "long mode", put("efer", one_of_bits((8, 10)))),
    ("cr0", "NW must not be set without CD", lambda v, d: setattr(v, "cr0", v.cr0 & ~(1 << 30) | 1 << 29)),
    ("cr0", "bits 63 to 32", put("cr0", one_of_bits(_bit(32, 64)))),
    ("cr3", "above the physical address", flip("cr3", high)),
    ("cr4", "a bit that must be zero", put("cr4", one_of_bits((*_bit(12, 20), *_bit(22, 64))))),
    ("dr6", "bits 63 to 32", put("dr6", one_of_bits(_bit(32, 64)))),
    ("dr7", "bits 63 to 32", put("dr7", one_of_bits(_bit(32, 64)))),
    ("intercept_misc2", "VMRUN must be intercepted", clear("intercept_misc2", 1)),
    (
        "msrpm_base_pa",
        "in physical memory",
        flip("msrpm_base_pa", st.integers(0xFFFF_F, (1 << 52) - 1).map(lambda n: n << 12)),
    ),
    ("msrpm_base_pa", "begin a page", put("msrpm_base_pa", st.integers(1, 0xFFF))),
    ("iopm_base_pa", "in physical memory", flip("iopm_base_pa", st.integers(0xFFFF_E000, (1 << 64) - 1))),
    ("guest_asid", "ASID 0", flip("guest_asid", st.just(0))),
    ("eventinj", "the type is reserved", flip("eventinj", event((1, 5, 6, 7)))),
    (
        "eventinj",
        "no exception's",
        flip("eventinj", event((3,), tuple(n for n in range(256) if n not in EXCEPTIONS_THAT_EXIST))),
    ),
    ("eventinj", "only external interrupts", flip("eventinj", event((2, 4)))),
    ("eventinj", "only external interrupts", flip("eventinj", event((3,), EXCEPTIONS_THAT_EXIST))),
    ("eventinj", "a reserved bit", put("eventinj", one_of_bits(_bit(12, 31)))),
    ("n_cr3", "must be zero", nested_paging("n_cr3", high)),
    (
        "g_pat",
        "memory type",
        nested_paging(
            "g_pat",
            st.builds(
                lambda byte, at: byte << 8 * at,
                st.integers(0, 255).filter(lambda byte: byte not in MEMORY_TYPES),
                st.integers(0, 7),
            ),
        ),
    ),
    ("intercept_misc1", "VINTR must not", put("intercept_misc1", st.just(1 << 4))),
    (
        "tr.attrib",
        "available TSS",
        flip("tr.attrib", st.integers(0, 0xFFF).filter(lambda a: a & 0x9F not in (0x81, 0x89))),
    ),
    ("cpl", "privilege of SS", bad_privilege),
    ("tlb_control", "must be 0 or 1", flip("tlb_control", st.integers(2, 255))),
    *((f"{name}.base", "bits 63 to 32", flip(f"{name}.base", high)) for name in SEGMENTS),
    *(
        (f"{t}.limit", "bits 31 to 16", flip(f"{t}.limit", st.integers(1 << 16, (1 << 32) - 1)))
        for t in ("gdtr", "idtr")
    ),
    *(
        (name, "bits 63 to 32", flip(name, high))
        for name in NARROW
        if name not in ("cr3", "dr6", "dr7", "rflags")
    ),
    ("rflags", "bits 63 to 32", put("rflags", one_of_bits(_bit(32, 64)))),
    ("intercept_misc3", "must be zero", flip("intercept_misc3", st.integers(1, (1 << 32) - 1))),
    ("nested_control", "only NP_ENABLE", put("nested_control", one_of_bits(_bit(1, 64)))),
    (
        "virtualization_extensions",
        "must be zero",
        flip("virtualization_extensions", st.integers(1, (1 << 64) - 1)),
    ),
    ("pause_filter_count", "must be zero", flip("pause_filter_count", st.integers(1, 0xFFFF))),
    *(
        (n, "must be zero", flip(n, st.just(1)))
        for n in ("vgif_enable", "v_nmi_enable", "x2avic_enable", "avic_enable")
    ),
]
# Rules that need another host than this machine's.
OTHER_HOSTS = {
    ("cr4", "long mode needs PAE"),
    ("cr0", "long mode needs PE"),
    ("cs.attrib", "L and D must not both be set in long mode"),
    ("eventinj", "the exception cannot happen in 64-bit mode"),
    ("np_enable", "nested paging needs a host with paging"),
}


@given(vmcbs())
def test_a_valid_state_enters(v: Vmcb) -> None:
    """Nothing that the rules allow is refused."""
    assert check(v) == []


@pytest.mark.parametrize(("field", "rule", "corrupt"), WRONG, ids=lambda p: p if isinstance(p, str) else "")
@settings(max_examples=20)  # for each of some fifty rows
@given(data=st.data())
def test_one_wrong_field_is_named(
    field: str, rule: str, corrupt: Callable[[Vmcb, st.DataObject], None], data: st.DataObject
) -> None:
    """Of an otherwise valid state, the one wrong field is named with its value and its rule, in one line."""
    v = data.draw(vmcbs())
    corrupt(v, data)
    failures = check(v)
    assert {failure.field for failure in failures} == {field}
    assert any(rule in failure.rule for failure in failures)
    for failure in failures:
        name, _, part = field.partition(".")
        value = getattr(getattr(v, name), part) if part else getattr(v, name)
        assert failure.value == value
        assert str(failure).startswith(f"{field} = {value:#x}: ") and "\n" not in str(failure)


def test_every_check_has_its_wrong_state() -> None:
    """No row of the tables is left untried by the property above, but for those that need another host."""
    for row in CHECKS:
        tried = any(field == row.field and rule in row.rule for field, rule, _ in WRONG)
        assert tried != ((row.field, row.rule) in OTHER_HOSTS), row.rule


def test_whose_rule_it_is() -> None:
    """A failure says whether the manual refuses the state, with the section, or only this CPU, with what it does."""
    assert all(row.source.startswith("APM 2, 15.") for row in MANUAL)
    assert all(row.source.startswith("this CPU") for row in ENGINE)
    failures = {failure.field: failure for failure in check(Vmcb.new())}
    assert set(failures) == {"efer", "intercept_misc2", "guest_asid", "tr.attrib"}
    assert failures["efer"].is_manual and not failures["tr.attrib"].is_manual
    assert str(failures["efer"]) == "efer = 0x0: SVME must be set (APM 2, 15.5.1)"


# Hosts that this machine is not


def valid() -> Vmcb:
    v = Vmcb.new()
    Intercepts.parse("").write(v)
    v.efer, v.guest_asid, v.tr = 1 << 12, 1, Segment(0x28, 0x89, 0x67, 0)
    assert check(v) == []
    return v


def test_long_mode_has_its_rules() -> None:
    """On a processor with long mode: PAE and PE with it, never CS.L with CS.D, no BOUND or INTO in 64 bits."""
    host = Host(maximum_physical=1 << 40, long_mode=True)
    v = valid()
    v.efer |= 1 << 8
    assert check(v, host) == [], "without paging it is not active"
    v.cr0 = 1 << 31
    assert [str(failure) for failure in check(v, host)] == [
        "cr4 = 0x0: long mode needs PAE (APM 2, 15.5.1)",
        "cr0 = 0x80000000: long mode needs PE (APM 2, 15.5.1)",
    ]
    v.cr0, v.cr4, v.cr3 = 1 << 31 | 1, 1 << 5, 0xFF_FFFF_F000
    assert check(v, host) == []
    v.cr3 = 1 << 40
    assert [failure.field for failure in check(v, host)] == ["cr3"]
    v.cr3 = 0
    v.cs = Segment(8, 0x29B)  # L
    assert check(v, host) == []
    for vector, happens in ((4, False), (5, False), (6, True)):
        v.eventinj = 1 << 31 | 3 << 8 | vector
        rules = [failure.rule for failure in check(v, host)]
        assert ("the exception cannot happen in 64-bit mode" not in rules) == happens
    v.eventinj = 0
    v.cs = Segment(8, 0x69B)  # L and D
    assert [failure.field for failure in check(v, host)] == ["cs.attrib"]


def test_nested_paging_needs_paging() -> None:
    """A host without paging cannot give its guest nested paging."""
    v = valid()
    v.np_enable = 1
    assert check(v) == []
    assert [failure.field for failure in check(v, Host(paging=False))] == ["np_enable"]


def test_the_limits_of_a_physical_address() -> None:
    """The permission maps may end where memory ends and not one byte later."""
    host = Host(maximum_physical=1 << 24)
    v = valid()
    v.msrpm_base_pa, v.iopm_base_pa = (1 << 24) - 0x2000, (1 << 24) - 0x3000
    assert check(v, host) == []
    v.msrpm_base_pa += 0x1000
    v.iopm_base_pa += 0x1000
    assert [failure.field for failure in check(v, host)] == ["msrpm_base_pa", "iopm_base_pa"]
