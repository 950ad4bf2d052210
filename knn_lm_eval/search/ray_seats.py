"""Who holds which shard on a Ray cluster, whether they are there, and who is asked.

Each shard is held by as many actors (seats) as there are replicas, on different nodes. A question goes to one of them.
Where that is silent another is asked as well; where it is lost one is started elsewhere, in the background if another
replica goes on meanwhile. Nobody waits for an answer without feeling the pulse of whoever owes it.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from knn_lm_eval.errors import UserError
from knn_lm_eval.search.shard import Shard
from knn_lm_eval.system.ray_actors import GET_SECONDS, Pulse, first_line, kill_actor, start_actor
from knn_lm_eval.system.ray_cluster import LOOK_SECONDS, Head, Node

logger = logging.getLogger(__name__)

RESTARTS = 3  # of a shard, while one question is asked
DOUBT_SECONDS = 3.0  # of silence, after which another replica is asked as well
SILENT_SECONDS = 20.0  # after which a seat counts as lost, whatever the head says of its node
START_SECONDS = 240.0  # that an actor may take to start
OPEN_SECONDS = 0.05  # between two looks while all open
AVOID_SECONDS = 60.0  # for which a node where one was lost gets no other


class Seat:
    """An actor that holds a shard.

    Attributes
    ----------
    number : the shard's.
    node : where it was put.
    actor : to be asked; it works on one question after the other.
    opened : whether it has opened its files.
    lists : how many inverted lists it then said to have.
    is_lost : whether it was given up.
    silence : seconds, see ``Pulse``.
    """

    def __init__(self, head: Head, number: int, node: Node, kind: type[Shard], arguments: tuple[Any, ...]) -> None:
        self._ray, self.number, self.node = head.ray, number, node
        self.actor = start_actor(head.ray, kind, arguments, node)
        self._pulse = Pulse(head.ray, self.actor)
        self._opening = self.actor.lists.remote()
        self._owed: list[Any] = []
        self.opened, self.is_lost, self.silence = False, False, 0.0
        self.lists: int | None = None

    @property
    def has_started(self) -> bool:
        """Whether it has said anything."""
        return self._pulse.life is not None

    @property
    def is_doubtful(self) -> bool:
        """Whether a replica should be asked as well."""
        return not self.opened or self.silence > DOUBT_SECONDS

    def look(self) -> None:
        """See whether it is there, and has opened its files; raises Ray's errors where it died or could not."""
        self.silence = self._pulse.silence()
        if not self.opened and self._ray.wait([self._opening], timeout=0)[0]:
            self.lists, self.opened = self._ray.get(self._opening, timeout=GET_SECONDS), True

    def ask(self, call: Callable[[Any], Any]) -> Any:
        """Call the actor; returns Ray's reference."""
        reference = call(self.actor)
        self._owed.append(reference)
        return reference

    def count_owed(self) -> int:
        """Answers that it has not given yet."""
        if self._owed:
            self._owed = self._ray.wait(self._owed, num_returns=len(self._owed), timeout=0)[1]
        return len(self._owed)


class Seats:
    """All seats of all shards.

    Parameters
    ----------
    head : of the cluster.
    kind, arguments : the actors' class, and for each shard what one is made of.
    name_of : a shard's name by its number, for error messages.
    replicas : seats of each shard.

    Attributes
    ----------
    of_shards : the seats there are, by the shard's number.
    restarts : seats that were started in the place of others.

    Raises
    ------
    UserError
        Where the cluster has fewer nodes than replicas, a shard cannot be opened, or, at any time, the head is lost, or
        a shard for good.
    """

    def __init__(
        self,
        head: Head,
        kind: type[Shard],
        arguments: Sequence[tuple[Any, ...]],
        name_of: Callable[[int], str],
        replicas: int,
    ) -> None:
        self._head, self._ray, self._kind, self._arguments = head, head.ray, kind, arguments
        self._name_of, self._replicas = name_of, replicas
        nodes = head.workers
        if len(nodes) < replicas:
            raise UserError(
                f"replicas={replicas} takes as many nodes with a CPU, and the Ray cluster (address={head.address}) has "
                f"{len(nodes)}: start more, or give a smaller number."
            )
        self._losses: Counter[int] = Counter()  # by shard, of seats that had opened it, during one question
        self._failures: Counter[int] = Counter()  # by shard, of seats in a row that had not
        # Nodes by id, until when: where one died others go if there is another, where one was silent in no case.
        self._avoided: dict[str, float] = {}
        self._closed: dict[str, float] = {}
        self._last_nodes = [""] * len(arguments)
        self._all_were_opened = False
        self._turn, self.restarts, self._looked = 0, 0, time.monotonic()
        # In turn, as Ray's own SPREAD may put all on one node.
        self.of_shards = [
            [self._start(number, nodes[(number + replica) % len(nodes)]) for replica in range(replicas)]
            for number in range(len(arguments))
        ]
        while not self._all_were_opened:
            time.sleep(OPEN_SECONDS)
            self._look()
            self._all_were_opened = all(seat.opened for seats in self.of_shards for seat in seats)

    def ask(self, calls: Mapping[int, Callable[[Any], Any]]) -> dict[int, Any]:
        """The answers of shards, by their numbers.

        Parameters
        ----------
        calls : given an actor, each returns what Ray's ``remote`` does.
        """
        self._turn += 1
        self._losses.clear()
        asked: dict[Any, Seat] = {}
        answers: dict[int, Any] = {}
        all_are_asked = False
        while len(answers) < len(calls):
            if time.monotonic() - self._looked >= LOOK_SECONDS:
                self._look()
                asked = {reference: seat for reference, seat in asked.items() if not seat.is_lost}
                all_are_asked = False
            if not all_are_asked:
                for number in calls.keys() - answers.keys():
                    if seat := self._choose(number, [seat for seat in asked.values() if seat.number == number]):
                        asked[seat.ask(calls[number])] = seat
                all_are_asked = True
            for reference in self._ray.wait(list(asked), num_returns=1, timeout=LOOK_SECONDS)[0]:
                seat = asked.pop(reference)
                try:
                    answers.setdefault(seat.number, self._ray.get(reference, timeout=GET_SECONDS))
                except self._ray.exceptions.RayError as error:
                    self._lose(seat, error)
                    self._fill()
                    all_are_asked = False
        return answers

    def _choose(self, number: int, asked: list[Seat]) -> Seat | None:
        """The seat to ask further for a shard's answer, of those that were not yet; None where none is to be."""
        others = [seat for seat in self.of_shards[number] if seat not in asked]
        if asked:
            others = (
                [seat for seat in others if not seat.is_doubtful] if all(seat.is_doubtful for seat in asked) else []
            )
        if len(others) < 2:
            return others[0] if others else None
        first = self._turn % len(others)
        return min(others[first:] + others[:first], key=lambda seat: (seat.is_doubtful, seat.count_owed()))

    def _look(self) -> None:
        """See whether head and seats are there, and start others in the place of seats that are not."""
        self._head.look()
        for seat in [seat for seats in self.of_shards for seat in seats]:
            try:
                seat.look()
            except self._ray.exceptions.RayError as error:
                self._lose(seat, error)
                continue
            if seat.opened:
                self._failures[seat.number] = 0
            if seat.has_started and seat.silence > SILENT_SECONDS:
                self._lose(seat, TimeoutError(f"it has not answered for {SILENT_SECONDS:g} seconds"))
            elif not seat.has_started and seat.silence > START_SECONDS:
                if len(self.of_shards[seat.number]) == 1:
                    raise UserError(
                        f"{self._name(seat.number)}: it has not started on any node within {START_SECONDS:g} seconds: "
                        f"none has a CPU for it, or they are too busy; see to the nodes, and run again."
                    )
                self._lose(seat, TimeoutError(f"it has not started within {START_SECONDS:g} seconds"))
        self._fill()
        self._looked = time.monotonic()

    def _lose(self, seat: Seat, error: Exception) -> None:
        """Give a seat up; raises UserError where the shard is lost for good, or what went wrong will again."""
        number, words = seat.number, first_line(error)
        if isinstance(error, self._ray.exceptions.RayTaskError):
            if not isinstance(error.cause, UserError):
                raise error
            if seat.opened or not self._all_were_opened:
                raise UserError(f"{self._name(number)}: {error.cause}") from error
            words = str(error.cause)
        (self._losses if seat.opened else self._failures)[number] += 1
        refused = isinstance(error, (TimeoutError, self._ray.exceptions.RayTaskError))
        (self._closed if refused else self._avoided)[seat.node.id] = time.monotonic() + AVOID_SECONDS
        seat.is_lost = True
        kill_actor(self._ray, seat.actor)
        self.of_shards[number].remove(seat)
        no_place = not self.of_shards[number] and self._place(number) is None
        if no_place or max(self._losses[number], self._failures[number]) > RESTARTS and not self.of_shards[number]:
            also = ", and no other node can take it" if no_place else ""
            raise UserError(
                f"{self._name(number)} is lost, after {RESTARTS} restarts at most ({words}{also}); see to the node, "
                f"and run again."
            ) from error
        lost = self._name_of(number), seat.node.name
        goes_on = "; a replica goes on" if self.of_shards[number] else ""
        logger.warning("The shard with %s on the node %s is lost (%s)%s.", *lost, words, goes_on)

    def _fill(self) -> None:
        """Start seats where shards have fewer than they should and there is a node for another."""
        for number, seats in enumerate(self.of_shards):
            if len(seats) < self._replicas and self._failures[number] <= RESTARTS and (node := self._place(number)):
                seats.append(self._start(number, node))
                self.restarts += 1

    def _place(self, number: int) -> Node | None:
        """The node for one more seat of a shard, with the fewest seats; None where there is none."""
        now = time.monotonic()
        barred = {seat.node.id for seat in self.of_shards[number]} | {
            id for id, end in self._closed.items() if end > now
        }
        nodes = [node for node in self._head.workers if node.id not in barred]
        taken = Counter(seat.node.id for seats in self.of_shards for seat in seats)
        return min(nodes, key=lambda node: (self._avoided.get(node.id, 0.0) > now, taken[node.id]), default=None)

    def _start(self, number: int, node: Node) -> Seat:
        self._last_nodes[number] = node.name
        return Seat(self._head, number, node, self._kind, self._arguments[number])

    def _name(self, number: int) -> str:
        """A shard, for an error message."""
        where = f"last on the node {self._last_nodes[number]}"
        return f"The shard with {self._name_of(number)} (Ray at address={self._head.address}, {where})"
