"""Long work, cut into jobs, on a Ray cluster: each job is an actor's, which says all along that it is there.

An actor ends with its job, unless it is kept for another one, with what it has loaded.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from knn_lm_eval.errors import UserError
from knn_lm_eval.system.ray_actors import GET_SECONDS, Living, Pulse, first_line, kill_actor, start_actor
from knn_lm_eval.system.ray_cluster import LOOK_SECONDS, Head, Node

RETRIES = 3  # of a job whose process or node died
START_SECONDS = 1200.0  # a node may have to be bought first, or others' work to end
# A silent node's work may go on, and write: it is begun elsewhere only once Ray has given the node up, and ended it.
SILENT_SECONDS = 300.0


class Worker(Living):
    """An actor that does one job, or one after the other."""

    def run(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        """What the function returns."""
        return function(*arguments)


@dataclass(frozen=True)
class Needs:
    """What a job takes of its node.

    Attributes
    ----------
    gpus : GPUs.
    whole_node : all CPUs, so that a node has one job at a time.
    num_cpus : CPUs, where not all.
    """

    gpus: int = 0
    whole_node: bool = False
    num_cpus: int = 1

    def cpus(self, node: Node) -> int:
        """How many of a node's CPUs."""
        return int(node.resources["CPU"]) if self.whole_node else self.num_cpus

    def places(self, nodes: list[Node]) -> list[Node]:
        """A node for each job that fits side by side, the nodes in turn."""
        of_nodes = []
        for node in nodes:
            fitting = int(node.resources["CPU"]) // max(1, self.cpus(node))
            if self.gpus:
                fitting = min(fitting, int(node.resources.get("GPU", 0)) // self.gpus)
            of_nodes.append([node] * fitting)
        return [node for turn in zip_longest(*of_nodes) for node in turn if node is not None]


class Hand:
    """A worker's actor on a node, and its pulse."""

    def __init__(self, head: Head, node: Node, needs: Needs) -> None:
        self.node = node
        self.actor = start_actor(head.ray, Worker, (), node, num_cpus=needs.cpus(node), num_gpus=needs.gpus)
        self.pulse = Pulse(head.ray, self.actor)


@contextmanager
def kept_hands(head: Head) -> Iterator[list[Hand]]:
    """A list for ``run_jobs`` to keep workers in; they are ended when this is."""
    kept: list[Hand] = []
    try:
        yield kept
    finally:
        for hand in kept:
            kill_actor(head.ray, hand.actor)


class _Running:
    """A job at work."""

    def __init__(self, hand: Hand, function: Callable[..., Any], job: tuple[Any, ...]) -> None:
        self.hand, self.node, self.pulse = hand, hand.node, hand.pulse
        self.result = hand.actor.run.options(name=function.__name__).remote(function, job)


def run_jobs(
    head: Head,
    function: Callable[..., Any],
    jobs: Mapping[int, tuple[Any, ...]],
    needs: Needs,
    retries: int = RETRIES,
    then: str = "so did those that were started in its place",
    go_on: str = "go on with --resume",
    at_once: int | None = None,
    instead: Callable[[UserError], Any] | None = None,
    kept: list[Hand] | None = None,
) -> Iterator[tuple[int, Any] | None]:
    """Call a function with each job's arguments on a cluster's nodes, as many at a time as there are places.

    Parameters
    ----------
    function : a module's own; the nodes must have the package.
    jobs : the arguments, by the job's number.
    retries : how often a job whose process or node died is begun again.
    then : the rest of the sentence where it died once more.
    go_on : the rest of those where nodes are silent: what a user can do then.
    at_once : the most jobs side by side; None is as many as there are places.
    instead : makes of that sentence what stands for the job's result, and the others go on; None ends them all.
    kept : workers of the same needs that have done a job before, who do the next on their nodes; those that do one here
        are added. None ends each with its job.

    Yields
    ------
    The number of each job and what the function returned, as they come; None about once a second between.

    Raises
    ------
    UserError
        Where no node has what a job needs, a job raises one, its worker dies again and again, does not start within
        ``START_SECONDS`` or is silent for ``SILENT_SECONDS``, or the head is lost. What is left is ended.
    """
    waiting, running, deaths = deque(jobs), dict[int, _Running](), Counter[int]()
    try:
        while waiting or running:
            for node in _free(needs.places(head.workers), running):
                if waiting and len(running) < (at_once or len(jobs)):
                    number = waiting.popleft()
                    hand = _kept_on(node, kept or []) or Hand(head, node, needs)
                    running[number] = _Running(hand, function, jobs[number])
            if not running:
                raise UserError(
                    f"No node of the Ray cluster (address={head.address}) has {_in_words(needs)} to give; see what "
                    f"`ray status` says, and start nodes that have."
                )
            references = {job.result: number for number, job in running.items()}
            for reference in head.ray.wait(list(references), num_returns=1, timeout=LOOK_SECONDS)[0]:
                number = references[reference]
                try:
                    result = head.ray.get(reference, timeout=GET_SECONDS)
                except head.ray.exceptions.RayTaskError as error:
                    if isinstance(error.cause, UserError):
                        raise UserError(f"On a Ray node: {error.cause}") from error
                    raise
                except head.ray.exceptions.RayError as error:
                    deaths[number] += 1
                    job = running.pop(number)
                    if deaths[number] <= retries:
                        waiting.appendleft(number)
                        continue
                    died = UserError(f"A Ray task died on the node {job.node.name} ({first_line(error)}); {then}.")
                    if instead is None:
                        raise died from error
                    yield number, instead(died)
                else:
                    hand = running.pop(number).hand
                    if kept is None:
                        kill_actor(head.ray, hand.actor)
                    else:
                        kept.append(hand)
                    yield number, result
            head.look()
            _check_silence(head, running, go_on)
            yield None
    finally:
        for job in running.values():
            kill_actor(head.ray, job.hand.actor)


def _kept_on(node: Node, kept: list[Hand]) -> Hand | None:
    """A worker that is kept on a node, and now no longer; None where there is none."""
    hand = next((hand for hand in kept if hand.node.id == node.id), None)
    if hand is not None:
        kept.remove(hand)
    return hand


def _free(places: list[Node], running: Mapping[int, _Running]) -> list[Node]:
    """The places where nothing runs."""
    taken = Counter(job.node.id for job in running.values())
    free = []
    for node in places:
        if taken[node.id]:
            taken[node.id] -= 1
        else:
            free.append(node)
    return free


def _check_silence(head: Head, running: Mapping[int, _Running], go_on: str) -> None:
    """Raise UserError where a job's worker is silent for too long; one that died is found by who waits for it."""
    silences = {}
    for number, job in running.items():
        try:
            silences[number] = job.pulse.silence()
        except head.ray.exceptions.RayError:
            continue
    started = any(job.pulse.life is not None for job in running.values())
    for number, silence in silences.items():
        job = running[number]
        if job.pulse.life is not None and silence > SILENT_SECONDS:
            raise UserError(
                f"The Ray node {job.node.name} has not answered for {SILENT_SECONDS:g} seconds, though Ray has not "
                f"given it up; see to the node, and {go_on}."
            )
        if not started and silence > START_SECONDS:
            raise UserError(
                f"No node of the Ray cluster (address={head.address}) has started a task within {START_SECONDS:g} "
                f"seconds: others use them, or they are too busy; see what `ray status` says, and {go_on}."
            )


def _in_words(needs: Needs) -> str:
    cpus = "a CPU" if needs.num_cpus == 1 else f"{needs.num_cpus} CPUs"
    return cpus + (f" and {needs.gpus} GPU{'s' if needs.gpus > 1 else ''}" if needs.gpus else "")
