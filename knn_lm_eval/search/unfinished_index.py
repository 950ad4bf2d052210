"""An index that is being built: where it waits, and how a build goes on with it."""

from __future__ import annotations

import glob
import logging
from pathlib import Path
from typing import Any, TypedDict

import faiss

from knn_lm_eval.errors import UserError
from knn_lm_eval.search.faiss_index import bytes_per_code
from knn_lm_eval.store.index_files import IndexFiles, IndexJSON
from knn_lm_eval.system.checkpoints import SavedStates
from knn_lm_eval.system.files import check_free_space, replace_file

logger = logging.getLogger(__name__)


class _Begun(TypedDict):
    seconds: dict[str, float]


class _Notes(_Begun, total=False):
    metadata: IndexJSON


class UnfinishedIndex:
    """An index under way: where it waits, beside what it was begun with.

    Attributes
    ----------
    index : the file of the index with the entries that it has; of an index in parts, trained and empty.
    states : with which settings it was begun, and how long each stage took; there is nothing to go on with without.
    seconds : that each stage took so far.
    """

    def __init__(self, files: IndexFiles, settings: dict[str, Any]) -> None:
        self._files = files
        self.index = files.index.with_name(files.index.name + ".part")
        self.seconds: dict[str, float] = {}
        name = glob.escape(files.name)
        self.states = SavedStates(
            self.index.with_name(self.index.name + ".json"),
            settings,
            what=f"The unfinished index {self.index}",
            notes=_Notes,
            others=[f"{name}{part}.faiss.part{end}" for part in ("", ".[0-9][0-9][0-9]") for end in ("", ".tmp")],
        )

    def part(self, number: int) -> Path:
        """Where a finished part waits for the others."""
        part = self._files.part(number)
        return part.with_name(part.name + ".part")

    def finished_files(self) -> dict[Path, Path]:
        """The files of the index when it is finished, in order, and what each will be called."""
        if (parts := self.states.settings.get("parts")) is None:
            return {self.index: self._files.index}
        return {self.part(number): self._files.part(number) for number in range(parts)}

    def metadata(self) -> dict[str, Any] | None:
        """The metadata of an index that is finished and has not got all its names yet; None of any other."""
        return (self.states.resumed() or {}).get("metadata")

    def load(self) -> faiss.Index | None:
        """The index to go on with; None where there is none.

        Raises UserError where it was begun with other settings.
        """
        notes = self.states.resumed() if self.index.exists() else None
        if notes is None:
            return None
        self.seconds = notes["seconds"]
        index = faiss.read_index(str(self.index))
        whole = "parts" not in self.states.settings
        logger.info("Going on with %s.", f"{index.ntotal:,} entries" if whole else "the parts that lack")
        return index

    def save(self, index: faiss.Index) -> None:
        """Keep the index as it is."""
        write_index(index, self.index)
        self.states.note(seconds=self.seconds)


def write_index(index: faiss.Index, path: Path) -> None:
    """Write an index file, whole or not at all; raises UserError where there is no room for it."""
    temporary = path.with_name(path.name + ".tmp")
    check_free_space(path.parent, index.ntotal * bytes_per_code(index), "the index's codes")
    try:
        faiss.write_index(index, str(temporary))
    except RuntimeError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"Cannot write the index to {path.parent}: {str(error).strip().splitlines()[-1]}") from error
    replace_file(temporary, path)
