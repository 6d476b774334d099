"""KVM's paravirtual interface: what a guest that knows it runs on a hypervisor is offered, in any mode.

`abi` has the numbers, `interface` answers CPUID, MSRs and hypercalls, `clock` fills the shared records.
"""
