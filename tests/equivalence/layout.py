"""Where everything lies in a random guest: physical addresses, and linear ones where paging is on.

All of low memory is mapped to itself in each address space, so the kernel's addresses are good in either. The
*window* is where pages come, go and alias: sixteen pages whose table entries a guest edits.
"""

from __future__ import annotations

KERNEL = 0x100000  # the skeleton's code, never modified
GDT, LDT, TSS, IDT = 0x110000, 0x110400, 0x110800, 0x111000
TABLES_END = 0x111800
TASK_LIMIT = 0xFF  # the TSS and its I/O bitmap
VARIABLES = 0x113000
CHUNKS = 0x113400  # a record of eight words each: see `kernel.CHUNK`
STARTS = 0x114000  # the first address of each atom, ascending, and how many
LOG, LOG_END = 0x116000, 0x11E000
KERNEL_STACK, CHUNK_STACK, GATE_STACK, SYSENTER_STACK = 0x122000, 0x123000, 0x124000, 0x125000  # tops
USER_STACK = 0x129000
PRISTINE = 0x12A000  # a copy of GDT to IDT, and behind it one of the window's tables
PRISTINE_WINDOW = 0x12C000
BODY, BODY_END = 0x130000, 0x13C000
JIT = 0x13C000  # two pages for code that guests write
LOW = 0x7000  # where 16-bit returns arrive; a double word behind it says where they then go
LOW_BACK = 0x7100
DATA, DATA_END = 0x140000, 0x144000
DIRECTORY, IDENTITY, WINDOW_TABLE = 0x150000, 0x151000, 0x152000
OTHER_DIRECTORY, OTHER_WINDOW = 0x153000, 0x154000
MAPPED = 0x400000  # what `IDENTITY` maps to itself
WINDOW, WINDOW_PAGES = 0x400000, 16
NOWHERE = 0x800000  # linear: never mapped
LARGE = 0xC00000  # linear: a 4 MiB page onto physical 0, where the guest has one

KERNEL_CODE, KERNEL_DATA, USER_CODE, USER_DATA = 0x08, 0x10, 0x1B, 0x23
TASK, LOCAL, GATE = 0x28, 0x30, 0x68
SPARE = (0x80, 0x88, 0x90, 0x98)  # GDT entries that guests edit
TIMER, END, BECOME_KERNEL = 0x20, 0x40, 0x41
SERVICES = range(0x30, 0x38)

# Variables of the kernel, by name. `PORT_MASK` to `DUMP` are what a guest is set up with.
_NAMES = (
    "CHUNK", "CHUNK_COUNT", "ROUNDS", "LOG_AT", "STEPS", "TICKS", "TICK_SUM", "TICKS_HERE", "FAULTS_HERE",
    "DEMANDS", "DIRTY", "JUMP", "GATES", "SYSENTERS", "START_COUNT", "PORT_MASK", "PERIOD", "BOOT_CR0",
    "BOOT_CR3", "BOOT_CR4", "DUMP",
)  # fmt: skip
VARIABLE = {name: VARIABLES + 4 * i for i, name in enumerate(_NAMES)}
WINDOW_DEMAND = VARIABLES + 0x100  # by page of the window: the entry that a page fault puts there, or 0
assert VARIABLES + 4 * len(_NAMES) <= WINDOW_DEMAND

# Patience of the kernel with one chunk.
MOST_FAULTS, MOST_TICKS, MOST_DEMANDS = 40, 50, 12
