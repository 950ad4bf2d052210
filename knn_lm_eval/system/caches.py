"""The folders in which this program and its libraries keep what can be made or fetched again, and their sizes."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

CACHE_VARIABLE = "KNN_LM_EVAL_CACHE"


def cache_root() -> Path:
    """Where what can be made or fetched again is kept: ``$KNN_LM_EVAL_CACHE``, or ~/.cache/knn_lm_eval."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "knn_lm_eval").expanduser()


def cache_folders() -> dict[str, Path]:
    """Each by what it holds. Known without importing the libraries, which may be missing."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    home = _named("HF_HOME", user / "huggingface")
    return {
        "datastores, verified files (knn_lm_eval)": cache_root(),
        "models and data sets of the hub": _named("HF_HUB_CACHE", home / "hub"),
        "prepared data sets": _named("HF_DATASETS_CACHE", home / "datasets"),
        "requests of lm-eval": _named("LM_HARNESS_CACHE_PATH", _of_lm_eval()),
    }


def folder_bytes(folder: Path) -> int | None:
    """The bytes of all files below a folder, each counted once; None where there is no such folder."""
    if not folder.is_dir():
        return None
    return sum({(found.st_dev, found.st_ino): found.st_size for found in _files(folder)}.values())


def _files(folder: Path) -> Iterator[os.stat_result]:
    waiting = [folder]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(Path(entry.path))
                    else:
                        yield entry.stat(follow_symlinks=False)
        except OSError:  # another user's, or gone meanwhile
            continue


def _named(variable: str, otherwise: Path) -> Path:
    return Path(os.path.expandvars(os.environ.get(variable) or otherwise)).expanduser()


def _of_lm_eval() -> Path:
    """Where lm-eval keeps requests if nothing else is said: within itself."""
    spec = importlib.util.find_spec("lm_eval")
    package = Path(spec.origin).parent if spec and spec.origin else Path("lm_eval")
    return package / "caching" / ".cache"
