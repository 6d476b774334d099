"""A random guest as a value, which Hypothesis or a delta-debugger can make smaller, and as an image.

Nothing in the value depends on the rest: any subset of atoms, chunks and handlers is a guest, too.
"""

from __future__ import annotations

import functools
import random
import re
import struct
from dataclasses import dataclass

from hypothesis import strategies as st

from tests.equivalence import layout as at
from tests.equivalence.atoms_memory import PAGING, PORTS, TIMED
from tests.equivalence.atoms_plain import PLAIN, Atom
from tests.equivalence.atoms_system import SENSITIVE, image
from tests.equivalence.atoms_transfer import TRANSFER
from tests.equivalence.encode import encode
from tests.equivalence.kernel import descriptors, gate, skeleton
from tests.program_atoms import Salt, Step
from vmm.image.image import Image, Segment
from vmm.isa.descriptors import SystemType

ATOMS: dict[str, Atom] = {**PLAIN, **SENSITIVE, **TRANSFER, **PORTS, **PAGING, **TIMED}
UNTIMED = (*PLAIN, *SENSITIVE, *TRANSFER, *PORTS)  # what is the same on any machine, without page tables
SALT = 1 << 64
PERIODS = (0, 2, 3, 7, 40)  # pulses of the timer's clock, 84 instructions each; 0: no timer
MEMORY = 16 << 20
_FILL = b"\xcd\x40"  # INT `END`: where a guest that goes wild arrives
_END = "int END"


@dataclass(frozen=True)
class Chunk:
    """Atoms, the ring that they begin in, and a number for flags and registers."""

    steps: tuple[Step, ...]
    user: bool = False
    salt: int = 0


@dataclass(frozen=True)
class Handler:
    """What a service or the timer does besides its record; `salt` chooses the gate."""

    steps: tuple[Step, ...]
    open: bool = False  # interrupts on inside
    salt: int = 0


@dataclass(frozen=True)
class Guest:
    """A whole guest. `pages` chooses page tables; None is no paging."""

    chunks: tuple[Chunk, ...]
    services: tuple[Handler, ...] = ()
    timer: Handler | None = None
    period: int = 0
    rounds: int = 1
    pages: int | None = None
    origin: int = 0  # bytes before the first atom: what lies across the border of two pages
    dump: bool = False  # at the end write memory to the debug console

    def parts(self) -> list[tuple[Step, ...]]:
        """The atoms of each chunk and handler."""
        handlers = (*self.services, *((self.timer,) if self.timer is not None else ()))
        return [chunk.steps for chunk in self.chunks] + [handler.steps for handler in handlers]

    def listing(self) -> list[tuple[str, list[tuple[int, str, bytes]]]]:
        """(title, [(address, text, bytes)]) of each chunk and handler, as it lies in memory."""
        parts = [
            (f"chunk {i}, ring {3 if c.user else 0}", [*map(_text, c.steps)], "", _END)
            for i, c in enumerate(self.chunks)
        ]
        handlers = [(at.SERVICES[i], handler) for i, handler in enumerate(self.services)]
        if self.timer is not None:
            handlers.append((at.TIMER, self.timer))
        for vector, handler in handlers:
            steps = [*map(_text, handler.steps)]
            parts.append(
                (
                    f"handler of vector {vector:#x}",
                    steps,
                    _prologue(vector, handler),
                    "jmp [ss:leave_pointer]",
                )
            )
        address = at.BODY + self.origin
        listing = []
        for title, steps, head, tail in parts:
            rows = []
            for text in (head, *steps, tail):
                code = encode(text, address) if text else b""
                rows.append((address, text, code))
                address += len(code)
            listing.append((title, rows))
        return listing

    def segments(self) -> dict[int, bytes]:
        """Bytes by physical address."""
        listing = self.listing()
        body, starts, entries = bytearray(_FILL * (at.JIT + 0x2000 - at.BODY >> 1)), [], []
        for _, rows in listing:
            entries.append(rows[0][0])
            for address, _, code in rows:
                body[address - at.BODY : address - at.BODY + len(code)] = code
            starts += [address for address, _, _ in rows[1:]]
        assert starts[-1] < at.BODY_END and len(starts) < 2048
        services = dict(zip([at.SERVICES[i] for i in range(len(self.services))], self.services, strict=True))
        idt = {
            vector: _gate(entry, handler.salt)
            for (vector, handler), entry in zip(services.items(), entries[len(self.chunks) :], strict=False)
        }
        if self.timer is not None:
            kind = SystemType.TRAP_GATE32 if self.timer.salt & 1 else SystemType.INTERRUPT_GATE32
            idt[at.TIMER] = gate(entries[-1], kind=kind, dpl=0)
        tables = descriptors(idt)
        windows = self._windows()
        segments = {
            at.KERNEL: skeleton().data,
            at.GDT: tables,
            at.PRISTINE: tables,
            at.VARIABLES: self._variables(len(starts)),
            at.CHUNKS: b"".join(map(_record, self.chunks, entries)),
            at.STARTS: struct.pack(f"<{len(starts)}I", *starts),
            at.BODY: bytes(body),
            at.DATA: _data(self.dump),
        }
        if self.pages is not None:
            segments |= {at.WINDOW_TABLE: windows[0], at.OTHER_WINDOW: windows[1]} | self._directories()
        return segments

    def image(self) -> Image:
        segments = (Segment(address, code, len(code)) for address, code in sorted(self.segments().items()))
        return Image("random guest", tuple(segments), skeleton().entry)

    def _windows(self) -> tuple[bytes, bytes, bytes]:
        """The window's tables in both address spaces, and the entries that page faults put there."""
        s = Salt((self.pages or 0) >> 16)
        tables = []
        for _ in range(3):
            entries = [0] * at.WINDOW_PAGES
            for page in range(at.WINDOW_PAGES - 2):
                frame = (at.DATA + 0x1000 * s.below(3), at.DATA + 0x1000 * s.below(3), at.JIT)[s.below(3)]
                entries[page] = (frame | (7, 7, 7, 5, 3, 1, 0x67)[s.below(7)]) if s.below(2) else 0
            tables.append(entries)
        tables[2] = [entry and entry & ~0x60 for entry in tables[2]]
        mine, other, demand = (struct.pack(f"<{at.WINDOW_PAGES}I", *entries) for entries in tables)
        return mine, other, demand

    def _directories(self) -> dict[int, bytes]:
        flags = self.pages or 0
        world = 0x100 if flags & _GLOBAL else 0
        entries = []
        for page in range(0, at.MAPPED, 0x1000):
            if at.KERNEL <= page < at.SYSENTER_STACK or at.PRISTINE <= page < at.BODY or page >= at.DIRECTORY:
                rights = 0x23
            else:
                rights = 0x27
            entries.append(page | (0x21 if page == at.KERNEL else rights) | world)
        directories = {at.IDENTITY: struct.pack(f"<{len(entries)}I", *entries)}
        upper = (7, 7, 7, 5, 3, 6)[flags >> 4 & 7] if flags >> 4 & 7 < 6 else 7
        for directory, window in ((at.DIRECTORY, at.WINDOW_TABLE), (at.OTHER_DIRECTORY, at.OTHER_WINDOW)):
            large = 0x87 if flags & _LARGE else 0
            directories[directory] = struct.pack(
                "<4I", at.IDENTITY | 0x27, window | upper | 0x20 * self.dump, 0, large
            )
        return directories

    def _variables(self, starts: int) -> bytes:
        flags = self.pages or 0
        cr0 = 0x11 if self.pages is None else 0x80000011 | (0x10000 if flags & _PROTECT else 0)
        cr4 = 0
        if self.pages is not None:
            cr4 = (0x10 if flags & _LARGE else 0) | (0x80 if flags & _GLOBAL else 0)
        values = dict.fromkeys(at.VARIABLE, 0) | {
            "CHUNK_COUNT": len(self.chunks), "ROUNDS": self.rounds, "LOG_AT": at.LOG, "START_COUNT": starts,
            "PORT_MASK": 0xFA if self.period else 0xFF, "PERIOD": self.period, "BOOT_CR0": cr0,
            "BOOT_CR3": at.DIRECTORY if self.pages is not None else 0, "BOOT_CR4": cr4, "DUMP": self.dump,
        }  # fmt: skip
        data = struct.pack(f"<{len(values)}I", *values.values()).ljust(0x100, b"\0")
        return data + (self._windows()[2] if self.pages is not None else b"")


_LARGE, _GLOBAL, _PROTECT = 1, 2, 4  # of `Guest.pages`: a 4 MiB page, global pages, CR0.WP


def _text(step: Step) -> str:
    return ATOMS[step.atom](Salt(step.salt))


def _prologue(vector: int, handler: Handler) -> str:
    if vector == at.TIMER:
        first = (
            "push 0; push TIMER; pushad; push ds; mov eax, KERNEL_DATA; mov ds, eax; mov ebp, esp; "
            "mov al, 0x20; out 0x20, al; "
            "inc dword [TICKS]; inc dword [TICKS_HERE]; cmp dword [TICKS_HERE], MOST_TICKS; "
            "jb .on; jmp [abandon_pointer]; "
            ".on: lea ebx, [esp + 36]; call [log_pointer]"
        )
    else:
        first = (
            f"push 0; push {vector}; pushad; push ds; mov eax, KERNEL_DATA; mov ds, eax; mov ebp, esp; "
            "lea ebx, [esp + 36]; call [log_pointer]"
        )
    return first + ("; sti" if handler.open else "")


def _gate(entry: int, salt: int) -> bytes:
    s = Salt(salt)
    kind = (SystemType.INTERRUPT_GATE32, SystemType.TRAP_GATE32)[s.below(2)]
    return gate(entry, kind=kind, dpl=(3, 3, 0)[s.below(3)])


def _record(chunk: Chunk, entry: int) -> bytes:
    s = Salt(chunk.salt)
    cs, ss, esp = (
        (at.USER_CODE, at.USER_DATA, at.USER_STACK)
        if chunk.user
        else (at.KERNEL_CODE, at.KERNEL_DATA, at.CHUNK_STACK)
    )
    return struct.pack(
        "<8I",
        entry,
        cs,
        image(s) & ~(1 << 10),
        esp - 0x40,
        ss,
        s.below(1 << 32),
        s.below(8),
        s.below(1 << 16),
    )


@functools.cache
def _data(third: bool) -> bytes:
    """A page that ends what executes it, two of noise (harmless as code for the third opinion), and one more."""
    noise = random.Random(1)
    pages = [noise.randbytes(0x400) for _ in range(2)]
    if third:
        pages = [b"".join(noise.choice((_FILL, b"\x40", b"\x4a")) for _ in page)[:0x400] for page in pages]
    return _FILL * 0x800 + b"".join(page.ljust(0x1000, b"\0") for page in pages) + _FILL * 0x800


# Guests at random.

_WEIGHTS = {
    "alu": 2,
    "move": 2,
    "popf": 3,
    "interrupt flag": 3,
    "step": 2,
    "edit page": 3,
    "string faults": 2,
    "call": 2,
}


@functools.cache
def _pool(third: bool, paged: bool) -> tuple[str, ...]:
    names = [*UNTIMED, *(PAGING if paged else ()), *(() if third else TIMED)]
    return tuple(name for name in names for _ in range(_WEIGHTS.get(name, 1)))


# What is left to the processor, or what QEMU 7.2 does otherwise than the manual: not for its opinion.
_UNLIKE = re.compile(
    r"smsw e"  # the upper half of the register is undefined
    r"|^sysexit|\b0x3ff\b"  # goes where nobody knows; QEMU is run without a serial port
    r"|@0000DEAD|@0000C0DE|@[48]0000000; mov cr[04]"  # QEMU takes any MSR, and bits of CR0 and CR4 that are #GP
    r"|fxsave|fnsave|fnstenv"  # it does not know where the last x87 instruction was
    r"|\bhlt"  # a trap does not wake it
    r"|0x2000; mov dr7"  # it does not know GD
    r"|\bSTEPS\b.*\b(ss|sti)\b|\bSTEPS\b.*@0000000[3-9]"  # TF and a shadow: no trap, or no end
)


def _for_third(step: Step) -> bool:
    return not _UNLIKE.search(_text(step))


def random_guest(r: random.Random, third: bool = False) -> Guest:
    """`third`: one that must be the same on any machine, at the end of which memory is dumped."""
    pages = r.getrandbits(400) if r.random() < 0.6 else None
    pool = _pool(third, pages is not None)

    def steps(most: int) -> tuple[Step, ...]:
        drawn = tuple(Step(r.choice(pool), r.randrange(SALT)) for _ in range(r.randrange(1, most)))
        return tuple(filter(_for_third, drawn)) if third else drawn

    def handler() -> Handler:
        return Handler(steps(6), r.random() < 0.3, r.randrange(SALT))

    period = 0 if third else r.choice(PERIODS)
    return Guest(
        tuple(Chunk(steps(12), r.random() < 0.35, r.randrange(SALT)) for _ in range(r.randrange(1, 9))),
        tuple(handler() for _ in range(r.randrange(4))),
        handler() if period and r.random() < 0.4 else None,
        period,
        r.randrange(1, 4),
        pages,
        r.choice((0, 0xF80, r.randrange(0x1000))),
        third,
    )


def _steps(pool: tuple[str, ...], most: int) -> st.SearchStrategy[tuple[Step, ...]]:
    step = st.builds(Step, st.sampled_from(pool), st.integers(0, SALT - 1))
    return st.lists(step, min_size=1, max_size=most).map(tuple)


@st.composite
def guests(draw: st.DrawFn) -> Guest:
    """Guests for Hypothesis, which prefers few chunks, few atoms, no paging and no timer."""
    pages = draw(st.none() | st.integers(0, (1 << 400) - 1))
    pool = _pool(False, pages is not None)
    salts = st.integers(0, SALT - 1)
    handlers = st.builds(Handler, _steps(pool, 4), st.booleans(), salts)
    chunks = st.lists(st.builds(Chunk, _steps(pool, 8), st.booleans(), salts), min_size=1, max_size=5)
    period = draw(st.sampled_from(PERIODS))
    return Guest(
        tuple(draw(chunks)),
        tuple(draw(st.lists(handlers, max_size=2))),
        draw(st.none() | handlers) if period else None,
        period,
        draw(st.integers(1, 3)),
        pages,
        draw(st.sampled_from((0, 0xF80, 0xFF0))),
    )


__all__ = ["ATOMS", "MEMORY", "Chunk", "Guest", "Handler", "guests", "random_guest"]
