"""Memory virtualization: shadow page tables, and the few pages that a monitor keeps in its guest's address space.

Reading order: `pool` (the tables, and which entries lead to a frame), `slot` (the monitor's own pages), `tables`
(the guest's tables, and what was derived from each of their words), `shadow` (what the monitor calls).
"""
