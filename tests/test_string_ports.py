"""INS and OUTS: pass by pass, as the manual has it, whatever stops them in between."""

from __future__ import annotations

import struct

import pytest

from tests.machines import DATA, DATA16, TSS, Lab, enable_paging, handler, lab, run
from tests.machines import PAGING_ON as _PAGING_ON
from tests.test_ports import IRQ_VECTOR, MODES, PORT, with_device
from vmm.isa.descriptors import Descriptor, SystemType
from vmm.isa.vectors import Vector

MODE = pytest.mark.parametrize("mode", MODES)
SETUP = f"mov edx, {PORT}\n mov edi, DATA\n mov esi, DATA + 0x800\n"
SOURCE = (DATA + 0x800, bytes(range(1, 65)))


def _words(count: int, first: int = 0) -> bytes:
    """What the device gives for that many 32-bit reads."""
    return b"".join(struct.pack("<I", 0x44332211 + i) for i in range(first, first + count))


def _bytes(count: int) -> bytes:
    return bytes(0x11 + i for i in range(count))


@MODE
@pytest.mark.parametrize("size", (1, 2, 4))
@pytest.mark.parametrize("backwards", (False, True))
def test_rep_ins_and_outs_move_as_many_elements_as_ecx_says(size: int, backwards: bool, mode: str) -> None:
    """Each element once, in order of addresses or against it, ESI, EDI and ECX as the manual leaves them."""
    suffix = {1: "b", 2: "w", 4: "d"}[size]
    made = lab(
        f"{SETUP} mov ecx, 3\n {'std' if backwards else 'cld'}\n"
        f" rep ins{suffix}\n mov ecx, 3\n rep outs{suffix}\n hlt",
        mode,
        memory=[SOURCE],
    )
    device = with_device(made)
    made.run()
    step = -size if backwards else size
    values = [int.from_bytes(_words(3)[4 * i : 4 * i + size], "little") for i in range(3)]
    assert [made.read(DATA + i * step, size) for i in range(3)] == values
    assert (made.reg("edi"), made.reg("ecx")) == (DATA + 3 * step, 0)
    assert made.reg("esi") == DATA + 0x800 + 3 * step
    written = [made.read(DATA + 0x800 + i * step, size) for i in range(3)]
    assert device.log == [("in", 0, size, 0)] * 3 + [("out", 0, size, value) for value in written]


@MODE
def test_without_rep_ecx_counts_nothing(mode: str) -> None:
    """INS and OUTS alone move one element and leave ECX; with REP and ECX zero nothing happens at all."""
    made = lab(
        f"{SETUP} mov ecx, 9\n insb\n outsb\n xor ecx, ecx\n rep insb\n rep outsb\n hlt",
        mode,
        memory=[SOURCE],
    )
    device = with_device(made)
    made.run()
    assert device.log == [("in", 0, 1, 0), ("out", 0, 1, 1)]
    assert (made.reg("edi"), made.reg("esi"), made.reg("ecx")) == (DATA + 1, DATA + 0x801, 0)


@MODE
def test_16_bit_addresses_use_half_of_the_registers(mode: str) -> None:
    """With a 67 prefix DI, SI and CX are used, wrap, and keep the upper halves."""
    made = lab(
        f"""
        mov edx, {PORT}
        mov edi, 0x0011FFFF
        mov esi, 0x00118000
        mov ecx, 0x00770002
        db 0x67, 0xF3, 0x6C     ; rep insb
        mov ecx, 0x00770001
        db 0x67, 0xF3, 0x6E     ; rep outsb
        hlt
        """,
        mode,
        memory=[(0x8000, b"\x99")],
    )
    device = with_device(made)
    made.run()
    assert (made.read(0xFFFF, 1), made.read(0, 1)) == (0x11, 0x12)
    assert (made.reg("edi"), made.reg("esi"), made.reg("ecx")) == (0x00110001, 0x00118001, 0x00770000)
    assert device.log[-1] == ("out", 0, 1, 0x99)


@MODE
def test_outs_takes_a_segment_override_and_ins_does_not(mode: str) -> None:
    """OUTS reads through the segment that a prefix names; INS always writes through ES."""
    moved = Descriptor.segment(0x1000, 0xFFFFF, 0x93, 0xC)
    made = lab(
        f"mov eax, {DATA16}\n mov fs, eax\n {SETUP} db 0x64\n outsb\n db 0x64\n insb\n hlt",
        mode,
        gdt={DATA16: moved},
        memory=[(DATA + 0x1800, b"\x77"), SOURCE],
    )
    device = with_device(made)
    made.run()
    assert device.log == [("out", 0, 1, 0x77), ("in", 0, 1, 0)]
    assert (made.read(DATA, 1), made.read(DATA + 0x1000, 1)) == (0x12, 0)


@MODE
@pytest.mark.parametrize("instruction", ("insb", "rep insd", "outsb", "rep outsd"))
def test_a_refused_port_leaves_everything_as_it_was(instruction: str, mode: str) -> None:
    """#GP(0) at the instruction: no access, no memory written, no register moved."""
    before = b"\xaa" * 32
    made = lab(
        f"to_user\n {SETUP} mov ecx, 4\nat:     {instruction}\n int 0x40", mode, memory=[(DATA, before)]
    )
    device = with_device(made)
    made.run(60)
    assert made.vector == Vector.GP
    assert made.stack(2) == [0, made.symbol("at")]
    assert made.data(DATA, 32) == before
    assert (made.reg("edi"), made.reg("esi"), made.reg("ecx")) == (DATA, DATA + 0x800, 4)
    assert device.log == []


@MODE
def test_a_process_may_use_the_ports_that_the_bitmap_opens(mode: str) -> None:
    """REP INS in ring 3 goes on as long as the bitmap lets it, with the whole width of each access."""
    bitmap = bytearray(b"\xff" * 0x80)
    bitmap[PORT // 8] = 0b11110000
    for instruction, vector in (("rep insd", 0x40), ("rep outsb", 0x40)):
        made = lab(
            f"to_user\n {SETUP} mov ecx, 3\n {instruction}\n int 0x40",
            mode,
            memory=[(TSS + 0x68, bytes(bitmap)), SOURCE],
            task=(0xE7, SystemType.TSS32_AVAILABLE),
        )
        with_device(made)
        made.run(60)
        assert (made.vector, made.reg("ecx")) == (vector, 0)
    made = run(
        f"to_user\n mov edx, {PORT + 1}\n mov edi, DATA\nat:     insd\n int 0x40",
        mode,
        memory=[(TSS + 0x68, bytes(bitmap))],
        task=(0xE7, SystemType.TSS32_AVAILABLE),
        limit=60,
    )
    assert made.vector == Vector.GP


@pytest.mark.parametrize("entry", (0, DATA + 0x1000 | 5), ids=("absent", "read-only"))
def test_a_page_fault_comes_before_the_port_is_read(entry: int) -> None:
    """An element that crosses into a page that cannot be written faults there: no access, nothing written."""
    made = lab(
        f"{_PAGING_ON} to_user\n mov edx, {PORT}\n mov edi, DATA + 0xFFE\nat:     insd\n int 0x40",
        memory=[
            *enable_paging({DATA + 0x1000: entry}),
            (TSS + 0x66, b"\x68\0"),
        ],
        task=(0x1000, SystemType.TSS32_AVAILABLE),
    )
    device = with_device(made)
    made.run(60)
    assert made.vector == Vector.PF
    assert made.stack(2) == [7 if entry else 6, made.symbol("at")]
    assert made.reg("cr2") == DATA + 0x1000
    assert device.log == []
    assert not any(made.data(DATA + 0xFF0, 32))
    assert made.reg("edi") == DATA + 0xFFE


def test_a_page_fault_in_the_middle_keeps_the_passes_before_it() -> None:
    """REP INS that reaches an absent page faults there with ECX and EDI of that pass; mapped, it goes on.

    Each element is read from the port once.
    """
    mapping = bytes.fromhex("83c404 c705") + struct.pack("<I", 0x121000 + (DATA + 0x1000 >> 12) * 4)
    mapping += struct.pack("<I", DATA + 0x1000 | 7) + b"\xcf"  # add esp, 4; mov dword [entry], page; iretd
    program = (
        f"{_PAGING_ON} mov edx, {PORT}\n mov edi, DATA + 0xFF8\n mov ecx, 5\nat:     rep insd\n int 0x40"
    )
    pages = enable_paging({DATA + 0x1000: 0})
    made = lab(program, memory=pages)
    device = with_device(made)
    made.run(60)
    assert made.vector == Vector.PF
    assert made.stack(2) == [2, made.symbol("at")]
    assert (made.reg("ecx"), made.reg("edi"), len(device.log)) == (3, DATA + 0x1000, 2)

    made = lab(program, memory=[*pages, (handler(14), mapping)])
    device = with_device(made)
    made.run(60)
    assert made.vector == 0x40
    assert (made.reg("ecx"), made.reg("edi"), len(device.log)) == (0, DATA + 0xFF8 + 20, 5)
    assert made.data(DATA + 0xFF8, 20) == _words(5)


def test_outs_that_cannot_read_faults_before_the_port_is_written() -> None:
    """REP OUTS that reaches an absent page faults there with no access for the element that it cannot read."""
    made = lab(
        f"{_PAGING_ON} mov edx, {PORT}\n mov esi, DATA + 0xFFE\n mov ecx, 4\nat:     rep outsw\n int 0x40",
        memory=[*enable_paging({DATA + 0x1000: 0}), (DATA + 0xFFE, b"\x34\x12")],
    )
    device = with_device(made)
    made.run(60)
    assert made.vector == Vector.PF
    assert made.stack(2) == [0, made.symbol("at")]
    assert (made.reg("ecx"), made.reg("cr2"), device.log) == (3, DATA + 0x1000, [("out", 0, 2, 0x1234)])


def _frame_and_position(made: Lab) -> tuple[int, int, int]:
    return made.stack(1)[0], made.reg("ecx"), made.reg("edi")


@MODE
@pytest.mark.parametrize("at", range(4))
def test_an_interrupt_is_taken_between_two_passes(at: int, mode: str) -> None:
    """An interrupt raised by the port itself is taken after that pass, with EIP at the instruction.

    After the last pass EIP may still be there, with ECX zero; the handler's IRET goes on, each element once.
    """
    program = f"{SETUP} mov ecx, 4\n sti\n nop\nat:     rep insb\nnext:   int 0x40"
    made = lab(program, mode)
    device = with_device(made, at)
    made.run(100)
    assert made.vector == IRQ_VECTOR
    eip, ecx, edi = _frame_and_position(made)
    assert eip == made.symbol("at")
    assert (ecx, edi, len(device.log)) == (3 - at, DATA + at + 1, at + 1)

    acknowledge = bytes.fromhex("50 b020 e620 58 cf")
    made = lab(program, mode, memory=[(handler(IRQ_VECTOR), acknowledge)])
    device = with_device(made, at)
    made.run(100)
    assert made.vector == 0x40
    assert made.data(DATA, 5) == _bytes(4) + b"\0"
    assert len(device.log) == 4


@MODE
def test_single_stepping_stops_after_each_pass(mode: str) -> None:
    """With TF set each pass traps; EIP is at the instruction until the last, and behind it then."""
    say = bytes.fromhex("50 8a442404 e6e9 88c8 e6e9 58 cf")  # the frame's EIP and ECX, a byte each; iretd
    program = f"{SETUP} mov ecx, 3\n push dword 0x102\n popfd\nat:     rep insb\nnext:   int 0x40"
    made = lab(program, mode, memory=[(handler(1), say)])
    device = with_device(made)
    made.run(100)
    at, behind = made.symbol("at") & 0xFF, made.symbol("next") & 0xFF
    assert list(made.console) == [at, 2, at, 1, behind, 0]
    assert made.vector == 0x40
    assert len(device.log) == 3


@MODE
def test_outs_to_debug_exit_ends_the_run_in_its_first_pass(mode: str) -> None:
    """REP OUTS to isa-debug-exit: one pass, then the guest has ended, and nothing else was written."""
    made = lab(
        "mov edx, 0xF4\n mov esi, DATA\n mov ecx, 3\n rep outsb\n mov ebx, 1\n hlt",
        mode,
        memory=[(DATA, b"\x05\x06\x07")],
    )
    outcome = made.run()
    assert (outcome.kind, outcome.status) == ("exit", 11)
    assert (made.reg("ecx"), made.reg("esi"), made.reg("ebx")) == (2, DATA + 1, 0)


@MODE
def test_ins_over_the_code_that_follows_executes_the_new_code(mode: str) -> None:
    """What INS writes over code that has already been executed is what runs afterwards."""
    made = lab(
        f"""
        mov edx, {PORT}
again:  mov edi, there + 1
        insb
there:  mov al, 0
        mov [esi + DATA], al
        inc esi
        cmp esi, 4
        jne again
        hlt
        """,
        mode,
    )
    with_device(made)
    assert made.run().kind == "halt"
    assert made.data(DATA, 4) == _bytes(4)


@MODE
def test_ins_to_where_nothing_answers_loses_the_data(mode: str) -> None:
    """INS into memory where nothing answers reads the port and loses the data."""
    made = lab(f"mov edx, {PORT}\n mov edi, 0xA0000\n insd\n mov eax, [0xA0000]\n hlt", mode)
    device = with_device(made)
    made.run()
    assert (device.log, made.reg("eax")) == ([("in", 0, 4, 0)], 0xFFFFFFFF)
