"""Whether the terminal is the guest's serial port, and how it becomes that.

A guest that offers a shell gets the terminal by itself; a teaching guest does not, for which Ctrl-C has to be the
user's and the run repeatable.
"""

from __future__ import annotations

import argparse
import os
from contextlib import ExitStack

from vmm.cli import values
from vmm.cli.interrupts import Interrupts
from vmm.cli.main import say
from vmm.cli.screen import Screen
from vmm.cli.session import Session
from vmm.errors import Interrupted, UsageError
from vmm.image.load import is_kernel
from vmm.vm import VirtualMachine


def wants_terminal(options: argparse.Namespace) -> bool:
    """What --interactive says or, where it says nothing, what suits the guest. Raises `UsageError`."""
    if options.interactive is None:
        scripted = any(text is not None for text in (options.input, options.script, options.until))
        return not scripted and os.isatty(0) and os.isatty(1) and is_kernel(values.path(options.guest))
    if options.interactive and not os.isatty(0):
        raise UsageError("--interactive: standard input is no terminal: use --input - or --script FILE")
    if options.interactive and options.input == "-":
        raise UsageError("--input -: --interactive reads standard input itself: leave one of them out")
    return bool(options.interactive)


def attend(stack: ExitStack, session: Session, vm: VirtualMachine, screen: Screen) -> None:
    """Give the guest the terminal, until the end of `stack`."""
    from vmm.cli.attendant import Attendant
    from vmm.cli.keyboard import Keyboard

    def speak(data: bytes) -> None:
        if os.isatty(1):
            screen.write(data)
        else:
            os.write(2, data)

    def kill() -> None:
        keyboard.restore()
        os._exit(Interrupted.status)

    attendant = Attendant(session, vm, speak, kill)
    keyboard = Keyboard(0, attendant.keys, attendant.command, attendant.gone)
    # In this order: what starts threads comes after what has them leave signals alone.
    stack.enter_context(Interrupts(session.stop, keyboard.restore, keyboard))
    stack.enter_context(attendant)
    stack.enter_context(keyboard)
    whose = "the guest's" if vm.machine.clock.exact else "the guest's, time the host's"
    say(f"the terminal is {whose}: Ctrl-A x leaves, Ctrl-A h helps")
