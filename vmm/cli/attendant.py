"""Whoever sits at the terminal: keys for the guest or for the prompt, and commands of Ctrl-A.

The hard part is that three threads have a part in it: the loop's, the one that reads the keyboard, and the one that
waits for signals. Only the first touches the machine; the keyboard's leaves errands for it and must never wait, so a
courier, which may, pokes the loop.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType

from vmm.cli.interrupts import HUNG_UP
from vmm.cli.keyboard import HELP, Command
from vmm.cli.prompt import Prompt
from vmm.cli.session import PAUSED, Session
from vmm.machine.machine import Outcome
from vmm.vm import VirtualMachine

INPUT_LIMIT = 64 << 10  # bytes typed and not taken by the guest; what comes after is lost, as on a real line
LEFT = Outcome("left", 0, "left by Ctrl-A x")


class Attendant:
    """Within this context the run has somebody to wait for.

    `say` writes to the terminal, `kill` ends the process at once.
    """

    def __init__(
        self, session: Session, vm: VirtualMachine, say: Callable[[bytes], None], kill: Callable[[], None]
    ) -> None:
        self._session, self._vm, self._say, self._kill = session, vm, say, kill
        self._lock = threading.Lock()
        self._typed = bytearray()  # for the guest, not delivered
        self._prompting = False  # keys are for the prompt
        self._leaving = False
        self._prompt = session.prompt = Prompt(vm, say, self._go_on)
        self._word, self._over = threading.Semaphore(0), False
        self._courier = threading.Thread(target=self._carry, name="courier", daemon=True)

    def __enter__(self) -> None:
        self._vm.machine.run_state.attended = True
        self._courier.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over = True
        self._word.release()
        self._courier.join()

    # What the keyboard's thread calls

    def keys(self, data: bytes) -> None:
        with self._lock:
            if self._prompting:
                self._prompt.typed(data)
                return
            waits = bool(self._typed)
            self._typed += data[: INPUT_LIMIT - len(self._typed)]
        if not waits:
            self._send(self._deliver)

    def command(self, command: Command) -> None:
        if command == "leave":
            if self._leaving:
                self._kill()  # nobody has heard the first
            self._leaving = True
            self._session.ask(LEFT)
            self._word.release()
        elif command == "help":
            self._send(lambda: self._say(HELP.encode()))
        else:
            with self._lock:
                back, self._prompting = self._prompting, True
            if back:
                self._prompt.go_on()
            else:
                self._session.ask(PAUSED)
                self._word.release()

    def gone(self) -> None:
        threading.Thread(target=self._session.stop, args=(HUNG_UP,), name="stop", daemon=True).start()

    # In the loop

    def _deliver(self) -> None:
        with self._lock:
            data = bytes(self._typed)
            self._typed.clear()
        room = INPUT_LIMIT - self._vm.machine.devices.uart.backlog()
        if room > 0:
            self._vm.send(data[:room])

    def _go_on(self, rest: bytes) -> None:
        """The prompt is left; `rest` was typed after that."""
        with self._lock:
            self._prompting = False
        if rest:
            self._vm.send(rest)

    # The courier

    def _send(self, errand: Callable[[], None]) -> None:
        self._vm.machine.run_state.errands.append(errand)
        self._word.release()

    def _carry(self) -> None:
        while True:
            self._word.acquire()
            if self._over:
                return
            self._vm.poke("tick")
