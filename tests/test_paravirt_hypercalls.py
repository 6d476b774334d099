"""The table of hypercalls: what each answers, and that no argument whatever does more than end its guest."""

from __future__ import annotations

import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import domains
from vmm.errors import GuestError
from vmm.monitor.paravirt import hypercalls
from vmm.monitor.paravirt.abi.errors import Errno, Refused
from vmm.monitor.paravirt.abi.hypercalls import Hypercall, hypercall_page
from vmm.monitor.paravirt.domain import Continued

IDLE = "stop: jmp stop\n"
ROOM = 64  # words at `room` that a call's structures are made of


def call(guest: domains.Guest, number: int, *arguments: int) -> int:
    """Make a hypercall as the guest's kernel would."""
    five = (*arguments, 0, 0, 0, 0, 0)[:5]
    return hypercalls.call(guest.domain, number, five)  # type: ignore[arg-type]


def put(guest: domains.Guest, data: bytes) -> int:
    """Lay a structure down in the guest's memory; its address."""
    address = guest.symbol("room")
    guest.domain.guest.write(address, data)
    return address


def started() -> domains.Guest:
    guest = domains.build(IDLE)
    guest.run_to("stop")
    guest.machine.run_state.outcome = None  # of the last step
    return guest


def test_every_number_has_a_row_or_is_not_implemented() -> None:
    """A number that Xen's header does not have is -ENOSYS, and so is one that a PV guest has no use of."""
    guest = started()
    for number in (11, 37 + 1, 43, 48, 55, 1 << 31, 0xFFFFFFFF):
        assert call(guest, number) == -Errno.ENOSYS
    for number in (Hypercall.XENOPROF_OP, Hypercall.HVM_OP, Hypercall.SET_SEGMENT_BASE):
        assert call(guest, number) == -Errno.ENOSYS
    for number in (Hypercall.DOMCTL, Hypercall.SYSCTL, Hypercall.PLATFORM_OP):
        assert call(guest, number) == -Errno.EPERM


def test_rows_say_their_own_number() -> None:
    """The table is by number, and a name is what the table of exits shows."""
    assert all(
        number == row.number and row.name == Hypercall(number).name.lower()
        for number, row in hypercalls.ROWS.items()
    )
    assert hypercalls.name(29) == "hypercall sched_op" and hypercalls.name(99) == "hypercall unknown"


def test_the_hypercall_page_calls_by_number() -> None:
    """Each stub loads its number and traps; that of iret saves EAX, and does not return."""
    page = hypercall_page()
    assert len(page) == 4096
    assert page[18 * 32 : 18 * 32 + 8] == bytes.fromhex("b812000000cd82c3")
    assert page[23 * 32 : 23 * 32 + 8] == bytes.fromhex("50b817000000cd82")


def test_a_multicall_gives_each_result() -> None:
    """One exit, several calls, their results in the list."""
    guest = started()
    entries = [(Hypercall.XEN_VERSION, 0, 0), (99, 0, 0), (Hypercall.STACK_SWITCH, 0xE021, 0x5000)]
    address = put(guest, b"".join(struct.pack("<8I", op, 0, a, b, 0, 0, 0, 0) for op, a, b in entries))
    assert call(guest, Hypercall.MULTICALL, address, 3) == 0
    results = [guest.read(address + 32 * i + 4) for i in range(3)]
    assert results == [4 << 16 | 17, -Errno.ENOSYS & 0xFFFFFFFF, 0]
    assert guest.domain.vcpu.kernel_sp == 0x5000


def test_a_multicall_in_a_multicall_is_refused() -> None:
    """As in Xen."""
    guest = started()
    address = put(guest, struct.pack("<8I", Hypercall.MULTICALL, 0, 0, 0, 0, 0, 0, 0))
    assert call(guest, Hypercall.MULTICALL, address, 1) == 0
    assert guest.read(address + 4) == -Errno.EINVAL & 0xFFFFFFFF
    assert call(guest, Hypercall.MULTICALL, 0xF5800000 - 16, 1) == -Errno.EFAULT


def test_a_long_multicall_makes_way_and_goes_on() -> None:
    """Where somebody outside wants the processor, the call says with which arguments it is to be made again."""
    guest = started()
    address = put(guest, struct.pack("<8I", Hypercall.STACK_SWITCH, 0, 0xE021, 1, 0, 0, 0, 0) * 2)
    guest.machine.run_state.poke = "tick"
    with pytest.raises(Continued) as rest:
        call(guest, Hypercall.MULTICALL, address, 2)
    assert rest.value.arguments == (address + 32, 1)
    assert not guest.domain.vcpu.in_multicall


@pytest.mark.parametrize(
    ("operation", "expected"),
    [(0, 4 << 16 | 17), (7, 4096), (10, -Errno.EPERM), (99, -Errno.ENOSYS)],
)
def test_xen_version(operation: int, expected: int) -> None:
    """The version is a number, the page size too, and what does not exist says so."""
    assert call(started(), Hypercall.XEN_VERSION, operation, 0) == expected


def test_the_features_are_those_of_a_pv_domain() -> None:
    """Real page tables of the guest's own, no translation, no supervisor kernel."""
    guest = started()
    address = put(guest, struct.pack("<II", 0, 0))
    assert call(guest, Hypercall.XEN_VERSION, 6, address) == 0
    assert guest.read(address + 4) & 0b11111 == 0
    assert call(guest, Hypercall.VM_ASSIST, 0, 3) == 0  # pae_extended_cr3
    assert call(guest, Hypercall.XEN_VERSION, 6, address) == 0
    assert guest.read(address + 4) & 0b11111 == 0b10000
    put(guest, struct.pack("<II", 1, 0))
    assert call(guest, Hypercall.XEN_VERSION, 6, address) == -Errno.EINVAL


def test_a_trap_table_is_read_to_its_end_and_its_selectors_raised() -> None:
    """RPL 0 becomes 1; a null pointer empties the table; a bad one is -EFAULT."""
    guest = started()
    address = put(guest, struct.pack("<BBHI", 14, 4, 0xE018, 0x1234) + bytes(8))
    assert call(guest, Hypercall.SET_TRAP_TABLE, address) == 0
    handler = guest.domain.vcpu.traps[14]
    assert (handler.cs, handler.eip, handler.masks_events) == (0xE019, 0x1234, True)
    assert call(guest, Hypercall.SET_TRAP_TABLE, 0xE0000000) == -Errno.EFAULT
    assert call(guest, Hypercall.SET_TRAP_TABLE, 0) == 0
    assert not guest.domain.vcpu.traps[14].present


def test_callbacks() -> None:
    """Event and failsafe callbacks are registered, and cannot be taken away; an unknown one is -ENOSYS."""
    guest = started()
    address = put(guest, struct.pack("<HHII", 1, 1, 0xE018, 0x77))
    assert call(guest, Hypercall.CALLBACK_OP, 0, address) == 0
    callback = guest.domain.vcpu.failsafe_callback
    assert (callback.cs, callback.eip, callback.masks_events) == (0xE019, 0x77, True)
    assert call(guest, Hypercall.CALLBACK_OP, 1, address) == -Errno.EINVAL
    put(guest, struct.pack("<HHII", 9, 0, 0, 0))
    assert call(guest, Hypercall.CALLBACK_OP, 0, address) == -Errno.ENOSYS
    assert call(guest, Hypercall.CALLBACK_OP, 7, address) == -Errno.EINVAL


def test_debug_registers_keep_what_a_guest_may_have() -> None:
    """Not a breakpoint in the hypervisor, not DR7.GD; DR4 and DR5 are aliases."""
    guest = started()
    assert call(guest, Hypercall.SET_DEBUGREG, 1, 0x1234) == 0
    assert call(guest, Hypercall.GET_DEBUGREG, 1) == 0x1234
    assert call(guest, Hypercall.SET_DEBUGREG, 0, 0xF5800000) == -Errno.EPERM
    assert call(guest, Hypercall.SET_DEBUGREG, 7, 1 << 13) == -Errno.EPERM
    assert call(guest, Hypercall.SET_DEBUGREG, 5, 3) == 0
    assert call(guest, Hypercall.GET_DEBUGREG, 7) == 0x403
    assert call(guest, Hypercall.SET_DEBUGREG, 8, 0) == -Errno.ENODEV
    assert call(guest, Hypercall.GET_DEBUGREG, 0xFFFFFFFF) == -Errno.ENODEV


def test_iopl_and_bitmap() -> None:
    """Virtual IOPL is 0 to 3; a bitmap lies in the guest's memory; there are no interrupts to ask for."""
    guest = started()
    address = put(guest, struct.pack("<I", 3))
    assert call(guest, Hypercall.PHYSDEV_OP, 6, address) == 0 and guest.domain.vcpu.iopl == 3
    put(guest, struct.pack("<I", 4))
    assert call(guest, Hypercall.PHYSDEV_OP, 6, address) == -Errno.EINVAL
    put(guest, struct.pack("<II", 0xF5800000, 65536))
    assert call(guest, Hypercall.PHYSDEV_OP, 7, address) == -Errno.EINVAL
    assert call(guest, Hypercall.PHYSDEV_OP, 13, address) == -Errno.EPERM
    assert call(guest, Hypercall.PHYSDEV_OP, 99, address) == -Errno.ENOSYS
    put(guest, struct.pack("<II", 6, 2))
    assert call(guest, Hypercall.PHYSDEV_OP_COMPAT, address) == 0 and guest.domain.vcpu.iopl == 2


words = st.one_of(
    st.sampled_from(
        (0, 1, 2, 3, 4, 5, 7, 8, 16, 31, 127, 128, 1023, 1024, 4095, 4096, 0x7FF0, 0x7FF1, 0x7FFF)
    ),
    st.sampled_from(
        (0xFFFFFFFF, 0xFFFFFFFE, 0x80000000, 0x7FFFFFFF, 0xF5800000, 0xF57FFFFF, 0xF5800004, 0xFFE00000)
    ),
    st.integers(0, 200),
    st.integers(0, 0xFFFFFFFF),
    st.tuples(st.just("room"), st.integers(0, 4 * ROOM)),
    st.tuples(st.just("page"), st.integers(0, 600)),  # the machine frame of a pseudo-physical page
    st.tuples(st.just("address"), st.integers(0, 600)),  # and its machine address
    st.tuples(st.just("table"), st.integers(0, 8)),  # the frame of an initial page table
)
calls = st.tuples(
    st.one_of(st.sampled_from(sorted(hypercalls.ROWS)), st.integers(0, 60)),
    st.lists(words, min_size=5, max_size=5),
    st.lists(words, min_size=0, max_size=24),
)


def value(guest: domains.Guest, frames: list[int], tables: int, word: int | tuple[str, int]) -> int:
    if isinstance(word, int):
        return word
    kind, number = word
    match kind:
        case "room":
            return guest.symbol("room") + number
        case "table":
            return frames[tables + number]
        case "address":
            return frames[number] << 12 & 0xFFFFFFFF
        case _:
            return frames[number]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(calls, min_size=1, max_size=12))
def test_any_arguments_from_any_state(sequence: list[tuple[int, list[int], list[int]]]) -> None:
    """Whatever a guest's kernel asks, it gets a result or an error number, or has ended itself with one line."""
    guest = started()
    info = guest.read("start_info")
    frames, tables = guest.words(guest.read(info + 68), 700), guest.read(info + 60) >> 12
    for number, arguments, contents in sequence:
        data = b"".join(value(guest, frames, tables, word).to_bytes(4, "little") for word in contents)
        five = tuple(value(guest, frames, tables, word) for word in arguments)
        try:
            guest.domain.guest.write(guest.symbol("room"), data)
        except Refused:  # it has taken its own memory away
            break
        try:
            result = hypercalls.call(guest.domain, number, five)  # type: ignore[arg-type]
        except GuestError as error:
            assert "\n" not in str(error)
            break
        except Continued as rest:  # it is to be made again, with these
            assert all(0 <= word < 1 << 32 for word in rest.arguments) and len(rest.arguments) <= 5
            continue
        assert isinstance(result, int) and -4096 < result < 1 << 32
        if result < 0:
            assert -result in tuple(Errno)
        if guest.machine.run_state.outcome is not None or guest.domain.blocked:
            break


def test_a_call_that_made_way_is_made_again_by_the_guest() -> None:
    """EIP is back at the call and the registers hold what is left of it; the results are those of one call."""
    guest = domains.build(
        """
        mov ebx, list
        mov ecx, 3
        hypercall 13            ; multicall
after:
stop:   jmp stop
section .data
list:   dd 17, 0, 0, 0, 0, 0, 0, 0
        dd 3, 0, 0xE021, 0x1234, 0, 0, 0, 0
        dd 17, 0, 0, 0, 0, 0, 0, 0
"""
    )
    answers = iter((False, True))
    guest.domain.paging.domain.should_yield = lambda: next(answers, False)
    guest.run(100)
    assert guest.count("hypercall multicall") == 2
    assert [guest.read(guest.symbol("list") + 32 * i + 4) for i in range(3)] == [4 << 16 | 17, 0, 4 << 16 | 17]
    assert guest.domain.vcpu.kernel_sp == 0x1234
    assert guest.reg("eax") == 0 and guest.machine.state.eip == guest.symbol("stop")


def test_a_trap_table_without_end_makes_way() -> None:
    """A table may be as long as the guest's memory: it is read in pieces, when somebody waits."""
    guest = started()
    address = put(guest, struct.pack("<BBHI", 14, 0, 0xE019, 1) * 3 + bytes(8))
    guest.domain.paging.domain.should_yield = lambda: True
    with pytest.raises(Continued) as rest:
        call(guest, Hypercall.SET_TRAP_TABLE, address)
    assert rest.value.arguments == (address + 8,)
