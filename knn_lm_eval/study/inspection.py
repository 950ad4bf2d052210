"""What retrieval found for each token of a text: the neighbours, their contexts, and what they did to p."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from knn_lm_eval.lm.reading import Passage, Reader, Reading, WholeText
from knn_lm_eval.methods.automaton import Walk, padded_neighbours
from knn_lm_eval.methods.mixture import Mixture, knn_log_prob, mix
from knn_lm_eval.model.knn_hf import KNNHF
from knn_lm_eval.report.tokens import InspectedToken, Neighbour
from knn_lm_eval.store.datastore import Place

POSITIONS_AT_ONCE = 64  # whose logits and neighbours are in memory together


def inspect_text(lm: KNNHF, text: str, *, num_neighbours: int = 8, context_tokens: int = 24) -> list[InspectedToken]:
    """Each token of ``text`` with its probabilities and neighbours, read in ``lm``'s windows.

    Parameters
    ----------
    lm : a loaded ``knn-hf``; its settings decide between kNN-LM and RetoMaton.
    num_neighbours : neighbours shown per token; all k make up p_kNN.
    context_tokens : tokens shown before a neighbour's value, at most back to the beginning of its document.
    """
    tokens = lm.tok_encode(text)
    whole, place = WholeText.of(tokens[:-1]), 0
    windows = get_rolling_token_windows(
        token_list=tokens,
        prefix_token=lm.prefix_token_id,
        max_seq_len=lm.max_length,
        context_len=lm.context_len,
    )
    reader = Reader(lm.language_model, torch.float32)
    mixture = lm.augmentation.mixture
    inspected: list[InspectedToken] = []
    for context, targets in map(make_disjoint_window, windows):
        read = (context + targets)[:-1]
        start, place = place + len(targets) - 1 - len(read), place + len(targets)
        reading = reader.read([Passage(read, [targets], whole=whole, start=start)])
        find = _neighbour_finder(lm, reading, targets)
        for here, lm_log_probs in _tables(reader, reading):
            found, target = find(here), torch.tensor(targets[here])
            figures = _figures(mixture, lm_log_probs, found, target)
            heaviest = figures.log_weights.topk(min(num_neighbours, figures.log_weights.shape[1]), dim=-1).indices
            for row, slots in enumerate(heaviest.tolist()):
                shown = [slot for slot in slots if found.entries[row, slot] >= 0]
                neighbours = [_neighbour(lm, found, figures, row, slot, context_tokens) for slot in shown]
                inspected.append(
                    InspectedToken(
                        text=lm.tokenizer.decode([int(target[row])]),
                        p_lm=float(figures.lm_log_prob[row].exp()),
                        p_knn=float(figures.knn_log_prob[row].exp().nan_to_num(0.0)),
                        p=float(figures.log_prob[row].exp()),
                        searched=bool(figures.searched[row]),
                        neighbours=neighbours,
                    )
                )
    return inspected


class FoundForTokens(NamedTuple):
    """What was found for ``n`` tokens, ``[n, slots]``; ``searched`` bool ``[n]``, None where all were."""

    distances: Tensor
    values: Tensor
    entries: Tensor
    counts: Tensor | None
    searched: Tensor | None


class Figures(NamedTuple):
    """Of ``n`` tokens: the neighbours' log weights ``[n, slots]``, all else ``[n]``."""

    log_weights: Tensor
    lm_log_prob: Tensor
    knn_log_prob: Tensor
    log_prob: Tensor
    searched: Tensor


def _tables(reader: Reader, reading: Reading) -> Iterator[tuple[slice, Tensor]]:
    """The LM's distributions on the CPU, ``[rows, vocabulary]``, some rows at a time."""
    count = len(reading.hidden)
    for begin in range(0, count, POSITIONS_AT_ONCE):
        for start, stop, table in reader.tables(reading.hidden, begin, min(begin + POSITIONS_AT_ONCE, count)):
            yield slice(start, stop), table.cpu()


def _neighbour_finder(lm: KNNHF, reading: Reading, targets: list[int]) -> Callable[[slice], FoundForTokens]:
    """What gives the neighbours of some of the window's tokens: a search, or a walk along all of it."""
    automaton, exclusion = lm.augmentation.automaton, lm.augmentation.exclusion
    contexts = None if exclusion is None else exclusion.contexts(reading)
    if automaton is None:

        def search(here: slice) -> FoundForTokens:
            found = FoundForTokens(*lm.retriever.search(reading.queries[here]), None)
            if exclusion is None or contexts is None:
                return found
            gone = exclusion.of_found(contexts.of_rows(here), found.entries)
            return found._replace(
                distances=found.distances.masked_fill(gone, math.inf), entries=found.entries.masked_fill(gone, -1)
            )

        return search

    walk = Walk(reading.queries.float().cpu().numpy(), np.array(targets), contexts=contexts)
    automaton.walk([walk], keep_neighbours=True)

    def steps(here: slice) -> FoundForTokens:
        neighbours = walk.neighbours[here]
        distances, values, entries = padded_neighbours(neighbours, automaton.values)
        return FoundForTokens(distances, values, entries, None, torch.from_numpy(walk.searched[here]))

    return steps


def _figures(mixture: Mixture, lm_log_probs: Tensor, found: FoundForTokens, target: Tensor) -> Figures:
    """The probabilities of the tokens ``target`` ``[n]``, whose LM's distributions are ``[n, vocabulary]``."""
    neighbours = mixture.weigh(found.distances, found.values, found.counts, lm_log_probs.device)
    lm_log_prob = lm_log_probs.gather(-1, target[:, None])[:, 0]
    knn = knn_log_prob(neighbours.log_weights, neighbours.values, target)
    lm_part = mixture.weight.lm_features(lm_log_probs)
    mixed = mix(lm_log_prob.double(), knn.double(), mixture.lmbda(lm_part, neighbours))
    searched = found.searched
    if searched is None:
        wanted = mixture.weight.wants_search(lm_part)
        searched = torch.ones(len(target), dtype=torch.bool) if wanted is None else wanted
    return Figures(neighbours.log_weights, lm_log_prob, knn, mixed, searched)


def _neighbour(
    lm: KNNHF, found: FoundForTokens, figures: Figures, row: int, slot: int, context_tokens: int
) -> Neighbour:
    place = lm.retriever.datastore.place(int(found.entries[row, slot]))
    return Neighbour(
        entry=place.entry,
        distance=float(found.distances[row, slot]),
        weight=float(figures.log_weights[row, slot].exp()),
        value=lm.tokenizer.decode([int(found.values[row, slot])]),
        context=_context(lm, place, context_tokens),
        store=place.name,
        document=place.document,
    )


def _context(lm: KNNHF, place: Place, length: int) -> str:
    """The text before an entry's value, from its document; nothing where the store is in no text order."""
    if place.document is None:
        return ""
    begin = max(int(place.store.document_starts[place.document]), place.entry - length)
    return lm.tokenizer.decode(place.store.values[begin : place.entry].tolist())
