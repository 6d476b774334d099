"""How a row of the classification is put into words."""

from __future__ import annotations

from vmm.isa.row import Row

_KINDS = (
    ("control", "control-sensitive"),
    ("mode_bound", "mode-bound"),
    ("location_bound", "location-bound"),
)


def class_text(row: Row) -> str:
    """`critical: control-sensitive, mode-bound; it does not trap`."""
    kinds = [text for name, text in _KINDS if getattr(row, name)]
    if not kinds:
        return "innocuous"
    what = "privileged" if row.privileged else "critical"
    traps = "it does not trap" if not row.privileged else f"it traps {row.trap}"
    return f"{what}: {', '.join(kinds)}; {traps}"
