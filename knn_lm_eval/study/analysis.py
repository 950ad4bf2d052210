"""What retrieval brought, and why: token records beside what their datastore and tokenizer say of the same tokens."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from knn_lm_eval.errors import UserError
from knn_lm_eval.report.binning import Binned, by_edges, by_kind, by_quantiles
from knn_lm_eval.report.leakage import leakage, leakage_warning
from knn_lm_eval.report.record_files import HEAVIEST, NOT_KNOWN, Records, check_same_tokens, names_of, read_records
from knn_lm_eval.report.token_analysis import Draws, analyse_method, gains_of, paired_difference, units_of
from knn_lm_eval.store.choosing import store_names
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.joined import JoinedStore, Store, stores_of

logger = logging.getLogger(__name__)

FORMAT = "knn_lm_eval analysis"
FREQUENCY_EDGES = (0, 1, 10, 100, 1000, 10_000, 100_000, 1_000_000)
ENTROPY_EDGES = (0, 0.5, 1, 2, 3, 4, 6)
RANK_EDGES = (1, 2, 4, 11, 101, 1001)
PLACE_EDGES = (0, 16, 64, 256, 512, 1024, 4096)
OVERLAP_EDGES = (0, 1, 2, 3, 5, 8, 13, 32)
DISTANCE_BINS, SHOWN_DOCUMENTS, STORE_PARTS = 5, 8, 8
VALUES_AT_ONCE = 2**24
CONTEXT_TOKENS = 24
EXAMPLES = 2  # of a cell: so many of the most helped, and of the most hurt


def analyse(
    folders: Sequence[Path],
    datastore: Path | None = None,
    tokenizer: str | None = None,
    examples: int = EXAMPLES,
    draws: Draws | None = None,
) -> dict[str, Any]:
    """Analyse records of one or several methods, of the same tokens.

    Parameters
    ----------
    folders : each with one method's records.
    datastore, tokenizer : None takes those that the records name; where they cannot be opened, what takes them is
        left out, and a note says so.
    examples : shown of each cell, of tokens helped and of tokens hurt.

    Returns
    -------
    Plain JSON. About 200 bytes of memory a token and method.

    Raises
    ------
    UserError
        Where there are no records, some are damaged or they are of different tokens.
    """
    draws = draws or Draws()
    all_records = [read_records(folder) for folder in folders]
    check_same_tokens(all_records)
    if not len(all_records[0]):
        raise UserError(f"The records in {folders[0]} are of no tokens: there is nothing to analyse.")
    units, notes = units_of(all_records[0]), list[str]()
    decoder = _open_tokenizer(all_records[0], tokenizer, notes)
    methods: list[dict[str, Any]] = []
    first_gains = gains_of(all_records[0])
    named = list(zip(names_of(folders), all_records, strict=True))
    for name, records in tqdm(named, "Analysing", disable=len(named) == 1):
        store = _open_store(records, datastore, notes)
        binnings = bin_tokens(records, store)
        method = analyse_method(name, records, binnings, units, draws)
        method["leakage"] = leakage(records, units, draws)
        method["difference"] = None if not methods else paired_difference(gains_of(records), first_gains, units, draws)
        if examples:
            method["examples"] = _examples(records, binnings, store, decoder, examples)
        methods.append(method)
    notes += filter(None, map(leakage_warning, methods))
    first = methods[0]["summary"]
    if any(method["summary"]["infinite"] for method in methods):
        notes.append("Tokens whose probability is 0 by the mixture count as hurt, and are no part of means.")
    if units.documents == 1:
        notes.append(f"One document: intervals are over {units.count} {units.name}.")
    return {
        "format": FORMAT,
        "tasks": all_records[0].tasks,
        "tokens": first["tokens"],
        "documents": units.documents,
        "units": units.name,
        **asdict(draws),
        "methods": methods,
        "notes": list(dict.fromkeys(notes)),
    }


def bin_tokens(records: Records, store: Store | None) -> list[Binned]:
    """The tokens of records by all that they are looked at by; without a store, by what the records alone say."""
    of = records.columns
    binned = [
        by_edges("entropy", "entropy of the LM (nats)", of["entropy"], ENTROPY_EDGES),
        by_edges("rank", "rank of the token under the LM", of["rank"], RANK_EDGES, whole=True),
        by_edges("read", "position in the window", of["read"], PLACE_EDGES, whole=True),
        by_edges("position", "position in the document", of["position"], PLACE_EDGES, whole=True),
        by_quantiles("nearest", "distance of the nearest neighbour", of["nearest"], DISTANCE_BINS, "no neighbour"),
    ]
    if (of["overlap"] != NOT_KNOWN).any():
        known = np.where(of["overlap"] == NOT_KNOWN, np.nan, of["overlap"])
        title = "length of the overlap with the datastore (tokens)"
        binned.append(by_edges("overlap", title, known, OVERLAP_EDGES, whole=True))
    by_ngrams = of["ngram_log_prob"]
    if not np.isnan(by_ngrams).all():
        # Where one has no p, it says less than the LM.
        above = (by_ngrams > of["lm_log_prob"]) + 2 * (of["knn_log_prob"] > of["lm_log_prob"])
        title = "which of n-grams and neighbours give the token more than the LM"
        binned.append(by_kind("ngrams", title, above, ["neither", "n-grams alone", "neighbours alone", "both"]))
    if not of["searched"].all():
        binned.append(by_kind("searched", "whether the index was searched", of["searched"].astype(int), ["no", "yes"]))
    if len(records.tasks) > 1:
        binned.append(by_kind("task", "task", of["task"].astype(int), records.tasks))
    if store is not None:
        counts = _count_in_all(store, int(of["token"].max()) + 1)
        title = "how often the token stands in the datastore"
        binned.insert(0, by_edges("frequency", title, counts[of["token"]], FREQUENCY_EDGES, whole=True))
        found = of["entry_0"] >= 0
        proposed = np.where(found, _values_of(store, np.maximum(of["entry_0"], 0)) == of["token"], -1).astype(int)
        title = "whether the heaviest neighbour has the token"
        binned.append(by_kind("proposed", title, proposed, ["no", "yes"]))
        binned.append(by_source(records, store))
    return binned


def _values_of(store: Store, entries: np.ndarray) -> np.ndarray:
    """The values of entries, int32 ``[n]``."""
    if not isinstance(store, JoinedStore):
        return store.values[entries]
    values = np.empty(len(entries), dtype=np.int32)
    for one, start, stop in zip(store.stores, store.starts[:-1], store.starts[1:], strict=True):
        here = (entries >= start) & (entries < stop)
        values[here] = one.values[entries[here] - start]
    return values


def _count_in_all(store: Store, vocabulary: int) -> np.ndarray:
    """``count_values`` of one store, or of several together."""
    of_each = [count_values(one, vocabulary) for one in stores_of(store)]
    total = np.zeros(max(map(len, of_each)), dtype=np.int64)
    for counts in of_each:
        total[: len(counts)] += counts
    return total


def count_values(store: Datastore, vocabulary: int) -> np.ndarray:
    """How often each token stands in a store, int64 ``[vocabulary or more]``; merged entries count as they weigh."""
    counts = np.zeros(vocabulary, dtype=np.int64)

    def add(start: int, stop: int, sign: int) -> None:
        nonlocal counts
        weights = None if store.weights is None else store.weights[start:stop]
        found = np.bincount(store.values[start:stop], weights).astype(np.int64)
        if len(found) > len(counts):
            counts = np.concatenate([counts, np.zeros(len(found) - len(counts), dtype=np.int64)])
        counts[: len(found)] += sign * found

    blocks = range(0, len(store), VALUES_AT_ONCE)
    for start in tqdm(blocks, "Counting tokens of the datastore", disable=len(blocks) < 8):
        add(start, min(start + VALUES_AT_ONCE, len(store)), 1)
    if store.removed is not None:
        for begin, end in zip(store.removed.starts.tolist(), store.removed.stops.tolist(), strict=True):
            for start in range(begin, end, VALUES_AT_ONCE):
                add(start, min(start + VALUES_AT_ONCE, end), -1)
    return counts


def by_source(records: Records, store: Store) -> Binned:
    """Where the heaviest neighbours stand: in which store; of one, in which documents, or parts of a single one."""
    entries = records.columns["entry_0"]
    title = "where the heaviest neighbour stands"
    if isinstance(store, JoinedStore):
        numbers = np.where(entries < 0, -1, np.searchsorted(store.starts, entries, side="right") - 1)
        return by_kind("source", title, numbers, list(store.names))
    if not store.in_text_order or len(store.document_starts) < 2:
        ends = [len(store) * part // STORE_PARTS for part in range(STORE_PARTS + 1)]
        parts = np.where(entries < 0, -1, np.searchsorted(ends, entries, side="right") - 1)
        labels = [f"entries {low:,} to {high - 1:,}" for low, high in zip(ends[:-1], ends[1:], strict=True)]
        return by_kind("source", title, parts, labels)
    documents = np.searchsorted(store.document_starts, entries, side="right") - 1
    numbers, inverse, uses = np.unique(documents, return_inverse=True, return_counts=True)
    shown = [place for place in np.argsort(-uses, kind="stable").tolist() if numbers[place] >= 0][:SHOWN_DOCUMENTS]
    kind_of = np.full(len(numbers), len(shown))
    kind_of[shown] = np.arange(len(shown))
    kind_of[numbers < 0] = -1
    labels = [f"document {int(numbers[place]):,}" for place in shown]
    return by_kind("source", title, kind_of[inverse.reshape(-1)], [*labels, "all other documents"])


def _examples(
    records: Records, binnings: Sequence[Binned], store: Store | None, decoder: Any, count: int
) -> dict[str, list[dict[str, Any]]]:
    """Of each property's cells, the tokens most helped and most hurt: by property, a list of cells in order."""
    gains = gains_of(records)
    found: dict[str, list[dict[str, Any]]] = {}
    for binned in binnings:
        of_property = []
        for number, label in enumerate(binned.labels):
            members = np.flatnonzero(binned.bin_of == number)
            if not len(members):
                continue
            order = members[np.argsort(gains[members], kind="stable")]
            hurt = [at for at in order[:count].tolist() if gains[at] < 0]
            helped = [at for at in order[::-1][:count].tolist() if gains[at] > 0]
            tokens = [_example(records, at, store, decoder) for at in (*helped, *hurt)]
            of_property.append({"label": label, "tokens": tokens})
        found[binned.name] = of_property
    return found


def _example(records: Records, at: int, store: Store | None, decoder: Any) -> dict[str, Any]:
    """A token with what stands before it, its probabilities, and its heaviest neighbours, ready for JSON."""
    of = {name: column[at].item() for name, column in records.columns.items()}
    with np.errstate(over="ignore"):
        p_lm, p_knn, p = (float(np.exp(of[name])) for name in ("lm_log_prob", "knn_log_prob", "log_prob"))
    return {
        "task": records.tasks[of["task"]],
        "document": of["document"],
        "position": of["position"],
        "context": _decoded(decoder, _before(records, at)),
        "text": _decoded(decoder, [of["token"]]),
        "p_lm": p_lm,
        "p_knn": None if np.isnan(p_knn) else p_knn,
        "p": p,
        "neighbours": [
            _neighbour(of[f"entry_{place}"], of[f"weight_{place}"], store, decoder)
            for place in range(HEAVIEST)
            if of[f"entry_{place}"] >= 0
        ],
    }


def _before(records: Records, at: int) -> list[int]:
    """The recorded tokens of the same text just before a token."""
    of = records.columns
    begin = max(0, at - CONTEXT_TOKENS)
    here = slice(begin, at)
    same = np.ones(at - begin, dtype=bool)
    for name in ("task", "document", "request"):
        same &= of[name][here] == of[name][at]
    return of["token"][here][same].tolist()


def _neighbour(entry: int, weight: float, store: Store | None, decoder: Any) -> dict[str, Any]:
    """An entry with its token and the text before it, from its document; no text where it is not known."""
    value = context = ""
    if store is not None:
        own, at = _own_place(store, entry)
        value = _decoded(decoder, [int(own.values[at])])
        if own.in_text_order:
            document = int(np.searchsorted(own.document_starts, at, side="right")) - 1
            begin = max(int(own.document_starts[document]), at - CONTEXT_TOKENS)
            context = _decoded(decoder, own.values[begin:at].tolist())
    return {"entry": entry, "weight": weight, "value": value, "context": context}


def _own_place(store: Store, entry: int) -> tuple[Datastore, int]:
    """Of several stores the one that an entry is in, and its number there."""
    if not isinstance(store, JoinedStore):
        return store, entry
    number = int(np.searchsorted(store.starts, entry, side="right")) - 1
    return store.stores[number], entry - int(store.starts[number])


def _decoded(decoder: Any, tokens: Sequence[int]) -> str:
    return " ".join(map(str, tokens)) if decoder is None else decoder.decode(list(tokens))


def _open_store(records: Records, given: Path | None, notes: list[str]) -> Store | None:
    """The store, or stores, of these records; None, and a note, where it is not at its place any more."""
    about = records.about["datastore"]
    if given is not None and len(about) > 1:
        raise UserError(
            f"The records in {records.folder} were made with {len(about)} datastores, which are looked for where they "
            f"were: leave --datastore out."
        )
    paths = [one["path"] for one in about] if given is None else [str(given)]
    try:
        stores = [Datastore.open(path) for path in paths]
    except UserError as error:
        if given is not None:
            raise
        notes.append(f"Without the datastore ({error}) nothing is said of frequencies, sources and neighbours' texts.")
        return None
    for store, said in zip(stores, about, strict=True):
        if store.keys_checksum == said["keys_sha256"] and len(store) == said["entries"]:
            continue
        sentence = f"{store.path} is not the datastore that the records in {records.folder} were made with"
        if given is not None:
            raise UserError(f"{sentence}; give the one that was used.")
        notes.append(
            f"{sentence}, or was changed since: nothing is said of frequencies, sources and neighbours' texts."
        )
        return None
    return stores[0] if len(stores) == 1 else JoinedStore(tuple(stores), tuple(store_names(paths)))


def _open_tokenizer(records: Records, given: str | None, notes: list[str]) -> Any:
    """What decodes the records' tokens; None, and a note, where it cannot be loaded."""
    from transformers import AutoTokenizer

    from knn_lm_eval.lm.fingerprint import tokenizer_checksum

    about = records.about["tokenizer"]
    name = given or about["name"]
    try:
        if name is None:
            raise ValueError("the records do not name it")
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # whatever transformers and its hub raise
        if given is not None:
            raise UserError(f"The tokenizer {given} cannot be loaded: {error}") from error
        notes.append(f"The tokenizer {name} could not be loaded: examples show the tokens' numbers; give --tokenizer.")
        return None
    if tokenizer_checksum(tokenizer) != about["sha256"]:
        if given is not None:
            raise UserError(f"The tokenizer {given} is not the one that the records were made with.")
        notes.append(f"{name} has another tokenizer now: examples show the tokens' numbers; give --tokenizer.")
        return None
    return tokenizer
