"""Reading YAML files that people write: a key that nobody reads, or a value of another type, is told."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import yaml

from knn_lm_eval.errors import UserError, printable, shortened
from knn_lm_eval.system.json_schema import mismatch

MOST_BYTES, MOST_VALUES, DEEPEST = 2**20, 100_000, 50


def read_yaml(path: Path) -> Any:
    """What the file holds, each alias a copy; raises UserError where it is no YAML, or larger than any benchmark is."""
    try:
        if (size := path.stat().st_size) > MOST_BYTES:
            raise UserError(f"{path} has {size:,} bytes, which no benchmark's file has; is it another file?")
        return _copied(yaml.safe_load(path.read_text(encoding="utf-8")), iter(range(MOST_VALUES)))
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error
    except UserError:
        raise
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        # ValueError: no UTF-8, a date that is none, a number of thousands of digits
        reason = printable(" ".join(str(error).split()))
        raise UserError(f"{path} is not valid YAML: {reason:.500}") from error


def _copied(value: Any, left: Iterator[int], depth: int = 0) -> Any:
    """A value without aliases; raises ValueError where that is more than ``left`` values, or too deep."""
    if next(left, None) is None or depth > DEEPEST:
        raise ValueError("its aliases, or its depth, make it larger than any benchmark is")
    if isinstance(value, dict):
        return {name: _copied(inner, left, depth + 1) for name, inner in value.items()}
    if isinstance(value, list):
        return [_copied(inner, left, depth + 1) for inner in value]
    if isinstance(value, int) and value.bit_length() > 1024:
        raise ValueError("a number of hundreds of digits")
    return value


def check_types(content: dict[str, Any], schema: Any, where: str) -> None:
    """Raise UserError where a value is of another type than ``schema`` says."""
    if wrong := mismatch(content, schema):
        raise UserError(f"{where}: {wrong}.")


def mapping(value: Any, where: str) -> dict[str, Any]:
    """A copy of keys and values, of which there may be none; raises UserError where it is something else."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{where}: {shortened(value)} should be keys and values.")
    return dict(value)


def refuse_unknown(given: Collection[str], known: Collection[str], where: str) -> None:
    """Raise UserError where a key is given that is not known, with the nearest that is."""
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), list(known), 1, 0)
            raise UserError(f"{where}: unknown key {shortened(key)}; did you mean {near[0]!r}?")
