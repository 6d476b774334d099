"""What a guest leaves as it is, whatever it does: the hypervisor's frames, and the books of all the others."""

from __future__ import annotations

from tests import domains
from tests.paravirt_recount import RW, P, Recount
from vmm.monitor.paravirt.abi.memory import DOMID_IO, DOMID_XEN
from vmm.monitor.paravirt.area import FREE_PAGE

_ENTRIES = 512


class Keeper:
    """Made when the guest stands at its entry; `check` fails where something has changed that must not."""

    def __init__(self, guest: domains.Guest) -> None:
        domain = guest.domain
        self._domain, self._memory = domain, guest.machine.memory
        self._area, self._frames = domain.paging.domain.area, domain.frames
        self._recount = Recount(self._memory, self._frames, domain.paging)
        info = guest.read(guest.machine.state.get(6) + 44), guest.read(guest.machine.state.get(6) + 52)
        self._rings = info  # frames that domain 0 has mapped
        self._kept = {mfn: self._contents(mfn) for mfn in self._hypervisors()}
        self._physical = self._physicals()

    def _hypervisors(self) -> list[int]:
        """Frames of the hypervisor's that nobody ever gets, but for the machine-to-physical table."""
        frames = self._frames
        return [
            mfn for mfn in range(frames.size)
            if frames.owners[mfn] == DOMID_XEN and mfn not in self._area.m2p
        ]  # fmt: skip

    def _contents(self, mfn: int) -> list[int]:
        entries = self._memory.quads[mfn * _ENTRIES : (mfn + 1) * _ENTRIES].tolist()
        return entries[FREE_PAGE:] if mfn == self._area._private else entries

    def _physicals(self) -> dict[int, int]:
        """What the table says of frames that are no guest's."""
        frames, area = self._frames, self._area
        return {
            mfn: area.physical(mfn)
            for mfn in range(frames.size)
            if frames.owners[mfn] in (DOMID_XEN, DOMID_IO)
        }

    def check(self) -> None:
        """The hypervisor is whole, every count is right, and nothing can be stored to that must not be."""
        for mfn, contents in self._kept.items():
            assert self._frames.owners[mfn] == DOMID_XEN, f"frame {mfn:#x} was the hypervisor's"
            assert self._contents(mfn) == contents, f"frame {mfn:#x} of the hypervisor's has changed"
        now = self._physicals()
        for mfn, pfn in self._physical.items():
            assert now.get(mfn, pfn) == pfn, f"the table's entry of frame {mfn:#x}"
        private = self._area._private * _ENTRIES
        for entry in self._memory.quads[private : private + FREE_PAGE].tolist():
            assert not entry & P or not entry & RW, "a writable mapping of descriptors"
        held = list(self._rings)
        if self._domain.vcpu_info_moved:
            held.append(self._domain.shared.vcpu >> 12)
        self._recount.check_counts(held)
        self._recount.check_containment(self._recount.writable())
