"""Grant tables, as far as a console and XenStore need them: version 1, the guest's own table and nothing to map.

There is no other domain whose grants this one could map, and domain 0's stub needs none of the guest's: it is in the
hypervisor. So a guest sets its table up, finds the two entries that its builder has left there, and may write others.

Source: Xen's public header grant_table.h.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from vmm.machine.memory import Memory
from vmm.monitor.paravirt.abi import rings as abi
from vmm.monitor.paravirt.abi.errors import Errno, Refused
from vmm.monitor.paravirt.abi.memory import DOMID_SELF
from vmm.monitor.paravirt.abi.rings import GrantOp
from vmm.monitor.paravirt.guest import GuestMemory

MAX_FRAMES = 32  # of 512 entries each
VERSION = 1


@dataclass
class GrantState:
    """The machine frames of the table."""

    frames: list[int] = field(default_factory=list)


class GrantTable:
    """The table of domain `domain`; `share` gives a frame of the hypervisor's that the domain may map."""

    def __init__(self, memory: Memory, domain: int, share: Callable[[], int]) -> None:
        self._memory, self._domain, self._share = memory, domain, share
        self.state = GrantState()

    def seed(self, reference: int, frame: int) -> None:
        """The builder's entry: domain 0 may map a page of the guest's."""
        self._grow(1)
        entry = abi.GRANT_ENTRY.pack(abi.GTF_PERMIT_ACCESS, 0, frame)
        self._memory.load((self.state.frames[0] << 12) + reference * abi.GRANT_ENTRY.size, entry)

    def operation(self, guest: GuestMemory, command: int, argument: int, count: int) -> int:
        """grant_table_op; raises `Refused`."""
        if count >= 1 << 31:
            raise Refused(Errno.EINVAL, f"{count} operations")
        match command:
            case GrantOp.SETUP_TABLE:
                self._one(count)
                return self._setup(guest, argument)
            case GrantOp.QUERY_SIZE:
                self._one(count)
                return self._query(guest, argument)
            case GrantOp.GET_VERSION:
                self._one(count)
                domain, _ = abi.GET_VERSION.unpack(guest.read(argument, abi.GET_VERSION.size))
                if not self._own(domain):
                    raise Refused(Errno.ESRCH, f"domain {domain}")
                guest.write(argument, abi.GET_VERSION.pack(domain, VERSION))
                return 0
            case GrantOp.SET_VERSION:
                self._one(count)
                (version,) = abi.SET_VERSION.unpack(guest.read(argument, abi.SET_VERSION.size))
                if version != VERSION:
                    raise Refused(Errno.ENOSYS if version == 2 else Errno.EINVAL, f"version {version}")
                return 0
        raise Refused(Errno.ENOSYS, f"grant_table_op {command}")

    @staticmethod
    def _one(count: int) -> None:
        if count != 1:
            raise Refused(Errno.EINVAL, f"{count} operations, and it takes one")

    def _own(self, domain: int) -> bool:
        return domain in (DOMID_SELF, self._domain)

    def _grow(self, frames: int) -> None:
        while len(self.state.frames) < frames:
            self.state.frames.append(self._share())

    def _setup(self, guest: GuestMemory, argument: int) -> int:
        layout = abi.SETUP_TABLE
        domain, frames, _, frame_list = layout.unpack(guest.read(argument, layout.size))
        status = abi.GNTST_OKAY
        if frames > MAX_FRAMES:
            status = abi.GNTST_GENERAL_ERROR
        elif not self._own(domain):
            status = abi.GNTST_BAD_DOMAIN
        else:
            self._grow(frames)
            for i, frame in enumerate(self.state.frames[:frames]):
                guest.write(frame_list + 4 * i, frame.to_bytes(4, "little"))
        guest.write(argument, layout.pack(domain, frames, status, frame_list))
        return 0

    def _query(self, guest: GuestMemory, argument: int) -> int:
        layout = abi.QUERY_SIZE
        domain, *_ = layout.unpack(guest.read(argument, layout.size))
        known = self._own(domain)
        answer = (
            (len(self.state.frames), MAX_FRAMES, abi.GNTST_OKAY) if known else (0, 0, abi.GNTST_BAD_DOMAIN)
        )
        guest.write(argument, layout.pack(domain, *answer))
        return 0
