"""What retrieval found for each token of a text: the neighbours, their contexts, and what they did to p."""

from __future__ import annotations

import numpy as np
import torch
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from knn_lm_eval.methods.adaptive import lm_features_for, read_lmbda, weights, worth_searching
from knn_lm_eval.methods.automaton import Walk
from knn_lm_eval.methods.mixture import knn_log_prob, mix, neighbour_log_weights
from knn_lm_eval.model.knn_hf import KNNHF
from knn_lm_eval.model.retomaton import padded_neighbours
from knn_lm_eval.report.tokens import InspectedToken, Neighbour

POSITIONS_AT_ONCE = 64  # whose logits and neighbours are in memory together


def inspect_text(lm: KNNHF, text: str, *, num_neighbours: int = 8, context_tokens: int = 24) -> list[InspectedToken]:
    """Each token of ``text`` with its probabilities and neighbours, read in ``lm``'s windows.

    Parameters
    ----------
    lm : a loaded ``knn-hf``; its settings decide between kNN-LM and RetoMaton.
    num_neighbours : neighbours shown per token; all k make up p_kNN.
    context_tokens : tokens shown before a neighbour's value, at most back to the beginning of its document.
    """
    windows = get_rolling_token_windows(
        token_list=lm.tok_encode(text),
        prefix_token=lm.prefix_token_id,
        max_seq_len=lm.max_length,
        context_len=lm.context_len,
    )
    inspected: list[InspectedToken] = []
    for context, targets in map(make_disjoint_window, windows):
        inspected += _inspect_window(lm, (context + targets)[:-1], targets, num_neighbours, context_tokens)
    return inspected


def _inspect_window(
    lm: KNNHF, tokens: list[int], targets: list[int], num_neighbours: int, context_tokens: int
) -> list[InspectedToken]:
    model, retriever, settings = lm.scorer.model, lm.retriever, lm.settings
    automaton = getattr(lm.scorer, "automaton", None)
    keys, hidden = (part[0, -len(targets) :] for part in model.encode(torch.tensor([tokens])))
    walk = Walk(keys.float().cpu().numpy(), np.array(targets))
    if automaton is not None:
        automaton.walk([walk], keep_neighbours=True)
    inspected, used = [], read_lmbda(settings["lmbda"])
    for start in range(0, len(targets), POSITIONS_AT_ONCE):
        here = slice(start, start + POSITIONS_AT_ONCE)
        target = torch.tensor(targets[here])
        lm_log_probs = torch.log_softmax(model.logits(hidden[here]).float(), dim=-1).cpu()
        lm_log_prob = lm_log_probs.gather(-1, target[:, None])[:, 0]
        if automaton is None:
            distances, values, entries, counts = retriever.search(keys[here])
        else:
            steps, counts = walk.neighbours[here], None
            distances, values = padded_neighbours(steps, automaton.values)
            entries = torch.full(distances.shape, -1)
            for row, (_, found) in zip(entries, steps, strict=True):
                row[: len(found)] = torch.from_numpy(found)
        log_weights = neighbour_log_weights(distances, settings["knn_temp"], counts)
        knn = knn_log_prob(log_weights, values, target)
        of_lm = lm_features_for(used, lm_log_probs)
        lmbda = weights(used, of_lm, distances, values)
        mixed = mix(lm_log_prob.double(), knn.double(), lmbda)
        worth = worth_searching(used, of_lm)
        searched = walk.searched[here] if automaton is not None else [True] * len(target) if worth is None else worth
        heaviest = log_weights.topk(min(num_neighbours, log_weights.shape[1]), dim=-1).indices
        for i, slots in enumerate(heaviest):
            neighbours = [
                Neighbour(
                    entry=int(entries[i, slot]),
                    distance=float(distances[i, slot]),
                    weight=float(log_weights[i, slot].exp()),
                    value=lm.tokenizer.decode([int(values[i, slot])]),
                    context=_context(lm, int(entries[i, slot]), context_tokens),
                )
                for slot in slots
                if entries[i, slot] >= 0
            ]
            inspected.append(
                InspectedToken(
                    text=lm.tokenizer.decode([targets[start + i]]),
                    p_lm=float(lm_log_prob[i].exp()),
                    p_knn=float(knn[i].exp()),
                    p=float(mixed[i].exp()),
                    searched=bool(searched[i]),
                    neighbours=neighbours,
                )
            )
    return inspected


def _context(lm: KNNHF, entry: int, length: int) -> str:
    """The text before an entry's value, from its document; nothing where the store is in no text order."""
    store = lm.retriever.datastore
    if not store.in_text_order:
        return ""
    document = np.searchsorted(store.document_starts, entry, side="right") - 1
    begin = max(int(store.document_starts[document]), entry - length)
    return lm.tokenizer.decode(store.values[begin:entry].tolist())
