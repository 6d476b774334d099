"""Xen's interface as numbers and structures: one module a subject, no behaviour."""
