"""How to shadow page tables: what a fill costs, and what keeping shadows across CR3 is worth.

python -m tools.bench.shadow

Two questions, one run. First: after a flush, who refills the TLB, per page: the engine's own MMU walking real PAE
tables, our machine code walking the same tables from the TLB hook, or Python in that hook? Second: a guest that
switches between processes, each storing to its own pages, with shadows that are kept across CR3 loads against
shadows that are dropped at each; and the same when the kernel edits a page table between two switches.
"""

from __future__ import annotations

import ctypes
import struct
import time

import unicorn
from unicorn import unicorn_const as U
from unicorn import x86_const as X
from unicorn.unicorn_py3.unicorn import uclib

from vmm.machine.boot import boot
from vmm.machine.clock import HostClock
from vmm.machine.cpu import stub, walker
from vmm.machine.machine import Machine
from vmm.monitor.memory.shadow import Policy, ShadowMemory
from vmm.monitor.memory.statistics import Statistics
from vmm.monitor.trap.monitor import TrapMonitor

MEMORY = 16 << 20
CODE, STACK = 0x100000, 0x90000
DATA = 0x400000  # linear, of each process
DIRECTORIES, TABLES, FRAMES = 0x200000, 0x240000, 0x800000  # of process n: DIRECTORIES + 4096 n, ...
IDENTITY = 0x1F0000
_FILL = ctypes.CFUNCTYPE(
    ctypes.c_bool, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int, *([ctypes.c_void_p] * 2)
)


def _touch(pages: int) -> bytes:
    """Store to so many pages of the process."""
    return (
        b"\xbf" + struct.pack("<I", DATA) + b"\xb9" + struct.pack("<I", pages)  # mov edi, DATA; mov ecx, pages
        + bytes.fromhex("890f 81c700100000 49 75f5")  # l: mov [edi], ecx; add edi, 4096; dec ecx; jnz l
    )  # fmt: skip


def _loop(rounds: int, body: bytes) -> bytes:
    end = b"\x4e\x0f\x85" + struct.pack("<i", -(len(body) + 7)) + b"\xf4"  # dec esi; jnz; hlt
    return b"\xbe" + struct.pack("<I", rounds) + body + end


# The first question


def refill(who: str, pages: int, rounds: int) -> float:
    """Seconds for `rounds` flushes, each followed by stores to `pages` pages."""
    uc = unicorn.Uc(U.UC_ARCH_X86, U.UC_MODE_32)
    uc.ctl_set_cpu_model(X.UC_CPU_X86_EPYC)
    uc.ctl_exits_enabled(True)
    uc.ctl_set_exits([])
    memory = (ctypes.c_uint8 * MEMORY)()
    host = ctypes.addressof(memory)
    uc.mem_map_ptr(0, MEMORY, U.UC_PROT_ALL, host)
    tables = memoryview(memory).cast("B").cast("Q")

    def put(address: int, value: int) -> None:
        tables[address >> 3] = value

    nx = walker.NX
    put(0x1000, 0x2000 | walker.P)
    for half in range(4):
        put(0x2000 + 8 * half, 0x3000 + 0x1000 * half | 0x27)
    for n in range(2048):
        frame = n << 12 if n < 1024 else FRAMES + (n - 1024 << 12)
        put(0x3000 + 8 * n, frame | 0x67 | walker.STORABLE | (0 if frame == CODE else nx))
    code = _loop(rounds, bytes.fromhex("0f20d8 0f22d8") + _touch(pages))  # mov eax, cr3; mov cr3, eax
    ctypes.memmove(host + CODE, code, len(code))
    uc.msr_write(0xC0000080, 0x800)
    uc.reg_write(X.UC_X86_REG_CR4, 0x20)
    uc.reg_write(X.UC_X86_REG_CR3, 0x1000)
    uc.reg_write(X.UC_X86_REG_CR0, 0x80010011)
    shared = walker.Walker()
    zero = ctypes.c_uint32(0)
    shared.use(tables, host, 0)
    shared.set_roots(0x1000 >> 3, 0x1000 >> 3)
    shared.connect(ctypes.addressof(zero), ctypes.addressof(zero))

    def fill(_uc: int, address: int, access: int, entry: int, _data: int) -> bool:
        found = shared.look(address & 0xFFFFFFFF, access, False)
        if found is None:
            return False
        ctypes.c_uint64.from_address(entry).value, ctypes.c_int.from_address(entry + 8).value = found
        return True

    callback = _FILL(fill)
    page = stub.CodePage()
    if who != "the engine's MMU":
        uc.ctl_set_tlb_mode(U.UC_TLB_VIRTUAL)
        native = page.add(walker.fill_code(ctypes.cast(callback, ctypes.c_void_p).value or 0))
        hook = ctypes.c_void_p(native) if who == "machine code" else callback
        handle = ctypes.c_size_t()
        uclib.uc_hook_add(
            uc._uch, ctypes.byref(handle), U.UC_HOOK_TLB_FILL, hook, ctypes.c_void_p(shared.address),
            ctypes.c_uint64(1), ctypes.c_uint64(0),
        )  # fmt: skip
    started = time.perf_counter()
    uc.emu_start(CODE, 0)
    return time.perf_counter() - started


# The second question


def switching(
    policy: Policy, processes: int, pages: int, rounds: int, edits: bool
) -> tuple[float, Statistics]:
    """Seconds and counts of a guest that goes round its processes; `edits`: with a store to a table each time."""
    machine = Machine(MEMORY, clock=HostClock())
    body = b""
    for n in range(processes):
        body += b"\xb8" + struct.pack("<I", DIRECTORIES + 4096 * n) + b"\x0f\x22\xd8" + _touch(pages)
        if edits:
            word = TABLES + 4096 * n + 4 * pages
            body += b"\x81\x35" + struct.pack("<II", word, 0x1000)  # xor dword [word], 0x1000
    machine.memory.load(CODE, _loop(rounds, body))
    machine.memory.load(IDENTITY, struct.pack("<1024I", *(n << 12 | 7 for n in range(1024))))
    for n in range(processes):
        machine.memory.load(DIRECTORIES + 4096 * n, struct.pack("<II", IDENTITY | 7, TABLES + 4096 * n | 7))
        frame = FRAMES + n * pages * 4096
        entries = [frame + 4096 * i | 7 for i in range(pages)] + [FRAMES | 7]
        machine.memory.load(TABLES + 4096 * n, struct.pack(f"<{len(entries)}I", *entries))
    boot(machine, CODE)
    machine.state.esp = STACK

    class Monitor(TrapMonitor):
        def make_memory(self) -> ShadowMemory:
            return ShadowMemory(machine, self.vcpu, policy=policy)

    monitor = Monitor(machine)
    monitor.start()
    machine.attach(monitor)
    monitor.vcpu.cr3, monitor.vcpu.cr0 = DIRECTORIES, 0x80000011
    monitor.memory.control_changed()
    started = time.perf_counter()
    outcome = machine.run()
    if outcome.kind != "halt":
        raise SystemExit(f"the benchmark ended as {outcome}")
    return time.perf_counter() - started, monitor.memory.statistics


def main() -> None:
    print("A flush of the TLB, and stores to so many pages")
    for who in ("the engine's MMU", "machine code", "Python"):
        rounds = 300 if who == "Python" else 3000
        few, many = (min(refill(who, pages, rounds) for _ in range(5)) for pages in (8, 64))
        page = (many - few) / rounds / 56
        print(
            f"  {who:18} {few / rounds * 1e6:7.2f} us with 8 pages, {page * 1e9:5.0f} ns for each further page"
        )
    print("A process switch (MOV CR3) and stores to the process's pages: microseconds a switch")
    for processes, pages in ((2, 8), (2, 64), (16, 8), (16, 64)):
        for edits in (False, True):
            rounds = 4000 // processes
            times = {}
            for policy in ("kept", "lazy"):
                runs = [switching(policy, processes, pages, rounds, edits) for _ in range(2)]
                times[policy], counts = min(runs, key=lambda run: run[0])
                times[policy] /= rounds * processes / 1e6
                fills = counts.fills / rounds / processes
                print(
                    f"  {processes:2} processes, {pages:2} pages, {'an edit' if edits else 'no edit'} {policy}:"
                    f" {times[policy]:8.2f} us, {fills:6.2f} fills in Python, hidden {counts.hidden}"
                )
            print(f"    lazy / kept = {times['lazy'] / times['kept']:.1f}")


if __name__ == "__main__":
    main()
