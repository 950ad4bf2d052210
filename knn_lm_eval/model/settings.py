"""The retrieval settings: each argument once, with what it means, its default, its range and its source.

``KNNHF``, ``retrieval_augmented``, a benchmark's file and the table in docs/reference/arguments.md read them here.
"""

from __future__ import annotations

import dataclasses
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from knn_lm_eval.errors import UserError
from knn_lm_eval.methods.adaptive import Weight, read_weight
from knn_lm_eval.methods.automaton import AutomatonSettings
from knn_lm_eval.model.params import Params
from knn_lm_eval.model.setting_fields import Range, listed, range_in_words, read_store_weights, setting
from knn_lm_eval.store.index_files import DEFAULT_INDEX

KNN_LM, RETOMATON, INFINI_GRAM = "Khandelwal et al. 2020", "Alon et al. 2022", "Liu et al. 2024"


@dataclass(frozen=True)
class RetrievalSettings:
    """What a retrieval-augmented LM is to be.

    A number that is out of range, and a word that is unknown, raise UserError.
    """

    datastore: str | os.PathLike | Sequence[str | os.PathLike] | None = setting(
        None,
        "where keys, values and index are; from an address it is fetched first. Several, of one LM, are searched "
        "together: `stores/law+stores/wiki`, or a list",
        may_be="a folder, https://... or hf://datasets/..., or several",
        shown_default="the environment variable KNN_LM_EVAL_DATASTORE",
    )
    datastore_weights: str | float | Sequence[float] | None = setting(
        None,
        "of several datastores, how much each one's entries weigh: as if it held each so often",
        may_be="a number above 0 for each, such as 2+0.5, or a list",
        shown_default="1 for each",
    )
    sources: str | Sequence[str] | None = setting(
        None,
        "the parts of the datastores that count: a store by its folder's name, or, as `STORE:TEXT`, one of the texts "
        "that were dumped or appended to it, by its file's name",
        may_be="names with + between them, or a list",
        shown_default="all",
    )
    exclude: str | Sequence[str] | None = setting(
        None,
        "the parts that do not count, named likewise",
        may_be="names with + between them, or a list",
        shown_default="none",
    )
    params: str | os.PathLike | bool | None = setting(
        None,
        "gives what is not given here of k, lmbda, ngram_lmbda, knn_temp, probe, min_knns and max_knns; False goes "
        "without",
        may_be="a file that `tune` wrote, or False",
        shown_default="the datastore's, if it has any",
    )
    k: int | None = setting(
        None,
        "neighbours per token",
        of=Range(1, whole=True),
        may_be="from 1 to the datastore's entries; at most 2,048 on GPUs",
        in_force=1024,
        source=KNN_LM,
    )
    lmbda: float | dict[str, Any] | None = setting(
        None,
        "the weight of p_kNN in the mixture; 0 is the LM alone, and searches nothing",
        may_be="from 0 to 1, or the plain form of a weight per token, as a params file has it",
        in_force=0.25,
        source=f"{KNN_LM}; per token: He et al. 2021 (gate), Drozdov et al. 2022 (buckets)",
    )
    ngram_lmbda: float | None = setting(
        None,
        "the weight of an n-gram LM of unbounded n over the datastore's text (see `build_suffix_array`), mixed into "
        "what LM and neighbours give, where the text has the token before; with lmbda=0, into the LM alone",
        of=Range(0, 1),
        in_force=0.0,
        source=INFINI_GRAM,
    )
    exclude_overlap: int | None = setting(
        None,
        "leaves neighbours out, of the k that were found, whose context has so many tokens or more in common with the "
        "scored text before the token, and documents that are the scored text (see `build_suffix_array`); 13 is usual",
        of=Range(1, whole=True),
        shown_default="none are left out",
        source="Brown et al. 2020 (13 tokens)",
    )
    knn_temp: float | None = setting(
        None,
        "the temperature of the softmax over distances",
        of=Range(0, least_is_in=False),
        in_force=1.0,
        source=KNN_LM,
    )
    probe: int | None = setting(
        None,
        "inverted lists that a search visits",
        of=Range(1, whole=True),
        may_be="from 1 to the index's lists",
        shown_default="what the index was found to need when built",
        source="faiss",
    )
    knn_sim_func: str | None = setting(
        None,
        "what nearness means; another than the index's needs recompute_dists",
        of=("l2", "dot"),
        shown_default="the index's",
        source=KNN_LM,
    )
    knn_keytype: str | None = setting(
        None,
        "which hidden state is the key; only checked to be the datastore's",
        of=("last_ffn_input", "last_ffn_output"),
        shown_default="the datastore's",
        source=KNN_LM,
    )
    key_module: str | None = setting(
        None,
        "the submodule whose input (with last_ffn_output: whose output) is the key",
        may_be="a submodule's name",
        shown_default="the datastore's",
    )
    recompute_dists: bool = setting(
        False, "use exact distances from the keys on disk instead of the index's approximations", source=KNN_LM
    )
    knn_gpu: bool = setting(
        False,
        "search on GPUs, at the best place: all keys in GPU memory, exactly; an index that faiss-gpu can hold "
        "(in float16, in shards where it does not fit one); keys streamed to GPUs; the CPU. An index that is named "
        "is searched. Of several processes each takes its own GPU",
    )
    index: str | None = setting(
        None,
        "which index to search; `exact` goes without one and compares all keys with every query",
        may_be="the name of one of the datastore's, or exact",
        shown_default=f"`{DEFAULT_INDEX}`, or exact where the datastore has no index",
    )
    knn_device: str | None = setting(
        None,
        "where exact search without an index compares queries and keys; of several devices each has a run of the keys",
        may_be="cpu, cuda, cuda:1, cuda:0+cuda:1, ...",
        shown_default="all GPUs (of several processes each takes its own), otherwise the CPU",
    )
    retriever: str = setting(
        "local",
        "`local` searches in this process, `ray` searches the index's parts (without an index, a run of the keys on "
        "each node) on a Ray cluster, whose nodes must see the datastore's folder at the same path",
        of=("local", "ray"),
    )
    address: str = setting(
        "auto",
        "with retriever=ray, the cluster; auto joins the one that runs on this machine, or starts one",
        may_be="auto, or HOST:PORT",
    )
    replicas: int = setting(
        1,
        "with retriever=ray, the nodes that hold each part of the index; with 2 a run goes on where one node is gone",
        of=Range(1, whole=True),
        may_be="from 1 to the cluster's nodes with a CPU",
    )
    search_all: bool | None = setting(
        None,
        "read all texts of a task before one search for all of them, so that keys on disk are read once; not with "
        "RetoMaton",
        may_be="True or False",
        shown_default="True for exact search whose keys do not fit in memory",
    )
    context_len: int = setting(
        1,
        "in rolling log-likelihoods, the tokens of context that each scored token has at least, where the text has "
        "them: 1 is lm-eval's disjoint windows, half of max_length the papers' sliding ones",
        of=Range(1, whole=True),
        may_be="from 1 to max_length",
        source=KNN_LM,
    )
    retomaton: bool = setting(False, "follow pointers instead of searching at every token", source=RETOMATON)
    min_knns: float | None = setting(
        None,
        "with RetoMaton, search where fewer candidates survived; inf searches everywhere, 0 never",
        of=Range(0, infinity_is_in=True),
        in_force=1,
        source=RETOMATON,
    )
    max_knns: int | None = setting(
        None,
        "with RetoMaton, pointers and cluster members considered per token",
        of=Range(1, whole=True),
        in_force=1024,
        source=RETOMATON,
    )
    no_pointer: bool = setting(False, "with RetoMaton, follow none: plain kNN-LM, for comparison", source=RETOMATON)
    clusters: str | None = setting(
        None,
        "with RetoMaton, the clusters whose members extend the pointers",
        may_be="the name of one of the datastore's clusterings",
        shown_default="none",
        source=f"{RETOMATON}; greedy merging: He et al. 2021",
    )
    duplicates: str = setting(
        "merge",
        "with RetoMaton, `merge` counts a candidate once, `keep` as often as it comes up, as the published code does",
        of=("merge", "keep"),
    )
    carry_state: bool = setting(
        False,
        "with RetoMaton and context_len above 1, the windows of one text continue each other's walk; needs a number "
        "for lmbda",
    )

    records: str | os.PathLike | None = setting(
        None,
        "each scored token leaves a record there, for `analyse`: probabilities, entropy, rank, heaviest neighbours; a "
        "folder for each setting",
        may_be="a folder",
        shown_default="none are kept",
    )
    verify: str = setting(
        "auto",
        "whether files of store, index and clusters are read for their checksums when they are opened: `auto` reads "
        "what was not verified before or changed since, `always` all, `never` none",
        of=("auto", "always", "never"),
    )

    def __post_init__(self) -> None:
        for name in ("sources", "exclude"):
            if (parts := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(map(str, listed(parts))))
        if self.datastore_weights is not None:
            object.__setattr__(self, "datastore_weights", read_store_weights(self.datastore_weights))
        for field in dataclasses.fields(self):
            value, allowed = getattr(self, field.name), field.metadata["of"]
            if value is None:
                continue
            if field.type in ("bool", "bool | None"):
                if value not in (False, True):
                    raise UserError(f"{field.name}={value!r} is neither True nor False.")
                object.__setattr__(self, field.name, bool(value))
            elif isinstance(allowed, Range):
                object.__setattr__(self, field.name, allowed.check(field.name, value))
            elif allowed is not None and value not in allowed:
                raise UserError(f"{field.name}={value!r} is unknown; use {' or '.join(allowed)}.")

    @classmethod
    def names(cls) -> list[str]:
        """The arguments' names."""
        return [field.name for field in dataclasses.fields(cls)]

    @classmethod
    def take_from(cls, arguments: Mapping[str, Any]) -> tuple[RetrievalSettings, dict[str, Any]]:
        """The settings among a model's arguments, and the other arguments."""
        own = set(cls.names())
        others = {name: value for name, value in arguments.items() if name not in own}
        return cls(**{name: value for name, value in arguments.items() if name in own}), others

    @property
    def tunable(self) -> tuple[str, ...]:
        """The names of those settings that a params file can give."""
        return (*TUNABLE, *(TUNABLE_OF_WALKS if self.retomaton else ()))

    def automaton(self) -> AutomatonSettings:
        """How RetoMaton walks; of settings in force."""
        assert self.k is not None and self.knn_temp is not None
        assert self.min_knns is not None and self.max_knns is not None
        return AutomatonSettings(self.k, self.knn_temp, self.min_knns, self.max_knns, self.duplicates)  # type: ignore[arg-type]

    def in_force(self, tuned: Params | None, source: str) -> SettingsInForce:
        """Fill in what is not given: from tuned params, else the papers' settings.

        Parameters
        ----------
        tuned : the params file's content, if there is one.
        source : where it comes from, ``params`` or ``store default``.
        """
        values, sources = {}, {}
        for name in self.tunable:
            if (value := getattr(self, name)) is not None:
                values[name], sources[name] = value, "given"
            elif tuned is not None and name in tuned.settings:
                values[name], sources[name] = tuned.settings[name], source
            else:
                values[name] = DEFAULTS.get(name)
                sources[name] = "index" if name == "probe" else "default"
        if sources["ngram_lmbda"] == "default":  # without n-grams nothing is said of them
            del sources["ngram_lmbda"]
        weight = read_weight(values["lmbda"])
        return SettingsInForce(dataclasses.replace(self, **values | {"lmbda": weight.plain()}), weight, sources)


class SettingsInForce(NamedTuple):
    """Settings with nothing left open but what the index decides.

    Attributes
    ----------
    settings : with numbers for all that can be tuned; ``probe`` may be None.
    weight : lmbda, read.
    sources : by name, where a tunable setting comes from: ``given``, ``params``, ``store default``, ``default`` or
        ``index``.
    """

    settings: RetrievalSettings
    weight: Weight
    sources: dict[str, str]


TUNABLE, TUNABLE_OF_WALKS = ("k", "lmbda", "ngram_lmbda", "knn_temp", "probe"), ("min_knns", "max_knns")
# The papers' settings.
DEFAULTS: dict[str, Any] = {
    field.name: field.metadata["in_force"]
    for field in dataclasses.fields(RetrievalSettings)
    if field.metadata["in_force"] is not None
}


def settings_table() -> str:
    """The settings as a Markdown table."""
    lines = ["| argument | default | range | what it does | from |", "|---|---|---|---|---|"]
    for field in dataclasses.fields(RetrievalSettings):
        said = field.metadata
        lines.append(
            f"| `{field.name}` | {said['default']} | {range_in_words(field)} | {said['doc']} | {said['source']} |"
        )
    return "\n".join(lines) + "\n"


def settings_docstring() -> str:
    """The settings as a docstring's list of attributes."""
    entries = (
        f"{field.name} : {field.metadata['doc']} (default: {field.metadata['default']}; {range_in_words(field)})."
        for field in dataclasses.fields(RetrievalSettings)
    )
    return "\n".join(textwrap.fill(entry, 112, subsequent_indent="    ") for entry in entries)


RetrievalSettings.__doc__ = "\n".join(
    [
        f"{(RetrievalSettings.__doc__ or '').rstrip()}\n",
        "    Attributes",
        "    ----------",
        textwrap.indent(settings_docstring(), "    "),
    ]
)
