"""Actors on a Ray cluster that say whether they are there, on a thread of its own, however long their work takes.

Ray itself finds out that a process died; that a node's link is cut it says after a minute or more, by its head's
settings. Whoever waits for an actor therefore feels its pulse.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from functools import cached_property
from typing import Any, NamedTuple

from knn_lm_eval.system.ray_cluster import LOOK_SECONDS, Node, Patience

PULSE = "pulse"  # the concurrency group that answers while the actor works
GET_SECONDS = 60.0  # for what Ray says is here already


class Life(NamedTuple):
    """Of an actor: a name of its own, the process, and where it lives."""

    name: str
    pid: int
    host: str
    node: str


class Living:
    """What all actors here are."""

    @cached_property
    def life(self) -> Life:
        """This actor's, which says which node Ray has put it on."""
        import ray

        node = ray.get_runtime_context().get_node_id()
        return Life(uuid.uuid4().hex, os.getpid(), socket.gethostname(), node)

    def is_there(self) -> Life:
        """At once."""
        return self.life


def start_actor(ray: Any, kind: type[Living], arguments: tuple[Any, ...], node: Node, **options: Any) -> Any:
    """Start an actor on a node; where the head has given that up by then, on another. Returns the handle at once.

    Parameters
    ----------
    ray : the module, connected.
    kind, arguments : the class, and what it is made of.
    options : of Ray, such as ``num_cpus``. Ray starts no other in the actor's place.
    """
    place = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node.id, soft=True)
    actor_class = ray.remote(concurrency_groups={PULSE: 1})(kind)
    return actor_class.options(scheduling_strategy=place, max_restarts=0, **options).remote(*arguments)


class Pulse:
    """An actor's: it is asked every ``LOOK_SECONDS`` at most, by whoever calls ``silence``.

    Attributes
    ----------
    life : what the actor said of itself; None until it has started.
    """

    def __init__(self, ray: Any, actor: Any) -> None:
        self._ray, self._actor = ray, actor
        self.life: Life | None = None
        self._ask()

    def silence(self) -> float:
        """Seconds for which the actor has owed an answer; raises Ray's errors where it died."""
        if not self._ray.wait([self._beat], timeout=0)[0]:
            return self._patience.spent()
        self.life = self._ray.get(self._beat, timeout=GET_SECONDS)
        if time.monotonic() - self._asked >= LOOK_SECONDS:
            self._ask()
        return 0.0

    def _ask(self) -> None:
        self._asked, self._patience = time.monotonic(), Patience()
        self._beat = self._actor.is_there.options(concurrency_group=PULSE).remote()


def kill_actor(ray: Any, actor: Any) -> None:
    """Have Ray kill an actor, wherever it is; returns at once."""
    ray.kill(actor, no_restart=True)


def first_line(error: BaseException) -> str:
    """Of what Ray has to say, which is long."""
    return str(error).strip().splitlines()[0]
