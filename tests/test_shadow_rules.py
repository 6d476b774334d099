"""The rules of paging that a kept shadow could break, one by one, on the bare machine and under a monitor.

Each test first has the translation made, so that what is asked afterwards is answered from what was kept.
"""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.machines import DATA, PAGES, PAGING_ON, Lab, enable_paging, lab
from vmm.isa.words import PTE
from vmm.machine.memory import Memory
from vmm.monitor.memory.pool import TablePool

BOTH = pytest.mark.parametrize("mode", ("native", "trap"))
REGION = 0x400000  # directory entry 1
FIRST, SECOND = PAGES + 0x3000, PAGES + 0x4000  # page tables
FRAMES = (0x130000, 0x131000, 0x132000)  # hold 0x11, 0x22, 0x33
FLUSH = "mov eax, cr3\n mov cr3, eax\n"


def _lab(code: str, mode: str, entry: int, first: tuple[int, ...], second: tuple[int, ...] = ()) -> Lab:
    tables = [(at, struct.pack(f"<{len(t)}I", *t)) for at, t in ((FIRST, first), (SECOND, second))]
    frames = [(frame, struct.pack("<I", 0x11 * (n + 1))) for n, frame in enumerate(FRAMES)]
    made = lab(f"{PAGING_ON} {code}", mode, memory=[*enable_paging(directory={1: entry}), *tables, *frames])
    made.run(100)
    return made


@BOTH
def test_the_directorys_rights_bind_a_process(mode: str) -> None:
    """A page of a directory entry without US faults in ring 3 after the kernel has used it."""
    code = f"mov eax, [{REGION}]\n to_user\nhere:   mov eax, [{REGION}]"
    made = _lab(code, mode, FIRST | 3, (FRAMES[0] | 7,))
    assert (made.vector, made.stack(2)) == (14, [5, made.symbol("here")])


@BOTH
def test_the_directorys_right_to_write_binds_a_process(mode: str) -> None:
    """The same for RW: the kernel's store, with WP clear, opens nothing to ring 3."""
    code = f"mov [{REGION}], eax\n to_user\n mov eax, [{REGION}]\nhere:   mov [{REGION}], eax"
    made = _lab(code, mode, FIRST | 5, (FRAMES[0] | 7,))
    assert (made.vector, made.stack(2)) == (14, [7, made.symbol("here")])


@BOTH
@pytest.mark.parametrize(("entry", "page"), ((7, 5), (5, 7), (5, 5)))
def test_setting_wp_binds_the_kernel(mode: str, entry: int, page: int) -> None:
    """A read-only page that the kernel has stored to with WP clear faults once WP is set."""
    switch = "mov eax, cr0\n xor eax, 0x10000\n mov cr0, eax\n"
    store = f"mov dword [{REGION}], 5\n"
    made = _lab(
        f"{store} {switch} {switch} {store} {switch}\nhere: {store}", mode, FIRST | entry, (FRAMES[0] | page,)
    )
    assert (made.vector, made.stack(2)) == (14, [3, made.symbol("here")])


@BOTH
def test_two_tables_under_one_entry_are_not_mixed(mode: str) -> None:
    """A directory entry changed, used without a flush, and changed back: afterwards the first table is in force."""
    directory = PAGES + 4
    code = (
        f"mov eax, [{REGION}]\n mov dword [{directory}], {SECOND | 0x27}\n mov ebx, [{REGION + 0x1000}]\n"
        f" mov dword [{directory}], {FIRST | 0x27}\n {FLUSH} mov eax, [{REGION}]\n {FLUSH}"
        f" mov edx, [{REGION + 0x1000}]\n int 0x40"
    )
    first, second = (FRAMES[0] | 7, FRAMES[1] | 7), (FRAMES[0] | 7, FRAMES[2] | 7)
    made = _lab(code, mode, FIRST | 0x27, first, second)
    assert (made.vector, made.reg("edx")) == (0x40, 0x22)
    assert made.reg("ebx") in (0x22, 0x33)


@BOTH
def test_an_entry_changed_and_changed_back(mode: str) -> None:
    """The same for an entry of a table."""
    word = FIRST + 4
    code = (
        f"mov eax, [{REGION}]\n mov dword [{word}], {FRAMES[2] | 0x27}\n mov ebx, [{REGION + 0x1000}]\n"
        f" mov dword [{word}], {FRAMES[1] | 0x27}\n {FLUSH} mov edx, [{REGION + 0x1000}]\n int 0x40"
    )
    made = _lab(code, mode, FIRST | 0x27, (FRAMES[0] | 0x27, FRAMES[1] | 0x27))
    assert (made.vector, made.reg("ebx"), made.reg("edx")) == (0x40, 0x33, 0x22)


@BOTH
def test_a_table_that_changed_while_it_was_out_of_reach(mode: str) -> None:
    """A table taken out of the directory, changed and put back is what it is now, not what it was."""
    directory = PAGES + 4
    code = (
        f"mov eax, [{REGION}]\n mov eax, [{REGION + 0x1000}]\n mov dword [{FIRST + 8}], 0\n"
        f" mov dword [{directory}], 0\n {FLUSH} mov dword [{FIRST + 4}], {FRAMES[2] | 7}\n"
        f" mov dword [{directory}], {FIRST | 7}\n mov eax, [{REGION}]\n mov edx, [{REGION + 0x1000}]\n int 0x40"
    )
    made = _lab(code, mode, FIRST | 7, (FRAMES[0] | 7, FRAMES[1] | 7))
    assert (made.vector, made.reg("edx")) == (0x40, 0x33)


@BOTH
def test_an_instruction_of_a_page_that_was_replaced(mode: str) -> None:
    """What is emulated is the instruction that lies there now."""
    code = (
        f"mov edx, {REGION}\n call edx\n mov ebx, eax\n mov dword [{FIRST}], {FRAMES[1] | 7}\n {FLUSH}"
        " call edx\n int 0x40"
    )
    made = lab(
        f"{PAGING_ON} {code}",
        mode,
        memory=[
            *enable_paging(directory={1: FIRST | 7}),
            (FIRST, struct.pack("<I", FRAMES[0] | 7)),
            (FRAMES[0], b"\x0f\x20\xe0\xc3"),  # mov eax, cr4; ret
            (FRAMES[1], b"\x0f\x20\xd8\xc3"),  # mov eax, cr3; ret
        ],
    )
    made.run(60)
    assert (made.vector, made.reg("ebx"), made.reg("eax")) == (0x40, 0, PAGES)


@BOTH
def test_a_table_that_a_device_writes(mode: str) -> None:
    """An entry that the host changes is in force after the next flush."""
    code = f"mov ebx, [{REGION}]\nat:     nop\n {FLUSH} mov edx, [{REGION}]\n int 0x40"
    made = lab(
        f"{PAGING_ON} {code}",
        mode,
        memory=[
            *enable_paging(directory={1: FIRST | 7}),
            (FIRST, struct.pack("<I", FRAMES[0] | 7)),
            (FRAMES[0], b"\x11\0\0\0"),
            (FRAMES[1], b"\x22\0\0\0"),
        ],
    )
    made.run_to("at")
    made.machine.memory.write(FIRST, 4, FRAMES[1] | 7)
    made.run(made.retired + 20)
    assert (made.reg("ebx"), made.reg("edx")) == (0x11, 0x22)


@BOTH
def test_each_directory_entry_of_a_large_page_has_its_own_dirty_bit(mode: str) -> None:
    """A store through one entry leaves the other's D clear; a store through the other sets it."""
    entry = PAGES + 8
    large = 0x80 | 7
    code = (
        f"mov eax, 0x10\n mov cr4, eax\n mov dword [{entry}], {large}\n mov [{REGION + DATA}], eax\n"
        f" mov eax, [{2 * REGION + DATA + 0x1000}]\n mov ebx, [{entry}]\n {FLUSH} mov [{2 * REGION + DATA}], eax\n"
        f" mov edx, [{entry}]\n int 0x40"
    )
    made = _lab(code, mode, large, ())
    assert made.vector == 0x40
    assert made.reg("ebx") & (PTE.A | PTE.D) == PTE.A
    assert made.reg("edx") & (PTE.A | PTE.D) == PTE.A | PTE.D


@BOTH
def test_pse_decides_what_an_entry_with_ps_is(mode: str) -> None:
    """With CR4.PSE clear bit 7 means nothing; set, the entry is a large page, at once."""
    code = (
        f"mov ebx, [{REGION}]\n mov eax, 0x10\n mov cr4, eax\n mov ecx, [{REGION}]\n xor eax, eax\n"
        f" mov cr4, eax\n mov edx, [{REGION}]\n int 0x40"
    )
    made = lab(
        f"{PAGING_ON} {code}",
        mode,
        memory=[
            *enable_paging(directory={1: 0x87}),
            (0, struct.pack("<I", FRAMES[0] | 0x27)),  # as a table the entry names the frame at 0
            *((frame, struct.pack("<I", 0x11 * (n + 1))) for n, frame in enumerate(FRAMES)),
        ],
    )
    made.run(60)
    assert made.vector == 0x40
    assert [made.reg(name) for name in ("ebx", "ecx", "edx")] == [0x11, FRAMES[0] | 0x27, 0x11]


@BOTH
def test_a_page_that_was_read_is_marked_dirty_by_its_first_store(mode: str) -> None:
    """After a read, and a flush, D is clear; after a store it is set."""
    code = f"mov eax, [{REGION}]\n {FLUSH} mov eax, [{REGION}]\n mov ebx, [{FIRST}]\n mov [{REGION}], eax\n"
    made = _lab(code + f" mov edx, [{FIRST}]\n int 0x40", mode, FIRST | 7, (FRAMES[0] | 7,))
    assert made.vector == 0x40
    assert made.reg("ebx") & (PTE.A | PTE.D) == PTE.A
    assert made.reg("edx") & (PTE.A | PTE.D) == PTE.A | PTE.D


@BOTH
def test_code_at_many_addresses_changes_at_all_of_them(mode: str) -> None:
    """A frame executed at three addresses and stored to through one is new at each, however often."""
    code = f"""
        mov ecx, 20
again:  mov [{REGION + 1}], ecx
        mov edx, {REGION}
        call edx
        add ebx, eax
        mov edx, {REGION + 0x1000}
        call edx
        add ebx, eax
        mov edx, {REGION + 0x2000}
        call edx
        add ebx, eax
        {FLUSH}
        dec ecx
        jnz again
        int 0x40"""
    made = lab(
        f"{PAGING_ON} {code}",
        mode,
        memory=[
            *enable_paging(directory={1: FIRST | 7}),
            (FIRST, struct.pack("<3I", *[FRAMES[0] | 7] * 3)),
            (FRAMES[0], b"\xb8\0\0\0\0\xc3"),
        ],
    )
    made.run(1000)
    assert (made.vector, made.reg("ebx")) == (0x40, 3 * sum(range(1, 21)))


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 11), st.integers(0, 3), st.sampled_from(("put", "drop", "all")))))
def test_the_reverse_map_names_every_leaf_of_a_frame(steps: list[tuple[int, int, str]]) -> None:
    """Whatever is put and dropped, a frame's leaves are those that lead to it, and go together."""
    pool = TablePool(Memory(2 << 20), 8)
    start = pool.take()
    leaves: dict[int, int] = {}
    for place, number, step in steps:
        frame = number << 12
        if step == "put":
            pool.put(start + place, frame | 1)
            leaves[start + place] = frame
        elif step == "drop":
            pool.drop(start + place)
            leaves.pop(start + place, None)
        else:
            gone = {at for at, other in leaves.items() if other == frame}
            assert pool.drop_all_of(frame) == len(gone)
            leaves = {at: other for at, other in leaves.items() if at not in gone}
        for n in range(4):
            assert set(pool.mappings(n << 12)) == {at for at, other in leaves.items() if other == n << 12}
        assert all(bool(pool.entries[start + at]) == (start + at in leaves) for at in range(12))
