"""The page that the hub shows of a published datastore: a data set's card, from what the store says of itself."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from knn_lm_eval.errors import printable
from knn_lm_eval.store.manifest import Manifest

TAGS = ["knn-lm", "retomaton", "datastore", "retrieval", "language-modeling", "lm-evaluation-harness", "knn-lm-eval"]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?")
LONGEST = 120  # characters of a name
PLAIN_SETTINGS = {"k", "knn_temp", "lmbda", "ngram_lmbda", "probe"}  # of kNN-LM; RetoMaton takes more than settings


def dataset_card(
    manifest: Manifest,
    address: str,
    license: str,
    *,
    size: int,
    indexes: dict[str, dict[str, Any]],
    clusters: dict[str, int],
    settings: dict[str, Any] | None = None,
    model: str | None = None,
) -> str:
    """A card in Markdown, with the hub's metadata at its head.

    Parameters
    ----------
    address : what ``datastore=`` is to be.
    license : the hub's name of it, such as ``cc-by-sa-4.0``.
    size : bytes of all files.
    indexes : each index's JSON, by its name.
    clusters : how many each clustering has, by its name.
    settings : tuned ones, which become arguments in the example if all of them can.
    model : the LM's id on the hub; None takes the manifest's, which may be a folder.
    """
    from huggingface_hub import DatasetCardData

    model, text = model or manifest.model.get("pretrained"), _text(manifest)
    title, names = "kNN-LM datastore: {} under {}", (text, _named(model))
    metadata = DatasetCardData(
        license=license,
        pretty_name=title.format(*map(_one_line, names)),  # which is no Markdown
        tags=TAGS,
        task_categories=["text-generation"],
        size_categories=[size_category(manifest.count)],
        viewer=False,  # arrays and indexes are no rows to be shown
    )
    parts = [
        f"---\n{metadata.to_yaml()}\n---\n",
        f"# {title.format(*map(_plain, names))}\n",
        "For each token of a text: the hidden state that a language model has before it (the key), and the token (the "
        "value), as [kNN-LM](https://arxiv.org/abs/1911.00172) and [RetoMaton](https://arxiv.org/abs/2201.12431) "
        "search them; made with `knn-lm-eval`.\n",
        "## Use it\n",
        f"```bash\nknn-lm-eval fetch_datastore {address}\n"
        f"lm_eval --model knn-hf --model_args {_arguments(model, address, settings or {})} --tasks wikitext103\n```\n",
        "The second command alone does as well. What is fetched is checked against the checksums in `manifest.json`.\n",
        "## What it holds\n",
        _table(["", ""], _facts(manifest, model, text, size)),
    ]
    if indexes:
        head = ["index", "kind", "distances", "probe", "recall", "perplexity cost (at most)", "bytes"]
        parts += ["## Indexes\n", _table(head, (_index_row(name, said) for name, said in indexes.items()))]
        parts += ["Recall and cost are against exact search, on held-out entries, at the index's own probe.\n"]
    if clusters:
        rows = ([_code(name), f"{count:,}"] for name, count in clusters.items())
        parts += ["## Clusters\n", _table(["for RetoMaton", "clusters"], rows)]
    return "\n".join(parts)


def size_category(count: int) -> str:
    """The hub's word for so many entries."""
    limits = [10**power for power in range(3, 13)]
    names = [f"{10 ** (power % 3)}{' KMBT'[power // 3]}" for power in range(3, 13)]
    if count < limits[0]:
        return f"n<{names[0]}"
    for number in range(1, len(limits)):
        if count < limits[number]:
            return f"{names[number - 1]}<n<{names[number]}"
    return f"n>{names[-1]}"


def _facts(manifest: Manifest, model: str | None, text: str, size: int) -> Iterable[list[str]]:
    dtype = manifest.model.get("dtype")
    yield ["language model", _linked(model) + (f", in {_code(dtype)}" if dtype else "")]
    yield ["text", _code(text)]
    yield ["entries (tokens)", f"{manifest.count:,}"]
    if manifest.documents is not None:
        yield ["documents", f"{manifest.documents:,}"]
    numbers = f"{manifest.dimension:,}"
    if manifest.projection is not None:
        numbers += f", projected from {manifest.width:,}"
    yield ["numbers per key", numbers if manifest.keys is not None else f"{numbers}; keys are in the indexes alone"]
    at = f" of {_code(manifest.key_module)}" if manifest.key_module else ""
    yield ["keys are", f"{_code(manifest.key_type)}{at}"]
    if manifest.windows is not None:
        length, stride = manifest.windows["max_length"], manifest.windows["stride"]
        yield ["read in windows of", f"{length:,} tokens, of which {stride:,} are new"]
    yield ["bytes", f"{size:,}"]
    if manifest.created:
        made_by = manifest.versions.get("knn_lm_eval")
        yield ["made", _plain(manifest.created[:10]) + (f", by knn-lm-eval {_plain(made_by)}" if made_by else "")]


def _text(manifest: Manifest) -> str:
    """What the text was: a data set with its configuration and split, or a file's name without its folder."""
    source = manifest.source
    if source.get("dataset"):
        parts = [_named(source["dataset"]), source.get("config"), source.get("split")]
        return " ".join(str(part) for part in parts if part)
    named = next((source[key] for key in ("text", "imported", "grown_from") if source.get(key)), "a text")
    return _named(named)


def _named(name: object) -> str:
    """A hub id as it is, and of a path its last part: whose folder it lay in is nobody's business."""
    if name is None:
        return "an unnamed model"
    text = str(name)
    return text if HUB_ID.fullmatch(text) and not Path(text).exists() else Path(text).name or "a folder"


def _arguments(model: str | None, address: str, settings: dict[str, Any]) -> str:
    arguments = {"pretrained": _named(model) if model else "MODEL", "datastore": address}
    if settings.keys() <= PLAIN_SETTINGS and all(isinstance(value, (int, float)) for value in settings.values()):
        arguments |= settings
    return ",".join(f"{name}={value}" for name, value in arguments.items())


def _linked(model: str | None) -> str:
    named = _named(model)
    return f"[`{named}`](https://huggingface.co/{named})" if named == model else _code(named)


def _index_row(name: str, said: dict[str, Any]) -> list[str]:
    quality = said.get("quality") if isinstance(said.get("quality"), list) else []
    rows = [row for row in quality or [] if row.get("probe") == said.get("probe")]
    recall = cost = "not measured"
    if rows:
        row = rows[0]
        recall = f"{row['recall']:.3f}" if isinstance(row.get("recall"), float) else recall
        figures = [row.get("exact_cost"), row.get("exact_cost_bound")]
        if all(isinstance(figure, float) for figure in figures):
            cost = f"{figures[0]:.2%} ({figures[1]:.2%})"
    probe = "" if said.get("probe") is None else f"{said['probe']:,}"
    return [_code(name), _code(said["factory"]), _code(said["sim_func"]), probe, recall, cost, f"{said['bytes']:,}"]


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def _one_line(value: object) -> str:
    """A value without what no line can show, and not too long for one."""
    return printable(" ".join(str(value).split()))[:LONGEST]


def _plain(value: object) -> str:
    """A value as text that Markdown takes for nothing else."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", _one_line(value))


def _code(value: object) -> str:
    """A value as code in a table's cell."""
    return "`" + _one_line(value).replace("`", "'").replace("|", "\\|") + "`"
