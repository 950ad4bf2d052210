"""Every byte of a store is checked once before it counts, and not again before it changes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.stores import change_json, flip_bit, let_age, make_store

from knn_lm_eval.errors import UserError
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.manifest import file_record
from knn_lm_eval.store.verification import BEFORE, NOT_VERIFIED, NOW
from knn_lm_eval.system import file_contents
from knn_lm_eval.system.file_contents import contents_of, known, register
from knn_lm_eval.system.files import CACHE_VARIABLE


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = make_store(tmp_path / "store", count=200).path
    let_age(path)
    return path


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are read for their checksums."""
    read: list[str] = []
    original = file_contents.examine

    def counted(path: Path, *others: object) -> file_contents.Contents:
        read.append(path.name)
        return original(path, *others)

    for module in ("knn_lm_eval.store.verification", "knn_lm_eval.store.manifest", "knn_lm_eval.system.file_contents"):
        monkeypatch.setattr(f"{module}.examine", counted)
    return read


@pytest.mark.parametrize("name", ["keys.npy", "values.npy", "document_starts.npy"])
@pytest.mark.parametrize("place", [0.0, 0.3, 0.7, 0.999])
def test_one_flipped_bit_is_noticed(store: Path, name: str, place: float) -> None:
    Datastore.open(store)
    file = store / name
    for bit in range(8):
        at = int(place * file.stat().st_size) * 8 + bit
        flip_bit(file, at)
        with pytest.raises(UserError, match=name) as caught:
            Datastore.open(store)
        assert "\n" not in str(caught.value)
        flip_bit(file, at)
    Datastore.open(store)


def test_a_flipped_bit_of_the_manifest_changes_nothing_or_is_noticed(store: Path) -> None:
    Datastore.open(store).manifest.write(store)
    size, seen = (store / "manifest.json").stat().st_size, Datastore.open(store).manifest
    for bit in np.random.default_rng(0).integers(0, 8 * size, 300).tolist():
        flip_bit(store / "manifest.json", bit)
        try:
            assert Datastore.open(store).manifest.files == seen.files
        except UserError as error:
            assert str(store) in str(error) and "\n" not in str(error)
        flip_bit(store / "manifest.json", bit)


def test_a_second_opening_reads_nothing(store: Path, bytes_read: list[str]) -> None:
    first = Datastore.open(store)
    assert sorted(bytes_read) == ["document_starts.npy", "keys.npy", "values.npy"]
    assert set(first.verification.of_files(store).values()) == {NOW}
    bytes_read.clear()
    second = Datastore.open(store)
    assert bytes_read == [] and set(second.verification.of_files(store).values()) == {BEFORE}
    np.save(store / "values.npy", np.array(first.values))
    let_age(store)
    Datastore.open(store)
    assert bytes_read == ["values.npy"]
    Datastore.open(store, verify="always")
    assert sorted(bytes_read) == ["document_starts.npy", "keys.npy", "values.npy", "values.npy"]
    bytes_read.clear()
    never = Datastore.open(store, verify="never")
    assert bytes_read == [] and set(never.verification.of_files(store).values()) == {NOT_VERIFIED}
    with pytest.raises(UserError, match="verify='perhaps' is unknown; use auto, always or never"):
        Datastore.open(store, verify="perhaps")


def test_a_bit_that_changed_on_the_disk_alone_is_found_by_reading_all(store: Path) -> None:
    Datastore.open(store)
    then = (store / "keys.npy").stat()
    flip_bit(store / "keys.npy", 8000)
    os.utime(store / "keys.npy", ns=(then.st_atime_ns, then.st_mtime_ns))
    Datastore.open(store)
    with pytest.raises(UserError, match=r"keys.npy is damaged: its SHA-256"):
        Datastore.open(store, verify="always")
    with pytest.raises(UserError, match=r"keys.npy is damaged: its SHA-256"):  # and is not forgotten
        Datastore.open(store)


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("keys.npy", lambda keys: keys.__setitem__((150, 3), np.nan), "numbers that are NaN or infinite"),
        ("keys.npy", lambda keys: keys.__setitem__((150, 3), -np.inf), "numbers that are NaN or infinite"),
        ("values.npy", lambda values: values.__setitem__(7, -1), "numbers from -1 to 19"),
        ("values.npy", lambda values: values.__setitem__(7, 20), "at least 0 and below 20"),
        ("weights.npy", lambda weights: weights.__setitem__(7, 0), "at least 1"),
        ("weights.npy", lambda weights: weights.__setitem__(7, -1), "at least 1"),
        ("document_starts.npy", lambda starts: starts.__setitem__(1, -5), "at least 0 and below 200"),
        ("document_starts.npy", lambda starts: starts.__setitem__(1, 200), "at least 0 and below 200"),
        ("document_starts.npy", lambda starts: starts.__setitem__(1, 90), "are not ascending"),
    ],
)
def test_numbers_that_name_nothing_are_refused_whatever_their_checksum(
    store: Path, name: str, change: Callable[[np.ndarray], None], sentence: str
) -> None:
    np.save(store / "weights.npy", np.ones(200, dtype=np.int32))
    np.save(store / "document_starts.npy", np.array([0, 20, 80], dtype=np.int64))
    array = np.load(store / name)
    change(array)
    np.save(store / name, array)
    files = {path.name: file_record(path) for path in store.glob("*.npy")}
    change_json(store / "manifest.json", files=files, model={"pretrained": None, "args": {}, "vocabulary": 20})
    for _ in range(2):
        with pytest.raises(UserError, match=f"{name} is damaged: .*{sentence}"):
            Datastore.open(store)
        let_age(store)


def test_keys_without_a_header_are_verified(store: Path) -> None:
    keys = np.load(store / "keys.npy")
    keys[7, 7] = np.nan
    keys.tofile(store / "keys.raw")
    (store / "keys.npy").unlink()
    files = {name: file_record(store / name) for name in ("keys.raw", "values.npy", "document_starts.npy")}
    change_json(store / "manifest.json", files=files, keys={"file": "keys.raw", "dtype": "float16"})
    with pytest.raises(UserError, match=r"keys.raw is damaged: it has numbers that are NaN"):
        Datastore.open(store)


def test_a_header_that_reads_the_numbers_in_another_order_is_refused(store: Path) -> None:
    file = store / "keys.npy"
    file.write_bytes(file.read_bytes().replace(b"'fortran_order': False", b"'fortran_order': True "))
    with pytest.raises(UserError, match="keys.npy is not what the manifest says"):
        Datastore.open(store, verify="never")


def test_what_was_written_here_is_not_read_again(store: Path, bytes_read: list[str]) -> None:
    file_record(store / "keys.npy")
    bytes_read.clear()
    assert Datastore.open(store).verification.of_files(store)["keys.npy"] == BEFORE
    assert "keys.npy" not in bytes_read


def test_a_file_that_may_still_change_within_the_tick_is_not_noted(tmp_path: Path) -> None:
    file = tmp_path / "new"
    file.write_bytes(b"one")
    contents_of(file)
    assert known(file) is None
    let_age(tmp_path)
    contents_of(file)
    assert known(file) == contents_of(file)


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 100_000, '{"size": 3}', "\0"])
def test_a_damaged_register_is_as_none(store: Path, content: str) -> None:
    Datastore.open(store)
    assert (noted := list(register().glob("*.json")))
    for path in noted:
        path.write_text(content)
    assert set(Datastore.open(store).verification.of_files(store).values()) == {NOW}


def test_a_register_that_cannot_be_written_is_gone_without(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))
    for _ in range(2):
        assert set(Datastore.open(store).verification.of_files(store).values()) == {NOW}
    assert len([r for r in caplog.records if "cannot be noted" in r.message]) <= 3
