"""What a setting is: a field with its default, the values that it may be, what it means and where it comes from."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

from knn_lm_eval.errors import UserError
from knn_lm_eval.store.joined import BETWEEN


class Range(NamedTuple):
    """The numbers that a setting may be."""

    least: float
    most: float = math.inf
    whole: bool = False
    least_is_in: bool = True
    infinity_is_in: bool = False

    def __str__(self) -> str:
        """In words, such as "a whole number of at least 1"."""
        kind = "a whole number" if self.whole else "a number"
        if self.most < math.inf:
            return f"{kind} from {self.least:g} to {self.most:g}"
        beyond = ", or inf" if self.infinity_is_in else ""
        return f"{kind} {'of at least' if self.least_is_in else 'above'} {self.least:g}{beyond}"

    def check(self, name: str, value: Any) -> float:
        """The number, an int where it is to be whole (a command line makes 1e3 a float); raises UserError."""
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UserError(f"{name}={value!r} is not a number.")
        if self.whole and value % 1 != 0:  # neither is infinity
            raise UserError(f"{name}={value} is not a whole number.")
        above_least = value >= self.least if self.least_is_in else value > self.least
        if not (above_least and value <= self.most) or (value == math.inf and not self.infinity_is_in):
            raise UserError(f"{name}={value} must be {self}.")
        return int(value) if self.whole else value


def setting(
    default: Any,
    doc: str,
    *,
    of: Range | tuple[str, ...] | None = None,
    may_be: str = "",
    in_force: Any = None,
    shown_default: str = "",
    source: str = "",
) -> Any:
    """A field of ``RetrievalSettings``.

    Parameters
    ----------
    default : the value where none is given.
    doc : what it means.
    of : the numbers, or the words, that it may be; checked.
    may_be : what it may be, in words, where ``of`` does not say it or not all of it.
    in_force : the value that counts where the default is None and nothing (params, store, index) says otherwise.
    shown_default : in words, where ``default`` and ``in_force`` are both None.
    source : the paper or program that the setting comes from.
    """
    shown = shown_default or str(default if in_force is None else in_force)
    metadata = {"doc": doc, "of": of, "may_be": may_be, "in_force": in_force, "default": shown, "source": source}
    return dataclasses.field(default=default, metadata=metadata)


def range_in_words(field: dataclasses.Field) -> str:
    """What a setting may be, in words."""
    allowed = field.metadata["of"]
    if field.metadata["may_be"]:
        return field.metadata["may_be"]
    if isinstance(field.default, bool):
        return "True or False"
    return str(allowed) if isinstance(allowed, Range) else " or ".join(allowed)


def listed(value: Any) -> list[Any]:
    """A list that was given as one, or as a text with ``BETWEEN`` between its parts."""
    if isinstance(value, (list, tuple)):
        return list(value)
    return value.split(BETWEEN) if isinstance(value, str) else [value]


def read_store_weights(value: Any) -> tuple[float, ...]:
    """The weights of several stores; raises UserError."""
    try:
        weights = tuple(float(weight) for weight in listed(value))
    except (TypeError, ValueError):
        weights = ()
    if not weights or not all(0 < weight < math.inf for weight in weights):
        raise UserError(
            f"datastore_weights={value} should be a number above 0 for each datastore, such as 2{BETWEEN}0.5; exclude "
            f"leaves a store out."
        )
    return weights
