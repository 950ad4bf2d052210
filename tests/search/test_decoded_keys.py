"""Keys that an index's codes stand for, in text order: each is what faiss makes of the code of that entry."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knn_lm_eval.errors import UserError
from knn_lm_eval.search import decoded_keys
from knn_lm_eval.search.decoded_keys import DecodedKeys
from knn_lm_eval.search.faiss_index import join_parts, make_index
from knn_lm_eval.search.index_reading import read_index

DIMENSION = 16
KINDS = [
    "IVF4,Flat",
    "IVF4,SQ8",
    "IVF300,SQ4",
    "IVF4_HNSW8,SQfp16",
    "IVF4,PQ4x4",
    "IVF4,PQ2x6",
    "IVF4,RaBitQ",
    "IVF4,RaBitQfs",
    "IVF4,RaBitQfs2",
    "RR16,IVF4,SQ8",
    "RR16,IVF300,RaBitQfs",
    "OPQ4_8,IVF4,PQ4x4",
    "PCAR8,IVF4,RaBitQ",
]
# No key below is one of these: what is left of a centroid's own key is rounding alone, and so are its bits.
RNG = np.random.default_rng(1000)
SAMPLE = RNG.normal(size=(400, DIMENSION)).astype(np.float32)
TRAINED: dict[str, Any] = {}


def trained(kind: str) -> faiss.Index:
    """An empty index of its own, trained once."""
    if kind not in TRAINED:
        index = make_index(kind, DIMENSION, "l2")
        index.train(SAMPLE)
        TRAINED[kind] = faiss.serialize_index(index)
    return faiss.deserialize_index(TRAINED[kind])


@settings(deadline=None, max_examples=40)
@given(
    kind=st.sampled_from(KINDS),
    sizes=st.lists(st.integers(1, 150), min_size=1, max_size=3),
    seed=st.integers(0, 10),
    at_once=st.integers(1, 5000),
)
def test_keys_are_what_faiss_makes_of_the_codes(kind: str, sizes: list[int], seed: int, at_once: int) -> None:
    rng = np.random.default_rng(seed)
    keys = rng.normal(size=(sum(sizes), DIMENSION)).astype(np.float32)
    encoder = trained(kind)
    expected = encoder.sa_decode(encoder.sa_encode(keys))
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        parts: list[Any] = []
        for number, of_part in enumerate(np.split(keys, np.cumsum(sizes)[:-1])):
            part = trained(kind)
            part.add(of_part)
            faiss.write_index(part, f"{folder}/{number}.faiss")
            parts.append(read_index(Path(folder, f"{number}.faiss")))
        index = parts[0] if len(parts) == 1 else join_parts(parts, relative_ids=True)
        patch.setattr(decoded_keys, "LEAST_AT_ONCE", at_once)  # bytes: ranges of a few entries
        decoded = DecodedKeys(index)
        del index  # it is kept
        decoded.lay_out(Path(folder, "codes.npy.part"), memory=0)
        assert decoded.shape == keys.shape and len(decoded) == len(keys)
        some = np.sort(rng.choice(len(keys), len(keys) // 2, replace=False))
        for rows in (slice(None), slice(3, 20), some):
            assert same(decoded[rows], expected[rows])
        # faiss itself makes other keys of RaBitQ's codes where they lie in blocks than where they do not.
        if "RaBitQfs" not in kind and len(parts) == 1:
            in_memory = faiss.read_index(f"{folder}/0.faiss")
            assert same(decoded[:], in_memory.reconstruct_n(0, len(keys)))
        del parts, decoded


def same(keys: np.ndarray, expected: np.ndarray) -> bool:
    """But for the last bit, which in a rotation depends on how many are rotated together."""
    return keys.shape == expected.shape and np.allclose(keys, expected, atol=1e-5)


def test_rabitq_in_blocks_stands_for_the_same_keys() -> None:
    """Of either form the codes are the same, and so are the keys."""
    in_blocks, plain = trained("IVF4,RaBitQfs"), trained("IVF4,RaBitQ")
    for index in (in_blocks, plain):
        index.add(SAMPLE)
    with TemporaryDirectory() as folder:
        decoded = DecodedKeys(in_blocks)
        decoded.lay_out(Path(folder, "codes.npy.part"), memory=0)
        assert np.allclose(decoded[:], plain.reconstruct_n(0, len(SAMPLE)), atol=1e-5)
        del decoded


@pytest.mark.parametrize("kind", ["Flat", "HNSW8", "PQ4x4fs"])
def test_no_lists(kind: str) -> None:
    with pytest.raises(UserError, match="no inverted lists"):
        DecodedKeys(faiss.index_factory(DIMENSION, kind))


@pytest.mark.parametrize("kind", ["IVF4,PQ4x4fs", "OPQ4_8,IVF4,PQ4x4fsr"])
def test_fast_scans_of_product_quantizers(kind: str) -> None:
    with pytest.raises(UserError, match="cannot make keys of the codes of IndexIVFPQFastScan"):
        DecodedKeys(trained(kind))


def test_rabitq_for_inner_products() -> None:
    with pytest.raises(UserError, match="RaBitQ for inner products"):
        DecodedKeys(faiss.index_factory(DIMENSION, "IVF4,RaBitQ", faiss.METRIC_INNER_PRODUCT))
