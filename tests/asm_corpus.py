"""A generated corpus of assembly source: what the assembler must encode as NASM does.

The hard part is breadth without nonsense: every line must be valid NASM, and together the lines must visit each
instruction family in each operand size and addressing mode, jumps that are just short enough or just not, and
the directives and macros of the dialect. Rows give the operands of each family as kinds; a kind is drawn at
random. A corpus is a function of its seed, so that a failure can be run again.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random


def _words(text: str) -> list[str]:
    return text.split()


R32 = ["eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi"]
R16 = ["ax", "cx", "dx", "bx", "sp", "bp", "si", "di"]
R8 = ["al", "cl", "dl", "bl", "ah", "ch", "dh", "bh"]
SEGMENTS = ["es", "ss", "ds", "fs", "gs"]
CONDITIONS = _words("o no b c nae ae nb nc e z ne nz be na a nbe s ns p pe np po l nge ge nl le ng g nle")
SIZES = {"8": "byte", "16": "word", "32": "dword", "64": "qword", "80": "tword"}

# family: the operand kinds of its forms. `r`, `m`, `i` carry bits; `rm` is either; `x` is an XMM register.
FAMILIES: dict[str, list[str]] = {
    "add or adc sbb and sub xor cmp": [
        f"{a},{b}"
        for bits in ("8", "16", "32")
        for a, b in (
            ("rm" + bits, "r" + bits),
            ("r" + bits, "rm" + bits),
            ("r" + bits, "a"),
            ("rm" + bits, "i" + bits),
            ("a", "r" + bits),
        )
    ],
    "mov": [
        f"{a},{b}"
        for bits in ("8", "16", "32")
        for a, b in (
            ("rm" + bits, "r" + bits),
            ("r" + bits, "rm" + bits),
            ("r" + bits, "a"),
            ("rm" + bits, "i" + bits),
        )
    ],
    "test": ["rm8,r8", "rm16,r16", "rm32,r32", "r32,m32", "rm8,i8", "rm16,i16", "rm32,i32"],
    "inc dec neg not mul div idiv imul": ["rm8", "rm16", "rm32"],
    "rol ror rcl rcr shl sal shr sar": ["rm8,1", "rm16,cl", "rm32,u5", "rm8,u5", "rm32,1", "rm32,cl"],
    "shld shrd": ["rm16,r16,u5", "rm32,r32,u5", "rm32,r32,cl", "rm16,r16,cl"],
    "bt bts btr btc": ["rm16,r16", "rm32,r32", "rm32,u5", "rm16,u5"],
    "bsf bsr": ["r16,rm16", "r32,rm32"],
    "xchg": ["r32,r32", "rm8,r8", "rm16,r16", "r32,m32", "r8,r8"],
    "xadd cmpxchg": ["rm8,r8", "rm16,r16", "rm32,r32"],
    "movzx movsx": ["r32,rm8", "r32,rm16", "r16,rm8"],
    "lea": ["r32,a", "r16,a"],
    "imul": ["r32,rm32", "r16,rm16", "r32,i32", "r32,rm32,i32", "r16,rm16,i16"],
    "push": ["r32", "r16", "m32", "m16", "i32", "byte i7", "word i16", "es", "cs", "ss", "ds", "fs", "gs"],
    "pop": ["r32", "r16", "m32", "m16", "es", "ss", "ds", "fs", "gs"],
    "bswap": ["r32"],
    "in": ["al,u8", "ax,u8", "eax,u8", "al,dx", "ax,dx", "eax,dx"],
    "out": ["u8,al", "u8,ax", "u8,eax", "dx,al", "dx,ax", "dx,eax"],
    "int": ["u8"],
    "ret retf": ["", "u16"],
    "enter": ["u16,u5"],
    "aam aad": ["", "u8"],
    "call jmp": ["r32", "m32", "far a", "0x08:sym", "0x1b:i32"],
    "lgdt lidt sgdt sidt invlpg fxsave fxrstor cmpxchg8b": ["a"],
    "lldt ltr verr verw lmsw": ["r16", "m16", "a"],
    "sldt str smsw": ["r16", "r32", "a"],
    "lar lsl": ["r16,r16", "r32,r16", "r32,r32", "r32,a"],
    "mov  ": ["s,r16", "s,r32", "s,m16", "s,a", "r16,s", "r32,s", "m16,s", "a,s"],
    "mov ": ["r32,cr0", "cr3,r32", "r32,cr4", "cr2,r32", "r32,dr0", "dr7,r32", "r32,dr6"],
    "les lds lfs lgs lss": ["r32,a", "r16,a"],
    "bound": ["r32,a", "r16,a"],
    "arpl": ["r16,r16", "m16,r16"],
    "fld fst fstp": ["m32", "m64", "st"],
    "fld fstp": ["m80"],
    "fild fistp": ["m16", "m32", "m64"],
    "fadd fsub fsubr fmul fdiv fdivr": ["m32", "m64", "st0,st", "st,st0", "to st", "st", ""],
    "faddp fsubp fsubrp fmulp fdivp fdivrp": ["st,st0", "st"],
    "fcom fcomp": ["m32", "m64", "st"],
    "fxch ffree fucom fucomp fcomi fcomip fucomi fucomip": ["st"],
    "fldcw fnstcw fstcw fnsave frstor fldenv fnstenv": ["a"],
    "fnstsw fstsw": ["ax", "m16"],
    "movaps movups addps mulps subps divps xorps andps sqrtps maxps": ["x,x", "x,a"],
    "movss addss mulss sqrtss": ["x,x", "x,m32"],
    "addsd mulsd cvtsd2ss": ["x,x", "x,m64"],
    "movd": ["x,rm32", "rm32,x", "mm0,rm32"],
    "movq": ["x,x", "x,m64", "m64,x", "mm1,mm2", "mm1,m64"],
    "pxor paddd psubb pand por pcmpeqd punpcklbw": ["x,x", "x,a", "mm3,mm4", "mm3,m64"],
    "pshufd shufps cmpps": ["x,x,u2"],
    "cvtsi2ss cvtsi2sd": ["x,rm32"],
    "movnti": ["m32,r32"],
    "prefetcht0 prefetchnta clflush ldmxcsr stmxcsr": ["a"],
}
ALONE = _words("""
    nop hlt cli sti cld std clc stc cmc cpuid rdtsc rdmsr wrmsr rdpmc invd wbinvd clts leave into int3 ud2 rsm
    pushf popf pushfd popfd pushfw popfw iret iretd iretw pusha popa pushad popad pushaw popaw lahf sahf xlatb
    daa das aaa aas cbw cwde cwd cdq salc wait fwait sysenter sysexit vmrun vmload vmsave vmmcall vmcall stgi
    clgi invlpga movsb movsw movsd stosb stosw stosd lodsb lodsw lodsd scasb scasw scasd cmpsb cmpsw cmpsd
    insb insw insd outsb outsw outsd finit fninit fclex fnclex fld1 fldz fldpi fabs fchs fsqrt fsin fnop emms
    lfence mfence sfence pause monitor mwait vmlaunch vmresume vmxoff icebp fcompp fucompp ftst fxam fprem
""")
PREFIXED = [
    line.strip()
    for line in """
        rep movsb | rep movsd | rep stosd | rep lodsw | repe cmpsb | repne scasb | repz cmpsd | rep insb
        rep outsd | repnz scasd | es movsb | fs lodsd | rep es movsd | cs lodsb | gs outsb | a16 movsb
        lock inc dword [eax] | lock add [var], ecx | lock xadd [ebx], eax | lock cmpxchg8b [esi]
        lock btr dword [ebx], 3 | lock xor byte [es:edi + 4], 0x80 | rep ret | o16 pushf | o16 popf
        o16 iret | o16 push ds | o16 retf | o16 lgdt [var] | a16 stosb | a16 rep movsd | o32 pushf
    """.replace("\n", "|").split("|")
    if line.strip()
]
PROLOGUE = """\
bits 32
org 0x100000
LIMIT equ 40
FORWARD equ late_end - late
%define PORT 0x3F8
%define ADD(a, b) ((a) + (b))
%macro store 2
        mov dword [%1], %2
%endmacro
%macro wait_for 1
%%again:
        in al, dx
        test al, %1
        jz %%again
%endmacro
%macro entry 1-2 0
entry_%1: dd %2
%endmacro
%macro each 1-*
        db %0
        db %1
%endmacro
section .text
start:
"""


class Corpus:
    """Writes one source; `text` is all of it."""

    def __init__(self, seed: int, lines: int) -> None:
        self._random = Random(seed)
        self._labels = self._entries = 0
        self._out = [PROLOGUE]
        self._total = lines
        self._families = [
            (name, form) for names, forms in FAMILIES.items() for name in names.split() for form in forms
        ]
        while len(self._out) < lines:
            self._line()
        self._finish()
        self.text = "\n".join(self._out) + "\n"

    # Operands

    def _pick(self, options: list[str]) -> str:
        return self._random.choice(options)

    def _displacement(self) -> int:
        return self._random.choice([0, 1, -1, 4, 127, 128, -128, -129, 0x1234, -0x12345, 0x7FFFFFFF])

    def _address(self) -> str:
        """The inside of the brackets, in every mode there is."""
        base, index = self._pick(R32), self._pick([r for r in R32 if r != "esp"])
        scale, disp = self._random.choice([1, 2, 4, 8]), self._displacement()
        shown = f"{'-' if disp < 0 else '+'} {abs(disp):#x}" if disp else ""
        inner = self._random.choice(
            [
                f"{base}",
                f"{base} {shown}",
                f"{base} + {index}*{scale} {shown}",
                f"{index}*{scale} {shown}",
                f"{base} + {index} {shown}",
                f"{index}*{self._random.choice([2, 3, 5, 9])} {shown}",
                f"{abs(disp):#x}",
                "var",
                f"var + {index}*{scale}",
                f"{base} + var + 4",
                "table - 4",
                f"{base} + table - var",
                f"dword {base} + 8",
                f"byte {index} + 8",
                f"bx + si {'+ 5' if disp else ''}",
                "bp + di + 300",
                "di",
                "bp - 2",
            ]
        )
        if self._random.random() < 0.15 and not inner.startswith(("dword", "byte")):
            inner = f"{self._pick([*SEGMENTS, 'cs'])}:{inner}"
        return f"[{inner}]"

    def _immediate(self, bits: int) -> str:
        top = 1 << bits
        values = [0, 1, -1, 2, 0x7F, 0x80, -0x80, -0x81, top // 2 - 1, -top // 2, top - 1, top - 0x80]
        values += [self._random.randrange(-top // 2, top)]
        value = self._random.choice([v for v in values if -top <= v < top])
        if bits == 32 and self._random.random() < 0.2:
            return self._pick(
                ["var", "start + 4", "table - var", "LIMIT", "PORT", "ADD(LIMIT, 2) * 2", "'ab'"]
            )
        forms = [str(value), f"{value:#x}" if value >= 0 else str(value)]
        if value >= 0:
            forms += [f"0{value:x}h", f"{value:b}b", f"0o{value:o}"]
        return self._pick(forms)

    def _operand(self, kind: str) -> str:
        for prefix in ("byte ", "word ", "to ", "far "):
            if kind.startswith(prefix):
                return prefix + self._operand(kind.removeprefix(prefix))
        if kind.startswith("rm"):
            kind = self._pick(["r", "m"]) + kind[2:]
        registers = {"r8": R8, "r16": R16, "r32": R32, "s": SEGMENTS}
        if kind in registers:
            return self._pick(registers[kind])
        made: dict[str, Callable[[], str]] = {
            "a": self._address,
            "x": lambda: f"xmm{self._random.randrange(8)}",
            "st": lambda: f"st{self._random.randrange(1, 8)}",
            "i8": lambda: self._immediate(8),
            "i16": lambda: self._immediate(16),
            "i32": lambda: self._immediate(32),
            "i7": lambda: str(self._random.randrange(-128, 128)),
            "u2": lambda: str(self._random.randrange(4)),
            "u5": lambda: str(self._random.randrange(32)),
            "u8": lambda: str(self._random.randrange(256)),
            "u16": lambda: str(self._random.randrange(0x8000)),
        }
        if kind in made:
            return made[kind]()
        if kind[0] == "m" and kind[1:] in SIZES:
            return f"{SIZES[kind[1:]]} {self._address()}"
        if kind.startswith("0x") and ":" in kind:
            selector, offset = kind.split(":")
            return f"{selector}:{'start' if offset == 'sym' else self._immediate(32)}"
        return kind

    # Lines

    def _emit(self, text: str) -> None:
        self._out.append(text)

    def _line(self) -> None:
        kinds = [self._instruction, self._plain, self._jump, self._label, self._directive]
        self._random.choices(kinds, [60, 8, 14, 8, 10])[0]()

    def _instruction(self) -> None:
        name, form = self._random.choice(self._families)
        operands = [self._operand(kind) for kind in form.split(",")] if form else []
        if name == "cmpps":
            operands[-1] = str(self._random.randrange(8))
        self._emit(f"        {name} {', '.join(operands)}".rstrip() + self._pick(["", "", " ; why"]))

    def _plain(self) -> None:
        self._emit(f"        {self._pick(ALONE + PREFIXED)}")

    def _label(self) -> None:
        self._emit(f"label{self._labels}:" + self._pick(["", " nop"]))
        if self._random.random() < 0.3:
            self._emit(".inner: dec ecx\n        jnz .inner")
        self._labels += 1

    def _jump(self) -> None:
        name = self._pick(["jmp", "call", "jmp short", "loop", "jecxz", "loopne", "jcxz"])
        if self._random.random() < 0.5:
            name = f"j{self._pick(CONDITIONS)}"
        if name in ("jmp short", "loop", "jecxz", "loopne", "jcxz"):
            self._emit(f"        {name} $ {self._pick(['+', '-'])} {self._random.randrange(100)}")
            return
        strict = self._pick(["", "", "", "near ", "strict near "])
        # Around the labels written last and next, so that many targets lie near the edge of a short jump.
        known = max(0, self._labels - 1)
        target = f"label{self._random.randrange(max(0, known - 6), known + 1)}"
        if self._random.random() < 0.4:
            target = f"label{self._labels + self._random.randrange(4)}"
        if self._random.random() < 0.1:
            target = f"$ {self._pick(['+', '-'])} {self._random.randrange(60, 300)}"
        self._emit(f"        {name} {strict}{target}")

    def _data(self) -> str:
        unit = self._pick(["db", "dw", "dd", "dq"])
        bits = {"db": 8, "dw": 16, "dd": 32, "dq": 64}[unit]
        items = [
            str(self._random.randrange(-(1 << bits - 1), 1 << bits)),
            self._pick(["'x'", '"two words"', "`line\\n\\0`", "'\"'"]),
            f"LIMIT {self._pick(['+', '-', '*', '/', '%', '&', '|', '^', '<<', '>>'])} 3 & 0x7F",
            self._pick(
                ["($ - $$) & 0xFF", "-(1 << 3) + 20", "~5 & 0x7F", "!0", "LIMIT > 3", "(LIMIT << 1) | 1"]
            ),
        ]
        if unit in ("dd", "dq"):
            items += [self._pick(["var", "table + 4", "table - var", "start"]), self._pick(["1.5", "-0.25"])]
        chosen = [self._pick(items) for _ in range(self._random.randrange(1, 5))]
        return f"{unit} {', '.join(chosen)}"

    def _directive(self) -> None:
        choice = self._random.randrange(9)
        if choice == 0:
            self._emit(f"        align {self._random.choice([2, 4, 8, 16, 32])}")
        elif choice == 1:
            self._emit(
                f"        times {self._random.randrange(1, 40)} {self._pick(['nop', 'db 7', 'inc eax'])}"
            )
        elif choice == 2:
            self._emit(f"        store {self._pick(R32)}, {self._immediate(32)}")
        elif choice == 3:
            self._emit("        wait_for 0x20")
        elif choice == 4:
            self._entries += 1
            second = self._pick(["", ", start", ", LIMIT + 1"])
            self._emit(f"section .data\n        entry {self._entries}{second}\nsection .text")
        elif choice == 5:
            self._emit(f"section .data\n        {self._data()}\n        align 4, db 0\nsection .text")
        elif choice == 6:
            test = self._pick(["LIMIT > 3", "PORT == 5", "1 && 0", "ADD(1, 2) = 3"])
            self._emit(f"%if {test}\n        {self._data()}\n%else\n        nop\n%endif")
        elif choice == 7:
            self._emit(
                f"section .bss\n        {self._pick(['resb', 'resw', 'resd', 'resq'])} 3\nsection .text"
            )
        else:
            self._emit(f"        each {self._random.randrange(256)}, 2, 3\n        mov ecx, FORWARD")

    def _finish(self) -> None:
        for number in range(4):
            self._emit(f"label{self._labels + number}: nop")
        self._emit("late: times 9 dw 5\nlate_end:\n        times 3 jmp late\n        times 2 call start")
        self._emit("section .data\nvar: dd 1, 2\ntable: times 16 dd LIMIT\nsection .bss\nroom: resb 100")


def jumps(seed: int) -> str:
    """A source of little but jumps, calls and label differences, most of them near the edge of a short form."""
    random = Random(seed)
    count = random.randrange(20, 400)
    out = ["bits 32", "org 0x100000"]
    for number in range(count):
        out.append(f"L{number}:")
        for _ in range(random.randrange(1, 4)):
            target = max(0, min(count - 1, number + int(random.gauss(0, 25))))
            lines = [
                f"{random.choice(['jmp', 'jz', 'jnc', 'call'])} L{target}",
                f"times {random.randrange(1, 9)} nop",
                f"push L{target} - L{number}",
                f"add ebx, [eax + L{target} - L{max(0, target - 3)}]",
                f"times {random.randrange(2, 5)} jz L{target}",
                f"align {random.choice([4, 8, 16])}",
                "mov eax, 5",
            ]
            out.append("        " + random.choices(lines, [70, 10, 5, 5, 3, 3, 4])[0])
    return "\n".join(out) + "\n"
