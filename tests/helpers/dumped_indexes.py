"""Indexes that a dump without keys made, beside those that ``build_index`` makes of kept keys."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from knn_lm_eval.make.index_dump import IndexDump
from knn_lm_eval.search import indexing, quality
from knn_lm_eval.search.indexing import build_index
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.key_stream import finite_keys


def same_index_from_keys(store: Datastore, sample: IndexDump, folder: Path, plan: dict[str, Any]) -> Datastore:
    """What ``build_index`` makes of kept keys, trained and measured with the entries that a dump had for it."""
    shutil.copytree(store.path, folder)
    copied = Datastore.open(folder)
    train, held_out = (sample.sample.drawn.entries[rows] for rows in sample._rows)

    def draw(of: Datastore, count: int, k: int, knn_temp: float, seed: int) -> quality.HeldOutQueries:
        keys = finite_keys(of.require_keys("a test")[held_out])
        return quality.HeldOutQueries(of, held_out, keys, min(k, len(of) - 1), knn_temp)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexing, "draw_entries", lambda *_: train)
        patch.setattr(quality.HeldOutQueries, "draw", draw)
        build_index(copied, **plan)
    return copied


def before_it_is_removed(monkeypatch: pytest.MonkeyPatch) -> list[IndexDump]:
    """What a dump knows when it is done, with the sample in memory."""
    found = []
    remove = IndexDump.remove

    def keep(self: IndexDump) -> None:
        assert self.sample.drawn and len(self._rows[0])
        found.append(self)
        remove(self)

    monkeypatch.setattr(IndexDump, "remove", keep)
    return found
