"""Unicorn behind one door: hooks, memory, running and stopping. The only module that knows how.

The engine calls back through C function pointers. A callback must not raise (the exception would be lost),
so each one here catches, records, stops the CPU, and `run` raises the record once, outside.

What `run` promises: it returns only at an instruction boundary, with the registers of exactly that boundary
(or, for a refused memory access, of the instruction that made it), and says why. The hard part is IN and
OUT: their hook cannot end the block that they stand in. Where one must be the last thing that happens,
`seal` closes the TLB, so that no later instruction of the block can reach memory, and afterwards puts the
registers back as they were right after the port instruction.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import unicorn
from unicorn import unicorn_const as U
from unicorn import x86_const as X
from unicorn.unicorn_py3.unicorn import uclib

from vmm.errors import EngineError
from vmm.machine.cpu import exported, stub, walker
from vmm.machine.cpu import layout as at
from vmm.machine.cpu import signatures as sig
from vmm.machine.cpu.collapse import TLB_MODE, Watch
from vmm.machine.cpu.counter import Counter, rdtsc_code
from vmm.machine.cpu.handler import FETCH, PROT_EXEC, PROT_READ, PROT_WRITE, READ, WRITE, Handler, Stop
from vmm.machine.cpu.mend import mend
from vmm.machine.cpu.site_hooks import SiteHooks
from vmm.machine.cpu.state import CpuState
from vmm.machine.cpu.verify import PAGE, TlbEntry, context_bytes, open_engine, u64_at, verify_once

__all__ = [
    "FETCH", "INTERCEPT", "PROT_EXEC", "PROT_READ", "PROT_WRITE", "READ", "WRITE", "Engine", "Handler", "Stop"
]  # fmt: skip

NO_EXCEPTION = 0xFFFFFFFF
RESET_MXCSR = 0x1F80  # SDM volume 3A, table 9-1: all exceptions of SSE masked
_DB, _UD, _PF = 1, 6, 14
INTERCEPT = 0x100  # what the engine adds to the code of a #VMEXIT
_FLUSH_TLB = U.UC_CTL_TLB_FLUSH | 1 << 30
_REMOVE_CACHE = U.UC_CTL_TB_REMOVE_CACHE | 2 << 26 | 1 << 30
_FLUSH_TB = U.UC_CTL_TB_FLUSH | 1 << 30
_IS_INT, _OLD_EXCEPTION = at.EXCEPTION_IS_INT // 4, at.OLD_EXCEPTION // 4
_EIP, _CR2, _ERROR_CODE, _RETADDR = at.EIP // 4, at.CR2 // 4, at.ERROR_CODE // 4, at.RETADDR // 4
_HFLAGS = at.HFLAGS // 4

_VOID_P, _U32, _U64 = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint64


class Engine:
    """One Unicorn CPU in 32-bit mode, with a TLB that the handler fills, or its own MMU."""

    def __init__(self, *, live: bool = True, native_code: bool = True) -> None:
        if unicorn.__version__ != "2.1.4":
            raise EngineError(f"unicorn {unicorn.__version__} is installed: install unicorn==2.1.4")
        self._uc = open_engine()
        verify_once()
        self._engine = self._uc._uch
        self._watch = Watch(self._engine.value)
        self._handler: Handler | None = None
        self._failure: BaseException | None = None
        self._requested = False
        self._copied = True  # the registers are seen through a copy, to be loaded and stored at each exit
        self._sealed: bytes | None = None
        self._sealed_budget = 0
        self._refused: tuple[int, int] | None = None
        self._own_mmu = False
        self._on_entry: Callable[[int], None] | None = None  # who hears of exceptions and exits instead
        self._cr2 = 0  # with its own MMU: CR2 before the page fault that is being looked at
        self._dropping: int | None = None
        self._dropper = exported.CodeDropper(self._engine.value)
        self._registers = 0  # address of the live registers, if they are not seen through a copy
        self._translated = (0, 0, 0)
        self.foreign = range(
            0
        )  # linear addresses of code of which only the handler can say what it counts for
        self.shadowed_pass = (
            -1,
            0,
        )  # a pass that had a shadow until now: linear address, and budget before it
        self._block_hook: ctypes.c_size_t | None = None
        self._sites = SiteHooks(self._hook_site, self._unhook, self._forget_block, self.drop_all_code)
        self._keep: list[object] = []
        self._entry = TlbEntry()
        self.running = False
        self.meter = stub.Meter()
        self.counter = Counter(self.meter)
        self.walker = walker.Walker()
        self._native = native_code and stub.supported()
        self._uc.ctl_exits_enabled(True)
        self._uc.ctl_set_exits([])
        self._set_tlb_mode(False)
        self._uc.reg_write(X.UC_X86_REG_MXCSR, RESET_MXCSR)  # the library starts with 0
        self._warm_up()
        self.state = self._make_state(live and self._native)
        self._install()

    # Construction

    def _hook(
        self,
        kind: int,
        callback: object,
        data: int | None = None,
        begin: int = 1,
        end: int = 0,
        instruction: int | None = None,
    ) -> ctypes.c_size_t:
        """Register a C callback without the Python wrapper around it, which doubles the cost of an exit."""
        handle = ctypes.c_size_t()
        extra = () if instruction is None else (ctypes.c_int(instruction),)
        status = uclib.uc_hook_add(
            self._engine, ctypes.byref(handle), kind, callback, _VOID_P(data), _U64(begin), _U64(end), *extra
        )
        if status:
            raise EngineError(f"Unicorn refused a hook of kind {kind} (error {status})")
        self._keep.append(callback)
        return handle

    def _make_state(self, live: bool) -> CpuState:
        flags = ctypes.c_uint64()
        reference = ctypes.byref(flags)

        def flags_now() -> int:
            uclib.uc_reg_read(self._engine, X.UC_X86_REG_EFLAGS, reference)
            return flags.value & 0xFFFFFFFF

        if live:
            address = self._find_registers()
            if address:
                window = (ctypes.c_uint8 * at.SIZE).from_address(address)
                self._copied = False
                self._registers = address
                self.walker.connect(address + at.HFLAGS, self._watch.address)
                return CpuState(memoryview(window).cast("B"), flags_now)
        context = self._uc.context_save()
        self._keep.append(context)
        pointer = context.context
        window = (ctypes.c_uint8 * at.SIZE).from_address(pointer.value + at.HEADER)

        def load() -> None:
            uclib.uc_context_save(self._engine, pointer)

        def store() -> None:
            uclib.uc_context_restore(self._engine, pointer)

        return CpuState(memoryview(window).cast("B"), flags_now, load, store)

    def _find_registers(self) -> int:
        """The address of the live register file, or 0 where what is found is not it."""
        address: int = self.meter.quads[stub.REGISTERS // 8]
        saved = context_bytes(self._uc)[at.HEADER :]
        return address if address and ctypes.string_at(address, at.SIZE) == saved else 0

    def _warm_up(self) -> None:
        """Execute two blocks, of which the first ends by itself.

        The engine reports a translation only once a block has been executed to its end, and every block of the
        guest's must be reported. On the way, see where the registers are.
        """
        scratch = 0x1000
        self._uc.mem_map(scratch, PAGE)
        self._uc.mem_write(scratch, bytes.fromhex("eb00f4"))  # jmp next; next: hlt
        hook = None
        if self._native:
            page = stub.CodePage()
            self._keep.append(page)
            hook = self._hook(U.UC_HOOK_BLOCK, _VOID_P(page.add(stub.CAPTURE_CODE)), self.meter.address)
        self._uc.emu_start(scratch, 0)
        if hook is not None:
            uclib.uc_hook_del(self._engine, hook)
        self._uc.mem_unmap(scratch, PAGE)
        self._uc.ctl_flush_tb()
        self.flush_tlb()

    def _guarded(self, function: Callable[..., object], default: object = None) -> Callable[..., object]:
        """Wrap a callback so that what it raises is recorded, the CPU stopped, and `run` raises it."""

        def call(*args: object) -> object:
            try:
                return function(*args)
            except BaseException as error:
                self._fail(error)
                return default

        return call

    def _ask_to_stop(self) -> None:
        self.meter.halt()
        uclib.uc_emu_stop(self._engine)

    def _fail(self, error: BaseException) -> None:
        """Remember what a callback raised, for `run` to raise it."""
        if self._failure is None:
            self._failure = error
        self._requested = True
        self._ask_to_stop()

    def _install(self) -> None:
        guard = self._guarded
        self._hook(U.UC_HOOK_INTR, sig.ON_INTERRUPT(self._on_interrupt))
        self._hook(U.UC_HOOK_INSN_INVALID, sig.ON_INVALID(guard(self._on_invalid, True)))
        for name, kind, callback, default in (
            ("IN", sig.ON_IN, self._on_in, 0),
            ("OUT", sig.ON_OUT, self._on_out, None),
            ("CPUID", sig.ON_CPUID, self._on_cpuid, 1),
            ("SYSENTER", sig.ON_SYSENTER, self._on_sysenter, None),
        ):
            instruction = getattr(X, f"UC_X86_INS_{name}")
            self._hook(U.UC_HOOK_INSN, kind(guard(callback, default)), instruction=instruction)
        on_rdtsc = sig.ON_CPUID(guard(self._on_rdtsc, 1))
        rdtsc_callback: object = on_rdtsc
        if self._native and not self._copied:
            page = stub.CodePage()
            self._keep += [page, on_rdtsc]
            self.counter.connect()
            rdtsc_callback = _VOID_P(page.add(rdtsc_code(ctypes.cast(on_rdtsc, _VOID_P).value or 0)))
        self._hook(U.UC_HOOK_INSN, rdtsc_callback, self.counter.address, instruction=X.UC_X86_INS_RDTSC)
        on_fill = sig.ON_FILL(self._on_fill)
        fill_callback: object = on_fill
        if self.walker.native:
            page = stub.CodePage()
            self._keep += [page, on_fill]
            fill_callback = _VOID_P(page.add(walker.fill_code(ctypes.cast(on_fill, _VOID_P).value or 0)))
        self._hook(U.UC_HOOK_TLB_FILL, fill_callback, self.walker.address)
        on_translated = sig.ON_TRANSLATED(guard(self._on_translated))
        translated_callback: object = on_translated
        if self._native:
            page = stub.CodePage()
            self._keep += [page, on_translated]
            code = stub.translated_code(ctypes.cast(on_translated, _VOID_P).value or 0)
            translated_callback = _VOID_P(page.add(code))
        self._on_translated_callback = on_translated
        self._translated_hook = self._hook(U.UC_HOOK_EDGE_GENERATED, translated_callback, self.meter.address)
        on_block = sig.ON_BLOCK(guard(self._on_block))
        self._keep.append(on_block)
        if self._native:
            page = stub.CodePage()
            self._keep.append(page)
            stop = ctypes.cast(uclib.uc_emu_stop, _VOID_P).value or 0
            code = stub.block_code(stop, ctypes.cast(on_block, _VOID_P).value or 0, exported.check_exit)
            self._block_callback: object = _VOID_P(page.add(code))
        else:
            self._block_callback = sig.ON_CODE(guard(self._on_block_in_python))
        self.count_blocks(True)
        self._on_site_callback = sig.ON_CODE(guard(self._on_site))

    def count_blocks(self, on: bool) -> None:
        """Whether each block is counted, and may stop the CPU; between runs only.

        Off, the CPU runs at its own speed, and nothing but an exit stops it.
        """
        if on == (self._block_hook is not None):
            return
        if on:
            self._block_hook = self._hook(U.UC_HOOK_BLOCK, self._block_callback, self.meter.address)
        elif self._block_hook is not None:
            uclib.uc_hook_del(self._engine, self._block_hook)
            self._block_hook = None
        self._sites.forget()

    def abandon(self) -> None:
        """From another thread: leave `run` wherever it is.

        The state is then not one that the guest may go on from (a store may have been made and not counted): only
        for ending a run that nothing else can stop.
        """
        self._requested = True
        self._ask_to_stop()

    def attach(self, handler: Handler) -> None:
        """Who handles the exits from now on."""
        self._handler = handler
        self.shadowed_pass = -1, 0
        self._site_eip = -1

    # Memory

    def map_memory(self, address: int, size: int, host: int) -> None:
        """Show `size` bytes of host memory at physical `address`."""
        self._uc.mem_map_ptr(address, size, U.UC_PROT_ALL, host)
        self._dropper.add(address, size, host)

    def map_window(
        self,
        address: int,
        size: int,
        load: Callable[[int, int], int],
        store: Callable[[int, int, int], None],
    ) -> None:
        """Have loads and stores of `size` bytes at physical `address` asked of `load` and `store`.

        They get an offset into the window and a width of 1, 2 or 4 bytes, of which the offset is a multiple.
        """

        def on_load(_uc: int, offset: int, width: int, _data: int) -> int:
            self.state.load()
            return load(offset, width)

        def on_store(_uc: int, offset: int, width: int, value: int, _data: int) -> None:
            self.state.load()
            store(offset, width, value)

        callbacks = sig.ON_LOAD(self._guarded(on_load, 0)), sig.ON_STORE(self._guarded(on_store))
        self._keep += callbacks
        status = uclib.uc_mmio_map(
            self._engine, _U64(address), _U64(size),
            ctypes.cast(callbacks[0], _VOID_P), None, ctypes.cast(callbacks[1], _VOID_P), None,
        )  # fmt: skip
        if status:
            raise EngineError(f"Unicorn refused a window of devices at {address:#x} (error {status})")

    def flush_tlb(self) -> None:
        """Forget every translation of addresses: the handler's `fill` is asked anew."""
        uclib.uc_ctl(self._engine, _FLUSH_TLB)

    def flush_page(self, address: int) -> None:
        """The same for those of one linear page, at the least."""
        if exported.flush_page is None or self._copied:
            self.flush_tlb()
            return
        words = self.state.words
        flags = words[_HFLAGS]
        words[_HFLAGS] = flags & ~at.HF_GUEST  # whose host may intercept the instruction, and it is none
        exported.flush_page(self._registers, address)
        words[_HFLAGS] = flags

    def drop_code(self, start: int, end: int) -> None:
        """Forget the code translated from physical bytes `start` to `end` of one page. The TLB may keep the page."""
        if not self._dropper.drop(start, end):
            self._drop_by_address(start, end)

    def _drop_by_address(self, start: int, end: int) -> None:
        """The library takes a linear address and looks it up in the TLB; `_dropping` answers that look-up."""
        self._dropping = start & ~(PAGE - 1)
        self._set_tlb_mode(False)
        self.walker.close(walker.DROPPING)
        self.flush_tlb()
        uclib.uc_ctl(self._engine, _REMOVE_CACHE, _U64(start), _U64(end))
        self._dropping = None
        self.walker.open(walker.DROPPING)
        self._set_tlb_mode(self._own_mmu and self._sealed is None)
        self.flush_tlb()

    def drop_all_code(self) -> None:
        """Forget all translated code (only outside `run`)."""
        uclib.uc_ctl(self._engine, _FLUSH_TB)
        self.meter.forget_last()

    def run_entry(self, report: Callable[[int], None]) -> Stop:
        """`run`, for a host that enters a guest: `report` hears of exceptions and exits, in the engine's numbers.

        After VMRUN has delivered an event the engine reports its vector, too, once, as if it were yet to come.
        """
        self._on_entry = report
        try:
            return self.run()
        finally:
            self._on_entry = None

    @staticmethod
    def nested_may_be_nx() -> bool:
        """Whether nested page tables may have NX; without, the guest could end the process (see `mend`)."""
        return mend()

    def tell_all_translations(self) -> None:
        """The handler hears of each translation from now on, of foreign code too that nobody has to look at."""
        uclib.uc_hook_del(self._engine, self._translated_hook)
        self._translated_hook = self._hook(U.UC_HOOK_EDGE_GENERATED, self._on_translated_callback)

    def show_foreign(self, address: int, marks: memoryview) -> None:
        """At a linear address lies code of which the handler says what it counts for, and whether to look at it.

        `marks` say the same, a byte for each of its bytes (`stub.BEGINS`, `stub.LOOK`), writable and there to stay.
        """
        self.foreign = range(address, address + len(marks))
        host = ctypes.addressof(ctypes.c_char.from_buffer(marks))
        self.meter.show_foreign(address, len(marks), host)

    def use_own_mmu(self, on: bool) -> None:
        """Whether the CPU walks page tables itself, the guest's and nested ones, or asks the handler's `fill`.

        With its own MMU a page fault still ends `run` with `Stop.REFUSED`, CR2 as it was before.
        """
        self._own_mmu = on
        self._set_tlb_mode(on)
        self.flush_tlb()

    def _set_tlb_mode(self, own: bool) -> None:
        uclib.uc_ctl(self._engine, TLB_MODE, ctypes.c_int(U.UC_TLB_CPU if own else U.UC_TLB_VIRTUAL))

    @property
    def fetching(self) -> bool:
        """In a handler, with its own MMU: whether the access that exits was made to translate code."""
        w = self.state.words
        return not w[_RETADDR] | w[_RETADDR + 1]

    def refuse(self, address: int, access: int) -> None:
        """From a handler, with its own MMU: end `run` with `Stop.REFUSED` for this access."""
        self._refused = address, access
        self._ask_to_stop()

    def write_msr(self, number: int, value: int) -> None:
        """WRMSR, as ring 0 would execute it (only outside `run`)."""
        self._uc.msr_write(number, value)

    # Running

    def stop(self) -> None:
        """From a handler (not of IN or OUT): leave `run` before the next instruction executes."""
        self._requested = True
        self._ask_to_stop()

    def seal(self) -> None:
        """From any handler: nothing after this moment happens; `run` returns with the state of now.

        Needed in IN and OUT handlers, whose block goes on whatever they do. The state is taken as it stands,
        so the handler first puts EIP (and a result) where they belong.
        """
        if self._sealed is None:
            self.state.store()
            self._sealed = self.state.save()
            self._sealed_budget = self.meter.budget
            self._requested = True
            self._set_tlb_mode(False)
            self.walker.close(walker.SEALED)
            self.flush_tlb()
            self._ask_to_stop()

    @property
    def sealed(self) -> bool:
        return self._sealed is not None

    def run(self) -> Stop:
        """Run from EIP until something stops the CPU. Raises what a handler raised, or `EngineError`."""
        self.state.store()
        self.state.prepare_flags()
        self._cr2 = self.state.words[_CR2]
        while True:
            if self._sites.new:
                self.state.load()
                self._sites.place()
            self._requested = False
            self._refused = None
            self._sites.stopped = False
            self.running = True
            begin = _U64(self.state.eip)
            self._watch.enter()
            status = uclib.uc_emu_start(self._engine, begin, _U64(0), _U64(0), ctypes.c_size_t(0))
            self.running = False
            self.meter.resume()
            collapsed = self._watch.leave()
            if self._failure is not None:
                failure, self._failure = self._failure, None
                self.meter.take_stopped()
                self._unseal()
                raise failure
            if not self._sites.new:
                break
        stopped = self.meter.take_stopped()
        if self._unseal():
            return Stop.REQUESTED
        self.state.load()
        if collapsed:
            self._set_tlb_mode(self._own_mmu)
            self.flush_tlb()
            return Stop.COLLAPSED
        if self._refused is not None:
            if self.state.eip == self._sites.left_to_engine and self._refused[1] != FETCH:
                self._sites.restore_flags(self.state)
            return Stop.REFUSED
        if status:
            raise EngineError(f"the CPU engine gave up: {unicorn.UcError(status)} at EIP {self.state.eip:#x}")
        if self._sites.stopped:
            return Stop.SITE
        if self._requested:
            return Stop.REQUESTED
        return Stop.METER if stopped else Stop.HALT

    def _unseal(self) -> bool:
        if self._sealed is None:
            return False
        self.state.restore(self._sealed)
        self.state.store()
        self.meter.budget = self._sealed_budget
        self.meter.forget_last()
        self._sealed = None
        self.walker.open(walker.SEALED)
        self._set_tlb_mode(self._own_mmu)
        self.flush_tlb()
        return True

    @property
    def refused(self) -> tuple[int, int]:
        """(linear address, access) of the access that ended the last run with `Stop.REFUSED`."""
        assert self._refused is not None
        page, access = self._refused
        if self._own_mmu:
            return self._refused  # exact already
        exact = u64_at(self._engine.value + at.INVALID_ADDRESS) & 0xFFFFFFFF
        return (exact if exact & ~(PAGE - 1) == page else page), access

    # Callbacks: the engine's side

    def _on_interrupt(self, _uc: int, vector: int, _data: int) -> None:
        """The hottest callback: guarded by itself, not by `_guarded`."""
        if self._sealed is not None:
            return
        try:
            state = self.state
            if self._copied:
                state.load()
            w = state.words
            software = w[_IS_INT] != 0
            # The engine takes a second fault for a double fault, and a later exit for an INT, if these stay.
            w[_OLD_EXCEPTION] = NO_EXCEPTION
            w[_IS_INT] = 0
            if self._on_entry is not None:
                self._on_entry(vector)
                return
            if w[_EIP] == self._sites.left_to_engine and not software and vector != _DB:
                self._sites.restore_flags(state)
            if vector >= INTERCEPT:
                self._handler.on_intercept(vector - INTERCEPT)  # type: ignore[union-attr]
            elif vector == _PF and self._own_mmu and not software:
                self._page_fault()
            else:
                self._handler.on_exception(vector, software)  # type: ignore[union-attr]  # attached before run
            self._cr2 = w[_CR2]
            if self._copied:
                state.store()
        except BaseException as error:
            self._fail(error)

    def _page_fault(self) -> None:
        """By the CPU's own MMU. It may be of a fetch that runs ahead, so CR2 is left as it was."""
        w = self.state.words
        address, w[_CR2] = w[_CR2], self._cr2
        self.refuse(address, FETCH if self.fetching else WRITE if w[_ERROR_CODE] & 2 else READ)

    def _on_invalid(self, _uc: int, _data: int) -> bool:
        """#UD; INT 6, too, comes here, and with EIP still at it."""
        if self._sealed is None:
            state = self.state
            state.load()
            w = state.words
            software = bool(w[at.EXCEPTION_IS_INT // 4])
            w[at.OLD_EXCEPTION // 4] = NO_EXCEPTION
            w[at.EXCEPTION_IS_INT // 4] = 0
            if software:
                state.eip = w[at.NEXT_EIP // 4]
            self._handler.on_exception(_UD, software)  # type: ignore[union-attr]
            state.store()
        return True

    def _on_in(self, _uc: int, port: int, size: int, _data: int) -> int:
        if self._sealed is not None:
            return 0
        self.state.load()
        return self._handler.on_in(port, size)  # type: ignore[union-attr]

    def _on_out(self, _uc: int, port: int, size: int, value: int, _data: int) -> None:
        if self._sealed is None:
            self.state.load()
            self._handler.on_out(port, size, value)  # type: ignore[union-attr]

    def _on_cpuid(self, _uc: int, _data: int) -> int:
        self.state.load()
        self._handler.on_cpuid()  # type: ignore[union-attr]
        self.state.store()
        return 1

    def _on_rdtsc(self, _uc: int, _data: int) -> int:
        self.state.load()
        value = self._handler.on_rdtsc()  # type: ignore[union-attr]
        self.state.set(0, value)
        self.state.set(2, value >> 32)
        self.state.store()
        return 1

    def _on_sysenter(self, _uc: int, _data: int) -> None:
        if self._sealed is None:
            self.state.load()
            self._handler.on_sysenter()  # type: ignore[union-attr]
            self.state.store()

    def _on_fill(self, _uc: int, address: int, access: int, entry: int, _data: int) -> bool:
        """A TLB miss, asked about with EIP at the instruction. Hot: guarded by itself."""
        try:
            if self._watch.collapsing:
                return False
            if self._dropping is not None:
                filled: tuple[int, int] | None = (self._dropping, PROT_EXEC)
            elif self._sealed is not None:
                filled = None
            else:
                if self._copied:
                    self.state.load()
                filled = self._handler.fill(address & 0xFFFFFFFF, access)  # type: ignore[union-attr]
            if filled is None:
                self._refused = (address & 0xFFFFFFFF, access)
                return False
            slot = TlbEntry.from_address(entry)
            slot.paddr, slot.perms = filled
            return True
        except BaseException as error:
            self._fail(error)
            return False

    def _on_translated(self, _uc: int, block: object, _previous: object, _data: int) -> None:
        self.meter.begin_epoch()
        fields = block.contents  # type: ignore[attr-defined]
        address, size = fields.pc, fields.size
        self._translated = (address, size, fields.instructions)
        if self._sealed is not None:
            return
        self._sites.found(self._handler.on_translated(address, size), address, size)  # type: ignore[union-attr]
        if self._sites.new:
            self._ask_to_stop()

    def _hook_site(self, site: int) -> ctypes.c_size_t:
        return self._hook(U.UC_HOOK_CODE, self._on_site_callback, begin=site, end=site)

    def _unhook(self, handle: ctypes.c_size_t) -> None:
        uclib.uc_hook_del(self._engine, handle)

    def _forget_block(self, address: int, size: int) -> None:
        uclib.uc_ctl(self._engine, _REMOVE_CACHE, _U64(address), _U64(address + size))

    def _on_site(self, _uc: int, address: int, _size: int, _data: int) -> None:
        if self._sealed is None and not self._requested:
            self.state.load()
            if self._handler.on_site(address & 0xFFFFFFFF):  # type: ignore[union-attr]
                self._sites.stopped = True
                self._ask_to_stop()
            else:
                self._sites.leave(self.state)

    def _on_block(self, _uc: int, address: int, size: int, _data: int, return_address: int) -> None:
        """The first visit of a translation: learn its number of instructions, then charge it."""
        if self._sealed is not None:
            return
        size &= 0xFFFF
        meter, state = self.meter, self.state
        state.load()
        shadow = state.inhibited
        if not shadow and meter.poll & state.system_flags:
            meter.words[stub.STOPPED // 4] = 1
            self._ask_to_stop()
            return
        known_address, known_size, instructions = self._translated
        if (known_address, known_size) != (address, size) or address & 0xFFFFFFFF in self.foreign:
            instructions = self._handler.count(address & 0xFFFFFFFF, size)  # type: ignore[union-attr]
        last_in_shadow = shadow and self._handler.is_repeated(address, size)  # type: ignore[union-attr]
        restarted = instructions == 1 and self._restarted(address, size)
        if return_address and not restarted and not last_in_shadow:
            meter.remember(return_address, address, size, instructions, exported.check_exit)
        before = meter.budget
        if not meter.charge(address & 0xFFFFFFFF, size, instructions):
            self._ask_to_stop()
        elif last_in_shadow or state.system_flags & stub.RESUMED:
            state.set_system_flags(stub.RESUMED)
            if last_in_shadow:
                # The engine would keep the shadow for all passes; it ends with the first one.
                state.inhibited = False
                self.shadowed_pass = address & 0xFFFFFFFF, before
            state.store()

    def _restarted(self, address: int, size: int) -> bool:
        """Whether this block of one instruction is a store that the engine does over.

        A store into the block that is being executed ends that block in the middle without any exit: the
        engine drops the block and executes the store again on its own. The rest of the block, charged when
        it was entered, is given back. Such a block is not remembered, so that every visit comes here.
        """
        start, length, charged = self.meter.last_block()
        if not start <= address < start + length or not self._handler.is_store_only(address, size):  # type: ignore[union-attr]
            return False
        done = self._handler.count(start, address - start)  # type: ignore[union-attr]
        self.meter.budget += charged - done
        return True

    def _on_block_in_python(self, uc: int, address: int, size: int, data: int) -> None:
        """Where the machine code does not run: the same, for every block."""
        self._on_block(uc, address, size, data, 0)
