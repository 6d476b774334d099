"""Why a guest came out: exit codes, and what EXITINFO1 says with them.

Intercept vectors and exit codes are one numbering: bit n of the exceptions is exit 0x40 + n, of the first
miscellaneous vector 0x60 + n, of the second 0x80 + n. So one table is enough for both.

Source: AMD64 APM volume 2, appendix C (exit codes); 15.8.1 (MOV CR), 15.10.2 (I/O), 15.11 (MSR), 15.25.6 (#NPF).
"""

from __future__ import annotations

from enum import IntEnum

from vmm.isa.words import Word

# The exit code of bit 0 of each intercept vector.
CR_READ = 0x00
CR_WRITE = 0x10
DR_READ = 0x20
DR_WRITE = 0x30
EXCEPTION = 0x40
MISC1 = 0x60
MISC2 = 0x80
MISC3 = 0xA0


class ExitCode(IntEnum):
    """EXITCODE, by the manual's names."""

    VMEXIT_CR0_READ = 0x0
    VMEXIT_CR1_READ = 0x1
    VMEXIT_CR2_READ = 0x2
    VMEXIT_CR3_READ = 0x3
    VMEXIT_CR4_READ = 0x4
    VMEXIT_CR5_READ = 0x5
    VMEXIT_CR6_READ = 0x6
    VMEXIT_CR7_READ = 0x7
    VMEXIT_CR8_READ = 0x8
    VMEXIT_CR9_READ = 0x9
    VMEXIT_CR10_READ = 0xA
    VMEXIT_CR11_READ = 0xB
    VMEXIT_CR12_READ = 0xC
    VMEXIT_CR13_READ = 0xD
    VMEXIT_CR14_READ = 0xE
    VMEXIT_CR15_READ = 0xF
    VMEXIT_CR0_WRITE = 0x10
    VMEXIT_CR1_WRITE = 0x11
    VMEXIT_CR2_WRITE = 0x12
    VMEXIT_CR3_WRITE = 0x13
    VMEXIT_CR4_WRITE = 0x14
    VMEXIT_CR5_WRITE = 0x15
    VMEXIT_CR6_WRITE = 0x16
    VMEXIT_CR7_WRITE = 0x17
    VMEXIT_CR8_WRITE = 0x18
    VMEXIT_CR9_WRITE = 0x19
    VMEXIT_CR10_WRITE = 0x1A
    VMEXIT_CR11_WRITE = 0x1B
    VMEXIT_CR12_WRITE = 0x1C
    VMEXIT_CR13_WRITE = 0x1D
    VMEXIT_CR14_WRITE = 0x1E
    VMEXIT_CR15_WRITE = 0x1F
    VMEXIT_DR0_READ = 0x20
    VMEXIT_DR1_READ = 0x21
    VMEXIT_DR2_READ = 0x22
    VMEXIT_DR3_READ = 0x23
    VMEXIT_DR4_READ = 0x24
    VMEXIT_DR5_READ = 0x25
    VMEXIT_DR6_READ = 0x26
    VMEXIT_DR7_READ = 0x27
    VMEXIT_DR8_READ = 0x28
    VMEXIT_DR9_READ = 0x29
    VMEXIT_DR10_READ = 0x2A
    VMEXIT_DR11_READ = 0x2B
    VMEXIT_DR12_READ = 0x2C
    VMEXIT_DR13_READ = 0x2D
    VMEXIT_DR14_READ = 0x2E
    VMEXIT_DR15_READ = 0x2F
    VMEXIT_DR0_WRITE = 0x30
    VMEXIT_DR1_WRITE = 0x31
    VMEXIT_DR2_WRITE = 0x32
    VMEXIT_DR3_WRITE = 0x33
    VMEXIT_DR4_WRITE = 0x34
    VMEXIT_DR5_WRITE = 0x35
    VMEXIT_DR6_WRITE = 0x36
    VMEXIT_DR7_WRITE = 0x37
    VMEXIT_DR8_WRITE = 0x38
    VMEXIT_DR9_WRITE = 0x39
    VMEXIT_DR10_WRITE = 0x3A
    VMEXIT_DR11_WRITE = 0x3B
    VMEXIT_DR12_WRITE = 0x3C
    VMEXIT_DR13_WRITE = 0x3D
    VMEXIT_DR14_WRITE = 0x3E
    VMEXIT_DR15_WRITE = 0x3F
    VMEXIT_EXCP0 = 0x40
    VMEXIT_EXCP1 = 0x41
    VMEXIT_EXCP2 = 0x42
    VMEXIT_EXCP3 = 0x43
    VMEXIT_EXCP4 = 0x44
    VMEXIT_EXCP5 = 0x45
    VMEXIT_EXCP6 = 0x46
    VMEXIT_EXCP7 = 0x47
    VMEXIT_EXCP8 = 0x48
    VMEXIT_EXCP9 = 0x49
    VMEXIT_EXCP10 = 0x4A
    VMEXIT_EXCP11 = 0x4B
    VMEXIT_EXCP12 = 0x4C
    VMEXIT_EXCP13 = 0x4D
    VMEXIT_EXCP14 = 0x4E
    VMEXIT_EXCP15 = 0x4F
    VMEXIT_EXCP16 = 0x50
    VMEXIT_EXCP17 = 0x51
    VMEXIT_EXCP18 = 0x52
    VMEXIT_EXCP19 = 0x53
    VMEXIT_EXCP20 = 0x54
    VMEXIT_EXCP21 = 0x55
    VMEXIT_EXCP22 = 0x56
    VMEXIT_EXCP23 = 0x57
    VMEXIT_EXCP24 = 0x58
    VMEXIT_EXCP25 = 0x59
    VMEXIT_EXCP26 = 0x5A
    VMEXIT_EXCP27 = 0x5B
    VMEXIT_EXCP28 = 0x5C
    VMEXIT_EXCP29 = 0x5D
    VMEXIT_EXCP30 = 0x5E
    VMEXIT_EXCP31 = 0x5F
    VMEXIT_INTR = 0x60
    VMEXIT_NMI = 0x61
    VMEXIT_SMI = 0x62
    VMEXIT_INIT = 0x63
    VMEXIT_VINTR = 0x64
    VMEXIT_CR0_SEL_WRITE = 0x65
    VMEXIT_IDTR_READ = 0x66
    VMEXIT_GDTR_READ = 0x67
    VMEXIT_LDTR_READ = 0x68
    VMEXIT_TR_READ = 0x69
    VMEXIT_IDTR_WRITE = 0x6A
    VMEXIT_GDTR_WRITE = 0x6B
    VMEXIT_LDTR_WRITE = 0x6C
    VMEXIT_TR_WRITE = 0x6D
    VMEXIT_RDTSC = 0x6E
    VMEXIT_RDPMC = 0x6F
    VMEXIT_PUSHF = 0x70
    VMEXIT_POPF = 0x71
    VMEXIT_CPUID = 0x72
    VMEXIT_RSM = 0x73
    VMEXIT_IRET = 0x74
    VMEXIT_SWINT = 0x75
    VMEXIT_INVD = 0x76
    VMEXIT_PAUSE = 0x77
    VMEXIT_HLT = 0x78
    VMEXIT_INVLPG = 0x79
    VMEXIT_INVLPGA = 0x7A
    VMEXIT_IOIO = 0x7B
    VMEXIT_MSR = 0x7C
    VMEXIT_TASK_SWITCH = 0x7D
    VMEXIT_FERR_FREEZE = 0x7E
    VMEXIT_SHUTDOWN = 0x7F
    VMEXIT_VMRUN = 0x80
    VMEXIT_VMMCALL = 0x81
    VMEXIT_VMLOAD = 0x82
    VMEXIT_VMSAVE = 0x83
    VMEXIT_STGI = 0x84
    VMEXIT_CLGI = 0x85
    VMEXIT_SKINIT = 0x86
    VMEXIT_RDTSCP = 0x87
    VMEXIT_ICEBP = 0x88
    VMEXIT_WBINVD = 0x89
    VMEXIT_MONITOR = 0x8A
    VMEXIT_MWAIT = 0x8B
    VMEXIT_MWAIT_CONDITIONAL = 0x8C
    VMEXIT_XSETBV = 0x8D
    VMEXIT_RDPRU = 0x8E
    VMEXIT_EFER_WRITE_TRAP = 0x8F
    VMEXIT_CR0_WRITE_TRAP = 0x90
    VMEXIT_CR1_WRITE_TRAP = 0x91
    VMEXIT_CR2_WRITE_TRAP = 0x92
    VMEXIT_CR3_WRITE_TRAP = 0x93
    VMEXIT_CR4_WRITE_TRAP = 0x94
    VMEXIT_CR5_WRITE_TRAP = 0x95
    VMEXIT_CR6_WRITE_TRAP = 0x96
    VMEXIT_CR7_WRITE_TRAP = 0x97
    VMEXIT_CR8_WRITE_TRAP = 0x98
    VMEXIT_CR9_WRITE_TRAP = 0x99
    VMEXIT_CR10_WRITE_TRAP = 0x9A
    VMEXIT_CR11_WRITE_TRAP = 0x9B
    VMEXIT_CR12_WRITE_TRAP = 0x9C
    VMEXIT_CR13_WRITE_TRAP = 0x9D
    VMEXIT_CR14_WRITE_TRAP = 0x9E
    VMEXIT_CR15_WRITE_TRAP = 0x9F
    VMEXIT_INVLPGB = 0xA0
    VMEXIT_INVLPGB_ILLEGAL = 0xA1
    VMEXIT_INVPCID = 0xA2
    VMEXIT_MCOMMIT = 0xA3
    VMEXIT_TLBSYNC = 0xA4
    VMEXIT_BUSLOCK = 0xA5
    VMEXIT_IDLE_HLT = 0xA6
    VMEXIT_NPF = 0x400
    AVIC_INCOMPLETE_IPI = 0x401
    AVIC_NOACCEL = 0x402
    VMEXIT_VMGEXIT = 0x403
    VMEXIT_INVALID = -1  # VMRUN refused the state


_NAMES = {int(code): code.name for code in ExitCode}


def name(code: int) -> str:
    """`VMEXIT_HLT` for 0x78; signed or as the 64 bits of the field; `exit 0x300` for what has no name."""
    known = _NAMES.get(code)  # every exit is put down by its name
    if known is not None:
        return known
    signed = code - (1 << 64) if code >> 63 == 1 else code
    return _NAMES.get(signed, f"exit {code:#x}")


class NestedPageFault(Word):
    """EXITINFO1 of VMEXIT_NPF: the error code of a page fault, and which walk met it.

    EXITINFO2 is the guest-physical address.
    """

    P = 1 << 0
    RW = 1 << 1
    US = 1 << 2
    RSV = 1 << 3
    ID = 1 << 4
    SS = 1 << 6
    FINAL = 1 << 32  # translating the guest's final physical address
    TABLE_WALK = 1 << 33  # translating the address of one of the guest's page tables


class IoInfo(Word):
    """EXITINFO1 of VMEXIT_IOIO; EXITINFO2 is the address of the next instruction."""

    IN = 1 << 0
    STR = 1 << 2
    REP = 1 << 3
    SZ8 = 1 << 4
    SZ16 = 1 << 5
    SZ32 = 1 << 6
    A16 = 1 << 7
    A32 = 1 << 8
    A64 = 1 << 9
    SEG = 7 << 10
    PORT = 0xFFFF << 16

    @classmethod
    def make(
        cls, port: int, size: int, *, is_in: bool, string: bool = False, repeated: bool = False
    ) -> IoInfo:
        """An access of `size` bytes (1, 2 or 4), 32-bit addresses."""
        value = port << 16 | cls.A32 | size << 4 | (cls.IN if is_in else 0)
        return cls(value | (cls.STR if string else 0) | (cls.REP if repeated else 0))

    @property
    def port(self) -> int:
        return self >> 16 & 0xFFFF

    @property
    def size(self) -> int:
        """In bytes."""
        return self >> 4 & 7


class MovCrInfo(Word):
    """EXITINFO1 of a CR or DR access with decode assist; bit 63 tells MOV from CLTS, LMSW and SMSW."""

    GPR = 0xF << 0
    MOV = 1 << 63
