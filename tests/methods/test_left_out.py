"""Which entries are left out at positions of texts: what plain loops over documents find."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from knn_lm_eval.methods.left_out import Contexts, TextPart, left_out

stores_of = st.lists(
    st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=9), min_size=1, max_size=4), min_size=1, max_size=3
)
text_of = st.lists(st.integers(0, 1), max_size=12)


@settings(deadline=None, max_examples=150)
@given(stores=stores_of, texts=st.lists(text_of, min_size=1, max_size=3), overlap=st.integers(1, 4), data=st.data())
def test_entries_are_those_of_plain_loops(
    stores: list[list[list[int]]], texts: list[list[int]], overlap: int, data: st.DataObject
) -> None:
    parts, documents, first = [], [], 0
    for store in stores:
        starts = np.cumsum([0, *map(len, store)])
        parts.append(TextPart(np.concatenate(store).astype(np.int32), starts[:-1], first))
        documents += [(first + int(start), document) for start, document in zip(starts, store, strict=False)]
        first += int(starts[-1])
    entries, contexts, expected = [], [], []
    for text in texts:
        away = sorted(data.draw(st.sets(st.integers(0, len(documents) - 1), max_size=3)))
        begins = [documents[number][0] for number in away]
        runs = np.array([begins, [b + len(documents[n][1]) for b, n in zip(begins, away, strict=True)]], dtype=np.int64)
        at = data.draw(st.integers(0, len(text)))
        contexts.append(Contexts.of_text(np.array(text), at, len(text) + 1 - at, overlap, runs.reshape(2, -1)))
        for position in range(at, len(text) + 1):
            row = data.draw(st.lists(st.integers(-1, first - 1), min_size=3, max_size=3))
            entries.append(row)
            expected.append([])
            for entry in row:
                gone = False
                for number, (start, document) in enumerate(documents):
                    if start <= entry < start + len(document):
                        own = entry - start
                        alike = min(own, position) >= overlap and (
                            document[own - overlap : own] == text[position - overlap : position]
                        )
                        gone = number in away or alike
                expected[-1].append(gone)
    joined = Contexts.joined(contexts)
    found = left_out(parts, joined, np.array(entries))
    assert found.tolist() == expected
    rows = np.arange(len(entries))[::-2]
    assert left_out(parts, joined.of_rows(rows), np.array(entries)[rows]).tolist() == [expected[row] for row in rows]
