"""Links of a Ray cluster are cut: nothing is reset or refused, packets just go nowhere."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from helpers import network
from helpers.ray_network import RayNetwork, serve
from helpers.stores import make_store

from knn_lm_eval.search.indexing import build_index

pytest.importorskip("ray", reason="needs Ray")
pytestmark = [
    pytest.mark.xdist_group("ray"),  # one Ray at a time
    pytest.mark.slow,
    pytest.mark.skipif(network.obstacle() is not None, reason=str(network.obstacle())),
]
ASKING = str(Path(network.__file__).with_name("ray_asking.py"))


def ask(nodes: RayNetwork, node: int, store: Path) -> tuple[list[dict], int, str]:
    """What a process on that node tells, its exit status, and its last line of errors."""
    asking = nodes.python(
        node,
        *[ASKING, nodes.ray_address, str(store)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    told = [json.loads(line) for line in serve(nodes, asking) if line.startswith("{")]
    assert asking.stderr is not None
    return told, asking.returncode, asking.stderr.read()


def test_a_cut_link_costs_seconds_and_no_numbers(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    build_index(store, "IVF16,RaBitQfs", parts=2, quality_queries=0)
    with RayNetwork(3) as nodes:
        told, status, errors = ask(nodes, 1, store.path)
        assert len(told) == 5, (told, errors)
        *searches, end = told
        assert all(search["same"] for search in searches), told
        before, first, second, moved = (search["seconds"] for search in searches)
        assert first < 8, told  # the replica was asked before the silent one was given up
        assert second < max(2, 4 * before), told  # and at once from then on
        assert moved < 60 and searches[-1]["restarts"] == 1, told
        assert status == 1 and "it has not answered for 8 seconds, and no other node can take it" in end["error"], end
