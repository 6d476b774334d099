"""Monitors: siblings that answer the machine's exits on behalf of a guest (`vmm.machine.control.Control`)."""
