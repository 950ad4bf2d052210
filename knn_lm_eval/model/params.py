"""The params file: settings that were tuned, and what they were tuned for. JSON, plain numbers.

A datastore may carry one as ``params.json``: its default, which holds where nothing else is given.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

from knn_lm_eval.errors import UserError, shortened
from knn_lm_eval.store.clusters import Clusters
from knn_lm_eval.store.joined import JoinedClusters, JoinedStore, Store
from knn_lm_eval.system.files import read_json
from knn_lm_eval.system.json_schema import Count, check_json
from knn_lm_eval.system.seals import check_seal, write_sealed_json
from knn_lm_eval.version import __version__

logger = logging.getLogger(__name__)

FORMAT = "knn_lm_eval params"
FORMAT_VERSION = 1
STORE_DEFAULT = "params.json"
NAMES = ("k", "knn_temp", "lmbda", "ngram_lmbda", "probe", "min_knns", "max_knns")
# Settings that decide what distances there are: with others, what was tuned need not fit.
CONDITIONS = (
    *("index", "knn_sim_func", "recompute_dists", "retomaton", "clusters", "duplicates", "no_pointer"),
    *("datastore_weights", "sources", "exclude", "exclude_overlap"),
)


class _Settings(TypedDict, total=False):
    k: float
    knn_temp: float
    lmbda: float | dict[str, Any]
    ngram_lmbda: float
    probe: float
    min_knns: float | Literal["inf"]
    max_knns: float


class _TunedWith(TypedDict):
    keys_sha256: str
    count: Count


class _TunedFor(TypedDict, total=False):
    keys_sha256: str
    measured_with: _TunedWith
    datastore: str
    model: str | None
    conditions: dict[str, Any]
    contents: dict[str, dict[str, str]]


class ParamsJSON(TypedDict):
    """What the file holds, as far as it is read; values are checked where they are used."""

    settings: _Settings
    tuned_for: _TunedFor


@dataclass(frozen=True)
class Params:
    """Tuned settings.

    Attributes
    ----------
    settings : some of ``NAMES`` (lmbda a number or an adaptive weight's plain form).
    tuned_for : the datastore, model, conditions, tasks, and what came out.
    """

    settings: dict[str, Any]
    tuned_for: dict[str, Any]

    def write(self, path: Path) -> None:
        """Write the file, all at once."""
        settings = {
            # JSON has no infinity.
            name: "inf" if value == float("inf") else value
            for name, value in self.settings.items()
        }
        write_sealed_json(
            path,
            {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "program_version": __version__,
                "settings": settings,
                "tuned_for": self.tuned_for,
            },
        )

    @classmethod
    def read(cls, path: Path, store: Store) -> Params:
        """Read a file and check that it is for this datastore (and so for its model).

        Raises
        ------
        UserError
            Where there is no such file, it is damaged, or it was tuned for another datastore.
        """
        if not path.is_file():
            raise UserError(f"There is no params file {path}; make one with tune --output {path}.")
        content = read_json(path)
        if content.get("format") != FORMAT:
            raise UserError(f"{path} is not a params file; make one with tune.")
        if content.get("format_version") != FORMAT_VERSION:
            raise UserError(
                f"{path} has format version {shortened(content.get('format_version'))}, this program reads version "
                f"{FORMAT_VERSION}; tune again."
            )
        content = check_seal(path, content, "tune again")
        check_json(content, ParamsJSON, path, "tune again")
        settings, tuned_for = content["settings"], content["tuned_for"]
        if unknown := sorted(set(settings) - set(NAMES)):
            raise UserError(
                f"{path} has the unknown setting {shortened(unknown[0])}; a params file has {', '.join(NAMES)}."
            )
        if settings.get("min_knns") == "inf":
            settings["min_knns"] = float("inf")
        if tuned_for.get("keys_sha256") != store.keys_checksum:
            model = store.manifest.model["pretrained"]
            raise UserError(
                f"{path} was tuned for another datastore ({tuned_for.get('datastore')}, of the model "
                f"{tuned_for.get('model')}) than {store.label} (of {model}); tune again for this one."
            )
        if tuned_with := tuned_for.get("measured_with"):
            logger.warning(
                "The params of %s were tuned when the datastore had %s entries, and now it has %s: they may not fit.",
                path,
                f"{tuned_with['count']:,}",
                f"{store.kept:,}",
            )
        return cls(settings, tuned_for)

    def check_conditions(self, settings: dict[str, Any]) -> None:
        """Warn where the settings in force decide for other distances than those that were tuned with."""
        then = self.tuned_for.get("conditions", {})
        if changed := [name for name in CONDITIONS if then.get(name) != settings.get(name)]:
            logger.warning(
                "The params were tuned with %s, now it is %s: they may not fit.",
                _in_words(then, changed),
                _in_words(settings, changed),
            )

    def check_contents(self, store: Store, index: dict[str, str], clusters: Clusters | JoinedClusters | None) -> None:
        """Warn where index or clusters are not those that were tuned with, though they have the same names.

        ``index`` is the checksums of the index's files, by name.
        """
        then = self.tuned_for.get("contents", {})
        now = tuned_contents(index, clusters) if then else {}
        changed = [name for name in now if name in then and then[name] != now[name]]
        if changed:
            logger.warning(
                "The params were tuned with other content of %s than %s has under that name now: they may not fit.",
                " and ".join(changed),
                store.label,
            )


def _in_words(settings: Mapping[str, Any], names: list[str]) -> str:
    """Some settings as arguments; what is not in force has none."""
    said = [f"{name}={value}" for name in names if (value := settings.get(name)) is not None]
    return ", ".join(said) or f"no {names[0]}"


def tuned_contents(index: dict[str, str], clusters: Clusters | JoinedClusters | None) -> dict[str, dict[str, str]]:
    """The SHA-256 of the files whose content decides what distances there are, by file, of index and clusters.

    ``index`` is the checksums of the index's files, by name.
    """
    contents = {"index": index, "clusters": {} if clusters is None else clusters.checksums()}
    # The JSON beside them also says when they were made.
    return {
        what: {name: checksum for name, checksum in files.items() if not name.endswith(".json")}
        for what, files in contents.items()
        if files
    }


def find_params(given: str | os.PathLike | bool | None, store: Store) -> tuple[Params | None, str]:
    """The params in force and where they come from: ``params`` (the file given) or ``store default``.

    Parameters
    ----------
    given : a file; None takes the store's default where it has one, False none. Several stores have none together.
    """
    if given is None:
        if isinstance(store, JoinedStore):
            return None, "store default"
        default = store.path / STORE_DEFAULT
        return (Params.read(default, store) if default.exists() else None), "store default"
    if isinstance(given, bool):
        if given:
            raise UserError("params=True is no file; give params=FILE, or params=False for none.")
        return None, "params"
    return Params.read(Path(given), store), "params"
