"""A fixed short run of the fuzzer (`tools/fuzz.py`); `make test-long` has the hour."""

from __future__ import annotations

import pytest

from tools import fuzz
from vmm.vm import UNMODIFIED


def test_random_guests_end_within_their_budget() -> None:
    """Random code, descriptors, TSSs and page tables end every time in an outcome, the process intact."""
    assert fuzz.campaign(0, 120, 60.0, sorted(UNMODIFIED)) == []


@pytest.mark.parametrize("seed", (10454, 10539, 10332, 10447, 10985, 11402, 111454, 113874, 121746))
@pytest.mark.parametrize("mode", sorted(UNMODIFIED))
def test_cases_that_once_failed(seed: int, mode: str) -> None:
    """What the fuzzer once found stays found: locked port instructions, a first block, endless faults, a limit
    passed by one, a block that goes round the end of the address space.
    """
    assert fuzz.run_case(seed, mode) in {"budget", "halt", "triple-fault", "error", "exit"}


def test_every_two_byte_opcode_in_turn() -> None:
    """A guest may execute every two-byte opcode, with every ModRM group digit, and only ever end itself."""
    for mode in sorted(UNMODIFIED):
        for first in range(256):
            assert fuzz.run_opcodes(first, mode) in {"halt", "budget", "triple-fault", "error"}, hex(first)
