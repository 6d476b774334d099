"""The terminal's keys: raw mode while a guest has them, and Ctrl-A to speak to us instead.

The hard part is that the terminal must be as it was, whatever happens: at the end of the context, when the process is
stopped and goes on (`suspend`, `resume`), and before it dies of a signal (`restore`). Only what nobody can catch
(SIGKILL) leaves it raw.

The thread that reads does nothing that may wait: whoever it calls returns at once, or Ctrl-A x would not be heard.
"""

from __future__ import annotations

import contextlib
import os
import select
import termios
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Literal

ESCAPE = b"\x01"  # Ctrl-A
Command = Literal["leave", "pause", "help"]
COMMANDS: dict[int, Command] = {
    ord("x"): "leave", ord("c"): "pause", ord("h"): "help", ord("?"): "help"
}  # fmt: skip
HELP = """\
Ctrl-A h       this help
Ctrl-A x       leave
Ctrl-A c       stop the guest and ask for commands
Ctrl-A a       send Ctrl-A to the guest (also Ctrl-A Ctrl-A)
"""


Attributes = list[int | list[bytes | int]]  # as `termios` has them


def raw(attributes: Attributes) -> Attributes:
    """Each key at once, unchanged, and no echo. What is written to the terminal is treated as before."""
    iflag, oflag, cflag, lflag, *speeds, characters = attributes
    assert isinstance(iflag, int) and isinstance(cflag, int) and isinstance(lflag, int)
    assert isinstance(characters, list)
    iflag &= ~(
        termios.IGNBRK | termios.BRKINT | termios.PARMRK | termios.ISTRIP
        | termios.INLCR | termios.IGNCR | termios.ICRNL | termios.IXON
    )  # fmt: skip
    cflag = cflag & ~(termios.CSIZE | termios.PARENB) | termios.CS8
    lflag &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
    keys = list(characters)
    keys[termios.VMIN], keys[termios.VTIME] = 1, 0
    return [iflag, oflag, cflag, lflag, *speeds, keys]


class Escapes:
    """Tells what is typed for the guest from what is typed for us."""

    def __init__(self) -> None:
        self._escaped = False

    def feed(self, data: bytes) -> Iterator[bytes | Command]:
        """Bytes for the guest and commands, in order; Ctrl-A with a key that means nothing is dropped."""
        while data:
            if self._escaped:
                self._escaped = False
                key, data = data[0], data[1:]
                if key in COMMANDS:
                    yield COMMANDS[key]
                elif key in ESCAPE + b"a":
                    yield ESCAPE
                continue
            plain, escape, data = data.partition(ESCAPE)
            if plain:
                yield plain
            self._escaped = bool(escape)


class Keyboard:
    """Within this context the terminal `descriptor` is raw, and a thread reads it.

    `on_keys` gets what is for the guest, `on_command` a command, `on_gone` tells that nobody is there any more; all
    are called in the reading thread. What goes wrong there is raised at the end of the context.
    """

    def __init__(
        self,
        descriptor: int,
        on_keys: Callable[[bytes], None],
        on_command: Callable[[Command], None],
        on_gone: Callable[[], None],
    ) -> None:
        self._descriptor = descriptor
        self._on_keys, self._on_command, self._on_gone = on_keys, on_command, on_gone
        self._before: Attributes = []  # the terminal's mode, as we found it, ...
        self._raw: Attributes = []  # ... and as we have made it
        self._lock = threading.Lock()
        self._entered = self._over = False
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._attend, name="keyboard", daemon=True)

    def __enter__(self) -> None:
        self._wake, self._waker = os.pipe()
        self._entered = True
        self.resume()
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()
        self._over = True
        os.write(self._waker, b"!")
        self._thread.join()
        os.close(self._wake)
        os.close(self._waker)
        if self._failure is not None and error is None:
            raise self._failure

    # The terminal's mode; each may be called from any thread, at any time

    def restore(self) -> None:
        """The terminal as it was, for good."""
        with self._lock:
            self._give_back()
            self._entered = False

    def suspend(self) -> None:
        """The terminal as it was, for the time being."""
        with self._lock:
            self._give_back()

    def resume(self) -> None:
        """Raw, until it is given back. What somebody else has made of the terminal meanwhile is how it was before."""
        with self._lock, contextlib.suppress(termios.error):  # it may be gone
            if not self._entered:
                return
            now = termios.tcgetattr(self._descriptor)
            if now != self._raw:
                self._before = now
            self._set(raw(self._before))
            self._raw = termios.tcgetattr(self._descriptor)

    def _give_back(self) -> None:
        with contextlib.suppress(termios.error):
            if self._entered:
                self._set(self._before)

    def _set(self, attributes: Attributes) -> None:
        # At once: what has been typed ahead stays, and a terminal that takes no output does not keep us.
        termios.tcsetattr(self._descriptor, termios.TCSANOW, attributes)

    # The keys

    def _attend(self) -> None:
        escapes = Escapes()
        try:
            while data := self._read():
                for what in escapes.feed(data):
                    if isinstance(what, bytes):
                        self._on_keys(what)
                    else:
                        self._on_command(what)
        except Exception as failure:
            self._failure = failure  # a bug of ours; a raw terminal that nobody reads would be the user's prison
        if not self._over:
            self._on_gone()

    def _read(self) -> bytes:
        """What has been typed; nothing if the terminal has hung up, or the context ends."""
        while True:
            ready, _, _ = select.select((self._descriptor, self._wake), (), ())
            if self._wake in ready:
                return b""
            try:
                return os.read(self._descriptor, 1 << 12)
            except BlockingIOError:
                continue
            except OSError:  # how Linux tells that the other side has hung up
                return b""
