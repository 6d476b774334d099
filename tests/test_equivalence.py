"""Equivalence, the property that everything hangs on: a random guest cannot tell a mode from the bare machine.

`tests/equivalence` makes the guests; `python -m tools.equivalence` runs campaigns of ten thousands.
"""

from __future__ import annotations

import random
import struct
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.equivalence import layout as at
from tests.equivalence import source, third
from tests.equivalence.encode import encode, plain
from tests.equivalence.guest import ATOMS, MEMORY, SALT, Chunk, Guest, guests, random_guest
from tests.equivalence.mutants import MUTANTS, Mutant
from tests.equivalence.run import BUDGET, Attach, compare, differences, observe, slices
from tests.equivalence.shrink import shrink
from tests.machines import encoder
from tests.oracles import require
from tests.program_atoms import Salt, Step
from vmm.image.asm import assemble_text
from vmm.image.image import Image
from vmm.image.load import load_image
from vmm.isa.disassemble import disassemble
from vmm.isa.vectors import Vector
from vmm.vm import hardware

# What must not be told from the bare machine: modes, and hvm with what can be asked of it.
MODES = ("bt", "hvm")
WAYS: dict[str, tuple[str, Attach | None]] = {
    **{mode: (mode, None) for mode in MODES},
    "hvm, all intercepts": ("hvm", hardware("all")),
    "hvm, shadow": ("hvm", hardware("", "shadow")),
}
BATCHES, BATCH = 10, 20
FEW = 30  # guests for each way that is not a mode of its own
FOUND = sorted(source.FOUND.glob("*.asm"))


def numbered(seed: str, number: int) -> Guest:
    return random_guest(random.Random(f"{seed}/{number}"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch", range(BATCHES))
def test_a_random_guest_cannot_tell_the_mode(mode: str, batch: int) -> None:
    """Console, registers, memory, outcome, and each delivery with its moment are the bare machine's."""
    for number in range(batch * BATCH, (batch + 1) * BATCH):
        guest = numbered("ci", number)
        assert not compare(guest.image(), mode), (
            f"python -m tools.equivalence --seed ci --start {number} --guests 1"
        )


@pytest.mark.parametrize("way", sorted(WAYS.keys() - {*MODES}))
def test_nor_how_its_monitor_was_asked_to_work(way: str) -> None:
    """The same with every intercept, and with shadow page tables."""
    mode, attach = WAYS[way]
    for number in range(FEW):
        assert not compare(numbered("ways", number).image(), mode, attach=attach), number


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(guest=guests())
def test_a_small_guest_cannot_tell_the_mode(mode: str, guest: Guest) -> None:
    """The same for guests that Hypothesis chooses, and makes smaller where it fails."""
    assert not compare(guest.image(), mode)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("path", FOUND, ids=lambda path: path.stem)
def test_what_was_once_told_apart_no_longer_is(path: Path, way: str) -> None:
    """A guest that a mode once ran differently runs in each mode as on the bare machine."""
    mode, attach = WAYS[way]
    assert not compare(load_image(path, memory=MEMORY), mode, attach=attach)


def test_a_guest_that_is_paused_goes_on_as_if_it_had_not_been() -> None:
    """The bare machine, stopped at random moments, comes to the same: the generator leaves nothing undefined."""
    for number in range(40):
        image = numbered("slices", number).image()
        assert not differences(
            image, observe(image, "native"), observe(image, "native", stops=slices(number))
        )


def test_qemu_comes_to_the_same(tmp_path: Path) -> None:
    """What the architecture defines is the same on QEMU: console, exceptions, registers, data, page tables."""
    require("qemu-system-i386")
    compared = 0
    for number in range(8):
        guest = random_guest(random.Random(f"third/{number}"), third=True)
        image = guest.image()
        mine = observe(image, "native", third.BUDGET)
        if mine.outcome[0] == "exit":
            theirs = third.on_qemu(image, tmp_path)
            assert theirs is not None
            assert not third.differences(image, mine, theirs)
            compared += 1
    assert compared >= 5


def test_guests_end_and_do_everything() -> None:
    """Nearly all random guests end by themselves, and among them every exception and interrupt comes up."""
    outcomes: Counter[str] = Counter()
    vectors: Counter[int] = Counter()
    for number in range(150):
        seen = observe(numbered("census", number).image(), "native")
        outcomes[seen.outcome[0]] += 1
        vectors.update(vector for vector, *_ in seen.deliveries)
    assert outcomes["exit"] > 125
    wanted = {
        Vector.DE,
        Vector.DB,
        Vector.BP,
        Vector.OF,
        Vector.BR,
        Vector.UD,
        Vector.NM,
        Vector.NP,
        Vector.GP,
        Vector.PF,
    }
    assert {int(v) for v in wanted} | {at.TIMER, at.END, at.BECOME_KERNEL, *at.SERVICES} <= vectors.keys()


@pytest.mark.parametrize("atom", ATOMS)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(salt=st.integers(0, SALT - 1), address=st.sampled_from((at.BODY, at.BODY + 0xFFB)))
def test_an_atom_is_what_the_assembler_makes_of_its_text(atom: str, salt: int, address: int) -> None:
    """Assembled once and patched, an atom is byte for byte its text assembled where it stands."""
    text = ATOMS[atom](Salt(salt))
    code = encode(text, address)
    whole = assemble_text(
        f"bits 32\norg {address:#x}\natom:\n" + plain(text).replace(";", "\n") + "\n", encoder=encoder()
    )
    if code != whole.data:  # a small number takes fewer bytes there: then the instructions must be the same
        mine, theirs = (" ".join(i.mnemonic for i in disassemble(c, address)) for c in (code, whole.data))
        assert mine == theirs


def test_a_failure_is_kept_as_a_file_that_is_the_same_guest(tmp_path: Path) -> None:
    """What is written for a failing guest assembles to its memory."""
    guest = numbered("file", 1)
    image = load_image(source.write(guest, "guest", ["a reason"], tmp_path), memory=MEMORY)
    assert image.entry == guest.image().entry
    (written,) = (segment for segment in image.segments if segment.address == at.KERNEL)
    for address, data in guest.segments().items():
        data = data.rstrip(b"\0")
        assert written.data[address - at.KERNEL : address - at.KERNEL + len(data)] == data


def test_a_failure_is_made_as_small_as_it_goes() -> None:
    """The shrinker leaves the one atom that matters, and nothing around it."""

    def fails(guest: Guest) -> bool:
        return any(step.atom == "sysenter" for chunk in guest.chunks for step in chunk.steps)

    guest = replace(
        numbered("shrink", 5), chunks=(*numbered("shrink", 6).chunks, Chunk((Step("sysenter", 77),), True, 5))
    )
    assert shrink(guest, fails) == Guest((Chunk((Step("sysenter", 0),)),))


def test_a_difference_is_told() -> None:
    """A changed byte of memory, register, delivery or console is found and named."""
    guest = Guest((Chunk((Step("software", 1), Step("move", 3))),))
    image = guest.image()
    one, other = observe(image, "native"), observe(image, "native")
    assert not differences(image, one, other)
    page = bytearray(other.pages[at.LOG])
    page[5] ^= 1
    other.pages[at.LOG] = bytes(page)
    other.registers["ebx"] ^= 1
    vector, code, eip, moment = other.deliveries[0]
    other.deliveries[0] = (vector, code, eip, moment + 1)
    other.console += b"!"
    lines = "\n".join(differences(image, one, other))
    for part in (f"{at.LOG + 5:#x}", "ebx", f"after {moment + 1}", "console"):
        assert part in lines


def test_the_log_tells_the_registers_at_each_exception() -> None:
    """The kernel's records hold vector, frame and registers, so a wrong register shows at the next exception."""
    code = Guest((Chunk((Step("divide", 0),), user=True, salt=0x1234 << 20),))
    seen = observe(code.image(), "native")
    record = struct.unpack_from("<16I", seen.pages[at.LOG])
    assert (
        record[0] == seen.deliveries[0][0]
        and record[2] == seen.deliveries[0][2]
        and record[3] == at.USER_CODE
    )


QUICK = ("POPF: takes the opposite of IF", "PUSHF: shows the real IF", "Jcc: has the opposite condition")


@pytest.mark.parametrize("mutant", [m for m in MUTANTS if m.name in QUICK], ids=lambda m: m.name)
def test_a_broken_sequence_is_noticed(mutant: Mutant) -> None:
    """A few guests are enough to notice a sequence of the translator that is a little wrong."""
    assert noticed(mutant, 20)


@pytest.mark.long
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_each_broken_sequence_is_noticed(mutant: Mutant) -> None:
    """Whichever sequence is broken, the property finds it."""
    assert noticed(mutant, 400)


def noticed(mutant: Mutant, most: int) -> bool:
    """Whether one of so many guests runs differently with the sequence broken, and does not without."""
    for number in range(most):
        image = numbered("mutants", number).image()
        with mutant.applied():
            found = differs(image)
        if found and not differs(image):
            return True
    return False


def differs(image: Image) -> bool:
    try:
        return bool(compare(image, "bt", budget=BUDGET // 4))
    except Exception:  # the monitor itself noticed
        return True
