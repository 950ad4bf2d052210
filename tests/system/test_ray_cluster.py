"""A head that does not answer is not waited for."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest

from knn_lm_eval.errors import UserError
from knn_lm_eval.system import ray_cluster
from knn_lm_eval.system.ray_cluster import Head, Patience


def test_a_head_that_falls_silent_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    answers, cut = threading.Event(), threading.Event()
    node = {"NodeID": "a", "NodeManagerAddress": "10.0.0.1", "Resources": {"CPU": 2.0}, "Alive": True}

    def nodes() -> list[dict]:
        if cut.is_set():
            answers.wait()
        return [node, node | {"NodeID": "b", "Alive": False}]

    pretended = SimpleNamespace(nodes=nodes, shutdown=lambda: None)
    monkeypatch.setattr(ray_cluster, "connect", lambda address: pretended)
    monkeypatch.setattr(ray_cluster, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(ray_cluster, "_lost_heads", [])
    head = Head("10.0.0.1:6379")
    assert [(node.id, node.name) for node in head.workers] == [("a", "10.0.0.1")]
    head.look()
    cut.set()
    with pytest.raises(UserError, match=r"The head of the Ray cluster \(address=10\.0\.0\.1:6379\) has not answered"):
        for _ in range(100):
            head.look()
            time.sleep(0.02)
    assert ray_cluster._lost_heads == ["10.0.0.1:6379"]
    answers.set()


def test_time_in_which_nobody_looked_counts_little(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 601.0, 601.5])
    monkeypatch.setattr(ray_cluster.time, "monotonic", lambda: next(clock))
    patience = Patience()
    assert [patience.spent() for _ in range(3)] == [1.0, 3.0, 3.5]
