"""Sizes of memory as people write them."""

from __future__ import annotations

import pytest

from knn_lm_eval.errors import UserError
from knn_lm_eval.system import memory
from knn_lm_eval.system.memory import allowed_bytes, available_bytes, parse_bytes, size_text


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 2**33),
        ("8G", 2**33),
        ("8gi", 2**33),
        ("8 GB", 8 * 10**9),
        ("512MiB", 2**29),
        ("512m", 2**29),
        ("1.5T", 3 * 2**39),
        (".5k", 512),
        ("100", 100),
        ("100B", 100),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-8G", "8X", "8GiBs", "0", "0.1", "nan", "inf", "8,5G", "1e3"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="no size of memory: give a number with its unit"):
        parse_bytes(text)


@pytest.mark.parametrize("size", [1, 2**20, 2**20 + 1, 2**30 - 1, 2**30, 5 * 2**30 + 1, 7 * 10**11])
def test_a_size_that_is_said_is_enough(size: int) -> None:
    said = parse_bytes(size_text(size))
    assert size <= said <= 1.1 * size + 2**20


def test_by_default_half_of_what_is_available(monkeypatch) -> None:
    assert allowed_bytes(12345) == 12345
    monkeypatch.setattr(memory, "available_bytes", lambda: 2**34)
    assert allowed_bytes(None) == 2**33
    monkeypatch.setattr(memory, "available_bytes", lambda: None)  # as on other systems
    assert allowed_bytes(None) > 2**20
    assert available_bytes() is None or available_bytes() > 0
