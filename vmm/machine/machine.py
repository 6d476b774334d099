"""The machine: CPU, memory, ports, interrupts and devices, and the loop that runs them.

It knows nothing of virtualization. `Control` says what the hardware does with an exception, an interrupt, a
privileged port; on the bare machine that is the manual, under a monitor it is the monitor.

The hard part is time. With the instruction clock an interrupt must come after exactly so many instructions,
while the engine executes blocks: the meter stops the CPU before a block that would go past the deadline, and
the rest is executed one instruction at a time, by the mechanism of the interrupt shadow, which the guest
cannot see.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from vmm.errors import GuestError
from vmm.events import Event, ExitTable
from vmm.isa.decode import Instruction
from vmm.isa.vectors import ERROR_CODE_VECTORS, Vector, name
from vmm.isa.words import DR6
from vmm.machine import sites
from vmm.machine.alarm import Alarm
from vmm.machine.bus import PortBus
from vmm.machine.clock import NS_PER_TICK, Clock, HostClock, InstructionClock
from vmm.machine.code import decode_in
from vmm.machine.control import Control
from vmm.machine.cpu import layout as at
from vmm.machine.cpu import stub
from vmm.machine.cpu.engine import Engine, Stop
from vmm.machine.cpuid import Cpuid
from vmm.machine.delivery import Fault, TripleFault
from vmm.machine.devices.disk import Disk
from vmm.machine.devices.system import exit_status
from vmm.machine.memory import ONES, Memory
from vmm.machine.msrs import BIOS_SIGN, PLATFORM_ID, TSC, Msrs
from vmm.machine.pc import Devices, Model
from vmm.machine.platform import fit
from vmm.machine.ports import PortExits
from vmm.machine.processor import Linear
from vmm.machine.retirement import Retirement
from vmm.machine.returns import asks_for_virtual_8086
from vmm.machine.run_state import Kind, Outcome, Run
from vmm.machine.stops import AFTER, sleep
from vmm.machine.tlb import FrameTable

if TYPE_CHECKING:
    from vmm.machine.kvm.interface import Kvm

_POLL = stub.POLL // 4
_DB = int(Vector.DB)  # a plain number is found sooner than a member
SHADOWING = frozenset((0xFB, 0x17))  # STI and POP SS; MOV to SS is a group's
FOREVER = 1 << 60  # more instructions than anyone waits for
LONGEST_DOZE = 0.05  # seconds


class Machine:
    """A PC with `memory_size` bytes of RAM. `console` gets what the guest writes to its console.

    Several may share one `engine`, for guests that take turns (see `monitor.hardware`): the first with its RAM at
    physical address 0 of the engine, each other one at a `base` of its own, a multiple of 2 MiB. `disk` is
    the one on its primary IDE channel; without `keyboard` there is no keyboard controller. `model` says how much of
    a PC it is; one with devices in memory shares no engine.
    """

    def __init__(
        self,
        memory_size: int,
        *,
        clock: Clock | None = None,
        console: Callable[[bytes], None] = lambda _data: None,
        engine: Engine | None = None,
        base: int = 0,
        disk: Disk | None = None,
        keyboard: bool = True,
        model: Model = "isapc",
    ) -> None:
        self.memory = Memory(memory_size)
        self.engine = engine or Engine()
        self.engine.map_memory(base, memory_size, self.memory.host_address)
        if not base:
            self.engine.map_memory(ONES, 0x2000, self.memory.stand_in_address)
        self.state = self.engine.state
        self.linear = Linear(self.state, self.memory)
        self.frames = FrameTable(self.memory, self.engine, base)
        self.retirement = Retirement(self.engine.meter, self.state, self.linear)
        self.retired, self.retire = self.retirement.retired, self.retirement.retire
        self.count, self.is_store_only = self.retirement.count, self.retirement.is_store_only
        self.is_repeated = self.retirement.is_repeated
        self.restart_software = self.retirement.restart_software
        self.clock: Clock = clock or InstructionClock()
        self.exits = ExitTable()
        self.run_state = Run()
        self._alarm: Alarm | None = None
        self._woken = threading.Event()
        self.interrupt_pending = False
        self.guest_tsc_offset = 0  # what VMRUN adds to the counter, while a guest is on the processor
        self._control: Control | None = None
        self.cpuid = Cpuid()
        self.msrs = Msrs()
        self.msrs.attach(TSC, self.tsc, self.set_tsc)
        self.msrs.fix(PLATFORM_ID, 0)
        self.msrs.hold(BIOS_SIGN)
        self.on_tsc_moved: Callable[[], None] = lambda: None  # the guest has written its counter
        self.kvm: Kvm | None = None  # the paravirtual interface, where the guest is offered one
        self.bus = PortBus()
        self.devices = Devices(
            self.bus,
            memory_size,
            now=self.now,
            console=console,
            interrupt=self.interrupt_line,
            a20=self._set_a20,
            reset=lambda: self.end(Outcome("halt", 0, "the guest reset the machine")),
            exit_run=lambda value: self.end(Outcome("exit", exit_status(value), "isa-debug-exit")),
            disk=disk,
            keyboard=keyboard,
            model=model,
            devices=self.memory.devices,
            power_off=lambda: self.end(Outcome("halt", 0, "the guest switched the machine off")),
            flush_tlb=self.engine.flush_tlb,
        )
        self.model = model
        assert engine is None or self.devices.chipset is None, "an engine has one window of devices"
        fit(self)
        self.ports = PortExits(self)
        self.on_in, self.on_out = self.ports.on_in, self.ports.on_out
        self.engine.attach(self)

    fill: Callable[[int, int], tuple[int, int] | None]
    intercepted: Callable[[int], str]  # who answers a #VMEXIT, and names it; "" if it will come again

    def attach(self, control: Control) -> None:
        """Who answers the exits from now on."""
        self._control = control
        self.fill = control.fill  # hot: the engine asks the control itself

    def resume_here(self) -> None:
        """The engine, which another machine has used since `retirement.rest`, is this one's again."""
        self.engine.attach(self)
        self.engine.flush_tlb()
        self.retirement.resume()

    @property
    def control(self) -> Control:
        assert self._control is not None, "attach a control before running"
        return self._control

    # Time

    def now(self) -> int:
        """Guest time in nanoseconds."""
        return self.clock.now(self.retired())

    def tsc(self) -> int:
        """The time-stamp counter: 100 MHz of guest time."""
        return self.now() // NS_PER_TICK + self.clock.state.tsc_offset + self.guest_tsc_offset & (1 << 64) - 1

    def set_tsc(self, value: int) -> None:
        """The guest writes the counter: it goes on from there."""
        clock = self.clock.state
        clock.tsc_offset = value - (self.tsc() - clock.tsc_offset) & (1 << 64) - 1
        self.tsc_moved()

    def tsc_moved(self) -> None:
        """The counter goes on from another value."""
        self.engine.meter.begin_epoch()
        self.on_tsc_moved()

    # Ending and watching

    def end(self, outcome: Outcome) -> None:
        """End the run at the instruction boundary that is being reached."""
        if self.run_state.outcome is None:
            self.run_state.outcome = outcome

    def poke(self, reason: str) -> None:
        """From another thread: stop at the next block boundary, for `reason`.

        `timeout` and `interrupted` end the run, `tick` only brings the devices up to date. Returns when the
        loop has heard it; a single store could be overwritten by the loop's own.
        """
        state = self.run_state
        if state.poke != "tick" and state.poke:
            return
        state.poke = reason
        self._woken.set()
        while state.poke == reason and state.active:
            self.engine.meter.poll = stub.STOP_NOW
            if state.free:
                self.engine.abandon()
            time.sleep(0.001)

    def call_soon(self, errand: Callable[[], None]) -> None:
        """From another thread: have the loop call `errand` between two guest instructions.

        Not for a run that is `free`, which no poke can stop and leave whole. Between two runs it waits for the next.
        """
        self.run_state.errands.append(errand)
        self.poke("tick")

    def hear(self) -> None:
        """Between two guest instructions: do what other threads have asked for."""
        state = self.run_state
        reason, state.poke = state.poke, ""
        self._update_poll()
        while state.errands:
            state.errands.popleft()()
        if reason not in ("", "tick"):
            self.end(Outcome("timeout" if reason == "timeout" else "interrupted", 0, reason))

    def emit(self, kind: str, detail: str = "", **data: int | str) -> None:
        """Tell the listeners; costs one test where there are none."""
        if self.run_state.listeners:
            event = Event(kind, self.retired(), self.control.where(), detail, data)
            for listener in self.run_state.listeners:
                listener(event)

    # Interrupt line and A20

    def interrupt_line(self, level: bool) -> None:
        """The processor's interrupt pin; a monitor that owns the controllers drives it itself."""
        self.interrupt_pending = level
        self._update_poll()

    def _update_poll(self) -> None:
        """Tell the CPU at which flags to stop for the pending interrupt, if there is one."""
        poll = 0
        if self.run_state.poke:
            poll = stub.STOP_NOW
        elif self.interrupt_pending and self._control is not None:
            poll = self._control.poll
        self.engine.meter.words[_POLL] = poll | stub.RESUMED

    def _set_a20(self, enabled: bool) -> None:
        mask = 0xFFFFFFFF if enabled else 0xFFEFFFFF
        if mask != self.linear.a20_mask:
            self.linear.a20_mask = mask
            self.engine.flush_tlb()

    # The loop

    def run(self, max_instructions: int | None = None, *, free: bool = False) -> Outcome:
        """Run until the guest ends, or `max_instructions` have retired in all, or somebody pokes.

        `free` lets the CPU run uncounted, at its own speed, for as long as interrupts are off, where time is the
        host's and nothing needs the count: no limit, no listeners. A run that is poked meanwhile ends, and
        cannot be gone on with.
        """
        limit = FOREVER if max_instructions is None else max_instructions
        state = self.run_state
        state.outcome = None
        state.active = True
        state.free = free and not self.clock.exact and limit == FOREVER and not state.listeners
        state.counted = state.counted and not state.free
        self.engine.count_blocks(not state.free)
        if not self.clock.exact:
            self._alarm = Alarm(lambda: self.poke("tick"))
        try:
            if state.asleep:
                sleep(self)
            while True:
                self._before_entry(limit)
                if state.outcome is not None:
                    return state.outcome
                shadowed_eip = self._borrow_shadow() if state.step else -1
                state.step = False
                stop = self.engine.run()
                answered = self.engine.counter.take_answered()
                if answered:
                    self.exits.add("RDTSC", 0, answered)
                if self.memory.devices.open and (stop is not Stop.METER or self.control.settled()):
                    self._shut_devices()
                if stop is Stop.METER and self.state.eip == shadowed_eip:
                    self.state.inhibited = True  # the engine casts no shadow from within one
                started = time.perf_counter_ns()
                reason = AFTER[stop](self)
                state.borrowed = False
                if reason:
                    self.exits.add(reason, time.perf_counter_ns() - started)
        except TripleFault as shutdown:
            detail = f"triple fault at EIP {shutdown.eip:#x}: {shutdown}"
            return Outcome("triple-fault", 0, detail)
        except GuestError as error:
            return Outcome("error", 0, str(error))
        finally:
            state.active = False
            state.poke = ""
            if self._alarm is not None:
                self._alarm.close()
                self._alarm = None

    def _borrow_shadow(self) -> int:
        """Have one instruction executed; where EIP is after it, if it casts a shadow of its own, else -1."""
        state = self.state
        self.run_state.borrowed = not state.inhibited
        state.inhibited = True
        if not self.run_state.borrowed:
            return -1
        instruction = self.decode_here()
        casts = instruction is not None and (instruction.opcode in SHADOWING or instruction.key == "8E/2")
        return state.eip + instruction.size & 0xFFFFFFFF if instruction is not None and casts else -1

    def _before_entry(self, limit: int) -> None:
        """What hardware does between two instructions: faults of our own, time, interrupts."""
        state = self.run_state
        if state.fault is None and not self.control.settled():
            state.step = True
            self._count_if_awake()
            self._grant(0, None)  # what is left of the instruction has been charged
            return
        if state.poke or state.errands:
            self.hear()
        if state.outcome is not None:
            return
        while (
            self.retired() < limit
        ):  # a delivery counts, so it may be what reaches the limit or the deadline
            deadline = self.devices.deadline()
            if state.fault is not None:
                fault, state.fault = state.fault, None
                state.step = self.memory.devices.asked = False
                self.control.fault(fault)
                continue
            if deadline is not None and deadline <= self.now():
                self.devices.tick()
                deadline = self.devices.deadline()
            if self.interrupt_pending and self.control.can_interrupt():
                self.take_interrupt()
                continue
            if not self.control.prepare():
                continue
            self._count_if_awake()
            instructions = limit - self.retired()
            if self.memory.devices.asked:
                instructions = self._open_devices()
            self._grant(instructions, deadline)
            return
        self.end(Outcome("budget", 0, f"the budget of {limit} instructions is spent"))

    def _open_devices(self) -> int:
        """The next instruction is one that reaches a device's page: it may, by itself. How many to grant: one."""
        if self.run_state.free:
            self.count_from_here()
        self.memory.devices.asked = False
        self.memory.devices.open = self.run_state.step = True
        return 1

    def _shut_devices(self) -> None:
        """That instruction is over: nothing of the engine's leads to a device any more."""
        devices = self.memory.devices
        if devices.given == 1 and devices.asked_at >= 0:
            self.engine.flush_page(devices.asked_at)
        else:
            self.engine.flush_tlb()
        devices.open, devices.given, devices.asked_at = False, 0, -1

    def _grant(self, instructions: int, deadline: int | None) -> None:
        """Let the CPU execute so many instructions, or fewer if a device has something to do before."""
        self._update_poll()
        if deadline is not None:
            if self.clock.exact:
                instructions = min(instructions, self.clock.instructions_until(deadline, self.retired()))
            else:
                self.set_alarm(deadline)
        self.retirement.arm(instructions)

    def _count_if_awake(self) -> None:
        if self.run_state.free and self.control.can_wake():
            self.count_from_here()

    def count_from_here(self) -> None:
        """Interrupts are on, or may soon be: the CPU must be stopped for them."""
        self.run_state.free = False
        self.engine.count_blocks(True)

    def set_alarm(self, deadline: int) -> None:
        """Host clock: have the CPU stopped when guest time reaches `deadline`."""
        if self._alarm is not None and not self.run_state.free:
            self._alarm.set((deadline - self.now()) / 1e9)

    def deadline_moved(self) -> None:
        """In an exit: something may now be due sooner than the CPU would stop."""
        deadline = self.devices.deadline()
        if deadline is None or not self.engine.running:
            return
        if not self.clock.exact:
            self.set_alarm(deadline)
            return
        retired = self.retired()
        if not self.retirement.bring_nearer(retired + self.clock.instructions_until(deadline, retired)):
            self.engine.stop()

    def take_interrupt(self) -> None:
        """The INTA cycle, and delivery."""
        started = time.perf_counter_ns()
        self.run_state.step = self.memory.devices.asked = False
        vector = self.devices.acknowledge()
        self.emit("interrupt", f"vector {vector:#x}", vector=vector)
        self.control.interrupt(vector)
        self.exits.add("external interrupt", time.perf_counter_ns() - started)

    def halt(self) -> None:
        """A monitor emulated HLT, inside an exit: sleep as the processor would."""
        self.run_state.halted = True

    def doze(self, deadline: int | None) -> None:
        """Nothing executes until `deadline` (None: for ever), or a little less: a poke is heard at once."""
        if deadline is not None and self.clock.exact:
            self.clock.sleep_until(deadline, self.retired())
            return
        seconds = LONGEST_DOZE if deadline is None else max(0, deadline - self.now()) / 1e9
        self._woken.clear()
        if not self.run_state.poke:
            self._woken.wait(min(seconds, LONGEST_DOZE))

    def restore_shadow(self) -> None:
        """A pass that began in a shadow, which the engine has ended, has not been made, and may be done over."""
        if self.engine.shadowed_pass == (self.state.linear_eip, self.retirement.left()):
            self.state.inhibited = True

    def finish_emulated(self, stepping: bool, inhibit: bool = False) -> None:
        """What ends every instruction that the engine did not execute: the shadow, the single-step trap.

        `stepping` is TF as it was before the instruction; `inhibit` starts an interrupt shadow.
        """
        self.state.inhibited = inhibit
        self.run_state.borrowed = False
        if stepping:
            self.single_step()

    def single_step(self) -> None:
        self.state.set_word(at.DR6, self.state.word(at.DR6) | DR6.BS)
        self._trap()

    def single_stepped(self) -> None:
        """The engine's own single-step trap: EIP is past the instruction, perhaps back at it."""
        counted = self.engine.meter.last_block()[2]
        self.retirement.at_boundary()
        if self.control.stepped(bool(counted)):
            self._trap()

    def _trap(self) -> None:
        """#DB after an instruction: delivered by the loop, because there may be no budget left for it."""
        self.run_state.fault = Fault(Vector.DB)
        if self.engine.running:
            self.engine.stop()

    def must_stop(self) -> bool:
        """Whether a repeated instruction that the machine executes must pause between two passes."""
        if self.retirement.left() <= 0 or self.run_state.outcome is not None or self.run_state.poke:
            return True
        return self.interrupt_pending and self.control.can_interrupt()

    def decode_here(self) -> Instruction | None:
        """The instruction at EIP."""
        eip = self.state.linear_eip
        return decode_in(self.state.wide_code, self.linear.code(eip, 15), eip)

    # Exits handled inside the engine's callbacks (`engine.Handler`)

    def on_exception(self, vector: int, software: bool) -> None:
        started = time.perf_counter_ns()
        if software:
            self.retirement.settle_software()
        elif vector == _DB:
            self.single_stepped()
            self.exits.add(_exit_name(vector, software), time.perf_counter_ns() - started)
            return
        else:
            self.retirement.settle()
        error_code = 0
        if not software and vector in ERROR_CODE_VECTORS:
            error_code = self.state.words[at.ERROR_CODE // 4] & 0xFFFF
        if self.run_state.listeners:
            self.emit(_exit_name(vector, software), "", vector=vector, error_code=error_code)
        assert self._control is not None
        reason = self._control.exception(vector, error_code, software) or _exit_name(vector, software)
        self._resume()
        self.exits.add(reason, time.perf_counter_ns() - started)

    def on_intercept(self, code: int) -> None:
        started = time.perf_counter_ns()
        reason = self.intercepted(code)
        self._resume()
        if reason:
            self.exits.add(reason, time.perf_counter_ns() - started)

    def _resume(self) -> None:
        """Leave the engine if the loop has something to do before the next instruction."""
        assert self._control is not None
        state = self.run_state
        if state.outcome is not None or state.halted or (state.free and self._control.can_wake()):
            self.engine.stop()
        elif self.interrupt_pending and not self.run_state.poke:
            poll = self._control.poll
            if poll and self._control.can_interrupt():
                self.engine.stop()
            self.engine.meter.words[_POLL] = poll | stub.RESUMED

    def on_cpuid(self) -> None:
        values = self.cpuid.answer(self.state.get(0), self.state.get(1))
        for register, value in zip((0, 3, 1, 2), values, strict=True):
            self.state.set(register, value)
        self.exits.add("CPUID", 0)

    def on_rdtsc(self) -> int:
        self.retirement.inside_block = True
        try:
            value = self.tsc()
            if self.clock.exact:
                self.engine.counter.remember(self.state, value)
            return value
        finally:
            self.retirement.inside_block = False
            self.exits.add("RDTSC", 0)

    def on_sysenter(self) -> None:
        started = time.perf_counter_ns()
        self.retirement.settle()
        instruction = self.decode_here()
        try:
            if instruction is None:
                raise Fault(Vector.UD)
            self.control.sysenter()
            self.state.eip -= instruction.size  # the engine adds it afterwards
            self.retire()
        except Fault as fault:
            self.run_state.fault = fault
            self.engine.seal()
        self.exits.add("SYSENTER", time.perf_counter_ns() - started)

    def on_translated(self, address: int, size: int) -> tuple[int, ...]:
        linear = address & 0xFFFFFFFF
        code = self.linear.code(linear, size + 15)
        wider = self.run_state.free and self.control.interrupts_rise_silently
        return sites.find(code, linear, wider, self.state.wide_code, self.state.cpl == 3, size)

    def on_site(self, address: int) -> bool:
        code = self.linear.code(address, 15)
        instruction = decode_in(self.state.wide_code, code, address)
        if instruction is not None and asks_for_virtual_8086(self.state, self.linear, instruction):
            return True
        if not sites.is_site(instruction, code, self.run_state.free):
            return False
        if instruction is not None and instruction.opcode in sites.INTERRUPT_FLAG:
            return self.run_state.free and self.control.interrupts_rise_silently
        if instruction is None or sites.is_refused(instruction) or instruction.opcode in sites.LOOPS:
            return True
        return self.control.wants(instruction)


def _exit_name(vector: int, software: bool) -> str:
    return f"INT {vector:#x}" if software else f"exception {name(vector)}"


__all__ = ["HostClock", "InstructionClock", "Kind", "Machine", "Outcome"]
