"""How much memory this process has, as Linux counts it."""

from __future__ import annotations

from pathlib import Path

STATUS = Path("/proc/self/status")
# The kernel's names. Anonymous memory is the process's own; pages of mapped files are shared with other processes
# and are given back where memory is short.
FIELDS = {"VmHWM": "peak_resident", "RssAnon": "anonymous", "RssFile": "mapped_files"}


def resident_bytes() -> dict[str, int] | None:
    """``peak_resident`` so far, and ``anonymous`` and ``mapped_files`` resident now, in bytes; None elsewhere."""
    if not STATUS.exists():
        return None
    fields = (line.partition(":") for line in STATUS.read_text().splitlines())
    found = {FIELDS[name]: int(value.split()[0]) * 1024 for name, _, value in fields if name in FIELDS}
    return found if len(found) == len(FIELDS) else None
