"""Linux's boot protocol: what the loader makes of a kernel's setup header, and what it refuses."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_image import write
from vmm.cli.main import main
from vmm.errors import ImageError
from vmm.image import linux
from vmm.image.image import Image, Segment
from vmm.image.load import ModuleFile, is_kernel, load_image
from vmm.vm import UNMODIFIED, VirtualMachine

MIB = 1 << 20
MEMORY = 64 * MIB
# The protected-mode code of a kernel that checks how it was entered: "HdrS" in its parameters, by ESI, the selectors,
# EBX, EBP and EDI of 0; it prints the command line and ends with status 3, or else with status 5.
KERNEL = """
        org 0x1000000
start:  mov     bl, 2
        cmp     dword [esi + 0x202], "HdrS"
        jne     .end
        mov     ax, cs
        cmp     ax, 0x10
        jne     .end
        mov     ax, ss
        cmp     ax, 0x18
        jne     .end
        mov     ax, ds
        mov     es, ax
        cmp     ax, 0x18
        jne     .end
        xor     bl, 2
        or      ebx, ebp
        or      ebx, edi
        jnz     .end
        mov     ecx, [esi + 0x228]
.next:  mov     al, [ecx]
        test    al, al
        jz      .done
        mov     edx, 0x3f8
        out     dx, al
        inc     ecx
        jmp     .next
.done:  mov     bl, 1
.end:   mov     al, bl
        out     0xf4, al
        hlt
"""


def kernel(code: bytes = b"\xf4" * 64, **fields: int) -> bytes:
    """A bzImage of protocol 2.15 around `code`, with fields of its setup header, named as there, replaced."""
    data = bytearray(5 * 512)
    code += bytes(-len(code) % 16)
    values = {
        "setup_sects": 4,
        "syssize": len(code) // 16,
        "boot_flag": 0xAA55,
        "jump": 0x6AEB,
        "header": int.from_bytes(b"HdrS", "little"),
        "version": 0x020F,
        "loadflags": 1,
        "code32_start": MIB,
        "initrd_addr_max": 0x7FFFFFFF,
        "kernel_alignment": 16 * MIB,
        "relocatable_kernel": 1,
        "xloadflags": 0,
        "cmdline_size": 2047,
        "pref_address": 16 * MIB,
        "init_size": 4 * MIB,
    } | fields
    for name, value in values.items():
        offset, kind = FIELDS[name]
        struct.pack_into(f"<{kind}", data, offset, value)
    return bytes(data) + code


FIELDS = {
    "setup_sects": (0x1F1, "B"),
    "syssize": (0x1F4, "I"),
    "boot_flag": (0x1FE, "H"),
    "jump": (0x200, "H"),
    "header": (0x202, "I"),
    "version": (0x206, "H"),
    "loadflags": (0x211, "B"),
    "code32_start": (0x214, "I"),
    "initrd_addr_max": (0x22C, "I"),
    "kernel_alignment": (0x230, "I"),
    "relocatable_kernel": (0x234, "B"),
    "xloadflags": (0x236, "H"),
    "cmdline_size": (0x238, "I"),
    "pref_address": (0x258, "Q"),
    "init_size": (0x260, "I"),
}


def load(folder: Path, data: bytes, initrd: bytes = b"", memory: int = MEMORY, append: str = "") -> Image:
    path = write(folder, "vmlinuz", data)
    modules = [ModuleFile(write(folder, "initrd", initrd))] if initrd else []
    return load_image(path, memory=memory, modules=modules, command_line=append)


def segment(image: Image, address: int) -> Segment:
    (found,) = (s for s in image.segments if s.address == address)
    return found


def parameters(image: Image) -> bytes:
    return segment(image, image.registers["esi"]).data


def word(image: Image, offset: int) -> int:
    return int(struct.unpack_from("<I", parameters(image), offset)[0])


# What it makes of a kernel.


def test_the_code_goes_where_the_kernel_likes_it_with_all_the_room_that_it_needs(tmp_path: Path) -> None:
    """The protected-mode part lies at pref_address, and init_size bytes from there are the kernel's."""
    code = bytes(range(64))
    image = load(tmp_path, kernel(code))
    assert segment(image, 16 * MIB) == Segment(16 * MIB, code, 4 * MIB)
    assert image.entry == 16 * MIB
    assert word(image, 0x214) == 16 * MIB


def test_a_kernel_from_before_preferred_addresses_goes_to_its_code32_start(tmp_path: Path) -> None:
    """Protocols before 2.10 name neither an address nor a size: 1 MiB, and the size of the code."""
    image = load(tmp_path, kernel(version=0x0206))
    assert segment(image, MIB).size == 64
    assert image.entry == MIB


def test_the_boot_parameters_repeat_the_setup_header_and_tell_the_memory_map(tmp_path: Path) -> None:
    """The kernel finds its header, the loader's type, video mode 3 and RAM below and above the hole."""
    data = kernel()
    page = parameters(load(tmp_path, data))
    assert len(page) == 4096
    assert page[0x200:0x20F] == data[0x200:0x20F]
    assert page[0x26C:0x290] == bytes(0x24)  # the header ends where its jump leads
    assert page[0x210] == 0xFF
    assert (page[0x06], page[0x07], page[0x0E], page[0x0F]) == (3, 80, 25, 1)
    count = page[0x1E8]
    regions = [struct.unpack_from("<QQI", page, 0x2D0 + 20 * n) for n in range(count)]
    assert regions == [(0, 0xA0000, 1), (0xA0000, 0x60000, 2), (MIB, MEMORY - MIB, 1)]


def test_the_ram_disk_lies_as_high_as_it_may(tmp_path: Path) -> None:
    """It begins on the last page from which it fits under the end of memory, or under initrd_addr_max."""
    disk = bytes(5000)
    for image, end in (
        (load(tmp_path, kernel(), disk), MEMORY),
        (load(tmp_path, kernel(initrd_addr_max=40 * MIB - 1), disk), 40 * MIB),
    ):
        address, size = word(image, 0x218), word(image, 0x21C)
        assert (address, size) == (end - 8192, 5000)
        assert segment(image, address).data == disk


def test_without_a_ram_disk_the_kernel_is_told_of_none(tmp_path: Path) -> None:
    """Address and size are 0."""
    image = load(tmp_path, kernel())
    assert (word(image, 0x218), word(image, 0x21C)) == (0, 0)


@pytest.mark.parametrize("mode", UNMODIFIED)
def test_a_kernel_starts_as_the_protocol_has_it_in_every_mode(tmp_path: Path, mode: str) -> None:
    """ESI holds the parameters, CS and the others are __BOOT_CS and __BOOT_DS, and the command line is there."""
    from vmm.image.asm import assemble

    source = write(tmp_path, "kernel.asm", KERNEL.encode())
    assembly = assemble(source, {})
    image = load(tmp_path, kernel(assembly.data), append="quiet answer=42")
    result = VirtualMachine(image, mode, memory=MEMORY).run(100_000, 20)
    if mode == "trap":  # reads the ring out of CS: the very thing that trap-and-emulate gets wrong
        assert (result.outcome.kind, result.outcome.status) == ("exit", 5)
    else:
        assert (result.outcome.kind, result.outcome.status) == ("exit", 3)
        assert result.console == b"quiet answer=42"


def test_a_file_may_end_within_its_last_paragraph(tmp_path: Path) -> None:
    """The header counts in units of 16 bytes, and the file (of memtest86+, say) need not fill the last one."""
    code = bytes(range(1, 33))
    image = load(tmp_path, kernel(code)[:-3])
    assert segment(image, image.entry).data == code[:-3]


# What it refuses.

BAD = {
    "cut in its header": (kernel()[:0x250], {}, "cut off in its setup header"),
    "cut in its code": (kernel(bytes(4096))[:-16], {}, "claims 6656 of them"),
    "without code": (kernel(syssize=0), {}, "a truncated Linux kernel"),
    "from before 2.06": (kernel(version=0x0205), {}, "boot protocol 2.05, and 2.06 is the oldest"),
    "a zImage": (kernel(loadflags=0), {}, "below 1 MiB"),
    "for x86-64": (kernel(xloadflags=1), {}, "for x86-64: this machine has no 64-bit mode"),
    "preferring an address past 4 GiB": (kernel(pref_address=1 << 32), {}, "past 4 GiB"),
    "preferring the hole": (kernel(pref_address=0xA0000), {}, "video and ROM area"),
    "in little memory": (
        kernel(),
        {"memory": 8 * MIB},
        "needs 0x1000000..0x1400000 to unpack.*give at least 20M with -m",
    ),
    "whose initrd is larger than memory": (kernel(), {"initrd": bytes(65 * MIB)}, "give more with -m"),
    "whose initrd does not fit beside it": (
        kernel(),
        {"initrd": bytes(50 * MIB)},
        "does not fit between the kernel.*give at least 71M with -m",
    ),
    "whose initrd has to lie too low": (
        kernel(initrd_addr_max=20 * MIB),
        {"initrd": bytes(MIB)},
        "make it smaller",
    ),
    "with too long a command line": (
        kernel(),
        {"append": "x" * 2048},
        "2048 bytes, and this kernel takes 2047",
    ),
    "with a NUL in its command line": (kernel(), {"append": "a\0b"}, "NUL"),
}


@pytest.mark.parametrize(("data", "options", "message"), BAD.values(), ids=BAD)
def test_a_kernel_that_cannot_be_started_is_one_line(
    tmp_path: Path, data: bytes, options: dict[str, object], message: str
) -> None:
    """Each says what is wrong with which file and what to do."""
    with pytest.raises(ImageError, match=message) as error:
        load(tmp_path, data, **options)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_what_is_missing_or_too_much_beside_a_kernel_is_refused(tmp_path: Path) -> None:
    """A missing initrd, two of them, one with arguments, an entry of one's own."""
    path = write(tmp_path, "vmlinuz", kernel())
    disk = ModuleFile(write(tmp_path, "initrd", b"disk"))
    missing = ModuleFile(tmp_path / "nowhere")
    for modules, message in (
        ([missing], "nowhere: cannot be read: No such file"),
        ([ModuleFile(tmp_path)], "is a directory"),
        ([disk, disk], "takes one initrd"),
        ([ModuleFile(disk.path, "text")], "takes one initrd"),
    ):
        with pytest.raises(ImageError, match=message):
            load_image(path, memory=MEMORY, modules=modules)
    with pytest.raises(ImageError, match="leave --entry out"):
        load_image(path, memory=MEMORY, entry=MIB)


def test_the_command_line_tells_it_with_status_4(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """`vmm run` recognizes a kernel by its header, gives it 128M, and tells what is wrong in one line."""
    path = write(tmp_path, "vmlinuz", kernel())
    assert main(["run", str(path), "-m", "8M"]) == 4
    assert main(["run", str(path), "--initrd", str(tmp_path / "none")]) == 4
    assert main(["run", str(path), "--append", "x" * 4000]) == 4
    errors = capfd.readouterr().err.splitlines()
    assert len(errors) == 3 and all(line.startswith("vmm: ") for line in errors)
    path = write(tmp_path, "large", kernel(init_size=100 * MIB, code32_start=MIB))
    assert main(["run", str(path)]) == 0  # halts at once, and fits


def test_a_file_is_a_kernel_only_by_its_signature_and_boot_flag(tmp_path: Path) -> None:
    """Without either it is a flat binary; what cannot be read is none."""
    assert is_kernel(write(tmp_path, "a", kernel()))
    assert not is_kernel(write(tmp_path, "b", kernel(header=0)))
    assert not is_kernel(write(tmp_path, "c", kernel(boot_flag=0)))
    assert not is_kernel(tmp_path / "nothing")
    assert not is_kernel(tmp_path)


def test_a_pipe_is_no_kernel_and_is_not_waited_for(tmp_path: Path) -> None:
    """Nobody writes to it: to open it would take for ever."""
    os.mkfifo(tmp_path / "pipe")
    assert not is_kernel(tmp_path / "pipe")
    assert main(["run", str(tmp_path / "pipe")]) == 4


@settings(max_examples=200, deadline=None)
@given(
    changes=st.dictionaries(st.integers(0x1F1, 0x268), st.integers(0, 255), max_size=12),
    length=st.integers(0, 2700),
)
def test_whatever_the_setup_header_says_it_is_refused_or_runs(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[int, int], length: int
) -> None:
    """A damaged kernel is refused in one line, or loads within memory and runs to its end."""
    data = bytearray(kernel())
    for offset, value in changes.items():
        data[offset] = value
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(data[:length] if length < len(data) else data)
    disk = tmp_path_factory.getbasetemp() / "disk"
    disk.write_bytes(bytes(5000))
    if not linux.is_kernel(path.read_bytes()):
        return
    try:
        image = load_image(path, memory=MEMORY, modules=[ModuleFile(disk)])
    except ImageError as error:
        assert "\n" not in str(error)
    else:
        assert all(s.end <= MEMORY for s in image.segments)
        outcome = VirtualMachine(image, memory=MEMORY).run(1000, 20).outcome
        assert outcome.kind in ("halt", "budget", "triple-fault")
