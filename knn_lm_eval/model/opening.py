"""Opening what the retrieval settings name: datastore, tuned params, index, clusters; needs no model.

The lm-eval model and the context manager share this, so their arguments mean the same.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from knn_lm_eval.errors import UserError
from knn_lm_eval.lm.fingerprint import check_store_model
from knn_lm_eval.lm.language_model import LanguageModel
from knn_lm_eval.lm.projection import Projection
from knn_lm_eval.methods.automaton import Automaton, AutomatonSettings
from knn_lm_eval.methods.mixture import Mixture
from knn_lm_eval.model.exclusion import Exclusion
from knn_lm_eval.model.ngram_mixture import NgramMixture
from knn_lm_eval.model.params import Params, find_params
from knn_lm_eval.model.settings import RetrievalSettings, SettingsInForce
from knn_lm_eval.model.stores import OpenedStores, open_stores
from knn_lm_eval.search.code_distances import CodeDistances
from knn_lm_eval.search.exact_retriever import ExactRetriever
from knn_lm_eval.search.gpu_choice import (
    CPU,
    IN_MEMORY,
    INDEX,
    STREAMED,
    Choice,
    IndexAtHand,
    choose_place,
    obstacle_on_gpus,
    visible_gpus,
)
from knn_lm_eval.search.index_retriever import LocalRetriever
from knn_lm_eval.search.joined_retriever import JoinedDistances, JoinedRetriever
from knn_lm_eval.search.retriever import Retriever, StoreRetriever
from knn_lm_eval.store.choosing import OF_STORE
from knn_lm_eval.store.clusters import Clusters
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.index_files import EXACT, find_parts, searched_index
from knn_lm_eval.store.joined import JoinedClusters, JoinedStore, Store, open_clusters, stores_of
from knn_lm_eval.store.suffixes import open_suffixes
from knn_lm_eval.system.timing import now

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Augmentation:
    """A datastore, opened to be mixed into an LM.

    Attributes
    ----------
    retriever : the store, its index, and how they are searched.
    given : the store or stores that were named, those that are left out among them.
    automaton : RetoMaton's; None where every position is searched.
    mixture : weight and temperature.
    key_type, key_module : which hidden state is the key, as for ``LanguageModel``.
    settings : those in force.
    record : the same, as they stand in results; an adaptive lmbda in its plain form.
    sources : where they come from: ``given``, ``params``, ``store default``, ``default`` or ``index``; the store for
        all others.
    ngrams : the n-gram LM that is mixed in after the neighbours; None for none.
    exclusion : what is left out of the neighbours; None for nothing.
    """

    retriever: Retriever
    given: Store
    automaton: Automaton | None
    mixture: Mixture
    key_type: str
    key_module: str | None
    settings: RetrievalSettings
    record: dict[str, Any]
    sources: dict[str, str]
    ngrams: NgramMixture | None = None
    exclusion: Exclusion | None = None

    @property
    def is_lm_alone(self) -> bool:
        """Whether nothing is mixed into the LM."""
        return self.mixture.is_lm_alone and self.ngrams is None

    @property
    def searches_all(self) -> bool:
        """Whether all texts are read before one search for all: as was given, or where the keys stream from disk."""
        if self.settings.search_all is not None:
            return self.settings.search_all
        return any(isinstance(part, ExactRetriever) and part.streams for part in self.retriever.of_stores)

    def language_model(
        self, model: nn.Module, tokenizer: Any, name: str | None = None, autocast_dtype: torch.dtype | None = None
    ) -> LanguageModel:
        """``model`` as the LM whose keys are the datastore's.

        Parameters
        ----------
        model, autocast_dtype : as for ``LanguageModel``.
        tokenizer : the model's; None is not compared with the datastore's.
        name : of the model, for messages.

        Raises
        ------
        UserError
            As ``LanguageModel``, and where the datastore was not made by this model and tokenizer.
        """
        lm, store = LanguageModel(model, self.key_type, autocast_dtype, self.key_module), self.retriever.datastore
        for one in stores_of(store):
            check_store_model(one.manifest, lm, tokenizer, name or f"a given {type(lm.inner).__name__}")
        return lm if store.projection is None else lm.projected(Projection(store.projection))


def open_augmentation(given: RetrievalSettings) -> Augmentation:
    """Check the settings against each other and against the datastore, and open what they name.

    Raises
    ------
    UserError
        Where a setting does not fit the datastore, the index or another setting.
    """
    stores = open_stores(given)
    store = stores.store
    tuned, source = find_params(given.params, stores.given)
    in_force = given.in_force(tuned, source)
    settings, weight = in_force.settings, in_force.weight
    _warn_of_untuned_defaults(given, in_force, tuned)
    key_type = _check_key_type(settings, store)
    if settings.retomaton:
        _check_walks_over_several(settings, stores)
    exclusion = _open_exclusion(settings, store)
    retriever = _open_retriever(settings, stores)
    automaton = clusters = None
    if settings.retomaton:
        if settings.search_all:
            raise UserError(
                "search_all=True is not for RetoMaton, where a step's search depends on the step before; leave one out."
            )
        store.require_text_order("RetoMaton")
        if weight.threshold is not None:
            raise UserError(
                f"The lmbda ({in_force.sources['lmbda']}) is a gate with a threshold, which decides where kNN-LM "
                f"searches; RetoMaton has min_knns for it: give lmbda=..., or other params."
            )
        if settings.carry_state and weight.constant is None:
            raise UserError("carry_state=True needs a number for lmbda, not an adaptive one: give lmbda=...")
        clusters = None if settings.clusters is None else open_clusters(store, str(settings.clusters))
        if not settings.no_pointer and weight.constant != 0:
            automaton, retriever = open_automaton(retriever, settings.automaton(), clusters, exclusion)
    elif settings.clusters is not None:
        raise UserError("clusters is for RetoMaton; give retomaton=True as well.")
    record = _record(settings, retriever, key_type, stores)
    if tuned:
        tuned.check_conditions(record)
        if given.sources is None and given.exclude is None:  # else there are other files, which the record says
            tuned.check_contents(store, retriever.checksums(), clusters)
    assert settings.knn_temp is not None
    return Augmentation(
        retriever=retriever,
        given=stores.given,
        automaton=automaton,
        mixture=Mixture(weight, settings.knn_temp),
        key_type=key_type,
        key_module=settings.key_module or store.manifest.key_module,
        settings=settings,
        record=record,
        sources=in_force.sources,
        ngrams=_open_ngrams(settings, stores),
        exclusion=exclusion,
    )


def _open_ngrams(settings: RetrievalSettings, stores: OpenedStores) -> NgramMixture | None:
    """The n-gram LM over the text of all stores together."""
    if not settings.ngram_lmbda:
        return None
    if len(set(stores.weights)) > 1:
        raise UserError(
            "ngram_lmbda counts n-grams of several datastores alike: leave it or datastore_weights out, or give all "
            "stores one weight."
        )
    if parts := _parts_of_stores(settings):
        raise UserError(
            f"ngram_lmbda leaves out whole datastores only, not {parts[0]}: leave ngram_lmbda out, or remove the "
            f"documents with remove_documents and build the suffix array again."
        )
    return NgramMixture(open_suffixes(stores.store), settings.ngram_lmbda)


def _open_exclusion(settings: RetrievalSettings, store: Store) -> Exclusion | None:
    """What ``exclude_overlap`` leaves out."""
    if settings.exclude_overlap is None:
        return None
    if settings.ngram_lmbda:
        raise UserError(
            "exclude_overlap leaves neighbours out, while n-grams are counted however many tokens they have in common "
            "with the text: leave exclude_overlap or ngram_lmbda out."
        )
    return Exclusion(store, settings.exclude_overlap)


def _parts_of_stores(settings: RetrievalSettings) -> list[str]:
    """What ``sources`` and ``exclude`` name that is not a whole store."""
    return [part for part in (*(settings.sources or ()), *(settings.exclude or ())) if OF_STORE in part]


def open_automaton(
    retriever: Retriever,
    settings: AutomatonSettings,
    clusters: Clusters | JoinedClusters | None,
    exclusion: Exclusion | None = None,
) -> tuple[Automaton, Retriever]:
    """RetoMaton over a retriever's datastore, and the retriever that it searches with.

    That is another one where the index gives no distances to given entries, see ``Retriever.with_distances``: the
    pointers' distances must be of the same kind as the search's.

    Parameters
    ----------
    clusters : None is pointers alone.
    exclusion : what the walks leave out; None for nothing.

    Raises
    ------
    UserError
        Where exact distances take keys and the store has none, or where it is in no text order.
    """
    store = retriever.datastore
    store.require_text_order("RetoMaton")
    retriever, distances = retriever.with_distances()
    csr = None if clusters is None else (clusters.cluster_of_entry, clusters.member_starts, clusters.members)
    arrays = retriever.values, store.document_starts, csr
    kept = None if store.removed is None else store.removed.kept_bits
    leaves_out = None if exclusion is None else exclusion.is_left_out
    if isinstance(distances, (CodeDistances, JoinedDistances)):
        by_codes, prepare = distances.of_transformed, distances.transformed
        return Automaton(*arrays, retriever.find, by_codes, settings, now, prepare, kept, leaves_out), retriever
    return Automaton(*arrays, retriever.find, distances, settings, now, None, kept, leaves_out), retriever


def _warn_of_untuned_defaults(given: RetrievalSettings, in_force: SettingsInForce, tuned: Params | None) -> None:
    # Whoever gives params=False knows what the defaults are.
    if tuned is not None or given.params is False or in_force.weight.constant == 0:
        return
    shown = [
        getattr(in_force.settings, name) if in_force.sources[name] == "default" else "given"
        for name in ("lmbda", "knn_temp")
    ]
    if shown != ["given", "given"]:
        logger.warning(
            "knn-hf runs untuned defaults (lmbda=%s, knn_temp=%s), and the best ones differ between LMs and "
            "datastores by more than a factor of ten: tune them with `knn-lm-eval tune`.",
            *shown,
        )


def _check_key_type(settings: RetrievalSettings, store: Store) -> str:
    key_type = store.manifest.key_type
    if settings.knn_keytype not in (None, key_type):
        raise UserError(
            f"knn_keytype={settings.knn_keytype}, but the keys of the datastore {store.label} are {key_type}; "
            f"leave knn_keytype out, or dump a datastore with --knn_keytype {settings.knn_keytype}."
        )
    return key_type


def _check_walks_over_several(settings: RetrievalSettings, stores: OpenedStores) -> None:
    if isinstance(stores.store, JoinedStore) and settings.retriever == "ray":
        raise UserError(
            "RetoMaton over several datastores follows pointers in this process: leave retriever=ray out, or name one "
            "datastore."
        )
    if any(weight != stores.weights[0] for weight in stores.weights):
        raise UserError("datastore_weights is for kNN-LM: leave it out with RetoMaton, whose candidates count once.")


def _open_retriever(settings: RetrievalSettings, stores: OpenedStores) -> Retriever:
    """What searches the store, or all of several."""
    store = stores.store
    if not isinstance(store, JoinedStore):
        return _open_store_retriever(settings, store)
    assert settings.k is not None and settings.knn_temp is not None
    retrievers = [
        _open_store_retriever(replace(settings, k=max(1, min(settings.k, one.kept))), one) for one in store.stores
    ]
    retriever = JoinedRetriever(store, retrievers, settings.k, stores.weights, settings.knn_temp)
    if len({part.kind_of_distances for part in retrievers}) > 1:
        logger.warning(
            "Exact and approximate distances are compared (%s): give recompute_dists=True, or index=%s.",
            ", ".join(f"{name}: {part.kind_of_distances}" for name, part in zip(store.names, retrievers, strict=True)),
            EXACT,
        )
    return retriever


def _open_store_retriever(settings: RetrievalSettings, store: Datastore) -> StoreRetriever:
    assert settings.k is not None
    _check_left_out_for_ray(settings)
    index = searched_index(store.path, store.manifest.derived, settings.index)
    if settings.retriever == "ray":
        if settings.knn_gpu:
            raise UserError("knn_gpu=True is for the local retriever: Ray's shards search on CPUs; leave one out.")
        from knn_lm_eval.search.ray_retriever import RayExactRetriever, RayRetriever

        if index is None:
            return RayExactRetriever(store, settings.k, settings.knn_sim_func, settings.address, settings.replicas)
        searching = settings.k, settings.probe, settings.knn_sim_func, settings.recompute_dists
        return RayRetriever(store, *searching, index, settings.address, settings.replicas)
    if settings.replicas > 1:
        raise UserError(f"replicas={settings.replicas} is for Ray: give retriever=ray as well, or leave it out.")
    if settings.knn_gpu:
        return _open_on_gpus(settings, store, index)
    if index is None:
        return ExactRetriever(store, settings.k, settings.knn_sim_func, settings.knn_device)
    searching = settings.k, settings.probe, settings.knn_sim_func, settings.recompute_dists
    return LocalRetriever(store, *searching, False, index)


def _check_left_out_for_ray(settings: RetrievalSettings) -> None:
    parts = _parts_of_stores(settings)
    if settings.retriever == "ray" and parts:
        raise UserError(
            f"retriever=ray leaves out whole datastores only, not {parts[0]}: leave retriever=ray out, or remove the "
            f"documents with remove_documents."
        )


def _open_on_gpus(settings: RetrievalSettings, store: Datastore, index: str | None) -> StoreRetriever:
    """As ``_open_store_retriever``, at the place that ``choose_place`` finds best; a named index is searched."""
    assert settings.k is not None
    metadata = None if index is None else find_parts(store, index)[0]
    at_hand, sim_func = None, settings.knn_sim_func
    if metadata is not None:
        obstacle = obstacle_on_gpus(metadata["factory"], store.dimension, metadata["sim_func"])
        if store.removed is not None:
            obstacle = "documents were removed, and faiss cannot leave entries out on GPUs"
        at_hand = IndexAtHand(metadata["bytes"], obstacle)
        sim_func = sim_func or metadata["sim_func"]
    wants_exact = store.keys is not None and (index is None or settings.index is None)
    key_bytes = store.keys.nbytes if wants_exact and store.keys is not None else None
    choice = choose_place(visible_gpus(settings.knn_device), key_bytes, at_hand, settings.k)
    retriever: StoreRetriever
    if index is None or choice.place in (IN_MEMORY, STREAMED):
        retriever = ExactRetriever(store, settings.k, sim_func, settings.knn_device)
    else:
        searching = settings.k, settings.probe, settings.knn_sim_func, settings.recompute_dists
        retriever = LocalRetriever(store, *searching, choice.place == INDEX, index)
        if choice.place == INDEX and not retriever.on_gpus:
            choice = Choice(CPU, "faiss could not put the index on GPUs")
    retriever.searched_on = f"{choice.place} ({choice.reason})"
    logger.info("knn_gpu=True searches on: %s", retriever.searched_on)
    return retriever


def _record(settings: RetrievalSettings, retriever: Retriever, key_type: str, stores: OpenedStores) -> dict[str, Any]:
    """The settings in force, by name, as far as they count."""
    record = {name: getattr(settings, name) for name in settings.tunable}
    if not settings.ngram_lmbda:
        del record["ngram_lmbda"]
    record |= {
        "probe": retriever.probe,
        "knn_sim_func": retriever.sim_func,
        "knn_keytype": key_type,
        "recompute_dists": retriever.recompute_dists,
        "index": retriever.name,
    }
    if isinstance(stores.store, JoinedStore):
        record["datastore_weights"] = dict(zip(stores.store.names, stores.weights, strict=True))
    for name, parts in (("sources", settings.sources), ("exclude", settings.exclude)):
        record |= {} if parts is None else {name: list(parts)}
    if settings.exclude_overlap is not None:
        record["exclude_overlap"] = settings.exclude_overlap
    if settings.retriever != "local":
        record |= {name: getattr(settings, name) for name in ("retriever", "address", "replicas")}
    if settings.retomaton:
        record |= {name: getattr(settings, name) for name in ("retomaton", "no_pointer", "clusters", "duplicates")}
    return record
