"""The lock-step tool: the instruction that it names is the one that did it, whatever was done and whenever."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.guest_expectations import GUESTS
from tools.lockstep.keep import keep
from tools.lockstep.search import Equal, Found, Search
from vmm.comparison import Comparer
from vmm.errors import GuestError, VmmError
from vmm.image.asm import assemble_text
from vmm.image.image import Image
from vmm.image.load import from_assembly, load_image
from vmm.isa.decode import Instruction
from vmm.monitor.deprivileged.emulate import Machinery
from vmm.monitor.translator.emulate import ROWS
from vmm.vm import UNMODIFIED, VirtualMachine

MEMORY = 16 << 20
ROUNDS = 20_000
BEFORE, EACH = 3, 5  # instructions before the loop, and in it
WORD = 0x345678

LOOP = f"""\
bits 32
org 0x100000
start:  mov esp, 0x200000
        xor edi, edi
        mov dword [{WORD:#x}], 0x1234
next:   wbinvd
        add esi, edi
        inc edi
        cmp edi, {ROUNDS}
        jb next
        mov al, 0
        out 0xf4, al
"""

Wrong = Callable[[Machinery], None]


def guest() -> Image:
    return from_assembly("loop", assemble_text(LOOP, "loop.asm"))


def wrong_after(calls: int, wrong: Wrong, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have bt do something wrong when it has emulated WBINVD so many times."""
    row, done = ROWS["0F09"], 0

    def handler(m: Machinery, instruction: Instruction) -> bool | None:
        nonlocal done
        result = row.handler(m, instruction)
        done += 1
        if done == calls:
            wrong(m)
        return result

    monkeypatch.setitem(ROWS, "0F09", replace(row, handler=handler))


def search(image: Image, reference: str, other: str, limit: int | None = None) -> Found | Equal:
    return Search(
        *(VirtualMachine(image, mode, memory=MEMORY) for mode in (reference, other)), limit=limit
    ).run()


def flips_a_bit_of_eax(m: Machinery) -> None:
    m.machine.state.set(0, m.machine.state.get(0) ^ 0x100)


def stores_a_word(m: Machinery) -> None:
    m.machine.memory.write(WORD, 4, 0x4321)


@pytest.mark.parametrize("reference", ("native", "hvm"))
@pytest.mark.parametrize("calls", (1, 2, 777, ROUNDS))
@pytest.mark.parametrize("wrong", (flips_a_bit_of_eax, stores_a_word), ids=("register", "memory"))
def test_the_one_wrong_instruction_is_found(
    wrong: Wrong, calls: int, reference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of twenty thousand emulated instructions goes wrong: that one is named, with what it did and its moment."""
    wrong_after(calls, wrong, monkeypatch)
    found = search(guest(), reference, "bt")
    assert isinstance(found, Found)
    blamed = found.divergence
    assert blamed.instruction == "wbinvd" and blamed.symbol == "next" and not blamed.explained
    assert blamed.at == BEFORE + EACH * (calls - 1)
    assert found.before["edi"] == calls - 1
    if wrong is stores_a_word:
        assert not blamed.difference.registers
        assert [(s.address, s.before, s.after) for s in found.stores] == [(WORD, 0x1234, (0x1234, 0x4321))]
    else:
        assert set(blamed.difference.registers) == {"eax"} and not found.stores


def test_the_last_exits_are_told_up_to_the_one_that_did_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last hundred of each mode with moment and place: under bt, the emulation that went wrong is the last."""
    wrong_after(777, flips_a_bit_of_eax, monkeypatch)
    found = search(guest(), "native", "bt")
    assert isinstance(found, Found)
    native, bt = found.traces
    assert (native.mode, bt.mode) == ("native", "bt")
    assert len(bt.exits) == 100
    (last, name), (before, _) = bt.exits[-1], bt.exits[-2]
    assert name == "next" and "WBINVD" in last.reason and last.ring == 1
    assert last.at - before.at == EACH
    assert last.at == found.divergence.at + 1


@pytest.mark.parametrize("name", ("popf", "pushcs"))
def test_it_names_what_compare_names(name: str) -> None:
    """Where nothing heals, the first difference is the lasting one: instruction, moment and sentence are the same."""
    image = load_image(GUESTS / f"{name}.asm", memory=MEMORY)
    theirs = Comparer(image).compare(["trap"]).runs[0].divergence
    found = search(image, "native", "trap")
    assert isinstance(found, Found) and theirs is not None
    assert (found.divergence.at, found.divergence.eip) == (theirs.at, theirs.eip)
    assert found.divergence.should == theirs.should and found.divergence.explained


@pytest.mark.parametrize("other", ("bt", "hvm"))
def test_where_nothing_differs_it_says_so(other: str) -> None:
    """To the end of the guest, or as far as it was to look."""
    image = load_image(GUESTS / "timer.asm", memory=MEMORY)
    whole = search(image, "native", other)
    assert isinstance(whole, Equal) and whole.endings[0] == whole.endings[1] != ""
    assert search(image, "native", other, limit=1500) == Equal(1500, ("", ""))


@pytest.mark.parametrize("mode", UNMODIFIED)
def test_a_machine_that_was_kept_goes_on_as_if_nothing_had_been(mode: str) -> None:
    """In every mode: what it comes to is the same, whatever the machine that it was copied from did meanwhile."""
    image = load_image(GUESTS / "processes.asm", memory=MEMORY)

    def come_to(vm: VirtualMachine) -> tuple[object, ...]:
        result = vm.run(3_000_000)
        return result.outcome, result.instructions, result.console, result.registers, result.memory_sha256

    whole = come_to(VirtualMachine(image, mode, memory=MEMORY))
    vm = VirtualMachine(image, mode, memory=MEMORY)
    vm.run(300_000)
    kept, dropped = keep(lambda: come_to(vm)), keep(lambda: come_to(vm))
    assert come_to(vm) == whole
    assert kept.resume() == whole
    dropped.drop()


def test_what_goes_wrong_in_a_kept_process_is_raised_here() -> None:
    """An error of the task's comes back as itself; a process that died is told, not waited for."""

    def fail() -> None:
        raise GuestError("the guest did it")

    with pytest.raises(GuestError, match="the guest did it"):
        keep(fail).resume()
    with pytest.raises(VmmError, match="died"):
        keep(lambda: os._exit(3)).resume()


def run(*words: str | Path) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "tools.lockstep", *map(str, words)], capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout, done.stderr


def test_the_command_tells_what_it_found() -> None:
    """The instruction, what is wrong with it, both trails and a status; each sample on standard error meanwhile."""
    status, out, err = run(GUESTS / "popf.asm", "--modes", "native,trap")
    assert status == 14
    assert "> popf" in out and "IF should have become 1; it stayed 0." in out
    assert "The last 100 exits in native" in out and "exits in trap" in out
    assert "putc.busy" in out
    assert err.splitlines()[-1].split() == ["after", "402,079", "instructions:", "different"]
    status, out, _ = run(GUESTS / "hello.asm", "--modes", "bt,hvm")
    assert status == 0 and out.startswith("No difference between bt and hvm in ")


def test_the_machine_may_be_any_that_run_has(tmp_path: Path) -> None:
    """A disk, a PC with APIC, KVM's interface, shadow tables under hvm; the disk's file is as it was."""
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 16))
    for words in (
        (GUESTS / "disk.asm", "--disk", disk),
        (GUESTS / "apic.asm", "--machine", "pc", "--modes", "native,hvm"),
        (GUESTS / "clock.asm", "--paravirt", "kvm", "--modes", "bt,hvm", "--memory-virtualization", "shadow"),
    ):
        status, out, err = run(*words)
        assert status == 0 and "No difference" in out, err
    assert disk.read_bytes() == bytes(1 << 16)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("--modes", "native,bt", "--intercept", "cr3"), "use --mode hvm"),
        (("--modes", "native"), "give two"),
        (("--modes", "native,pv"), "pv"),
        (("--step", "0"), "--step 0"),
        (("--modes", "native,bt", "--what"), "--what"),
    ],
)
def test_a_senseless_command_line_is_refused_in_one_line(words: tuple[str, ...], what: str) -> None:
    """With what would do, and the status that `vmm` has for it."""
    status, out, err = run(GUESTS / "hello.asm", *words)
    assert status == 2 and not out
    assert what in err and len(err.splitlines()) == 1
