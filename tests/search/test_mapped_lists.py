"""Fast-scan indexes are searched in their files: the same results, and nothing that grows with the store in memory."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import pytest

from knn_lm_eval.errors import UserError
from knn_lm_eval.search.faiss_index import bytes_held, inverted_file, make_index, read_index, set_probe
from knn_lm_eval.search.mapped_lists import read_with_mapped_lists

DIMENSION, COUNT = 16, 3000


@pytest.fixture
def vectors() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((COUNT, DIMENSION)).astype(np.float32)


def write_index(folder: Path, factory: str, vectors: np.ndarray) -> Path:
    index = make_index(factory, DIMENSION, "l2")
    index.train(vectors)
    index.add(vectors)
    faiss.write_index(index, str(folder / "index.faiss"))
    return folder / "index.faiss"


@pytest.mark.parametrize(
    "factory", ["IVF16,RaBitQfs", "IVF16,PQ8x4fs", "PCA8,IVF16,RaBitQfs", "IVF16_HNSW8,RaBitQfs", "IVF2000,RaBitQfs"]
)
def test_mapped_lists_give_what_lists_in_memory_give(tmp_path: Path, vectors: np.ndarray, factory: str) -> None:
    path = write_index(tmp_path, factory, vectors)
    mapped, read = read_with_mapped_lists(path), faiss.read_index(str(path))
    assert mapped is not None
    assert isinstance(faiss.downcast_InvertedLists(inverted_file(mapped).invlists), faiss.OnDiskInvertedLists)
    for probe in (1, 8, 2000):
        set_probe(mapped, probe)
        set_probe(read, probe)
        for mine, theirs in zip(mapped.search(vectors[:50], 200), read.search(vectors[:50], 200), strict=True):
            np.testing.assert_array_equal(mine, theirs)
    for number in range(read.nlist if factory.startswith("IVF") else 0):
        size = read.get_list_size(number)
        ids = [faiss.rev_swig_ptr(i.invlists.get_ids(number), size) for i in (mapped, read) if size]
        assert not size or (ids[0] == ids[1]).all()


@pytest.mark.parametrize("factory", ["Flat", "IVF16,RaBitQ", "PCA8,IVF16,SQ8", "IVF16,PQ8x4fs,RFlat", "HNSW8"])
def test_what_has_no_lists_in_blocks_is_left_to_faiss(tmp_path: Path, vectors: np.ndarray, factory: str) -> None:
    assert read_with_mapped_lists(path := write_index(tmp_path, factory, vectors)) is None
    for mine, theirs in zip(
        read_index(path).search(vectors[:50], 20), faiss.read_index(str(path)).search(vectors[:50], 20), strict=True
    ):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("left", [3, 1000, 20_000, -1])
def test_a_cut_file_is_damaged(tmp_path: Path, vectors: np.ndarray, left: int) -> None:
    path = write_index(tmp_path, "IVF16,RaBitQfs", vectors)
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(UserError, match="is damaged: faiss cannot read it"):
        read_index(path)


def test_what_cannot_be_mapped_is_told(tmp_path: Path, vectors: np.ndarray) -> None:
    few = 300

    def held(factory: str) -> int:
        return bytes_held(read_index(write_index(tmp_path, factory, vectors[:few])))

    mapped = ["Flat", "IVF16,SQ8", "IVF16,RaBitQfs", "PCA8,IVF16,RaBitQfs", "HNSW8"]
    assert [held(factory) for factory in mapped] == [0] * len(mapped)
    assert held("IVF16,PQ8np") == 16 * 8 * 256 * 4  # lists, code bytes, codewords, float32
    assert held("IVF16,PQ8x4fs,RFlat") == few * (4 + 8)
    assert few * 4 <= held("PQ8x4fs") <= few * 4 + 256
