"""Paravirtualization: a guest that knows its monitor and asks it, through Xen's interface for x86_32 with PAE.

Facts (numbers, structures, error codes) are those of Xen's public headers; the code is ours.
"""
