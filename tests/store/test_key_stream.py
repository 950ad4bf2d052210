"""Keys in chunks: all of them, in order, as float32, and none that is not finite."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from knn_lm_eval.errors import UserError
from knn_lm_eval.store import key_stream
from knn_lm_eval.store.key_stream import key_chunks, keys_of, number_entries
from knn_lm_eval.system import checkpoints
from knn_lm_eval.system.checkpoints import SavedStates

KEYS = np.random.default_rng(0).standard_normal((1000, 8)).astype(np.float16)


@pytest.mark.parametrize(("start", "stop"), [(0, None), (0, 1000), (130, 777), (999, None), (5, 5)])
@pytest.mark.parametrize("size", [1, 64, 1000, None])
def test_chunks_are_the_keys_in_order(start: int, stop: int | None, size: int | None) -> None:
    chunks = list(key_chunks(KEYS, start, stop, size))
    assert all(chunk.dtype == np.float32 and 0 < len(chunk) <= (size or 2**16) for chunk in chunks)
    np.testing.assert_array_equal(np.concatenate([np.empty((0, 8)), *chunks]), KEYS[start:stop])


def test_chosen_keys_are_read_in_chunks(monkeypatch) -> None:
    monkeypatch.setattr(key_stream, "ADD_CHUNK", 7)
    entries = np.sort(np.random.default_rng(1).permutation(1000)[:100])
    chosen = keys_of(KEYS, entries)
    assert chosen.dtype == np.float32
    np.testing.assert_array_equal(chosen, KEYS[entries])


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_keys_that_are_not_finite_are_refused(number: float) -> None:
    keys = KEYS.copy()
    keys[500, 3] = number
    assert len(list(key_chunks(keys, 0, 500, 100))) == 5
    with pytest.raises(UserError, match="keys hold NaN or infinity"):
        list(key_chunks(keys, size=100))
    with pytest.raises(UserError, match="keys hold NaN or infinity"):
        keys_of(keys, np.array([1, 500]))


def test_numbers_of_entries_go_on_where_they_were_saved(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(key_stream, "SEARCH_CHUNK", 64)
    monkeypatch.setattr(checkpoints, "CHECKPOINT_SECONDS", 0)
    begun_at: list[int] = []

    def sum_up(numbers: np.ndarray, begin: int, chunk: np.ndarray) -> None:
        if begin == 640 and begin not in begun_at:
            begun_at.append(begin)
            raise KeyboardInterrupt
        begun_at.append(begin)
        numbers[begin : begin + len(chunk)] = np.abs(chunk).sum(axis=1) * 10 + numbers[max(begin - 1, 0)]

    def run(resume: bool) -> np.ndarray:
        states = SavedStates(tmp_path / "progress.json", {"what": "a sum"})
        states.begin_or_resume(resume)
        return number_entries(KEYS, states, np.int64, sum_up, "Summing")

    with pytest.raises(KeyboardInterrupt):
        run(False)
    resumed = run(True)
    assert begun_at == [*range(0, 641, 64), *range(640, 1000, 64)]
    np.testing.assert_array_equal(resumed, run(False))


def test_what_was_filled_in_since_the_last_note_is_undone(tmp_path: Path, monkeypatch) -> None:
    """Whatever of the file reached the disk: a step may change the numbers of any entry."""
    monkeypatch.setattr(key_stream, "SEARCH_CHUNK", 64)
    stop_at: list[int] = []

    def take(numbers: np.ndarray, begin: int, chunk: np.ndarray) -> None:
        """Each entry takes one that nobody took yet."""
        for entry in range(begin, begin + len(chunk)):
            other = int(abs(chunk[entry - begin, 0]) * 1000) % len(numbers)
            if numbers[other] < 0:
                numbers[other] = entry
        if begin in stop_at:
            stop_at.clear()
            raise KeyboardInterrupt

    def undo(numbers: np.ndarray, entry: int) -> None:
        numbers[numbers >= entry] = -1

    def run(resume: bool) -> np.ndarray:
        states = SavedStates(tmp_path / "progress.json", {"what": "taking"}, others=["*.npy.part"])
        states.begin_or_resume(resume)
        numbers = np.array(number_entries(KEYS, states, np.int32, take, "Taking", undo=undo))
        states.remove()
        assert not list(tmp_path.iterdir())
        return numbers

    whole = run(False)
    assert 100 < (whole >= 0).sum() < len(KEYS)
    for seconds in (0, 1000):  # between notes
        monkeypatch.setattr(checkpoints, "CHECKPOINT_SECONDS", seconds)
        stop_at.append(640)
        with pytest.raises(KeyboardInterrupt):
            run(False)
        np.testing.assert_array_equal(run(True), whole)
