"""Seconds by stage, on a CPU by the clock in force (the wall's, as a rule) and on a GPU by the GPU's own."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_clock: ContextVar[Callable[[], float]] = ContextVar("clock", default=time.perf_counter)


def now() -> float:
    """Seconds by the clock in force; only differences mean something."""
    return _clock.get()()


@contextmanager
def counting_by(clock: Callable[[], float]) -> Iterator[None]:
    """Inside, stages count by this clock, such as ``time.process_time`` for CPU seconds."""
    token = _clock.set(clock)
    try:
        yield
    finally:
        _clock.reset(token)


class StageTimer:
    """Adds up what stages take.

    Work for a GPU is only launched by the call that asks for it, so a wall clock would count its time where somebody
    happens to wait for it. There events in the GPU's stream mark where a stage begins and ends, and nobody has to wait.
    Of a model on several GPUs, the first one's stream tells.

    Parameters
    ----------
    stages : their names.
    device : where they run.
    """

    def __init__(self, stages: tuple[str, ...], device: torch.device) -> None:
        self._seconds, self._device = dict.fromkeys(stages, 0.0), device
        self._pending: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Count the time that is spent inside for ``stage``."""
        if self._device.type != "cuda":
            start_time = now()
            yield
            self._seconds[stage] += now() - start_time
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream(self._device)
        start.record(stream)
        yield
        end.record(stream)
        self._pending.append((stage, start, end))
        while self._pending and self._pending[0][2].query():  # done already: nobody waits
            self._count_first()

    def add(self, stage: str, seconds: float) -> None:
        """Count seconds that were spent elsewhere for ``stage``."""
        self._seconds[stage] += seconds

    @property
    def seconds(self) -> dict[str, float]:
        """By stage; waits for what a GPU was given to do."""
        while self._pending:
            self._count_first()
        return dict(self._seconds)

    def _count_first(self) -> None:
        stage, start, end = self._pending.popleft()
        end.synchronize()
        self._seconds[stage] += start.elapsed_time(end) / 1000
