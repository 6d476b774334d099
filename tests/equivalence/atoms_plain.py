"""Atoms that any program has: computation, memory, stack, strings, control flow, code that changes.

An atom is a function from a `Salt` to text. The rules that all keep: EBP is the frame of whoever runs the
atom; flags that the manual leaves undefined are set by something else before the atom ends.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.equivalence import layout as at
from tests.equivalence.encode import number
from tests.program_atoms import Salt

Atom = Callable[[Salt], str]

REGISTERS = ("eax", "ecx", "edx", "ebx", "esi", "edi")
_ALU = ("add", "or", "adc", "sbb", "and", "sub", "xor", "cmp")
_CONDITIONS = ("o", "no", "b", "ae", "e", "ne", "be", "a", "s", "ns", "p", "np", "l", "ge", "le", "g")
_DEFINED = "cmp eax, ecx"  # sets every arithmetic flag


def pick(s: Salt, *choices: str) -> str:
    """One of them."""
    return choices[s.below(len(choices))]


def register(s: Salt) -> str:
    return REGISTERS[s.below(len(REGISTERS))]


def value(s: Salt) -> str:
    return number(s.below(1 << 32) if s.below(2) else (0, 1, 0xFFFFFFFF, 0x80000000, 0x7FFFFFFF)[s.below(5)])


def data(s: Salt) -> str:
    """Somewhere in the data pages, now and then across the border of two."""
    page = at.DATA + 0x1000 * s.below(3)
    return number(page + (0xFF0 + s.below(0x1C) if s.below(4) == 0 else 4 * s.below(0x100)))


def window(s: Salt) -> str:
    """Somewhere in the window's pages; the last is not for this."""
    page = at.WINDOW + 0x1000 * s.below(at.WINDOW_PAGES - 2)
    return number(page + (0xFF8 + s.below(0x10) if s.below(4) == 0 else 4 * s.below(0x100)))


def place(s: Salt) -> str:
    """Memory that may be there."""
    kind = s.below(8)
    return data(s) if kind < 4 else window(s) if kind < 7 else number(at.NOWHERE + s.below(0x2000))


def _alu(s: Salt) -> str:
    operation, a, b = _ALU[s.below(8)], register(s), register(s)
    return pick(
        s,
        f"{operation} {a}, {b}",
        f"{operation} {a}, {value(s)}",
        f"{operation} {a}, [{place(s)}]",
        f"{operation} [{place(s)}], {b}",
        f"{operation} ax, cx",
        f"{operation} byte [{place(s)}], dl",
    )


def _move(s: Salt) -> str:
    a, b = register(s), register(s)
    return pick(
        s,
        f"mov {a}, {value(s)}",
        f"mov {a}, {b}",
        f"mov {a}, [{place(s)}]",
        f"mov [{place(s)}], {b}",
        f"mov word [{place(s)}], 0x1234",
        f"movzx {a}, word [{place(s)}]",
        f"movsx {a}, cl",
        f"lea {a}, [{b} + {number(s.below(64))}]",
        f"xchg {a}, [{place(s)}]",
        f"bswap {a}",
        f"cmovs {a}, {b}",
        f"setc [{place(s)}]",
        f"lock inc dword [{place(s)}]",
        f"mov ebx, {place(s)}; mov al, 3; xlatb",
    )


def _unary(s: Salt) -> str:
    return pick(s, "inc", "dec", "neg", "not") + " " + pick(s, register(s), f"dword [{place(s)}]")


def _shift(s: Salt) -> str:
    operation = pick(s, "shl", "shr", "sar", "rol", "ror", "rcl", "rcr")
    return f"{operation} {register(s)}, {pick(s, 'cl', '1', '7', '31')}; {_DEFINED}"


def _undefined_flags(s: Salt) -> str:
    a, b = register(s), register(s)
    text = pick(
        s,
        f"mul {a}",
        f"imul {a}, {b}",
        f"bt {a}, {b}",
        f"bts {a}, {b}",
        f"shld {a}, {b}, 5",
        "aam",
        "aad",
        "daa",
        "das",
        "aaa",
        "aas",
        f"xadd {a}, {b}",
        f"cmpxchg {a}, {b}",
        f"bt dword [{place(s)}], 9",
    )
    return f"{text}; {_DEFINED}"


def _divide(s: Salt) -> str:
    return f"xor edx, edx; mov ecx, {number(s.below(3))}; {pick(s, 'div', 'idiv')} ecx; {_DEFINED}"


def _flags(s: Salt) -> str:
    return pick(s, "cmc", "clc", "stc", "cld", "std; nop; cld", "sahf", "lahf", "cwde", "cdq", "salc")


def _push(s: Salt) -> str:
    return pick(
        s,
        f"push {register(s)}",
        "push esp",
        f"push {value(s)}",
        f"push dword [{place(s)}]",
        "pushad",
        "push ds",
        "push es; pop eax",
        "push word 5",
        "push ax",
        "push fs; push gs",
        "pushad; popad",
    )


def _pop(s: Salt) -> str:
    return pick(
        s,
        f"push ecx; pop {register(s)}",
        f"push edx; pop dword [{place(s)}]",
        "push eax; pop ax; pop cx",
        "push 7; push 9; pop edx; pop ecx",
        "push esp; pop esp",
        "enter 8, 0; leave",
        "enter 4, 2; leave",
        "push ds; pop es",
        f"push dword [esp]; pop dword [{data(s)}]",
    )


def string(s: Salt, source: str, target: str) -> str:
    """A string instruction between two places, in either direction."""
    operation = pick(
        s, "movsb", "movsd", "movsw", "stosb", "stosd", "lodsb", "cmpsb", "scasd", "cmpsd", "scasb"
    )
    prefix = (
        pick(s, "", "rep ", "rep ", "repne ")
        if operation[:3] in ("cmp", "sca")
        else pick(s, "", "rep ", "rep ")
    )
    direction = pick(s, "", "", "std; ")
    end = "; cld" if direction else ""
    return f"mov esi, {source}; mov edi, {target}; mov ecx, {number(s.below(9))}; {direction}{prefix}{operation}{end}"


def _string(s: Salt) -> str:
    return string(s, place(s), place(s))


def _string_faults(s: Salt) -> str:
    """One that runs into the next page of the window, which may not be there."""
    border = at.WINDOW + 0x1000 * (1 + s.below(12))
    here, there = number(border - s.below(20)), data(s)
    return string(s, here, there) if s.below(2) else string(s, there, here)


def _jump(s: Salt) -> str:
    condition = _CONDITIONS[s.below(16)]
    return pick(
        s,
        f"j{condition} .x; add eax, 7; .x: inc edx",
        f"cmp ecx, 2; j{condition} near .x; not ebx; .x: nop",
        "jmp .x; int 0x30; .x: nop",
        f"mov ecx, {number(s.below(2))}; jecxz .x; dec edx; .x: nop",
        f"cmp eax, edx; set{condition} al",
    )


def _loop(s: Salt) -> str:
    body = pick(
        s, "inc eax", "add eax, ecx; rol edx, 3", f"xor [{data(s)}], eax", "push eax; pop edx", "cli", "nop"
    )
    back = pick(s, "loop .a", "loope .a", "loopne .a", "dec ecx; jnz .a", "a16 loop .a")
    return f"mov ecx, {number(1 + s.below(30))}; .a: {body}; {back}"


def _indirect(s: Salt) -> str:
    return pick(
        s,
        "mov eax, .x; jmp eax; int3; .x: nop",
        "push .x; ret; int3; .x: nop",
        "jmp [.t]; .t: dd .x; .x: nop",
        "and ecx, 3; jmp [.t + ecx * 4]; .t: dd .a, .b, .c, .b; .a: inc eax; .b: inc edx; .c: inc ebx",
        "mov edi, 6; .n: mov ecx, edi; and ecx, 1; jmp [.t + ecx * 4]; .t: dd .a, .b; .a: inc eax; .b: dec edi; "
        "jnz .n",
        "push 0; push .x; ret 4; .x: nop",
        "push .x; retf; .x: nop",
        "push cs; push .x; retf; .x: nop",
    )


def _call(s: Salt) -> str:
    return pick(
        s,
        "call .f; jmp .x; .f: inc eax; ret; .x: nop",
        "mov eax, .f; call eax; jmp .x; .f: dec ebx; ret; .x: nop",
        "call [.t]; jmp .x; .t: dd .f; .f: ret; .x: nop",
        "call .f; .f: pop ecx",
        "call .f; .f: add esp, 4",
        f"mov ecx, {number(1 + s.below(40))}; call .f; jmp .x; "
        ".f: dec ecx; jz .r; call .f; inc eax; .r: ret; .x: nop",
        "call .f; inc eax; jmp .x; .f: add dword [esp], 1; ret; .x: nop",
        f"mov ebx, {number(1 + s.below(12))}; .n: call .f; call .g; dec ebx; jnz .n; jmp .x; .f: inc eax; ret; "
        ".g: call .f; ret; .x: nop",
        "push .x; push .f; ret; .f: inc edx; ret; .x: nop",
        "call .f; int3; .f: mov dword [esp], .x; ret; .x: nop",
        "call .f; jmp .x; .f: ret 0; .x: nop",
    )


# Code that changes.


def _modify_next(s: Salt) -> str:
    return pick(
        s,
        "inc byte [cs:.x + 1]; .x: mov al, 5",
        "inc byte [.x + 1]; jmp .x; .x: mov cl, 5",
        "mov byte [.x], 0x40; .x: nop",
        "xor byte [.x], 0x90 ^ 0xfa; .x: nop; nop",
        "xor byte [.x], 1; .x: inc eax",
        "inc word [.x + 1]; .x: mov edx, 0x12345678",
        "mov al, [.x]; mov [.x], al; .x: inc ebx",
    )


def _modify_loop(s: Salt) -> str:
    step = pick(s, "inc dword [.a + 1]", "add byte [.a + 1], 3", "rol dword [.a + 1], 1", "xor byte [.a], 8")
    return f"mov ecx, {number(2 + s.below(12))}; .a: add eax, 0x1234567; {step}; dec ecx; jnz .a; mov byte [.a], 5"


def _jit(s: Salt) -> str:
    """Write a function elsewhere, call it, change it, call it again."""
    where = at.JIT + (0xFFC + s.below(5) if s.below(4) == 0 else 16 * s.below(0x40))
    address, first = number(where), s.below(4)
    function = 0xC3909040 + first  # inc register; nop; nop; ret
    change = pick(s, f"mov byte [{address}], {0x40 + s.below(4)}", f"xor byte [{address}], 8")
    call = pick(s, f"mov edi, {address}; call edi", f"mov edi, {address}; call edi; call edi")
    return f"mov dword [{address}], {number(function)}; {call}; {change}; {call}"


def _copy_code(s: Salt) -> str:
    """A string instruction that overwrites what comes next, with the same or with something else."""
    return pick(
        s,
        "cld; mov esi, .y; mov edi, .x; mov ecx, 2; rep movsb; "
        ".x: inc eax; nop; jmp .z; .y: inc ebx; dec eax; .z: nop",
        "cld; mov edi, .x; mov eax, 0x42; stosb; .x: nop; nop",
        "cld; mov esi, .x; mov edi, .x; mov ecx, 3; rep movsb; .x: nop; inc eax; nop",
    )


def _wide(s: Salt) -> str:
    """Operands and addresses of 16 bits; a 16-bit return arrives in low memory and comes back from there."""
    back = "mov dword [ss:LOW_BACK], .x"
    return pick(
        s,
        f"{back}; push word LOW; o16 ret; .x: nop",
        f"{back}; pushfw; o16 push cs; push word LOW; iretw; .x: nop",
        f"{back}; o16 push cs; push word LOW; o16 retf; .x: nop",
        "pushfw; pop ax; and ax, 0x8ff",
        "clc; pushfw; popfw",
        "o16 push ds; o16 pop es",
        "o16 push es; pop ax",
        "a16 lea eax, [bx + si + 5]",
        "o16 pusha; o16 popa",
        "add ax, 0x7fff",
        "push 5; pop cx; pop dx",
        "jcxz .x; inc eax; .x: nop",
    )


def _x87(s: Salt) -> str:
    """The FPU, and what tells where its last instruction was."""
    last = pick(s, "fld1; fstp st0", f"fld dword [{data(s)}]; fstp st0", "fldz; fstp st0; nop; inc eax", "fninit")
    image = at.DATA + 0x1000 * s.below(2) + 0x10 * s.below(0x60)
    store = pick(
        s,
        f"fxsave [{number(image)}]",
        f"fnstenv [{place(s)}]",
        f"fnsave [{place(s)}]",
        "sti; fxsave [esp - 1024]",
    )
    stores = pick(s, store, f"fxsave [esp - 1024]; {store}", f"f2xm1; {store}")
    return f"{last}; {stores}; mov eax, [{number(image + 8)}]"


PLAIN: dict[str, Atom] = {
    "alu": _alu, "move": _move, "unary": _unary, "shift": _shift, "undefined flags": _undefined_flags,
    "divide": _divide, "flags": _flags, "push": _push, "pop": _pop, "string": _string,
    "string faults": _string_faults, "jump": _jump, "loop": _loop, "indirect": _indirect, "call": _call,
    "modify next": _modify_next, "modify loop": _modify_loop, "jit": _jit, "copy code": _copy_code, "wide": _wide,
    "x87": _x87,
}  # fmt: skip
