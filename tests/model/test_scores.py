"""The float that knows over how many tokens it was summed."""

import copy
import json
import math
import pickle

import pytest
from sqlitedict import SqliteDict

from knn_lm_eval.model.scores import MOST_SPANS, RollingLoglikelihood, spans_of

SPANS = [(-10.0, 4), (-2.5, 3)]
SCORED = RollingLoglikelihood(-12.5, num_tokens=7, num_searches=3, spans=SPANS)


def same(other: float) -> bool:
    assert isinstance(other, RollingLoglikelihood)
    return (float(other), other.num_tokens, other.num_searches, other.spans) == (-12.5, 7, 3, SPANS)


def test_is_the_float_it_stands_for() -> None:
    assert SCORED == -12.5
    assert isinstance(SCORED, float)
    assert math.exp(-SCORED / SCORED.num_tokens) == math.exp(12.5 / 7)
    assert str(SCORED) == repr(SCORED) == "-12.5"


def test_searches_are_unknown_unless_given() -> None:
    assert RollingLoglikelihood(-1.0, 2).num_searches is None


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_keeps_its_counts_through_pickle(protocol: int) -> None:
    assert same(pickle.loads(pickle.dumps(SCORED, protocol)))


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_keeps_its_counts_when_copied(duplicate) -> None:
    assert same(duplicate(SCORED))
    assert same(duplicate([SCORED])[0])


def test_keeps_its_counts_in_the_cache_of_responses(tmp_path) -> None:
    with SqliteDict(str(tmp_path / "cache.db"), autocommit=True) as cache:
        cache["text"] = SCORED
        assert same(cache["text"])


def test_is_a_plain_number_in_json() -> None:
    assert json.dumps({"resps": [SCORED]}) == '{"resps": [-12.5]}'


def test_a_cache_of_before_has_no_spans() -> None:
    pickled = (
        b"\x80\x02cknn_lm_eval.model.scores\nRollingLoglikelihood\nq\x00G\xc0)\x00\x00\x00\x00\x00\x00K\x07K\x03\x87q\x01\x81q\x02"
        b"}q\x03(X\n\x00\x00\x00num_tokensq\x04K\x07X\x0c\x00\x00\x00num_searchesq\x05K\x03ub."
    )
    old = pickle.loads(pickled)
    assert (float(old), old.num_tokens, old.num_searches, old.spans) == (-12.5, 7, 3, None)


def test_very_many_windows_are_summed_up() -> None:
    windows = [(-float(number), 1) for number in range(2 * MOST_SPANS + 1)]
    spans = spans_of(windows)
    assert len(spans) <= MOST_SPANS and spans[0] == (-3.0, 3)
    assert (sum(s for s, _ in spans), sum(n for _, n in spans)) == (sum(s for s, _ in windows), len(windows))
    assert spans_of(windows[:MOST_SPANS]) == windows[:MOST_SPANS] and spans_of([]) == []
