"""Where the tasks' texts come from: the Hugging Face hub, a local folder, or Python itself.

The functions that the task files name under `custom_dataset` get their `dataset_kwargs` and the run's
metadata (model arguments and `--metadata`) as keyword arguments, and return one `datasets.Dataset` per split.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets

from knn_lm_eval.errors import UserError
from knn_lm_eval.make.text import python_docs_split

logger = logging.getLogger(__name__)

DATA_VARIABLE = "KNN_LM_EVAL_DATA"
HOW_TO_GIVE = f"--metadata data_dir=FOLDER (or the environment variable {DATA_VARIABLE})"


# ----------------------------------------------------------------------------------------------- WikiText-103

WIKITEXT_FOLDERS = ("wikitext103", "wikitext-103-raw-v1", "wikitext-103-raw")
WIKITEXT_SUFFIXES = (".raw", ".tokens", ".txt", ".parquet")  # in order of preference
SPLIT_IN_FILE_NAME = {
    "test": re.compile(r"(?<![a-z])test(?![a-z])", re.IGNORECASE),
    "validation": re.compile(r"(?<![a-z])valid(ation)?(?![a-z])", re.IGNORECASE),
}


def wikitext103(
    path: str, name: str, split: str, data_dir: object = None, **_metadata: Any
) -> dict[str, datasets.Dataset]:
    """The whole split as one document, as the kNN-LM papers take it."""
    text = _local_wikitext(split, data_dir)
    if text is None:
        text = text_of_rows(_hub_column(path, name, split, "text"))
    return {split: datasets.Dataset.from_dict({"text": [text]})}


def wikitext103_docs(
    path: str, name: str, split: str, data_dir: object = None, **_metadata: Any
) -> dict[str, datasets.Dataset]:
    """One document per article, in the column that lm-eval's own wikitext functions read."""
    text = _local_wikitext(split, data_dir)
    pages = _hub_column(path, name, split, "page") if text is None else articles(text)
    return {split: datasets.Dataset.from_dict({"page": pages})}


def text_of_rows(rows: Iterable[str]) -> str:
    """The raw file's text from the data set's rows: a row is a line, and blank lines come as empty rows."""
    return "".join(row or " \n" for row in rows)


def articles(text: str) -> list[str]:
    """Split at article headings (` = Title = `), not at those of sections (` = = Section = = `).

    Gives the very pages of the hub's document-level data set, so that perplexities compare.
    """
    pages: list[list[str]] = [[]]
    for line in text.split("\n"):
        if re.fullmatch(r"= (?!=).*(?<!=) =", line.strip()):
            pages.append([])
        pages[-1].append(line)
    return [page for page in map("\n".join, pages) if page.strip()]


def _hub_column(path: str, name: str, split: str, column: str) -> list[str]:
    try:
        return list(datasets.load_dataset(path, name, split=split)[column])
    except Exception as error:  # whatever the hub client raises, the way out is the same
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"the data set {path} ({name}, {split}) could not be loaded ({type(error).__name__}: {reason}); "
            f"without the hub, put WikiText-103's files into a local folder and give it by {HOW_TO_GIVE}"
        ) from error


def _local_wikitext(split: str, data_dir: object) -> str | None:
    """The split's text from the data folder; None where the hub is to be asked."""
    folder = data_folder(data_dir)
    if folder is None:
        return None
    inner = next((folder / name for name in WIKITEXT_FOLDERS if (folder / name).is_dir()), folder)
    files = _wikitext_files(inner, split)
    if not files:
        if inner == folder and ((folder / "law").is_dir() or any(folder.glob("*.en"))):
            return None  # a folder with the data of other tasks only says nothing about WikiText
        raise UserError(
            f"no WikiText-103 {split} file in {inner}: put one there whose name contains "
            f"'{'test' if split == 'test' else 'valid'}' and ends in {', '.join(WIKITEXT_SUFFIXES)} "
            "(for instance wiki.test.raw)"
        )
    logger.info("WikiText-103 %s: reading %s", split, ", ".join(map(str, files)))
    if files[0].suffix == ".parquet":
        text = text_of_rows(row for file in files for row in _parquet_rows(file))
    else:
        text = _read(files[0])
    if not text.strip():
        raise UserError(f"{files[0]} has no text in it")
    return text


def _wikitext_files(folder: Path, split: str) -> list[Path]:
    """The one file, or the shards, of a split: in the folder itself, or else one level below."""
    for level in ("*", "*/*"):
        named = sorted(
            file
            for file in folder.glob(level)
            if SPLIT_IN_FILE_NAME[split].search(file.stem) and not file.name.startswith(".") and file.is_file()
        )
        for suffix in WIKITEXT_SUFFIXES:
            files = [file for file in named if file.suffix == suffix]
            shards = suffix == ".parquet" and len({file.parent for file in files}) == 1
            if len(files) > 1 and not shards:
                raise UserError(
                    f"{folder} has several WikiText-103 {split} files ({', '.join(map(str, files))}): "
                    "leave one, or give the folder of the right one"
                )
            if files:
                return files
    return []


def _parquet_rows(file: Path) -> list[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(file)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{file} cannot be read as a parquet file ({error})") from error
    if "text" not in table.column_names:
        raise UserError(f"{file} has no column 'text' (but {', '.join(table.column_names) or 'none'})")
    return table["text"].to_pylist()


# ----------------------------------------------------------------------------------------------------- Law-MT

LAW_FILES = {"test": "test.en", "validation": "dev.en"}
LAW_SOURCE = (
    "the Law-MT data is the law domain of Aharoni & Goldberg 2020 (the new multi-domain split, "
    "https://github.com/roeeaharoni/unsupervised-domain-clusters): put its English files, one sentence a "
    "line, as train.en, dev.en and test.en into FOLDER or FOLDER/law"
)


def law(split: str, data_dir: object = None, **_metadata: Any) -> dict[str, datasets.Dataset]:
    """Each line (sentence) as its own document; blank lines are no documents."""
    folder = data_folder(data_dir)
    if folder is None:
        raise UserError(f"law needs a data folder: {LAW_SOURCE}, and give {HOW_TO_GIVE}")
    if (folder / "law").is_dir():
        folder = folder / "law"
    file = folder / LAW_FILES[split]
    if not file.is_file():
        raise UserError(f"there is no {LAW_FILES[split]} in {folder}: {LAW_SOURCE}, and give {HOW_TO_GIVE}")
    # Not splitlines(): it would also break a sentence at characters such as U+2028 or a form feed.
    sentences = [line for line in _read(file).split("\n") if line.strip()]
    if not sentences:
        raise UserError(f"{file} has no text in it")
    return {split: datasets.Dataset.from_dict({"text": sentences})}


# ---------------------------------------------------------------------------------------------- Python's help


def python_docs(**_metadata: Any) -> dict[str, datasets.Dataset]:
    return {split: datasets.Dataset.from_dict({"text": python_docs_split(split)}) for split in ("train", "test")}


# ------------------------------------------------------------------------------------------------ Local files


def data_folder(data_dir: object) -> Path | None:
    """The folder that metadata or the environment variable gives; None where neither does."""
    given = data_dir or os.environ.get(DATA_VARIABLE)
    if not given:
        return None
    folder = Path(str(given)).expanduser()
    if not folder.is_dir():
        source = "--metadata data_dir" if data_dir else DATA_VARIABLE
        raise UserError(f"the data folder {folder} (given by {source}) does not exist or is not a folder")
    return folder


def _read(file: Path) -> str:
    """A text file with Unix line ends, whatever it had."""
    try:
        return file.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text (byte {error.start}): convert it to UTF-8") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror})") from error
