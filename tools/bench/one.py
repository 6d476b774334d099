"""One timed loop in a process of its own, for `tools.bench`: prints seconds.

python -m tools.bench.one LOOP ROUNDS bare|native|trap [host|instructions [BUDGET]]
"""

from __future__ import annotations

import sys

from tools.bench import baseline, guests
from tools.bench.timing import seconds
from vmm.vm import ClockName


def main(loop: str, rounds: str, mode: str, clock: str = "host", budget: str = "") -> float:
    def timed(count: int) -> float:
        code: bytes = getattr(guests, loop)(count)
        if mode == "bare":
            return baseline.run(code)
        name: ClockName = "host" if clock == "host" else "instructions"
        return seconds(code, mode, name, int(budget) if budget else None)

    timed(10)  # what is imported and compiled at the first exit is not the loop's
    return timed(int(rounds))


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
