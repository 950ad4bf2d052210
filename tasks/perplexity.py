"""Perplexity of whole texts, per token of the LM's own tokenizer, per word and per byte."""

from __future__ import annotations

import functools
import hashlib
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval.api.task import ConfigurableTask

from knn_lm_eval.errors import UserError, report_user_errors, shortened
from knn_lm_eval.model.scores import RollingLoglikelihood, Spans
from knn_lm_eval.report.intervals import standard_error

logger = logging.getLogger(__name__)


class PerplexityTask(ConfigurableTask):
    """Scores each document as a whole: no prompt, no few-shot examples."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        # lm-eval leaves the key by which it found this class in the config, but has no field for it.
        super().__init__(config={key: value for key, value in config.items() if key != "class"})
        self._told: set[str] = set()  # the metrics that documents had

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **_: Any) -> None:
        report_user_errors()
        # As lm-eval would call it, without its warning that there is such a thing as --metadata.
        arguments = {**(self.config.metadata or {}), **(dataset_kwargs or {})}
        self.dataset = first_part(self.config.custom_dataset(**arguments), arguments.get("text_fraction", 1))

    def fewshot_docs(self) -> None:
        return None  # nothing to draw from: lm-eval would keep a copy of a whole split for it

    def fewshot_context(self, *_args: Any, **_kwargs: Any) -> str:
        return ""

    def build_all_requests(self, *, tokenizer_name: str = "", **kwargs: Any) -> None:
        # lm-eval's cache of requests knows a task by its name alone; the texts depend on the data folder too.
        if kwargs.get("cache_requests"):
            tokenizer_name += f"-texts{self._fingerprint()}"
        super().build_all_requests(tokenizer_name=tokenizer_name, **kwargs)

    def _fingerprint(self) -> str:
        texts = hashlib.sha256()
        for doc in self.eval_docs:
            texts.update(hashlib.sha256(self.doc_to_target(doc).encode()).digest())
        return texts.hexdigest()[:16]

    def process_results(self, doc: dict[str, str], results: Sequence[float]) -> dict[str, Any]:
        """A document's terms of each metric, and behind them those of its standard error.

        lm-eval has no standard error for these metrics and leaves a gap (N/A), which a metric of the gap's name fills:
        for that it has to come later.
        """
        (loglikelihood,) = results
        metrics = super().process_results(doc, results)  # words and bytes, as the task file says
        searches, spans = None, None
        if isinstance(loglikelihood, RollingLoglikelihood):
            tokens: int | None = loglikelihood.num_tokens
            searches, spans = loglikelihood.num_searches, loglikelihood.spans
        else:
            tokens = self._count_tokens(self.doc_to_target(doc)) if self._count_tokens else None
        if tokens is not None:
            metrics["token_perplexity"] = (float(loglikelihood), tokens)
        metrics |= {f"{name}_stderr": parts(loglikelihood, units, spans) for name, (_, units) in metrics.items()}
        if tokens is not None and searches is not None:
            metrics["saved_searches"] = (searches, tokens)
        # Fewer are wanted where lm-eval replaced the metrics (--predict_only).
        metrics = {name: value for name, value in metrics.items() if name in self._metric_fn_list}
        self._told |= metrics.keys()
        return metrics

    def dump_config(self) -> dict[str, Any]:
        """As lm-eval's, for results: without metrics that no document had, which its loggers would miss in samples."""
        config = super().dump_config()
        if self._told and config.get("metric_list"):
            config["metric_list"] = [one for one in config["metric_list"] if one["metric"] in self._told]
        return config

    @functools.cached_property
    def _count_tokens(self) -> Callable[[str], int] | None:
        """For LMs that do not say how many tokens they scored."""
        metadata = self.config.metadata or {}
        try:
            if not (metadata.get("tokenizer") or metadata.get("pretrained")):
                raise LookupError("it is not among the run's arguments")
            return token_counter(metadata)
        except Exception as error:  # a missing metric must not cost the results of a long run
            logger.warning(
                "%s: token_perplexity is left out, for the LM's tokenizer is not known (%s). "
                "Give it with --metadata tokenizer=NAME_OR_FOLDER.",
                self.config.task,
                error,
            )
            return None


def first_part(dataset: dict[str, Any], fraction: object) -> dict[str, Any]:
    """The data set, of whose splits with one document only the first lines are left: at least so much of its text.

    Of several documents lm-eval's ``limit`` takes some. Raises UserError where ``fraction`` is none.
    """
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction <= 1:
        raise UserError(f"text_fraction={shortened(fraction)} should be a number above 0 and at most 1.")
    if fraction == 1:
        return dataset
    return {name: _first_lines(split, fraction) if len(split) == 1 else split for name, split in dataset.items()}


def _first_lines(split: Any, fraction: float) -> Any:
    (column,) = split.column_names
    lines = split[column][0].splitlines(keepends=True)
    wanted, taken = fraction * sum(map(len, lines)), 0
    for number, line in enumerate(lines, 1):
        taken += len(line)
        if taken >= wanted and any(map(str.strip, lines[:number])):
            break
    return type(split).from_dict({column: ["".join(lines[:number])]})


def token_counter(model_args: Mapping[str, Any]) -> Callable[[str], int]:
    """Counts tokens as lm-eval's `hf` model made with these arguments would, special tokens included."""
    from lm_eval.models.huggingface import HFLM

    accepted = inspect.signature(HFLM._create_tokenizer).parameters
    given = {key: model_args[key] for key in accepted if model_args.get(key) is not None}
    if "revision" in given:
        given["revision"] = str(given["revision"])  # lm-eval reads a revision of digits as a number
    given = {"pretrained": None, "tokenizer": None, **given}
    return _hf_token_counter(model_args.get("prefix_token_id"), **given)


@functools.lru_cache(maxsize=4)  # the tasks of one run share a tokenizer, which can take seconds to load
def _hf_token_counter(prefix_token_id: int | None, **tokenizer_args: Any) -> Callable[[str], int]:
    from lm_eval.models.huggingface import HFLM

    lm = HFLM.__new__(HFLM)  # for its tokenizer and its way of encoding; no model is loaded
    lm.add_bos_token = tokenizer_args.get("add_bos_token")
    lm.custom_prefix_token_id = prefix_token_id
    if not isinstance(tokenizer_args["pretrained"], str):
        lm._model = tokenizer_args["pretrained"]  # a model object, which knows its tokenizer's name
    lm._create_tokenizer(**tokenizer_args)
    return lambda text: len(lm.tok_encode(text))


def words_and_bytes(doc: dict[str, str], results: Sequence[float]) -> dict[str, tuple[float, int]]:
    """lm-eval's own metrics for whole texts, with its own way of counting."""
    (loglikelihood,) = results
    words = ConfigurableTask.count_words(doc["text"])
    num_bytes = ConfigurableTask.count_bytes(doc["text"])
    return {
        "word_perplexity": (loglikelihood, words),
        "byte_perplexity": (loglikelihood, num_bytes),
        "bits_per_byte": (loglikelihood, num_bytes),
    }


def parts(loglikelihood: float, units: int, spans: Spans | None) -> list[tuple[float, float]]:
    """A document's terms in parts: the log-likelihood of each span, and its share of the units by its tokens.

    Parameters
    ----------
    units : tokens, words or bytes of the whole document.
    spans : consecutive parts of the text; None where the LM does not tell.
    """
    tokens = sum(length for _, length in spans or [])
    if not spans or not tokens:
        return [(float(loglikelihood), units)]
    return [(log_prob, units * length / tokens) for log_prob, length in spans]


def perplexity_stderr(items: Sequence[Sequence[tuple[float, float]]]) -> float | str:
    """The standard error of a perplexity, from each document's parts; lm-eval's N/A where there is none."""
    return _standard_error(items, "weighted_perplexity")


def bits_per_byte_stderr(items: Sequence[Sequence[tuple[float, float]]]) -> float | str:
    """As ``perplexity_stderr``, of bits per byte."""
    return _standard_error(items, "bits_per_byte")


def _standard_error(items: Sequence[Sequence[tuple[float, float]]], aggregation: str) -> float | str:
    error = standard_error([np.array(item) for item in items], aggregation)
    return "N/A" if error is None else error


def saved_searches(items: Sequence[tuple[int, int]]) -> float:
    """The fraction of tokens that needed no full search, from (searches, tokens) of each document."""
    searches, tokens = (sum(column) for column in zip(*items, strict=True))
    return 1 - searches / tokens
