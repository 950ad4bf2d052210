"""What retrieval found for each token of a text: the neighbours, their contexts, and what they did to p."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from knn_lm_eval.lm.reading import Passage, Reader, Reading, WholeText
from knn_lm_eval.methods.automaton import Automaton, Walk, padded_neighbours
from knn_lm_eval.methods.walk_origins import CLUSTER, POINTER, SEARCH, StepOrigins, walk_origins
from knn_lm_eval.model.knn_hf import KNNHF
from knn_lm_eval.model.ngram_mixture import NgramReader
from knn_lm_eval.report.tokens import CAME_BY, InspectedToken, Neighbour, WalkStep
from knn_lm_eval.store.datastore import Place
from knn_lm_eval.study.token_mixture import Figures, FoundForTokens, LMFigures, lm_figures, mixed_figures

POSITIONS_AT_ONCE = 64  # whose neighbours are in memory together


def inspect_text(lm: KNNHF, text: str, *, num_neighbours: int = 8, context_tokens: int = 24) -> list[InspectedToken]:
    """Each token of ``text`` with its probabilities and neighbours, read in ``lm``'s windows.

    Parameters
    ----------
    lm : a loaded ``knn-hf``; its settings decide between kNN-LM and RetoMaton.
    num_neighbours : neighbours shown per token; all k make up p_kNN.
    context_tokens : tokens shown before a neighbour's value, at most back to the beginning of its document.
    """
    reader, ngrams = Reader(lm.language_model, torch.float32), NgramReader(lm.augmentation.ngrams)
    mixture, ngram_lmbda = lm.augmentation.mixture, ngram_weight(lm)
    inspected: list[InspectedToken] = []
    walked: Walk | None = None
    tokens = lm.tok_encode(text)
    whole, end = WholeText.of(tokens[:-1]), 0  # end: of the window, in the text
    for context, targets in windows_of(lm, tokens):
        read, end = (context + targets)[:-1], end + len(targets)
        reading = reader.read([Passage(read, [targets], whole=whole, start=end - 1 - len(read))])
        lm_said = lm_figures(reader, reading, mixture.weight, ngrams)
        if (automaton := lm.augmentation.automaton) is not None:
            walked = _walked(lm, automaton, reading, walked if lm.carry_state else None)
        find = _search(lm, reading) if walked is None or automaton is None else _steps(automaton, walked)
        for begin in range(0, len(targets), POSITIONS_AT_ONCE):
            here = slice(begin, begin + POSITIONS_AT_ONCE)
            found, origins = find(here)
            figures = mixed_figures(mixture, ngram_lmbda, lm_said.of_rows(here), found)
            rows = TokenRows(lm, lm_said.of_rows(here), found, figures, origins)
            inspected += [rows.inspected(row, num_neighbours, context_tokens) for row in range(len(found.values))]
    return inspected


def windows_of(lm: KNNHF, tokens: list[int]) -> list[tuple[list[int], list[int]]]:
    """The context and the scored tokens of each window, as in rolling log-likelihoods."""
    windows = get_rolling_token_windows(
        token_list=tokens,
        prefix_token=lm.prefix_token_id,
        max_seq_len=lm.max_length,
        context_len=lm.context_len,
    )
    return list(map(make_disjoint_window, windows))


def ngram_weight(lm: KNNHF) -> float:
    """How much n-grams weigh; 0 without any."""
    return 0.0 if lm.augmentation.ngrams is None else lm.augmentation.ngrams.lmbda


Find = Callable[[slice], tuple[FoundForTokens, list[StepOrigins] | None]]


def _search(lm: KNNHF, reading: Reading) -> Find:
    exclusion = lm.augmentation.exclusion
    contexts = None if exclusion is None else exclusion.contexts(reading)

    def search(here: slice) -> tuple[FoundForTokens, None]:
        found = FoundForTokens(*lm.retriever.search(reading.queries[here]), None)
        if exclusion is None or contexts is None:
            return found, None
        gone = exclusion.of_found(contexts.of_rows(here), found.entries)
        distances, entries = found.distances.masked_fill(gone, math.inf), found.entries.masked_fill(gone, -1)
        return found._replace(distances=distances, entries=entries), None

    return search


def _walked(lm: KNNHF, automaton: Automaton, reading: Reading, before: Walk | None) -> Walk:
    """A walk along a window, which goes on from the one before, if there is one."""
    exclusion, ((_, targets),) = lm.augmentation.exclusion, reading.asked
    contexts = None if exclusion is None else exclusion.contexts(reading)
    walk = Walk(reading.queries.float().cpu().numpy(), np.array(targets), contexts=contexts)
    if before is not None:
        walk.survivors = before.survivors_at_end
    automaton.walk([walk], keep_neighbours=True)
    return walk


def _steps(automaton: Automaton, walk: Walk) -> Find:
    origins = walk_origins(automaton, walk)

    def steps(here: slice) -> tuple[FoundForTokens, list[StepOrigins]]:
        distances, values, entries = padded_neighbours(walk.neighbours[here], automaton.values)
        searched = torch.from_numpy(walk.searched[here])
        return FoundForTokens(distances, values, entries, None, searched), origins[here]

    return steps


class TokenRows(NamedTuple):
    """Some tokens, what was found for them, and their probabilities.

    Attributes
    ----------
    lm : the model.
    lm_said, found, figures : of the same tokens.
    origins : where a walk's candidates came from; None without a walk.
    """

    lm: KNNHF
    lm_said: LMFigures
    found: FoundForTokens
    figures: Figures
    origins: list[StepOrigins] | None

    def inspected(
        self, row: int, num_neighbours: int, context_tokens: int, heaviest_hit: bool = False
    ) -> InspectedToken:
        """One of them, with its heaviest neighbours; as for ``inspect_text``.

        Parameters
        ----------
        heaviest_hit : whether the heaviest neighbour whose value is the token comes behind those, where it is not
            among them.
        """
        figures, of_ngrams = self.figures, self.lm_said.ngram_log_prob
        log_weights = figures.log_weights[row]
        slots = log_weights.topk(min(num_neighbours, len(log_weights))).indices.tolist()
        slots = [slot for slot in slots if self.found.entries[row, slot] >= 0]
        (hits,) = self._hits(row).nonzero(as_tuple=True)
        if heaviest_hit and len(hits) and not set(slots) & set(hits.tolist()):
            slots.append(int(hits[log_weights[hits].argmax()]))
        neighbours = [self._neighbour(row, slot, context_tokens) for slot in slots]
        p_ngram = None if of_ngrams is None or of_ngrams[row].isnan() else float(of_ngrams[row].exp())
        return InspectedToken(
            text=self.lm.tokenizer.decode([int(self.lm_said.targets[row])]),
            p_lm=float(figures.lm_log_prob[row].exp()),
            p_knn=float(figures.knn_log_prob[row].exp().nan_to_num(0.0)),
            p=float(figures.log_prob[row].exp()),
            searched=bool(figures.searched[row]),
            neighbours=neighbours,
            p_ngram=p_ngram,
            step=self.step(row),
            found=int((self.found.entries[row] >= 0).sum()),
            hits=len(hits),
        )

    def _hits(self, row: int) -> Tensor:
        """Which slots have the token as their value."""
        return (self.found.values[row] == self.lm_said.targets[row]) & (self.found.entries[row] >= 0)

    def step(self, row: int) -> WalkStep | None:
        """The token's step of a walk; None without one."""
        if self.origins is None:
            return None
        survivors, origins = self.origins[row]
        weights = self.figures.log_weights[row, : len(origins)].exp().numpy()
        ways = [origins == way for way in (POINTER, CLUSTER, SEARCH)]
        return WalkStep(survivors, *(int(way.sum()) for way in ways), *(float(weights[way].sum()) for way in ways))

    def _neighbour(self, row: int, slot: int, context_tokens: int) -> Neighbour:
        found, tokenizer = self.found, self.lm.tokenizer
        place = self.lm.retriever.datastore.place(int(found.entries[row, slot]))
        return Neighbour(
            entry=place.entry,
            distance=float(found.distances[row, slot]),
            weight=float(self.figures.log_weights[row, slot].exp()),
            value=tokenizer.decode([int(found.values[row, slot])]),
            context=self._context(place, context_tokens),
            store=place.name,
            document=place.document,
            came_by=None if self.origins is None else CAME_BY[self.origins[row].of_candidates[slot]],
        )

    def _context(self, place: Place, length: int) -> str:
        """The text before an entry's value, from its document; nothing where the store is in no text order."""
        if place.document is None:
            return ""
        begin = max(int(place.store.document_starts[place.document]), place.entry - length)
        return self.lm.tokenizer.decode(place.store.values[begin : place.entry].tolist())
