"""Control in hvm mode: nothing that a guest does reaches the host's pages, the nested tables or past its memory.

SVM's own instructions work on any physical address, and page tables may name any: so each way to an address of the
host's is tried, in each ring. Whatever the guest tries, the host's pages are as they were, the intercepts are the
monitor's, no nested entry leads anywhere but to the guest's memory, and the guest cannot tell from the bare machine.
"""

from __future__ import annotations

import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.guest_expectations import EXPECTATIONS
from tests.machines import (
    CODE,
    DATA,
    MEMORY,
    PAGES,
    PAGING_ON,
    RING1_CODE,
    RING1_DATA,
    STACK,
    USER_CODE,
    USER_DATA,
    Lab,
    enable_paging,
    lab,
)
from tests.program_atoms import Salt
from tools.fuzz import guest
from vmm.image.load import load_image
from vmm.isa.vectors import Vector
from vmm.machine.cpu import engine as cpu
from vmm.machine.cpu import layout as at
from vmm.machine.machine import Machine
from vmm.machine.memory import ONES
from vmm.monitor.hardware import host as pages
from vmm.monitor.hardware import nested
from vmm.monitor.hardware.host import BASE
from vmm.monitor.hardware.intercepts import EFER, VM_CR, VM_HSAVE_PA
from vmm.monitor.hardware.monitor import HardwareMonitor
from vmm.vm import VirtualMachine, hardware

MANY = settings(deadline=None, max_examples=100, suppress_health_check=list(HealthCheck))
LIMIT = 3000
_FRAME = 0x000F_FFFF_FFFF_F000
# Fields of the control area by which the guest is held; the others are written by the CPU, or by each VMRUN.
HELD = (
    "intercept_cr_reads", "intercept_cr_writes", "intercept_dr_reads", "intercept_dr_writes", "intercept_exceptions",
    "intercept_misc1", "intercept_misc2", "intercept_misc3", "msrpm_base_pa", "iopm_base_pa", "guest_asid",
    "nested_control", "n_cr3", "efer",
)  # fmt: skip
SKIP_THREE = b"\x83\x04\x24\x03\xcf"  # add dword [esp], 3; iretd
SKIP_CODE = b"\x83\xc4\x04" + SKIP_THREE  # add esp, 4
SKIPS = [(0x6000 + 16 * 13, SKIP_CODE), (0x6060, SKIP_THREE), (0x6000 + 16 * 14, SKIP_CODE)]
RINGS = {0: "", 1: f"to_ring {RING1_CODE}, {RING1_DATA}, 2", 3: f"to_ring {USER_CODE}, {USER_DATA}, 2"}
SVM = {
    "vmrun": 0xD8, "vmmcall": 0xD9, "vmload": 0xDA, "vmsave": 0xDB, "stgi": 0xDC, "clgi": 0xDD, "skinit": 0xDE,
    "invlpga": 0xDF,
}  # fmt: skip
HOST_PAGES = tuple(range(BASE, BASE + pages._END, 0x1000))
TABLES = (nested.BASE, nested.BASE + 0x1000, nested.BASE + 0x5000, nested.BASE + 0x5800)


def monitor_of(machine: Machine) -> HardwareMonitor:
    assert isinstance(machine.control, HardwareMonitor)
    return machine.control


def held(machine: Machine) -> dict[str, object]:
    """All of the host that nobody but the host may change."""
    host = monitor_of(machine).host
    kept = bytearray(host.view)
    for page in (pages.VMCB, pages.HOST_SAVE):
        kept[page : page + 0x1000] = bytes(0x1000)
    return {"pages": bytes(kept), **{name: getattr(host.vmcb, name) for name in HELD}}


def assert_contained(machine: Machine) -> None:
    """The processor is in a guest of this host's, its intercepts in force, its nested tables within its memory."""
    monitor, state = monitor_of(machine), machine.state
    assert state.word(at.HFLAGS) & at.HF_GUEST and state.word(at.HFLAGS) & at.HF_SVME
    assert state.word(at.VM_VMCB) == monitor.host.vmcb_address
    monitor.prepare()
    assert bytes(state.view[at.INTERCEPTS.start : at.INTERCEPTS.stop]) == monitor.policy.vectors()
    assert state.word(at.EFER) == 1 << 12
    if monitor.nested is None:
        return
    for number, entry in enumerate(monitor.nested.entries):
        if entry:
            frame = entry & _FRAME
            assert (
                frame == number << 12 and machine.memory.is_ram(frame) or frame == ONES and not entry & 2
            ), f"{number:#x}: {entry:#x}"


def run_both(source: str, limit: int = 200, **options: object) -> Lab:
    """Bare and as a guest: the same; the host is as it was. The latter."""
    bare = lab(source, **options)  # type: ignore[arg-type]
    kind = bare.run(limit).kind
    made = lab(source, "hvm", **options)  # type: ignore[arg-type]
    before = held(made.machine)
    assert made.run(limit).kind == kind
    assert held(made.machine) == before
    assert_contained(made.machine)
    assert made.everything() == bare.everything()
    return made


# SVM's own instructions


@pytest.mark.parametrize("ring", RINGS)
@pytest.mark.parametrize("name", SVM)
def test_svm_is_undefined_in_every_ring(name: str, ring: int) -> None:
    """What CPUID does not offer is #UD, in the kernel and in a process, with EIP at it, as on the bare machine."""
    made = run_both(f"{RINGS[ring]}\n mov eax, DATA\nhere:   db 0x0F, 0x01, {SVM[name]}\n nop")
    assert made.vector == Vector.UD
    assert made.stack(1) == [made.symbol("here")]
    assert made.data(DATA, 0x1000) == bytes(0x1000)


@pytest.mark.parametrize("ring", RINGS)
@pytest.mark.parametrize("name", ("vmsave", "vmload", "vmrun"))
def test_no_address_of_the_hosts_can_be_named(name: str, ring: int) -> None:
    """VMSAVE, VMLOAD and VMRUN with every page of the host's, of the nested tables, and of its own memory."""
    words = "".join(
        f" mov eax, {address:#x}\n db 0x0F, 0x01, {SVM[name]}\n"
        for address in (*HOST_PAGES, *TABLES, 0, CODE, DATA, MEMORY, ONES, ONES + 0x1000)
    )
    made = run_both(f"{RINGS[ring]}\n{words} int 0x40", memory=SKIPS)
    assert made.vector == 0x40


@pytest.mark.parametrize("prefix", (0x66, 0x67, 0xF2, 0xF3, 0xF0, 0x26))
@pytest.mark.parametrize("ring", (0, 3))
def test_prefixes_make_no_other_instruction_of_it(prefix: int, ring: int) -> None:
    """With any prefix it is still refused: #UD in the kernel and in a process."""
    code = "\n".join(f" mov eax, DATA\n db {prefix}, 0x0F, 0x01, {byte}, 0x90" for byte in (0xD8, 0xDA, 0xDB))
    skip = b"\x83\x04\x24\x04\xcf"
    made = run_both(f"{RINGS[ring]}\n{code}\n int 0x40", memory=[(0x6060, skip)])
    assert made.vector == 0x40
    assert made.data(DATA, 0x1000) == bytes(0x1000)


@pytest.mark.parametrize("msr", (EFER, VM_CR, VM_HSAVE_PA, 0xC001_0115, 0xC001_0116))
@pytest.mark.parametrize("code", ("0x0F, 0x32", "0x0F, 0x30"))
def test_the_registers_of_svm_are_not_there(msr: int, code: str) -> None:
    """EFER, VM_CR, VM_HSAVE_PA: #GP(0) to read and to write, as on the bare machine."""
    made = run_both(f"mov ecx, {msr:#x}\n mov eax, 0x1000\n xor edx, edx\nhere:   db {code}\n nop")
    assert (made.vector, made.stack(2)) == (Vector.GP, [0, made.symbol("here")])


# Page tables that name what is not the guest's

OUTSIDE = (
    BASE,
    BASE + pages.VMCB,
    BASE + pages.HOST_SAVE,
    nested.BASE,
    nested.BASE + 0x5000,
    ONES,
    ONES + 0x1000,
)
TOUCH = """
        mov eax, [0x150000]
        mov dword [0x150004], 0x5A5A5A5A
        mov ecx, [0x150004]
        add dword [0x150008], 1
        mov edi, 0x150FF0
        mov edx, 16
.next:  mov byte [edi], 0x77
        inc edi
        dec edx
        jnz .next
        int 0x40
"""


@pytest.mark.parametrize("user", (False, True))
@pytest.mark.parametrize("frame", OUTSIDE)
def test_a_page_of_the_hosts_is_an_empty_bus(frame: int, user: bool) -> None:
    """Mapped by the guest's own tables, it reads as ones, and what is stored there is lost."""
    made = run_both(
        f"{PAGING_ON}{'to_user' if user else ''}\n{TOUCH}", memory=enable_paging({0x150000: frame | 7})
    )
    assert (made.vector, made.reg("eax"), made.reg("ecx")) == (0x40, 0xFFFFFFFF, 0xFFFFFFFF)


@pytest.mark.parametrize("frame", OUTSIDE)
def test_a_page_table_in_the_hosts_pages_maps_nothing_of_the_hosts(frame: int) -> None:
    """A directory's entry that names a page of the host's: the guest's walk sees ones there, as bare."""
    run_both(f"{PAGING_ON}\n mov eax, [0x500000]\n mov [0x500000], eax\n int 0x40",
             memory=[*enable_paging(directory={1: frame | 7}), *SKIPS])  # fmt: skip


@pytest.mark.parametrize("frame", (*OUTSIDE, MEMORY, 0xA0000, 0x8000_0000))
def test_a_directory_that_is_not_the_guests(frame: int) -> None:
    """CR3 at a page of the host's, or where there is no memory: the guest ends only itself."""
    run_both(
        f"mov eax, {frame:#x}\n mov cr3, eax\n mov eax, cr0\n or eax, 0x80000000\n mov cr0, eax\n inc dword [DATA]\n"
        " jmp $"
    )


@pytest.mark.parametrize("high", (1, 2, 0x10, 0x80, 0xFF))
def test_large_pages_past_four_gigabytes(high: int) -> None:
    """The upper address bits of a large page's entry (PSE-36) lead nowhere that the bare machine does not lead."""
    entry = 0x0000_0000 | high << 13 | 0xE7
    run_both(
        f"mov eax, cr4\n or al, 0x10\n mov cr4, eax\n{PAGING_ON}\n mov eax, [0x450000]\n mov [0x450004], eax\n"
        " mov dword [0x450008], 7\n mov ebx, [0x450008]\n int 0x40",
        memory=[*enable_paging(directory={1: entry}), *SKIPS],
    )


def test_code_past_four_gigabytes() -> None:
    """Neither does a fetch."""
    run_both(
        f"mov eax, cr4\n or al, 0x10\n mov cr4, eax\n{PAGING_ON}\n mov eax, 0x450000\n jmp eax",
        memory=enable_paging(directory={1: 1 << 13 | 0xE7}),
    )


# Page tables in pages that have another use

MOVE_TABLES = f"""
        mov esi, {PAGES}
        mov edi, NEW
        mov ecx, 256
        cld
        rep movsd
        mov eax, NEW
        mov cr3, eax
        mov eax, cr0
        or eax, 0x80000000
        mov cr0, eax
        inc dword [DATA]
        mov ebx, [DATA]
        mov eax, cr3
        mov cr3, eax
        inc dword [DATA]
        int 0x40
"""


@pytest.fixture(params=(True, False), ids=("nx", "without nx"))
def nx(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Nested tables with NX, or without because the engine could not be mended."""
    if not request.param:
        monkeypatch.setattr(cpu, "mend", lambda: False)
    return bool(request.param)


@pytest.mark.parametrize("new", (0x150000, CODE + 0x1000, 0x6000 + 0x1000))
def test_page_tables_may_lie_anywhere(new: int, nx: bool) -> None:
    """In what was data until now, in the page that is being executed, in the page of the handlers."""
    source = f"%define NEW {new:#x}\n{MOVE_TABLES}"
    if new == CODE + 0x1000:
        source = (
            f"%define NEW {new:#x}\n jmp run\n times 0x1800 db 0x90\nrun:{MOVE_TABLES}"  # in its upper half
        )
    made = run_both(source, 1200, memory=enable_paging())
    assert (made.vector, made.reg("ebx")) == (0x40, 1)
    assert monitor_of(made.machine).nested.entries[CODE >> 12] >> 63 == 0  # type: ignore[union-attr]


def test_page_tables_in_code_that_goes_on_being_executed(nx: bool) -> None:
    """A page that is a page table, code and data at once, its entries marked by the CPU while it executes."""
    table = CODE + 0x2000
    entries = b"".join((n << 12 | 7).to_bytes(4, "little") for n in range(0x200))
    call = bytes.fromhex("40 c3")  # inc eax; ret: in an entry for where nothing is
    made = run_both(
        f"""
        mov ebx, {table + 0xF00}
        call ebx
        {PAGING_ON}
        call ebx
        inc dword [0x150000]
        call ebx
        mov dword [{table} + 0x151 * 4], 0
        mov eax, cr3
        mov cr3, eax
        mov eax, 5
        call ebx
        mov ecx, [0x152000]
        call ebx
        int 0x40
        """,
        memory=[
            *enable_paging(directory={0: table | 7}), (table, entries), (table + 0xF00, call),
        ],
    )  # fmt: skip
    assert (made.vector, made.reg("eax")) == (0x40, 7)
    assert made.read(table + 0x150 * 4) & 0x60 == 0x60, "A and D"


def test_page_tables_in_pages_that_are_read_only_for_the_log(nx: bool) -> None:
    """While stores are logged, the CPU's own marks in page tables are made, and are logged."""
    made = lab(
        f"{PAGING_ON}\nhere:   mov eax, [0x150000]\n inc dword [0x151000]\n int 0x40",
        "hvm",
        memory=enable_paging(),
    )
    made.run_to("here")
    tables = monitor_of(made.machine).nested
    assert tables is not None
    assert tables.log_dirty() == frozenset()
    made.run(100)
    assert made.vector == 0x40
    assert made.read(PAGES + 0x1000 + 0x150 * 4) & 0x60 == 0x20
    assert made.read(PAGES + 0x1000 + 0x151 * 4) & 0x60 == 0x60
    logged = tables.log_dirty()
    assert logged >= {PAGES + 0x1000, 0x151000, STACK - 0x1000}
    assert 0x150000 not in logged and CODE not in logged
    assert_contained(made.machine)


@pytest.mark.parametrize("policy", ("", "all"))
def test_the_log_misses_no_page(policy: str) -> None:
    """Whatever changes a page between two looks at the log (guest, delivery, the CPU's marks), it is logged."""
    expectation = next(e for e in EXPECTATIONS if e.guest == "processes")
    image = load_image(expectation.path, memory=16 << 20)
    vm = VirtualMachine(image, "hvm", attach=hardware(policy))
    tables = monitor_of(vm.machine).nested
    assert tables is not None
    tables.log_dirty()
    before, seen = bytes(vm.machine.memory.bytes), 0
    for steps in range(1, 30):
        vm.run(steps * 187_003)
        after = bytes(vm.machine.memory.bytes)
        changed = {n for n in range(0, len(after), 0x1000) if after[n : n + 0x1000] != before[n : n + 0x1000]}
        logged = tables.log_dirty()
        assert changed <= logged
        seen, before = seen + len(changed), after
    assert seen > 100


# Hostile guests

_PLACES = (
    *HOST_PAGES,
    *TABLES,
    nested.BASE + 0x5000 + 8 * (CODE >> 12),
    ONES,
    DATA,
    CODE,
    PAGES,
    PAGES + 0x1000,
    MEMORY,
)


def _hostile(salt: int) -> bytes:
    """A few bytes that try to get at the host."""
    s = Salt(salt)
    place = _PLACES[s.below(len(_PLACES))] + 8 * s.below(32)
    near = struct.pack("<I", place)
    page = struct.pack("<I", place & ~0xFFF | (7, 3, 0xE7, 0x1E7, 0x2067)[s.below(5)])
    entry = struct.pack("<I", PAGES + 0x1000 + 4 * (0x150 + s.below(8)))
    linear = struct.pack("<I", 0x150000 + 0x1000 * s.below(8) + 4 * s.below(1024))
    svm = bytes((0x0F, 0x01, 0xD8 + s.below(8)))
    msr = struct.pack("<I", (EFER, VM_CR, VM_HSAVE_PA, 0x174, 0xC0000081)[s.below(5)])
    return (
        b"\xb8" + near + svm,  # mov eax, place; vmrun ..
        b"\xb8" + near + svm,
        b"\xc7\x05" + entry + page,  # mov dword [page table entry], place
        b"\xc7\x05" + entry + page + b"\x0f\x20\xd8\x0f\x22\xd8",  # and flush
        b"\xc7\x05" + linear + near,  # mov dword [there], place
        b"\xff\x05" + linear,  # inc dword [there]
        b"\xa1" + linear,  # mov eax, [there]
        b"\xbf" + linear + b"\xb9\x10\0\0\0\xf3\xab",  # rep stosd
        b"\xb8"
        + page
        + b"\x0f\x22\xd8\xb8"
        + struct.pack("<I", PAGES)
        + b"\x0f\x22\xd8",  # mov cr3, place; back
        b"\xb9" + msr + b"\xb8" + near + b"\x31\xd2\x0f\x30",  # wrmsr
        b"\xc7\x05" + struct.pack("<I", PAGES + 4 * s.below(4) + 4) + page,  # a directory's entry
        b"\xc7\x05" + near + page,  # by its own address: not mapped, or its own
        b"\x0f\x20\xe0\x35\x90\0\0\0\x0f\x22\xe0",  # CR4.PSE and PGE
        b"\x68" + struct.pack("<I", s.below(1 << 12) & ~0x300) + b"\x9d",  # push; popfd
        b"\x0f\x01\x38\x0f\x08\x0f\x09\xf3\x90",  # invlpg [eax]; invd; wbinvd; pause
        struct.pack("<Q", s.below(1 << 64)),  # anything
    )[s.below(16)]


@MANY
@given(
    st.lists(st.integers(0, (1 << 80) - 1), min_size=1, max_size=25),
    st.booleans(),
    st.sampled_from((("", "nested"), ("all", "nested"), ("", "shadow"))),
)
def test_a_hostile_guest_stays_inside(salts: list[int], user: bool, how: tuple[str, str]) -> None:
    """Addresses of the host's in SVM's instructions, page tables, CR3, MSRs, stores: as bare, the host untouched."""
    code = b"".join(_hostile(salt) for salt in salts) + b"\xcd\x40"
    source = f"{PAGING_ON}{'to_user' if user else ''}\n db {', '.join(map(str, code))}"
    memory = [*enable_paging(), *SKIPS]
    bare = lab(source, memory=memory)
    kind = bare.run(LIMIT).kind
    made = lab(source, "hvm", memory=memory, attach=hardware(*how))  # type: ignore[arg-type]
    before = held(made.machine)
    assert made.run(LIMIT).kind == kind
    assert held(made.machine) == before
    assert_contained(made.machine)
    assert made.everything() == bare.everything()


@settings(MANY, max_examples=30)
@given(st.integers(0, 1 << 32))
def test_a_fuzzed_guest_stays_inside(seed: int) -> None:
    """Random system code over random tables, as the fuzzer makes it, stays inside, too."""
    vm = VirtualMachine(guest(seed), "hvm", memory=4 << 20)
    before = held(vm.machine)
    vm.run(LIMIT)
    assert held(vm.machine) == before
    assert_contained(vm.machine)
