"""Event channels: a domain's ports, and what comes in at them.

A port is bound to something (a virtual interrupt, the domain itself, a port of another domain). An event sets the
port's pending bit; if the port is not masked, its word's bit in the selector; if that was clear, the upcall is
pending. The bits are the guest's as much as ours; the bindings are ours alone. The only other domain is the stub of
domain 0 that stands behind the console and XenStore.

Sources: Xen's public header event_channel.h; the order of checks and the error numbers are Xen's behaviour.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from vmm.monitor.paravirt.abi import events as abi
from vmm.monitor.paravirt.abi.domain import CHANNELS
from vmm.monitor.paravirt.abi.errors import Errno, Refused
from vmm.monitor.paravirt.abi.events import EventOp, Status, Virq
from vmm.monitor.paravirt.abi.memory import DOMID_SELF
from vmm.monitor.paravirt.guest import GuestMemory
from vmm.monitor.paravirt.shared import SharedInfo

DOM0 = 0
OURS = frozenset((Virq.CONSOLE,))  # global interrupts that come to this domain: it is the console's


@dataclass
class Channel:
    """One port; `peer` is the port on the other side, `virq` the interrupt, by `status`."""

    status: Status = Status.CLOSED
    remote: int = 0
    peer: int = 0
    virq: int = 0


@dataclass
class EventState:
    """Plain values: bindings by port, and ports by virtual interrupt."""

    channels: dict[int, Channel] = field(default_factory=dict)
    virqs: dict[int, int] = field(default_factory=dict)


class EventChannels:
    """The ports of domain `domain`. `raised(port)` is called when a pending bit is set."""

    def __init__(self, shared: SharedInfo, domain: int) -> None:
        self._shared, self._domain = shared, domain
        self.state = EventState()
        self.raised: Callable[[int], None] = lambda _port: None
        # What stands behind a port that leads to domain 0, by the port's number there.
        self.backends: dict[int, Callable[[], None]] = {}

    # For the hypervisor

    def connect(self, backend: Callable[[], None]) -> int:
        """A port that leads to domain 0, where `backend` is told of what the guest sends; its number."""
        port = self._free_port()
        peer = port + 16
        self.state.channels[port] = Channel(Status.INTERDOMAIN, DOM0, peer)
        self.backends[peer] = backend
        return port

    def raise_virq(self, virq: int) -> None:
        """A virtual interrupt: lost if the guest has not bound it."""
        port = self.state.virqs.get(virq)
        if port is not None:
            self.notify(port)

    def notify(self, port: int) -> None:
        """An event comes in at `port`, if it is still open."""
        if port not in self.state.channels:
            return
        shared = self._shared
        if not shared.set_pending(port):
            return
        if not shared.is_masked(port) and shared.select(port):
            shared.upcall_pending = True
        self.raised(port)

    # The hypercall

    def operation(self, guest: GuestMemory, command: int, argument: int) -> int:
        """event_channel_op; raises `Refused`."""
        row = _OPERATIONS.get(command)
        if row is None:
            raise Refused(Errno.ENOSYS, f"event_channel_op {command}")
        return row(self, guest, argument)

    def _free_port(self) -> int:
        for port in range(1, CHANNELS):
            if port not in self.state.channels:
                return port
        raise Refused(Errno.ENOSPC, "no event channel is free")

    def _channel(self, port: int) -> Channel:
        if not 0 <= port < CHANNELS:
            raise Refused(Errno.EINVAL, f"port {port}")
        return self.state.channels.get(port) or Channel()

    def _own(self, domain: int) -> None:
        """Check that a domain is the caller; only domain 0 may act for others."""
        if domain in (DOMID_SELF, self._domain):
            return
        raise Refused(Errno.EPERM if domain == DOM0 else Errno.ESRCH, f"domain {domain}")

    @staticmethod
    def _check_vcpu(vcpu: int) -> None:
        if vcpu:
            raise Refused(Errno.ENOENT, f"vcpu {vcpu}")

    def _alloc_unbound(self, guest: GuestMemory, argument: int) -> int:
        domain, remote, _ = abi.ALLOC_UNBOUND.unpack(guest.read(argument, abi.ALLOC_UNBOUND.size))
        self._own(domain)
        port = self._free_port()
        self.state.channels[port] = Channel(Status.UNBOUND, self._domain if remote == DOMID_SELF else remote)
        guest.write(argument, abi.ALLOC_UNBOUND.pack(domain, remote, port))
        return 0

    def _bind_interdomain(self, guest: GuestMemory, argument: int) -> int:
        layout = abi.BIND_INTERDOMAIN
        domain, remote_port, _ = layout.unpack(guest.read(argument, layout.size))
        remote = self._domain if domain == DOMID_SELF else domain
        if remote not in (self._domain, DOM0):
            raise Refused(Errno.ESRCH, f"domain {remote}")
        port = self._free_port()
        if remote == DOM0:
            raise Refused(Errno.EINVAL, "domain 0 waits at no port for this domain")
        other = self._channel(remote_port)
        if other.status is not Status.UNBOUND or other.remote != self._domain:
            raise Refused(Errno.EINVAL, f"port {remote_port} does not wait for this domain")
        self.state.channels[port] = Channel(Status.INTERDOMAIN, self._domain, remote_port)
        other.status, other.remote, other.peer = Status.INTERDOMAIN, self._domain, port
        self.notify(port)  # in case the other side has sent before
        guest.write(argument, layout.pack(domain, remote_port, port))
        return 0

    def _bind_virq(self, guest: GuestMemory, argument: int) -> int:
        virq, vcpu, _ = abi.BIND_VIRQ.unpack(guest.read(argument, abi.BIND_VIRQ.size))
        if virq >= abi.VIRQS:
            raise Refused(Errno.EINVAL, f"virtual interrupt {virq}")
        if virq not in abi.PER_VCPU_VIRQS and vcpu:
            raise Refused(Errno.EINVAL, "a global interrupt is vcpu 0's")
        self._check_vcpu(vcpu)
        if virq not in abi.PER_VCPU_VIRQS and virq not in OURS and virq != Virq.ARGO:
            raise Refused(Errno.EBUSY, f"virtual interrupt {virq} is domain 0's")
        if virq in self.state.virqs:
            raise Refused(Errno.EEXIST, f"virtual interrupt {virq} is bound")
        port = self._free_port()
        self.state.channels[port] = Channel(Status.VIRQ, virq=virq)
        self.state.virqs[virq] = port
        guest.write(argument, abi.BIND_VIRQ.pack(virq, vcpu, port))
        return 0

    def _bind_pirq(self, guest: GuestMemory, argument: int) -> int:
        pirq, _, _ = abi.BIND_PIRQ.unpack(guest.read(argument, abi.BIND_PIRQ.size))
        raise Refused(Errno.EPERM if pirq < 256 else Errno.EINVAL, "this domain has no physical interrupts")

    def _bind_ipi(self, guest: GuestMemory, argument: int) -> int:
        vcpu, _ = abi.BIND_IPI.unpack(guest.read(argument, abi.BIND_IPI.size))
        self._check_vcpu(vcpu)
        port = self._free_port()
        self.state.channels[port] = Channel(Status.IPI)
        guest.write(argument, abi.BIND_IPI.pack(vcpu, port))
        return 0

    def _close(self, guest: GuestMemory, argument: int) -> int:
        (port,) = abi.PORT.unpack(guest.read(argument, abi.PORT.size))
        if self._channel(port).status is Status.CLOSED:
            raise Refused(Errno.EINVAL, f"port {port} is not open")
        self._forget(port)
        return 0

    def _forget(self, port: int) -> None:
        channel = self.state.channels.pop(port)
        self._shared.clear_pending(port)
        if channel.status is Status.VIRQ:
            del self.state.virqs[channel.virq]
        elif channel.status is Status.INTERDOMAIN:
            self.backends.pop(channel.peer, None)
            other = self.state.channels.get(channel.peer)
            if channel.remote == self._domain and other is not None:
                other.status, other.peer = Status.UNBOUND, 0

    def _send(self, guest: GuestMemory, argument: int) -> int:
        (port,) = abi.PORT.unpack(guest.read(argument, abi.PORT.size))
        channel = self._channel(port)
        match channel.status:
            case Status.IPI:
                self.notify(port)
            case Status.INTERDOMAIN if channel.remote == self._domain:
                self.notify(channel.peer)
            case Status.INTERDOMAIN:
                self.backends[channel.peer]()
            case Status.UNBOUND:
                pass  # nobody hears it
            case _:
                raise Refused(Errno.EINVAL, f"port {port} cannot be sent to")
        return 0

    def _status(self, guest: GuestMemory, argument: int) -> int:
        domain, port, *_ = abi.STATUS.unpack(guest.read(argument, abi.STATUS.size))
        self._own(domain)
        channel = self._channel(port)
        words = {
            Status.UNBOUND: (channel.remote, 0),
            Status.INTERDOMAIN: (channel.remote, channel.peer),
            Status.VIRQ: (channel.virq, 0),
        }.get(channel.status, (0, 0))
        guest.write(argument, abi.STATUS.pack(domain, port, channel.status, 0, *words))
        return 0

    def _bind_vcpu(self, guest: GuestMemory, argument: int) -> int:
        port, vcpu = abi.BIND_VCPU.unpack(guest.read(argument, abi.BIND_VCPU.size))
        self._check_vcpu(vcpu)
        channel = self._channel(port)
        moves = channel.status in (Status.UNBOUND, Status.INTERDOMAIN)
        if not moves and (channel.status is not Status.VIRQ or channel.virq in abi.PER_VCPU_VIRQS):
            raise Refused(Errno.EINVAL, f"port {port} belongs to its vcpu")
        return 0

    def _unmask(self, guest: GuestMemory, argument: int) -> int:
        (port,) = abi.PORT.unpack(guest.read(argument, abi.PORT.size))
        if self._channel(port).status is Status.CLOSED and port == 0:
            raise Refused(Errno.EINVAL, "port 0")
        shared = self._shared
        if shared.clear_mask(port) and shared.is_pending(port) and shared.select(port):
            shared.upcall_pending = True
        return 0

    def _reset(self, guest: GuestMemory, argument: int) -> int:
        (domain,) = abi.RESET.unpack(guest.read(argument, abi.RESET.size))
        self._own(domain)
        for port in list(self.state.channels):
            self._forget(port)
        return 0

    def _no_fifo(self, _guest: GuestMemory, _argument: int) -> int:
        raise Refused(Errno.ENOSYS, "event channels are of the two-level kind")


_Operation = Callable[[EventChannels, GuestMemory, int], int]
_OPERATIONS: dict[int, _Operation] = {
    EventOp.BIND_INTERDOMAIN: EventChannels._bind_interdomain,
    EventOp.BIND_VIRQ: EventChannels._bind_virq,
    EventOp.BIND_PIRQ: EventChannels._bind_pirq,
    EventOp.CLOSE: EventChannels._close,
    EventOp.SEND: EventChannels._send,
    EventOp.STATUS: EventChannels._status,
    EventOp.ALLOC_UNBOUND: EventChannels._alloc_unbound,
    EventOp.BIND_IPI: EventChannels._bind_ipi,
    EventOp.BIND_VCPU: EventChannels._bind_vcpu,
    EventOp.UNMASK: EventChannels._unmask,
    EventOp.RESET: EventChannels._reset,
    EventOp.INIT_CONTROL: EventChannels._no_fifo,
    EventOp.EXPAND_ARRAY: EventChannels._no_fifo,
    EventOp.SET_PRIORITY: EventChannels._no_fifo,
}
