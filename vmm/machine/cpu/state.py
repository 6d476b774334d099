"""The CPU's registers as a value that is read and written in place.

`CpuState` is a window onto the engine's own register file (see `layout`). Two things make it more than
an array. Arithmetic flags are lazy: the engine remembers the last operation and computes flags when asked,
so EFLAGS must be materialized. And CPL, code and stack size, PE, TS are mirrored in `hflags`, by which
translated code is looked up: every write here keeps the mirror right, as the CPU's own writes do.

Where the host allows it the window is the live register file itself; elsewhere it is a saved context that
`load` and `store` copy. Both are used in the same way: load, read and write, store.
"""

from __future__ import annotations

from collections.abc import Callable

from vmm.isa.descriptors import Descriptor
from vmm.isa.words import ARITHMETIC, CR0, EFlags
from vmm.machine.cpu import layout as at

EAX, ECX, EDX, EBX, ESP, EBP, ESI, EDI = range(8)
GENERAL = ("eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi")
SEGMENT_NAMES = ("es", "cs", "ss", "ds", "fs", "gs")

_EIP = at.EIP // 4
_EFLAGS = at.EFLAGS // 4
_CC_OP = at.CC_OP // 4
_CC_SRC = at.CC_SRC // 4
_DF = at.DF // 4
_HFLAGS = at.HFLAGS // 4
_SEGMENTS = at.SEGMENTS // 4
_STRIDE = at.SEGMENT_STRIDE // 4
_BASE, _LIMIT, _FLAGS = at.BASE // 4, at.LIMIT // 4, at.FLAGS // 4
_LAZY = ARITHMETIC | EFlags.DF


def _nothing() -> None:
    """A live window needs no copying."""


class CpuState:
    """The window. `words` views the register file as 32-bit words, `view` as bytes.

    `flags_now` computes EFLAGS while they are lazy (through the engine's public interface).
    """

    __slots__ = ("flags_now", "load", "store", "view", "words")

    def __init__(
        self,
        view: memoryview,
        flags_now: Callable[[], int],
        load: Callable[[], None] = _nothing,
        store: Callable[[], None] = _nothing,
    ) -> None:
        self.view = view
        self.words = view.cast("I")
        self.flags_now = flags_now
        self.load = load
        self.store = store

    # General registers and EIP

    def get(self, register: int) -> int:
        """General register by its encoding (EAX 0 .. EDI 7)."""
        return self.words[register * 2]

    def set(self, register: int, value: int) -> None:
        self.words[register * 2] = value & 0xFFFFFFFF

    @property
    def eip(self) -> int:
        return self.words[_EIP]

    @eip.setter
    def eip(self, value: int) -> None:
        self.words[_EIP] = value & 0xFFFFFFFF

    @property
    def esp(self) -> int:
        return self.words[ESP * 2]

    @esp.setter
    def esp(self, value: int) -> None:
        self.words[ESP * 2] = value & 0xFFFFFFFF

    @property
    def linear_eip(self) -> int:
        w = self.words
        return (w[_EIP] + w[_SEGMENTS + at.CS * _STRIDE + _BASE]) & 0xFFFFFFFF

    # Flags

    @property
    def eflags(self) -> int:
        """EFLAGS as PUSHF would show them."""
        w = self.words
        if w[_CC_OP] == at.CC_OP_EFLAGS:
            flags = w[_EFLAGS] & ~_LAZY | w[_CC_SRC] & ARITHMETIC
            return flags | EFlags.ONE | (EFlags.DF if w[_DF] == 0xFFFFFFFF else 0)
        return self.flags_now()

    @eflags.setter
    def eflags(self, value: int) -> None:
        w = self.words
        w[_CC_OP] = at.CC_OP_EFLAGS
        w[_CC_SRC] = value & ARITHMETIC
        w[_DF] = 0xFFFFFFFF if value & EFlags.DF else 1
        w[_EFLAGS] = value & ~_LAZY | EFlags.ONE
        self._mirror_addseg()

    def prepare_flags(self) -> None:
        """Before the engine is entered: on entry it takes every flag, lazy or not, from EFLAGS itself."""
        self.words[_EFLAGS] = self.eflags
        self.store()

    @property
    def system_flags(self) -> int:
        """IF, IOPL, TF, NT, RF, VM, AC, ID: the flags that are never lazy, without the others."""
        return self.words[_EFLAGS]

    def set_system_flags(self, clear: int, put: int = 0) -> None:
        """Clear and set bits outside the arithmetic flags and DF, leaving lazy flags lazy."""
        w = self.words
        w[_EFLAGS] = w[_EFLAGS] & ~clear | put

    @property
    def inhibited(self) -> bool:
        """The next instruction is in the shadow of STI or of a load of SS (SDM 3A 6.8.3)."""
        return bool(self.words[_HFLAGS] & at.HF_INHIBIT_IRQ)

    @inhibited.setter
    def inhibited(self, value: bool) -> None:
        w = self.words
        if value:
            w[_HFLAGS] |= at.HF_INHIBIT_IRQ
        else:
            w[_HFLAGS] &= ~at.HF_INHIBIT_IRQ & 0xFFFFFFFF

    # Privilege and segments

    @property
    def wide_code(self) -> bool:
        """The code segment is a 32-bit one."""
        return bool(self.words[_HFLAGS] & at.HF_CS32)

    @property
    def cpl(self) -> int:
        return self.words[_HFLAGS] & at.HF_CPL

    def selector(self, segment: int) -> int:
        return self.words[_SEGMENTS + segment * _STRIDE]

    def segment_base(self, segment: int) -> int:
        return self.words[_SEGMENTS + segment * _STRIDE + _BASE]

    def segment_limit(self, segment: int) -> int:
        return self.words[_SEGMENTS + segment * _STRIDE + _LIMIT]

    def segment_flags(self, segment: int) -> int:
        """The second word of the descriptor as it was loaded (type, DPL, D/B, ...)."""
        return self.words[_SEGMENTS + segment * _STRIDE + _FLAGS]

    def load_segment(self, segment: int, selector: int, base: int, limit: int, flags: int) -> None:
        """Fill a hidden segment register, keeping the mirrors as the CPU's own loads do.

        `flags` is the descriptor's second word. Loading SS sets CPL from its DPL; loading CS sets the
        code size.
        """
        w, i = self.words, _SEGMENTS + segment * _STRIDE
        w[i], w[i + _BASE], w[i + _LIMIT], w[i + _FLAGS] = selector, base, limit, flags
        if segment == at.CS:
            w[_HFLAGS] = w[_HFLAGS] & ~at.HF_CS32 | (at.HF_CS32 if flags & 1 << 22 else 0)
        elif segment == at.SS:
            size = at.HF_SS32 if flags & 1 << 22 else 0
            w[_HFLAGS] = w[_HFLAGS] & ~(at.HF_SS32 | at.HF_CPL) | size | flags >> 13 & 3
        self._mirror_addseg()

    def load_descriptor(self, segment: int, selector: int, descriptor: Descriptor) -> None:
        self.load_segment(segment, selector, descriptor.base, descriptor.limit, descriptor.high)

    def load_null(self, segment: int, selector: int = 0) -> None:
        self.load_segment(segment, selector, 0, 0, 0)

    def _mirror_addseg(self) -> None:
        """Whether segment bases must be added: always outside 32-bit protected mode, else if one is not 0."""
        w, s = self.words, _SEGMENTS + _BASE
        plain = w[at.CR0 // 4] & CR0.PE and w[_HFLAGS] & at.HF_CS32 and not w[_EFLAGS] & EFlags.VM
        if plain and not (w[s + at.ES * _STRIDE] | w[s + at.SS * _STRIDE] | w[s + at.DS * _STRIDE]):
            w[_HFLAGS] &= ~at.HF_ADDSEG & 0xFFFFFFFF
        else:
            w[_HFLAGS] |= at.HF_ADDSEG

    def table(self, which: int) -> tuple[int, int]:
        """(base, limit) of GDT, IDT, LDT or TR."""
        i = _SEGMENTS + which * _STRIDE
        return self.words[i + _BASE], self.words[i + _LIMIT]

    def set_table(self, which: int, base: int, limit: int) -> None:
        i = _SEGMENTS + which * _STRIDE
        self.words[i + _BASE], self.words[i + _LIMIT] = base & 0xFFFFFFFF, limit

    # Control registers

    @property
    def cr0(self) -> int:
        return self.words[at.CR0 // 4]

    @cr0.setter
    def cr0(self, value: int) -> None:
        """Mirrors PE, MP, EM and TS; a change of PG, WP or PE needs a TLB flush by the caller."""
        w = self.words
        w[at.CR0 // 4] = value | CR0.ET
        mirrored = (value & (CR0.MP | CR0.EM | CR0.TS)) << 8 | (at.HF_PE if value & CR0.PE else 0)
        w[_HFLAGS] = w[_HFLAGS] & ~(at.HF_PE | at.HF_MP | at.HF_EM | at.HF_TS) & 0xFFFFFFFF | mirrored
        self._mirror_addseg()

    @property
    def cr2(self) -> int:
        return self.words[at.CR2 // 4]

    @cr2.setter
    def cr2(self, value: int) -> None:
        self.words[at.CR2 // 4] = value & 0xFFFFFFFF

    @property
    def cr3(self) -> int:
        return self.words[at.CR3 // 4]

    @cr3.setter
    def cr3(self, value: int) -> None:
        self.words[at.CR3 // 4] = value & 0xFFFFFFFF

    @property
    def cr4(self) -> int:
        return self.words[at.CR4 // 4]

    @cr4.setter
    def cr4(self, value: int) -> None:
        """Mirrors OSFXSR; a change of a paging bit needs a TLB flush by the caller."""
        w = self.words
        w[at.CR4 // 4] = value
        w[_HFLAGS] = w[_HFLAGS] & ~at.HF_OSFXSR & 0xFFFFFFFF | (at.HF_OSFXSR if value & 1 << 9 else 0)

    def word(self, offset: int) -> int:
        """A 32-bit field by its offset in `layout` (DR0.., SYSENTER_*, ERROR_CODE, EFER)."""
        return self.words[offset // 4]

    def set_word(self, offset: int, value: int) -> None:
        self.words[offset // 4] = value & 0xFFFFFFFF

    # Whole states

    def save(self) -> bytes:
        """The whole register file, FPU and SSE included, as bytes."""
        return bytes(self.view)

    def restore(self, saved: bytes) -> None:
        """Put back what `save` gave (the caller flushes the TLB where CR0, CR3 or CR4 may differ)."""
        self.view[:] = saved

    def registers(self) -> dict[str, int]:
        """The registers a report shows: general, EIP, EFLAGS, selectors, control registers."""
        values = {name: self.get(i) for i, name in enumerate(GENERAL)}
        values |= {"eip": self.eip, "eflags": self.eflags}
        values |= {name: self.selector(i) for i, name in enumerate(SEGMENT_NAMES)}
        values |= {"cr0": self.cr0, "cr2": self.cr2, "cr3": self.cr3, "cr4": self.cr4}
        return values
