"""Hardware-assisted virtualization, AMD's way (SVM): the guest runs in its own ring 0 under a VMCB.

Reading order: `vmcb` (the control block, field by field), `exits` (why a guest came out), `injection`
(events that go in with it), `intercepts` (the policy of what comes out), `checks` (what VMRUN refuses).
"""
