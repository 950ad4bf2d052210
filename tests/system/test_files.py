"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import io
import os
from pathlib import Path

import numpy as np
import pytest

from knn_lm_eval.errors import UserError
from knn_lm_eval.system import locks
from knn_lm_eval.system.files import (
    check_free_space,
    check_new_folder,
    check_writable,
    disk_errors_in,
    finished_folder,
    held_output,
    read_json,
    sha256,
    unfinished_folder,
    write_json,
    write_npy_header,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_json_comes_back_and_leaves_nothing_else(tmp_path: Path) -> None:
    content = {"name": "Größe", "values": [1, 2.5, None]}
    write_json(tmp_path / "a.json", content)
    assert read_json(tmp_path / "a.json") == content
    assert "Größe" in (tmp_path / "a.json").read_text(encoding="utf-8")
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("damaged", [b"{", b"[1]", b"\xff\xfe{}"])
def test_a_damaged_json_file_is_told(tmp_path: Path, damaged: bytes) -> None:
    (tmp_path / "a.json").write_bytes(damaged)
    with pytest.raises(UserError, match="a.json is damaged"):
        read_json(tmp_path / "a.json")


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "a.txt", "old")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old"


def test_a_folder_appears_when_it_is_finished(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "store"
    with finished_folder(output) as folder:
        (folder / "file").write_text("x")
        assert not output.exists() and folder.parent == output.parent
    assert names(output.parent) == ["store"] and names(output) == ["file"]


def test_a_folder_that_failed_is_gone(tmp_path: Path) -> None:
    (tmp_path / ".store.lock").touch()
    (tmp_path / ".store.unfinished").mkdir()
    (tmp_path / ".store.unfinished" / "of a killed run").write_text("x")
    with pytest.raises(KeyboardInterrupt), finished_folder(tmp_path / "store") as folder:
        assert names(folder) == []
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_a_new_folder_is_where_nothing_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert check_new_folder(".") == tmp_path  # empty
    assert check_new_folder("new") == tmp_path / "new"
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("nowhere")
    for taken in (".", "file", "link"):
        with pytest.raises(UserError, match="exists already"):
            check_new_folder(taken)


def test_what_the_disk_refuses_is_told(tmp_path: Path) -> None:
    refused = os.strerror(errno.ENOSPC)
    with pytest.raises(UserError, match=f"Cannot write to {tmp_path}: {refused}"), disk_errors_in(tmp_path):
        raise OSError(errno.ENOSPC, refused)
    with pytest.raises(ConnectionResetError), disk_errors_in(tmp_path):
        raise ConnectionResetError(errno.ECONNRESET, "not the disk's")
    check_free_space(tmp_path, 1, "a byte")
    with pytest.raises(UserError, match="a library take .* GiB and .* are free"):
        check_free_space(tmp_path, 2**60, "a library")


def test_checksums_and_headers_are_the_usual_ones(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.float16).reshape(3, 2)
    file = io.BytesIO()
    write_npy_header(file, np.float16, array.shape)
    (tmp_path / "a.npy").write_bytes(file.getvalue() + array.tobytes())
    assert np.load(tmp_path / "a.npy").tolist() == array.tolist()
    longer = io.BytesIO()
    write_npy_header(longer, np.float16, (3_000_000_000, 2))
    assert len(longer.getvalue()) == len(file.getvalue())
    assert sha256(tmp_path / "a.npy") == hashlib.sha256((tmp_path / "a.npy").read_bytes()).hexdigest()


def test_an_output_is_tried_before_the_work(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "params.json")
    assert not list((tmp_path / "new").iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="Cannot write to .*file"):
        check_writable(tmp_path / "file" / "params.json")


def test_an_output_is_tried_before_the_work_and_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "WAIT_SECONDS", 0.1)
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(UserError, match="folder.json is a folder"), held_output(tmp_path / "folder.json"):
        pass
    for output, is_folder in ((tmp_path / "a" / "b.json", False), (tmp_path / "c", True)):
        with (
            held_output(output, is_folder),
            pytest.raises(UserError, match=f"is at work on {output}"),
            held_output(output, is_folder),
        ):
            pass
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_hidden_folder_that_no_killed_run_left_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / ".new.unfinished").mkdir()
    (tmp_path / ".new.unfinished" / "mine").touch()
    with pytest.raises(UserError, match=r"\.new\.unfinished is in the way"), finished_folder(tmp_path / "new"):
        pass
    assert (tmp_path / ".new.unfinished" / "mine").exists()
    (tmp_path / ".new.lock").touch()  # as a run that is killed leaves it
    with finished_folder(tmp_path / "new") as folder:
        (folder / "whole").touch()
    assert names(tmp_path) == ["new"] and names(tmp_path / "new") == ["whole"]


def test_what_a_killed_run_was_replacing_comes_back(tmp_path: Path) -> None:
    (tmp_path / ".new.replaced").mkdir()
    (tmp_path / ".new.replaced" / "old").touch()
    with pytest.raises(KeyboardInterrupt), unfinished_folder(tmp_path / "new", is_left=True):
        assert names(tmp_path / "new") == ["old"]
        raise KeyboardInterrupt
    assert names(tmp_path) == ["new"]
