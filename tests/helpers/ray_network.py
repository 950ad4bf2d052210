"""What Ray retrieval takes over a network that delays and loses, and what happens where a link is cut.

    python tests/helpers/ray_network.py STORE [--index index] [--nodes 4] [--k 1024] [--batch 512]

Takes root. The nodes are namespaces of this machine, with the head and the asking process on the first, which has no
CPU to give; all share its cores, so that times without delay say little of a real cluster's, and the differences much.
Queries lie between keys of the store. Prints a line of JSON for each measurement.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from helpers.network import Network

from knn_lm_eval.system.ray_cluster import ENVIRONMENT

PORT, OBJECT_STORE = 6379, 100 * 2**20
START_SECONDS = 120.0
READY, DO = "Ray runtime started", "DO "
BATCHES, AFTER = 5, 4  # measured; after something was done


class RayNetwork(Network):
    """A network whose nodes run Ray: the first is the head, each other one has a CPU to give. Takes some ten seconds.

    Parameters
    ----------
    nodes : in all.
    settings : Ray's own, such as ``RAY_health_check_period_ms``.
    """

    def __init__(self, nodes: int, **settings: str) -> None:
        super().__init__(nodes)
        # A token that lies about on this machine would be asked for by some and not sent by others.
        own = {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._environment = os.environ | ENVIRONMENT | own | settings

    def __enter__(self) -> RayNetwork:
        super().__enter__()
        self._folder = tempfile.TemporaryDirectory(prefix="r", dir="/tmp")  # a short path, for sockets
        try:
            self._start_ray(1, "--head", f"--port={PORT}", "--num-cpus=0", "--include-dashboard=false")
            for node in self.nodes[1:]:
                self._start_ray(node, f"--address={self.ray_address}", "--num-cpus=1")
            for node in self.nodes:
                self._wait_for(node)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._folder.cleanup()

    @property
    def ray_address(self) -> str:
        """The cluster's."""
        return f"{self.address(1)}:{PORT}"

    def python(self, node: int, *arguments: str, **how: Any) -> subprocess.Popen:
        """Start Python on a node, as a process that asks the cluster."""
        return self.start(node, [sys.executable, *arguments], env=self._environment, **how)

    def _log(self, node: int) -> Path:
        return Path(self._folder.name) / f"{node}.log"

    def _start_ray(self, node: int, *how: str) -> None:
        place = [f"--node-ip-address={self.address(node)}", f"--temp-dir={self._folder.name}/{node}"]
        program = ["-c", "from ray.scripts.scripts import main; main()", "start", "--block", "--disable-usage-stats"]
        log = self._log(node).open("w")
        self.python(node, *program, f"--object-store-memory={OBJECT_STORE}", *place, *how, stdout=log, stderr=log)
        if node == 1:
            self._wait_for(node)

    def _wait_for(self, node: int) -> None:
        began = time.monotonic()
        while READY not in (said := self._log(node).read_text()):
            if time.monotonic() - began > START_SECONDS:
                raise TimeoutError(f"Ray has not started on node {node}: {said}")
            time.sleep(0.1)


def serve(network: RayNetwork, asking: subprocess.Popen) -> Iterator[str]:
    """Do to the network what a process asks for, by lines such as ``DO cut 2``; yields its other lines."""
    assert asking.stdout is not None and asking.stdin is not None
    for line in asking.stdout:
        if not line.startswith(DO):
            yield line
            continue
        word, value = line.removeprefix(DO).split()
        change: Any = getattr(network, word)
        change(float(value) if word.startswith("set_") else int(value))
        asking.stdin.write("done\n")
        asking.stdin.flush()
    asking.wait()


def have_done(what: str) -> None:
    """In a process that asks: have the network changed, and wait until it is."""
    print(DO + what, flush=True)
    sys.stdin.readline()


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", type=Path)
    parser.add_argument("--index", default="index")
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--k", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--replicas", type=int)
    parser.add_argument("--asks", help=argparse.SUPPRESS)
    parser.add_argument("--events", nargs="*", default=["delay", "cut", "kill"])
    arguments = parser.parse_args(given)
    if arguments.asks:
        measure(arguments)
        return
    own = sys.argv[1:] if given is None else list(given)
    for replicas in [arguments.replicas] if arguments.replicas else [1, 2]:
        with RayNetwork(arguments.nodes) as network:
            how = [__file__, *own, f"--asks={network.ray_address}", f"--replicas={replicas}"]
            asking = network.python(1, *how, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for line in serve(network, asking):
                print(line, end="", flush=True)


def measure(arguments: argparse.Namespace) -> None:
    """All measurements of one cluster, from one of its nodes."""
    import numpy as np
    import torch

    from knn_lm_eval.errors import UserError
    from knn_lm_eval.search.ray_retriever import RayRetriever
    from knn_lm_eval.store.datastore import Datastore
    from knn_lm_eval.system.ray_cluster import connect

    ray = connect(arguments.asks)
    while sum(node["Alive"] for node in ray.nodes()) < arguments.nodes:
        time.sleep(0.1)
    store = Datastore.open(arguments.store, verify="never")
    began = time.perf_counter()
    retriever = RayRetriever(
        store, arguments.k, index=arguments.index, address=arguments.asks, replicas=arguments.replicas
    )
    opened = time.perf_counter() - began
    rows = np.random.default_rng(1).integers(0, len(store), (2, arguments.batch))
    assert store.keys is not None
    queries = torch.from_numpy((store.keys[rows[0]].astype(np.float32) + store.keys[rows[1]]) / 2)
    expected = retriever.search(queries)

    def tell(**what: Any) -> None:
        print(json.dumps({"replicas": arguments.replicas, **what}), flush=True)

    def batches(count: int) -> list[float]:
        seconds = []
        for _ in range(count):
            start = time.perf_counter()
            found = retriever.search(queries)
            seconds.append(round(time.perf_counter() - start, 3))
            assert all(torch.equal(a, b) for a, b in zip(found[:3], expected[:3], strict=True))
        return seconds

    batches(2)
    retriever.statistics.bytes_sent = retriever.statistics.bytes_received = 0
    before = retriever.statistics.searches
    for event, delay, loss in (
        [("none", 0, 0), ("1 ms", 0.001, 0), ("10 ms", 0.01, 0), ("50 ms", 0.05, 0), ("1 % lost", 0, 0.01)]
        if "delay" in arguments.events
        else [("none", 0, 0)]
    ):
        have_done(f"set_delay {delay}")
        have_done(f"set_loss {loss}")
        tell(event=event, seconds=batches(BATCHES), opened=round(opened, 1))
    have_done("set_loss 0")
    searched = retriever.statistics.searches - before
    parts = len(retriever.parts)
    tell(
        parts=parts,
        sent_per_query_and_part=retriever.statistics.bytes_sent / searched / parts,
        received_per_query_and_part=retriever.statistics.bytes_received / searched / parts,
    )
    for event, node in (("cut", 2), ("kill", 3)):
        if event not in arguments.events:
            continue
        threading.Timer(0.3, have_done, [f"{event} {node}"]).start()
        start = time.perf_counter()
        try:
            tell(event=f"{event} {node}", seconds=batches(BATCHES + AFTER), restarts=retriever.statistics.restarts)
        except UserError as error:
            tell(event=f"{event} {node}", after=round(time.perf_counter() - start, 1), error=str(error))
            return
        began = time.perf_counter()
        while retriever.statistics.restarts < 1 and time.perf_counter() - began < 60:
            batches(1)
        tell(
            event=f"later: {event} {node}",
            again_whole=round(time.perf_counter() - start, 1),
            seconds=batches(2),
            restarts=retriever.statistics.restarts,
        )


if __name__ == "__main__":
    main()
