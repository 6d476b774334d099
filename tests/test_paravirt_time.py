"""A domain's time: system time from the counter, timers, blocking, runstates."""

from __future__ import annotations

import struct
import threading

import pytest

from tests import domains
from tests.test_paravirt_hypercalls import call, put, started
from vmm.machine.clock import HostClock
from vmm.monitor.paravirt.abi.errors import Errno
from vmm.monitor.paravirt.abi.hypercalls import Hypercall
from vmm.monitor.paravirt.time import TICK, TSC_MULTIPLIER, TSC_SHIFT, DomainTime

# A kernel that counts timer events by the upcall, and blocks in between.
TIMER = """
TIMER_PORT equ seen + 4
        mov ebx, KERNEL_CS
        mov ecx, upcall
        mov edx, KERNEL_CS
        mov esi, upcall
        hypercall 4             ; set_callbacks
        mov esp, kernel_stack
        mov ebx, 7
        xor ecx, ecx
        hypercall 24            ; vcpu_op stop_periodic_timer
        mov ebx, 1
        mov ecx, bind
        hypercall 32            ; event_channel_op bind_virq
"""
UPCALL = """
stop:   jmp stop
upcall:
        push eax
        push ebx
        mov eax, [shared]
        inc dword [seen]
        mov byte [eax], 0       ; evtchn_upcall_pending
        mov dword [eax + 4], 0  ; evtchn_pending_sel
        mov dword [eax + 0x800], 0
        pop ebx
        pop eax
        push eax
        hypercall 23            ; iret: events on again
section .data
bind:   dd 0, 0, 0              ; VIRQ_TIMER, vcpu 0; port
singleshot: dd 0, 0, 0
shared: dd 0xF0000000
"""
# The shared page where the kernel finds it: mapped over a page of its own.
MAP_SHARED = """
        mov esi, [start_info]
        mov ecx, [esi + 36]
        or ecx, 3
        mov ebx, shared_page
        mov [shared], ebx
        xor edx, edx
        mov esi, 2
        hypercall 14            ; update_va_mapping
section .bss
        alignb 4096
shared_page: resb 4096
section .text
"""


def test_the_pair_gives_nanoseconds() -> None:
    """((ticks << shift) * multiplier) >> 32 is ten nanoseconds a tick, exactly."""
    assert all(
        (ticks << TSC_SHIFT) * TSC_MULTIPLIER >> 32 == 10 * ticks for ticks in (0, 1, 7, 12345, 1 << 40)
    )


def test_a_guest_computes_the_time_without_asking() -> None:
    """RDTSC and the pair in vcpu_info give the machine's guest time."""
    guest = domains.build("rdtsc\nmov [seen], eax\nmov [seen + 4], edx\nhere:\nstop: jmp stop\n")
    guest.run_to("here")
    base = guest.domain.shared.vcpu + 32
    version, _, stamp, system, multiplier, shift, flags = struct.unpack(
        "<IIQQIbB", guest.machine.memory.bytes[base : base + 30]
    )
    counter = guest.read("seen") | guest.read(guest.symbol("seen") + 4) << 32
    now = system + (((counter - stamp) << shift) * multiplier >> 32)
    assert not version & 1 and flags == 1
    assert 0 <= guest.machine.now() - now < 100


def test_the_wallclock_is_a_date() -> None:
    """Seconds since 1970 at system time 0: the date that the machine's own clock starts with."""
    guest = started()
    base = guest.domain.shared.base + 0x900
    version, seconds, nanoseconds = struct.unpack("<III", guest.machine.memory.bytes[base : base + 12])
    assert (version % 2, seconds, nanoseconds) == (0, 946_684_800, 0)


def test_a_timer_wakes_a_domain_that_blocks() -> None:
    """set_timer_op, sched_op block, and the upcall comes when the time has come; the CPU sleeps until then."""
    guest = domains.run(
        TIMER
        + MAP_SHARED
        + """
        mov ebx, 5000000        ; ns
        xor ecx, ecx
        hypercall 15            ; set_timer_op
        mov ebx, 1
        hypercall 29            ; sched_op block
        mov dword [seen + 8], 1
"""
        + UPCALL,
        limit=10_000,
    )
    assert guest.read("seen") == 1 and guest.read(guest.symbol("seen") + 8) == 1
    assert guest.machine.now() >= 5_000_000
    assert guest.machine.now() - 10 * guest.machine.retired() > 4_000_000, "it slept"
    assert guest.count("event upcall") == 1


def test_a_timer_interrupts_a_domain_that_computes() -> None:
    """The event comes at its instruction, whatever the guest is doing."""
    guest = domains.build(
        TIMER
        + MAP_SHARED
        + """
        mov ebx, 500000
        xor ecx, ecx
        hypercall 15
        mov eax, [shared]
        mov byte [eax + 1], 0   ; evtchn_upcall_mask
"""
        + UPCALL
    )
    guest.run_to("upcall", 100_000)
    assert 500_000 <= guest.machine.now() < 500_100


def test_a_period_of_its_own() -> None:
    """VCPUOP_set_periodic_timer raises the interrupt again and again; less than a millisecond is refused."""
    guest = domains.run(
        TIMER
        + MAP_SHARED
        + """
        mov ebx, 6
        xor ecx, ecx
        mov edx, period
        hypercall 24
        mov eax, [shared]
        mov byte [eax + 1], 0
        jmp stop
section .data
period: dd 1000000, 0
section .text
"""
        + UPCALL,
        limit=1_000_000,
    )
    assert guest.read("seen") == 9
    address = put(guest, struct.pack("<Q", 999_999))
    assert call(guest, Hypercall.VCPU_OP, 6, 0, address) == -Errno.EINVAL


def test_a_domain_ticks_at_100_hz_from_the_start() -> None:
    """The period that Xen gives a domain, while it runs; blocked, it is not woken by it."""
    clock = [0]
    ticks: list[int] = []
    time = DomainTime(lambda: clock[0], lambda: ticks.append(clock[0]))
    assert time.deadline() == TICK
    clock[0] = TICK
    time.tick()
    assert ticks == [TICK] and time.deadline() == 2 * TICK
    from vmm.monitor.paravirt.abi.sched import Runstate

    time.enter(Runstate.BLOCKED)
    assert time.deadline() is None
    clock[0] = 5 * TICK
    time.enter(Runstate.RUNNING)
    assert ticks == [TICK, 5 * TICK], "made up for once, when it runs again"
    assert struct.unpack("<iQ4Q", time.runstate_info()) == (0, 5 * TICK, TICK, 0, 4 * TICK, 0)


@pytest.mark.parametrize(
    ("timeout", "deadline"),
    [(0, None), (5_000, 5_000), (1 << 63, 1_000 + 100_000_000), ((1 << 50) + 1_000, 1_000 + 100_000_000)],
)
def test_a_timeout_past_all_reason_comes_in_100_ms(timeout: int, deadline: int | None) -> None:
    """As Xen has it for kernels whose arithmetic wraps; 0 stops the timer."""
    time = DomainTime(lambda: 1_000, lambda: None)
    time.set_period(0)
    time.set_timer(timeout)
    assert time.deadline() == deadline


def test_poll_ends_with_an_event_or_its_time() -> None:
    """SCHEDOP_poll sleeps with events masked until a port is pending, or the time is over."""
    guest = domains.run(
        TIMER
        + """
        mov ebx, 3
        mov ecx, poll
        hypercall 29
        mov dword [seen + 8], 1
"""
        + UPCALL
        + """
poll:   dd 0, 0
        dd 3000000, 0
""",
        limit=1_000,
    )
    assert guest.read(guest.symbol("seen") + 8) == 1
    assert 3_000_000 <= guest.machine.now() < 3_100_000


def test_polling_a_port_that_is_not_there_is_refused() -> None:
    """-EINVAL; too many ports as well; what is not mapped is -EFAULT."""
    guest = started()
    port = guest.symbol("room") + 64
    address = put(guest, struct.pack("<IIQ", port, 1, 0))
    guest.domain.guest.write(port, struct.pack("<I", 999))
    assert call(guest, Hypercall.SCHED_OP, 3, address) == -Errno.EINVAL
    put(guest, struct.pack("<IIQ", port, 129, 0))
    assert call(guest, Hypercall.SCHED_OP, 3, address) == -Errno.EINVAL
    put(guest, struct.pack("<IIQ", 0xE0000000, 1, 0))
    assert call(guest, Hypercall.SCHED_OP, 3, address) == -Errno.EFAULT


def test_a_domain_that_nothing_will_wake_has_ended() -> None:
    """Blocked with no timer and no input: the run is over, as after HLT."""
    guest = domains.build(TIMER + "mov ebx, 1\nhypercall 29\n" + UPCALL)
    outcome = guest.run(1_000)
    assert (outcome.kind, outcome.status) == ("halt", 0)


@pytest.mark.parametrize(
    ("reason", "kind", "word"),
    [
        (0, "halt", "powered"),
        (1, "halt", "reset"),
        (2, "halt", "suspended"),
        (3, "error", "SHUTDOWN_crash"),
        (77, "error", "reason 77"),
    ],
)
def test_a_shutdown_says_why(reason: int, kind: str, word: str) -> None:
    """Power off and reset end well, a crash is an error of the guest's."""
    guest = domains.build(
        f"""
        mov ebx, 2
        mov ecx, why
        hypercall 29
        jmp $
section .data
why:    dd {reason}
"""
    )
    outcome = guest.run(1_000)
    assert outcome.kind == kind and word in outcome.detail


def test_runstates_are_written_where_the_guest_wants_them() -> None:
    """VCPUOP_register_runstate_memory_area: state, since when, and the time in each."""
    guest = started()
    area = guest.symbol("room") + 64
    address = put(guest, struct.pack("<Q", area))
    assert call(guest, Hypercall.VCPU_OP, 5, 0, address) == 0
    assert guest.read(area) == 0
    guest.domain.block()
    assert guest.read(area) == 2
    guest.domain.wake()
    assert guest.read(area) == 0
    assert call(guest, Hypercall.VCPU_OP, 5, 1, address) == -Errno.ENOENT
    assert call(guest, Hypercall.VCPU_OP, 3, 0, 0) == 1


def test_vcpu_info_moves_once() -> None:
    """To a page of the guest's own; what it held goes along, and everything counts as pending."""
    guest = started()
    info = guest.read("start_info")
    page = guest.symbol("kernel_stack_bottom")
    mfn = guest.read(guest.read(info + 68) + 4 * (page >> 12))
    address = put(guest, struct.pack("<QII", mfn, 64, 0))
    assert call(guest, Hypercall.VCPU_OP, 10, 0, address) == 0
    assert guest.domain.shared.vcpu == (mfn << 12) + 64
    assert guest.read(page + 64, 2) == 0x0101, "an upcall pending, and events still masked"
    assert guest.read(page + 64 + 4) == 0xFFFFFFFF
    assert call(guest, Hypercall.VCPU_OP, 10, 0, address) == -Errno.EBUSY


def test_a_watchdog_that_is_not_kept_quiet_ends_the_domain() -> None:
    """SCHEDOP_watchdog: two of them; a kernel sets its own anew, or is ended when its time is over."""
    guest = domains.build("stop: jmp stop\n")
    guest.run_to("stop")
    guest.machine.run_state.outcome = None
    number = call(guest, Hypercall.SCHED_OP, 6, put(guest, struct.pack("<II", 0, 1)))
    assert number == 1
    assert call(guest, Hypercall.SCHED_OP, 6, put(guest, struct.pack("<II", 1, 2))) == 0
    assert call(guest, Hypercall.SCHED_OP, 6, put(guest, struct.pack("<II", 0, 3))) == 2
    assert call(guest, Hypercall.SCHED_OP, 6, put(guest, struct.pack("<II", 0, 3))) == -Errno.ENOSPC
    assert call(guest, Hypercall.SCHED_OP, 6, put(guest, struct.pack("<II", 2, 0))) == 0
    for number, seconds in ((2, 5), (3, 5), (0, 0)):
        structure = put(guest, struct.pack("<II", number, seconds))
        assert call(guest, Hypercall.SCHED_OP, 6, structure) == -Errno.EINVAL
    outcome = guest.run(300_000_000)
    assert outcome.kind == "error" and "watchdog" in outcome.detail
    assert 2_000_000_000 <= guest.machine.now() < 2_001_000_000


@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_a_run_in_pieces_is_the_same_run(piece: int) -> None:
    """Stopping a domain anywhere and going on changes nothing: events come at the same instructions."""
    source = (
        TIMER
        + MAP_SHARED
        + """
        mov ebx, 20000
        xor ecx, ecx
        hypercall 15
        mov eax, [shared]
        mov byte [eax + 1], 0
        mov edi, 900
again:  hypercall 17
        inc dword [seen + 12]
        dec edi
        jnz again
"""
        + UPCALL
    )
    whole, pieces = domains.build(source), domains.build(source)
    whole.run(4_000)
    for limit in range(piece, 4_000 + piece, piece):
        pieces.run(min(limit, 4_000))
    assert whole.read("seen") == 1 and whole.monitor.registers() == pieces.monitor.registers()
    assert bytes(whole.machine.memory.bytes) == bytes(pieces.machine.memory.bytes)
    counts = [{name: row.count for name, row in g.machine.exits.rows.items()} for g in (whole, pieces)]
    assert counts[0] == counts[1]


def test_an_event_that_came_while_masked_is_delivered_at_the_next_tick() -> None:
    """A kernel that unmasks and does not look is told when the hypervisor next has the processor."""
    guest = domains.build(
        TIMER
        + MAP_SHARED
        + """
        mov ebx, 6
        xor ecx, ecx
        mov edx, period
        hypercall 24            ; set_periodic_timer: 1 ms
        mov ecx, 150000
spin:   dec ecx
        jnz spin
        mov eax, [shared]
        mov byte [eax + 1], 0   ; a tick is pending now
unmasked:
        jmp stop
section .data
period: dd 1000000, 0
section .text
"""
        + UPCALL
    )
    guest.run(299_000)
    assert guest.domain.shared.upcall_pending and guest.read("seen") == 0
    guest.run(390_000)
    assert guest.machine.state.eip == guest.symbol("stop") and guest.read("seen") == 0
    guest.run(410_000)
    assert guest.read("seen") == 1


def test_a_domain_is_interrupted_by_the_hosts_clock() -> None:
    """Nobody sees it let events in, so it is never run uncounted: its timer stops the CPU."""
    guest = domains.build(
        TIMER
        + MAP_SHARED
        + """
        mov ebx, 6
        xor ecx, ecx
        mov edx, period
        hypercall 24
        mov eax, [shared]
        mov byte [eax + 1], 0
busy:   cmp dword [seen], 3
        jb busy
        mov ebx, 2
        mov ecx, why
        hypercall 29
section .data
period: dd 5000000, 0
why:    dd 0
section .text
"""
        + UPCALL,
        clock=HostClock(),
    )
    late = threading.Timer(20, guest.machine.poke, ("timeout",))
    late.start()
    outcome = guest.machine.run(free=True)
    late.cancel()
    assert outcome.kind == "halt" and guest.read("seen") == 3
