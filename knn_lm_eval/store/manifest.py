"""What a datastore says of itself, ``manifest.json``: read, written, and its JSON's names known, here alone.

The JSON's order of names is kept, and so are names that this version does not know: a later version may have
written them. ``files`` and what else is nested are plain dictionaries, as they stand in the JSON.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

import numpy as np

from knn_lm_eval.errors import UserError, shortened
from knn_lm_eval.store.change import finish_change
from knn_lm_eval.system.checkpoints import PROGRESS
from knn_lm_eval.system.file_contents import contents_of, examine
from knn_lm_eval.system.files import read_json
from knn_lm_eval.system.json_schema import Count, Positive, check_json
from knn_lm_eval.system.locks import locked
from knn_lm_eval.system.seals import check_seal, write_sealed_json

FORMAT = "knn_lm_eval datastore"
FORMAT_VERSION = 1
# Of a store with removed documents, which an earlier version of this program would show.
WITH_REMOVED = 2
MANIFEST = "manifest.json"
KEYS, VALUES, DOCUMENT_STARTS, WEIGHTS = "keys.npy", "values.npy", "document_starts.npy", "weights.npy"
REMOVED, PROJECTION = "removed.npy", "projection.npy"
# The JSON's names in the order in which a dump and an import write them.
_HEAD = ("format", "format_version", "count", "dimension", "documents")
_TAIL = ("fingerprint", "files", "created", "versions")
ORDER_OF_DUMPS = (
    *_HEAD,
    *("key_dtype", "value_dtype", "projection", "key_type", "windows", "max_tokens", "source", "model", "key_module"),
    *_TAIL,
)
ORDER_OF_IMPORTS = (
    *_HEAD,
    *("largest_value", "value_dtype", "keys", "key_type", "key_module", "source", "model"),
    *_TAIL,
)


class FileRecord(TypedDict):
    """A file's size and checksum."""

    bytes: Count
    sha256: str


class WindowsRecord(TypedDict):
    """In which windows the LM read the text; see ``WindowSettings``."""

    max_length: Positive
    stride: Positive
    batch_size: Positive
    prefix_token_id: Count


_ModelMaker = TypedDict("_ModelMaker", {"class": str, "dtype": str, "vocabulary": Count | None}, total=False)


class ModelRecord(_ModelMaker):
    """The LM that made the keys. An import may not know its name and vocabulary (None), and tells no class or dtype."""

    pretrained: str | None
    args: dict[str, Any]


class AppendedRecord(TypedDict):
    """Documents that came behind those of the dump: what they were, and from which one on up to the next."""

    first: Count
    stop: Count
    source: dict[str, Any]
    max_tokens: Count | None
    created: str


class _Fingerprint(TypedDict):
    token_ids: list[Count]
    key: list[float]


class _KeysRecord(TypedDict):
    file: str
    dtype: Literal["float16", "float32"]


_From = TypedDict("_From", {"from": Positive})


class ProjectionRecord(_From, total=False):
    """From how many numbers the LM's hidden states were projected to ``dimension``, and how that was chosen."""

    kind: str
    variance_kept: float


class _Required(TypedDict):
    count: Count
    dimension: Positive
    files: dict[str, FileRecord]


class ManifestJSON(_Required, total=False):
    """What the file holds, as far as this version knows it; every manifest has the first three."""

    documents: Count | None
    largest_value: Count | None
    key_dtype: str | None
    value_dtype: str | None
    keys: _KeysRecord | None
    projection: ProjectionRecord | None
    key_type: str
    key_module: str | None
    windows: WindowsRecord | None
    max_tokens: Count | None
    source: dict[str, Any]
    model: ModelRecord
    fingerprint: _Fingerprint | None
    text_order: bool
    pruned_from: dict[str, Any] | None
    appended: list[AppendedRecord]
    created: str | None
    versions: dict[str, Any]
    derived: dict[str, FileRecord]


class KeysFile(NamedTuple):
    """Where the keys are: a .npy file, or one without a header, and their dtype."""

    file: str
    dtype: str

    @property
    def is_raw(self) -> bool:
        """Whether the file is without a header."""
        return self.file != KEYS


NPY_KEYS = KeysFile(KEYS, "float16")


@dataclass(frozen=True)
class Manifest:
    """The content of ``manifest.json``.

    Attributes
    ----------
    count, dimension : entries, and numbers per key.
    documents : how many documents the text has.
    key_dtype, value_dtype : of ``keys.npy`` and ``values.npy``.
    key_type, key_module : what the keys are; see ``LanguageModel``.
    windows, max_tokens : how a dump read the text; None where another program did.
    source : what the text was.
    model : the LM that made the keys.
    fingerprint : the LM's; None where it was not there.
    largest_value : of an imported store.
    keys : where the keys are; None where there are none.
    projection : of what the keys are a projection; None where they are the LM's hidden states.
    text_order : whether the values are the text.
    pruned_from : how a pruned store was made, and of what.
    appended : the documents that were appended to it, in order.
    files : the store's own files.
    created, versions : when, and by which programs.
    derived : files that were made from the store (indexes, clusterings), which may be missing.
    unknown : what else stands in the JSON.
    order : the JSON's names, in order; fields that were not in it come last, where they say something.
    """

    count: int
    dimension: int
    files: dict[str, FileRecord]
    documents: int | None = None
    largest_value: int | None = None
    key_dtype: str | None = None
    value_dtype: str | None = None
    keys: KeysFile | None = NPY_KEYS
    projection: ProjectionRecord | None = None
    key_type: str = "last_ffn_input"
    key_module: str | None = None
    windows: WindowsRecord | None = None
    max_tokens: int | None = None
    source: dict[str, Any] = field(default_factory=dict)
    model: ModelRecord = field(default_factory=lambda: ModelRecord(pretrained=None, args={}))
    fingerprint: dict[str, Any] | None = None
    text_order: bool = True
    pruned_from: dict[str, Any] | None = None
    appended: list[AppendedRecord] = field(default_factory=list)
    created: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    derived: dict[str, FileRecord] = field(default_factory=dict)
    unknown: dict[str, Any] = field(default_factory=dict)
    order: tuple[str, ...] = ("format", "format_version")

    @classmethod
    def read(cls, folder: str | Path) -> Manifest:
        """Read the manifest of the datastore in ``folder``.

        Raises
        ------
        UserError
            Where there is no datastore, a dump was not finished, or the manifest is damaged or another version's.
        """
        folder = Path(folder)
        path = folder / MANIFEST
        finish_change(folder)
        if not folder.is_dir():
            raise UserError(f"There is no datastore at {folder}: no such folder; make one with dump_datastore.")
        if not path.is_file():
            if (folder / PROGRESS).is_file():
                raise UserError(f"The datastore {folder} is not finished; go on with dump_datastore --resume.")
            raise UserError(f"{folder} is not a datastore: it has no {MANIFEST}; make one with dump_datastore.")
        content = read_json(path)
        if content.get("format") != FORMAT:
            raise UserError(f"{path} is not the manifest of a {FORMAT}.")
        if content.get("format_version") not in (FORMAT_VERSION, WITH_REMOVED):
            raise UserError(
                f"The datastore {folder} has format version {shortened(content.get('format_version'))}, this program "
                f"reads versions {FORMAT_VERSION} and {WITH_REMOVED}; use the program's version that made it, or "
                f"dump it again."
            )
        return cls.of_json(check_seal(path, content, "fetch or copy the datastore again"), path)

    @classmethod
    def of_json(cls, content: dict[str, Any], file: str | Path = MANIFEST) -> Manifest:
        """Take it from the JSON object in ``file`` (a path or an address); raises UserError where it is malformed."""
        remedy = "copy, fetch or dump the datastore again"
        check_json(content, ManifestJSON, file, remedy)
        known = {name: content[name] for name in _field_names() if name in content}
        raw = content.get("keys", NPY_KEYS._asdict())
        known["keys"] = None if raw is None else KeysFile(raw["file"], raw["dtype"])
        projected = [PROJECTION] if known.get("projection") else []
        for name in (VALUES, DOCUMENT_STARTS, *([raw["file"]] if raw else []), *projected):
            if name not in content["files"]:
                raise UserError(f"{file} is damaged: files does not list {shortened(name)}; {remedy}.")
        return cls(
            **known,
            unknown={name: value for name, value in content.items() if name not in {*known, *_HEAD}},
            order=tuple(content),
        )

    def to_json(self) -> dict[str, Any]:
        """What the file holds."""
        content = {name: getattr(self, name) for name in _field_names()}
        added = [name for name in content if name not in self.order and not _is_default(name, content[name])]
        may_go = ("keys", "projection", "appended", "derived")
        dropped = [name for name in may_go if _is_default(name, content[name])]
        version = WITH_REMOVED if REMOVED in self.files else FORMAT_VERSION
        content |= {"format": FORMAT, "format_version": version, **self.unknown}
        content["keys"] = self.keys and self.keys._asdict()
        return {name: content[name] for name in (*self.order, *added) if name not in dropped}

    def write(self, folder: Path) -> None:
        """Make the folder a datastore."""
        write_sealed_json(folder / MANIFEST, self.to_json())

    @property
    def width(self) -> int:
        """The width of the LM's hidden states that the keys are, or are a projection of."""
        return self.dimension if self.projection is None else self.projection["from"]

    @property
    def keys_checksum(self) -> str:
        """The SHA-256 of the keys' file, which names the keys for indexes built from them; where the store has
        no keys, that of the values stands for it."""
        return self.files[self.keys.file if self.keys else VALUES]["sha256"]


def file_record(path: Path, raw_dtype: np.dtype | None = None) -> FileRecord:
    """What a manifest says of a file: its size and checksum. They are noted, so that opening it does not read it.

    Parameters
    ----------
    raw_dtype : of the numbers of an array without a header.
    """
    return {"bytes": path.stat().st_size, "sha256": examine(path, raw_dtype).sha256}


def record_derived(folder: Path, names: Iterable[str]) -> None:
    """Enter files that were made from the store (indexes, clusterings) under ``derived`` in its manifest.

    They are what a copy of the store should have besides its own files; they may be missing.

    Parameters
    ----------
    folder : the store's.
    names : the files' paths in it, with forward slashes.
    """
    records = {name: file_record(folder / name) for name in names}
    with held_manifest(folder) as manifest:
        replace(manifest, derived=manifest.derived | records).write(folder)


def forget_derived(folder: Path, names: Iterable[str]) -> None:
    """Take files that are about to be replaced off the manifest's ``derived``, so that it never says what is not so."""
    gone = set(names)
    if gone.isdisjoint(Manifest.read(folder).derived):
        return
    with held_manifest(folder) as manifest:
        derived = {name: record for name, record in manifest.derived.items() if name not in gone}
        replace(manifest, derived=derived).write(folder)


def check_unchanged(folder: Path, keys_sha256: str, made: str) -> None:
    """Raise UserError where the store has other keys by now than those that something was ``made`` of."""
    if Manifest.read(folder).keys_checksum != keys_sha256:
        raise UserError(f"The datastore {folder} was changed while {made} of it; do it again.")


@contextmanager
def held_manifest(folder: Path) -> Iterator[Manifest]:
    """The manifest as it is, to be changed by one process at a time."""
    with locked(folder / f".{MANIFEST}.lock", str(folder / MANIFEST)):
        yield Manifest.read(folder)


def recorded_checksums(folder: Path) -> dict[str, str]:
    """The SHA-256 that the manifest records of each file that was made from the store, by its path in it."""
    return {name: record["sha256"] for name, record in Manifest.read(folder).derived.items() if "sha256" in record}


def checksums_of_derived(folder: Path, head: str, names: Iterable[str]) -> dict[str, str]:
    """The SHA-256 of files that were made from the store, by their paths in it.

    They are the manifest's where the file ``head``, which was written with them and is read, is the one that the
    manifest records; otherwise, as in stores that record none, all are read.
    """
    derived, found = Manifest.read(folder).derived, {head: contents_of(folder / head).sha256}
    is_recorded = head in derived and derived[head]["sha256"] == found[head]
    for name in names:
        found[name] = derived[name]["sha256"] if is_recorded and name in derived else contents_of(folder / name).sha256
    return found


def now() -> str:
    """The time for ``created``."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _field_names() -> list[str]:
    """The JSON's names that are fields."""
    return [each.name for each in fields(Manifest) if each.name not in ("unknown", "order")]


def _is_default(name: str, value: Any) -> bool:
    """Whether a field says no more than the JSON does without it."""
    of = next(each for each in fields(Manifest) if each.name == name)
    return value == (of.default if of.default_factory is MISSING else of.default_factory())
