"""What a PC's firmware has done to the devices before any operating system runs.

A guest finds the interrupt controllers initialized (vectors 0x08 and 0x70), a few lines open, and the timer
ticking at 18.2 Hz. Guests rely on it, often without knowing. The values are those that a multiboot guest
finds on QEMU's `pc` machine, less what belongs to devices that we do not have; a test compares them.
"""

from __future__ import annotations

WRITES = (
    # Interrupt controllers: ICW1 to ICW4, and the mask, which lets through timer, keyboard, cascade and
    # floppy, and RTC, mouse, FPU and disk.
    *((0x20, 0x11), (0x21, 0x08), (0x21, 0x04), (0x21, 0x01), (0x21, 0xB8)),
    *((0xA0, 0x11), (0xA1, 0x70), (0xA1, 0x02), (0xA1, 0x01), (0xA1, 0x8E)),
    # Counter 0: a rate generator of 65,536 pulses.
    *((0x43, 0x34), (0x40, 0x00), (0x40, 0x00)),
    # Keyboard controller: tested, its interrupt on, the mouse port off, translating.
    *((0x64, 0x60), (0x60, 0x65)),
    # The serial port's interrupt reaches the controller.
    (0x3FC, 0x08),
)
"""(port, byte), in order: what to write to a machine's bus after power-on."""
