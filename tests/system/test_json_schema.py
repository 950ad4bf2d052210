"""A JSON object is what its schema says, or one sentence names the field, what it holds and what to do."""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal, TypedDict

import pytest

from knn_lm_eval.errors import UserError, printable, shortened
from knn_lm_eval.system.json_schema import Count, Within, check_json


class Inner(TypedDict):
    bytes: Count


class _Required(TypedDict):
    files: dict[str, Inner]


class Schema(_Required, total=False):
    runs: list[list[int]]
    lmbda: float | dict[str, Any] | None
    kind: Literal["l2", "dot"]
    part: Annotated[int, Within(0, 999)]
    text: str
    keys: Inner | None


GOOD: dict[str, Any] = {"files": {"a": {"bytes": 3}}}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"runs": [[0, 1], []], "lmbda": 1, "kind": "dot", "part": 999, "text": "", "keys": None},
        {"later": [float("nan")]},
        {"lmbda": None, "keys": {"bytes": 2**53, "later": {}}},
        {"lmbda": {"kind": ["anything"]}},
    ],
)
def test_what_fits_passes(more: dict[str, Any]) -> None:
    check_json(GOOD | more, Schema, "a.json", "make it again")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([], "it is [], not a JSON object"),
        ({}, "files is missing"),
        ({"files": [1]}, "files is [1], not a JSON object"),
        ({"files": {"a": 3}}, "files.a is 3, not a JSON object"),
        ({"files": {"a": {}}}, "files.a.bytes is missing"),
        ({"files": {"a": {"bytes": True}}}, "files.a.bytes is True, not a whole number of at least 0"),
        ({"files": {"a": {"bytes": -1}}}, "files.a.bytes is -1, not a whole number of at least 0"),
        ({"files": {"a": {"bytes": 3.0}}}, "files.a.bytes is 3.0, not a whole number of at least 0"),
        ({"files": {"\x1b[2J": 3}}, "files.\\x1b[2J is 3, not a JSON object"),
        (GOOD | {"files": {"a": {"bytes": 10**4000}}}, "files.a.bytes is an integer of 13,288 bits, not a whole"),
        (GOOD | {"runs": [[0], [1, "2"]]}, "runs[1][1] is '2', not a whole number"),
        (GOOD | {"lmbda": float("inf")}, "lmbda is inf, not a finite number or a JSON object or null"),
        (GOOD | {"lmbda": float("nan")}, "lmbda is nan, not a finite number or a JSON object or null"),
        (GOOD | {"kind": "cosine"}, "kind is 'cosine', not 'l2' or 'dot'"),
        (GOOD | {"part": 1000}, "part is 1000, not a whole number of at least 0 and at most 999"),
        (GOOD | {"text": 1}, "text is 1, not text"),
        (GOOD | {"keys": {"bytes": None}}, "keys.bytes is None, not a whole number"),
    ],
)
def test_what_does_not_fit_is_named(content: Any, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        check_json(content, Schema, "a.json", "make it again")
    assert str(caught.value).startswith(f"a.json is damaged: {sentence}")
    assert str(caught.value).endswith("; make it again.")


def test_a_value_of_any_size_is_shown_shortly_and_at_once() -> None:
    doubling: Any = []
    for _ in range(60):
        doubling = [doubling, doubling]
    began = time.perf_counter()
    for value in (doubling, ValueError(doubling), "x" * 10**6, {"a": doubling}, 10**5000, ValueError("\x1b]0;x\x07\n")):
        text = shortened(value)
        assert len(text) <= 80 and text == printable(text) and "\n" not in text
    assert time.perf_counter() - began < 1


def test_what_a_terminal_obeys_is_written_out() -> None:
    assert printable("naïve \x1b[31mred\x9b\u202e\ud800\t東京\n") == "naïve \\x1b[31mred\\x9b\\u202e\\ud800\t東京\n"
