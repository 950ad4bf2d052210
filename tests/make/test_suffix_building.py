"""The suffix array of a store: right, in parts, within memory, without removed documents; gone with its text."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.stores import change_json, let_age
from helpers.texts import count, longest_end, make_text_store
from hypothesis import given, settings
from hypothesis import strategies as st

from knn_lm_eval import UserError
from knn_lm_eval.make import suffix_building
from knn_lm_eval.make.compacting import compact_datastore
from knn_lm_eval.make.removing import remove_documents
from knn_lm_eval.make.suffix_building import BASE_BYTES, BYTES_PER_SYMBOL, build_suffix_array, plan_parts
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.manifest import Manifest
from knn_lm_eval.store.suffixes import open_suffixes, suffixes_checksums
from knn_lm_eval.store.whole_store import verify_store

documents_of = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=2, max_size=6)
read = st.lists(st.integers(0, 3), min_size=1, max_size=30)
RNG = np.random.default_rng(3)
DOCUMENTS = [RNG.integers(0, 5, RNG.integers(1, 40)).tolist() for _ in range(30)]
TOKENS = [*DOCUMENTS[3], *DOCUMENTS[9][4:], 7, *DOCUMENTS[0]]


def memory_for(tokens: int) -> int:
    return BASE_BYTES + tokens * BYTES_PER_SYMBOL


def overlaps(documents: list[list[int]], tokens: list[int]) -> list[int]:
    return [longest_end(documents, tokens[: at + 1], False) for at in range(len(tokens))]


@settings(deadline=None, max_examples=40)
@given(documents=documents_of, tokens=st.lists(st.integers(0, 3), min_size=1), size=st.integers(12, 40), data=st.data())
def test_of_random_texts(
    documents: list[list[int]],
    tokens: list[int],
    size: int,
    data: st.DataObject,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    store = make_text_store(tmp_path_factory.mktemp("text") / "store", documents)
    ngrams = build_suffix_array(store, memory_for(size))
    assert len(ngrams) == len(store) and all(len(part.order) <= size for part in ngrams.parts)
    assert ngrams.overlap_lengths(tokens).tolist() == overlaps(documents, tokens)
    gone = data.draw(st.sets(st.integers(0, len(documents) - 1), min_size=1, max_size=len(documents) - 1))
    lessened = remove_documents(store.path, sorted(gone))
    ngrams = build_suffix_array(lessened, memory_for(size))
    kept = [document for number, document in enumerate(documents) if number not in gone]
    assert len(ngrams) == sum(map(len, kept))
    assert ngrams.overlap_lengths(tokens).tolist() == overlaps(kept, tokens)
    matches = ngrams.matches(tokens, 0, len(tokens) + 1)
    for stop, length in enumerate(matches.lengths.tolist()):
        assert not length or matches.counts[stop] == count(kept, tokens[stop - length : stop], True)


@pytest.fixture
def built(tmp_path: Path) -> Datastore:
    store = make_text_store(tmp_path / "store", DOCUMENTS)
    build_suffix_array(store)
    return Datastore.open(store.path)


def test_parts_do_not_matter(built: Datastore) -> None:
    whole = open_suffixes(built)
    parts = build_suffix_array(built, memory_for(60), overwrite=True)
    assert len(whole.parts) == 1 and len(parts.parts) > 5
    assert whole.overlap_lengths(TOKENS).tolist() == parts.overlap_lengths(TOKENS).tolist()
    matches = [ngrams.matches(TOKENS, 0, len(TOKENS)) for ngrams in (whole, parts)]
    assert np.array_equal(matches[0].counts, matches[1].counts)
    assert len(list((built.path / "suffixes").glob("*.npy"))) == 2 * len(parts.parts)


def test_pieces_do_not_matter(built: Datastore, monkeypatch: pytest.MonkeyPatch) -> None:
    before = suffixes_checksums(built)
    monkeypatch.setattr(suffix_building, "AT_ONCE", 7)
    build_suffix_array(built, overwrite=True)
    after = suffixes_checksums(Datastore.open(built.path))
    assert {name: of for name, of in before.items() if name.endswith(".npy")}.items() <= after.items()


def test_too_little_memory(built: Datastore) -> None:
    longest = max(map(len, DOCUMENTS))
    with pytest.raises(UserError, match=f"has {longest} tokens, and sorting them takes .*; give --memory"):
        plan_parts(built, memory_for(longest - 1))
    assert max(np.diff([0, *plan_parts(built, memory_for(longest))])) == longest
    with pytest.raises(UserError, match="exists already; give --overwrite"):
        build_suffix_array(built)


def test_goes_on(built: Datastore, monkeypatch: pytest.MonkeyPatch) -> None:
    build_suffix_array(built, memory_for(60), overwrite=True)
    expected = suffixes_checksums(Datastore.open(built.path))
    shutil.rmtree(built.path / "suffixes")
    sorted_parts: list[int] = []
    sort = suffix_building.sort_suffixes

    def interrupted(symbols: np.ndarray, *rest: object) -> np.ndarray:
        sorted_parts.append(len(symbols))
        if len(sorted_parts) == 3:
            raise KeyboardInterrupt
        return sort(symbols, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(suffix_building, "sort_suffixes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_suffix_array(built, memory_for(60))
    with pytest.raises(UserError, match="not finished; go on with build_suffix_array --resume"):
        open_suffixes(Datastore.open(built.path))
    parts = build_suffix_array(built, resume=True).parts  # in the parts with which it was begun
    assert len(sorted_parts) == len(parts) + 1
    found = suffixes_checksums(Datastore.open(built.path))
    assert {name: of for name, of in expected.items() if name.endswith(".npy")}.items() <= found.items()
    assert all(verdict.fault is None for verdict in verify_store(built.path))


def test_damaged_progress(built: Datastore) -> None:
    progress = built.path / "suffixes" / "progress.json"
    progress.write_text('{"settings": {}, "ends": [1]}')
    change_json(progress, settings={"text": {n: r["sha256"] for n, r in built.manifest.files.items() if n[0] != "k"}})
    with pytest.raises(UserError, match="its parts are none of this store"):
        build_suffix_array(built, resume=True)


def test_changes_of_the_store(built: Datastore) -> None:
    """Neither after removing nor after compacting is there one; built again, it has the documents that are left."""
    kept = [*DOCUMENTS[:3], *DOCUMENTS[4:]]
    removed = remove_documents(built.path, [3])
    for change in (lambda: removed, lambda: compact_datastore(built.path)):
        store = change()
        assert not [name for name in Manifest.read(store.path).derived if name.startswith("suffixes")]
        with pytest.raises(UserError, match="has no suffix array, .*; build one with build_suffix_array"):
            open_suffixes(store)
        ngrams = build_suffix_array(store)
        assert ngrams.overlap_lengths(TOKENS).tolist() == overlaps(kept, TOKENS)


def test_another_text(built: Datastore, tmp_path: Path) -> None:
    other = make_text_store(tmp_path / "other", [*DOCUMENTS[1:], DOCUMENTS[0]])
    shutil.copytree(built.path / "suffixes", other.path / "suffixes")
    with pytest.raises(UserError, match="is of another text than .* has now; build it again"):
        open_suffixes(other)


@pytest.mark.parametrize("name", ["order.000.npy", "heads.000.npy"])
def test_numbers_beyond_the_text(built: Datastore, name: str) -> None:
    path = built.path / "suffixes" / name
    array = np.load(path)
    array[-1] = len(built) + 1
    path.unlink()
    np.save(path, array)
    let_age(built.path)
    with pytest.raises(UserError, match="is damaged"):
        open_suffixes(Datastore.open(built.path))
    path.unlink()
    with pytest.raises(UserError, match="incomplete"):
        open_suffixes(Datastore.open(built.path))


def test_no_text_order(built: Datastore) -> None:
    change_json(built.path / "manifest.json", text_order=False)
    with pytest.raises(UserError, match="in no text order"):
        build_suffix_array(Datastore.open(built.path))
