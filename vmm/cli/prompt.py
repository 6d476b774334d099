"""The prompt of Ctrl-A c: the guest stands between two instructions, and answers questions about itself.

The terminal stays raw meanwhile, for one thread reads it; so a line is edited here.
"""

from __future__ import annotations

import queue
import re
import sys
from collections.abc import Callable
from enum import Enum

from vmm.cli.view import View
from vmm.errors import UsageError
from vmm.isa.disassemble import Instruction, disassemble
from vmm.isa.words import CR0, CR4, EFlags
from vmm.machine.machine import Outcome
from vmm.vm import Result, VirtualMachine

PROMPT = b"(vmm) "
LEFT = Outcome("left", 0, "left at the prompt")
HELP = """\
info registers     the guest's registers, and the instruction that comes next
info exits         exits by reason, so far
info memory        RAM, paging, where code and stack lie
info mode          how the guest is run, and how far it is
info devices       the interrupt controllers, and who answers at which ports
backtrace          EIP and its callers, of code that keeps frame pointers in EBP
x /NF ADDRESS      N units at a linear address (or $REGISTER); F is b, h or w (1, 2 or 4 bytes) or i (instructions)
step [N]           execute N instructions
sendkey KEYS       press keys of the PC's keyboard together, such as ctrl-alt-delete or f1
type TEXT          type on the PC's keyboard, and ENTER
cont               let the guest go on (also Ctrl-A c)
quit               end the run (also Ctrl-A x)
"""
MOST_UNITS = 4096
LONGEST = 15  # bytes of an instruction
PER_LINE = {1: 16, 2: 8, 4: 4}  # units by their size
UNITS = {"b": 1, "h": 2, "w": 4, "x": 4}
STEP_SECONDS = 2.0  # of wall time that a step may take: a guest that sleeps would take for ever
_EXAMINE = re.compile(r"x\s*(?:/(?P<count>\d*)x?(?P<unit>[bhwxi]?)\s)?\s*(?P<address>\S+)")


class Wish(Enum):
    """What is wanted of the prompt, other than by typing."""

    GO_ON = "cont"
    END = "quit"


class _Wrong(Exception):
    """A command that cannot be done; the line that says why."""


class Prompt:
    """`say` writes to the terminal; `on_leave` gets what was typed after the line that ended the prompt."""

    def __init__(
        self, vm: VirtualMachine, say: Callable[[bytes], None], on_leave: Callable[[bytes], None]
    ) -> None:
        self._vm, self._say, self._on_leave = vm, say, on_leave
        self._keys: queue.SimpleQueue[bytes | Wish] = queue.SimpleQueue()
        self._rest = b""
        self._ended: Outcome | None = None
        self._view = View(vm)

    def typed(self, data: bytes) -> None:
        """From another thread: keys for the prompt."""
        self._keys.put(data)

    def go_on(self) -> None:
        """From another thread: as if `cont` were typed, whatever is on the line."""
        self._keys.put(Wish.GO_ON)

    def give_up(self) -> None:
        """From another thread: whoever is asked will not answer any more."""
        self._keys.put(Wish.END)

    def ask(self, result: Result) -> Outcome | None:
        """Commands, until the guest is to go on (None), or the run has come to an end. `result` is the run so far."""
        self._ended = None
        self._view = View(self._vm)
        self._say(b"\n")
        self._where()
        while self._ended is None:
            line = self._line()
            if line is None:
                return LEFT
            words = line.split()
            if not words:
                continue
            command = words[0]
            if len(words) == 1 and len(command) <= 4 and "cont".startswith(command):
                self._leave()
                return None
            if len(words) == 1 and "quit".startswith(command):
                return LEFT
            try:
                self._do(words, line.strip(), result)
            except _Wrong as wrong:
                self._tell(str(wrong))
        return self._ended

    def _leave(self) -> None:
        rest = self._rest
        while not self._keys.empty():
            keys = self._keys.get()
            rest += keys if isinstance(keys, bytes) else b""
        self._rest = b""
        self._on_leave(rest)

    # A line

    def _line(self) -> str | None:
        """One line, edited; None if nobody answers any more."""
        text = ""
        self._say(PROMPT)
        while True:
            data = self._rest or self._keys.get()
            self._rest = b""
            if data is Wish.END:
                return None
            if isinstance(data, Wish):
                self._say(b"\b \b" * len(text) + b"cont\n")
                return "cont"
            for at, byte in enumerate(data):
                if byte in b"\r\n":
                    self._say(b"\n")
                    self._rest = data[at + 1 :]
                    return text
                if byte in b"\x7f\x08":
                    if text:
                        text = text[:-1]
                        self._say(b"\b \b")
                elif byte in b"\x15\x03":  # Ctrl-U, Ctrl-C
                    self._say(b"\b \b" * len(text))
                    text = ""
                elif 32 <= byte < 127:
                    text += chr(byte)
                    self._say(bytes((byte,)))

    def _tell(self, text: str) -> None:
        self._say(text.encode() + b"\n")

    # The commands

    def _do(self, words: list[str], line: str, result: Result) -> None:
        command, rest = words[0], line.partition(" ")[2]
        if "info".startswith(command) and len(words) == 2:
            for name, show in self._infos(result).items():
                if name.startswith(words[1]):
                    show()
                    return
            raise _Wrong(f"info {words[1]}: there are registers, exits, memory, mode and devices")
        if command[0] == "x" and (found := _EXAMINE.fullmatch(line)):
            self._examine(found)
        elif "backtrace".startswith(command) and len(words) == 1 or command == "bt":
            for address in self._view.frames():
                self._tell(f"{address:08x}  {self._view.name(address)}".rstrip())
        elif "step".startswith(command) and len(words) <= 2:
            self._step(words[1] if len(words) == 2 else "1")
        elif "sendkey".startswith(command) and len(words) == 2:
            self._press(words[1])
        elif "type".startswith(command) and rest:
            self._vm.type(rest + "\n")
        elif "help".startswith(command) or command == "?":
            self._say(HELP.encode())
        else:
            raise _Wrong(f"{line}: no such command; help lists them")

    def _infos(self, result: Result) -> dict[str, Callable[[], None]]:
        return {
            "registers": self._registers,
            "exits": lambda: self._exits(result),
            "memory": self._memory,
            "mem": self._memory,
            "mode": self._mode,
            "devices": self._devices,
        }

    def _registers(self) -> None:
        values = self._view.registers
        set_flags = [name for name, mask in EFlags.FIELDS.items() if values.get("eflags", 0) & mask]
        texts = [f"{name:<6} {value:08x}" for name, value in values.items()]
        for start in range(0, len(texts), 4):
            self._tell("   ".join(texts[start : start + 4]).rstrip())
        self._tell(f"flags: {' '.join(set_flags) or 'none'}")
        self._where()

    def _exits(self, result: Result) -> None:
        from vmm.cli.exits import show

        if not self._vm.machine.exits.rows:
            raise _Wrong("no exit yet")
        show(self._vm.machine.exits, result.seconds, sys.stdout if sys.stdout.isatty() else sys.stderr)

    def _memory(self) -> None:
        machine = self._vm.machine
        registers = machine.linear.source
        self._tell(f"{len(machine.memory.bytes) >> 10:,} KiB of RAM")
        if not registers.cr0 & CR0.PG:
            self._tell("paging off")
        else:
            kind = "PAE" if registers.cr4 & CR4.PAE else "32-bit"
            self._tell(f"paging on, {kind}, tables at {registers.cr3:08x}")
        for name in ("eip", "esp"):
            address = self._view.registers[name]
            physical = self._view.physical(address)
            where = "not mapped" if physical is None else f"physical {physical:08x}"
            self._tell(f"{name} {address:08x}: {where}")

    def _mode(self) -> None:
        vm = self._vm
        clock = "instructions" if vm.machine.clock.exact else "host"
        self._tell(f"{vm.mode.name}: {vm.mode.summary}")
        asleep = ", asleep in HLT" if vm.machine.run_state.asleep else ""
        self._tell(f"guest CPL {self._view.registers['cs'] & 3} by CS's RPL{asleep}")
        self._tell(
            f"{vm.machine.retired():,} instructions, {vm.machine.now() / 1e9:.3f} s of guest time; clock {clock}"
        )

    def _devices(self) -> None:
        devices, bus = self._vm.machine.devices, self._vm.machine.bus
        pics = devices.pics.state
        for name, chip, first in (("master", pics.master, 0), ("slave", pics.slave, 8)):
            masks = {"request": chip.irr, "in service": chip.isr, "open": ~chip.imr & 0xFF}
            texts = [f"{what} {_lines(mask, first) or 'none'}" for what, mask in masks.items()]
            self._tell(f"{name} PIC, vectors from {chip.base:#x}: {'; '.join(texts)}")
        for ports in bus.ranges():
            self._tell(f"{ports.start:04x}-{ports.stop - 1:04x}  {bus.owner(ports.start)}")

    def _press(self, names: str) -> None:
        try:
            self._vm.press(names)
        except UsageError as error:
            raise _Wrong(str(error)) from None

    def _where(self) -> None:
        eip = self._view.registers["eip"]
        name = self._view.name(eip)
        code = disassemble(self._view.read(eip, LONGEST), eip, 1)
        asleep = "   (asleep in HLT before it)" if self._vm.machine.run_state.asleep else ""
        self._tell(f"{eip:08x}  {f'{name}: ' if name else ''}{code[0] if code else '(bad)'}{asleep}")

    def _step(self, count: str) -> None:
        if not count.isascii() or not count.isdigit() or not 0 < int(count) <= 10**12:
            raise _Wrong(f"step {count}: not a number of instructions")
        before = self._vm.machine.retired()
        outcome = self._vm.run(before + int(count), STEP_SECONDS).outcome
        done = self._vm.machine.retired() - before
        self._view = View(self._vm)
        if outcome.kind == "timeout":
            self._tell(f"only {done:,} in {STEP_SECONDS:g} s")
        elif outcome.kind != "budget":
            self._ended = outcome
            return
        self._where()

    def _examine(self, found: re.Match[str]) -> None:
        count = int(found["count"] or 1)
        if not 0 < count <= MOST_UNITS:
            raise _Wrong(f"x /{count}: between 1 and {MOST_UNITS}")
        address = self._address(found["address"])
        if found["unit"] == "i":
            code = self._read(address, LONGEST * count)
            for number, instruction in enumerate(disassemble(code, address, count)):
                self._instruction(instruction, first=not number)
            return
        size = UNITS[found["unit"] or "w"]
        per_line = PER_LINE[size]
        for start in range(0, count, per_line):
            at = address + start * size & 0xFFFFFFFF
            wanted = min(per_line, count - start) * size
            data = self._read(at, wanted)
            units = [data[i : i + size][::-1].hex() for i in range(0, len(data) // size * size, size)]
            self._tell(f"{at:08x}: {' '.join(units)}")
            if len(data) < wanted:
                end = at + len(data) & 0xFFFFFFFF
                raise _Wrong(f"{end:08x}: {self._nothing(end)}")

    def _instruction(self, instruction: Instruction, first: bool) -> None:
        name = self._view.name(instruction.address)
        if name and (first or "+" not in name):
            self._tell(f"{name}:")
        self._tell(f"{instruction.address:08x}  {instruction.bytes.hex(' '):<30}  {instruction}")

    def _read(self, address: int, size: int) -> bytes:
        """As much as there is; at least a byte."""
        data = self._view.read(address, size)
        if not data:
            raise _Wrong(f"{address:08x}: {self._nothing(address)}")
        return data

    def _nothing(self, address: int) -> str:
        return "not mapped" if self._view.physical(address) is None else "a device, which is not read"

    def _address(self, text: str) -> int:
        values = self._view.registers
        if text.startswith("$"):
            if text[1:] not in values:
                raise _Wrong(f"{text}: no such register: there are {', '.join(values)}")
            return values[text[1:]]
        try:
            address = int(text, 0)
        except ValueError:
            address = -1
        if not 0 <= address < 1 << 32:
            raise _Wrong(f"{text}: not an address: give a number below 4 GiB, such as 0x100000, or $eip")
        return address


def _lines(mask: int, first: int) -> str:
    return " ".join(f"IRQ{first + line}" for line in range(8) if mask >> line & 1)
