"""`run`: a guest in a mode. Its console to standard output as it comes, what came of it to standard error."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, get_args

from vmm.cli import values
from vmm.cli.builds import image_for
from vmm.cli.guest import check_distinct, memory_of, open_output
from vmm.cli.interactive import attend, wants_terminal
from vmm.cli.interrupts import HUNG_UP, Interrupts
from vmm.cli.main import say
from vmm.cli.screen import Screen
from vmm.cli.session import Session
from vmm.cli.status import UNSEEN, of_outcome
from vmm.errors import Interrupted, OutputError, UsageError
from vmm.expect import Expect, shown
from vmm.machine.control import Control
from vmm.machine.devices.disk import FileDisk
from vmm.machine.machine import Machine, Outcome
from vmm.vm import (
    CONSOLE_LIMIT,
    MODES,
    PARAVIRT,
    MemoryVirtualization,
    Result,
    VirtualMachine,
    check_model,
    check_paravirt,
    hardware,
)

if TYPE_CHECKING:
    from vmm.attribution import Attribution

CLOCKS = ("instructions", "host")


def run(options: argparse.Namespace) -> int:
    """The command; returns the exit status."""
    mode = values.mode(options.mode, MODES)
    interactive = wants_terminal(options)
    if options.clock is None:
        options.clock = "host" if interactive else "instructions"
    if options.clock not in CLOCKS:
        raise UsageError(f"clock {options.clock!r} does not exist: choose {' or '.join(CLOCKS)}")
    attach = attach_of(options, mode)
    paravirt = None if options.paravirt is None else values.paravirt(options.paravirt, PARAVIRT)
    check_paravirt(paravirt, mode)
    model = values.model(options.machine)
    check_model(model, mode)
    memory = memory_of(options)
    limit = options.max_instructions and values.count("--max-instructions", options.max_instructions)
    timeout = options.timeout and values.seconds("--timeout", options.timeout)
    if options.dump_translations is not None and mode != "bt":
        raise UsageError(
            f"--dump-translations {options.dump_translations}: {mode} translates nothing: use --mode bt"
        )
    outputs = {
        "--report": options.report,
        "--trace": options.trace,
        "--dump-translations": options.dump_translations,
    }
    disk_file = None if options.disk is None else values.disk(options.disk)
    check_distinct(options, outputs)
    console_input = values.input_bytes(options.input)
    steps, until = values.script(options.script), values.until(options.until)
    image = image_for(options, memory, mode)
    disk = None if disk_file is None else FileDisk(*disk_file)
    report = None if options.report is None else open_output("--report", options.report)
    trace = None
    if options.trace is not None:
        from vmm.cli.trace import Trace

        trace = Trace(options.trace, options.guest, mode, options.clock, memory)
    translations = None
    if options.dump_translations is not None:
        from vmm.cli.translations import Translations

        translations = Translations(options.dump_translations, options.guest)

    def give_up() -> None:
        vm.machine.end(Outcome("error", 0, "the output cannot be written"))

    screen = Screen(give_up)
    vm = VirtualMachine(
        image,
        mode,
        memory=memory,
        clock=options.clock,
        show=screen.write,
        console_input=console_input,
        attach=attach,
        disk=disk,
        paravirt=paravirt,
        model=model,
        listeners=() if trace is None else (trace.listener(give_up),),
    )
    if translations is not None:
        translations.watch(vm, give_up)
    attribution = None
    if options.explain:
        from vmm.attribution import Attribution

        attribution = Attribution(vm.machine)
    session = Session(vm, steps, until, limit, timeout)
    with ExitStack() as stack:
        if interactive:
            attend(stack, session, vm, screen)
        else:
            stack.enter_context(Interrupts(session.stop, screen.stop_progress))
            started = time.monotonic()
            screen.start_progress(lambda: _progress(vm, time.monotonic() - started))
        start_seconds = process_age()
        try:
            result = session.run()
        finally:
            screen.stop_progress()
        outcome = result.outcome
        hung_up = outcome.detail == HUNG_UP or screen.failed is not None and screen.failed.errno == errno.EIO
        if hung_up:  # which whoever started us may yet say, too, while what came of the run is written
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
    code = of_outcome(outcome.kind, outcome.status)
    if session.unseen is not None and outcome.kind != "interrupted":
        code = UNSEEN
    if options.vga:
        from vmm.cli import vga

        vga.show(vm, screen)
    if trace is not None:
        trace.close(result, code)
    if translations is not None:
        translations.close(vm)
    if disk is not None:
        disk.close()
        if disk.trouble:
            say(f"disk {disk.trouble}")
    if report is not None:
        from vmm.cli.report import write

        write(report, options.report, options, vm, result, code, start_seconds)
    if hung_up:
        raise Interrupted(f"{options.guest}, {result.mode}: {HUNG_UP}")
    if isinstance(screen.failed, BrokenPipeError):
        return OutputError.status  # whoever read it has seen enough
    if screen.failed is not None:
        raise OutputError(f"standard output: {screen.failed.strerror}")
    if trace is not None and trace.failed is not None:
        raise OutputError(f"--trace {options.trace}: {trace.failed.strerror}")
    if translations is not None and translations.failed is not None:
        raise OutputError(f"--dump-translations {options.dump_translations}: {translations.failed.strerror}")
    _tell(options.guest, result, code, screen, vm, attribution, session.unseen)
    if not options.vga:
        _tell_of_screen(vm)
    return code


def attach_of(options: argparse.Namespace, mode: str) -> Callable[[Machine], Control] | None:
    """What `--intercept` and `--memory-virtualization` make of the mode."""
    asked = {"--intercept": options.intercept, "--memory-virtualization": options.memory_virtualization}
    given = [name for name, value in asked.items() if value is not None]
    if not given:
        return None
    if mode != "hvm":
        raise UsageError(f"{given[0]} {asked[given[0]]}: {mode} has no such thing: use --mode hvm")
    how = options.memory_virtualization or "nested"
    for known in get_args(MemoryVirtualization):
        if how == known:
            return hardware(options.intercept or "", known)
    raise UsageError(f"--memory-virtualization {how}: choose nested or shadow")


def process_age() -> float:
    """Seconds since this process started; to about 10 ms, the grain in which Linux notes the start."""
    try:
        with open("/proc/self/stat", "rb") as file:
            ticks = int(file.read().rpartition(b")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return time.process_time()  # not Linux: what the processor has spent on us


def _tell(
    guest: str,
    result: Result,
    code: int,
    screen: Screen,
    vm: VirtualMachine,
    attribution: Attribution | None,
    unseen: Expect | None,
) -> None:
    """The exit table, where the exits came from if that is wanted, and one line of what happened."""
    if sys.stderr is None:
        return
    if not screen.at_line_start and os.isatty(sys.stdout.fileno()):
        print(file=sys.stderr)
    if result.exits.rows:
        from vmm.cli.exits import show

        show(result.exits, result.seconds)
    if attribution is not None:
        from vmm.cli.explain import show as explain

        explain(attribution, vm)
    written = vm.console.total
    outcome = result.outcome
    said = outcome.detail.startswith(outcome.kind.replace("-", " "))
    end = outcome.detail if said else f"{outcome.kind}: {outcome.detail}"
    if outcome.kind == "exit":
        end = f"exit by {outcome.detail}"
    if written > CONSOLE_LIMIT:
        say(f"the first {CONSOLE_LIMIT >> 20}M of {written} bytes of console are kept for the report")
    if outcome.kind == "unseen" and unseen is not None:
        end = f"{unseen.where}: {outcome.detail}"
    elif unseen is not None:
        end += f"; {unseen.where}: {shown(unseen.text)} was not seen"
    took = f"{result.seconds:.3f} s"
    if result.counted:
        took = f"{result.instructions:,} instructions in {took}"
    say(f"{guest}, {result.mode}: {end}; status {code}; {took}")


def _tell_of_screen(vm: VirtualMachine) -> None:
    """Where the guest said nothing but on its screen, that it did: a kernel that cannot unpack itself, for one."""
    if vm.console.total:
        return
    from vmm.cli.vga import last_lines

    lines = last_lines(vm, 2)
    if lines:
        say(f"it said nothing on its serial port; its screen, which --vga shows, ends with: {' / '.join(lines)}")


def _progress(vm: VirtualMachine, seconds: float) -> str:
    if not vm.machine.run_state.counted:
        return f"{seconds:.0f} s"
    return f"{vm.instructions():,} instructions, {seconds:.0f} s"
