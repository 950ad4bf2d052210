"""Reading text for a datastore: files or `datasets` data sets, cut into documents.

A document is handed on in pieces, so that a file of any size is one document without being in memory at once.
Each piece is a pair ``(begins_document, text)``; pieces are cut after a line's end.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from knn_lm_eval.errors import UserError

Piece = tuple[bool, str]
DOCUMENT_MODES = ("line", "blank-line", "file", "wikitext", "wikitext-stream")
PYTHON_DOCS = "python_docs"  # a data set that every Python brings
# Long enough that a token more or less where two pieces meet does not count, short enough for any memory.
PIECE_CHARACTERS = 2**20
# " = Title = " begins an article; " = = Section = = " does not.
ARTICLE_HEADING = re.compile(r"= (?!=).*(?<!=) =")
DATASET_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}


@dataclass(frozen=True)
class TextSource:
    """Where a datastore's text comes from: the file ``text``, or else a data set.

    Attributes
    ----------
    text : a UTF-8 text file; None for a data set.
    dataset, config, split, text_column, streaming : see ``read_dataset``.
    documents : see ``cut_into_documents``.
    """

    text: Path | None = None
    dataset: str = ""
    config: str | None = None
    split: str = "train"
    text_column: str = "text"
    streaming: bool = False
    documents: str = "line"

    def pieces(self) -> Iterator[Piece]:
        """Read the text, cut into documents."""
        if self.text is not None:
            lines = read_text_file(self.text)
        else:
            lines = read_dataset(
                self.dataset, self.config, self.split, self.text_column, self.streaming, self.documents
            )
        return cut_into_documents(lines, self.documents)

    def absolute(self) -> TextSource:
        """The same for a process in another working directory."""
        if self.text is not None:
            return replace(self, text=self.text.resolve())
        return replace(self, dataset=str(Path(self.dataset).resolve())) if Path(self.dataset).exists() else self

    def description(self) -> dict[str, Any]:
        """What a manifest says of it."""
        if self.text is not None:
            return {"text": str(self.text.resolve()), "documents": self.documents}
        return {name: value for name, value in asdict(self).items() if name not in ("text", "streaming")}


def cut_into_documents(lines: Iterable[str], mode: str) -> Iterator[Piece]:
    """Cut lines (each with its line end) into documents.

    Parameters
    ----------
    lines : the text's lines in order.
    mode : ``line`` (each line that is not blank), ``blank-line`` (separated by blank lines), ``file`` (all
        lines are one document), ``wikitext`` (articles, which begin at a heading `` = Title = ``),
        ``wikitext-stream`` (the same text as one document).
    """
    if mode == "line":
        for line in lines:
            if line.strip():
                yield True, line.rstrip("\r\n")
        return
    begins, size = True, 0
    block: list[str] = []
    for line in lines:
        is_blank = mode == "blank-line" and not line.strip()
        if is_blank or (mode == "wikitext" and ARTICLE_HEADING.fullmatch(line.strip())):
            if any(map(str.strip, block)):
                yield begins, "".join(block)
            begins, block, size = True, [], 0
        if is_blank:
            continue
        block.append(line)
        size += len(line)
        if size >= PIECE_CHARACTERS:
            yield begins, "".join(block)
            begins, block, size = False, [], 0
    if block:
        yield begins, "".join(block)


def read_text_file(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 text file, with Unix line ends and without a byte order mark, as the tasks read theirs."""
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            for line in file:
                yield line[:-2] + "\n" if line.endswith("\r\n") else line
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}).") from error
    except OSError as error:
        raise UserError(f"Cannot read the text {path}: {error.strerror}.") from error


def read_dataset(
    path: str,
    config: str | None = None,
    split: str = "train",
    text_column: str = "text",
    streaming: bool = False,
    mode: str = "line",
) -> Iterator[str]:
    """The rows of a `datasets` data set as lines; a row's inner line ends stay inside it.

    Parameters
    ----------
    path : a hub id, a local folder, a local .json, .jsonl, .parquet, .csv or .txt file, or ``python_docs``, whose
        splits are those of ``python_docs_split``.
    mode : as for ``cut_into_documents``; in ``wikitext`` and ``wikitext-stream`` an empty row stands for the raw text's
        blank line.
    """
    if path == PYTHON_DOCS:
        if split not in ("train", "test"):
            raise UserError(f"{PYTHON_DOCS} has the splits train and test, not {split!r}.")
        yield from python_docs_split(split)
        return
    import datasets

    arguments: dict[str, Any] = {"path": path, "name": config}
    if Path(path).is_file():
        if (builder := DATASET_FORMATS.get(Path(path).suffix)) is None:
            raise UserError(f"Cannot read {path} as a data set; it should be {', '.join(DATASET_FORMATS)}.")
        arguments = {"path": builder, "data_files": {split: path}}
    try:
        dataset = datasets.load_dataset(**arguments, split=split, streaming=streaming)
    except Exception as error:  # the library raises dozens of types here
        raise UserError(f"Cannot load the data set {path}: {str(error).strip().splitlines()[0]}") from error
    if text_column not in (columns := dataset.column_names or [text_column]):
        raise UserError(f"The data set {path} has no column {text_column!r}; it has {', '.join(columns)}.")
    for row in dataset:
        text = row[text_column] or ""
        if mode != "line" and not text.endswith("\n"):
            text = (text or " ") + "\n" if mode.startswith("wikitext") else text + "\n"
        yield text


def python_docs_split(split: str) -> list[str]:
    """The topics of Python's help() sorted by name: every eighth is for "test", the rest for "train"."""
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]
    return [text for i, text in enumerate(texts) if (i % 8 == 0) == (split == "test")]
