"""One timed loop in a process of its own, for `tools.bench`: prints seconds.

python -m tools.bench.one LOOP ROUNDS bare|native|trap [host|instructions [BUDGET]]
"""

from __future__ import annotations

import sys

from tools.bench import baseline, guests
from tools.bench.timing import seconds


def main(loop: str, rounds: str, mode: str, clock: str = "host", budget: str = "") -> float:
    code: bytes = getattr(guests, loop)(int(rounds))
    if mode == "bare":
        return baseline.run(code)
    assert clock in ("host", "instructions")
    return seconds(code, mode, "host" if clock == "host" else "instructions", int(budget) if budget else None)


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
