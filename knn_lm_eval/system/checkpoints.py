"""The states of a long computation, saved in a folder now and then, so that an interrupted one goes on from there."""

from __future__ import annotations

import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from knn_lm_eval.errors import UserError
from knn_lm_eval.system.files import read_json, replace_file, write_json

PROGRESS = "progress.json"
CHECKPOINT_SECONDS = 60.0


class SavedStates:
    """Arrays by name, in a folder.

    Parameters
    ----------
    folder : where they are, or will be.
    settings : what they depend on, ready for JSON.
    resume : whether to go on with those that are there.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], resume: bool) -> None:
        self.folder, self.settings, self.resume = folder, settings, resume
        self.saved = time.monotonic()

    def begin(self) -> None:
        """Make the folder ready; saved states stay only where they are to be resumed.

        Raises UserError where they were begun with other settings.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        progress = self.folder / PROGRESS
        if self.resume and progress.exists():
            if (begun := read_json(progress).get("settings")) != self.settings:
                raise UserError(
                    f"What is unfinished in {self.folder} was begun with {begun}, now it is {self.settings}; "
                    f"give the same settings, or leave out --resume to start anew."
                )
        else:
            self.remove()
            write_json(progress, {"settings": self.settings})

    def load(self, state: str) -> dict[str, np.ndarray]:
        """The arrays saved last under that name; none where nothing was."""
        path = self.folder / f"{state}.npz.part"
        if not path.exists():
            return {}
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays)
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is damaged ({error}); leave out --resume to start anew.") from error

    def save(self, state: str, **arrays: Any) -> None:
        """Keep the arrays under that name, all at once."""
        path = self.folder / f"{state}.npz.part"
        temporary = path.with_name(path.name + ".tmp")
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
        replace_file(temporary, path)
        self.saved = time.monotonic()

    def is_due(self) -> bool:
        """Whether the last state was saved some time ago."""
        return time.monotonic() - self.saved >= CHECKPOINT_SECONDS

    def remove(self) -> None:
        """Remove all states."""
        for path in (self.folder / PROGRESS, *self.folder.glob("*.npz.part"), *self.folder.glob("*.tmp")):
            path.unlink(missing_ok=True)
