"""The C signatures of the engine's callbacks, which the Python wrapper would put a second call around."""

from __future__ import annotations

import ctypes

VOID_P, U32, U64 = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint64


class Block(ctypes.Structure):
    _fields_ = (("pc", U64), ("instructions", ctypes.c_uint16), ("size", ctypes.c_uint16))


ON_INTERRUPT = ctypes.CFUNCTYPE(None, VOID_P, U32, VOID_P)
ON_INVALID = ctypes.CFUNCTYPE(ctypes.c_bool, VOID_P, VOID_P)
ON_IN = ctypes.CFUNCTYPE(U32, VOID_P, U32, ctypes.c_int, VOID_P)
ON_OUT = ctypes.CFUNCTYPE(None, VOID_P, U32, ctypes.c_int, U32, VOID_P)
ON_CPUID = ctypes.CFUNCTYPE(ctypes.c_int, VOID_P, VOID_P)
ON_SYSENTER = ctypes.CFUNCTYPE(None, VOID_P, VOID_P)
ON_FILL = ctypes.CFUNCTYPE(ctypes.c_bool, VOID_P, U64, ctypes.c_int, VOID_P, VOID_P)
ON_TRANSLATED = ctypes.CFUNCTYPE(None, VOID_P, ctypes.POINTER(Block), ctypes.POINTER(Block), VOID_P)
ON_LOAD = ctypes.CFUNCTYPE(U64, VOID_P, U64, ctypes.c_uint, VOID_P)
ON_STORE = ctypes.CFUNCTYPE(None, VOID_P, U64, ctypes.c_uint, U64, VOID_P)
ON_BLOCK = ctypes.CFUNCTYPE(None, VOID_P, U64, U32, VOID_P, U64)
ON_CODE = ctypes.CFUNCTYPE(None, VOID_P, U64, U32, VOID_P)
