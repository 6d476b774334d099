"""Which of the guest's frames are watched: stores to them are noticed, for one reason or several.

A watched frame is handed out without the right to store. The first store then comes to `ShadowMemory`, which does
what the reason demands (lets a page table go out of sync, drops a copy of descriptors, has translated code dropped)
and stops watching for that reason.
"""

from __future__ import annotations

from vmm.machine.memory import PAGE, Memory
from vmm.machine.tlb import MIXED, FrameTable

TABLE, DESCRIPTORS, TRANSLATED = 1, 2, 4


class Watch:
    """The reasons, by frame."""

    def __init__(self, memory: Memory, frames: FrameTable) -> None:
        self._memory, self._frames = memory, frames
        self.reasons = bytearray(memory.size // PAGE)  # by frame number

    def begin(self, frame: int, why: int) -> None:
        """Notice the next store to a physical page; nothing where there is no memory."""
        if self._memory.is_ram(frame) and not self.reasons[frame >> 12] & why:
            self.reasons[frame >> 12] |= why
            self._frames.withhold(frame)

    def end(self, frame: int, why: int) -> None:
        """This reason is no more."""
        if self._memory.is_ram(frame):
            self.reasons[frame >> 12] &= ~why & 0xFF

    def why(self, frame: int) -> int:
        """The reasons to notice a store to this page now.

        Code on a page that is code and data at once is not protected: whoever translated it checks it.
        """
        if not self._memory.is_ram(frame):
            return 0
        reasons = self.reasons[frame >> 12]
        return reasons & ~TRANSLATED if self._frames.kinds[frame >> 12] == MIXED else reasons
