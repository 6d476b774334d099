"""Ring compression: what every monitor needs that runs the guest's ring 0 in ring 1.

Reading order: `vcpu` (what the guest believes), `descriptors` (its descriptor tables, deprivileged),
`processor` (the virtual processor that exceptions are delivered on), `emulate` (one row a privileged
instruction), `gates` (far transfers through call gates), `monitor` (the exits).
"""
