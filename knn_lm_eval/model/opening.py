"""What a retrieval-augmented LM needs beside the LM: its settings, checked, and what they open.

The lm-eval model and the context manager share this, so their arguments mean the same.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any, Literal

from knn_lm_eval.errors import UserError
from knn_lm_eval.lm.fingerprint import check_store_model
from knn_lm_eval.lm.language_model import CausalLM
from knn_lm_eval.methods.adaptive import Lmbda, plain_lmbda, read_lmbda
from knn_lm_eval.methods.automaton import Automaton, AutomatonSettings, PointerDistances
from knn_lm_eval.model.params import find_params
from knn_lm_eval.search.code_distances import CodeDistances
from knn_lm_eval.search.retriever import LocalRetriever, Retriever
from knn_lm_eval.store.clusters import Clusters
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.fetching import open_datastore
from knn_lm_eval.store.index_files import DEFAULT_INDEX

logger = logging.getLogger(__name__)

DATASTORE_VARIABLE = "KNN_LM_EVAL_DATASTORE"
# The papers' settings.
DEFAULTS = {"k": 1024, "lmbda": 0.25, "knn_temp": 1.0, "min_knns": 1, "max_knns": 1024}


@dataclass(frozen=True)
class Augmentation:
    """A datastore, opened to be mixed into an LM.

    Attributes
    ----------
    retriever : the store, its index, and how they are searched.
    automaton : RetoMaton's; None where every position is searched.
    lmbda, knn_temp : the mixture's weight (a number or an adaptive one) and temperature.
    key_type, key_module : which hidden state is the key, as for ``CausalLM``.
    settings : all settings as they are in force; an adaptive lmbda in its plain form.
    sources : where they come from: ``given``, ``params``, ``store default``, ``default`` or ``index``; the store for
        all others.
    """

    retriever: Retriever
    automaton: Automaton | None
    lmbda: Lmbda
    knn_temp: float
    key_type: str
    key_module: str | None
    settings: dict[str, Any]
    sources: dict[str, str]

    @classmethod
    def open(
        cls,
        datastore: str | os.PathLike | None = None,
        *,
        params: str | os.PathLike | bool | None = None,
        k: int | None = None,
        lmbda: float | dict | None = None,
        knn_temp: float | None = None,
        probe: int | None = None,
        knn_sim_func: str | None = None,
        knn_keytype: str | None = None,
        key_module: str | None = None,
        recompute_dists: bool = False,
        knn_gpu: bool = False,
        index: str = DEFAULT_INDEX,
        retriever: Literal["local", "ray"] = "local",
        address: str = "auto",
        retomaton: bool = False,
        min_knns: float | None = None,
        max_knns: int | None = None,
        no_pointer: bool = False,
        clusters: str | None = None,
        duplicates: Literal["keep", "merge"] = "merge",
    ) -> Augmentation:
        """Check the settings (those of ``KNNHF``) and open what they name; needs no model.

        Raises
        ------
        UserError
            Where a setting is out of range, or does not fit the datastore or the index.
        """
        store = find_datastore(datastore)
        tuned, source = find_params(params, store)
        given = {"k": k, "lmbda": lmbda, "knn_temp": knn_temp, "probe": probe}
        if retomaton:
            given |= {"min_knns": min_knns, "max_knns": max_knns}
        settings: dict[str, Any] = {}
        sources: dict[str, str] = {}
        for name, value in given.items():
            if value is not None:
                settings[name], sources[name] = value, "given"
            elif tuned and name in tuned.settings:
                settings[name], sources[name] = tuned.settings[name], source
            else:
                settings[name] = DEFAULTS.get(name)
                sources[name] = "index" if name == "probe" else "default"
        weight = read_lmbda(settings["lmbda"])
        _check_ranges(settings)
        settings["lmbda"] = plain_lmbda(weight)
        # Whoever gives params=False knows what the defaults are.
        if (
            tuned is None
            and params is not False
            and weight != 0
            and "default" in (sources["lmbda"], sources["knn_temp"])
        ):
            logger.warning(
                "knn-hf runs untuned defaults (lmbda=%s, knn_temp=%s), and the best ones differ between LMs and "
                "datastores by more than a factor of ten: tune them with `knn-lm-eval tune`.",
                *(settings[name] if sources[name] == "default" else "given" for name in ("lmbda", "knn_temp")),
            )
        key_type = store.manifest["key_type"]
        if knn_keytype not in (None, key_type):
            raise UserError(
                f"knn_keytype={knn_keytype}, but the keys of the datastore {store.path} are {key_type}; "
                f"leave knn_keytype out, or dump a datastore with --knn_keytype {knn_keytype}."
            )
        how = settings["k"], settings["probe"], knn_sim_func, recompute_dists
        searching: Retriever
        if retriever == "ray":
            if knn_gpu:
                raise UserError("knn_gpu=True is for the local retriever: Ray's shards search on CPUs; leave one out.")
            from knn_lm_eval.search.ray_retriever import RayRetriever

            searching = RayRetriever(store, *how, index, address)
        elif retriever == "local":
            searching = LocalRetriever(store, *how, knn_gpu, index)
        else:
            raise UserError(f"retriever={retriever!r} is unknown; use local or ray.")
        automaton = None
        if retomaton:
            store.require_text_order("RetoMaton")
            walk = AutomatonSettings(
                settings["k"], settings["knn_temp"], settings["min_knns"], settings["max_knns"], duplicates
            )
            _check_automaton(walk)
            if not isinstance(weight, float) and weight.threshold is not None:
                raise UserError(
                    f"The lmbda ({sources['lmbda']}) is a gate with a threshold, which decides where kNN-LM searches; "
                    f"RetoMaton has min_knns for it: give lmbda=..., or other params."
                )
            chosen = None if clusters is None else Clusters.open(store, str(clusters))
            if not no_pointer and weight != 0:
                automaton, searching = open_automaton(searching, walk, chosen)
        elif clusters is not None:
            raise UserError("clusters is for RetoMaton; give retomaton=True as well.")
        settings |= {
            "probe": searching.probe,
            "knn_sim_func": searching.sim_func,
            "knn_keytype": key_type,
            "recompute_dists": searching.recompute_dists,
            "index": index,
        }
        if retriever == "ray":
            settings |= {"retriever": retriever, "address": address}
        if retomaton:
            settings |= {
                "retomaton": True,
                "no_pointer": no_pointer,
                "clusters": clusters,
                "duplicates": duplicates,
            }
        if tuned:
            tuned.check_conditions(settings)
        key_module = key_module or store.manifest.get("key_module")
        return cls(searching, automaton, weight, settings["knn_temp"], key_type, key_module, settings, sources)

    def check_model(self, model: CausalLM, tokenizer: Any, name: str) -> None:
        """Raise UserError where the datastore was not made by this model (and tokenizer, unless it is None)."""
        check_store_model(self.retriever.datastore.manifest, model, tokenizer, name)


def open_automaton(
    retriever: Retriever, settings: AutomatonSettings, clusters: Clusters | None
) -> tuple[Automaton, Retriever]:
    """RetoMaton over a retriever's datastore, and the retriever that it searches with; ``clusters`` None is pointers
    alone."""
    store = retriever.datastore
    csr = None if clusters is None else (clusters.cluster_of_entry, clusters.member_starts, clusters.members)
    distances, retriever = pointer_distances(retriever)
    return Automaton(retriever.values, store.document_starts, csr, retriever.find, distances, settings), retriever


def pointer_distances(retriever: Retriever) -> tuple[PointerDistances, Retriever]:
    """Distances of pointers, and a retriever whose distances are of the same kind.

    Raises UserError where that takes keys and the store has none, or where the store is in no text order.
    """
    retriever.datastore.require_text_order("RetoMaton")
    if not retriever.recompute_dists:
        codes = CodeDistances.open(retriever.datastore, retriever.cpu_index, retriever.index_name)
        if codes is not None:
            return retriever.distances_to(codes), retriever
        if retriever.metadata["factory"] != "Flat":
            logger.info(
                "RetoMaton has no distances by the codes of %s: exact ones are used for searches and pointers "
                "(recompute_dists=True).",
                retriever.metadata["factory"],
            )
            retriever = retriever.with_settings(recompute_dists=True)
    return retriever.distances_to(None), retriever


def find_datastore(path: str | os.PathLike | None) -> Datastore:
    """The datastore at ``path`` (a folder or an address), or that ``KNN_LM_EVAL_DATASTORE`` names."""
    path = path or os.environ.get(DATASTORE_VARIABLE)
    if not path:
        raise UserError(
            "knn-hf needs a datastore: give --model_args datastore=FOLDER, or set the environment variable "
            f"{DATASTORE_VARIABLE}; make one with `knn-lm-eval dump_datastore` and `knn-lm-eval build_index`."
        )
    return open_datastore(path)


def _check_ranges(settings: dict[str, Any]) -> None:
    """Raise UserError where a number is out of range; whole ones become int (a command line makes 1e3 a float)."""
    for name in ("k", "knn_temp", "probe", "min_knns", "max_knns"):
        value = settings.get(name)
        if value is None and name not in ("k", "knn_temp"):
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UserError(f"{name}={value!r} is not a number.")
        if name in ("k", "probe", "max_knns"):
            if value % 1 != 0:  # neither is infinity
                raise UserError(f"{name}={value} is not a whole number.")
            settings[name] = int(value)
    if not 0 < settings["knn_temp"] < float("inf"):
        raise UserError(f"knn_temp={settings['knn_temp']} must be a number above 0.")


def _check_automaton(settings: AutomatonSettings) -> None:
    if not settings.min_knns >= 0:
        raise UserError(f"min_knns={settings.min_knns} must be 0 or more (inf searches at every token).")
    if settings.max_knns < 1:
        raise UserError(f"max_knns={settings.max_knns} must be at least 1.")
    if settings.duplicates not in ("keep", "merge"):
        raise UserError(f"duplicates={settings.duplicates!r} is unknown; use keep or merge.")
