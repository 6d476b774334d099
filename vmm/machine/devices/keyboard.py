"""A PS/2 keyboard: what it answers to its host, and the keys that somebody types.

The hard part is whose turn it is. A command silences what has not been sent, its answer comes first, and a
second byte may belong to the command before; typed keys wait, a whole stroke at a time, until all before them
has been taken. There is no repeat: a key goes up as soon as it has gone down.

Source: IBM PS/2 technical reference, keyboards: commands to and from the system.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vmm.machine.devices.scancodes import RELEASED, RELEASED_BIT, keys, stroke, to_set_1

ACKNOWLEDGE, PASSED, RESEND, ECHO = 0xFA, 0xAA, 0xFE, 0xEE
IDENTITY = (0xAB, 0x83)
SET_LEDS, CODE_SET, IDENTIFY, SET_RATE, ENABLE, DISABLE, DEFAULTS = 0xED, 0xF0, 0xF2, 0xF3, 0xF4, 0xF5, 0xF6
KEY_TYPES, RESET = range(0xF7, 0xFE), 0xFF
WITH_KEY = (0xFB, 0xFC, 0xFD)  # of KEY_TYPES, those that a key's code follows
SETS = (1, 2)
SLOWEST_BUT_SOME = 0x2B  # 10.9 a second after half a second


@dataclass
class KeyboardState:
    sending: list[int] = field(default_factory=list)  # oldest first
    last: int = 0  # what was sent last, should it be asked for again
    typed: list[tuple[int, ...]] = field(default_factory=list)  # keys to be pressed together, by their codes in set 2
    scanning: bool = True
    code_set: int = 2
    leds: int = 0
    rate: int = SLOWEST_BUT_SOME
    command: int = 0  # one that waits for its second byte; 0: none


class Keyboard:
    """Takes bytes by `write`, gives bytes by `take`; `receive` is the person in front of it."""

    def __init__(self) -> None:
        self.state = KeyboardState()

    def reset(self) -> None:
        """As at power-on, but for what is still to be typed."""
        self.state = KeyboardState(typed=self.state.typed)

    def receive(self, data: bytes) -> None:
        """Type ASCII text, of any length; a byte that no key types is left out."""
        self.state.typed += [down for byte in data if (down := keys(byte))]

    def press(self, down: tuple[int, ...]) -> None:
        """Press these keys together, and let go of them; by their codes in set 2."""
        self.state.typed.append(down)

    def take(self) -> int | None:
        """The next byte for the host; None: there is none."""
        state = self.state
        while not state.sending:
            if not (state.typed and state.scanning) or state.command:
                return None
            codes = stroke(state.typed.pop(0))
            state.sending += codes if state.code_set == 2 else in_set_1(codes)
        state.last = state.sending.pop(0)
        return state.last

    def write(self, byte: int) -> None:
        """A command, or the second byte of one."""
        state = self.state
        waiting, state.command = state.command, 0
        if byte == RESEND:
            state.sending.insert(0, state.last)
        elif byte == ECHO:
            state.sending = [ECHO]
        elif waiting and byte < SET_LEDS:
            self._argument(waiting, byte)
        else:
            self._command(byte)

    def _command(self, byte: int) -> None:
        state = self.state
        state.sending = [ACKNOWLEDGE]
        match byte:
            case 0xED | 0xF0 | 0xF3 | 0xFB | 0xFC | 0xFD:
                state.command = byte
            case 0xF2:
                state.sending += IDENTITY
            case 0xF4:
                state.scanning = True
            case 0xF5 | 0xF6:
                self._defaults(byte == DEFAULTS)
            case 0xFF:
                self._defaults(True)
                state.leds = 0
                state.sending += [PASSED]
            case _ if byte not in KEY_TYPES:
                state.sending = [RESEND]

    def _defaults(self, scanning: bool) -> None:
        state = self.state
        state.code_set, state.rate, state.scanning = 2, SLOWEST_BUT_SOME, scanning

    def _argument(self, command: int, byte: int) -> None:
        state = self.state
        state.sending = [ACKNOWLEDGE]
        if command == SET_LEDS:
            state.leds = byte & 7
        elif command == SET_RATE:
            state.rate = byte & 0x7F
        elif command == CODE_SET and byte == 0:
            state.sending += [state.code_set]
        elif command == CODE_SET and byte in SETS:
            state.code_set = byte
        elif command == CODE_SET:
            state.sending = [RESEND]


def in_set_1(codes: list[int]) -> list[int]:
    """Strokes of set 2 as the same ones in set 1, by the controller's rule."""
    found, released = [], 0
    for code in codes:
        if code == RELEASED:
            released = RELEASED_BIT
        else:
            found.append(to_set_1(code) | released)
            released = 0
    return found
