"""Joining a Ray cluster, or starting a small one on this machine: what all that runs on Ray begins with."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from knn_lm_eval.errors import UserError, naming_missing_packages

# Read by Ray where it connects: its own patience with an address that nobody answers at is a quarter of an hour.
# A Ray that starts here by itself reports its use to nobody, and does without the monitor that kills processes where
# the machine's memory fills: mapped indexes may fill it, and make room when asked.
ENVIRONMENT = {
    "RAY_NUM_REDIS_GET_RETRIES": "1",
    "RAY_py_gcs_connect_timeout_s": "5",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_memory_monitor_refresh_ms": "0",
}


def connect(address: str) -> Any:
    """Connect this process to Ray, once; a process that is connected already stays where it is.

    Parameters
    ----------
    address : ``auto`` joins the cluster that runs on this machine, or starts a Ray of this process alone;
        ``HOST:PORT`` joins that cluster.

    Returns
    -------
    The module ``ray``.

    Raises
    ------
    UserError
        Where Ray is not installed, or no cluster answers at the address.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with naming_missing_packages():
        import ray
    if ray.is_initialized():
        return ray
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        if address != "auto":
            raise UserError(
                f"No Ray cluster can be joined at address={address} ({str(error).splitlines()[0]}); start one there "
                f"with `ray start --head`, or give address=auto."
            ) from error
        ray.init(address="local", include_dashboard=False, **quiet)
    return ray


def run_tasks(
    address: str, function: Callable[..., Any], jobs: Mapping[int, tuple[Any, ...]]
) -> Iterator[tuple[int, Any]]:
    """Call a function with each job's arguments, as Ray tasks: on each node one at a time, with all its CPUs.

    Parameters
    ----------
    address : as for ``connect``.
    function : a module's own; the nodes must have the package.
    jobs : the arguments, by the job's number.

    Yields
    ------
    The number of each job and what the function returned, as they come.

    Raises
    ------
    UserError
        Where a task raises one, or dies again and again.
    """
    ray = connect(address)
    cpus = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    task = ray.remote(function).options(num_cpus=min((n for n in cpus if n), default=1), scheduling_strategy="SPREAD")
    numbers = {task.remote(*arguments): number for number, arguments in jobs.items()}
    for finished in finished_tasks(ray, list(numbers)):
        if finished is not None:
            yield numbers[finished[0]], finished[1]


def finished_tasks(
    ray: Any,
    tasks: Sequence[Any],
    look_every: float | None = None,
    then: str = "so did those that were started in its place",
) -> Iterator[tuple[Any, Any] | None]:
    """Wait for tasks; those that are left when something fails are cancelled.

    Parameters
    ----------
    ray : the module, connected.
    tasks : what ``remote`` gave.
    look_every : seconds after which to yield None where no task is done; None waits.
    then : the rest of the sentence where a task died.

    Yields
    ------
    Each of the tasks, when it is done, and what it returned.

    Raises
    ------
    UserError
        Where a task raises one, or dies again and again.
    """
    waiting = list(tasks)
    try:
        while waiting:
            done, _ = ray.wait(waiting, num_returns=1, timeout=look_every)
            if done:
                result = ray.get(done[0])
                waiting.remove(done[0])
                yield done[0], result
            else:
                yield None
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(f"On a Ray node: {error.cause}") from error
        raise
    except ray.exceptions.RayError as error:
        first_line = str(error).strip().splitlines()[0]
        raise UserError(f"A Ray task died ({first_line}); {then}.") from error
    finally:
        for task in waiting:
            ray.cancel(task)
