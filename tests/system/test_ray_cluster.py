"""A head that does not answer is not waited for."""

from __future__ import annotations

import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

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


@pytest.mark.parametrize(
    ("address", "tried", "sentence"),
    [
        ("local", ["local"], r"Ray does not start on this machine \(The node timed out\); see whether"),
        ("auto", ["auto", "local"], r"Ray does not start on this machine \(The node timed out\); see whether"),
        ("10.0.0.1:6379", ["10.0.0.1:6379"], r"No Ray cluster can be joined at address=10.0.0.1:6379 \(nobody\)"),
    ],
)
def test_a_ray_that_does_not_start_is_said_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, address: str, tried: list[str], sentence: str
) -> None:
    given: list[str] = []

    def init(address: str, **_: Any) -> None:
        given.append(address)
        raise Exception("The node timed out\nfor some reason.") if address == "local" else ConnectionError("nobody")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False, init=init))
    with pytest.raises(UserError, match=sentence):
        ray_cluster.connect(address)
    assert given == tried
