"""What each guest prints and how it ends: on the bare machine, and under classical trap-and-emulate.

The guests' own headers say it in words. `console` and the rest hold on every machine and under every
correct monitor; the `trap_` fields are set where a critical instruction breaks the guest in that mode. Long
consoles lie in `consoles/`. Lines of a console that begin with "timing:" depend on the clock and on how fast the
machine is: no table has them, and `timeless` leaves them out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vmm.machine.pc import Model

GUESTS = Path(__file__).resolve().parent.parent / "guests"
CONSOLES = Path(__file__).resolve().parent / "consoles"


def timeless(console: str) -> str:
    """What a guest printed, but for the lines that depend on the clock."""
    return "".join(line for line in console.splitlines(keepends=True) if not line.startswith("timing:"))


def long_console(name: str) -> str:
    """The text of a file in `consoles/`."""
    return (CONSOLES / f"{name}.txt").read_text()


@dataclass(frozen=True)
class Expectation:
    """One run: the guest's name, `-D` definitions and input, and what has to come of it."""

    guest: str
    console: str
    status: int | None = 1  # None: it does not end by isa-debug-exit
    defines: Mapping[str, str] = field(default_factory=dict)
    input: bytes = b""
    kind: str = "exit"  # how the machine ends: exit, triple-fault, halt
    trap_console: str | None = None  # None: as `console`
    trap_status: int | None = None  # None: as `status`
    trap_varies: bool = False  # it goes wrong there in ways that depend on the clock or the monitor's tables
    pv: bool = False  # it has a paravirtual build, which prints the same
    model: Model = "isapc"  # the machine that it is for

    @property
    def path(self) -> Path:
        return GUESTS / f"{self.guest}.asm"

    @property
    def right_in_trap(self) -> bool:
        """Whether no critical instruction shows in what it prints in that mode."""
        return self.trap_console is None and not self.trap_varies

    def wanted(self, mode: str) -> tuple[str | None, int | None]:
        """(console, status) in `mode`; None for a console that is only known not to be the right one."""
        if mode != "trap":
            return self.console, self.status
        console = self.console if self.trap_console is None else self.trap_console
        status = self.status if self.trap_status is None else self.trap_status
        return None if self.trap_varies else console, status

    def check(self, mode: str, console: str) -> None:
        """Assert that `console` is what the guest has to print in `mode`."""
        wanted, _ = self.wanted(mode)
        found = timeless(console)
        if wanted is not None:
            assert found == wanted
        else:
            assert found.splitlines()[0] == self.console.splitlines()[0]
            assert found != self.console

    def __str__(self) -> str:
        return " ".join([self.guest, *(f"-D {name}={value}" for name, value in self.defines.items())])


POPF_START = """\
popf: two words that are equal outside of critical sections, and a timer
1. pushf, cli, change both words, popf
   inside: the timer asked, and no tick came           right
"""
POPF_SECOND = "2. pushf, clear IF in the copy, popf, change both words, sti\n"
POPF_TICK = "   after:  the tick came                               right\n"

EXPECTATIONS = (
    Expectation("hello", "Hello from the guest.\n", pv=True),
    Expectation(
        "popf",
        POPF_START
        + POPF_TICK
        + POPF_SECOND
        + "   inside: the timer asked, and no tick came           right\n"
        + POPF_TICK
        + "verdict: RIGHT, POPF set and cleared the interrupt flag\n",
        trap_console=POPF_START
        + "   after:  the timer asked, and no tick came           WRONG: still off\n"
        + POPF_SECOND
        + "   inside: a tick came, and saw the words differ       WRONG: still on\n"
        + POPF_TICK
        + "verdict: WRONG, POPF left the interrupt flag alone and nothing said so\n",
        trap_status=3,
    ),
    Expectation(
        "pushf",
        """\
pushf: what PUSHF says of the flags that we have set
after CLI:             IF=0 IOPL=0  right
after STI:             IF=1 IOPL=0  right
after POPF of IOPL 3:  IF=1 IOPL=3  right
verdict: RIGHT, these flags are ours
""",
        trap_console="""\
pushf: what PUSHF says of the flags that we have set
after CLI:             IF=1 IOPL=0  WRONG
after STI:             IF=1 IOPL=0  right
after POPF of IOPL 3:  IF=1 IOPL=0  WRONG
verdict: WRONG, PUSHF showed somebody else's flags
""",
        trap_status=3,
    ),
    Expectation(
        "redpill",
        """\
redpill: do the registers hold what we loaded?
GDTR by SGDT:  mine
IDTR by SIDT:  mine
LDTR by SLDT:  mine
TR by STR:     mine
CR0 by SMSW:   mine
verdict: alone on the machine
""",
        trap_console="""\
redpill: do the registers hold what we loaded?
GDTR by SGDT:  not mine
IDTR by SIDT:  not mine
LDTR by SLDT:  not mine
TR by STR:     not mine
CR0 by SMSW:   not mine
verdict: somebody is between the machine and me
""",
        trap_status=3,
    ),
    Expectation(
        "pushcs",
        """\
pushcs: which ring does CS say that the kernel runs in?
by PUSH CS:    ring 0
by MOV AX, CS: ring 0
verdict: RIGHT, the kernel has the ring that it was started in
""",
        trap_console="""\
pushcs: which ring does CS say that the kernel runs in?
by PUSH CS:    ring 1
by MOV AX, CS: ring 1
verdict: WRONG, this kernel was put into another ring
""",
        trap_status=3,
    ),
    Expectation("clock", "clock: by the PIT\nclock: 1000 readings, and time never went back\n"),
    Expectation(
        "clock",
        "clock: by RDTSC, in no unit\nclock: 50 readings, and time never went back\n",
        defines={"WAY": "4", "READINGS": "50"},
    ),
    Expectation("clock", "clock: there is no KVM to ask\n", defines={"WAY": "2"}, status=3),
    Expectation("timer", "".join(f"tick {n}\n" for n in range(1, 11)) + "done\n", pv=True),
    Expectation(
        "user",
        """\
kernel: starting a process in ring 3
process: hello
process: CS says ring 3
kernel: #GP in ring 3 at cli, error code 0x00000000
kernel: #GP in ring 3 at in al, 0x64, error code 0x00000000
kernel: #GP in ring 3 at hlt, error code 0x00000000
kernel: #GP in ring 3 at int 0x20, error code 0x00000102
process: bye
kernel: the process ended with code 42
""",
        pv=True,
    ),
    Expectation(
        "fpu",
        """\
fpu: three processes and one FPU
by threes, in a register of the x87: right
by fives, in a register of SSE: right
by sevens, without the FPU: right
switches of tasks: 303, of them with #NM: 202, with another state: 202
verdict: RIGHT
""",
        pv=True,
    ),
    Expectation(
        "faults",
        """\
faults: each exception, its error code, and whether the rest of its frame is as it must be
div by zero:
   #DE, frame right
ud2:
   #UD, frame right
bound, index out of range:
   #BR, frame right
int3:
   #BP, frame right
into, after an overflow:
   #OF, frame right
single step over a nop:
   #DB, frame right
a TSS as a data segment:
   #GP, error code 0x00000028, frame right
an absent data segment:
   #NP, error code 0x00000038, frame right
int past the end of the IDT:
   #GP, error code 0x00000182, frame right
int through an empty gate:
   #GP, error code 0x00000172, frame right
int through an absent gate:
   #NP, error code 0x0000017a, frame right
div by zero without a gate for it:
   #DF, error code 0x00000000, and we live
verdict: RIGHT
""",
    ),
    Expectation(
        "echo",
        'echo: type; a line "quit" or Ctrl-D ends it\nHELLO, QUIT\nQUITE Q[{~\nQUIT\nbye\n',
        input=b"Hello, quit\nquite q[{~\nquit\n",
    ),
    Expectation(
        "echo",
        'echo: type; a line "quit" or Ctrl-D ends it\nNO NEWLINEbye\n',
        input=b"no newline\x04",
    ),
    Expectation("disk", "disk: none; add --disk FILE,snapshot\n", status=3),  # with one: test_disk_guest
    Expectation("apic", long_console("apic"), model="pc"),  # without one: test_pc_model
    Expectation("shutdown", "shutdown: by isa-debug-exit with 3\n", status=7),
    Expectation("shutdown", "shutdown: by isa-debug-exit with 0\n", status=1, defines={"VALUE": "0"}),
    Expectation(
        "shutdown", "shutdown: by triple fault\n", status=None, defines={"TRIPLE": "1"}, kind="triple-fault"
    ),
    Expectation(
        "shutdown",
        "shutdown: by HLT with interrupts off\n",
        status=None,
        defines={"HALT": "1"},
        kind="halt",
    ),
    Expectation("paging", long_console("paging")),
    Expectation("processes", long_console("processes"), trap_status=3, trap_varies=True, pv=True),
    Expectation("threads", long_console("threads"), pv=True),
    Expectation("smc", long_console("smc")),
    Expectation("stress", long_console("stress"), trap_varies=True),
)
