"""The process that runs Keystone: instruction texts in, machine code out. It imports nothing of this package.

Keystone can loop for ever on a text that it does not understand, so it never runs in the assembler's own
process: this file is run as a script in another one (see `engine.py`), which can be killed. It starts with
`python -I -S` and the folder of the `keystone` package as its argument, which loads in half the time that a
full start takes.

Protocol, one line each: a batch of texts, ended by an empty line; then for each text in order `=` and the
code in hexadecimal, or `!` and Keystone's error number. End of input ends the process.
"""

import resource
import sys
from typing import Any

CPU_SECONDS = 600  # ends a hang that nobody is left to kill, the assembler's own process having died


def serve(folder: str) -> None:
    """Answer batches from stdin on stdout until stdin ends."""
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    sys.path.append(folder)
    import keystone

    engine: Any = keystone.Ks(keystone.KS_ARCH_X86, keystone.KS_MODE_32)
    batch: list[str] = []
    for line in sys.stdin:
        text = line.rstrip("\n")
        if text:
            batch.append(text)
            continue
        for text in batch:
            try:
                code, _ = engine.asm(text, as_bytes=True)
                answer = "=" + (code or b"").hex()
            except keystone.KsError as error:
                answer = f"!{error.errno}"
            # Flushed one by one: when the engine hangs, what has been answered says on which text.
            sys.stdout.write(answer + "\n")
            sys.stdout.flush()
        batch.clear()


if __name__ == "__main__":
    serve(sys.argv[1])
