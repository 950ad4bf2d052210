"""Which documents are a text: what plain loops over all runs of both find."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from helpers.texts import Documents, count, in_parts
from hypothesis import given, settings
from hypothesis import strategies as st

from knn_lm_eval.methods import same_documents as same_documents_module
from knn_lm_eval.methods.same_documents import same_documents


def shared_in(text: Sequence[int], other: Sequence[int], documents: Documents, size: int, most: int) -> int:
    """How many tokens of ``text`` are of runs that ``other`` has as well, but for those that stand everywhere."""
    shared = set()
    for start in range(len(text) - size + 1):
        run = text[start : start + size]
        if count([other], run) and count(documents, run) <= most:
            shared |= set(range(start, start + size))
    return len(shared)


def expected(pieces: Documents, documents: Documents, text: list[int], size: int, most: int) -> list[int]:
    found = []
    for number, piece in enumerate(pieces):
        of_text = shared_in(text, list(piece), documents, size, most)
        of_piece = shared_in(list(piece), text, documents, size, most)
        if of_text and (Fraction(of_text, len(text)) >= 0.5 or Fraction(of_piece, len(piece)) >= 0.5):
            found.append(number)
    return found


def starts_of(documents: Documents) -> np.ndarray:
    return np.cumsum([0, *(len(document) for document in documents)])[:-1]


@settings(deadline=None, max_examples=150)
@given(
    documents=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=16), min_size=1, max_size=6),
    text=st.lists(st.integers(0, 3), max_size=24),
    cut=st.integers(0, 5),
    size=st.integers(1, 4),
    most=st.sampled_from([1, 2, 3, 1000]),
    at_once=st.sampled_from([1, 3, 2**20]),
    longest=st.sampled_from([4, 5, 7, 10_000]),
)
def test_documents_are_those_of_plain_loops(
    documents: Documents, text: list[int], cut: int, size: int, most: int, at_once: int, longest: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(same_documents_module, "MOST_PLACES", most)
        patch.setattr(same_documents_module, "PLACES_AT_ONCE", at_once)
        patch.setattr(same_documents_module, "LONGEST", longest)
        found = same_documents(in_parts(documents, cut), starts_of(documents), np.array(text, dtype=np.int64), size)
    pieces = [document[at : at + longest] for document in documents for at in range(0, len(document), longest)]
    bounds = [*starts_of(pieces), sum(map(len, pieces))]
    numbers = expected(pieces, documents, text, size, most)
    assert found.T.tolist() == [[bounds[number], bounds[number + 1]] for number in numbers]


def test_parts_of_documents_and_of_texts() -> None:
    rng = np.random.default_rng(0)
    book, other = rng.integers(0, 50, 900).tolist(), rng.integers(0, 50, 300).tolist()
    documents = [other, book, book[400:500], [*book[:120], *other[:130]], book[10:30], [*other, *book[:100]]]
    ngrams, starts = in_parts(documents, 3), starts_of(documents)

    def found(text: list[int]) -> list[int]:
        begins, _ = same_documents(ngrams, starts, np.array(text), 13)
        return [starts.tolist().index(begin) for begin in begins.tolist()]

    assert found(book) == [1, 2, 4]  # 3 has less than half of it
    assert found(book[:150]) == [1, 3, 4, 5]
    assert found([*other[:60], *book[:70]]) == [1, 3, 4, 5]
    assert found(book[:12]) == [] and found([]) == []
