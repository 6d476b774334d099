"""Classical trap-and-emulate, after Popek and Goldberg (1974): run the guest kernel deprivileged, and
emulate what traps.

Reading order: `vcpu` (what the guest believes), `shadow` (its descriptor tables, deprivileged),
`processor` (the virtual processor that exceptions are delivered on), `emulate` (one row a privileged
instruction), `monitor` (the exits).
"""
