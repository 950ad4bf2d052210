"""Which datastores are meant, what they are called, and which of their documents count."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.stores import make_store

from knn_lm_eval.errors import UserError
from knn_lm_eval.store.choosing import DATASTORE_VARIABLE, choose_stores, list_stores, store_names
from knn_lm_eval.store.joined import JoinedStore


def test_several_stores_are_joined_by_a_plus_or_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list_stores("a/law+b/wiki") == list_stores(["a/law", Path("b/wiki")]) == ["a/law", "b/wiki"]
    assert list_stores("hf://datasets/u/a+https://x.org/b") == ["hf://datasets/u/a", "https://x.org/b"]
    (tmp_path / "c++").mkdir()
    assert list_stores(str(tmp_path / "c++")) == list_stores(tmp_path / "c++") == [str(tmp_path / "c++")]
    assert list_stores(["a+b"]) == ["a+b"]
    monkeypatch.setenv(DATASTORE_VARIABLE, "a+b")
    assert list_stores(None) == ["a", "b"]
    monkeypatch.delenv(DATASTORE_VARIABLE)
    with pytest.raises(UserError, match="needs a datastore"):
        list_stores(None)


def test_stores_are_called_by_as_much_of_their_paths_as_tells_them_apart() -> None:
    assert store_names(["/x/law", "/y/wiki/"]) == ["law", "wiki"]
    assert store_names(["/x/gpt2/law", "/x/llama/law"]) == ["gpt2/law", "llama/law"]
    assert store_names(["https://x.org/law", "/y/wiki"]) == ["law", "wiki"]
    with pytest.raises(UserError, match="names one datastore twice"):
        store_names(["/x/law", "/x/../x/law"])


def test_entries_are_numbered_through_and_documents_end_with_their_store(tmp_path: Path) -> None:
    first, second = make_store(tmp_path / "a", 50), make_store(tmp_path / "b", 30, seed=1)
    store = choose_stores([first.path, second.path]).store
    assert isinstance(store, JoinedStore)
    assert (len(store), store.kept, store.names) == (80, 80, ("a", "b"))
    assert store.document_starts.tolist() == [0, 50] and store.removed is None
    np.testing.assert_array_equal(store.values(), np.concatenate([first.values, second.values]))
    place = store.place(79)
    assert (place.name, place.entry, place.document) == ("b", 29, 0)
    other_way = choose_stores([second.path, first.path]).store
    assert store.keys_checksum == other_way.keys_checksum not in (first.keys_checksum, second.keys_checksum)


def test_a_store_that_is_left_out_is_not_read(tmp_path: Path) -> None:
    """Its keys may be damaged: they do not count."""
    first, second = make_store(tmp_path / "a", 50), make_store(tmp_path / "b", 30, seed=1)
    keys = second.path / "keys.npy"
    data = bytearray(keys.read_bytes())
    data[-1] ^= 1
    keys.write_bytes(data)
    chosen = choose_stores([first.path, second.path], "always", exclude=["b"])
    assert len(chosen.store) == 50 and chosen.numbers == (0,) and len(chosen.given) == 80
    with pytest.raises(UserError, match="keys"):
        choose_stores([first.path, second.path], "always")
