"""Look-ups in a suffix array are what plain loops over the documents find, in one part or in several."""

from __future__ import annotations

import math

import numpy as np
from helpers.texts import Documents, count, in_parts, longest_end, ngram_p, sorted_text
from hypothesis import given, settings
from hypothesis import strategies as st

from knn_lm_eval.methods.ngrams import common_context

documents_of = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=5)
read = st.lists(st.integers(0, 3), min_size=1, max_size=14)


@settings(deadline=None, max_examples=200)
@given(documents=documents_of, tokens=read, cut=st.integers(0, 4), first=st.integers(0, 14), continued=st.booleans())
def test_matches(documents: Documents, tokens: list[int], cut: int, first: int, continued: bool) -> None:
    ngrams, first = in_parts(documents, cut), min(first, len(tokens))
    matches = ngrams.matches(tokens, first, len(tokens) + 1 - first, continued)
    for row, stop in enumerate(range(first, len(tokens) + 1)):
        length = longest_end(documents, tokens[:stop], continued)
        assert matches.lengths[row] == length
        if length:
            assert matches.counts[row] == count(documents, tokens[stop - length : stop], continued)


@settings(deadline=None, max_examples=200)
@given(documents=documents_of, tokens=read, cut=st.integers(0, 4))
def test_probabilities(documents: Documents, tokens: list[int], cut: int) -> None:
    ngrams = in_parts(documents, cut)
    matches = ngrams.matches(tokens, 0, len(tokens) + 1)
    for row in range(len(tokens) + 1):
        expected = [ngram_p(documents, tokens[:row], target) for target in range(4)]
        found = ngrams.probabilities(matches, np.full(4, row), np.arange(4))
        np.testing.assert_allclose(found, expected, rtol=1e-12)
        following, p = ngrams.next_tokens(matches, row)
        assert following.tolist() == [target for target in range(4) if expected[target] > 0]
        np.testing.assert_allclose(p, [expected[target] for target in following], rtol=1e-12)
        assert math.isnan(expected[0]) or math.isclose(sum(expected), 1)


@settings(deadline=None, max_examples=200)
@given(documents=documents_of, tokens=read, cut=st.integers(0, 4))
def test_overlap_lengths(documents: Documents, tokens: list[int], cut: int) -> None:
    expected = [longest_end(documents, tokens[: at + 1], False) for at in range(len(tokens))]
    assert in_parts(documents, cut).overlap_lengths(tokens).tolist() == expected


@settings(deadline=None, max_examples=200)
@given(documents=documents_of, tokens=read, most=st.integers(0, 9))
def test_common_context(documents: Documents, tokens: list[int], most: int) -> None:
    part = sorted_text(documents)
    starts = np.cumsum([0, *(len(document) for document in documents)])[:-1]
    pairs, expected = [], []
    for position in range(len(tokens) + 1):
        for start, document in zip(starts.tolist(), documents, strict=True):
            for at in range(len(document)):
                pairs.append((position, start + at))
                common = 0
                while common < min(position, at, most) and tokens[position - 1 - common] == document[at - 1 - common]:
                    common += 1
                expected.append(common)
    positions, entries = np.array(pairs).T
    found = common_context(part.text, starts, tokens, positions, entries, most)
    assert found.tolist() == expected
    as_table = common_context(part.text, starts, tokens, positions[None], entries[None], most)
    assert as_table.tolist() == [expected]


def test_long_repeats() -> None:
    """A long run that ends, and one token over and over."""
    rng = np.random.default_rng(0)
    text = rng.integers(0, 9, 1500).tolist()
    documents = [text, [5] * 400, text[200:900]]
    tokens = [*text[100:800], 8, 8, *[5] * 450, *text[300:]]
    at = [*range(0, len(tokens), 97), 699, 700, 701, 702, 1100, 1101, 1102, 1103, 1151]
    found = in_parts(documents, 1).overlap_lengths(tokens)
    as_words = [" ".join(map(str, document)) for document in documents]  # single digits: no two are taken for one

    def occurs(some: list[int]) -> bool:
        return any(" ".join(map(str, some)) in words for words in as_words)

    for place in at:
        length = int(found[place])
        assert occurs(tokens[place + 1 - length : place + 1])
        assert length == place + 1 or not occurs(tokens[place - length : place + 1])
    assert found[699] == 700 and found.max() > 1000
