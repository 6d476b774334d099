"""Classical trap-and-emulate, after Popek and Goldberg (1974): run the guest kernel deprivileged, and
emulate what traps.
"""
