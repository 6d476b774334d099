"""The PC's devices, each a plain state behind injected lines, sinks and clock.

A device knows offsets, not addresses, and nothing of the CPU, the bus or another device: what it reaches
it was given when it was made (`signals.py` has the types). All that can change is in `device.state`, a
dataclass of plain values: copy it to save the device, put it back to restore it. A line is then as it was
if the device at its other end is restored from the same moment.

Reading order: signals, system, pic, pit (counter first), uart, rtc (calendar first), vga, i8042 (scancodes and
keyboard first), ide (disk and identify first), firmware.
"""
