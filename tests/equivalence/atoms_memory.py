"""Atoms of devices and of page tables.

An entry of the window's tables is changed and flushed with interrupts off, because what happens between is not
defined; what was not present needs no flush. `TIMED` atoms depend on guest time, which is exact between modes but
not between machines.
"""

from __future__ import annotations

from tests.equivalence import layout as at
from tests.equivalence.atoms_plain import Atom, pick, place, string, window
from tests.equivalence.atoms_system import SLEEP, kernel_only
from tests.equivalence.encode import number
from tests.program_atoms import Salt

# Ports and devices.


def _port(s: Salt) -> str:
    return pick(
        s,
        "mov al, 0x2a; out 0xe9, al",
        "in al, 0xe9",
        "in eax, 0x80",
        "out 0x80, al",
        "in al, 0x21",
        "in al, 0xa1",
        "mov dx, 0x70; mov al, 0x8f; out dx, al",
        "mov dx, 0xe9; mov al, 0x21; out dx, al",
        "mov dx, 0x3ff; in al, dx; out dx, al; in al, dx",
        "mov dx, 0x1234; in al, dx",
        f"mov edx, 0xe9; mov esi, {place(s)}; mov ecx, {number(s.below(5))}; {pick(s, '', 'rep ')}outsb",
        f"mov edx, 0xe9; mov edi, {place(s)}; mov ecx, {number(s.below(5))}; {pick(s, '', 'rep ')}insb",
    )


def _controller(s: Salt) -> str:
    """The interrupt controller: masks, requests, a poll, another set-up with the same vectors."""
    return pick(
        s,
        "mov al, 0xff; out 0x21, al; nop; mov al, [PORT_MASK]; out 0x21, al",
        "mov al, 0x0a; out 0x20, al; in al, 0x20",
        "mov al, 0x0b; out 0x20, al; in al, 0x20",
        "mov al, 0x20; out 0x20, al",
        "cli; mov al, 0x11; out 0x20, al; mov al, TIMER; out 0x21, al; "
        "mov al, 4; out 0x21, al; mov al, 3; out 0x21, al; "
        "mov al, [PORT_MASK]; out 0x21, al",
        "mov al, 0x60; out 0x20, al",
        "mov al, 0xc0; out 0x20, al; mov al, 0xc7; out 0x20, al",
    )


def _timer(s: Salt) -> str:
    period = (3, 5, 17, 60)[s.below(4)]
    return pick(
        s,
        f"mov al, 0x34; out 0x43, al; mov al, {period}; out 0x40, al; xor eax, eax; out 0x40, al",
        f"mov al, 0x30; out 0x43, al; mov al, {period}; out 0x40, al; xor eax, eax; out 0x40, al",
        "xor eax, eax; out 0x43, al; in al, 0x40; in al, 0x40",
        "rdtsc",
        "rdtsc; mov [DATA], eax",
        f"sti; mov ecx, {number(20 + s.below(300))}; .l: loop .l",
        f"mov ecx, {number(20 + s.below(300))}; .l: dec ecx; jnz .l",
        "mov ecx, 0x10; rdmsr",
        "cpuid",
        f"sti; mov ecx, {number(40)}; .l: pushfd; cli; popfd; loop .l",
    )


def _delay(s: Salt) -> str:
    """So many instructions that do nothing: what follows stands at another moment of the timer's period."""
    return f"times {1 + s.below(128)} nop"


# Page tables. An entry is changed and flushed with interrupts off.


def _entry(s: Salt) -> int:
    """Data, code, or nothing; with rights and A and D bits of all kinds."""
    frame = (at.DATA + 0x1000 * s.below(3), at.DATA, at.BODY, at.JIT)[s.below(4)]
    return frame | (0, 1, 2, 3, 4, 5, 6, 7, 7, 7)[s.below(10)] | (0, 0x20, 0x60)[s.below(3)]


def _edit_page(s: Salt) -> str:
    page = s.below(at.WINDOW_PAGES - 2)
    where = number(at.WINDOW_TABLE + 4 * page)
    address = number(at.WINDOW + 0x1000 * page)
    change = pick(
        s,
        f"mov dword [{where}], {number(_entry(s))}",
        f"mov dword [{where}], {number(_entry(s))}",
        f"and dword [{where}], {number(~0x60)}",
        f"xor dword [{where}], 1",
        f"xor dword [{where}], 2",
        f"lock btr dword [{where}], 5; cmp eax, ecx",
    )
    flush = pick(s, f"invlpg [{address}]", f"invlpg [{address}]", "mov eax, cr3; mov cr3, eax")
    after = pick(
        s,
        "nop",
        f"mov eax, [{address}]",
        f"mov [{address}], ebx",
        f"inc dword [{address}]",
        f"mov edx, [{where}]",
    )
    return kernel_only(f"pushfd; cli; {change}; {flush}; popfd; {after}; mov ecx, [{where}]")


def _fresh_page(s: Salt) -> str:
    """What was not present needs no flush."""
    page = s.below(at.WINDOW_PAGES - 2)
    where, address = number(at.WINDOW_TABLE + 4 * page), number(at.WINDOW + 0x1000 * page + 4 * s.below(64))
    use = pick(
        s, f"mov eax, [{address}]", f"mov [{address}], edx", f"mov [{address}], edx; mov eax, [{where}]"
    )
    return kernel_only(
        f"test byte [{where}], 1; jnz .x; mov dword [{where}], {number(_entry(s) | 1)}; .x: {use}"
    )


def _alias_table(s: Salt) -> str:
    """The window's last page is its own table: an entry is changed through it."""
    page = s.below(at.WINDOW_PAGES - 2)
    through = number(at.WINDOW + 0xF000 + 4 * page)
    address = number(at.WINDOW + 0x1000 * page)
    return kernel_only(
        f"pushfd; cli; mov dword [WINDOW_TABLE + 60], WINDOW_TABLE + 3; invlpg [WINDOW + 0xf000]; "
        f"mov dword [{through}], "
        f"{number(_entry(s))}; invlpg [{address}]; popfd; mov eax, [{address}]"
    )


def _space(s: Salt) -> str:
    """Another address space, and perhaps back."""
    there = pick(s, "OTHER_DIRECTORY", "DIRECTORY")
    use = pick(s, f"mov ecx, [{window(s)}]", f"mov [{window(s)}], edx", "nop", f"mov esi, {window(s)}; lodsd")
    back = pick(s, "", "; mov eax, DIRECTORY; mov cr3, eax")
    return f"mov eax, {there}; mov cr3, eax; {use}{back}"


def _alias_code(s: Salt) -> str:
    """A function written through one address and executed at another."""
    page = s.below(at.WINDOW_PAGES - 2)
    where, offset = number(at.WINDOW_TABLE + 4 * page), 16 * s.below(0x40)
    here, there = number(at.WINDOW + 0x1000 * page + offset), number(at.JIT + offset)
    one, other = number(0xC3909040 + s.below(4)), number(0xC3909048 + s.below(4))
    first, second = (here, there) if s.below(2) else (there, here)
    return kernel_only(
        f"pushfd; cli; mov dword [{where}], JIT + 7; invlpg [{here}]; mov dword [{first}], {one}; "
        f"mov edi, {second}; call edi; "
        f"mov dword [{first}], {other}; call edi; mov edi, {first}; call edi; popfd"
    )


def _large(s: Salt) -> str:
    return pick(
        s,
        f"mov eax, [{number(at.LARGE + at.DATA + 4 * s.below(1024))}]",
        f"mov [{number(at.LARGE + at.DATA + 4 * s.below(1024))}], edx",
        f"mov edi, {number(at.LARGE + at.JIT + 0x1800)}; "
        f"mov dword [{number(at.JIT + 0x1800)}], {number(0xC3909040 + s.below(4))}; call edi",
    )


PORTS: dict[str, Atom] = {"port": _port}
PAGING: dict[str, Atom] = {
    "edit page": _edit_page, "fresh page": _fresh_page, "alias table": _alias_table, "space": _space,
    "alias code": _alias_code, "large": _large,
    "string in window": lambda s: string(s, window(s), window(s)),
}  # fmt: skip
TIMED: dict[str, Atom] = {"delay": _delay, "controller": _controller, "timer": _timer, **SLEEP}
