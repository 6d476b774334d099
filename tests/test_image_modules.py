"""Multiboot modules: files beside the guest, as it finds them and as QEMU loads them."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import pytest

from tests.oracles import require
from tests.test_image import write
from vmm.cli.main import main
from vmm.errors import ImageError
from vmm.image.asm import assemble
from vmm.image.build import build_elf
from vmm.image.image import Image
from vmm.image.load import ModuleFile, load_image
from vmm.vm import VirtualMachine

MIB = 1 << 20
MEMORY = 16 * MIB
# Prints of each module: its last word of arguments' first letter, and its contents up to its end; then ends with
# their number as status (value << 1 | 1).
GUEST = """
start:  mov     esi, [ebx + 24]
        mov     ebp, [ebx + 20]
        test    dword [ebx], 8
        jnz     .each
        xor     ebp, ebp
.each:  test    ebp, ebp
        jz      .done
        mov     edx, 0x3f8
        mov     edi, [esi]
.byte:  mov     al, [edi]
        out     dx, al
        inc     edi
        cmp     edi, [esi + 4]
        jb      .byte
        mov     edi, [esi + 8]
.text:  mov     al, [edi]
        inc     edi
        test    al, al
        jz      .next
        cmp     al, ' '
        jne     .text
.word:  mov     al, [edi]
        test    al, al
        jz      .next
        out     dx, al
        inc     edi
        jmp     .word
.next:  mov     al, 10
        out     dx, al
        add     esi, 16
        dec     ebp
        jmp     .each
.done:  mov     eax, [ebx + 20]
        out     0xf4, al
        hlt
"""


@pytest.fixture
def guest(tmp_path: Path) -> Path:
    source = write(tmp_path, "guest.asm", GUEST.encode())
    build_elf(assemble(source, {}), tmp_path / "guest.elf")
    return tmp_path / "guest.elf"


@pytest.fixture
def modules(tmp_path: Path) -> list[ModuleFile]:
    return [
        ModuleFile(write(tmp_path, "one", b"first:"), "a=1"),
        ModuleFile(write(tmp_path, "two", b"x" * 5000 + b":")),
        ModuleFile(write(tmp_path, "three", b"third:"), "b c"),
    ]


CONSOLE = b"first:a=1\n" + b"x" * 5000 + b":\n" + b"third:b c\n"


def table(image: Image) -> list[tuple[int, int, str]]:
    """Start, end and string of each module, as the guest finds them."""
    at = image.registers["ebx"]
    (information,) = (s for s in image.segments if s.address == at)
    count, address = struct.unpack_from("<2I", information.data, 20)
    found = []
    for number in range(count):
        start, end, string, reserved = struct.unpack_from("<4I", information.data, address - at + 16 * number)
        assert reserved == 0
        found.append((start, end, information.data[string - at :].split(b"\0", 1)[0].decode()))
    return found


@pytest.mark.parametrize("mode", ["native", "bt"])
def test_a_guest_reads_its_modules_and_their_arguments(
    guest: Path, modules: list[ModuleFile], mode: str
) -> None:
    """Contents to the last byte, and the text after the name, in the order in which they were given."""
    image = load_image(guest, memory=MEMORY, modules=modules)
    result = VirtualMachine(image, mode, memory=MEMORY).run(1_000_000)
    assert result.console == CONSOLE
    assert result.outcome.status == 3 << 1 | 1


def test_qemu_gives_the_guest_the_same_modules(guest: Path, modules: list[ModuleFile]) -> None:
    """The same guest with the same files prints the same on QEMU."""
    files = ",".join(f"{module.path} {module.arguments}".rstrip() for module in modules)
    command = [
        *(require("qemu-system-i386"), "-M", "pc", "-m", "16", "-kernel", str(guest), "-initrd", files),
        *("-display", "none", "-monitor", "none", "-serial", "stdio", "-net", "none", "-no-reboot"),
        *("-device", "isa-debug-exit,iobase=0xf4,iosize=4"),
    ]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=20)
    assert (done.stdout, done.returncode) == (CONSOLE, 3 << 1 | 1)


def test_modules_lie_on_pages_of_their_own_above_the_guest(guest: Path, modules: list[ModuleFile]) -> None:
    """Page-aligned, apart, and told with the name that they were given by."""
    image = load_image(guest, memory=MEMORY, modules=modules)
    found = table(image)
    assert [string for _, _, string in found] == [
        f"{module.path} {module.arguments}".rstrip() for module in modules
    ]
    assert [end - start for start, end, _ in found] == [6, 5001, 6]
    assert all(start % 4096 == 0 and start >= MIB for start, _, _ in found)
    starts = {start for start, _, _ in found}
    top = max(s.end for s in image.segments if s.address not in starts)
    assert found[0][0] >= top and found[1][0] >= found[0][1] and found[2][0] >= found[1][1]


def test_without_modules_the_information_tells_of_none(guest: Path) -> None:
    """Flag 3 is clear, and so are the fields."""
    image = load_image(guest, memory=MEMORY)
    assert table(image) == []
    assert VirtualMachine(image, memory=MEMORY).run(1000).outcome.status == 1


def test_modules_that_cannot_be_loaded_are_refused(guest: Path, tmp_path: Path) -> None:
    """Too large for memory alone or with the guest, empty, missing, or with a NUL in the text: one line each."""
    for data, arguments, message in (
        (bytes(MEMORY + 1), "", "do not fit in 16M of memory"),
        (bytes(MEMORY - MIB), "", "give at least 17M with -m"),
        (b"", "", "is empty: name a module"),
        (b"x", "a\0b", "NUL"),
        (b"x", "y" * 5000, "shorten it"),
    ):
        module = ModuleFile(write(tmp_path, "module", data), arguments)
        with pytest.raises(ImageError, match=message) as error:
            load_image(guest, memory=MEMORY, modules=[module])
        assert "\n" not in str(error.value)
    with pytest.raises(ImageError, match="nowhere: cannot be read"):
        load_image(guest, memory=MEMORY, modules=[ModuleFile(tmp_path / "nowhere")])


def test_the_command_line_gives_modules(
    guest: Path, modules: list[ModuleFile], capfd: pytest.CaptureFixture[str]
) -> None:
    """--module FILE,TEXT may be repeated; --initrd is the first one, without arguments."""
    one, two, _ = (str(module.path) for module in modules)
    assert main(["run", str(guest), "--module", f"{one},a=1 b", "--initrd", two]) == 2 << 1 | 1
    assert capfd.readouterr().out == "x" * 5000 + ":\nfirst:a=1 b\n"
    assert main(["run", str(guest), "--module", ",text"]) == 2
    assert "the file's name is empty" in capfd.readouterr().err
