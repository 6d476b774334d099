"""Shadow page tables: the guest cannot tell them from its own, and reaches no frame but its own.

Random guests edit their tables in every way (self-maps, loops, entries past the end of memory, tables as code) under
a monitor, by every policy and pool, and are compared with the bare machine to the last bit of memory. Beside them
stand what a shadow must hold at any moment, and what it may cost.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings

from tests.machines import DATA, MEMORY, PAGES, PAGING_ON, Lab, enable_paging, lab
from tests.paged_guests import Guest, guests
from tests.programs import COMPUTE, PAGING, Program, programs
from vmm.isa.words import PTE
from vmm.machine.cpu import walker as hw
from vmm.machine.cpu.engine import Engine
from vmm.machine.memory import ONES
from vmm.machine.tlb import CODE as IS_CODE
from vmm.machine.tlb import DATA as IS_DATA
from vmm.machine.tlb import MIXED
from vmm.monitor.memory.shadow import Policy, ShadowMemory
from vmm.monitor.memory.tables import NOBODY
from vmm.monitor.memory.watch import TABLE
from vmm.monitor.trap.monitor import TrapMonitor

MANY = settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
LIMIT = 3000


def under(made: Lab, *, pages: int = 2048, policy: Policy = "kept") -> Lab:
    """A lab of the bare machine that has not run yet, put under a monitor with such a memory."""

    class Monitor(TrapMonitor):
        def make_memory(self) -> ShadowMemory:
            return ShadowMemory(self.machine, self.vcpu, pages=pages, policy=policy)

    monitor = Monitor(made.machine)
    monitor.start()
    made.machine.attach(monitor)
    made.control = monitor
    return made


def memory_of(made: Lab) -> ShadowMemory:
    assert isinstance(made.control, TrapMonitor)
    return made.control.memory


def assert_sound(made: Lab) -> None:
    """What holds of the shadow at every moment, whatever the guest is."""
    memory, machine = memory_of(made), made.machine
    pool, kinds = memory.trees.pool, machine.frames.kinds
    own = {page.frame for page in memory.slot.pages.values()}
    for root in memory.trees.roots.values():
        for quarter, directory in enumerate(root.directories):
            if directory == NOBODY:
                continue
            for n in range(512):
                upper = pool.entries[directory + n]
                if not upper:
                    continue
                start = pool.index(upper)
                assert 0 < start < pool.pages * 512
                for leaf in pool.entries[start : start + 512]:
                    if not leaf:
                        continue
                    frame = leaf & hw.FRAME
                    linear = (quarter << 30 | n << 21) & ~((4 << 20) - 1)
                    if linear == memory.slot.base:
                        assert frame in own, "something of the guest's in the monitor's slot"
                        assert not leaf & hw.US
                        continue
                    if frame == ONES:
                        assert not leaf & (hw.RW | hw.STORABLE)
                        continue
                    assert machine.memory.is_ram(frame), f"{frame:#x} is not the guest's"
                    kind, store = kinds[frame >> 12], leaf & (hw.RW | hw.STORABLE)
                    assert not leaf & hw.RW or leaf & hw.STORABLE
                    assert kind != IS_DATA or leaf & hw.NX
                    assert kind != IS_CODE or not store
                    assert bool(leaf & hw.MIXED) == (kind == MIXED)
                    if store:
                        assert not memory.watch.reasons[frame >> 12], (
                            "a page that is watched can be stored to"
                        )
                        assert frame in machine.frames.touched
    for table in memory.trees.tables.values():
        words = table.words
        for half, start in enumerate(table.halves):
            if start == NOBODY or table.frame == ONES:
                continue
            for i, leaf in enumerate(pool.entries[start : start + 512]):
                word = half * 512 + i
                guests = made.read(table.frame + 4 * word) if words is None else words[word]
                if leaf:
                    assert guests & PTE.P and guests & PTE.A, "more than the guest's table says"
                    assert not leaf & hw.STORABLE or guests & PTE.D
                    assert not leaf & hw.RW or guests & PTE.RW
                    assert not leaf & hw.US or guests & PTE.US
        if table.frame != ONES:
            watched = bool(memory.watch.reasons[table.frame >> 12] & TABLE)
            assert watched == (words is None) or memory._lazy
    assert pool.left >= 0


def assert_equal(guest: Guest | Program, made: Lab) -> None:
    bare = guest.lab("native")
    ends = bare.run(LIMIT), made.run(LIMIT)
    assert ends[0] == ends[1]
    assert bare.everything() == made.everything()
    assert_sound(made)


# The same as without a monitor


@MANY
@given(guests(hostile=False))
def test_a_guest_that_edits_its_tables_cannot_tell(guest: Guest) -> None:
    """Faults with their codes and CR2, data, accessed and dirty bits, registers and time are the bare machine's."""
    assert_equal(guest, guest.lab("trap"))


@settings(MANY, max_examples=60)
@given(guests(hostile=False))
def test_nor_where_no_machine_code_runs(guest: Guest) -> None:
    """Without machine code on the host the walk is Python's, and the guest the same."""
    assert_equal(guest, guest.lab("trap", Engine(native_code=False)))


@settings(MANY, max_examples=60)
@given(guests(hostile=False))
def test_nor_with_a_pool_that_is_always_too_small(guest: Guest) -> None:
    """With room for the tables of a few pages everything is forgotten again and again, and nothing else happens."""
    made = under(guest.lab("native"), pages=17)
    assert_equal(guest, made)


@settings(MANY, max_examples=60)
@given(guests(hostile=False))
def test_nor_when_every_flush_forgets_everything(guest: Guest) -> None:
    """The lazy policy is another way to the same guest."""
    assert_equal(guest, under(guest.lab("native"), policy="lazy"))


@settings(MANY, max_examples=100)
@given(programs((*COMPUTE, *PAGING), paged=True))
def test_a_program_that_is_paged_in_on_demand_cannot_tell(program: Program) -> None:
    """Random programs whose pages come and go run as on the bare machine."""
    if not program.period:
        assert_equal(program, program.lab("trap"))


@pytest.mark.parametrize("mode", ("native", "trap"))
@pytest.mark.parametrize("cut", range(1, 7))
def test_a_privileged_instruction_across_a_missing_page_faults_there(mode: str, cut: int) -> None:
    """INVLPG cut by a missing page is #PF at that page, not #GP, whatever its first bytes give away."""
    border = DATA + 0x1000
    code = b"\x0f\x01\x3d\0\0\x18\0"
    made = lab(
        f"{PAGING_ON} mov eax, {border - cut:#x}\n jmp eax",
        mode,
        memory=[*enable_paging({border: 0}), (border - cut, code)],
    )
    made.run(60)
    assert (made.vector, made.reg("cr2")) == (14, border)
    assert made.stack(2) == [0, border - cut]


@pytest.mark.parametrize("mode", ("native", "trap"))
def test_a_privileged_instruction_across_two_pages_marks_both(mode: str) -> None:
    """Fetching INVLPG that lies on two pages sets the accessed bits of both."""
    border = DATA + 0x1000
    made = lab(
        f"{PAGING_ON} mov eax, {border - 3:#x}\n jmp eax",
        mode,
        memory=[*enable_paging(), (border - 3, b"\x0f\x01\x3d\0\0\x18\0\xeb\xfe")],
    )
    made.run(8)
    for page in (DATA, border):
        assert made.read(PAGES + 0x1000 + (page >> 12) * 4) & PTE.A


# Hostile guests


@MANY
@given(guests(hostile=True, length=40))
def test_a_hostile_guest_reaches_no_frame_but_its_own(guest: Guest) -> None:
    """Tables that name themselves and each other, and are executed: all that is mapped is the guest's RAM."""
    made = guest.lab("trap")
    for budget in range(200, LIMIT, 400):
        outcome = made.run(budget)
        assert outcome.kind in ("budget", "halt", "error", "triple-fault", "exit")
        assert "\n" not in outcome.detail
        assert_sound(made)
        if outcome.kind != "budget":
            break


@settings(MANY, max_examples=60)
@given(guests(hostile=True, length=40))
def test_nor_with_a_small_pool(guest: Guest) -> None:
    """The same where the shadow is forgotten all the time."""
    made = under(guest.lab("native"), pages=19)
    made.run(LIMIT)
    assert_sound(made)
    assert memory_of(made).trees.pool.used <= 19


@pytest.mark.parametrize("cr3", (MEMORY, 0x40000000, 0xFFFFF000, 0xA0000, 0))
@pytest.mark.parametrize("pse", (0, 0x10))
def test_a_garbage_cr3_ends_as_on_the_bare_machine(cr3: int, pse: int) -> None:
    """Tables where there is no memory read as ones, tables of zeroes map nothing: the same end in both modes."""
    code = (
        f"mov eax, {pse}\n mov cr4, eax\n mov eax, {cr3:#x}\n mov cr3, eax\n"
        " mov eax, 0x80000011\n mov cr0, eax\n nop\n hlt"
    )
    ends = []
    for mode in ("native", "trap"):
        made = lab(code, mode)
        outcome = made.run(200)
        ends.append((outcome.kind, made.retired, made.memory))
    assert ends[0] == ends[1]


def test_a_directory_that_maps_everything_leaves_the_slot_no_place() -> None:
    """With all 1,024 regions mapped the monitor stays where it is, and the guest goes on."""
    pages = enable_paging(directory=dict.fromkeys(range(1024), PAGES + 0x1000 | 7))
    code = f"{PAGING_ON} mov eax, [0xFFC00000 + DATA]\n mov [0x40000000 + DATA], eax\n mov ebx, 7\n int 0x40"
    made = lab(code, "trap", memory=[*pages, (DATA, b"\x11\0\0\0")])
    made.run(60)
    assert (made.vector, made.reg("eax"), made.reg("ebx")) == (0x40, 0x11, 7)
    assert_sound(made)


def test_paging_switched_on_and_off_in_a_loop() -> None:
    """Ten thousand switches cost neither pages nor time that grows."""
    made = lab(
        f"{PAGING_ON} mov ecx, 2000\nagain:  xor eax, 0x80000000\n mov cr0, eax\n dec ecx\n jnz again\n int 0x40",
        "trap",
        memory=enable_paging(),
    )
    made.run(50)
    used = memory_of(made).trees.pool.used
    made.run(20_000)
    assert made.vector == 0x40
    assert memory_of(made).trees.pool.used <= used + 2


# What it costs


def _slow(made: Lab) -> int:
    return memory_of(made).statistics.fills


def test_shadows_outlive_a_change_of_cr3() -> None:
    """Once both address spaces have been used, changing between them asks for nothing in Python."""
    pages = enable_paging()
    second = [(0x170000, pages[0][1][:4096])]
    code = f"""{PAGING_ON}
        mov ecx, 50
again:  mov eax, 0x170000
        mov cr3, eax
        mov [DATA], ecx
        mov eax, {PAGES:#x}
        mov cr3, eax
        mov [DATA], ecx
        dec ecx
        jnz again
        int 0x40"""
    made = lab(code, "trap", memory=[*pages, *second])
    made.run(60)
    before = _slow(made)
    made.run(1000)
    assert made.vector == 0x40
    assert _slow(made) - before <= 4
    assert memory_of(made).statistics.loads > 90


@pytest.mark.parametrize("flush", ("mov eax, cr3\n mov cr3, eax", "invlpg [0x180000]"))
def test_a_table_that_is_stored_to_costs_one_hidden_fault(flush: str) -> None:
    """A thousand edits of one table, each flushed and used, are one store that was noticed."""
    entry = PAGES + 0x1000 + 0x180 * 4
    code = f"""{PAGING_ON}
        mov ecx, 1000
again:  mov edx, ecx
        and edx, 1
        shl edx, 12
        add edx, {DATA + 7:#x}
        mov [{entry:#x}], edx
        {flush}
        mov [0x180000], ecx
        dec ecx
        jnz again
        int 0x40"""
    made = lab(code, "trap", memory=enable_paging())
    made.run(20_000)
    assert made.vector == 0x40
    assert (made.read(DATA), made.read(DATA + 0x1000)) == (2, 1)
    assert memory_of(made).statistics.hidden["store to a page table"] == 1


def test_hidden_faults_are_no_page_faults() -> None:
    """What the monitor resolves inside the engine counts as no exit."""
    made = lab(f"{PAGING_ON} mov dword [{PAGES + 0x1800:#x}], 0\n int 0x40", "trap", memory=enable_paging())
    made.run(40)
    assert made.vector == 0x40
    assert memory_of(made).statistics.hidden == {"store to a page table": 1}
    assert not any("PF" in reason or "hidden" in reason for reason in made.machine.exits.rows)


# The slot


def test_the_slot_moves_when_the_guest_maps_its_addresses() -> None:
    """A guest that maps the last four megabytes has them, and its segment loads still work."""
    pages = enable_paging(directory={0x3FF: PAGES + 0x1000 | 7})
    made = lab(
        f"{PAGING_ON} mov eax, [0xFFC00000 + DATA]\n mov [0xFFC00004 + DATA], eax\n mov ecx, USER_DATA\n"
        " mov es, ecx\n mov fs, ecx\n to_user\n mov gs, ecx\n int 0x40",
        "trap",
        memory=[*pages, (DATA, b"\x11\0\0\0")],
    )
    made.run(60)
    assert made.vector == 0x40
    assert made.read(DATA + 4) == 0x11
    assert memory_of(made).slot.base != 0xFFC00000
    assert_sound(made)


def test_a_process_sees_nothing_of_the_slot() -> None:
    """A read of the monitor's pages in ring 3 is what it is natively: a page fault, of a page that is absent."""
    made = lab(f"{PAGING_ON} to_user\nhere:   mov eax, [0xFFC00008]", "trap", memory=enable_paging())
    made.run(60)
    assert made.vector == 14
    assert made.stack(2) == [4, made.symbol("here")]
    assert made.reg("cr2") == 0xFFC00008


def test_a_store_into_the_slot_is_the_guests_own_fault() -> None:
    """With paging on the kernel's store to an address where it maps nothing faults, as natively."""
    made = lab(f"{PAGING_ON}\nhere:   mov [0xFFC00008], eax", "trap", memory=enable_paging())
    made.run(60)
    assert made.vector == 14
    assert made.stack(2) == [2, made.symbol("here")]
