"""docs/hardware-assist.md is true: its VMCB, and its counts of exits, are those of a run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vmm.image.image import Image
from vmm.image.load import load_image
from vmm.monitor.hardware.monitor import HardwareMonitor
from vmm.monitor.hardware.vmcb import Vmcb
from vmm.vm import MemoryVirtualization, VirtualMachine, hardware

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/hardware-assist.md").read_text()
ROWS = re.findall(r"^\| (`[^`]*`|nothing) \| (nested|shadow) \| ([\d,]+) \| ([\d,]+) \|", PAGE, re.MULTILINE)


def image() -> Image:
    return load_image(ROOT / "guests/processes.asm", memory=16 << 20)


def test_the_vmcb_shown_is_a_real_one() -> None:
    """The excerpt is what the guest's VMCB prints at that moment."""
    vm = VirtualMachine(image(), "hvm")
    vm.run(5_300_000)
    assert isinstance(vm.control, HardwareMonitor)
    shown = PAGE.split("```\n")[1].rstrip()
    assert str(Vmcb(memoryview(bytearray(vm.control.take().vmcb)))) == shown


@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join(row[:2]))
def test_the_exits_shown_are_counted(row: tuple[str, MemoryVirtualization, str, str]) -> None:
    """Each row's total, and what it adds to the first, come out of the run that it names."""
    word, tables, exits, added = row
    asked = "" if word == "nothing" else word.strip("`")
    result = VirtualMachine(image(), "hvm", attach=hardware(asked, tables)).run()
    total = sum(counted.count for counted in result.exits.rows.values())
    assert total == int(exits.replace(",", ""))
    assert total - int(ROWS[0][2].replace(",", "")) == int(added.replace(",", ""))
    assert result.instructions == 5_348_326


def test_every_row_is_read() -> None:
    """The table has the rows that it should."""
    assert len(ROWS) == 9
