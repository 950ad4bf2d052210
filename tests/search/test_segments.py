"""Segments joined list by list: byte for byte what faiss writes for one index that was given all vectors in order."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from knn_lm_eval.errors import UserError
from knn_lm_eval.search import segments
from knn_lm_eval.search.faiss_index import below_transform, make_index, transformed
from knn_lm_eval.search.segments import can_be_joined, join_segments

COUNT, DIMENSION = 1200, 20
FACTORIES = [
    "IVF16,Flat",
    "IVF16,SQ8",
    "IVF16,SQfp16",
    "IVF16,PQ4x4",
    "IVF16,RaBitQ",
    "IVF16,RaBitQ3",
    "IVF16,EDEN4",
    "IVF16,RQ2x4",
    "IVF16,RaBitQfs",
    "IVF16,RaBitQfs2",
    "IVF16,RaBitQfs4",
    "IVF16,PQ10x4fs",
    "IVF16,PQ5x4fs",
    "RR20,IVF16,RaBitQfs",
    "RR20,IVF16,RaBitQfs2",
    "PCAR13,IVF16,RaBitQfs",
    "OPQ5,IVF16,PQ5x4fs",
    "IVF16_HNSW8,Flat",
    "RR20,IVF16_HNSW8,RaBitQfs",
    "IVF300,RaBitQfs",  # most lists are empty
    "IVF300,SQ8",
]
CASES = [(factory, sim_func) for factory in FACTORIES for sim_func in ("l2", "dot")]


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    rng = np.random.default_rng(0)
    # Some lists are much longer than others.
    return (rng.standard_normal((COUNT, DIMENSION)) * rng.choice([0.2, 1, 3], (COUNT, 1))).astype(np.float32)


@pytest.fixture(scope="module")
def trained(vectors: np.ndarray):
    """The bytes of each trained and empty index."""
    made: dict[tuple[str, str], np.ndarray] = {}

    def train(factory: str, sim_func: str) -> faiss.Index:
        if (factory, sim_func) not in made:
            index = make_index(factory, DIMENSION, sim_func)
            index.train(vectors)
            made[factory, sim_func] = faiss.serialize_index(index)
        return faiss.deserialize_index(made[factory, sim_func])

    return train


def add(index: faiss.Index, there: np.ndarray) -> None:
    """Add what the transforms make of vectors; it may depend on what stands beside a vector, in its last bit."""
    below = below_transform(index)
    below.add(np.ascontiguousarray(there))
    index.ntotal = below.ntotal


def write(index: faiss.Index, path: Path) -> Path:
    faiss.write_index(index, str(path))
    return path


@pytest.mark.parametrize(("factory", "sim_func"), CASES)
def test_joined_segments_are_the_index_in_one_piece(
    tmp_path: Path, vectors: np.ndarray, trained, factory: str, sim_func: str
) -> None:
    whole = trained(factory, sim_func)
    assert can_be_joined(whole)
    there, files = transformed(whole, vectors), []
    for start, stop in ((0, 500), (500, 501), (501, 501), (501, 533), (533, COUNT)):
        segment = trained(factory, sim_func)
        if stop > start:
            add(segment, there[start:stop])
            add(whole, there[start:stop])
        files.append(write(segment, tmp_path / f"{start}-{stop}"))
    expected = write(whole, tmp_path / "whole").read_bytes()
    assert join_segments(files, tmp_path / "joined") == COUNT
    assert (tmp_path / "joined").read_bytes() == expected
    assert not list(tmp_path.glob("*.tmp"))
    index = faiss.read_index(str(tmp_path / "joined"))
    found, wanted = index.search(vectors[:5], 10), whole.search(vectors[:5], 10)
    np.testing.assert_array_equal(found[1], wanted[1])


@pytest.mark.parametrize(
    "factory", ["IVF16,SQ8", "RR20,IVF16,RaBitQfs2", "IVF16,PQ5x4fs", "IVF300,SQ8", "IVF300,RaBitQfs"]
)
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_entries_may_be_left_out(tmp_path: Path, vectors: np.ndarray, trained, factory: str, data) -> None:
    """As if the others had never been added; with segments and lists at a time of any size."""
    ends = sorted(data.draw(st.sets(st.integers(0, COUNT), max_size=5)) | {COUNT})
    share = data.draw(st.sampled_from([0.0, 0.01, 0.5, 0.97, 1.0]))
    kept = np.random.default_rng(data.draw(st.integers(0, 1000))).random(COUNT) < share
    whole, files = trained(factory, "l2"), []
    there = transformed(whole, vectors)
    for start, stop in zip([0, *ends], ends, strict=False):
        segment = trained(factory, "l2")
        if stop > start:
            add(segment, there[start:stop])
        if kept[start:stop].any():
            add(whole, there[start:stop][kept[start:stop]])
        files.append(write(segment, tmp_path / f"{start}-{stop}"))
    expected = write(whole, tmp_path / "whole").read_bytes()
    np.save(tmp_path / "kept.npy", kept)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments, "LIST_BYTES", data.draw(st.sampled_from([1, 1000, 2**25])))
        patch.setattr(segments, "KEPT_AT_ONCE", 512)
        assert join_segments(files, tmp_path / "joined", np.load(tmp_path / "kept.npy", mmap_mode="r")) == kept.sum()
    assert (tmp_path / "joined").read_bytes() == expected


@pytest.mark.parametrize(
    "factory",
    [
        "Flat",
        "HNSW8",
        "PQ4x4",
        "PQ4x4fs",
        "IVF16,PQ4x4,RFlat",
        "IVF16(IVF4,Flat),Flat",
        "IDMap,IVF16,SQ8",
        "IVF16,PQ4+4",
    ],
)
def test_what_does_not_end_with_lists_is_not_joined(tmp_path: Path, trained, factory: str) -> None:
    index = trained(factory, "l2")
    assert not can_be_joined(index)
    path = write(index, tmp_path / "index")
    with pytest.raises(UserError, match="it is no index that ends with its inverted lists, or it is damaged"):
        join_segments([path], tmp_path / "joined")
    assert not (tmp_path / "joined").exists()


@pytest.fixture
def two_segments(tmp_path: Path, vectors: np.ndarray, trained) -> list[Path]:
    files = []
    for start, stop in ((0, 500), (500, COUNT)):
        segment = trained("IVF16,RaBitQfs", "l2")
        segment.add(vectors[start:stop])
        files.append(write(segment, tmp_path / f"{start}"))
    return files


def test_segments_of_another_training_are_refused(tmp_path: Path, vectors: np.ndarray, two_segments) -> None:
    other = make_index("IVF16,RaBitQfs", DIMENSION, "l2")
    other.train(vectors[:700])
    other.add(vectors[500:])
    two_segments[1] = write(other, tmp_path / "other")
    with pytest.raises(UserError, match="other cannot be joined with .*: they were not trained the same"):
        join_segments(two_segments, tmp_path / "joined")
    with pytest.raises(UserError, match="have 1,200 entries, and 7 are kept"):
        join_segments([two_segments[0], two_segments[0].with_name("500")], tmp_path / "joined", np.ones(7, dtype=bool))


@pytest.mark.parametrize("factory", ["IVF16,RaBitQfs", "IVF16,SQ8"])
def test_damaged_segments_are_refused(tmp_path: Path, vectors: np.ndarray, trained, factory: str) -> None:
    """Whatever byte is wrong: a sentence, or a file of the right size; nothing half-written."""
    segment = trained(factory, "l2")
    segment.add(vectors)
    whole, refused = write(segment, tmp_path / "whole").read_bytes(), 0
    rng = np.random.default_rng(0)
    for number in range(150):
        data = bytearray(whole)
        if number < 30:
            data = data[: rng.integers(0, len(data))]
        else:
            at = rng.integers(0, len(data))
            data[at] ^= 1 << rng.integers(0, 8)
        (tmp_path / "damaged").write_bytes(data)
        (tmp_path / "joined").unlink(missing_ok=True)
        try:
            join_segments([tmp_path / "damaged"], tmp_path / "joined", np.ones(COUNT, dtype=bool))
        except UserError:
            refused += 1
            assert not (tmp_path / "joined").exists()
        else:
            assert number >= 30 and (tmp_path / "joined").stat().st_size == len(whole)
    assert refused >= 30
