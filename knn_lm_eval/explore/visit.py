"""What the page shows a visitor, and what it keeps for one: pieces of HTML, whatever goes wrong."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from knn_lm_eval.errors import UserError, counted, shortened
from knn_lm_eval.report import explore_views as views
from knn_lm_eval.report.token_page import most_changed
from knn_lm_eval.report.tokens import InspectedToken
from knn_lm_eval.study.continuation import Sampling, continue_both
from knn_lm_eval.study.exploration import ExploredSettings, Explorer, KeptText, MixedText

logger = logging.getLogger(__name__)

NEIGHBOURS, CONTEXT = 12, 24  # shown of a token; tokens of context before each
NO_WALK = (
    "This is kNN-LM, which searches at every token. Give retomaton=True (and clusters=NAME, if the datastore has "
    "clusters) in --model_args to see RetoMaton's walk: which neighbours came by pointers, clusters and searches."
)
READ_FIRST = "Read a text first: this page keeps none for you (any more)."

Answer = TypeVar("Answer")


@dataclass
class Visit:
    """A visitor's text with the settings of the moment.

    Attributes
    ----------
    kept : what was read and found.
    mixed, tokens : the same with the settings; tokens are without their neighbours.
    chosen : the token whose details are open.
    """

    kept: KeptText
    mixed: MixedText
    tokens: list[InspectedToken]
    chosen: int


class Shown(NamedTuple):
    """The page's parts, as HTML."""

    summary: str
    tokens: str
    details: str
    walk: str

    @classmethod
    def complaining(cls, sentence: str) -> Shown:
        """A sentence, and nothing else."""
        return cls(views.complaint(sentence), "", "", "")


def in_sentences(complain: Callable[[str], Answer]) -> Callable[[Callable[..., Answer]], Callable[..., Answer]]:
    """Have a function answer with ``complain`` of a sentence, where it would raise an error."""

    def decorate(work: Callable[..., Answer]) -> Callable[..., Answer]:
        @functools.wraps(work)
        def answer(*args: Any, **kwargs: Any) -> Answer:
            try:
                return work(*args, **kwargs)
            except UserError as error:
                return complain(str(error))
            except Exception as error:
                logger.exception("The page could not answer.")
                return complain(f"This failed ({shortened(error)}); the terminal says more.")

        return answer

    return decorate


def nothing_read(sentence: str) -> tuple[Visit | None, Shown]:
    """What reading answers where nothing can be read."""
    return None, Shown.complaining(sentence)


class Desk:
    """Answers visitors; several threads may ask it.

    Parameters
    ----------
    explorer : has the LM and the datastore.
    """

    def __init__(self, explorer: Explorer) -> None:
        self.explorer = explorer

    @in_sentences(nothing_read)
    def read(self, text: str, settings: Callable[[], ExploredSettings]) -> tuple[Visit | None, Shown]:
        """Read a text, and open the details of the token that retrieval changed most."""
        asked = settings()
        kept = self.explorer.read(text)
        mixed = self.explorer.mix(kept, asked)
        tokens = self.explorer.tokens(mixed)
        visit = Visit(kept, mixed, tokens, most_changed(tokens))
        return visit, self._shown(visit)

    @in_sentences(Shown.complaining)
    def change(self, visit: Visit, settings: Callable[[], ExploredSettings]) -> Shown:
        """Mix the text that was read anew."""
        visit.mixed = self.explorer.mix(visit.kept, settings())
        visit.tokens = self.explorer.tokens(visit.mixed)
        return self._shown(visit)

    @in_sentences(views.complaint)
    def choose(self, visit: Visit | None, token: int) -> str:
        """The details of a token, by its number from 0."""
        if visit is None or not 0 <= token < len(visit.tokens):
            raise UserError(READ_FIRST)
        visit.chosen = token
        return self._details(visit)

    @in_sentences(views.complaint)
    def go_on(self, prompt: str, settings: Callable[[], ExploredSettings], new_tokens: int, sampling: Sampling) -> str:
        """The text's continuations with retrieval and without."""
        both = continue_both(self.explorer, prompt, settings(), new_tokens, sampling)
        how = (
            f"drawn at temperature {sampling.temperature:g}, seed {sampling.seed}" if sampling.temperature else "greedy"
        )
        if not (both.with_retrieval or both.by_lm):
            said = f"Both are the same ({how})."
        elif both.same_tokens:
            said = f"Grey is what both begin with, {counted(both.same_tokens, 'token')} ({how})."
        else:
            said = f"They differ from the first token on ({how})."
        if both.left_out:
            said += f" The window has no room for the text's first {counted(both.left_out, 'token')}."
        return views.continuations(both.same, both.with_retrieval, both.by_lm, said)

    def _shown(self, visit: Visit) -> Shown:
        return Shown(
            views.summary(
                visit.tokens, self._read_in_words(visit), model_args(visit.mixed.settings, self.explorer.walks)
            ),
            views.coloured_tokens(visit.tokens, visit.chosen),
            self._details(visit),
            views.walk(visit.tokens) if self.explorer.walks else views.note(NO_WALK),
        )

    def _details(self, visit: Visit) -> str:
        token = self.explorer.token(visit.mixed, visit.chosen, num_neighbours=NEIGHBOURS, context_tokens=CONTEXT)
        several_stores = len(self.explorer.lm.retriever.of_stores) > 1
        return views.token_details(token, visit.chosen + 1, several_stores)

    def _read_in_words(self, visit: Visit) -> str:
        tokens, windows = len(visit.kept), len(visit.kept.windows)
        said = f"{counted(tokens, 'token')}, {counted(visit.mixed.searches, 'search', 'searches')}."
        if windows == 1:
            return said
        lm = self.explorer.lm
        context = (
            "sees nothing of the text before it" if lm.context_len == 1 else f"sees {lm.context_len} tokens before"
        )
        return f"{said} Read in {windows} windows of at most {lm.max_length:,} tokens, as in scoring: each {context}."


def model_args(settings: ExploredSettings, walks: bool) -> str:
    """The settings as ``--model_args`` takes them."""
    parts = [f"k={settings.k}"]
    if settings.lmbda is not None:
        parts.append(f"lmbda={settings.lmbda:g}")
    parts.append(f"knn_temp={settings.knn_temp:.4g}")
    if walks:
        parts.append(f"min_knns={settings.min_knns:g}")
    return ",".join(parts)
