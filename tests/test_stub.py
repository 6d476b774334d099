"""The machine code at every block: the count it is given, wherever the engine's memory happens to lie."""

from __future__ import annotations

import ctypes
import struct

import pytest

from tests.machines import lab
from vmm.image.image import Image, Segment
from vmm.machine.cpu import exported, stub
from vmm.vm import VirtualMachine

LOOP = (
    b"\xb9" + struct.pack("<I", 5000) + bytes.fromhex("49 75fd faf4")
)  # mov ecx, 5000; dec ecx; jnz; cli; hlt


@pytest.mark.skipif(
    not stub.supported(), reason="this host has no such code: every block is counted in Python"
)
def test_a_block_comes_to_python_once_or_twice() -> None:
    """In each of many engines, differently placed, the count of a block is found in its translation."""
    image = Image("loop", (Segment(0x100000, LOOP, len(LOOP)),), 0x100000)
    keep = []
    for i in range(40):
        keep.append(ctypes.create_string_buffer(4096 * i * i + 64 * i))
        vm = VirtualMachine(image, "native", memory=4 << 20)
        visits: list[tuple[int, int, int]] = []
        patch = vm.machine.engine.meter.patch

        def watch(place: int, size: int, count: int, patch: object = patch, visits: object = visits) -> bool:
            assert isinstance(visits, list) and callable(patch)
            visits.append((place, size, count))
            return bool(patch(place, size, count))

        vm.machine.engine.meter.patch = watch  # type: ignore[assignment]
        result = vm.run(1_000_000)
        assert result.instructions == 1 + 2 * 5000 + 2
        assert len(visits) < 20


def test_the_forms_of_loading_a_constant() -> None:
    """What a translation may load the meter's address with is read as the constant it loads."""
    for code, value in (
        ("48b9 8877665544332211", 0x1122334455667788),
        ("488d0d f0ffffff", 0x1000 + 7 - 16),
        ("48c7c1 00000080", -0x80000000),
        ("b9 78563412", 0x12345678),
    ):
        assert stub._loads_rcx(bytes.fromhex(code), 0x1000) == value
    assert stub._loads_rcx(bytes.fromhex("48ba 8877665544332211"), 0) is None


@pytest.mark.skipif(not stub.supported() or not exported.check_exit, reason="no machine code here")
def test_the_engine_is_not_asked_whether_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a block with three accesses to memory four questions are taken out, and it can still be stopped."""
    found: list[int] = []
    skip_checks = stub.Meter.skip_checks

    def counted(meter: stub.Meter, return_address: int, address: int, check: int) -> int:
        found.append(skip_checks(meter, return_address, address, check))
        return found[-1]

    monkeypatch.setattr(stub.Meter, "skip_checks", counted)
    made = lab("again:  mov eax, [DATA]\n mov [DATA + 8], eax\n mov ebx, [DATA + 16]\n jmp again")
    result = made.run(4003)
    assert 4 in found
    assert (result.kind, made.retired) == ("budget", 4003)
