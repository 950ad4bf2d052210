"""Processes that may have less memory than the machine."""

from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Sequence
from pathlib import Path

import pytest

GROUPS = Path("/sys/fs/cgroup/memory")
needs_groups = pytest.mark.skipif(
    not os.access(GROUPS, os.W_OK), reason="needs memory control groups that can be written to"
)


def run_within(limit: int, command: Sequence[str | Path]) -> tuple[subprocess.CompletedProcess[str], int]:
    """Run a command within so many bytes, pages of mapped files among them; returns also the most that it took."""
    group = GROUPS / f"knn-lm-eval-{uuid.uuid4().hex[:12]}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(limit))
        process = subprocess.run(
            command,
            capture_output=True,
            text=True,
            preexec_fn=lambda: (group / "cgroup.procs").write_text(str(os.getpid())),
        )
        most = int((group / "memory.max_usage_in_bytes").read_text())
    finally:
        group.rmdir()
    return process, most
