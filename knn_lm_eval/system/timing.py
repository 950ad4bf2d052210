"""Seconds by stage, on a CPU by the wall clock and on a GPU by the GPU's own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class StageTimer:
    """Adds up what stages take.

    Work for a GPU is only launched by the call that asks for it, so a wall clock would count its time where somebody
    happens to wait for it. There events in the GPU's stream mark where a stage begins and ends, and nobody has to wait.
    Of a model on several GPUs, the first one's stream tells.

    Parameters
    ----------
    seconds : by stage; added to. What runs on a GPU is in it after ``settle``.
    device : where the stages run.
    """

    def __init__(self, seconds: dict[str, float], device: torch.device) -> None:
        self._seconds, self._device = seconds, device
        self._pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Count the time that is spent inside for ``stage``."""
        if self._device.type != "cuda":
            start_time = time.perf_counter()
            yield
            self._seconds[stage] += time.perf_counter() - start_time
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream(self._device)
        start.record(stream)
        yield
        end.record(stream)
        self._pending.append((stage, start, end))

    def settle(self) -> None:
        """Wait for what was launched, and count it."""
        for stage, start, end in self._pending:
            end.synchronize()
            self._seconds[stage] += start.elapsed_time(end) / 1000
        self._pending.clear()
