"""Reading .npy and .npz files of which nothing is known: whatever is wrong with one is said in one sentence.

A header is a Python literal, so a damaged one makes numpy raise almost anything; none is unpickled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

from knn_lm_eval.errors import UserError, shortened


def map_npy(path: Path, remedy: str = "", mode: Literal["r", "r+"] = "r") -> np.memmap[Any, Any]:
    """Memory-map a .npy file, to be read only unless ``mode`` is ``r+``.

    Raises UserError where it is none that can be mapped, or cannot be read.

    Parameters
    ----------
    remedy : what to do about it, for the sentence.
    """
    try:
        array = np.lib.format.open_memmap(path, mode=mode)
    except Exception as error:  # damage can look like anything
        raise UserError(_damaged(path, "a .npy array", error, remedy)) from error
    return array


def read_npz(path: Path, remedy: str = "") -> dict[str, np.ndarray]:
    """All arrays of a .npz file by their names; raises UserError as ``map_npy`` does."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except Exception as error:
        raise UserError(_damaged(path, "a .npz file", error, remedy)) from error


def _damaged(path: Path, what: str, error: Exception, remedy: str) -> str:
    return f"{path} is damaged: it is not {what} ({shortened(error, 120)}){'; ' if remedy else ''}{remedy}."
