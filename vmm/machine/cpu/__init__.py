"""The CPU: Unicorn behind one door.

Reading order: `layout` (where the engine keeps each register), `state` (the CPU as a value), `stub` (the
few bytes of machine code that count instructions), `handler` (what the engine asks of the machine), `engine`
(hooks, memory, running and stopping), `site_hooks` (instructions that the machine executes itself), `collapse` and
`mend` (where the engine would end the process).
"""
