"""Code that the CPU engine cannot survive: its translator aborts the whole process.

LOCK before the register form of BT, BTS, BTR or BTC is #UD by the manual. Unicorn 2.1.4 instead fails an
assertion of its code generator, before any hook is called, as soon as it translates a block that contains
such an instruction, even one that is never reached. So whoever lets a guest fetch code must look first.

The hard part is that an instruction can start at any byte. The pattern needs no knowledge of where: wherever
it matches, control that arrives at one of the prefixes it begins with is about to execute that instruction.
"""

from __future__ import annotations

import re

_PREFIXES = rb"[\x26\x2e\x36\x3e\x64-\x67\xf0\xf2\xf3]*"

# Prefixes with LOCK among them, then 0F A3, AB, B3, BB with ModRM.mod 3, or 0F BA /4 to /7 with it.
ABORTS = re.compile(
    _PREFIXES + rb"\xf0" + _PREFIXES + rb"\x0f(?:[\xa3\xab\xb3\xbb][\xc0-\xff]|\xba[\xe0-\xff])", re.DOTALL
)
