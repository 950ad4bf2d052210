"""One way to go on with a long computation that was interrupted.

While it is unfinished, a JSON file says with which settings it was begun and how far it is (its notes), and beside it
may lie named states, arrays that were saved now and then. It is gone on with where the settings are the same; when it
is finished, these files go.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from knn_lm_eval.errors import UserError, shortened
from knn_lm_eval.system.arrays import read_npz
from knn_lm_eval.system.files import read_json, replace_file, write_json
from knn_lm_eval.system.json_schema import check_json

PROGRESS = "progress.json"
CHECKPOINT_SECONDS = 60.0


class SavedStates:
    """What an unfinished computation leaves in a folder.

    Parameters
    ----------
    file : the JSON file; all else lies beside it.
    settings : what the result depends on, ready for JSON.
    what : what is computed, for the sentence that other settings get.
    instead : what the user does to start anew, for the same sentence.
    others : patterns (as for ``glob``) of further files in the folder that are of no use without these.
    nested : whether the JSON file has the settings under ``settings``, or beside the notes.
    notes : what the notes are, as for ``check_json``.
    """

    def __init__(
        self,
        file: Path,
        settings: dict[str, Any],
        *,
        what: str = "",
        instead: str = "leave out --resume to start anew",
        others: Sequence[str] = (),
        nested: bool = True,
        notes: Any = dict[str, Any],
    ) -> None:
        self.file, self.settings, self.nested, self._notes = file, settings, nested, notes
        self.what, self.instead, self.others = what or f"What is unfinished in {file.parent}", instead, others
        self.saved = time.monotonic()

    @property
    def folder(self) -> Path:
        return self.file.parent

    @classmethod
    def found(cls, file: Path, **how: Any) -> SavedStates:
        """What somebody else has begun there, with the settings that it was begun with."""
        states = cls(file, {}, **how)
        states.settings = states._read()[0]
        return states

    def begin(self, **notes: Any) -> None:
        """Start anew: make the folder, remove what there is, and write the settings and the first notes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.remove()
        self.note(**notes)

    def begin_or_resume(self, resume: bool, **notes: Any) -> dict[str, Any]:
        """Go on with what was begun, where ``resume`` and there is something, else start anew; returns the notes."""
        begun = self.resumed() if resume else None
        if begun is None:
            self.begin(**notes)
        return notes if begun is None else begun

    def resumed(self) -> dict[str, Any] | None:
        """The notes of what was begun; None where nothing was.

        Raises UserError where it was begun with other settings.
        """
        if not self.file.exists():
            return None
        begun, notes = self._read()
        if others := [name for name in {**self.settings, **begun} if begun.get(name) != self.settings.get(name)]:
            both = (begun, self.settings)
            was, now = (", ".join(f"{name}={shortened(of.get(name))}" for name in others) for of in both)
            raise UserError(
                f"{self.what} was begun with {was}, now it is {now}; give the same settings, or {self.instead}."
            )
        return notes

    def fits(self) -> bool:
        """Whether something was begun, with these settings."""
        return self.file.exists() and self._read()[0] == self.settings

    def notes(self) -> dict[str, Any]:
        """The notes, with whatever settings it was begun; none where nothing was."""
        return self._read()[1] if self.file.exists() else {}

    def note(self, **notes: Any) -> None:
        """Write how far it is, in the place of what was noted before."""
        write_json(self.file, ({"settings": self.settings} if self.nested else self.settings) | notes)
        self.saved = time.monotonic()

    def load(self, state: str) -> dict[str, np.ndarray]:
        """The arrays saved last under that name; none where nothing was."""
        path = self.folder / f"{state}.npz.part"
        if not path.exists():
            return {}
        return read_npz(path, self.instead)

    def save(self, state: str, **arrays: Any) -> None:
        """Keep the arrays under that name, all at once."""
        path = self.folder / f"{state}.npz.part"
        temporary = path.with_name(path.name + ".tmp")
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
        replace_file(temporary, path)
        self.saved = time.monotonic()

    def is_due(self, seconds: float | None = None) -> bool:
        """Whether the last state or note was written so long ago (None: ``CHECKPOINT_SECONDS``)."""
        return time.monotonic() - self.saved >= (CHECKPOINT_SECONDS if seconds is None else seconds)

    def remove(self) -> None:
        """Remove all of it."""
        patterns = ("*.npz.part", "*.npz.part.tmp", *self.others)
        found = {path for pattern in patterns for path in self.folder.glob(pattern)} - {self.file}
        for path in (*found, self.file.with_name(self.file.name + ".tmp"), self.file):
            path.unlink(missing_ok=True)

    def _read(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The settings and the notes in the file."""
        content = read_json(self.file)
        if self.nested:
            settings = content.pop("settings", {})
            check_json(settings, dict[str, Any], f"settings in {self.file}", self.instead)
        else:
            settings = {name: content.pop(name, None) for name in self.settings}
        check_json(content, self._notes, self.file, self.instead)
        return settings, content
