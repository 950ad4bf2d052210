"""A small Ray cluster on this machine, in processes of its own: who only gives its address to others never joins it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

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


@contextmanager
def two_nodes() -> Iterator[str]:
    """The address of a cluster of two nodes with one CPU each, while it is there."""
    nodes = subprocess.Popen(
        [sys.executable, "-c", NODES],
        env={**os.environ, **ENVIRONMENT},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert nodes.stdin is not None and nodes.stdout is not None
    try:
        yield next(line.split()[1] for line in nodes.stdout if line.startswith("address "))
    finally:
        nodes.stdin.close()
        nodes.wait(60)
