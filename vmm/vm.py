"""One guest: a machine, a monitor and an image.

The modes are siblings: each takes the same image on the same machine and only answers the machine's exits
differently. `MODES` has one row a mode.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from vmm.errors import ImageError, UsageError
from vmm.events import ExitTable, Listener
from vmm.expect import Unread, shown
from vmm.image.image import Image
from vmm.machine.bare import Bare
from vmm.machine.boot import boot
from vmm.machine.clock import HostClock, InstructionClock
from vmm.machine.control import Control
from vmm.machine.devices.disk import Disk
from vmm.machine.devices.scancodes import chord
from vmm.machine.machine import Machine, Outcome
from vmm.machine.pc import Model

if TYPE_CHECKING:
    from vmm.machine.kvm.interface import Kvm
    from vmm.monitor.hardware.monitor import HardwareMonitor
    from vmm.monitor.paravirt.monitor import ParavirtMonitor
    from vmm.monitor.translator.monitor import TranslatingMonitor
    from vmm.monitor.trap.monitor import TrapMonitor

CONSOLE_LIMIT = 16 << 20  # bytes of console output kept for the report; what comes after is only shown
ClockName = Literal["instructions", "host"]
MemoryVirtualization = Literal["nested", "shadow"]
Paravirt = Literal["kvm"]


def _native(machine: Machine) -> Bare:
    return Bare(machine)


def _trap(machine: Machine) -> TrapMonitor:
    from vmm.monitor.trap.monitor import TrapMonitor  # a run in another mode does not wait for it

    monitor = TrapMonitor(machine)
    monitor.start()
    return monitor


def _translate(machine: Machine) -> TranslatingMonitor:
    from vmm.monitor.translator.monitor import TranslatingMonitor

    monitor = TranslatingMonitor(machine)
    monitor.start()
    return monitor


def _domain(machine: Machine, image: Image) -> ParavirtMonitor:
    from vmm.monitor.paravirt.builder import Builder, Kernel, KernelSegment

    xen = image.xen
    if xen is None:
        raise ImageError(f"{image.name}: it has no Xen notes: assemble it with -D PV, or leave --mode pv out")
    segments = tuple(KernelSegment(s.address, s.data, s.size) for s in image.segments)
    kernel = Kernel(
        image.name,
        segments,
        image.entry,
        xen.virt_base,
        xen.hypercall_page,
        xen.mod_start_pfn,
        image.command_line,
        image.module,
    )
    return Builder(machine, kernel).build()


def _no_image(_machine: Machine) -> Control:
    raise AssertionError("a Xen guest is built into its machine: see Mode.build")


def hardware(
    intercepts: str = "", memory_virtualization: MemoryVirtualization = "nested"
) -> Callable[[Machine], HardwareMonitor]:
    """How to attach hvm: with intercepts beyond those that contain the guest, and memory in one way or the other.

    Raises `UsageError` for a name in `intercepts` that there is not (see `monitor.hardware.intercepts`).
    """
    from vmm.monitor.hardware.intercepts import Intercepts
    from vmm.monitor.hardware.monitor import HardwareMonitor

    policy = Intercepts.parse(intercepts)

    def attach(machine: Machine) -> HardwareMonitor:
        monitor = HardwareMonitor(machine, policy, memory_virtualization)
        monitor.start()
        return monitor

    return attach


def _hardware(machine: Machine) -> HardwareMonitor:
    return hardware()(machine)


@dataclass(frozen=True)
class Mode:
    """A way to run a guest: `attach` makes the control for a machine whose CPU stands at the guest's entry.

    `image` says which build of the guest it runs: the `same` as the bare machine, with which it can be compared
    instruction by instruction, or the `pv` one, made for Xen's interface (a source's with `-D PV`). `knows` is
    what the mode had to know of the guest, in a few words for a table. `build` is for a mode that puts the guest into
    the machine in its own way; the others take one that stands at its entry as multiboot has it.
    """

    name: str
    summary: str
    attach: Callable[[Machine], Control]
    image: Literal["same", "pv"] = "same"
    knows: str = "nothing"
    build: Callable[[Machine, Image], Control] | None = None

    def start(
        self, machine: Machine, image: Image, attach: Callable[[Machine], Control] | None = None
    ) -> Control:
        """Put the guest into the machine, at its entry. Raises `ImageError` if it is another mode's build.

        `attach` takes the place of the mode's own, such as what `hardware` gives.
        """
        if self.build is not None:
            return self.build(machine, image)
        if image.xen is not None:
            raise ImageError(f"{image.name}: it is made for Xen's interface: run it with --mode pv")
        for segment in image.segments:
            machine.memory.load(segment.address, segment.data)
        boot(machine, image.entry, image.registers, image.selectors)
        return (attach or self.attach)(machine)


MODES: dict[str, Mode] = {
    mode.name: mode
    for mode in (
        Mode("native", "the bare machine: no monitor", _native),
        Mode(
            "trap",
            "classical trap-and-emulate: the guest's kernel in ring 1",
            _trap,
            knows="nothing, and is wrong",
        ),
        Mode(
            "bt",
            "binary translation: the guest's kernel runs out of a translation cache",
            _translate,
            knows="nothing: reads all its kernel code",
        ),
        Mode(
            "pv",
            "paravirtualization: the guest's kernel asks Xen's interface",
            _no_image,
            image="pv",
            knows="all: its kernel's source was changed",
            build=_domain,
        ),
        Mode(
            "hvm",
            "hardware assist: AMD-V, the guest's kernel in its own ring 0",
            _hardware,
            knows="nothing: the hardware knows",
        ),
    )
}


def _kvm(machine: Machine) -> Kvm:
    from vmm.machine.kvm.interface import Kvm

    return Kvm(machine)


PARAVIRT: dict[Paravirt, Callable[[Machine], object]] = {"kvm": _kvm}
"""The paravirtual interfaces that a machine can offer to a guest of its own, and what makes it do so."""


def check_paravirt(name: Paravirt | None, mode: str) -> None:
    """Raise `UsageError` where a guest of this mode cannot be offered the interface."""
    if name is not None and MODES[mode].build is not None:
        raise UsageError(
            f"--paravirt {name}: a guest of {mode} has no machine, but Xen's interface: use native, hvm, bt or trap"
        )



def check_model(model: Model, mode: str) -> None:
    """Raise `UsageError` where a guest of this mode would never see such a machine."""
    if model != "isapc" and MODES[mode].build is not None:
        raise UsageError(
            f"--machine {model}: a guest of {mode} has no machine, but Xen's interface: use native, hvm, bt or trap"
        )


UNMODIFIED = tuple(name for name, mode in MODES.items() if mode.image == "same")
"""The modes that run the same build of a guest as the bare machine."""


@dataclass
class Console:
    """What the guest wrote, passed on as it comes; the first `CONSOLE_LIMIT` bytes are kept.

    `on_match` is called when the text that `unread` waits for is complete.
    """

    show: Callable[[bytes], None] = lambda _data: None
    on_match: Callable[[], None] = lambda: None
    unread: Unread = field(default_factory=Unread)
    kept: bytearray = field(default_factory=bytearray)
    total: int = 0

    def write(self, data: bytes) -> None:
        self.total += len(data)
        room = CONSOLE_LIMIT - len(self.kept)
        if room > 0:
            self.kept += data[:room]
        self.show(data)
        if self.unread.write(data):
            self.on_match()


class Patience:
    """How long a guest may take, in its own time: to the machine one more timed device. `on_end` ends the run."""

    def __init__(self, on_end: Callable[[], None], now: Callable[[], int]) -> None:
        self._on_end, self._now = on_end, now
        self._until: int | None = None

    def set(self, seconds: float | None) -> None:
        """From now on so long, None for ever."""
        self._until = None if seconds is None else self._now() + int(seconds * 1e9)

    def deadline(self) -> int | None:
        return self._until

    def tick(self) -> None:
        if self._until is not None and self._now() >= self._until:
            self._until = None
            self._on_end()


@dataclass(frozen=True)
class Result:
    """What a run came to. `instructions` are retired ones, if they were `counted` (the host clock without a
    bound lets the CPU run uncounted while interrupts are off); `seconds` is wall time inside the run.

    `memory` is the machine's own: it changes if the guest goes on.
    """

    mode: str
    outcome: Outcome
    instructions: int
    seconds: float
    exits: ExitTable
    console: bytes
    registers: dict[str, int]
    counted: bool
    memory: memoryview = field(repr=False, compare=False)

    @cached_property
    def memory_sha256(self) -> str:
        """Of all RAM, computed when first asked for: a second for each gigabyte or so."""
        import hashlib

        return hashlib.sha256(self.memory).hexdigest()


class VirtualMachine:
    """A guest in a mode, ready to run. `show` gets its console output as it comes.

    `paravirt` names an interface that the guest is offered on top of its machine, `model` how much of a PC that
    is. Raises `UsageError` if that cannot be in this mode.
    """

    def __init__(
        self,
        image: Image,
        mode: str = "native",
        *,
        memory: int = 16 << 20,
        clock: ClockName = "instructions",
        show: Callable[[bytes], None] = lambda _data: None,
        console_input: bytes = b"",
        listeners: tuple[Listener, ...] = (),
        attach: Callable[[Machine], Control] | None = None,
        disk: Disk | None = None,
        paravirt: Paravirt | None = None,
        model: Model = "isapc",
    ) -> None:
        check_paravirt(paravirt, mode)
        check_model(model, mode)
        self.image, self.mode = image, MODES[mode]
        self.console = Console(show)
        self.machine = Machine(
            memory,
            clock=InstructionClock() if clock == "instructions" else HostClock(),
            console=self.console.write,
            disk=disk,
            model=model,
        )
        if paravirt is not None:
            PARAVIRT[paravirt](self.machine)
        self.control = self.mode.start(self.machine, image, attach)
        self.machine.attach(self.control)
        self.machine.run_state.listeners.extend(listeners)
        self._patience: Patience | None = None
        self._complaint = ""  # when it runs out
        if console_input:
            self.send(console_input)

    def poke(self, reason: str) -> None:
        """From another thread: end the run soon, as `timeout` or `interrupted`."""
        self.machine.poke(reason)

    def send(self, data: bytes | str) -> None:
        """Input for the serial port, of any length, as if typed now: between two runs, or from within the loop."""
        self.machine.devices.uart.receive(data.encode() if isinstance(data, str) else data)

    def type(self, data: bytes | str) -> None:
        """Type ASCII text on the keyboard; a byte that no key types is left out."""
        assert self.machine.devices.keyboard is not None
        self.machine.devices.keyboard.receive(data.encode() if isinstance(data, str) else data)

    def press(self, names: str) -> None:
        """Press keys together, such as `ctrl-alt-delete`, and let go of them. `UsageError` for a key there is not."""
        assert self.machine.devices.keyboard is not None
        self.machine.devices.keyboard.press(chord(names))

    def instructions(self) -> int:
        """About how many have retired: from any thread, at any time, give or take a block or two."""
        standing = self.machine.retirement.accounting
        return max(0, standing.base + standing.armed - self.machine.engine.meter.budget)

    def run(self, max_instructions: int | None = None, timeout: float | None = None) -> Result:
        """Run until the guest ends or a bound is reached; may be called again to go on after a budget.

        `timeout` is wall time in seconds; `max_instructions` counts from the guest's start, not from here.
        """
        return self._run(
            max_instructions, timeout, free=timeout is None and not self.machine.run_state.attended
        )

    def run_until(
        self,
        text: bytes | str,
        *,
        within: float | None = None,
        max_instructions: int | None = None,
        timeout: float | None = None,
    ) -> Result:
        """Run until the console has shown `text` (UTF-8, if it is a string), which ends the run as `seen`.

        Looked at is what the guest has written since the last text that was seen: what is there already counts, and
        nothing counts twice. The machine stops at the boundary after the OUT that completed the text; `send` and
        another run go on from there. If the text does not come within `within` seconds of the guest's own time, which
        with the instruction clock is the same moment in every run, the run ends as `unseen`. All else is as in `run`.
        """
        wanted = text.encode() if isinstance(text, str) else text
        seen = Outcome("seen", 0, f"the console showed {shown(wanted)}")
        if self.console.unread.wait_for(wanted):
            return self._result(seen, 0.0)
        self.console.on_match = lambda: self.machine.end(seen)
        if within is not None:
            self._patience_for(f"the console did not show {shown(wanted)} within {within:g} s").set(within)
        try:
            free = timeout is None and within is None and not self.machine.run_state.attended
            return self._run(max_instructions, timeout, free=free)
        finally:
            self.console.unread.wait_for(b"")
            if self._patience is not None:
                self._patience.set(None)

    def _patience_for(self, complaint: str) -> Patience:
        self._complaint = complaint
        if self._patience is None:
            machine = self.machine
            self._patience = Patience(lambda: machine.end(Outcome("unseen", 0, self._complaint)), machine.now)
            machine.devices.add(self._patience)
        return self._patience

    def _run(self, max_instructions: int | None, timeout: float | None, *, free: bool) -> Result:
        timer = None
        if timeout is not None:
            timer = threading.Timer(timeout, self.machine.poke, ("timeout",))
            timer.daemon = True
            timer.start()
        started = time.perf_counter()
        try:
            outcome = self.machine.run(max_instructions, free=free)
        finally:
            if timer is not None:
                timer.cancel()
                timer.join()
                self.machine.run_state.poke = ""  # one that came too late must not end the next run
        return self._result(outcome, time.perf_counter() - started)

    def _result(self, outcome: Outcome, seconds: float) -> Result:
        return Result(
            self.mode.name,
            outcome,
            self.machine.retired(),
            seconds,
            self.machine.exits,
            bytes(self.console.kept),
            self.control.registers(),
            self.machine.run_state.counted,
            self.machine.memory.bytes,
        )
