"""The float that knows over how many tokens it was summed."""

import copy
import json
import math
import pickle

import pytest
from sqlitedict import SqliteDict

from knn_lm_eval.model.scores import RollingLoglikelihood

SCORED = RollingLoglikelihood(-12.5, num_tokens=7, num_searches=3)


def same(other: float) -> bool:
    assert isinstance(other, RollingLoglikelihood)
    return (float(other), other.num_tokens, other.num_searches) == (-12.5, 7, 3)


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
