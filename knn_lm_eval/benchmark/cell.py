"""One evaluation of a benchmark: what it is of, where its results lie, and what they depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knn_lm_eval.errors import UserError
from knn_lm_eval.model.params import STORE_DEFAULT
from knn_lm_eval.model.settings import RetrievalSettings
from knn_lm_eval.store.choosing import list_stores
from knn_lm_eval.store.fetching import cache_folder, is_address
from knn_lm_eval.store.index_files import EXACT, IndexFiles, searched_index
from knn_lm_eval.store.manifest import Manifest
from knn_lm_eval.system.file_contents import contents_of
from knn_lm_eval.system.files import read_json

# Arguments of the LM that may be folders whose content counts.
FOLDERS = ("pretrained", "tokenizer", "peft", "delta")
KNN = [name for name in RetrievalSettings.names() if name != "datastore"]


@dataclass(frozen=True)
class Cell:
    """One evaluation.

    Attributes
    ----------
    model, datastore, method, task : the names in the file; ``datastore`` is None for the LM alone.
    kind : lm-eval's model, ``hf`` or ``knn-hf``.
    args : its model arguments.
    task_settings : what ``TASK`` lists, ``task`` always among them.
    seed : of everything random.
    records : whether the scored tokens' records are kept beside the results; the LM alone leaves none.
    """

    model: str
    datastore: str | None
    method: str
    task: str
    kind: str
    args: dict[str, Any]
    task_settings: dict[str, Any]
    seed: int
    records: bool = False

    @property
    def lm_args(self) -> dict[str, Any]:
        """Those arguments that are about the LM and its windows, not about retrieval."""
        return {name: value for name, value in self.args.items() if name not in (*KNN, "datastore")}

    @property
    def folder(self) -> Path:
        """Where the results lie, below the output folder."""
        return Path(self.model, self.method, *([self.datastore] if self.datastore else []), self.task)

    def __str__(self) -> str:
        return " x ".join([self.model, *([self.datastore] if self.datastore else []), self.method, self.task])

    def identity(self) -> dict[str, Any]:
        """What the results depend on: settings, and the content of model, datastore, index and files that they name."""
        texts = [value for value in self.args.values() if isinstance(value, str)]
        files = [text for text in texts if _is_there(text, Path.is_file)]
        contents: dict[str, Any] = {name: contents_of(Path(name)).sha256 for name in sorted(files)}
        for name in FOLDERS:
            if isinstance(folder := self.args.get(name), str) and _is_there(folder, Path.is_dir):
                inside = sorted(path for path in Path(folder).iterdir() if path.is_file())
                contents[name] = {path.name: contents_of(path).sha256 for path in inside}
        if "datastore" in self.args:
            try:
                folders = self.store_folders()
                of_stores = [self._contents_of_store(folder, len(folders) == 1) for folder in folders]
                contents |= of_stores[0] if len(of_stores) == 1 else {"stores": of_stores}
            except (UserError, OSError, KeyError, ValueError, NotImplementedError):  # the last of odd names of clusters
                contents["keys"] = None  # to be reported when the cell is run
        return {
            "model": self.kind,
            "model_args": self.args,
            "task": self.task_settings,
            "seed": self.seed,
            "contents": contents,
            **({"records": True} if self.records else {}),
        }

    def store_folders(self) -> list[Path]:
        """Where the datastores are, or will be once they are fetched; raises UserError where none is named."""
        paths = list_stores(self.args["datastore"])
        return [cache_folder(path) if is_address(path) else Path(path) for path in paths]

    def _contents_of_store(self, folder: Path, alone: bool) -> dict[str, Any]:
        """The checksums of the store's files, and of those of its index, clusters and default params that count, as
        they do where it is ``alone``."""
        manifest = Manifest.read(folder)
        name = searched_index(folder, manifest.derived, self.args.get("index"))
        index = IndexFiles(folder, name or EXACT)
        found: dict[str, Any] = {"keys": manifest.files, "index": EXACT if name is None else read_json(index.metadata)}
        one = [index.index] if index.index.is_file() else []
        parts = one or sorted(folder.glob(f"{index.name}.[0-9][0-9][0-9].faiss"))
        arrays = sorted(folder.glob(f"clusters/{self.args.get('clusters')}/*.npy"))
        for name, paths in (("index files", parts), ("clusters", arrays)):
            of_paths = {path: path.relative_to(folder).as_posix() for path in paths}
            found[name] = {
                said: manifest.derived[said]["sha256"] if said in manifest.derived else contents_of(path).sha256
                for path, said in of_paths.items()
            }
        if alone and (default := folder / STORE_DEFAULT).is_file():
            found["default"] = contents_of(default).sha256
        return found

    def checksum(self) -> str:
        """Of ``identity``."""
        plain = json.loads(json.dumps(self.identity(), default=str))  # names are texts, which can be sorted
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _is_there(name: str, kind: Callable[[Path], bool]) -> bool:
    try:
        return kind(Path(name))
    except OSError:  # such as one that is too long for a name
        return False
