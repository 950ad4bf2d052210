"""Joining a Ray cluster, or starting a small one on this machine, and asking its head which nodes there are."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

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
LOOK_SECONDS = 1.0  # between two looks at who is there
# Ray itself ends a process that has missed the head for 60 seconds, without a word that a user would understand.
HEAD_SECONDS = 30.0


class Patience:
    """How long somebody has been waited for, looking at it every now and then.

    Where this process itself was stopped, or did something else, that counts as one look: what it waits for may have
    answered long ago.
    """

    def __init__(self) -> None:
        self._spent, self._last = 0.0, time.monotonic()

    def spent(self) -> float:
        """Seconds; at most two ``LOOK_SECONDS`` more than at the last call."""
        now = time.monotonic()
        self._spent += min(now - self._last, 2 * LOOK_SECONDS)
        self._last = now
        return self._spent


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
        Where Ray is not installed, no cluster answers at the address, or none starts here.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with naming_missing_packages():
        import ray
    if ray.is_initialized():
        return ray
    if address != "local":
        try:
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
            return ray
        except (ConnectionError, RuntimeError, ValueError) as error:
            if address != "auto":
                raise UserError(
                    f"No Ray cluster can be joined at address={address} ({str(error).splitlines()[0]}); start one "
                    f"there with `ray start --head`, or give address=auto."
                ) from error
    try:
        ray.init(address="local", include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    except Exception as error:  # Ray raises no kind of its own
        raise UserError(
            f"Ray does not start on this machine ({str(error).strip().splitlines()[0]}); see whether it has memory and "
            f"processors to spare, and try again."
        ) from error
    return ray


class Node(NamedTuple):
    """A node that the head has not given up.

    Attributes
    ----------
    id : Ray's, in hexadecimal.
    name : its IP address.
    resources : what Ray gives out there in all, by name: ``CPU``, ``GPU``.
    """

    id: str
    name: str
    resources: Mapping[str, float]


class Head:
    """A cluster's head, which is asked for the nodes by whoever waits for something else, and never waited for.

    Parameters
    ----------
    address : see ``connect``.

    Attributes
    ----------
    ray : the module, connected.
    address : as given.
    nodes : those that were there at the last look.

    Raises
    ------
    UserError
        As ``connect``, and where the head does not answer within ``HEAD_SECONDS``.
    """

    def __init__(self, address: str) -> None:
        self.ray, self.address = connect(address), address
        self.nodes: list[Node] = []
        self._ask()
        self._asking.join(HEAD_SECONDS)
        if self._asking.is_alive():
            raise self._lost()

    @property
    def workers(self) -> list[Node]:
        """The nodes that have a CPU to give."""
        return [node for node in self.nodes if node.resources.get("CPU")]

    def look(self) -> None:
        """Ask for the nodes again, where the last question is answered; returns at once.

        Raises
        ------
        UserError
            Where the head has owed an answer for ``HEAD_SECONDS``.
        """
        if not self._asking.is_alive():
            self._ask()
        elif self._patience.spent() > HEAD_SECONDS:
            raise self._lost()

    def _ask(self) -> None:
        self._patience = Patience()
        self._asking = threading.Thread(target=self._answer, name="ray head", daemon=True)
        self._asking.start()

    def _answer(self) -> None:
        self.nodes = [
            Node(node["NodeID"], node["NodeManagerAddress"], node["Resources"])
            for node in self.ray.nodes()
            if node["Alive"]
        ]

    def _lost(self) -> UserError:
        # Taking leave of the head in order would take minutes, and without that Ray's own end is a crash.
        atexit.unregister(self.ray.shutdown)
        _lost_heads.append(self.address)
        return UserError(
            f"The head of the Ray cluster (address={self.address}) has not answered for {HEAD_SECONDS:g} seconds: it "
            f"is gone, or its link is cut; start the cluster again with `ray start --head`, and run again."
        )


_lost_heads: list[str] = []


@atexit.register
def _end_without_a_head() -> None:
    """End this process at once where a head was lost; comes late, as it is registered before Ray is imported."""
    if _lost_heads:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
