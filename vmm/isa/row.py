"""What the classification says of one instruction: the shape of a row.

The hard part is that x86 does not answer Popek and Goldberg's question (is it privileged?) with yes or no.
Some instructions trap outside ring 0 always, some only when the monitor keeps IOPL, CR4.TSD or CR4.PCE as it
should. `Trap` says which, and an instruction counts as privileged when the monitor can have it trap.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

# The two kinds of Robin and Irvine (see `vmm.isa.classification`).
PAPER_REGISTERS = "Robin and Irvine 2000, sensitive register instructions"
PAPER_PROTECTION = "Robin and Irvine 2000, protection system references"


class Trap(StrEnum):
    """When an instruction traps outside ring 0, in states in which it would not trap in ring 0."""

    ALWAYS = "always"
    IOPL = "when CPL > IOPL"
    IO = "when CPL > IOPL and the TSS's I/O bitmap does not allow the port"
    TSD = "when CR4.TSD is set"
    PCE = "when CR4.PCE is clear"
    NEVER = "never"


@dataclass(frozen=True, slots=True)
class Row:
    """One row: which encodings, when they trap, how they are sensitive, why, and according to whom.

    `name` is unique; `entry` is the name in summaries ("MOV" for "MOV from CS"). `keys` are decoder keys
    (`Instruction.key`), followed by m or r where only the memory or the register form is meant. `effect`
    says what the instruction should have done, and what it does outside ring 0. `needs` names what a
    processor may lack; without it the instruction raises #UD in every ring.
    """

    name: str
    forms: str
    keys: tuple[str, ...]
    trap: Trap
    reason: str
    effect: str
    source: str
    control: bool = False
    mode_bound: bool = False
    location_bound: bool = False
    needs: str = ""
    entry: str = ""

    @property
    def summary(self) -> str:
        """The name in summaries."""
        return self.entry or self.name

    @property
    def privileged(self) -> bool:
        """It traps outside ring 0, given that the monitor keeps the controls that decide it."""
        return self.trap is not Trap.NEVER

    @property
    def sensitive(self) -> bool:
        return self.control or self.mode_bound or self.location_bound

    @property
    def critical(self) -> bool:
        return self.sensitive and not self.privileged

    @property
    def among_seventeen(self) -> bool:
        """Whether Robin and Irvine list it."""
        return self.source.startswith("Robin")
