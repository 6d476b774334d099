"""Benchmarks from the command line.

python -m tools.bench            what exits, time and translation cost, as ratios (`costs`)
python -m tools.bench nano       the nanobenchmarks, on every machine (`nano`)
python -m tools.bench linux      a stock Linux to userspace, on every machine (`linux`)
python -m tools.bench clocks     what it costs to read the time (`clocks`)
python -m tools.bench.profile    where the time of an exit goes
"""

from __future__ import annotations

import sys


def main(words: list[str]) -> int:
    if words[:1] == ["nano"]:
        from tools.bench.nano.run import main as nano

        return nano(words[1:])
    if words[:1] == ["linux"]:
        from tools.bench.linux.run import main as linux

        return linux(words[1:])
    if words[:1] == ["clocks"]:
        from tools.bench.clocks import main as clocks

        return clocks(words[1:])
    from tools.bench.costs import main as costs

    return costs(words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
