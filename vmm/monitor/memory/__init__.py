"""Memory virtualization: shadow page tables, and the few pages that a monitor keeps in its guest's address space.

Reading order: `slot` (the monitor's own pages), `pool` (the memory of the shadow tables, and which entries lead to a
frame), `tables` (the guest's tables, and the words that were derived from), `watch` (whose stores are noticed),
`trees` (the shadow tables and how they are kept true), `shadow` (what the processor asks, what the guest does, and
what a monitor calls; here is also why it is done like this, with measurements), `statistics`.
"""
