"""Loading guests: the three formats, the state they start in, and what `vmm build` writes."""

from __future__ import annotations

import struct
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.guest_expectations import GUESTS
from vmm.errors import ImageError
from vmm.image import multiboot
from vmm.image.build import build_elf, elf_bytes
from vmm.image.image import LOWEST, Image, Segment
from vmm.image.load import load_image

MEMORY = 16 << 20
MIB = 1 << 20


def write(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def information(image: Image) -> bytes:
    """The multiboot information structure, found as a guest finds it."""
    (segment,) = (s for s in image.segments if s.address == image.registers["ebx"])
    return segment.data


def own_segments(image: Image) -> tuple[Segment, ...]:
    return tuple(s for s in image.segments if s.address != image.registers["ebx"])


def string_at(image: Image, address: int) -> bytes:
    data = information(image)
    return data[address - image.registers["ebx"] :].split(b"\0", 1)[0]


def multiboot_header(*addresses: int, flags: int = 1 << 16) -> bytes:
    """A header with the address fields header, load, load end, bss end, entry."""
    return multiboot.header_bytes(flags) + struct.pack(f"<{len(addresses)}I", *addresses)


# Flat binaries.


def test_a_flat_binary_goes_to_one_mebibyte_and_starts_there(tmp_path: Path) -> None:
    """Without options a flat binary is loaded at 1 MiB and entered at its first byte."""
    image = load_image(write(tmp_path, "guest.bin", b"\x90\xf4"), memory=MEMORY)
    assert own_segments(image) == (Segment(MIB, b"\x90\xf4", 2),)
    assert image.entry == MIB
    assert image.name == "guest.bin"


def test_load_and_entry_place_a_flat_binary(tmp_path: Path) -> None:
    """`load` moves it, and the entry with it unless `entry` says otherwise."""
    path = write(tmp_path, "guest", bytes(16))
    assert load_image(path, memory=MEMORY, load=0x7C00).entry == 0x7C00
    image = load_image(path, memory=MEMORY, load=0x7C00, entry=0x7C08)
    assert own_segments(image)[0].address == 0x7C00
    assert image.entry == 0x7C08


def test_the_address_fields_of_a_flat_binary_place_it(tmp_path: Path) -> None:
    """A header with bit 16 says which part of the file goes where, what is zeroed, and the entry."""
    data = (
        b"JUNK" + b"text" + multiboot_header(2 * MIB + 4, 2 * MIB, 2 * MIB + 40, 2 * MIB + 100, 2 * MIB + 36)
    )
    path = write(tmp_path, "guest.bin", data + b"1234" + b"not loaded")
    image = load_image(path, memory=MEMORY, load=0x7C00)
    assert own_segments(image) == (Segment(2 * MIB, data[4:] + b"1234", 100),)
    assert image.entry == 2 * MIB + 36


def test_zero_ends_in_the_address_fields_mean_the_whole_file_and_no_bss(tmp_path: Path) -> None:
    """load_end_addr 0 loads up to the end of the file, bss_end_addr 0 adds nothing."""
    data = multiboot_header(2 * MIB, 2 * MIB, 0, 0, 2 * MIB + 32) + b"code"
    image = load_image(write(tmp_path, "guest.bin", data), memory=MEMORY)
    assert own_segments(image) == (Segment(2 * MIB, data, len(data)),)


def test_a_multiboot_header_is_one_only_with_its_checksum(tmp_path: Path) -> None:
    """The magic number alone, or off a four-byte boundary, is data."""
    header = multiboot_header(2 * MIB, 2 * MIB, 0, 0, 2 * MIB)
    for data in (header[:8] + b"\1\2\3\4" + header[12:], b"x" + header):
        image = load_image(write(tmp_path, "guest.bin", data), memory=MEMORY)
        assert own_segments(image)[0].address == MIB


# How a guest starts.


def test_every_format_starts_as_multiboot_has_it(tmp_path: Path) -> None:
    """EAX is the boot magic and EBX the information structure, for source, ELF and flat binary alike."""
    source = load_image(GUESTS / "hello.asm", memory=MEMORY)
    build_elf(source, tmp_path / "hello.elf")
    for image in (
        source,
        load_image(tmp_path / "hello.elf", memory=MEMORY),
        load_image(write(tmp_path, "guest.bin", b"\xf4"), memory=MEMORY),
    ):
        assert image.registers["eax"] == 0x2BADB002
        assert 0x9000 <= image.registers["ebx"] < 0x9F000
        assert struct.unpack_from("<I", information(image))[0] & 1


def test_the_information_tells_memory_map_command_line_and_loader(tmp_path: Path) -> None:
    """The fields stand where the specification has them (3.3), and agree with the machine's memory."""
    path = write(tmp_path, "guest.bin", b"\xf4")
    image = load_image(path, memory=MEMORY, command_line="console=ttyS0 quiet")
    data = information(image)
    flags, lower, upper, _, command_line, modules = struct.unpack_from("<6I", data, 0)
    assert flags == 1 << 0 | 1 << 2 | 1 << 6 | 1 << 9
    assert (lower, upper, modules) == (640, (MEMORY - MIB) >> 10, 0)
    assert string_at(image, command_line) == b"guest.bin console=ttyS0 quiet"
    assert string_at(image, struct.unpack_from("<I", data, 64)[0]) == b"vmm"
    length, address = struct.unpack_from("<2I", data, 44)
    regions = []
    at = address - image.registers["ebx"]
    while at < address - image.registers["ebx"] + length:
        size, base, region, kind = struct.unpack_from("<IQQI", data, at)
        regions.append((base, region, kind))
        at += size + 4
    assert regions == [(0, 0xA0000, 1), (0xA0000, 0x60000, 2), (MIB, MEMORY - MIB, 1)]


@pytest.mark.parametrize(
    ("command_line", "message"), [("a\0b", "NUL character"), ("x" * 5000, "shorten it")], ids=["nul", "long"]
)
def test_a_command_line_that_cannot_be_passed_is_refused(
    tmp_path: Path, command_line: str, message: str
) -> None:
    """A command line must fit beside the information, and is one C string."""
    path = write(tmp_path, "guest.bin", b"\xf4")
    with pytest.raises(ImageError, match=message):
        load_image(path, memory=MEMORY, command_line=command_line)


# ELF.


@st.composite
def images(draw: st.DrawFn) -> Image:
    """Images with a few segments in RAM that do not overlap, an entry in one of them, and symbols."""
    segments = []
    at = MIB
    for _ in range(draw(st.integers(1, 4))):
        at += draw(st.integers(0, 5000))
        data = draw(st.binary(max_size=200))
        size = len(data) + draw(st.integers(0 if data else 1, 300))
        segments.append(Segment(at, data, size))
        at += size
    if draw(st.booleans()):
        segments.insert(0, Segment(draw(st.integers(LOWEST, 0x9000)), b"low", 100))
    home = draw(st.sampled_from(segments))
    entry = home.address + draw(st.integers(0, home.size - 1))
    name = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20)
    symbols = draw(st.dictionaries(name, st.integers(0, (1 << 32) - 1), max_size=5))
    return Image("guest", tuple(segments), entry, symbols=symbols)


@settings(deadline=None)
@given(images())
def test_building_and_loading_gives_the_same_image(
    tmp_path_factory: pytest.TempPathFactory, image: Image
) -> None:
    """What `build_elf` writes, `load_image` reads back: segments, entry and symbols; and so once more."""
    path = tmp_path_factory.mktemp("elf") / "guest.elf"
    build_elf(image, path)
    loaded = load_image(path, memory=MEMORY)
    assert own_segments(loaded) == image.segments
    assert (loaded.entry, loaded.symbols) == (image.entry, image.symbols)
    first = path.read_bytes()
    build_elf(loaded, path)
    assert path.read_bytes() == first


@settings(deadline=None)
@given(images())
def test_pyelftools_reads_what_we_write(image: Image) -> None:
    """An independent reader finds the same segments, sections and symbols in the file."""
    elf = ELFFile(BytesIO(elf_bytes(image.segments, image.entry, image.symbols)))
    assert elf.header.e_entry == image.entry
    assert [(s.header.p_paddr, s.data(), s.header.p_memsz) for s in elf.iter_segments()] == [
        (s.address, s.data, s.size) for s in image.segments
    ]
    sections = list(elf.iter_sections())[1:]
    for segment, section in zip(image.segments, sections, strict=False):
        assert section.header.sh_addr == segment.address
    if image.symbols:
        table = elf.get_section_by_name(".symtab")
        found = {s.name: s.entry.st_value for s in table.iter_symbols() if s.name}
        assert found == image.symbols
    assert sections[-1].name == ".shstrtab"


def test_a_source_keeps_its_symbols_through_an_elf(tmp_path: Path) -> None:
    """The labels of a source are found in the ELF that `vmm build` makes of it."""
    source = load_image(GUESTS / "popf.asm", memory=MEMORY)
    build_elf(source, tmp_path / "popf.elf")
    loaded = load_image(tmp_path / "popf.elf", memory=MEMORY)
    assert loaded.symbols["start"] == source.entry == loaded.entry
    assert loaded.symbols == source.symbols
    assert own_segments(loaded) == own_segments(source)


def test_a_kernel_linked_high_is_loaded_and_entered_at_its_physical_address(tmp_path: Path) -> None:
    """Segments go to p_paddr, and an entry that lies in a segment's virtual addresses is translated."""
    data = bytearray(elf_bytes((Segment(MIB, bytes(64), 64),), MIB, {}))
    struct.pack_into("<I", data, 24, 0xC0100010)  # e_entry
    (program_headers,) = struct.unpack_from("<I", data, 28)
    struct.pack_into("<I", data, program_headers + 8, 0xC0100000)  # p_vaddr
    image = load_image(write(tmp_path, "high.elf", bytes(data)), memory=MEMORY)
    assert own_segments(image)[0].address == MIB
    assert image.entry == MIB + 0x10


def test_address_fields_overrule_the_program_headers_of_an_elf(tmp_path: Path) -> None:
    """With bit 16 set the loader must place an ELF by the multiboot header (3.1.3)."""
    data = elf_bytes((Segment(MIB, bytes(64), 64),), MIB, {"start": MIB})
    header = multiboot_header(4 * MIB, 4 * MIB, 0, 0, 4 * MIB)
    at = data.index(multiboot.MAGIC_BYTES)
    (program_headers,) = struct.unpack_from("<I", data, 28)
    assert at + 12 == program_headers  # the longer header goes over them: they are not read
    path = write(tmp_path, "guest.elf", data[:at] + header + data[at + len(header) :])
    image = load_image(path, memory=MEMORY)
    assert own_segments(image)[0].address == image.entry == 4 * MIB
    assert image.symbols == {"start": MIB}


# What a start costs.


@pytest.mark.parametrize(
    ("name", "wanted", "unwanted"),
    [
        ("guest.bin", "vmm.image.flat", ("elftools", "keystone", "vmm.image.asm")),
        (
            "guest.elf",
            "vmm.image.elf",
            ("elftools.elf.elffile", "elftools.dwarf", "keystone", "vmm.image.asm"),
        ),
    ],
)
def test_a_prebuilt_image_imports_only_what_it_needs(
    tmp_path: Path, name: str, wanted: str, unwanted: tuple[str, ...]
) -> None:
    """Neither the assembler nor pyelftools' DWARF reader is imported by a run that does not use them."""
    data = elf_bytes((Segment(MIB, b"\xf4", 1),), MIB, {}) if name.endswith("elf") else b"\xf4"
    path = write(tmp_path, name, data)
    code = (
        "import sys; from pathlib import Path; from vmm.image.load import load_image\n"
        f"load_image(Path({str(path)!r}), memory={MEMORY})\n"
        "print(*sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = run.stdout.split()
    assert wanted in modules
    assert not {m for m in modules if m.startswith(unwanted)}
