"""What the translator keeps in the guest's address space, by offset from the base of the monitor's slot.

In-cache code can only use memory that the guest's kernel could reach, too: the CPU does not tell them apart.
So what it writes is little, and the monitor believes nothing of it. (The virtual IF is one byte. To the monitor any
value but 0 means on; a guest that stores another there spoils only what its own PUSHF shows it.) All else is
read-only to the guest's ring 1, and out of reach of its ring 3. The code itself can only be fetched: a load or
store at its addresses finds whatever the guest has there.
"""

from __future__ import annotations

DATA = 0x30000  # scratch page: read and written by in-cache code
SAVED_ECX, SAVED_EDX, TARGET = DATA, DATA + 4, DATA + 8
OLD_FLAG = DATA + 12  # the virtual IF before an IRET to a process, which may fault

FLAG = 0x31000  # the virtual IF, alone in its page: cleared here
RISE = FLAG + 0x1000  # the same page again: set here, and refused while an interrupt waits for that

CONSTANTS = 0x33000  # read-only
CONTROL_REGISTERS = CONSTANTS  # CR0, CR2, CR3, CR4 as the guest sees them, at 4 * number
FLAGS_IMAGE = CONSTANTS + 0x200  # by virtual IF * 256 + byte 1 of EFLAGS: that byte with the virtual IF
USER_FLAGS = CONSTANTS + 0x400  # by byte 1 of an EFLAGS image: 0 where a process may start with it
USER_FLAGS_HIGH = CONSTANTS + 0x500  # the same by byte 2
RING_ONE = CONSTANTS + 0x600  # by the low byte of a selector: 1 where its RPL is 1

TAGS = 0x40000  # by the low 16 bits of an EIP: minus the EIP that has a translation
TRANSLATIONS = 0x80000  # by the same index: where that translation is
LANDINGS = 0xC0000  # by the low 16 bits of a return address: where the check of that address is
TABLE_SIZE = 0x40000

CODE = 0x100000  # the translation cache
CODE_SIZE = 0x200000

SIZE = CODE + CODE_SIZE
FRAME = 0xF100_0000  # where the machine's bus shows all this: above all RAM, at the same offsets
