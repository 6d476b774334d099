"""Proof, before the first machine runs, that the library is the one this code was written for.

What `layout` says of the library's private memory is checked on scratch engines: markers written through the
public interface, and a known fault, INT and refused access made to happen.
"""

from __future__ import annotations

import ctypes

import unicorn
from unicorn import unicorn_const as U
from unicorn import x86_const as X
from unicorn.unicorn_py3.unicorn import uclib

from vmm.errors import EngineError
from vmm.machine.cpu import layout as at

PAGE = 0x1000
_verified: list[bool] = []  # once a process: the library does not change under us


class TlbEntry(ctypes.Structure):
    """What a TLB hook fills in: a physical page and PROT_* bits."""

    _fields_ = (("paddr", ctypes.c_uint64), ("perms", ctypes.c_int))


# Of the library's models, the one whose features are those that CPUID tells here (`machine.cpuid`), so that what is
# not told raises #UD; and one with NX and SVM, whose EFER the public interface lets us write.
MODEL, WITH_EFER = X.UC_CPU_X86_QEMU32, X.UC_CPU_X86_EPYC


def open_engine(model: int = MODEL) -> unicorn.Uc:
    """A 32-bit engine, of the processor model that all modes share."""
    uc = unicorn.Uc(U.UC_ARCH_X86, U.UC_MODE_32)
    uc.ctl_set_cpu_model(model)
    return uc


def verify_once() -> None:
    """Raises `EngineError` where anything is not as `layout` says; costs two milliseconds, once a process."""
    if not _verified:
        _verify()
        _verified.append(True)


def u64_at(address: int) -> int:
    return ctypes.c_uint64.from_address(address).value


def context_bytes(uc: unicorn.Uc) -> bytes:
    context = uc.context_save()
    return ctypes.string_at(context.context.value, uclib.uc_context_size(uc._uch))


def _verify() -> None:
    """Check `layout` on a scratch engine: markers through the public interface, then one known fault."""
    uc = open_engine(WITH_EFER)

    def write(name: str, value: object) -> None:
        if name == "MSR":
            assert isinstance(value, tuple)
            uc.msr_write(*value)
        else:
            uc.reg_write(getattr(X, f"UC_X86_REG_{name}"), value)

    at.verify(write, lambda: context_bytes(uc))
    uc = open_engine()
    uc.mem_map(0x1000, PAGE)
    uc.mem_write(
        0x1000, bytes.fromhex("66b83812 8ed8 cd30")
    )  # mov ax, 0x1238; mov ds, ax: #GP(0x1238); int 0x30
    saved: list[bytes] = []

    def on_interrupt(_uc: object, _vector: int, _data: object) -> None:
        saved.append(context_bytes(uc))
        uc.emu_stop()

    uc.reg_write(X.UC_X86_REG_CR0, 0x11)
    uc.hook_add(U.UC_HOOK_INTR, on_interrupt)
    uc.emu_start(0x1000, 0x1006)
    if not saved:
        raise EngineError("this Unicorn reports no fault where one is due: install unicorn==2.1.4")
    at.verify_fault(saved.pop(), 13, 0x1238)
    uc.emu_start(0x1006, 0x1008)
    at.verify_software(saved.pop(), 0x1008)
    uc = open_engine()
    uc.mem_map(0x1000, PAGE)
    uc.mem_write(0x1000, bytes.fromhex("a134125a5a"))  # mov eax, [0x5a5a1234]

    def fill(_uc: object, address: int, _access: int, entry: TlbEntry, _data: object) -> bool:
        entry.paddr, entry.perms = address, U.UC_PROT_ALL
        return bool(address == 0x1000)

    uc.hook_add(U.UC_HOOK_TLB_FILL, fill)
    uc.ctl_set_tlb_mode(U.UC_TLB_VIRTUAL)
    try:
        uc.emu_start(0x1000, 0x1005)
    except unicorn.UcError:
        at.verify_refusal(u64_at(uc._uch.value + at.INVALID_ADDRESS), 0x5A5A1234)
    else:
        raise EngineError("this Unicorn lets a refused access pass: install unicorn==2.1.4")
