"""Text files are read alike by what makes stores and by the tasks, whatever their line ends."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest

from knn_lm_eval.errors import UserError
from knn_lm_eval.lm.loading import CausalHFLM
from knn_lm_eval.make.dump import dump_datastore
from knn_lm_eval.make.text import DOCUMENT_MODES, TextSource
from knn_lm_eval.tasks import corpora

TEXT = " = One = \n \n A line of it . \n Another one . \n\n = Two = \nThe end, which has no line end"


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """The text with Unix line ends, and as Windows writes it, with a byte order mark too."""
    unix, windows = tmp_path / "unix" / "wiki.test.raw", tmp_path / "windows" / "wiki.test.raw"
    for file, content in ((unix, TEXT.encode()), (windows, b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode())):
        file.parent.mkdir()
        file.write_bytes(content)
    return unix, windows


@pytest.mark.parametrize("documents", DOCUMENT_MODES)
def test_a_store_of_a_file_with_windows_line_ends_is_that_of_the_same_file_with_unix_ones(
    documents: str, files: tuple[Path, Path], lm: CausalHFLM, tmp_path: Path
) -> None:
    unix, windows = (
        dump_datastore(lm, TextSource(text=file, documents=documents).pieces(), tmp_path / f"store {file.parent.name}")
        for file in files
    )
    np.testing.assert_array_equal(unix.values, windows.values)
    np.testing.assert_array_equal(unix.document_starts, windows.document_starts)


def test_a_task_scores_the_text_that_a_store_has(files: tuple[Path, Path]) -> None:
    for file in files:
        stored = "".join(text for _, text in TextSource(text=file, documents="file").pieces())
        scored = corpora.wikitext103("", "", "test", data_dir=str(file.parent))["test"]["text"]
        assert stored == scored[0] == TEXT


def test_a_carriage_return_inside_of_a_line_stays(tmp_path: Path) -> None:
    file = tmp_path / "test.en"
    file.write_bytes(b"one\rstill one\r\ntwo")
    pieces = [text for _, text in TextSource(text=file).pieces()]
    assert pieces == list(corpora.law("test", data_dir=str(tmp_path))["test"]["text"]) == ["one\rstill one", "two"]


def test_pythons_own_documentation_is_a_data_set() -> None:
    """Its topics by name, of which every eighth is scored by the task python_docs and no other is."""
    train, test = (
        [text for _, text in TextSource(dataset="python_docs", split=split).pieces()] for split in ("train", "test")
    )
    texts = [topics[name].rstrip("\n") for name in sorted(topics)]
    assert test == texts[::8] and sorted(train + test) == sorted(texts)
    with pytest.raises(UserError, match="python_docs has the splits train and test, not 'dev'"):
        list(TextSource(dataset="python_docs", split="dev").pieces())
