"""The machine as this process may use it: its CPUs and its memory."""

from __future__ import annotations

import os

from knn_lm_eval.system.memory import available_bytes


def machine() -> dict[str, int | None]:
    """``cpus`` that this process may run on, ``memory`` in bytes and how much of it is ``available``; None where the
    operating system does not say."""
    affinity = getattr(os, "sched_getaffinity", None)
    sizes = getattr(os, "sysconf_names", {})
    knows_memory = {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= sizes.keys()
    return {
        "cpus": len(affinity(0)) if affinity else os.cpu_count(),
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if knows_memory else None,
        "available": available_bytes(),
    }
