"""What a JSON object read from a file must hold, said by the annotations of a TypedDict and checked at once.

Names that a schema does not list are left alone: a later version may have written them. Every number that it lists
is finite, and every integer within ``Within``'s bounds.
"""

from __future__ import annotations

import functools
import math
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

from knn_lm_eval.errors import UserError, printable, shortened

MOST = 2**53  # beyond it, other programs' JSON has no integers
LONGEST = 2**16  # characters


@dataclass(frozen=True)
class Within:
    """Bounds of an integer, both included."""

    least: int
    most: int = MOST


Count = Annotated[int, Within(0)]
Positive = Annotated[int, Within(1)]


def check_json(content: Any, schema: Any, file: str | Path, remedy: str) -> None:
    """Raise UserError where ``content`` is not what ``schema`` says.

    Parameters
    ----------
    content : what was read.
    schema : a TypedDict, whose fields may be str, int, float, bool, None, Any, Literal, unions of these,
        ``Annotated[int, Within(...)]``, lists, dictionaries by name, and other TypedDicts.
    file : what the sentence names, with its path or its address.
    remedy : what to do about it.
    """
    if wrong := mismatch(content, schema):
        raise UserError(f"{file} is damaged: {wrong}; {remedy}.")


def mismatch(content: Any, schema: Any) -> str | None:
    """What in ``content`` is not as ``schema`` says, in a few words; None where all is."""
    return _wrong(content, schema, "")


def _wrong(value: Any, kind: Any, where: str) -> str | None:
    """What is wrong with a value, in a few words; None where nothing is."""
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return None
    if is_typeddict(kind) or origin is dict:
        if not isinstance(value, dict):
            return _mismatch(value, kind, where)
        return _wrong_field(value, kind, where)
    if origin is list and isinstance(value, list):
        return next(filter(None, (_wrong(each, args[0], f"{where}[{n}]") for n, each in enumerate(value))), None)
    if origin in (Union, types.UnionType):
        found = [_wrong(value, each, where) for each in args]
        if None in found:
            return None
        # A field within says more than that no alternative fits.
        return next((each for each in found if each and not each.startswith(f"{where} is ")), None) or _mismatch(
            value, kind, where
        )
    return None if _is(value, kind) else _mismatch(value, kind, where)


def _wrong_field(value: dict[str, Any], kind: Any, where: str) -> str | None:
    """What is wrong with a field of an object; None where nothing is."""
    if get_origin(kind) is dict:
        fields, required = dict.fromkeys(value, get_args(kind)[1]), frozenset[str]()
    else:
        fields, required = _fields(kind), kind.__required_keys__
    for name, of_field in fields.items():
        inner = f"{where}.{printable(name):.60}" if where else f"{printable(name):.60}"
        if name not in value:
            if name in required:
                return f"{inner} is missing"
        elif wrong := _wrong(value[name], of_field, inner):
            return wrong
    return None


@functools.cache
def _fields(schema: Any) -> dict[str, Any]:
    return get_type_hints(schema, include_extras=True)


def _is(value: Any, kind: Any) -> bool:
    """Whether a value without parts is of a kind without parts."""
    if get_origin(kind) is Literal:
        return any(type(value) is type(allowed) and value == allowed for allowed in get_args(kind))
    bounds = Within(-MOST)
    if get_origin(kind) is Annotated:
        kind, bounds = get_args(kind)
    if kind is int:
        return type(value) is int and bounds.least <= value <= bounds.most
    if kind is float:
        return (type(value) is float and math.isfinite(value)) or (type(value) is int and abs(value) <= MOST)
    if kind is str:
        return type(value) is str and len(value) <= LONGEST
    return type(value) is (type(None) if kind is None else kind)


def _mismatch(value: Any, kind: Any, where: str) -> str:
    return f"{where or 'it'} is {shortened(value)}, not {_described(kind)}"


def _described(kind: Any) -> str:
    origin, args = get_origin(kind), get_args(kind)
    if is_typeddict(kind) or origin is dict:
        return "a JSON object"
    if origin is list:
        return "a list"
    if origin is Literal:
        return " or ".join(map(repr, args))
    if origin is Annotated:
        bounds = args[1]
        most = f" and at most {bounds.most:,}" if bounds.most < MOST else ""
        return f"a whole number of at least {bounds.least:,}{most}"
    if origin in (Union, types.UnionType):
        return " or ".join(map(_described, args))
    names = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false", type(None): "null"}
    return names[kind]
