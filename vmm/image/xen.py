"""Xen guests: what a kernel says of itself to the domain builder, in ELF notes or in an older section.

A note has a type and a number or a text. The older way is one text in a section `__xen_guest`, `KEY=value` by
commas; it says the same. A source of ours says it by labels: `xen_elfnote_entry` and the like, a number by its value,
a text by the place where it lies. Where a guest goes follows from two numbers: its segments' physical addresses, less
PADDR_OFFSET, are pseudo-physical ones, and pseudo-physical zero is mapped at VIRT_BASE.

The hard part is trust: every number is checked before it is used.

Sources: Xen's public header elfnote.h; the rules of Xen's ELF loader for defaults and checks.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from vmm.errors import ImageError

OWNER = b"Xen\0"
NOTE_HEADER = struct.Struct("<III")  # size of the owner's name, of the contents, type
NOTE_LIMIT = 1 << 16  # bytes of notes, of a text
SYMBOL_PREFIX = "xen_elfnote_"
LEGACY_SECTION = "__xen_guest"
PAGE_SHIFT = 12

# XEN_ELFNOTE_*: name, and whether it is a text.
NOTES: Mapping[int, tuple[str, bool]] = {
    1: ("ENTRY", False),
    2: ("HYPERCALL_PAGE", False),
    3: ("VIRT_BASE", False),
    4: ("PADDR_OFFSET", False),
    5: ("XEN_VERSION", True),
    6: ("GUEST_OS", True),
    7: ("GUEST_VERSION", True),
    8: ("LOADER", True),
    9: ("PAE_MODE", True),
    10: ("FEATURES", True),
    11: ("BSD_SYMTAB", True),
    12: ("HV_START_LOW", False),
    14: ("SUSPEND_CANCEL", False),
    15: ("INIT_P2M", False),
    16: ("MOD_START_PFN", False),
    17: ("SUPPORTED_FEATURES", False),
}
L1_MFN_VALID = 13  # pairs of numbers: a mask and a value
NUMBERS = {name: number for number, (name, _) in NOTES.items()}

# Keys of the older section that mean a note.
_LEGACY = {
    "GUEST_OS": "GUEST_OS",
    "GUEST_VERSION": "GUEST_VERSION",
    "GUEST_VER": "GUEST_VERSION",
    "XEN_VER": "XEN_VERSION",
    "LOADER": "LOADER",
    "PAE": "PAE_MODE",
    "BSD_SYMTAB": "BSD_SYMTAB",
    "VIRT_BASE": "VIRT_BASE",
    "VIRT_ENTRY": "ENTRY",
    "ELF_PADDR_OFFSET": "PADDR_OFFSET",
    "HYPERCALL_PAGE": "HYPERCALL_PAGE",
    "FEATURES": "FEATURES",
}

FEATURE_NAMES = frozenset(
    (
        "writable_page_tables", "writable_descriptor_tables", "auto_translated_physmap", "supervisor_mode_kernel",
        "pae_pgdir_above_4gb", "hvm_callback_vector", "dom0", "linux_rsdp_unrestricted",
    )
)  # fmt: skip
_IMPOSSIBLE = frozenset(("auto_translated_physmap", "supervisor_mode_kernel", "writable_page_tables", "dom0"))


@dataclass(frozen=True)
class XenGuest:
    """What a paravirtual guest says of itself. Addresses are virtual."""

    entry: int
    virt_base: int = 0
    paddr_offset: int = 0
    hypercall_page: int | None = None
    mod_start_pfn: bool = False
    notes: Mapping[str, int | str] = field(default_factory=dict)


def parse_notes(name: str, data: bytes) -> dict[str, int | str]:
    """The notes in the bytes of a note segment that are Xen's; raises `ImageError`.

    Notes that are wrong matter only where Xen's are among them.
    """
    found: dict[str, int | str] = {}
    if OWNER not in data:
        return found
    for owner, kind, contents in _each(name, data):
        if owner != OWNER or kind == L1_MFN_VALID:
            continue
        row = NOTES.get(kind)
        if row is None:
            continue  # of another kind of boot, or newer
        label, is_text = row
        found[label] = _text(name, label, contents) if is_text else _number(name, label, contents)
    return found


def _each(name: str, data: bytes) -> Iterator[tuple[bytes, int, bytes]]:
    at = 0
    while at < len(data):
        if at + NOTE_HEADER.size > len(data):
            raise ImageError(f"{name}: its ELF notes end in the middle of one: link it again")
        name_size, size, kind = NOTE_HEADER.unpack_from(data, at)
        start = at + NOTE_HEADER.size
        contents = start + (name_size + 3 & ~3)
        end = contents + (size + 3 & ~3)
        # GRUB's own image maker cuts its last text off, after the NUL that ends it; Xen's loader does not mind.
        if contents + size > len(data) and b"\0" not in data[contents:]:
            raise ImageError(
                f"{name}: the ELF note at offset {at:#x} claims {size} bytes of contents, more than there are: "
                "link it again"
            )
        yield data[start : start + name_size], kind, data[contents : contents + size]
        at = end


def _number(name: str, label: str, contents: bytes) -> int:
    if len(contents) not in (1, 2, 4, 8):
        raise ImageError(
            f"{name}: its Xen note {label} has {len(contents)} bytes, and is a number: make it 4"
        )
    value = int.from_bytes(contents, "little")
    if value >= 1 << 32:
        raise ImageError(f"{name}: its Xen note {label} is {value:#x}, no 32-bit number: link it for i386")
    return value


def _text(name: str, label: str, contents: bytes) -> str:
    return contents.partition(b"\0")[0].decode("utf-8", "replace")


def parse_legacy(name: str, text: str) -> dict[str, int | str]:
    """The contents of a section `__xen_guest` as notes; raises `ImageError`."""
    found: dict[str, int | str] = {}
    for part in text.rstrip("\0").split(","):
        key, _, value = part.strip().partition("=")
        label = _LEGACY.get(key)
        if label is None:
            continue
        if NOTES[NUMBERS[label]][1]:
            found[label] = value or "yes"
            continue
        try:
            number = int(value, 0)
        except ValueError:
            raise ImageError(f"{name}: {LEGACY_SECTION} has {key}={value!r}, no number: correct it") from None
        if not 0 <= number < 1 << 32:
            raise ImageError(f"{name}: {LEGACY_SECTION} has {key}={value}, no 32-bit number: correct it")
        found[label] = number
    base = found.get("VIRT_BASE", 0)
    if "HYPERCALL_PAGE" in found:  # the number of a page, there
        page, start = found["HYPERCALL_PAGE"], int(base)
        found["HYPERCALL_PAGE"] = (int(page) << PAGE_SHIFT) + start & 0xFFFFFFFF
    found.setdefault("PADDR_OFFSET", int(base))
    return found


def from_symbols(name: str, symbols: Mapping[str, int], origin: int, data: bytes) -> dict[str, int | str]:
    """The notes that a source gives by labels; `data` lies at `origin`. Raises `ImageError`."""
    found: dict[str, int | str] = {}
    for symbol, value in symbols.items():
        if not symbol.startswith(SYMBOL_PREFIX):
            continue
        label = symbol[len(SYMBOL_PREFIX) :].upper()
        if label not in NUMBERS:
            raise ImageError(f"{name}: {symbol} names no Xen note: choose among {', '.join(NUMBERS).lower()}")
        if not NOTES[NUMBERS[label]][1]:
            found[label] = value
            continue
        end = data.find(b"\0", value - origin) if origin <= value < origin + len(data) else -1
        if end < 0:
            raise ImageError(
                f"{name}: {symbol} labels no text that ends in 0: put one there, in .data or .rodata"
            )
        found[label] = data[value - origin : end].decode("utf-8", "replace")
    return found


def note_bytes(notes: Mapping[str, int | str]) -> bytes:
    """A note segment with these notes."""
    out = bytearray()
    for label, value in notes.items():
        contents = value.to_bytes(4, "little") if isinstance(value, int) else value.encode() + b"\0"
        out += NOTE_HEADER.pack(len(OWNER), len(contents), NUMBERS[label]) + OWNER
        out += contents + bytes(-len(contents) % 4)
    return bytes(out)


def is_paravirtual(notes: Mapping[str, int | str]) -> bool:
    """Whether notes are those of a guest for the PV interface; some kernels carry only a note for another start."""
    return "XEN_VERSION" in notes or "HYPERCALL_PAGE" in notes


def guest(name: str, notes: Mapping[str, int | str], entry: int) -> XenGuest:
    """What the notes come to, with the builder's defaults; `entry` is the ELF's. Raises `ImageError`."""

    def number(label: str, default: int | None) -> int | None:
        value = notes.get(label)
        return default if value is None else int(value)

    def text(label: str) -> str:
        return str(notes.get(label, ""))

    if not text("XEN_VERSION").startswith("xen-3.0"):
        raise ImageError(
            f"{name}: it is made for Xen interface {text('XEN_VERSION') or 'of no version'!r}: this is xen-3.0"
        )
    if not text("LOADER").startswith("generic") and not text("GUEST_OS").startswith("linux"):
        raise ImageError(
            f"{name}: its loader is {text('LOADER')!r}, and there is only the generic one: say so"
        )
    if not text("PAE_MODE").startswith(("yes", "bimodal")):
        raise ImageError(
            f"{name}: its page tables are not in PAE format, and Xen has no other: build it with PAE"
        )
    required = set()
    for feature in filter(None, text("FEATURES").replace(" ", "|").split("|")):
        plain = feature.removeprefix("!")
        if plain not in FEATURE_NAMES:
            raise ImageError(
                f"{name}: its notes name a feature {plain!r} that does not exist: correct FEATURES"
            )
        if feature != plain:
            required.add(plain)
    if missing := required & _IMPOSSIBLE:
        raise ImageError(f"{name}: it requires {', '.join(sorted(missing))}, which a guest cannot have here")
    virt_base = number("VIRT_BASE", 0)
    assert virt_base is not None
    if "PADDR_OFFSET" in notes and "VIRT_BASE" not in notes and notes["PADDR_OFFSET"]:
        raise ImageError(f"{name}: it has a note PADDR_OFFSET and none VIRT_BASE: give both")
    if virt_base % (1 << PAGE_SHIFT):
        raise ImageError(
            f"{name}: its virtual base {virt_base:#x} is not a multiple of a page: correct VIRT_BASE"
        )
    page = number("HYPERCALL_PAGE", None)
    if page is not None and page % (1 << PAGE_SHIFT):
        raise ImageError(f"{name}: its hypercall page {page:#x} does not begin a page: align it to 4096")
    return XenGuest(
        number("ENTRY", entry) or 0,
        virt_base,
        number("PADDR_OFFSET", 0) or 0,
        page,
        bool(number("MOD_START_PFN", 0)),
        dict(notes),
    )
