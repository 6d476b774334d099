"""The virtual machine control block: one page that says all that SVM knows of a guest.

`Vmcb` is a typed view of that page. Each field is one row, with the manual's name in lower case, its offset
and its width; reading the row as an attribute reads memory. Nothing is cached: what VMRUN will see is what
the attribute shows. The hard part is speed, for a switch of guests writes some forty fields: neighbours are
read and written in one go as a `Run`.

Source: AMD64 APM volume 2, appendix B (tables B-1, control area, and B-2, state save area) and 15.5.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from struct import Struct
from typing import ClassVar, NamedTuple, overload

from vmm.isa.descriptors import Descriptor
from vmm.isa.words import Word

SIZE = 0x1000
SAVE_AREA = 0x400  # where the state save area begins; table B-2 counts from here

_CODES = {1: "B", 2: "H", 4: "I", 8: "Q"}
_SEGMENT = "HHIQ"


class Attributes(Word):
    """A segment's attributes as the VMCB packs them: bits 40-47 and 52-55 of a descriptor (APM 2, 15.5.1)."""

    TYPE = 0xF << 0
    S = 1 << 4
    DPL = 3 << 5
    P = 1 << 7
    AVL = 1 << 8
    L = 1 << 9
    DB = 1 << 10
    G = 1 << 11

    @classmethod
    def from_flags(cls, flags: int) -> Attributes:
        """From the second word of a descriptor, which is how the CPU's hidden part keeps them."""
        return cls(flags >> 8 & 0xFF | flags >> 12 & 0xF00)

    @property
    def flags(self) -> int:
        """As in the second word of a descriptor, all else in it zero."""
        return (self & 0xFF) << 8 | (self & 0xF00) << 12


class Segment(NamedTuple):
    """A segment register with its hidden part; `limit` counts bytes, granularity already applied.

    For GDTR and IDTR the selector and the attributes mean nothing.
    """

    selector: int = 0
    attrib: int = 0
    limit: int = 0
    base: int = 0

    @classmethod
    def from_descriptor(cls, selector: int, descriptor: Descriptor) -> Segment:
        """What loading `selector` with this descriptor leaves in the register."""
        attrib = Attributes.from_flags(descriptor.high)
        return cls(selector, attrib, descriptor.limit, descriptor.base)

    @property
    def flags(self) -> int:
        """The attributes at their places in a descriptor's second word."""
        return Attributes(self.attrib).flags

    def __str__(self) -> str:
        return (
            f"{self.selector:#x} base={self.base:#x} limit={self.limit:#x} attrib={self.attrib:#x} "
            f"({Attributes(self.attrib)})"
        )


class Row:
    """One row of the manual's tables; on a `Vmcb` it is an attribute that reads and writes the page.

    `offset` counts bytes from the start of the VMCB, `size` is in bytes, `code` is struct's format.
    """

    name: str

    def __init__(self, offset: int, size: int, code: str) -> None:
        packer = Struct("<" + code)
        assert packer.size == size
        self.offset, self.size, self.code = offset, size, code
        self.pack_into = packer.pack_into
        self.unpack_from = packer.unpack_from

    def __set_name__(self, owner: type[Vmcb], name: str) -> None:
        self.name = name
        owner.ROWS[name] = self

    @property
    def section(self) -> str:
        """`control` or `save`: the area of the VMCB that the row belongs to."""
        return "save" if self.offset >= SAVE_AREA else "control"


class Field(Row):
    """An unsigned little-endian integer of 1, 2, 4 or 8 bytes; a value that does not fit raises struct.error."""

    def __init__(self, offset: int, size: int) -> None:
        super().__init__(offset, size, _CODES[size])

    @overload
    def __get__(self, vmcb: None, owner: type[Vmcb]) -> Field: ...
    @overload
    def __get__(self, vmcb: Vmcb, owner: type[Vmcb]) -> int: ...
    def __get__(self, vmcb: Vmcb | None, owner: type[Vmcb]) -> Field | int:
        if vmcb is None:
            return self
        value: int = self.unpack_from(vmcb.view, self.offset)[0]
        return value

    def __set__(self, vmcb: Vmcb, value: int) -> None:
        self.pack_into(vmcb.view, self.offset, value)


class Bits(Row):
    """`width` bits from bit `low` of the quadword at `offset`; a value that does not fit raises ValueError."""

    def __init__(self, offset: int, low: int, width: int = 1) -> None:
        super().__init__(offset, 8, "Q")
        self.low, self.width, self.mask = low, width, (1 << width) - 1

    @overload
    def __get__(self, vmcb: None, owner: type[Vmcb]) -> Bits: ...
    @overload
    def __get__(self, vmcb: Vmcb, owner: type[Vmcb]) -> int: ...
    def __get__(self, vmcb: Vmcb | None, owner: type[Vmcb]) -> Bits | int:
        if vmcb is None:
            return self
        word: int = self.unpack_from(vmcb.view, self.offset)[0]
        return word >> self.low & self.mask

    def __set__(self, vmcb: Vmcb, value: int) -> None:
        if not 0 <= value <= self.mask:
            raise ValueError(f"{self.name} has {self.width} bits: {value:#x} does not fit")
        word: int = self.unpack_from(vmcb.view, self.offset)[0]
        self.pack_into(vmcb.view, self.offset, word & ~(self.mask << self.low) | value << self.low)


class SegmentRegister(Row):
    """A segment register of the save area: selector, attributes, limit and base in sixteen bytes."""

    def __init__(self, offset: int) -> None:
        super().__init__(offset, 16, _SEGMENT)

    @overload
    def __get__(self, vmcb: None, owner: type[Vmcb]) -> SegmentRegister: ...
    @overload
    def __get__(self, vmcb: Vmcb, owner: type[Vmcb]) -> Segment: ...
    def __get__(self, vmcb: Vmcb | None, owner: type[Vmcb]) -> SegmentRegister | Segment:
        return self if vmcb is None else Segment(*self.unpack_from(vmcb.view, self.offset))

    def __set__(self, vmcb: Vmcb, value: Segment) -> None:
        self.pack_into(vmcb.view, self.offset, *value)


class Vmcb:
    """The control block in `view`, 4096 bytes of memory; raises ValueError for another size."""

    __slots__ = ("view",)
    ROWS: ClassVar[dict[str, Row]] = {}

    # The control area (table B-1). What comes out:
    intercept_cr_reads = Field(0x000, 2)
    intercept_cr_writes = Field(0x002, 2)
    intercept_dr_reads = Field(0x004, 2)
    intercept_dr_writes = Field(0x006, 2)
    intercept_exceptions = Field(0x008, 4)
    intercept_misc1 = Field(0x00C, 4)
    intercept_misc2 = Field(0x010, 4)
    intercept_misc3 = Field(0x014, 4)
    pause_filter_threshold = Field(0x03C, 2)
    pause_filter_count = Field(0x03E, 2)
    iopm_base_pa = Field(0x040, 8)
    msrpm_base_pa = Field(0x048, 8)
    # What the guest sees of time, and whose its translations are:
    tsc_offset = Field(0x050, 8)
    guest_asid = Field(0x058, 4)
    tlb_control = Field(0x05C, 1)
    # The interrupt control quadword, and its parts:
    interrupt_control = Field(0x060, 8)
    v_tpr = Bits(0x060, 0, 8)
    v_irq = Bits(0x060, 8)
    vgif = Bits(0x060, 9)
    v_nmi = Bits(0x060, 11)
    v_nmi_mask = Bits(0x060, 12)
    v_intr_prio = Bits(0x060, 16, 4)
    v_ign_tpr = Bits(0x060, 20)
    v_intr_masking = Bits(0x060, 24)
    vgif_enable = Bits(0x060, 25)
    v_nmi_enable = Bits(0x060, 26)
    x2avic_enable = Bits(0x060, 30)
    avic_enable = Bits(0x060, 31)
    v_intr_vector = Bits(0x060, 32, 8)
    interrupt_state = Field(0x068, 8)
    interrupt_shadow = Bits(0x068, 0)
    guest_interrupt_mask = Bits(0x068, 1)
    # Why the guest came out:
    exitcode = Field(0x070, 8)
    exitinfo1 = Field(0x078, 8)
    exitinfo2 = Field(0x080, 8)
    exitintinfo = Field(0x088, 8)
    # Nested paging and what goes in with the guest:
    nested_control = Field(0x090, 8)
    np_enable = Bits(0x090, 0)
    sev_enable = Bits(0x090, 1)
    sev_es_enable = Bits(0x090, 2)
    avic_apic_bar = Field(0x098, 8)
    ghcb_pa = Field(0x0A0, 8)
    eventinj = Field(0x0A8, 8)
    n_cr3 = Field(0x0B0, 8)
    virtualization_extensions = Field(0x0B8, 8)
    lbr_virtualization_enable = Bits(0x0B8, 0)
    vmsave_vmload_virtualization = Bits(0x0B8, 1)
    vmcb_clean = Field(0x0C0, 4)
    nrip = Field(0x0C8, 8)
    bytes_fetched = Field(0x0D0, 1)
    avic_apic_backing_page = Field(0x0E0, 8)
    avic_logical_table = Field(0x0F0, 8)
    avic_physical_table = Field(0x0F8, 8)
    vmsa_pointer = Field(0x108, 8)

    # The state save area (table B-2).
    es = SegmentRegister(SAVE_AREA + 0x000)
    cs = SegmentRegister(SAVE_AREA + 0x010)
    ss = SegmentRegister(SAVE_AREA + 0x020)
    ds = SegmentRegister(SAVE_AREA + 0x030)
    fs = SegmentRegister(SAVE_AREA + 0x040)
    gs = SegmentRegister(SAVE_AREA + 0x050)
    gdtr = SegmentRegister(SAVE_AREA + 0x060)
    ldtr = SegmentRegister(SAVE_AREA + 0x070)
    idtr = SegmentRegister(SAVE_AREA + 0x080)
    tr = SegmentRegister(SAVE_AREA + 0x090)
    cpl = Field(SAVE_AREA + 0x0CB, 1)
    efer = Field(SAVE_AREA + 0x0D0, 8)
    cr4 = Field(SAVE_AREA + 0x148, 8)
    cr3 = Field(SAVE_AREA + 0x150, 8)
    cr0 = Field(SAVE_AREA + 0x158, 8)
    dr7 = Field(SAVE_AREA + 0x160, 8)
    dr6 = Field(SAVE_AREA + 0x168, 8)
    rflags = Field(SAVE_AREA + 0x170, 8)
    rip = Field(SAVE_AREA + 0x178, 8)
    rsp = Field(SAVE_AREA + 0x1D8, 8)
    s_cet = Field(SAVE_AREA + 0x1E0, 8)
    ssp = Field(SAVE_AREA + 0x1E8, 8)
    isst_addr = Field(SAVE_AREA + 0x1F0, 8)
    rax = Field(SAVE_AREA + 0x1F8, 8)
    star = Field(SAVE_AREA + 0x200, 8)
    lstar = Field(SAVE_AREA + 0x208, 8)
    cstar = Field(SAVE_AREA + 0x210, 8)
    sfmask = Field(SAVE_AREA + 0x218, 8)
    kernel_gs_base = Field(SAVE_AREA + 0x220, 8)
    sysenter_cs = Field(SAVE_AREA + 0x228, 8)
    sysenter_esp = Field(SAVE_AREA + 0x230, 8)
    sysenter_eip = Field(SAVE_AREA + 0x238, 8)
    cr2 = Field(SAVE_AREA + 0x240, 8)
    g_pat = Field(SAVE_AREA + 0x268, 8)
    dbgctl = Field(SAVE_AREA + 0x270, 8)
    br_from = Field(SAVE_AREA + 0x278, 8)
    br_to = Field(SAVE_AREA + 0x280, 8)
    last_excp_from = Field(SAVE_AREA + 0x288, 8)
    last_excp_to = Field(SAVE_AREA + 0x290, 8)
    spec_ctrl = Field(SAVE_AREA + 0x2E0, 8)

    def __init__(self, view: memoryview) -> None:
        if view.nbytes != SIZE:
            raise ValueError(f"a VMCB is {SIZE} bytes, not {view.nbytes}")
        self.view = view.cast("B")

    @classmethod
    def new(cls) -> Vmcb:
        """A control block of its own, all zero, in no guest's memory."""
        return cls(memoryview(bytearray(SIZE)))

    def clear(self) -> None:
        self.view[:] = bytes(SIZE)

    def __bytes__(self) -> bytes:
        """The whole page, to be saved; `load` puts it back."""
        return bytes(self.view)

    def load(self, page: bytes) -> None:
        self.view[:] = page

    def items(self) -> Iterator[tuple[str, int | Segment]]:
        """Every row's name with its value now, in the manual's order."""
        for name in self.ROWS:
            yield name, getattr(self, name)

    def __str__(self) -> str:
        """One line for each field that is not zero."""
        lines = []
        for name, value in self.items():
            if isinstance(value, Segment):
                if any(value):
                    lines.append(f"{name} {value}")
            elif value:
                lines.append(f"{name} {value:#x}")
        return "\n".join(lines)


class Run:
    """Fields that lie side by side, read and written in one go, in the order of their names here.

    Segment registers count four values each: selector, attrib, limit, base. Raises ValueError for fields
    that do not touch.
    """

    __slots__ = ("_packer", "names", "offset")

    def __init__(self, *names: str) -> None:
        rows = [Vmcb.ROWS[name] for name in names]
        for row, after in pairwise(rows):
            if row.offset + row.size != after.offset:
                raise ValueError(f"{after.name} does not follow {row.name} in a VMCB")
        self.names, self.offset = names, rows[0].offset
        self._packer = Struct("<" + "".join(row.code for row in rows))

    def read(self, vmcb: Vmcb) -> tuple[int, ...]:
        return self._packer.unpack_from(vmcb.view, self.offset)

    def write(self, vmcb: Vmcb, *values: int) -> None:
        """As many values as the fields have; raises struct.error for another number or one that does not fit."""
        self._packer.pack_into(vmcb.view, self.offset, *values)


INTERCEPTS = Run(
    "intercept_cr_reads",
    "intercept_cr_writes",
    "intercept_dr_reads",
    "intercept_dr_writes",
    "intercept_exceptions",
    "intercept_misc1",
    "intercept_misc2",
    "intercept_misc3",
)
EXIT = Run("exitcode", "exitinfo1", "exitinfo2", "exitintinfo")
SEGMENTS = Run("es", "cs", "ss", "ds", "fs", "gs", "gdtr", "ldtr", "idtr", "tr")
CONTROL_REGISTERS = Run("cr4", "cr3", "cr0", "dr7", "dr6", "rflags", "rip")
SYSENTER = Run("sysenter_cs", "sysenter_esp", "sysenter_eip", "cr2")
