"""What a page of translations has to explain: what becomes of instructions, the monitor's cells, what is copied.

It is data, and the two functions that make a legend and a note of it.
"""

from __future__ import annotations

import re
import textwrap
from enum import StrEnum

WIDTH = 132  # of the page


class Fate(StrEnum):
    """What became of a guest instruction, as the last column begins."""

    IDENTICAL = "identical"
    CHAINED = "chained"
    LOOKED_UP = "looked up"
    IN_CACHE = "in cache"
    CALL_OUT = "call-out"
    UNDEFINED = "undefined"


FATES = {
    Fate.IDENTICAL: "copied byte for byte",
    Fate.CHAINED: "a direct jump or call: another displacement, and no exit once its target is translated",
    Fate.LOOKED_UP: "an indirect jump, call or return: a short search, and no exit when it finds something",
    Fate.IN_CACHE: "a few instructions in its place, and no exit",
    Fate.CALL_OUT: "an exit, always: the monitor emulates it",
    Fate.UNDEFINED: "no instruction: the guest gets #UD",
}

# What the monitor keeps in the guest's address space, as far as translations name it.
CELLS = {
    "FLAG": "the virtual IF: one byte, and any value but 0 means on. The real IF stays on all the time",
    "RISE": "the same byte, seen at another address. Here it is set, which is refused, and so an exit, while an"
    " interrupt is waiting for just that. POPF and IRET name it as FLAG + ECX",
    "OLD_FLAG": "what it was before an IRET to a process, which may fault",
    "SAVED_ECX": "ECX while a sequence needs the register; from here it is taken back if the sequence is interrupted",
    "SAVED_EDX": "the same for EDX",
    "TARGET": "where a look-up is about to jump",
    "TAGS": "by the low 16 bits of a guest EIP: minus the EIP that has a translation, so that adding it gives 0",
    "TRANSLATIONS": "by the same index: where that translation is",
    "LANDINGS": "by the low 16 bits of a return address: where a RET to it lands. There the address, which still lies"
    " below ESP, is compared with the one expected; another's goes on to the next landing of that index, if there is"
    " one, else to a trap",
    "CONTROL_REGISTERS": "CR0, CR2, CR3 and CR4 as the guest believes them to be; 4 bytes each, by number",
    "FLAGS_IMAGE": "byte 1 of EFLAGS with the virtual IF put in: by IF * 256 and that byte",
    "USER_FLAGS": "0 where a process may start with this byte 1 of EFLAGS (IF on, no IOPL, no NT)",
    "USER_FLAGS_HIGH": "the same by byte 2 (no VM)",
    "RING_ONE": "1 where a selector has RPL 1, with which ring 1 may do what ring 0 may not",
}

# The first pattern that fits a translated instruction says something about it.
_NOTES = [
    (re.compile(pattern), note)
    for pattern, note in (
        (r"trap$", "  exit"),
        (r"mov cs:\[SAVED_(E.X)\]", r"  \1 is kept"),
        (r"mov ecx, (?:dword )?\[esp - 4\]", "  a RET lands here. Is it this address?"),
        (r"mov (e.x), cs:\[SAVED", "  and back"),
        (r"mov (?:byte )?cs:\[RISE\], 1", "  the virtual IF is on"),
        (r"mov (?:byte )?cs:\[FLAG\], 0", "  the virtual IF is off"),
        (r"set\w+ (?:byte )?cs:\[FLAG", "  IF of the image is the virtual IF now"),
        (r"shl ecx, 3$", "  RISE - FLAG, or 0"),
        (r".*cs:\[OLD_FLAG", "  in case that the IRET faults"),
        (r".*cs:\[FLAG\]", "  the virtual IF"),
        (r".*cs:\[FLAGS_IMAGE", "  byte 1 of the flags, the guest's"),
        (r".*cs:\[USER_FLAGS_HIGH", "  not to virtual-8086 mode"),
        (r".*cs:\[USER_FLAGS", "  0: a process may start like this"),
        (r".*cs:\[RING_ONE", "  0: harmless"),
        (r".*cs:\[TAGS", "  minus the EIP that is in the table here"),
        (r".*cs:\[TRANSLATIONS", "  it is: so this is its translation"),
        (r"jmp (?:dword )?cs:\[TARGET", "  on, in the cache"),
        (r"jmp (?:dword )?cs:\[LANDINGS", "  on, in the cache: there it is checked"),
        (r"jmp -> \(next", "  another's: on to the next of its index"),
        (r"jmp -> \(pre", "  where it went before"),
        (r"lea ecx, \[ecx - \(pre", "  0 if it goes where it went before"),
        (r"lea ecx, \[ecx \+ \(pre", "  not there: as it was"),
        (r"lea ecx, \[ecx - 0x[0-9a-f]+\]$", "  0 if they are equal"),
    )
]

# Sensitive instructions that are copied all the same, by their rows in the classification.
_AN_EXIT = "copied: always an exit, delivered through the guest's IDT"
_CARRIES = "copied: shows the guest's own value here"
COPIED = {
    "SIDT": _CARRIES,
    "SLDT": _CARRIES,
    "STR": _CARRIES,
    "SMSW": _CARRIES,
    "INT n": _AN_EXIT,
    "INT3": _AN_EXIT,
    "INTO": "copied: an exit when OF is set, delivered through the guest's IDT",
    "INT1": _AN_EXIT,
    "SYSENTER": "copied: always an exit, by the guest's own MSRs",
    "SYSCALL": "copied: EFER.SCE is clear, so it raises #UD as it must",
    "CPUID": "copied: the machine answers it, in every mode alike",
    "XGETBV": "copied: CR4.OSXSAVE is clear, so it raises #UD as it must",
}
PRIVILEGED = "copied: privileged, so an exit by itself"


def note(text: str) -> str:
    """What there is to say about a translated instruction, or ""."""
    for pattern, said in _NOTES:
        if match := pattern.match(text):
            return match.expand(said).replace("ecx is", "ECX is").replace("edx is", "EDX is")
    return ""


def legend(guest: str) -> list[str]:
    """The lines at the top of the page."""
    lines = [
        f"Translations of {guest}",
        "",
        *_paragraph(
            "The guest's kernel runs in ring 1, and never from its own code: before a piece of it runs for the first"
            " time it is translated into the cache. A unit is a run of instructions up to a jump that is always"
            " taken, the end of the page, or 48 instructions. The guest's code stands on the left, what runs instead"
            " in the middle, and the reason on the right wherever the two differ. Units stand in the order in which"
            " they were made."
        ),
        "",
        "What becomes of an instruction:",
        "",
        *(f"  {fate:<10}  {text}" for fate, text in FATES.items()),
        "",
        *_paragraph(
            "Some sensitive instructions are copied, too. What is privileged is an exit by itself. And SIDT, SLDT,"
            " STR and SMSW read registers that the CPU has no use for while such a kernel runs: so they hold the"
            " guest's values, not the monitor's."
        ),
        "",
        "How a translation is written here:",
        "",
    ]
    for term, text in (
        ("-> 00100450", "goes to the translation of the guest's instruction at that address. While there is none it"
         " goes to a stub at the end of the unit, one byte long, whose exit has it made; after that the jump is"
         " changed to lead there, and never exits again. Only stubs are listed that the unit was made with."),
        ("(predicted)", "goes to the translation of where the look-up went the first time, if ECX has become 0 by"
         " subtracting that address. Until then the prediction is address 0."),
        ("trap", "an exit to the monitor: HLT, one byte, which raises #GP in ring 1. The monitor knows from the"
         " address what it stands for, puts back what a sequence keeps in its cells, and does what the guest's"
         " instruction asks for, or delivers the fault that it deserves."),
        ("000420", "an address in the cache. It lies in four megabytes that the guest maps nothing at."),
        ("cs:[NAME]", "a cell of the monitor's. Through CS, since that is the one segment register whose contents the"
         " monitor chooses. Flags are left alone where the guest could see them: hence LEA and JECXZ instead of"
         " SUB and JZ. Nothing is written below ESP."),
    ):  # fmt: skip
        lines += _entry(term, text)
    lines += ["", "The cells:", ""]
    for name, text in CELLS.items():
        lines += _entry(name, text)
    return [*lines, ""]


def _paragraph(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH - 12)


def _entry(term: str, text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH - 12, initial_indent=f"  {term:<17}  ", subsequent_indent=" " * 21)
