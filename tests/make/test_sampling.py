"""A text's sample: random batches, whose keys are those that the text has when it is read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knn_lm_eval.lm.language_model import LanguageModel
from knn_lm_eval.lm.loading import CausalHFLM
from knn_lm_eval.make.dump_progress import share_states
from knn_lm_eval.make.key_reading import KeyReader, entries_in
from knn_lm_eval.make.sampling import DrawnBatches, TextSample, draw_batches, keys_to_read
from knn_lm_eval.make.windows import WindowSettings, batches, chunks, cut_windows
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.system.checkpoints import SavedStates


def all_batches(starts: np.ndarray, count: int, settings: WindowSettings) -> list:
    windows = cut_windows(starts, count, settings)
    return [batch for chunk in chunks(windows, settings) for batch in batches(chunk, settings)]


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=60),
    st.integers(1, 12).flatmap(lambda length: st.tuples(st.just(length), st.integers(1, length), st.integers(1, 3))),
    st.integers(1, 500),
    st.integers(0, 3),
)
def test_batches_are_drawn_whole_once_each_and_enough_of_them(lengths, shape, wanted: int, seed: int) -> None:
    starts, count, windows = np.cumsum([0, *lengths[:-1]]), sum(lengths), WindowSettings(*shape)
    there = all_batches(starts, count, windows)
    drawn = draw_batches(starts, count, windows, wanted, seed)
    places = [there.index(batch) for batch in drawn.batches]
    assert places == sorted(set(places))
    assert len(drawn) == sum(map(entries_in, drawn.batches)) == len(set(drawn.entries.tolist()))
    if wanted >= count:
        assert len(drawn) == count
    many = keys_to_read(count, len(there), wanted)
    assert len(places) == min(len(there), -(-many * len(there) // count))
    assert drawn == draw_batches(starts, count, windows, wanted, seed)


def test_each_batch_is_as_likely_as_another() -> None:
    settings, starts, count = WindowSettings(8, 8, 1), np.arange(0, 160, 5), 160
    there = all_batches(starts, count, settings)
    found = np.zeros(len(there))
    for seed in range(400):
        for batch in draw_batches(starts, count, settings, 10, seed).batches:
            found[there.index(batch)] += 1
    assert abs(found / found.mean() - 1).max() < 0.6 and found.mean() > 90


@pytest.mark.parametrize(
    ("count", "batches_there", "wanted", "expected"),
    [
        (10, 5, 100, 10),  # all there is
        (200_000, 50, 70_000, 70_000),  # as many as are wanted, though that is more than a third
        (400_000, 100, 70_000, 133_333),  # a third
        (10**7, 2500, 70_000, 280_000),  # four times as many
        (10**8, 25_000, 600_000, 1_024_000),  # from 256 places
        (10**9, 250_000, 8_000_000, 8_000_000),
    ],
)
def test_how_many_keys_are_read(count: int, batches_there: int, wanted: int, expected: int) -> None:
    assert keys_to_read(count, batches_there, wanted) == expected


@pytest.fixture
def drawn(store: Datastore) -> DrawnBatches:
    assert store.manifest.windows is not None
    settings = WindowSettings.of_store(store.manifest.windows)
    drawn = draw_batches(store.document_starts, len(store), settings, 700, 3)
    assert 700 <= len(drawn) < len(store)
    return drawn


def test_its_keys_are_the_stores_whoever_read_them(
    tmp_path: Path, lm: CausalHFLM, store: Datastore, drawn: DrawnBatches
) -> None:
    states = SavedStates(tmp_path / "progress.json", {})
    drawn.save(states, "sample")
    assert DrawnBatches.load(states, "sample") == drawn
    assert DrawnBatches.load(states, "other") is None
    assert store.manifest.windows is not None
    settings = WindowSettings.of_store(store.manifest.windows)
    reader = KeyReader(LanguageModel(lm.model), lm.prefix_token_id, settings, store.dimension, store.values)
    sample = TextSample(tmp_path, drawn, store.dimension)
    sample.file.make_room(anew=True)
    read = []
    original = KeyReader.of_batch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KeyReader, "of_batch", lambda self, batch: read.append(batch[0]) or original(self, batch))
        sample.read_share(reader, 1, 3, [], share_states(tmp_path, 1), tmp_path / "failed")
        done = share_states(tmp_path, 1).notes()["runs_done"]
        sample.read_share(
            reader, 1, 3, [], share_states(tmp_path, 1), tmp_path / "failed"
        )  # there is nothing left of it
        for share in range(2):
            sample.read_share(reader, share, 2, done, share_states(tmp_path, share + 5), tmp_path / "failed")
    assert len(read) == len(set(read)) == len(drawn.batches)
    assert np.array_equal(sample.vectors(np.arange(len(drawn))), store.keys[drawn.entries].astype(np.float32))
    for batch in drawn.batches:
        assert np.array_equal(sample.of_batch(batch), reader.of_batch(batch))
    others = [batch for batch in all_batches(store.document_starts, len(store), settings) if batch not in drawn.batches]
    assert others and all(sample.of_batch(batch) is None for batch in others)


def test_what_is_held_out_is_not_trained_on_where_there_is_enough(tmp_path: Path, drawn: DrawnBatches) -> None:
    sample, rows = TextSample(tmp_path, drawn, 4), len(drawn)
    for train, held_out, shared in ((300, 100, 0), (rows - 50, 100, 50), (10 * rows, 100, 100), (300, 0, 0)):
        parts = sample.divided(train, held_out, seed=1)
        assert [len(part) for part in parts] == [min(train, rows), held_out]
        assert len(np.intersect1d(*parts)) == shared
        for part in parts:
            entries = drawn.entries[part]
            assert (np.diff(entries) > 0).all()
    assert not np.array_equal(sample.divided(300, 0, 1)[0], sample.divided(300, 0, 2)[0])
