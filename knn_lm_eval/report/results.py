"""Reading what lm-eval wrote: results files of any model and of several of its releases, and their samples."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from knn_lm_eval.errors import UserError, shortened

logger = logging.getLogger(__name__)

# Arguments of ``hf`` that change the LM's own figures, and what others of that kind begin with. Not those that change
# speed or memory alone, and not dtype and revision, which the files name as they were in force.
LM_ARGUMENTS = (
    *("add_bos_token", "autogptq", "backend", "delta", "gguf_file", "gptqmodel", "load_in_4bit", "load_in_8bit"),
    *("mixed_precision_dtype", "peft", "prefix_token_id", "softmax_dtype", "subfolder", "tokenizer", "truncation"),
    *("use_fast_tokenizer", "enable_thinking", "chat_template_args", "think_end_token"),
)
LM_ARGUMENT_FAMILIES = ("bnb_4bit_", "llm_int8_")
NOT_GIVEN = "not given"
MOST_BYTES = 2**28  # of a results file
TEXTS = ("doc", "target", "arguments", "resps", "filtered_resps")  # of a sample: large, and not compared


@dataclass
class Result:
    """One task's metrics in one results file.

    Attributes
    ----------
    file : the results file.
    task, model : names; ``model`` is the LM.
    method : what the benchmark's file calls it, or lm-eval's model with the settings that were given.
    kind : lm-eval's model, such as ``hf``; empty where the file does not say.
    datastore : the datastore's name; empty without.
    metrics : by name; a filter other than ``none`` is part of it, as in ``exact_match,strict-match``.
    higher_is_better : as far as the file says.
    aggregations : how a metric of many documents comes about, as far as the file says.
    date : seconds since 1970; 0 where unknown.
    limit, version, num_fewshot, documents, max_length, context_len, special_tokens : what must agree before two
        results can be compared; None where the file does not say.
    lm_settings : what else must agree between two results of one LM, by what it is called; what the file does not
        say is not among them.
    retomaton : whether it is RetoMaton's.
    distances : ``exact`` or ``approximate``; None without retrieval, or where the file does not say.
    tokens_per_second, saved_searches, retrieval_bytes : None where the file does not say. Speed is that of the
        whole run; bytes are those of index and values.
    """

    file: Path
    task: str
    model: str
    method: str
    kind: str
    datastore: str
    metrics: dict[str, float]
    higher_is_better: dict[str, bool]
    aggregations: dict[str, str]
    date: float = 0.0
    limit: Any = None
    version: Any = None
    num_fewshot: int | None = None
    documents: int | None = None
    max_length: int | None = None
    context_len: int | None = None
    special_tokens: str | None = None
    lm_settings: dict[str, str] = field(default_factory=dict)
    retomaton: bool = False
    distances: str | None = None
    tokens_per_second: float | None = None
    saved_searches: float | None = None
    retrieval_bytes: int | None = None

    @cached_property
    def samples(self) -> list[dict[str, Any]]:
        """The logged samples without their texts, in the order of the documents; none where they were not logged."""
        date = self.file.stem.removeprefix("results")
        file = self.file.parent / f"samples_{self.task}{date}.jsonl"
        if "/" in self.task or not file.is_file():  # no file has such a name
            return []
        try:
            with open(file, encoding="utf-8") as lines:
                samples = [_checked_sample(json.loads(line)) for line in lines]
            return sorted(samples, key=lambda sample: sample["doc_id"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            logger.warning("%s is damaged or half-written: its documents are left out.", file)
            return []


def read_folder(folders: Iterable[Path]) -> tuple[list[Result], list[dict[str, Any]]]:
    """All results below some folders, and all else there that a report can show.

    Of several results for the same thing the newest counts. Damaged files are named in a warning and skipped.

    Returns
    -------
    results : in the order of their files' names.
    others : other JSON objects, such as the points of ``foss_curve``, each with its file's path as ``file``.

    Raises
    ------
    UserError
        Where there are no results.
    """
    folders = list(folders)
    found: list[Result] = []
    others: list[dict[str, Any]] = []
    for file in _json_files(folders):
        try:
            content = _read(file)
        except (OSError, ValueError, RecursionError):
            logger.warning("%s is damaged or half-written (it is not valid JSON): left out.", file)
            continue
        if not isinstance(content, dict):
            continue
        if not isinstance(content.get("results"), dict):
            others.append(content | {"file": file})
            continue
        try:
            found += _results(file, content)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            logger.warning("%s is not a results file as lm-eval writes it (%s): left out.", file, shortened(error))
    if not found:
        raise UserError(f"There are no lm-eval results in {', '.join(map(str, folders))}.")
    return _newest(found), others


def _read(file: Path) -> Any:
    """A file's JSON; raises ValueError where it is none, or too large for results."""
    if file.stat().st_size > MOST_BYTES:
        raise ValueError("it is too large")
    return json.loads(file.read_text(encoding="utf-8"))


def _json_files(folders: Iterable[Path]) -> Iterator[Path]:
    """Those below the folders, and those that are named themselves."""
    for folder in folders:
        if not folder.exists():
            raise UserError(f"There is no {folder}.")
        for file in [folder] if folder.is_file() else sorted(folder.rglob("*.json")):
            # What begins with a dot is a benchmark's unfinished cell.
            if not any(part.startswith(".") for part in file.relative_to(folder).parts):
                yield file


def _newest(results: Sequence[Result]) -> list[Result]:
    """One result for each method and task."""
    newest: dict[tuple[str, ...], Result] = {}
    for result in results:
        key = result.model, result.method, result.datastore, result.task
        if (older := newest.get(key)) is None or result.date >= older.date:
            newest[key] = result
    if len(newest) < len(results):
        logger.warning("%d older results for the same method and task are left out.", len(results) - len(newest))
    return list(newest.values())


def _results(file: Path, content: dict[str, Any]) -> Iterator[Result]:
    """A file's results, by what each release of lm-eval and each leaderboard calls things."""
    config = content.get("config") or {}
    knn = config.get("knn") or {}
    benchmark = config.get("benchmark") or {}
    kind = str(config.get("model") or content.get("model_source") or "")
    store = knn.get("datastore") or {}
    model = _model(content, config, kind)
    lm_settings = _lm_settings(content, config, knn)
    tokens = [content.get(f"tokenizer_{name}_token") for name in ("bos", "eos", "pad")]
    for task, values in content["results"].items():
        metrics = _metrics(values)
        if not metrics:
            continue
        yield Result(
            file=file,
            task=task.split("|")[1] if task.count("|") >= 2 else task,  # harness|arc:challenge|25
            model=model,
            method=benchmark.get("method") or _method(kind or model, knn),
            kind=kind,
            datastore=benchmark.get("datastore") or Path(store.get("path", "")).name,
            metrics=metrics,
            higher_is_better={
                name: better
                for name, better in (_of_task(content, "higher_is_better", task) or {}).items()
                if isinstance(better, bool)
            },
            aggregations=_aggregations(content, task),
            date=float(content.get("date") or 0.0),
            limit=config.get("limit"),
            version=_of_task(content, "versions", task),
            num_fewshot=_of_task(content, "n-shot", task),
            documents=(_of_task(content, "n-samples", task) or {}).get("effective"),
            max_length=content.get("max_length"),
            context_len=knn.get("context_len", 1 if kind == "hf" else None),
            special_tokens=None if tokens == [None] * 3 else json.dumps(tokens),
            lm_settings=lm_settings,
            retomaton=bool(knn.get("retomaton")),
            distances=knn.get("distances"),
            tokens_per_second=_tokens_per_second(knn),
            saved_searches=metrics.get("saved_searches", knn.get("saved_searches")),
            retrieval_bytes=knn["index_bytes"] + 4 * store["entries"] if "index_bytes" in knn else None,
        )


def _of_task(content: dict[str, Any], part: str, task: str) -> Any:
    """What a part of the file says of a task; None where it says nothing."""
    return (content.get(part) or {}).get(task)


def _model(content: dict[str, Any], config: dict[str, Any], kind: str) -> str:
    """The LM's name: what somebody called it comes first."""
    store = (config.get("knn") or {}).get("datastore") or {}
    names = [
        (config.get("benchmark") or {}).get("model"),
        _model_args(config).get("pretrained"),
        store.get("model"),
        content.get("model_name"),
        (content.get("config_general") or {}).get("model_name"),  # early leaderboards'
    ]
    return str(next(filter(None, names), kind))


def _model_args(config: dict[str, Any]) -> dict[str, Any]:
    """The LM's arguments, which some releases wrote as they were typed."""
    model_args = config.get("model_args") or {}
    if isinstance(model_args, str):
        return dict(part.split("=", 1) for part in model_args.split(",") if "=" in part)
    return dict(model_args)


def _lm_settings(content: dict[str, Any], config: dict[str, Any], knn: dict[str, Any]) -> dict[str, str]:
    """What the LM's own figures depend on besides its name, the task and the windows.

    A knn-hf that was given no model has its arguments from the datastore; where the file does not repeat them, only
    what was given beside them is known.
    """
    given = _model_args(config)
    known_as_a_whole = "lm_arguments" in knn or "pretrained" in given
    given = given | (knn.get("lm_arguments") or {})
    settings: dict[str, Any] = {name: NOT_GIVEN for name in LM_ARGUMENTS if known_as_a_whole}
    for name, value in given.items():
        if (name in LM_ARGUMENTS or name.startswith(LM_ARGUMENT_FAMILIES)) and value not in (None, "None", ""):
            off = str(value) == "False" and name != "add_bos_token"  # which some models have on by themselves
            settings[name] = NOT_GIVEN if off else value
    dtype = config.get("model_dtype") or given.get("dtype")
    settings["dtype"] = str(dtype).removeprefix("torch.") if dtype not in (None, "auto") else None
    if settings.get("softmax_dtype") == NOT_GIVEN:
        settings["softmax_dtype"] = settings["dtype"]  # the logits'
    settings["revision"] = config.get("model_revision") or given.get("revision")
    settings["commit (model_sha)"] = config.get("model_sha") or None
    settings["commit of the adapter (peft_sha)"] = config.get("peft_sha") or None
    for name in ("chat_template", "system_instruction"):
        if f"{name}_sha" in content:
            settings[name] = str(content[f"{name}_sha"] or NOT_GIVEN)[:12]
    if content.get("chat_template_sha"):
        settings["fewshot_as_multiturn"] = content.get("fewshot_as_multiturn")
    if "gen_kwargs" in config:
        settings["gen_kwargs"] = config["gen_kwargs"] or NOT_GIVEN
    return {name: str(value) for name, value in settings.items() if value is not None}


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    return {
        name.removesuffix(",none"): float(value)
        for name, value in values.items()
        if _is_number(value) and not isinstance(value, bool) and _is_metric(name)
    }


def _aggregations(content: dict[str, Any], task: str) -> dict[str, str]:
    listed = (_of_task(content, "configs", task) or {}).get("metric_list") or []
    return {metric["metric"]: str(metric.get("aggregation")) for metric in listed if "metric" in metric}


def _tokens_per_second(knn: dict[str, Any]) -> float | None:
    """Of the whole run; the file's seconds are those of all processes together."""
    if not knn.get("tokens_scored") or not (seconds := sum(knn["seconds"].values())):
        return None
    return knn["tokens_scored"] / seconds * knn.get("processes", 1)


def _checked_sample(sample: dict[str, Any]) -> dict[str, Any]:
    """A logged sample without its texts; raises ValueError where it is none that figures can be taken from."""
    kept = {name: value for name, value in sample.items() if name not in TEXTS}
    tokens = kept.get("token_perplexity", [0, 0])
    # Of a `_stderr` the items are a document's blocks, of which there may be two as well.
    figures = (value for name, value in kept.items() if not name.endswith("_stderr"))
    pairs = [value for value in figures if isinstance(value, list) and len(value) == 2]
    if (
        type(kept["doc_id"]) is not int
        or not isinstance(kept.get("filter", "none"), str)
        or tokens not in pairs + [[0, 0]]
        or not all(_is_number(number) for pair in pairs for number in pair)
        or not math.isfinite(tokens[1])
    ):
        raise ValueError("not a sample as lm-eval writes it")
    return kept


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and abs(value) <= 2**63)


def _is_metric(name: str) -> bool:
    return "_stderr" not in name and name not in ("name", "alias", "sample_len", "sample_count", " ")


def _method(kind: str, knn: dict[str, Any]) -> str:
    """A name for results that no benchmark named: the settings that somebody chose."""
    if not knn or not knn.get("datastore"):
        return kind
    parts = ["RetoMaton" if knn.get("retomaton") else "kNN-LM"]
    names = ["k", "lmbda", "knn_temp", *(("min_knns", "clusters") if knn.get("retomaton") else ())]
    for name in names:
        if (value := knn.get(name)) is not None:
            # An lmbda that differs from token to token is many numbers; its kind will do.
            parts.append(f"{name}={value.get('kind', 'adaptive') if isinstance(value, dict) else value}")
    return " ".join(parts)
