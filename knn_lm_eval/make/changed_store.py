"""What goes with a store whose entries change: its indexes, clusterings and tuned settings, and what its manifest says.

What is new waits in a hidden folder of the store's until all of it is there; see ``knn_lm_eval.store.change``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from knn_lm_eval.errors import UserError
from knn_lm_eval.search.changed_index import MEASURED_WITH, ChangedIndex
from knn_lm_eval.store.change import Change, TailRecord
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.index_files import IndexFiles, index_names
from knn_lm_eval.store.manifest import FileRecord, Manifest, file_record, held_manifest
from knn_lm_eval.store.suffixes import FOLDER, has_suffixes, without_suffixes
from knn_lm_eval.system.files import fsync, read_json
from knn_lm_eval.system.seals import check_seal, write_sealed_json

logger = logging.getLogger(__name__)

LOG_PROBS = "lm_log_probs.npy"  # of all entries, made again when pruning asks for it
PARAMS = "params.json"


@dataclass
class Changed:
    """A change of a store, gathered piece by piece.

    Attributes
    ----------
    store : as it is.
    folder : the hidden folder; what is new lies in its folder ``new``.
    keys_sha256 : of the keys, as they will be.
    places, tails, gone : see ``Change``.
    derived : what the manifest will say of the new files that were made from the store.
    """

    store: Datastore
    folder: Path
    keys_sha256: str = ""
    places: dict[str, str] = field(default_factory=dict)
    tails: list[TailRecord] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    derived: dict[str, FileRecord] = field(default_factory=dict)

    @property
    def new(self) -> Path:
        """Where new files wait."""
        return self.folder / "new"

    def place(self, name: str, waits: Path) -> None:
        """Have a file take its place, of the path ``name`` in the store's folder."""
        fsync(waits)
        self.places[name] = self._in_store(waits)

    def add_tail(self, name: str, head: bytes, source: Path, skip: int) -> None:
        """Have numbers added to a file of the store, and its header changed."""
        fsync(source)
        at = (self.store.path / name).stat().st_size
        self.tails.append({"file": name, "source": self._in_store(source), "skip": skip, "at": at, "head": head.hex()})

    def place_index(self, index: ChangedIndex) -> None:
        """Have an index take its place."""
        for name, waits in index.files.items():
            self.place(name, waits)
            self.derived[name] = file_record(waits)
        self.gone += index.gone

    def place_clusters(self, name: str, files: Iterable[str]) -> None:
        """Have a clustering take its place, whose new folder is ``new/clusters/NAME``."""
        for file in files:
            self.place(f"clusters/{name}/{file}", self.new / "clusters" / name / file)
            self.derived[f"clusters/{name}/{file}"] = file_record(self.new / "clusters" / name / file)

    def place_params(self) -> None:
        """Have the tuned settings of the store, if it has some, count for the new keys: they say of which they are."""
        path = self.store.path / PARAMS
        if not path.is_file():
            return
        said = check_seal(path, read_json(path), "tune again")
        tuned_for: dict[str, Any] = dict(said.get("tuned_for", {}))
        if tuned_for.get("keys_sha256") != self.store.keys_checksum:
            return
        tuned_with = tuned_for.pop(MEASURED_WITH, None) or {
            "keys_sha256": self.store.keys_checksum,
            "count": len(self.store),
        }
        tuned_for["keys_sha256"] = self.keys_sha256
        if tuned_with["keys_sha256"] != self.keys_sha256:
            tuned_for[MEASURED_WITH] = tuned_with
        write_sealed_json(self.new / PARAMS, said | {"tuned_for": tuned_for})
        self.place(PARAMS, self.new / PARAMS)

    def make(self, **fields: Any) -> None:
        """Make the change; the manifest's ``fields`` will be those.

        Raises UserError where another process has made an index, say, of what was.
        """
        names = index_names(self.store)
        laid_out = [folder.name for name in names for folder in IndexFiles(self.store.path, name).laid_out()]
        if has_suffixes(self.store):
            logger.warning("The suffix array is of the text as it was, and goes: build it again (build_suffix_array).")
        gone = list(dict.fromkeys([*self.gone, *laid_out, LOG_PROBS, FOLDER]))
        gone = [name for name in gone if os.path.lexists(self.store.path / name)]
        with held_manifest(self.store.path) as manifest:
            if manifest != self.store.manifest:
                raise UserError(
                    f"Something was made of the datastore {self.store.path} while it was about to be changed; run the "
                    f"same command again (with --resume, where it has that)."
                )
            kept = {name: record for name, record in manifest.derived.items() if name not in gone}
            kept = without_suffixes(kept)
            changed: Manifest = replace(manifest, derived=_as_before(manifest.derived, kept | self.derived), **fields)
            waiting = self._in_store(self.folder)
            Change(waiting, changed.to_json(), self.places, self.tails, gone).make(self.store.path)

    def _in_store(self, path: Path) -> str:
        return path.relative_to(self.store.path).as_posix()


def _as_before(before: dict[str, FileRecord], now: dict[str, FileRecord]) -> dict[str, FileRecord]:
    """The records in the order in which they stood, new ones last."""
    return {name: now[name] for name in (*before, *now) if name in now}
