"""The processes that were started together (by torchrun or accelerate launch): they wait for each other and end as one.

They wait in a gloo group of their own: it keeps no GPU busy, has no limit of time (the first process may tokenize or
hash for hours), and gives up at once where a process at the other end died.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from knn_lm_eval.errors import UserError

T = TypeVar("T")
NO_LIMIT = timedelta(weeks=52)


class Processes:
    """This process among those that work on the same.

    Where one fails, all end: its error is raised in it (of several that failed, in the first), and the others end
    quietly with exit status 1.

    Parameters
    ----------
    rank, count : which process this is, from 0, and of how many.
    group : the processes' gloo group; None for a process alone.
    """

    def __init__(self, rank: int = 0, count: int = 1, group: Any = None) -> None:
        self.rank, self.count, self._group = rank, count, group

    @classmethod
    def of_this_launch(cls) -> Processes:
        """The processes that a launcher started with this one; this one alone where there was none.

        Raises
        ------
        UserError
            Where a launcher started several that would not know of each other.
        """
        accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=NO_LIMIT)])
        if accelerator.num_processes > 1:
            group = dist.new_group(backend="gloo", timeout=NO_LIMIT)
            return cls(accelerator.process_index, accelerator.num_processes, group)
        if (started := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
            raise UserError(
                f"This is one of {started} processes, but accelerate sees no GPUs for them: set "
                f"ACCELERATE_USE_CPU=true to run them on CPUs."
            )
        return cls()

    def first_does(self, work: Callable[[], T]) -> T:
        """The first process does ``work`` while the others wait; all get what it returned."""
        if self.count == 1:
            return work()
        outcome: list[Any] = [None]
        failure: Exception | None = None
        if self.rank == 0:
            try:
                outcome = [(work(),)]
            except Exception as error:  # to be raised when the others know
                failure = error
        self._together(lambda: dist.broadcast_object_list(outcome, src=0, group=self._group))
        if failure is not None:
            raise failure
        if outcome[0] is None:
            raise SystemExit(1)
        return outcome[0][0]

    def each_does(self, work: Callable[[], T]) -> T:
        """Each process does ``work``, gets what its own returned, and goes on when all are done."""
        if self.count == 1:
            return work()
        outcome: list[T] = []
        failure: Exception | None = None
        try:
            outcome.append(work())
        except Exception as error:  # to be raised when the others know
            failure = error
        failed = [False] * self.count
        self._together(lambda: dist.all_gather_object(failed, failure is not None, group=self._group))
        if any(failed):
            if failure is not None and failed.index(True) == self.rank:
                raise failure
            raise SystemExit(1)
        return outcome[0]

    def _together(self, exchange: Callable[[], object]) -> None:
        try:
            exchange()
        except RuntimeError as error:  # gloo's word for a connection that broke
            raise UserError(
                "Another process of this dump died (killed, or out of memory?); what is written is kept: go on with "
                "--resume."
            ) from error
