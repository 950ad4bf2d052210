"""``knn-hf``: lm-eval's Hugging Face model with kNN-LM or RetoMaton retrieval in its next-token distribution."""

from __future__ import annotations

import json
import logging
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import transformers
from lm_eval.api.registry import register_model

from knn_lm_eval.errors import MissingPackage, UserError, naming_missing_packages, report_user_errors

try:
    with naming_missing_packages():
        from knn_lm_eval.lm.fingerprint import tokenizer_checksum
        from knn_lm_eval.lm.language_model import LanguageModel
        from knn_lm_eval.lm.loading import recorded_arguments
        from knn_lm_eval.lm.reading import Reader
        from knn_lm_eval.model.accounting import (
            COUNTS_OF_SHARDS,
            REPORTED_COUNTS,
            Work,
            describe_store,
            excluded,
            ngram_matches,
            retrieval_work,
            rounded,
            saved_searches,
            total,
        )
        from knn_lm_eval.model.generation import MixedForward
        from knn_lm_eval.model.one_pass import OnePassScorer
        from knn_lm_eval.model.opening import Augmentation, open_augmentation
        from knn_lm_eval.model.overlaps import find_overlaps
        from knn_lm_eval.model.records import RecordFolder
        from knn_lm_eval.model.retomaton import RetomatonScorer
        from knn_lm_eval.model.scoring import KNNScorer, LMScorer, PassageScorer
        from knn_lm_eval.model.scoring_lm import ScoringLM
        from knn_lm_eval.model.search_cost import tell_costly_search
        from knn_lm_eval.model.settings import RetrievalSettings
        from knn_lm_eval.search.retriever import Retriever
        from knn_lm_eval.store.joined import open_clusters, stores_of
        from knn_lm_eval.store.suffixes import suffixes_checksums
        from knn_lm_eval.system.files import check_writable
except MissingPackage:
    report_user_errors()  # lm-eval's command line imports this first of all of ours
    raise

logger = logging.getLogger(__name__)


@register_model("knn-hf")
class KNNHF(ScoringLM):
    """A Hugging Face causal LM with kNN-LM or RetoMaton retrieval, for every lm-eval task.

    Parameters
    ----------
    pretrained : as for lm-eval's ``hf``; None takes the model that made the datastore.
    **arguments : the fields of ``RetrievalSettings``, where they are described, and all other arguments of ``hf``.

    Attributes
    ----------
    augmentation : the datastore and how it is mixed into the LM.
    settings : the retrieval settings in force, as they stand in results.

    Raises
    ------
    UserError
        Where an argument is out of range, or the datastore, the index and the model do not belong together.
    """

    def __init__(self, pretrained: str | transformers.PreTrainedModel | None = None, **arguments: Any) -> None:
        self.refuse_mistyped(arguments)
        given, lm_arguments = RetrievalSettings.take_from(arguments)
        # All that can be wrong without the model is looked at before minutes are spent on loading it.
        opened = open_augmentation(given)
        if given.records is not None:
            check_writable(Path(given.records) / ".trial")
        if pretrained is None:
            store = opened.retriever.datastore
            lm_arguments = recorded_arguments(store.manifest.model) | lm_arguments
            pretrained = lm_arguments.pop("pretrained")
            if pretrained is None:
                raise UserError(f"The datastore {store.label} does not know its model; give pretrained=MODEL.")
        # gguf_file, subfolder, quantisation and the like: what a cache of results must not mix up.
        self._loading = {
            name: str(value)
            for name, value in lm_arguments.items()
            if isinstance(value, (str, int, float)) and name not in ("batch_size", "max_batch_size", "device")
        }
        super().__init__(pretrained, **lm_arguments)
        self.context_len = given.context_len
        self.check_context_len()

        name = pretrained if isinstance(pretrained, str) else None
        model = opened.language_model(self.model, self.tokenizer, name, self.mixed_precision_dtype)
        tell_costly_search(opened, model)
        self.augmentation = opened
        self.scorer = _scorer(model, opened, self.softmax_dtype)
        self.mixed_forward = MixedForward(model, opened)
        self.carry_state = given.retomaton and given.carry_state
        self._work_of_all: list[Work] | None = None  # each process's, when ``gather_object`` collected it
        self.settings = opened.record | {"key_module": model.key_module_name, "context_len": given.context_len}
        if given.retomaton:
            self.settings["carry_state"] = given.carry_state
        if given.records is not None:
            about, store = self._about_records(name), self.retriever.datastore
            self.records = RecordFolder(Path(given.records), about, self.rank, self.world_size, find_overlaps(store))
        self._tell_settings()

    @classmethod
    def argument_names(cls) -> list[str]:
        """The retrieval settings, and the arguments of ``hf``."""
        return [*RetrievalSettings.names(), *super().argument_names()]

    @property
    def retriever(self) -> Retriever:
        """The datastore, its index, and how they are searched."""
        return self.augmentation.retriever

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> KNNHF:
        """As lm-eval's, for its command line: user errors end the program with one sentence."""
        report_user_errors()
        return super().create_from_arg_string(arg_string, additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict, additional_config: dict | None = None) -> KNNHF:
        """As lm-eval's, for its command line: user errors end the program with one sentence."""
        report_user_errors()
        return super().create_from_arg_obj(arg_dict, additional_config)

    def _about_records(self, name: str | None) -> dict[str, Any]:
        """What records say of their run: the LM of this name, the settings, tokenizer and datastore."""
        store = self.retriever.datastore
        settings = {name: "inf" if value == math.inf else value for name, value in self.settings.items()}
        settings |= {"max_length": self.max_length, "lm_arguments": self._loading}
        return {
            "model": {"pretrained": name, "dtype": str(self.mixed_forward.model.inner.dtype).removeprefix("torch.")},
            "settings": settings,
            "tokenizer": {
                "name": getattr(self.tokenizer, "name_or_path", None) or None,
                "sha256": tokenizer_checksum(self.tokenizer),
            },
            "datastore": [
                {"path": str(one.path.resolve()), "keys_sha256": one.keys_checksum, "entries": len(one)}
                for one in stores_of(store)
            ],
        }

    def _tell_settings(self) -> None:
        shown = dict(self.settings)
        weight, sources = self.augmentation.mixture.weight, self.augmentation.sources
        if weight.constant is None:
            shown["lmbda"] = type(weight).__name__.lower()
        store = self.retriever.datastore
        logger.info(
            "knn-hf with the datastore %s (%s entries): %s",
            store.label,
            f"{len(store):,}",
            ", ".join(f"{name}={value} ({sources.get(name, 'store')})" for name, value in shown.items()),
        )

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **generation_kwargs: Any) -> Any:
        # HFLM's generate_until with the mixture in each decoding step, unless the LM is alone, as in hf.
        with self.mixed_forward if not self.augmentation.is_lm_alone else nullcontext():
            return super()._model_generate(context, max_length, stop, **generation_kwargs)

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Take lm-eval's ``--use_cache`` file, unless it holds results of another model or other settings."""
        database = getattr(cache_hook, "dbdict", None)
        if database is not None:
            if self.records is not None:
                raise UserError(
                    "records and --use_cache do not go together, for what is in the cache would leave no records; "
                    "leave one out."
                )
            identity = json.dumps(self._identity(), sort_keys=True)
            stored = database.get("knn_lm_eval identity")
            if stored != identity and len(database):
                raise UserError(
                    f"The cache {database.filename} holds results of another model or of other settings; "
                    f"give --use_cache another path."
                )
            database["knn_lm_eval identity"] = identity
        super().set_cache_hook(cache_hook)

    def _identity(self) -> dict[str, Any]:
        """What the results depend on."""
        store, clusters = self.retriever.datastore, self.settings.get("clusters")
        return {
            **self.settings,
            "fingerprint": store.manifest.fingerprint,
            "pretrained": str(self.pretrained) if isinstance(self.pretrained, str) else self.config.to_json_string(),
            "revision": str(self.revision),
            "peft": str(self.peft),
            "dtype": str(self.mixed_forward.model.inner.dtype),
            "softmax_dtype": str(self.softmax_dtype),
            "max_length": self.max_length,
            "add_bos_token": self.add_bos_token,
            "prefix_token_id": self.prefix_token_id,
            "files": store.manifest.files,
            **self.retriever.identity(),
            **({"suffixes": suffixes_checksums(store)} if self._looks_in_suffixes else {}),
            "clusters_files": None if clusters is None else open_clusters(store, str(clusters)).checksums(),
            "loading": self._loading,
        }

    @property
    def _looks_in_suffixes(self) -> bool:
        return self.augmentation.ngrams is not None or self.augmentation.exclusion is not None

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """As lm-eval's, which so collects the processes' results; what retrieval did in each goes along."""
        gathered = super().gather_object((obj, self._work()), dst)
        if gathered is None:
            return None
        objects, works = zip(*gathered, strict=True)
        self._work_of_all = list(works)
        return list(objects)

    def _work(self) -> Work:
        """What retrieval did in this process so far."""
        scored = Work(self.scorer.counts, self.scorer.seconds)
        return scored.plus(retrieval_work(self.retriever)).plus(self.mixed_forward.work)

    def get_model_info(self) -> dict[str, Any]:
        """lm-eval's model information, with the retrieval settings and what retrieval did (``knn``).

        Of several processes the counts and seconds are added up, once ``gather_object`` brought them together. Counted
        is what was done: lm-eval has processes with fewer requests than others do their last one again.
        """
        counts, seconds = total(self._work_of_all or [self._work()])
        of_shards = {name: counts[name] for name in COUNTS_OF_SHARDS} if "retriever" in self.settings else {}
        return super().get_model_info() | {
            "knn": {
                **of_shards,
                **saved_searches(counts, self.augmentation.mixture.weight.threshold is not None),
                **ngram_matches(counts),
                **excluded(counts),
                **self.settings,
                "setting_sources": self.augmentation.sources,
                "lm_arguments": self._loading,
                **describe_store(self.retriever, counts),
                "processes": self.world_size,
                **{name: counts[name] for name in REPORTED_COUNTS},
                "seconds": rounded(seconds),
            }
        }


def _scorer(model: LanguageModel, opened: Augmentation, softmax_dtype: Any) -> PassageScorer:
    """What scores as the settings say."""
    keeps_figures, exclusion = opened.settings.records is not None, opened.exclusion
    if opened.automaton is not None:
        reader = Reader(model, softmax_dtype)
        mixing = opened.mixture, opened.settings.carry_state, keeps_figures, opened.ngrams, exclusion
        return RetomatonScorer(reader, opened.automaton, *mixing)
    if opened.mixture.is_lm_alone:  # the neighbours would count for nothing: the search is left out
        return LMScorer(Reader(model, softmax_dtype), keeps_figures, opened.ngrams)
    if opened.searches_all:
        reader = Reader(model, softmax_dtype)
        return OnePassScorer(
            reader,
            opened.retriever,
            opened.mixture,
            keeps_figures=keeps_figures,
            ngrams=opened.ngrams,
            exclusion=exclusion,
        )
    reads_ahead = model.device.type == "cuda" and not opened.retriever.on_gpus
    reader = Reader(model, softmax_dtype, reads_ahead)
    return KNNScorer(reader, opened.retriever, opened.mixture, keeps_figures, opened.ngrams, exclusion)
