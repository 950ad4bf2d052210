"""How much memory this process has, and how much more it may take, as Linux counts it."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from knn_lm_eval.errors import UserError

STATUS = Path("/proc/self/status")
MEMORY_INFO, CGROUPS, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# The kernel's names. Anonymous memory is the process's own; pages of mapped files are shared with other processes
# and are given back where memory is short.
FIELDS = {"VmHWM": "peak_resident", "RssAnon": "anonymous", "RssFile": "mapped_files"}

# What sizes are given in: binary units with or without their B, and decimal ones with it.
UNITS = {"": 1, "b": 1} | {
    prefix + end: base**power
    for power, prefix in enumerate("kmgt", 1)
    for base, ends in ((1024, ("", "i", "ib")), (1000, ("b",)))
    for end in ends
}


def parse_bytes(text: str) -> int:
    """A size as people write it, in bytes: ``8GiB`` or ``8G``, ``512MiB``, ``1.5TB``; raises UserError else."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+) *([a-z]*)", text.strip().lower())
    if found is None or found[2] not in UNITS or (size := int(float(found[1]) * UNITS[found[2]])) < 1:
        raise UserError(f"{text!r} is no size of memory: give a number with its unit, such as 8GiB or 512MiB.")
    return size


def size_text(size: int) -> str:
    """So many bytes as ``parse_bytes`` reads them, rounded up: what is said to be enough is."""
    mebibytes = -(-size // 2**20)
    return f"{mebibytes}MiB" if mebibytes < 1024 else f"{-(-mebibytes * 10 // 1024) / 10:g}GiB"


def allowed_bytes(memory: int | None) -> int:
    """The memory that a computation may take: what the user gave, or half of what is available here."""
    if memory is not None:
        return memory
    available = available_bytes()
    return (os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if available is None else available) // 2


def resident_bytes() -> dict[str, int] | None:
    """``peak_resident`` so far, and ``anonymous`` and ``mapped_files`` resident now, in bytes; None elsewhere."""
    if not STATUS.exists():
        return None
    fields = (line.partition(":") for line in STATUS.read_text().splitlines())
    found = {FIELDS[name]: int(value.split()[0]) * 1024 for name, _, value in fields if name in FIELDS}
    return found if len(found) == len(FIELDS) else None


def available_bytes() -> int | None:
    """What processes can take of memory here without others losing theirs, also within control groups; None elsewhere.

    Pages of files count as available: they are read again when they are wanted.
    """
    if not MEMORY_INFO.exists():
        return None
    (line,) = (line for line in MEMORY_INFO.read_text().splitlines() if line.startswith("MemAvailable:"))
    return min([int(line.split()[1]) * 1024, *_limits_of_groups()])


def _limits_of_groups() -> list[int]:
    """The limits on memory of the control groups that this process is in, of either version."""
    limits = []
    for line in CGROUP.read_text().splitlines() if CGROUP.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root = CGROUPS / controllers
        name = "memory.limit_in_bytes" if controllers else "memory.max"
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            with suppress(OSError, ValueError):  # not there (a container's root), or "max"
                limits.append(int((folder / name).read_text()))
            if folder == root:
                break
    return limits
