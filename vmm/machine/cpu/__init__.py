"""The CPU: Unicorn behind one door.

Reading order: `layout` (where the engine keeps each register), `state` (the CPU as a value), `stub` (the
few bytes of machine code that count instructions), `engine` (hooks, memory, running and stopping).
"""
