"""The VMCB: every field where the manual puts it, and what is written is what is read."""

from __future__ import annotations

import struct
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.isa.descriptors import FLAT_CODE, Descriptor
from vmm.monitor.hardware import vmcb as module
from vmm.monitor.hardware.exits import ExitCode, IoInfo, NestedPageFault, name
from vmm.monitor.hardware.injection import EventInjection, EventType
from vmm.monitor.hardware.vmcb import SIZE, Attributes, Bits, Field, Run, Segment, SegmentRegister, Vmcb

# APM volume 2, table B-1: (offset, lowest bit, bits). Bits count from the byte at the offset.
CONTROL_AREA = {
    "intercept_cr_reads": (0x000, 0, 16),
    "intercept_cr_writes": (0x000, 16, 16),
    "intercept_dr_reads": (0x004, 0, 16),
    "intercept_dr_writes": (0x004, 16, 16),
    "intercept_exceptions": (0x008, 0, 32),
    "intercept_misc1": (0x00C, 0, 32),
    "intercept_misc2": (0x010, 0, 32),
    "intercept_misc3": (0x014, 0, 32),
    "pause_filter_threshold": (0x03C, 0, 16),
    "pause_filter_count": (0x03E, 0, 16),
    "iopm_base_pa": (0x040, 0, 64),
    "msrpm_base_pa": (0x048, 0, 64),
    "tsc_offset": (0x050, 0, 64),
    "guest_asid": (0x058, 0, 32),
    "tlb_control": (0x058, 32, 8),
    "interrupt_control": (0x060, 0, 64),
    "v_tpr": (0x060, 0, 8),
    "v_irq": (0x060, 8, 1),
    "vgif": (0x060, 9, 1),
    "v_nmi": (0x060, 11, 1),
    "v_nmi_mask": (0x060, 12, 1),
    "v_intr_prio": (0x060, 16, 4),
    "v_ign_tpr": (0x060, 20, 1),
    "v_intr_masking": (0x060, 24, 1),
    "vgif_enable": (0x060, 25, 1),
    "v_nmi_enable": (0x060, 26, 1),
    "x2avic_enable": (0x060, 30, 1),
    "avic_enable": (0x060, 31, 1),
    "v_intr_vector": (0x060, 32, 8),
    "interrupt_state": (0x068, 0, 64),
    "interrupt_shadow": (0x068, 0, 1),
    "guest_interrupt_mask": (0x068, 1, 1),
    "exitcode": (0x070, 0, 64),
    "exitinfo1": (0x078, 0, 64),
    "exitinfo2": (0x080, 0, 64),
    "exitintinfo": (0x088, 0, 64),
    "nested_control": (0x090, 0, 64),
    "np_enable": (0x090, 0, 1),
    "sev_enable": (0x090, 1, 1),
    "sev_es_enable": (0x090, 2, 1),
    "avic_apic_bar": (0x098, 0, 64),
    "ghcb_pa": (0x0A0, 0, 64),
    "eventinj": (0x0A8, 0, 64),
    "n_cr3": (0x0B0, 0, 64),
    "virtualization_extensions": (0x0B8, 0, 64),
    "lbr_virtualization_enable": (0x0B8, 0, 1),
    "vmsave_vmload_virtualization": (0x0B8, 1, 1),
    "vmcb_clean": (0x0C0, 0, 32),
    "nrip": (0x0C8, 0, 64),
    "bytes_fetched": (0x0D0, 0, 8),
    "avic_apic_backing_page": (0x0E0, 0, 64),
    "avic_logical_table": (0x0F0, 0, 64),
    "avic_physical_table": (0x0F8, 0, 64),
    "vmsa_pointer": (0x108, 0, 64),
}
# Table B-2, offsets from the start of the save area, which is at 0x400.
SEGMENT_REGISTERS = {
    "es": 0x000,
    "cs": 0x010,
    "ss": 0x020,
    "ds": 0x030,
    "fs": 0x040,
    "gs": 0x050,
    "gdtr": 0x060,
    "ldtr": 0x070,
    "idtr": 0x080,
    "tr": 0x090,
}
SAVED_QUADWORDS = {
    "efer": 0x0D0,
    "cr4": 0x148,
    "cr3": 0x150,
    "cr0": 0x158,
    "dr7": 0x160,
    "dr6": 0x168,
    "rflags": 0x170,
    "rip": 0x178,
    "rsp": 0x1D8,
    "s_cet": 0x1E0,
    "ssp": 0x1E8,
    "isst_addr": 0x1F0,
    "rax": 0x1F8,
    "star": 0x200,
    "lstar": 0x208,
    "cstar": 0x210,
    "sfmask": 0x218,
    "kernel_gs_base": 0x220,
    "sysenter_cs": 0x228,
    "sysenter_esp": 0x230,
    "sysenter_eip": 0x238,
    "cr2": 0x240,
    "g_pat": 0x268,
    "dbgctl": 0x270,
    "br_from": 0x278,
    "br_to": 0x280,
    "last_excp_from": 0x288,
    "last_excp_to": 0x290,
    "spec_ctrl": 0x2E0,
}
# (first byte, lowest bit in the page's bits, width) of everything.
PLACES = {
    **{field: (8 * offset + low, width) for field, (offset, low, width) in CONTROL_AREA.items()},
    **{field: (8 * (0x400 + offset), 128) for field, offset in SEGMENT_REGISTERS.items()},
    **{field: (8 * (0x400 + offset), 64) for field, offset in SAVED_QUADWORDS.items()},
    "cpl": (8 * 0x4CB, 8),
}


def _value(row: object, bits: int) -> int | Segment:
    if isinstance(row, SegmentRegister):
        return Segment(*struct.unpack("<HHIQ", bits.to_bytes(16, "little")))
    return bits


def test_the_table_is_the_manuals() -> None:
    """The VMCB has the fields of the manual's two tables, and no other."""
    assert set(Vmcb.ROWS) == set(PLACES)
    assert all(
        row.section == ("control" if PLACES[f][0] < 0x400 * 8 else "save") for f, row in Vmcb.ROWS.items()
    )


@given(st.data())
def test_a_field_is_at_its_place_and_nowhere_else(data: st.DataObject) -> None:
    """Writing a field changes exactly the bits that the manual gives it; reading it gives the value back."""
    field = data.draw(st.sampled_from(sorted(PLACES)))
    low, width = PLACES[field]
    before = data.draw(st.integers(0, (1 << 256) - 1))
    seed = int.from_bytes(before.to_bytes(32, "little") * (SIZE // 32), "little")
    bits = data.draw(st.integers(0, (1 << width) - 1))
    vmcb = Vmcb.new()
    vmcb.load(seed.to_bytes(SIZE, "little"))
    value = _value(Vmcb.ROWS[field], bits)
    setattr(vmcb, field, value)
    assert getattr(vmcb, field) == value
    assert int.from_bytes(bytes(vmcb), "little") == seed & ~((1 << width) - 1 << low) | bits << low


def test_a_value_too_wide_is_a_bug_that_shows() -> None:
    """No field cuts a value down in silence."""
    vmcb = Vmcb.new()
    for field, (_, width) in PLACES.items():
        row = Vmcb.ROWS[field]
        for wrong in (1 << width, -1):
            if isinstance(row, Field | Bits):
                with pytest.raises((struct.error, ValueError)):
                    setattr(vmcb, field, wrong)
    with pytest.raises(struct.error):
        vmcb.cs = Segment(0x10000)
    assert not any(bytes(vmcb))


@given(st.sampled_from(["INTERCEPTS", "EXIT", "SEGMENTS", "CONTROL_REGISTERS", "SYSENTER"]), st.integers(0))
def test_a_run_is_its_fields(run_name: str, seed: int) -> None:
    """A run reads and writes what its fields read and write one by one."""
    run: Run = getattr(module, run_name)
    vmcb = Vmcb.new()
    vmcb.load(Random(seed).randbytes(SIZE))
    one_by_one: list[int] = []
    for field in run.names:
        value = getattr(vmcb, field)
        one_by_one += value if isinstance(value, tuple) else [value]
    assert list(run.read(vmcb)) == one_by_one
    other = Vmcb.new()
    run.write(other, *one_by_one)
    for field in run.names:
        assert getattr(other, field) == getattr(vmcb, field)


def test_a_run_has_no_gap() -> None:
    """Fields that do not touch cannot be a run, which would write over what lies between."""
    with pytest.raises(ValueError, match="rsp does not follow rip"):
        Run("rip", "rsp")


@given(st.integers(0, 0xFFFF_FFFF))
def test_attributes_are_a_descriptors_bits(high: int) -> None:
    """The twelve attribute bits are bits 40-47 and 52-55 of the descriptor, both ways."""
    attributes = Attributes.from_flags(high)
    assert attributes == (high >> 8 & 0xFF) | (high >> 20 & 0xF) << 8
    assert attributes.flags == high & 0x00F0FF00


def test_a_segment_of_a_descriptor() -> None:
    """A flat code segment is selector, 0xC9B, all of the address space, from zero."""
    assert Segment.from_descriptor(8, FLAT_CODE) == (8, 0xC9B, 0xFFFF_FFFF, 0)
    small = Descriptor.segment(0x1234_5678, 0x67, 0x8B, 0)
    assert Segment.from_descriptor(0x28, small) == (0x28, 0x08B, 0x67, 0x1234_5678)
    assert str(Segment.from_descriptor(8, FLAT_CODE)) == (
        "0x8 base=0x0 limit=0xffffffff attrib=0xc9b (TYPE=11 S P DB G)"
    )


def test_a_vmcb_is_a_view_of_one_page() -> None:
    """The structure keeps nothing of its own: it shows the memory that it was given, which must be one page."""
    page = bytearray(SIZE)
    vmcb = Vmcb(memoryview(page))
    page[0x570] = 2
    assert vmcb.rflags == 2
    vmcb.rip = 0x100000
    assert page[0x578:0x580] == (0x100000).to_bytes(8, "little")
    assert str(vmcb) == "rflags 0x2\nrip 0x100000"
    vmcb.clear()
    assert not any(page)
    for size in (0, SIZE - 1, SIZE + 1):
        with pytest.raises(ValueError, match="a VMCB is 4096 bytes"):
            Vmcb(memoryview(bytearray(size)))


@given(st.integers(0, (1 << 64) - 1))
def test_any_event_prints(value: int) -> None:
    """Every value of EVENTINJ prints as one line, and as a dash exactly if nothing is injected."""
    text = str(EventInjection(value))
    assert "\n" not in text
    assert (text == "-") == (not value & 1 << 31)


def test_events_print_as_what_they_deliver() -> None:
    """An event says its type, its vector and what it pushes."""
    general = EventInjection.make(EventType.EXCEPTION, 13, 0x18)
    assert general == 0x18_8000_0B0D
    assert (general.type, general.vector, general.error_code) == (3, 13, 0x18)
    assert str(general) == "exception #GP error code 0x18"
    assert str(EventInjection.make(EventType.INTR, 0x20)) == "external interrupt 0x20"
    assert str(EventInjection.make(EventType.SOFTWARE, 0x80)) == "software interrupt 0x80"
    assert str(EventInjection.make(EventType.NMI, 2)) == "NMI"
    assert str(EventInjection(0x8000_0105)) == "reserved type 1, vector 0x5"


def test_exit_codes_are_the_manuals() -> None:
    """Appendix C: some codes of every block, and -1 for a state that VMRUN refuses."""
    codes = {
        "VMEXIT_CR0_READ": 0x00,
        "VMEXIT_CR15_WRITE": 0x1F,
        "VMEXIT_DR0_READ": 0x20,
        "VMEXIT_DR7_WRITE": 0x37,
        "VMEXIT_EXCP14": 0x4E,
        "VMEXIT_INTR": 0x60,
        "VMEXIT_CR0_SEL_WRITE": 0x65,
        "VMEXIT_CPUID": 0x72,
        "VMEXIT_IRET": 0x74,
        "VMEXIT_HLT": 0x78,
        "VMEXIT_IOIO": 0x7B,
        "VMEXIT_MSR": 0x7C,
        "VMEXIT_SHUTDOWN": 0x7F,
        "VMEXIT_VMRUN": 0x80,
        "VMEXIT_VMMCALL": 0x81,
        "VMEXIT_SKINIT": 0x86,
        "VMEXIT_WBINVD": 0x89,
        "VMEXIT_XSETBV": 0x8D,
        "VMEXIT_RDPRU": 0x8E,
        "VMEXIT_EFER_WRITE_TRAP": 0x8F,
        "VMEXIT_CR15_WRITE_TRAP": 0x9F,
        "VMEXIT_INVLPGB": 0xA0,
        "VMEXIT_INVPCID": 0xA2,
        "VMEXIT_BUSLOCK": 0xA5,
        "VMEXIT_NPF": 0x400,
        "VMEXIT_INVALID": -1,
    }
    for code_name, code in codes.items():
        assert ExitCode[code_name] == code
        assert name(code) == code_name
    assert name((1 << 64) - 1) == "VMEXIT_INVALID"
    assert name(0x300) == "exit 0x300"


def test_exit_information_prints() -> None:
    """EXITINFO1 reads as the manual's bits."""
    assert str(NestedPageFault(1 << 33 | 6)) == "RW US TABLE_WALK"
    io = IoInfo.make(0x3F8, 1, is_in=False)
    assert (io, io.port, io.size) == (0x3F8_0110, 0x3F8, 1)
    assert (
        str(IoInfo.make(0x1F0, 2, is_in=True, string=True, repeated=True)) == "IN STR REP SZ16 A32 PORT=496"
    )
