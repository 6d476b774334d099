"""Binary translation: the guest's kernel runs in ring 1 and only out of a translation cache.

Reading order: `layout` (what the monitor keeps in the guest's address space), `rows` (what becomes of each
instruction, and why), `emitter` and `sequences` (the in-cache code), `units` and `translate` (a unit from
the guest's code), `cache` and `ways` (units, and how jumps find them), `bound` and `guest_code` (when a translation
is none any more), `translator` (from a guest EIP to its translation), `emulate` and `visible`, `monitor` (the exits).
"""
