"""Codes in text order, taken from the index's lists, against what follows from the keys in float64."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import pytest

from knn_lm_eval.search import code_layout
from knn_lm_eval.search.code_layout import ARRAYS, write_in_text_order
from knn_lm_eval.search.code_tables import CodeTables
from knn_lm_eval.search.faiss_index import below_transform, make_index, split_parts, transformed

COUNT, DIMENSION = 3000, 24


def keys_of(count: int = COUNT) -> np.ndarray:
    rng = np.random.default_rng(4)
    centres = 3 * rng.standard_normal((20, DIMENSION))
    return (centres[rng.integers(0, 20, count)] + rng.standard_normal((count, DIMENSION))).astype(np.float32)


def built(factory: str, ids: np.ndarray | None = None) -> faiss.Index:
    keys = keys_of()
    index = make_index(factory, DIMENSION, "l2")
    index.train(keys)
    if ids is None:
        index.add(keys)
    else:
        index.add_with_ids(keys[ids], ids)
    return index


def laid_out(folder: Path, index: faiss.Index, count: int = COUNT) -> dict[str, np.ndarray]:
    folder.mkdir()
    parts = split_parts(index)
    tables = CodeTables.of(parts[0][0])
    assert tables is not None
    write_in_text_order(folder, count, parts, tables)
    return {name: np.load(folder / f"{name}.npy") for name in ARRAYS}


def expected_of_signs(index: faiss.Index, part: faiss.Index, keys: np.ndarray) -> dict[str, np.ndarray]:
    """By the papers' formulas, from the keys."""
    ivf = below_transform(part)
    centroids = np.asarray(ivf.quantizer.reconstruct_n(0, ivf.nlist))
    there = transformed(part, keys)
    lists = np.asarray(ivf.quantizer.search(there, 1)[1][:, 0])
    of_entry = centroids[lists].astype(np.float64)
    residuals = (there - centroids[lists]).astype(np.float64)
    signs = np.where(residuals > 0, 1.0, -1.0)
    squared = (residuals**2).sum(1)
    multiplier = squared / np.abs(residuals).sum(1)
    return {
        "lists": lists,
        "codes": np.packbits(residuals > 0, axis=1, bitorder="little"),
        "scales": -2 * multiplier,
        "offsets": squared + 2 * multiplier * (signs * of_entry).sum(1),
    }


def assert_as_expected(arrays: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert np.array_equal(arrays["lists"], expected["lists"])
    assert np.array_equal(arrays["codes"], expected["codes"])
    np.testing.assert_allclose(arrays["scales"], expected["scales"], rtol=1e-5)
    np.testing.assert_allclose(arrays["offsets"], expected["offsets"], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("range_bytes", [2**29, 20_000, 500])
@pytest.mark.parametrize(
    "factory", ["IVF16,RaBitQ", "IVF16,RaBitQfs", "RR24,IVF16,RaBitQfs", "PCAR16,IVF8,RaBitQfs", "IVF1,RaBitQfs"]
)
def test_signs_are_those_of_the_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factory: str, range_bytes: int
) -> None:
    monkeypatch.setattr(code_layout, "RANGE_BYTES", range_bytes)
    index = built(factory)
    assert_as_expected(laid_out(tmp_path / "codes", index), expected_of_signs(index, index, keys_of()))


@pytest.mark.parametrize("factory", ["IVF16,RaBitQ", "RR24,IVF16,RaBitQfs"])
def test_entries_may_lie_in_their_lists_in_any_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factory: str
) -> None:
    monkeypatch.setattr(code_layout, "RANGE_BYTES", 5000)
    index = built(factory, np.random.default_rng(5).permutation(COUNT))
    assert_as_expected(laid_out(tmp_path / "codes", index), expected_of_signs(index, index, keys_of()))


@pytest.mark.parametrize("factory", ["IVF16,RaBitQfs", "IVF16,PQ6"])
@pytest.mark.parametrize("successive", [True, False])
def test_parts_are_laid_out_as_one_index_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factory: str, successive: bool
) -> None:
    monkeypatch.setattr(code_layout, "RANGE_BYTES", 7001)
    whole, keys = built(factory), keys_of()
    shards = faiss.IndexShards(DIMENSION, False, successive)
    held = []
    for start, stop in ((0, 1100), (1100, 1101), (1101, COUNT)):
        part = faiss.clone_index(whole)
        part.reset()
        part.add_with_ids(keys[start:stop], np.arange(start, stop) - (start if successive else 0))
        held.append(part)
        shards.add_shard(part)
    in_parts, as_one = laid_out(tmp_path / "parts", shards), laid_out(tmp_path / "one", whole)
    for name, array in as_one.items():
        assert np.array_equal(in_parts[name], array), name


@pytest.mark.parametrize("range_bytes", [2**29, 999])
def test_the_codes_of_a_product_quantizer_decode_to_what_the_index_decodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, range_bytes: int
) -> None:
    monkeypatch.setattr(code_layout, "RANGE_BYTES", range_bytes)
    index = built("IVF16,PQ6")
    arrays = laid_out(tmp_path / "codes", index)
    index.make_direct_map()
    decoded = index.reconstruct_n(0, COUNT).astype(np.float64)
    np.testing.assert_allclose(arrays["offsets"], (decoded**2).sum(1), rtol=1e-5)
    assert np.array_equal(arrays["lists"], index.quantizer.search(keys_of(), 1)[1][:, 0])
    assert (arrays["scales"] == -2).all()


def test_an_entry_that_is_its_centroid_has_its_distance(tmp_path: Path) -> None:
    """RaBitQ's factors divide by the length of x - c."""
    keys = np.repeat(np.eye(8, DIMENSION, dtype=np.float32), 10, axis=0)
    index = faiss.index_factory(DIMENSION, "IVF8,RaBitQfs")
    index.train(keys)
    index.quantizer.reset()
    index.quantizer.add(keys[::10])
    index.add(keys)
    arrays = laid_out(tmp_path / "codes", index, len(keys))
    assert np.isfinite(arrays["offsets"]).all() and np.abs(arrays["scales"]).max() < 1e-3
