"""In what a Linux on our machine may tell another story than one on QEMU's small PC, and why: one row a difference.

`BLURS` are numbers that mean nothing: they are made the same before lines are compared. `ROWS` are lines that only
one of the two has. Whatever is in neither is a difference that nobody has explained, and a row that nothing needs is
one that has lost its reason.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Blur:
    """`pattern` (found anywhere in a line) is replaced."""

    what: str
    why: str
    pattern: str
    replacement: str = "N"


@dataclass(frozen=True)
class Row:
    """Lines that only ours has and lines that only QEMU's has, by patterns for the whole line.

    Each pattern is needed, unless the row only holds `sometimes`, as what depends on the host's load does.
    """

    what: str
    why: str
    ours: tuple[str, ...] = ()
    theirs: tuple[str, ...] = ()
    sometimes: bool = False


BLURS = (
    Blur("the moment of a message", "time", r"^\[ *\d+\.\d+\] ", ""),
    Blur("how often an interrupt came", "it depends on time", r": +\d+(?= +(?:XT-PIC|[A-Z][a-z]))", ": N"),
    Blur("the speed of the processor", "time", r"[\d.]+(?= BogoMIPS)|(?<=lpj=)\d+|(?<=^bogomips\t: )[\d.]+"),
    Blur("what the clock on the wall shows", "time", r"(?<=audit\()[\d.]+|(?<=system clock to ).*"),
)

_NO_BIOS = "we have no BIOS: the kernel is started by its 32-bit entry, and nobody has left tables in memory"
_PENTIUM_III = "QEMU was told to be a Pentium III"
_NOT_OURS = "our processor does not have it, and so does not tell it"
_TOLD = "QEMU tells its guest that it runs under a hypervisor; ours may not know (but with --paravirt)"

ROWS = (
    Row(
        "the memory map",
        f"{_NO_BIOS}, so no page below 640 KB and no ROM is taken",
        ours=(
            r"BIOS-e820: \[mem 0x0{16}-0x0{11}9ffff\] usable",
            r"BIOS-e820: \[mem 0x0{11}a0000-0x0{11}fffff\] reserved",
            r"  node   0: \[mem 0x0{12}1000-0x0{11}9ffff\]",
            r"On node 0, zone DMA: 96 pages in unavailable ranges",
            r"PM: hibernation: Registered nosave memory: \[mem 0x000a0000-0x000fffff\]",
            r"\[mem 0x04000000-0xffffffff\] available for PCI devices",
            r"Built 1 zonelists, mobility grouping on\.  Total pages: 16127",
            r"Memory: 46520K/65148K available .*",
            r"00001000-0009ffff : System RAM",
            r"000a0000-000fffff : Reserved",
        ),
        theirs=(
            r"BIOS-e820: \[mem 0x0{16}-0x0{11}9fbff\] usable",
            r"BIOS-e820: \[mem 0x0{11}9fc00-0x0{11}9ffff\] reserved",
            r"BIOS-e820: \[mem 0x0{11}f0000-0x0{11}fffff\] reserved",
            r"BIOS-e820: \[mem 0x0{8}fffc0000-0x0{8}ffffffff\] reserved",
            r"  node   0: \[mem 0x0{12}1000-0x0{11}9efff\]",
            r"On node 0, zone DMA: 97 pages in unavailable ranges",
            r"PM: hibernation: Registered nosave memory: \[mem 0x0009f000-0x000fffff\]",
            r"\[mem 0x04000000-0xfffbffff\] available for PCI devices",
            r"Built 1 zonelists, mobility grouping on\.  Total pages: 16126",
            r"Memory: 46516K/65144K available .*",
            r"00001000-0009fbff : System RAM",
            r"0009fc00-0009ffff : Reserved",
            r"000f0000-000fffff : Reserved",
            r"000a0000-000bffff : Video RAM area",
            r"000c0000-000c99ff : Video ROM",
            r"000c\w{4}-000c\w{4} : Adapter ROM",
        ),
    ),
    Row(
        "DMI and plug and play",
        _NO_BIOS,
        ours=(r"DMI not present or invalid\.", r"PnPBIOS: PnP BIOS support was not detected\."),
        theirs=(
            r"SMBIOS 2\.\d present\.",
            r"DMI: Bochs Bochs, BIOS Bochs 01/01/2011",
            r"PnPBIOS: Found PnP BIOS installation structure at 0x\(ptrval\)",
            r"PnPBIOS: PnP BIOS version 1\.0, entry .*",
            r"PnPBIOS: dev_node_info: function not supported on this system",
            r"PnPBIOS: Unable to get node info\.  Aborting\.",
        ),
    ),
    Row(
        "APIC and multiprocessor tables",
        "QEMU's isapc has a local APIC and tables that tell of it, though the kernel was told to leave both alone; "
        "our small PC has none",
        ours=(
            r"APIC: disable apic facility",
            r"APIC: switched to apic NOOP",
            r"NR_IRQS: 2304, nr_irqs: 32, preallocated irqs: 16",
            r"smpboot: weird, boot CPU \(#0\) not listed by the BIOS",
        ),
        theirs=(
            r"found SMP MP-table at \[mem .*\]",
            r"Intel MultiProcessor Specification v1\.4",
            r"    Virtual Wire compatibility mode\.",
            r"MPTABLE: .*",
            r"Processor #0 \(Bootup-CPU\)",
            r"IOAPIC\[0\]: .*",
            r"Processors: 1",
            r"NR_IRQS: 2304, nr_irqs: 33, preallocated irqs: 16",
            r"fee00000-fee00fff : Local APIC",
        ),
    ),
    Row(
        "the processor's name",
        f"{_PENTIUM_III}; ours has a model and name of its own, and no caches to tell of",
        ours=(r"model\t\t: 8", r"model name\t: vmm emulated x86 processor", r"cpuid level\t: 4"),
        theirs=(
            r"model\t\t: 7",
            r"model name\t: Pentium III \(Katmai\)",
            r"cpuid level\t: 3",
            r"cache size\t: 16384 KB",
        ),
    ),
    Row(
        "SSE2 and SSE3",
        f"{_PENTIUM_III}, which has only SSE; ours has them and says so",
        ours=("flag sse2", "flag pni"),
    ),
    Row(
        "PAE and PSE-36",
        f"{_NOT_OURS}: 32-bit paging, and 32 address lines",
        ours=(r"address sizes\t: 32 bits physical, 32 bits virtual",),
        theirs=("flag pae", "flag pse36", r"address sizes\t: 36 bits physical, 32 bits virtual"),
    ),
    Row("debugging extensions", f"{_NOT_OURS}: no breakpoints on ports", theirs=("flag de",)),
    Row(
        "machine checks",
        _NOT_OURS,
        ours=(r"mce: Unable to init MCE device \(rc: -5\)",),
        theirs=("flag mce", "flag mca"),
    ),
    Row(
        "MTRR and PAT",
        f"{_NOT_OURS}: there are no caches whose ways they could set",
        ours=("Disabled", r"x86/PAT: MTRRs disabled, skipping PAT initialization too\."),
        theirs=("flag mtrr", r"x86/PAT: PAT not supported by the CPU\."),
    ),
    Row(
        "performance counters",
        f"{_NOT_OURS}; under a hypervisor the kernel does not even complain",
        ours=(
            r"Broken PMU hardware detected, using software events only\.",
            r"Failed to access perfctr msr \(MSR 186 is ffffffffffffffff\)",
        ),
        theirs=(r"PMU not available due to virtualization, using software events only\.",),
    ),
    Row(
        "a hypervisor",
        f"{_TOLD}; with one the kernel loads no microcode, and takes more flaws of processors for possible",
        ours=(
            r"microcode: sig=0x683, pf=0x1, revision=0x0",
            r"microcode: Microcode Update Driver: v2\.2\.",
        ),
        theirs=("flag hypervisor", "bug bhi", "bug its", "ITS: Vulnerable", r"microcode\t: 0x1"),
    ),
    Row(
        "the time-stamp counter's speed",
        "QEMU's counter is the host's: whether the kernel can calibrate it, and trusts it, depends on the host's "
        "load; ours counts the guest's own time",
        ours=(
            r"tsc: (Fast TSC calibration (using PIT|failed)|Using PIT calibration value)",
            r"tsc: Detected [\d.]+ MHz processor",
            r"clocksource: tsc(-early)?: mask: .*",
            r"clocksource: Switched to clocksource tsc(-early)?",
            r"Calibrating delay loop \(skipped\), value calculated using timer frequency\.\. N BogoMIPS \(lpj=N\)",
            r"sched_clock: Marking stable .*",
            r"cpu MHz\t\t: [\d.]+",
        ),
        theirs=(
            r"tsc: .*",
            r"clocksource: .*",
            r"Calibrating delay loop.* N BogoMIPS \(lpj=N\)",
            r"sched_clock: Marking (un)?stable .*",
            r"cpu MHz\t\t: [\d.]+",
            r"TSC found unstable after boot, most likely due to broken BIOS\. Use 'tsc=unstable'\.",
            r"Unstable clock detected, switching default tracing clock to \"global\"",
            r"If you want to keep using the local clock, then add:",
            r"  \"trace_clock=local\"",
            r"on the kernel command line",
            r"hrtimer: interrupt took \d+ ns",
        ),
        sometimes=True,
    ),
)
