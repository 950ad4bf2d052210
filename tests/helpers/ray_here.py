"""A small Ray cluster on this machine, in processes of its own: who only gives its address to others never joins it."""

from __future__ import annotations

import os
import subprocess
import sys

from knn_lm_eval.system.ray_cluster import ENVIRONMENT

NODES = f"""
import sys
from ray.cluster_utils import Cluster
cluster = Cluster()
for node in range(2):
    head = {{}} if node else {{"include_dashboard": False}}
    cluster.add_node(num_cpus=1, object_store_memory={80 * 2**20}, **head)
cluster.wait_for_nodes()
print("address", cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


class Nodes:
    """A cluster of two nodes with one CPU each, from when its address is first asked for until it is ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._address = ""

    @property
    def address(self) -> str:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-c", NODES],
                env={**os.environ, **ENVIRONMENT},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            assert self._process.stdout is not None
            said = (line.split() for line in self._process.stdout)
            self._address = next((words[1] for words in said if words[:1] == ["address"]), "")
            assert self._address, "Ray does not start"
        return self._address

    def end(self) -> None:
        """Also where it has not begun."""
        if self._process is not None:
            assert self._process.stdin is not None and self._process.stdout is not None
            self._process.stdin.close()  # for which it waits
            self._process.wait(60)
            self._process.stdout.close()
            self._process = None


two_nodes = Nodes()
