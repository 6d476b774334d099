"""Equivalence as a property of whole guests: a generator, a runner that compares modes, a shrinker.

Reading order: `layout` (where things lie), `kernel` (the fixed part of each guest), `encode` (text to bytes,
quickly), `atoms_plain`, `atoms_system`, `atoms_transfer` and `atoms_memory` (what a guest may do), `guest` (a
guest as a value, and as an image), `run` (what a run came to, and in what two runs differ), `shrink`, `source` (a
guest as an assembly file), `third` (QEMU), `mutants` (what the property must notice).
"""
