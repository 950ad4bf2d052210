"""Token records on disk: what they hold, and reading them.

A folder has, for each kind of request and each process that scored, a Parquet file and a sealed JSON beside it, which
is written last: a Parquet file without one counts for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np

from knn_lm_eval.errors import UserError, shortened
from knn_lm_eval.system.files import read_json, sha256
from knn_lm_eval.system.json_schema import Count, Positive, check_json
from knn_lm_eval.system.seals import check_seal

FORMAT = "knn_lm_eval token records"
FORMAT_VERSION = 2
HEAVIEST = 3  # neighbours that a record names
NOT_KNOWN = -1  # of an overlap that nobody measured, and of a neighbour that is not there
# A record's columns, in order.
COLUMNS: dict[str, type[np.generic]] = {
    "task": np.int16,  # its number among the JSON's tasks
    "document": np.int32,  # lm-eval's doc_id, or the text's number
    "request": np.int32,  # of the document's, such as its answers
    "position": np.int32,  # in the text, from 0
    "read": np.int32,  # tokens that the LM had read in its window
    "token": np.int32,
    "lm_log_prob": np.float32,
    "knn_log_prob": np.float32,
    "ngram_log_prob": np.float32,
    "log_prob": np.float32,
    "entropy": np.float32,
    "rank": np.int32,
    "nearest": np.float32,
    "lmbda": np.float32,
    "searched": np.bool_,
    "overlap": np.int32,
    **{f"entry_{place}": np.int64 for place in range(HEAVIEST)},
    **{f"weight_{place}": np.float32 for place in range(HEAVIEST)},
}
PLACE = ("task", "document", "request", "position")  # which token it is
REMEDY = "run the evaluation again"


class _File(TypedDict):
    name: str
    bytes: Count
    sha256: str


class _LM(TypedDict):
    pretrained: str | None
    dtype: str


class _Tokenizer(TypedDict):
    name: str | None
    sha256: str


class _Store(TypedDict):
    path: str
    keys_sha256: str
    entries: Count


class PartJSON(TypedDict):
    """What the JSON beside a Parquet file says."""

    format: str
    format_version: int
    kind: Literal["loglikelihood_rolling", "loglikelihood"]
    call: Count
    process: Count
    processes: Positive
    tasks: list[str]
    file: _File
    rows: Count
    model: _LM
    settings: dict[str, Any]
    tokenizer: _Tokenizer
    datastore: list[_Store]  # several in the order in which their entries are numbered through


RUN = ("model", "settings", "tokenizer", "datastore")  # what all parts of a folder have in common


@dataclass(frozen=True)
class Records:
    """The records of one run, in the order of tasks, documents, requests and positions.

    Attributes
    ----------
    folder : where they are.
    about : what the JSON beside them says: ``model``, ``settings``, ``tokenizer``, ``datastore``.
    tasks : the tasks' names; ``columns["task"]`` counts them.
    columns : by name, as ``COLUMNS`` says, ``[tokens]``.
    """

    folder: Path
    about: dict[str, Any]
    tasks: list[str]
    columns: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.columns["token"])


def names_of(folders: Sequence[Path]) -> list[str]:
    """What records are called that are shown together.

    Each by its folder, or of a folder that is called ``records`` by that which it lies in. Where two would have one
    name, by those folders above that are not the same for all: of a benchmark's cells, the method's.
    """
    paths = [folder.resolve() for folder in folders]
    parts = [(path.parent if path.name == "records" else path).parts for path in paths]
    last = [of_one[-1] for of_one in parts]
    if len(set(last)) == len(last):
        return last
    if len(set(map(len, parts))) == 1:
        differing = [level for level, names in enumerate(zip(*parts, strict=True)) if len(set(names)) > 1]
        between = ["/".join(of_one[level] for level in differing) for of_one in parts]
        if len(set(between)) == len(between):
            return between
    return list(map(str, folders))


def read_records(folder: Path) -> Records:
    """The records of a folder; about 80 bytes of memory each.

    Raises
    ------
    UserError
        Where there are none, a part is missing or damaged, or parts are of several runs.
    """
    parts = read_parts(folder)
    if not parts:
        raise UserError(f"There are no token records in {folder}; evaluate with records={folder}.")
    if left := sorted(folder.glob(".*.unfinished")):
        raise UserError(f"{folder} holds unfinished records ({left[0].name}): {REMEDY}.")
    _check_parts(folder, parts)
    tasks = sorted({task for part in parts for task in part["tasks"]})
    columns = [_read_columns(folder, part, tasks) for part in parts]
    whole = {name: np.concatenate([of_part[name] for of_part in columns]) for name in COLUMNS}
    order = np.lexsort([whole[name] for name in reversed(PLACE)])
    ordered = {name: column[order] for name, column in whole.items()}
    places = np.stack([ordered[name].astype(np.int64) for name in PLACE])
    if (places[:, 1:] == places[:, :-1]).all(axis=0).any():
        raise UserError(f"{folder} holds records of the same tokens twice: delete it, and {REMEDY}.")
    return Records(folder, {name: parts[0][name] for name in RUN}, tasks, ordered)  # type: ignore[literal-required]


def read_parts(folder: Path) -> list[PartJSON]:
    """What the folder's JSON files say, sorted by their names; raises UserError where one is damaged."""
    parts: list[Any] = []
    if not folder.is_dir():
        return parts
    for path in sorted(folder.glob("loglikelihood*.json")):
        content = read_json(path)
        if content.get("format") != FORMAT:
            raise UserError(f"{path} is no JSON of token records; give a folder that an evaluation wrote.")
        if content.get("format_version") != FORMAT_VERSION:
            raise UserError(
                f"{path} has format version {shortened(content.get('format_version'))}, this program reads version "
                f"{FORMAT_VERSION}; {REMEDY}."
            )
        content = check_seal(path, content, REMEDY)
        check_json(content, PartJSON, path, REMEDY)
        parts.append(content)
    return parts


def _check_parts(folder: Path, parts: Sequence[PartJSON]) -> None:
    """Raise UserError unless the parts are all there, and of one run."""
    for part in parts:
        for name in RUN:
            if part[name] != parts[0][name]:  # type: ignore[literal-required]
                raise UserError(f"{folder} holds records of several runs, which differ in {name}; {REMEDY}.")
    calls: dict[tuple[str, int], list[PartJSON]] = {}
    for part in parts:
        calls.setdefault((part["kind"], part["call"]), []).append(part)
    for (kind, _), of_call in calls.items():
        there, of = sorted(part["process"] for part in of_call), {part["processes"] for part in of_call}
        if len(of) > 1 or there != list(range(of_call[0]["processes"])):
            raise UserError(
                f"{folder} is incomplete: of the {max(of)} processes that scored {kind} requests, "
                f"{len(of_call)} left whole records; {REMEDY}."
            )


def _read_columns(folder: Path, part: PartJSON, tasks: Sequence[str]) -> dict[str, np.ndarray]:
    """A part's columns, its tasks counted among ``tasks``."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / part["file"]["name"]
    if not path.is_file():
        raise UserError(f"{folder} is incomplete: {path.name} is missing; {REMEDY}.")
    if path.stat().st_size != part["file"]["bytes"] or sha256(path) != part["file"]["sha256"]:
        raise UserError(f"{path} is damaged: it is not what the JSON beside it says; {REMEDY}.")
    try:
        table = pq.read_table(path, columns=list(COLUMNS))
        columns = {name: table.column(name).to_numpy() for name in COLUMNS}
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise UserError(f"{path} is damaged: it is no Parquet file of token records; {REMEDY}.") from error
    for name, kind in COLUMNS.items():
        if columns[name].dtype != kind or len(columns[name]) != part["rows"]:
            raise UserError(f"{path} is damaged: its column {name} is not what the JSON beside it says; {REMEDY}.")
    numbers = np.array([tasks.index(task) for task in part["tasks"]], dtype=np.int16)
    if len(columns["task"]) and not 0 <= columns["task"].min() <= columns["task"].max() < len(numbers):
        raise UserError(f"{path} is damaged: it counts tasks that the JSON beside it does not name; {REMEDY}.")
    return columns | {"task": numbers[columns["task"]] if len(numbers) else columns["task"]}


def check_same_tokens(records: Sequence[Records]) -> None:
    """Raise UserError unless all are of the same tokens of the same texts, by one LM's tokenizer."""
    first, *others = records
    for other in others:
        said = f"{other.folder} and {first.folder}"
        if other.about["tokenizer"]["sha256"] != first.about["tokenizer"]["sha256"]:
            raise UserError(f"{said} are records of other tokenizers: only records of the same tokens are compared.")
        if other.tasks != first.tasks:
            raise UserError(f"{said} are records of other tasks: {_listed(other.tasks)} and {_listed(first.tasks)}.")
        if len(other) != len(first):
            raise UserError(f"{said} are records of other tokens: {len(other):,} and {len(first):,} of them.")
        for name in (*PLACE, "token"):
            differs = np.flatnonzero(other.columns[name] != first.columns[name])
            if len(differs):
                where = {part: int(first.columns[part][differs[0]]) for part in ("document", "position")}
                raise UserError(
                    f"{said} are records of other tokens: at document {where['document']}, position "
                    f"{where['position']} their {name} differs."
                )


def _listed(names: Iterable[str]) -> str:
    return shortened(", ".join(names))
