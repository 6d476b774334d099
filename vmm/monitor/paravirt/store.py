"""XenStore, as much of it as one domain sees: a tree of values, by the wire protocol in a shared page.

The daemon of domain 0 stands here in the hypervisor and answers at once. The tree holds what a toolstack writes for
a domain with a console and no devices. The guest may read all of it and write below its own path.

Sources: Xen's public header io/xs_wire.h; docs/misc/xenstore.txt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from vmm.machine.memory import Memory
from vmm.monitor.paravirt.abi import rings
from vmm.monitor.paravirt.abi.rings import StoreOp
from vmm.monitor.paravirt.console import Ring

_QUEUE_LIMIT = 64 << 10  # bytes of answers that wait for room: a guest that never reads gets no more
_NODES, _WATCHES, _TRANSACTIONS = 1000, 128, 10  # quotas, as a daemon has them


class StoreError(Exception):
    """An answer of type ERROR: the errno's name is its payload."""


@dataclass
class StoreState:
    """Plain values: values by absolute path, watches as (path as given, token), transactions by number."""

    values: dict[str, bytes] = field(default_factory=dict)
    watches: list[tuple[str, str]] = field(default_factory=list)
    transactions: dict[int, tuple[dict[str, bytes], dict[str, bytes]]] = field(default_factory=dict)
    next_transaction: int = 1
    requests: bytes = b""  # of which part has come
    answers: bytes = b""  # for which there is no room yet


class Store:
    """The daemon. `frame` is the machine frame of the ring's page, `home` the domain's path."""

    def __init__(self, memory: Memory, frame: int, domain: int) -> None:
        base = frame << 12
        self._requests = Ring(
            memory, base + rings.STORE_REQ, rings.STORE_RING,
            base + rings.STORE_REQ_CONS, base + rings.STORE_REQ_PROD,
        )  # fmt: skip
        self._answers = Ring(
            memory, base + rings.STORE_RSP, rings.STORE_RING,
            base + rings.STORE_RSP_CONS, base + rings.STORE_RSP_PROD,
        )  # fmt: skip
        self.domain, self.home = domain, f"/local/domain/{domain}"
        self.state = StoreState()
        self.notify: Callable[[], None] = lambda: None

    def publish(self, values: dict[str, str]) -> None:
        """What the toolstack writes: values by path below the domain's own."""
        for path, value in values.items():
            self._put(self.state.values, f"{self.home}/{path}", value.encode())

    def kicked(self) -> None:
        """The guest has sent an event: answer what it asks."""
        data = self._requests.take(rings.STORE_RING)
        self.state.requests += data
        while self._one():
            pass
        if self._flush() or data:
            self.notify()

    def _one(self) -> bool:
        """Answer the first whole request."""
        state, header = self.state, rings.STORE_HEADER
        if len(state.requests) < header.size:
            return False
        kind, request, transaction, length = header.unpack_from(state.requests)
        if length > rings.STORE_PAYLOAD_MAX:
            state.requests = b""  # a broken client: nothing after it can be made sense of
            return False
        if len(state.requests) < header.size + length:
            return False
        payload = state.requests[header.size : header.size + length]
        state.requests = state.requests[header.size + length :]
        row = _OPERATIONS.get(kind)
        try:
            if row is None:
                raise StoreError("ENOSYS")
            answer = row(self, payload, transaction)
        except StoreError as error:
            kind, answer = StoreOp.ERROR, str(error).encode() + b"\0"
        if len(answer) > rings.STORE_PAYLOAD_MAX:
            kind, answer = StoreOp.ERROR, b"E2BIG\0"
        self._send(kind, request, transaction, answer)
        if kind == StoreOp.WATCH:
            path, token = self._texts(payload, 2)
            self._fire(path, token)
        return True

    def _send(self, kind: int, request: int, transaction: int, payload: bytes) -> None:
        if len(self.state.answers) < _QUEUE_LIMIT:
            self.state.answers += rings.STORE_HEADER.pack(kind, request, transaction, len(payload)) + payload

    def _flush(self) -> bool:
        state = self.state
        now, state.answers = state.answers[: self._answers.room], state.answers[self._answers.room :]
        self._answers.put(now)
        return bool(now)

    # Paths and values

    @staticmethod
    def _texts(payload: bytes, count: int) -> list[str]:
        """`count` texts that end in NUL."""
        parts = payload.split(b"\0")
        if len(parts) < count + 1:
            raise StoreError("EINVAL")
        try:
            return [part.decode("ascii") for part in parts[:count]]
        except UnicodeDecodeError:
            raise StoreError("EINVAL") from None

    def _path(self, text: str) -> str:
        """An absolute path; a relative one is below the domain's own."""
        path = text if text.startswith("/") else f"{self.home}/{text}"
        if len(path) > rings.STORE_PATH_MAX or "//" in path or (path.endswith("/") and path != "/"):
            raise StoreError("EINVAL")
        return path

    def _values(self, transaction: int) -> dict[str, bytes]:
        if not transaction:
            return self.state.values
        if transaction not in self.state.transactions:
            raise StoreError("ENOENT")
        return self.state.transactions[transaction][1]

    def _writable(self, path: str) -> None:
        if not path.startswith(self.home + "/"):
            raise StoreError("EACCES")

    @staticmethod
    def _put(values: dict[str, bytes], path: str, value: bytes) -> None:
        """A value, and empty ones for the nodes above it that are not there yet."""
        values[path] = value
        while (path := path.rpartition("/")[0]) and path not in values:
            values[path] = b""

    def _fire(self, path: str, token: str) -> None:
        self._send(StoreOp.WATCH_EVENT, 0, 0, f"{path}\0{token}\0".encode())

    def _changed(self, path: str) -> None:
        for watched, token in self.state.watches:
            absolute = watched if watched.startswith(("/", "@")) else f"{self.home}/{watched}"
            if path == absolute or path.startswith(absolute.rstrip("/") + "/"):
                relative = path if watched.startswith("/") else path[len(self.home) + 1 :]
                self._fire(relative, token)

    # Operations: payload and transaction to the answer's payload

    def _read(self, payload: bytes, transaction: int) -> bytes:
        path = self._path(self._texts(payload, 1)[0])
        try:
            return self._values(transaction)[path]
        except KeyError:
            raise StoreError("ENOENT") from None

    def _directory(self, payload: bytes, transaction: int) -> bytes:
        path = self._path(self._texts(payload, 1)[0])
        values = self._values(transaction)
        if path != "/" and path not in values:
            raise StoreError("ENOENT")
        prefix = path.rstrip("/") + "/"
        names = dict.fromkeys(p[len(prefix) :].split("/")[0] for p in values if p.startswith(prefix))
        return b"".join(name.encode() + b"\0" for name in names)

    def _write(self, payload: bytes, transaction: int) -> bytes:
        text, separator, value = payload.partition(b"\0")
        path = self._path(self._texts(text + separator, 1)[0])
        self._writable(path)
        values = self._values(transaction)
        if path not in values and len(values) >= _NODES:
            raise StoreError("ENOSPC")
        self._put(values, path, value)
        if not transaction:
            self._changed(path)
        return b"OK\0"

    def _mkdir(self, payload: bytes, transaction: int) -> bytes:
        path = self._path(self._texts(payload, 1)[0])
        values = self._values(transaction)
        if path in values:
            return b"OK\0"
        return self._write(path.encode() + b"\0", transaction)

    def _remove(self, payload: bytes, transaction: int) -> bytes:
        path = self._path(self._texts(payload, 1)[0])
        self._writable(path)
        values = self._values(transaction)
        if path not in values:
            raise StoreError("ENOENT")
        for below in [p for p in values if p == path or p.startswith(path + "/")]:
            del values[below]
        if not transaction:
            self._changed(path)
        return b"OK\0"

    def _permissions(self, payload: bytes, transaction: int) -> bytes:
        path = self._path(self._texts(payload, 1)[0])
        if path not in self._values(transaction):
            raise StoreError("ENOENT")
        owner = self.domain if path.startswith(self.home + "/") else 0
        return f"{'n' if owner else 'r'}{owner}\0".encode()

    def _set_permissions(self, payload: bytes, transaction: int) -> bytes:
        path = self._path(self._texts(payload, 2)[0])
        self._writable(path)
        self._permissions(payload, transaction)
        return b"OK\0"

    def _watch(self, payload: bytes, _transaction: int) -> bytes:
        path, token = self._texts(payload, 2)
        if not path.startswith("@"):
            self._path(path)
        if (path, token) in self.state.watches:
            raise StoreError("EEXIST")
        if len(self.state.watches) >= _WATCHES:
            raise StoreError("E2BIG")
        self.state.watches.append((path, token))
        return b"OK\0"

    def _unwatch(self, payload: bytes, _transaction: int) -> bytes:
        path, token = self._texts(payload, 2)
        if (path, token) not in self.state.watches:
            raise StoreError("ENOENT")
        self.state.watches.remove((path, token))
        return b"OK\0"

    def _reset_watches(self, _payload: bytes, _transaction: int) -> bytes:
        self.state.watches.clear()
        return b"OK\0"

    def _transaction_start(self, _payload: bytes, transaction: int) -> bytes:
        state = self.state
        if transaction:
            raise StoreError("EBUSY")
        if len(state.transactions) >= _TRANSACTIONS:
            raise StoreError("ENOSPC")
        number = state.next_transaction
        state.next_transaction = number % 0xFFFFFFFF + 1
        state.transactions[number] = dict(state.values), dict(state.values)
        return f"{number}\0".encode()

    def _transaction_end(self, payload: bytes, transaction: int) -> bytes:
        state = self.state
        verdict = self._texts(payload, 1)[0]
        if verdict not in ("T", "F"):
            raise StoreError("EINVAL")
        self._values(transaction)
        if not transaction:
            raise StoreError("EINVAL")
        before, after = state.transactions.pop(transaction)
        if verdict == "T":
            if before != state.values:
                raise StoreError("EAGAIN")
            state.values = after
            for path in sorted(p for p in before.keys() | after.keys() if before.get(p) != after.get(p)):
                self._changed(path)
        return b"OK\0"

    def _domain_path(self, payload: bytes, _transaction: int) -> bytes:
        text = self._texts(payload, 1)[0]
        if not text.isdigit():
            raise StoreError("EINVAL")
        return f"/local/domain/{int(text[:10])}\0".encode()

    def _introduced(self, payload: bytes, _transaction: int) -> bytes:
        text = self._texts(payload, 1)[0]
        return b"T\0" if text in ("0", str(self.domain)) else b"F\0"

    def _privileged(self, _payload: bytes, _transaction: int) -> bytes:
        raise StoreError("EACCES")


_Operation = Callable[[Store, bytes, int], bytes]
_OPERATIONS: dict[int, _Operation] = {
    StoreOp.DIRECTORY: Store._directory,
    StoreOp.READ: Store._read,
    StoreOp.GET_PERMS: Store._permissions,
    StoreOp.WATCH: Store._watch,
    StoreOp.UNWATCH: Store._unwatch,
    StoreOp.TRANSACTION_START: Store._transaction_start,
    StoreOp.TRANSACTION_END: Store._transaction_end,
    StoreOp.GET_DOMAIN_PATH: Store._domain_path,
    StoreOp.WRITE: Store._write,
    StoreOp.MKDIR: Store._mkdir,
    StoreOp.RM: Store._remove,
    StoreOp.SET_PERMS: Store._set_permissions,
    StoreOp.IS_DOMAIN_INTRODUCED: Store._introduced,
    StoreOp.RESET_WATCHES: Store._reset_watches,
    StoreOp.CONTROL: Store._privileged,
    StoreOp.INTRODUCE: Store._privileged,
    StoreOp.RELEASE: Store._privileged,
    StoreOp.RESUME: Store._privileged,
    StoreOp.SET_TARGET: Store._privileged,
}
