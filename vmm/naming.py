"""What an address is called: by the guest's own symbols, or by those that a Linux kernel carries in its memory."""

from __future__ import annotations

from functools import cached_property

from vmm.image.image import Image
from vmm.image.kallsyms import Symbols, find


class Names:
    """The symbols of a guest. `memory` is its RAM, where a kernel that has none in its file is asked for its own.

    That kernel is looked for once, at the first address that nothing else names.
    """

    def __init__(self, image: Image, memory: memoryview | None = None) -> None:
        self._image, self._memory = image, memory

    def name(self, address: int) -> str:
        """`symbol+0x12` for a linear address, "" if it lies in nothing that has symbols."""
        return self._in_image(address) or (self._kernel.name(address) if self._kernel is not None else "")

    @cached_property
    def _kernel(self) -> Symbols | None:
        return None if self._memory is None else find(self._memory)

    def _in_image(self, address: int) -> str:
        below = [(value, name) for name, value in self._image.symbols.items() if value <= address]
        inside = any(0 <= address - s.address < len(s.data) for s in self._image.segments)
        if not below or not inside:
            return ""
        value, name = max(below)
        return f"{name}+{address - value:#x}" if address > value else name
