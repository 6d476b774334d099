"""Binary translation: the guest's kernel runs in ring 1 and only out of a translation cache.

Reading order: `layout` (what the monitor keeps in the guest's address space), `rows` (what becomes of each
instruction, and why), `sequences` (the in-cache code), `emitter` and `units` (how it is laid out and found
again), `translate` (a unit from the guest's code), `cache` (units, links and look-ups), `monitor` (the exits).
"""
