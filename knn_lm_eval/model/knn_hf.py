"""``knn-hf``: lm-eval's Hugging Face model with kNN-LM or RetoMaton retrieval in its next-token distribution."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import transformers
from accelerate import find_executable_batch_size
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from knn_lm_eval.errors import UserError, report_user_errors
from knn_lm_eval.lm.language_model import CausalLM
from knn_lm_eval.lm.loading import CausalHFLM, recorded_arguments
from knn_lm_eval.methods.adaptive import Gate
from knn_lm_eval.model.generation import MixedForward
from knn_lm_eval.model.opening import Augmentation
from knn_lm_eval.model.retomaton import RetomatonScorer
from knn_lm_eval.model.scores import RollingLoglikelihood
from knn_lm_eval.model.scoring import Passage, Score, Scorer
from knn_lm_eval.store.index_files import DEFAULT_INDEX
from knn_lm_eval.system.memory import resident_bytes

logger = logging.getLogger(__name__)

# A CPU gains nothing from larger batches and cannot find its limit by trial: batch_size=auto takes this many
# tokens there.
CPU_BATCH_TOKENS = 4096
REPORTED_COUNTS = ("tokens_scored", "positions_generated", "searches", "entries_compared")


class Group(NamedTuple):
    """Batches that are scored in one go, and the names of their passages, in order."""

    names: list[Any]
    batches: list[list[Passage]]


@register_model("knn-hf")
class KNNHF(CausalHFLM):
    """A Hugging Face causal LM with kNN-LM or RetoMaton retrieval, for every lm-eval task.

    Parameters
    ----------
    pretrained : as for lm-eval's ``hf``; None takes the model that made the datastore.
    datastore : the datastore's folder or address (https://... or hf://datasets/...); None takes the environment
        variable ``KNN_LM_EVAL_DATASTORE``.
    params : a file that ``tune`` wrote; None takes the one that the datastore has, if any, False takes none. It gives
        what is not given here of ``k``, ``lmbda``, ``knn_temp``, ``probe``, ``min_knns`` and ``max_knns``.
    k : neighbours per token (default 1024).
    lmbda : the weight of p_kNN in the mixture, 0 to 1 (default 0.25), or the plain form of an adaptive weight.
    knn_temp : the temperature of the softmax over distances (default 1).
    probe : inverted lists that a search visits; None takes what the index was found to need when built.
    knn_sim_func : ``l2`` or ``dot``; None takes the index's.
    knn_keytype : ``last_ffn_input`` or ``last_ffn_output``; None takes the datastore's.
    key_module : the name of the submodule whose input (or output) is the key; None takes the datastore's.
    recompute_dists : use exact distances from the keys on disk instead of the index's approximations.
    knn_gpu : search on all visible GPUs (needs faiss-gpu).
    index : the name of the datastore's index.
    retriever : ``local`` (default) searches in this process; ``ray`` searches the index's parts on a Ray cluster,
        whose nodes must see the datastore's folder at the same path.
    address : with ``retriever=ray``, the cluster: ``HOST:PORT``; ``auto`` (default) joins the one that runs on this
        machine, or starts one.
    context_len : in rolling log-likelihoods, the tokens of context that each scored token has at least, where
        the text has them; 1 is lm-eval's disjoint windows, half of ``max_length`` the kNN-LM papers' protocol.
    retomaton : follow pointers instead of searching at every token (Alon et al. 2022).
    min_knns : with RetoMaton, search where fewer candidates survived (default 1); ``inf`` searches everywhere.
    max_knns : with RetoMaton, pointers and cluster members considered per token (default 1024).
    no_pointer : with RetoMaton, follow none: plain kNN-LM, for comparison.
    clusters : with RetoMaton, the name of the clustering that extends the pointers; None is none.
    duplicates : with RetoMaton, ``merge`` (default) counts a candidate once, ``keep`` as often as it comes up,
        as the published code does.
    carry_state : with RetoMaton and ``context_len`` above 1, windows of one text continue each other's walk.
    **kwargs : all other arguments of ``hf``.

    Raises
    ------
    UserError
        Where an argument is out of range, or the datastore, the index and the model do not belong together.
    """

    def __init__(
        self,
        pretrained: str | transformers.PreTrainedModel | None = None,
        *,
        datastore: str | os.PathLike | None = None,
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
        context_len: int = 1,
        retomaton: bool = False,
        min_knns: float | None = None,
        max_knns: int | None = None,
        no_pointer: bool = False,
        clusters: str | None = None,
        duplicates: Literal["keep", "merge"] = "merge",
        carry_state: bool = False,
        **kwargs: Any,
    ) -> None:
        # All that can be wrong without the model is looked at before minutes are spent on loading it.
        opened = Augmentation.open(
            datastore,
            params=params,
            k=k,
            lmbda=lmbda,
            knn_temp=knn_temp,
            probe=probe,
            knn_sim_func=knn_sim_func,
            knn_keytype=knn_keytype,
            key_module=key_module,
            recompute_dists=recompute_dists,
            knn_gpu=knn_gpu,
            index=index,
            retriever=retriever,
            address=address,
            retomaton=retomaton,
            min_knns=min_knns,
            max_knns=max_knns,
            no_pointer=no_pointer,
            clusters=clusters,
            duplicates=duplicates,
        )
        if opened.automaton and carry_state and not isinstance(opened.lmbda, float):
            raise UserError("carry_state=True needs a number for lmbda, not an adaptive one: give lmbda=...")
        store = opened.retriever.datastore
        if pretrained is None:
            kwargs = recorded_arguments(store.manifest["model"]) | kwargs
            pretrained = kwargs.pop("pretrained")
            if pretrained is None:
                raise UserError(f"The datastore {store.path} does not know its model; give pretrained=MODEL.")
        # gguf_file, subfolder, quantisation and the like: what a cache of results must not mix up.
        self._loading = {
            name: str(value)
            for name, value in kwargs.items()
            if isinstance(value, (str, int, float)) and name not in ("batch_size", "max_batch_size", "device")
        }
        super().__init__(pretrained, **kwargs)
        if not 1 <= context_len <= self.max_length:
            raise UserError(f"context_len={context_len} must be between 1 and max_length={self.max_length}.")
        self.context_len = context_len

        model = CausalLM(self.model, opened.key_type, self.mixed_precision_dtype, opened.key_module)
        name = pretrained if isinstance(pretrained, str) else f"a given {type(model.inner).__name__}"
        opened.check_model(model, self.tokenizer, name)
        self.retriever = opened.retriever
        self.scorer: Scorer
        if opened.automaton:
            self.scorer = RetomatonScorer(
                model, self.retriever, opened.lmbda, opened.automaton, self.softmax_dtype, carry_state
            )
        else:
            # With lmbda=0 the neighbours would count for nothing: the search is left out.
            searched = self.retriever if opened.lmbda != 0 else None
            self.scorer = Scorer(model, searched, opened.lmbda, opened.knn_temp, self.softmax_dtype)
        self.mixed_forward = MixedForward(model, opened)
        self.carry_state = retomaton and carry_state
        self._work_of_all: Any = None  # each process's ``_work``, when ``gather_object`` collected it
        self.settings = opened.settings | {"key_module": model.key_module_name, "context_len": context_len}
        if retomaton:
            self.settings["carry_state"] = carry_state
        self.setting_sources = sources = opened.sources
        adaptive = {} if isinstance(opened.lmbda, float) else {"lmbda": type(opened.lmbda).__name__.lower()}
        shown = (f"{name}={value} ({sources.get(name, 'store')})" for name, value in (self.settings | adaptive).items())
        logger.info("knn-hf with the datastore %s (%s entries): %s", store.path, f"{len(store):,}", ", ".join(shown))

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

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each request's whole text, in windows with ``context_len`` tokens of context.

        Returns
        -------
        One ``RollingLoglikelihood`` per request: the sum, which also knows the number of tokens.
        """
        windows: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=self.context_len,
            )
            windows += map(make_disjoint_window, rolling)
            owners += [owner] * (len(windows) - len(owners))

        counts = [0] * len(requests)
        for owner in owners:
            counts[owner] += 1
        results = [RollingLoglikelihood(0.0, 0, None)] * len(requests)
        scores: dict[int, list[tuple[int, Score]]] = {}
        for number, score in self._score(windows, False, disable_tqdm, texts=owners):
            owner = owners[number]
            mine = scores.setdefault(owner, [])
            mine.append((len(windows[number][1]), score))
            if len(mine) == counts[owner]:
                searches = [score.searches for _, score in mine if score.searches is not None]
                results[owner] = RollingLoglikelihood(
                    sum(score.log_prob for _, score in mine),
                    sum(length for length, _ in mine),
                    sum(searches) if searches else None,
                )
                self.cache_hook.add_partial("loglikelihood_rolling", requests[owner].args, results[owner])
                del scores[owner]
        return list(results)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        pairs = [(context, continuation) for _, context, continuation in requests]
        for number, score in self._score(pairs, True, disable_tqdm, override_bs):
            results[number] = score.log_prob, score.is_greedy
            if requests[number][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[number][0], results[number])
        return results

    def _score(
        self,
        requests: list[tuple[list[int], list[int]]],
        want_greedy: bool,
        disable_tqdm: bool = False,
        batch_size: int | None = None,
        texts: list[int] | None = None,
    ) -> Iterator[tuple[int, Score]]:
        """Score (context, continuation) token lists; yields (request number, score) as batches get done.

        ``texts`` are the numbers of the texts that the requests are windows of.
        """
        passages: dict[Any, Passage] = {}
        askers: dict[Any, list[int]] = {}
        for number, (context, continuation) in enumerate(requests):
            text = context + continuation
            # Requests that read the same tokens share the forward pass, as in HFLM.
            shared = tuple(text[:-1]) if self.logits_cache and not self.carry_state else number
            passage = passages.setdefault(shared, Passage(text[-(self.max_length + 1) : -1]))
            passage.text = texts[number] if texts else None
            passage.continuations.append(continuation)
            askers.setdefault(shared, []).append(number)
        order = list(passages)
        if not self.carry_state:
            # Longest first: similar lengths share a batch, and too large a batch shows at once.
            order.sort(key=lambda shared: -len(passages[shared].tokens))
        groups = self._groups(passages, order, batch_size)
        with tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Scoring with retrieval") as bar:
            upcoming = next(groups, None)
            while (group := upcoming) is not None:
                upcoming = next(groups, None)
                if upcoming is not None:
                    self.scorer.announce(upcoming.batches[0])
                results = self._score_passages(group.batches, want_greedy)
                for shared, scores in zip(group.names, results, strict=True):
                    yield from zip(askers[shared], scores, strict=True)
                    bar.update(len(scores))

    def _groups(self, passages: dict[Any, Passage], order: list[Any], batch_size: int | None) -> Iterator[Group]:
        """The passages in batches, as many batches together as the scorer wants."""
        start, rows = 0, 0
        group = Group([], [])
        while start < len(order):
            names = order[start : start + (batch_size or self._size_of_batch(passages[order[start]]))]
            group.names.extend(names)
            group.batches.append([passages[name] for name in names])
            rows += sum(max(map(len, passage.continuations)) for passage in group.batches[-1])
            start += len(names)
            if rows >= self.scorer.rows_at_once or start >= len(order):
                yield group
                group, rows = Group([], []), 0

    def _score_passages(self, batches: list[list[Passage]], want_greedy: bool) -> list[list[Score]]:
        """The scorer's ``score``; the place for what has scores from elsewhere."""
        return self.scorer.score(batches, want_greedy)

    def _size_of_batch(self, longest: Passage) -> int:
        if self.batch_size != "auto":
            return int(self.batch_size)
        length = len(longest.tokens)
        if self.device.type == "cpu":
            return max(1, CPU_BATCH_TOKENS // length)
        if length not in self.batch_sizes:
            probe = Passage([self.prefix_token_id] * length, [[self.prefix_token_id] * length])

            @find_executable_batch_size(starting_batch_size=self.max_batch_size)
            def try_batch(batch_size: int) -> int:
                # Two, for the second may be read ahead.
                self._score_passages([[probe] * batch_size for _ in range(2)], want_greedy=True)
                return batch_size

            # A size that holds for this length holds for all that follow, which are shorter.
            self.batch_sizes[length] = max([try_batch(), *self.batch_sizes.values()])
        return self.batch_sizes[length]

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **generation_kwargs: Any) -> Any:
        # HFLM's generate_until with the mixture in each decoding step. With lmbda=0 the LM is alone, as in hf.
        with self.mixed_forward if self.settings["lmbda"] != 0 else nullcontext():
            return super()._model_generate(context, max_length, stop, **generation_kwargs)

    def _detect_batch_size(self, requests: Any = None, pos: int = 0) -> int:
        # HFLM asks this where batch_size=auto and it generates.
        if self.device.type == "cpu":
            return max(1, CPU_BATCH_TOKENS // self.max_length)
        return super()._detect_batch_size(requests, pos)

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Take lm-eval's ``--use_cache`` file, unless it holds results of another model or other settings."""
        database = getattr(cache_hook, "dbdict", None)
        if database is not None:
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
        return {
            **self.settings,
            "fingerprint": self.retriever.datastore.manifest["fingerprint"],
            "pretrained": str(self.pretrained) if isinstance(self.pretrained, str) else self.config.to_json_string(),
            "revision": str(self.revision),
            "peft": str(self.peft),
            "dtype": str(self.scorer.model.inner.dtype),
            "softmax_dtype": str(self.softmax_dtype),
            "max_length": self.max_length,
            "add_bos_token": self.add_bos_token,
            "prefix_token_id": self.prefix_token_id,
            "keys": self.retriever.datastore.keys_checksum,
            "index_type": self.retriever.metadata,
            "loading": self._loading,
        }

    def _memory(self) -> dict[str, Any]:
        """Bytes on disk that are mapped, what the index takes of memory itself, and what the process takes."""
        store, retriever = self.retriever.datastore, self.retriever
        return {
            "index_on_disk": retriever.metadata["bytes"],
            "index_in_memory": retriever.bytes_held,
            "values_on_disk": store.values.nbytes,
            "keys_on_disk": store.keys.nbytes if retriever.recompute_dists and store.keys is not None else 0,
            "process": resident_bytes(),
        }

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """As lm-eval's, which so collects the processes' results; what retrieval did in each goes along."""
        gathered = super().gather_object((obj, self._work()), dst)
        if gathered is None:
            return None
        objects, works = zip(*gathered, strict=True)
        self._work_of_all = works
        return list(objects)

    def _work(self) -> tuple[dict[str, float], dict[str, float]]:
        """What retrieval did in this process so far: counts, and seconds by stage."""
        statistics, mixed = self.retriever.statistics, self.mixed_forward
        counts: dict[str, float] = {
            "tokens_scored": self.scorer.tokens_scored,
            "positions_generated": mixed.positions,
            "searches": statistics.searches,
            "entries_compared": statistics.entries_compared,
            "restarts": statistics.restarts,
            "rows": self.scorer.rows_scored + mixed.positions,
            "rows_skipped": self.scorer.rows_skipped + mixed.skipped,
        }
        seconds = self.scorer.seconds | statistics.seconds
        for stage, value in mixed.seconds.items():
            seconds[stage] += value
        if isinstance(self.scorer, RetomatonScorer):
            walks = self.scorer.automaton.statistics
            # The retriever counts the walks' searches as well, but not the distances of pointers.
            seconds |= {name: value for name, value in walks.seconds.items() if name != "search"}
            counts |= {"steps": walks.steps, "walk_searches": walks.searches, "candidates": walks.candidates}
        return counts, seconds

    def get_model_info(self) -> dict[str, Any]:
        """lm-eval's model information, with the retrieval settings and what retrieval did (``knn``).

        Of several processes the counts and seconds are added up, once ``gather_object`` brought them together. Counted
        is what was done: lm-eval has processes with fewer requests than others do their last one again.
        """
        store = self.retriever.datastore
        counts, seconds = (
            {name: sum(one[name] for one in of_all) for name in of_all[0]}
            for of_all in zip(*(self._work_of_all or [self._work()]), strict=True)
        )
        walked: dict[str, Any] = {"restarts": counts["restarts"]} if "retriever" in self.settings else {}
        if isinstance(self.scorer, RetomatonScorer):
            walked |= {
                "saved_searches": 1 - counts["walk_searches"] / max(1, counts["steps"]),
                "mean_candidates": counts["candidates"] / max(1, counts["steps"]),
            }
        elif isinstance(gate := self.mixed_forward.augmentation.lmbda, Gate) and gate.threshold is not None:
            walked |= {"saved_searches": counts["rows_skipped"] / max(1, counts["rows"])}
        return super().get_model_info() | {
            "knn": {
                **walked,
                **self.settings,
                "setting_sources": self.setting_sources,
                "datastore": {
                    "path": str(store.path.resolve()),
                    "entries": len(store),
                    "dimension": store.dimension,
                    "keys_sha256": store.keys_checksum,
                    "model": store.manifest["model"]["pretrained"],
                    "source": store.manifest["source"],
                },
                "index_factory": self.retriever.metadata["factory"],
                "index_bytes": self.retriever.metadata["bytes"],
                "memory": self._memory(),
                "processes": self.world_size,
                **{name: counts[name] for name in REPORTED_COUNTS},
                "seconds": {stage: round(value, 3) for stage, value in seconds.items()},
            }
        }
