"""Damage to JSON and YAML: some of what stands in it is taken away, replaced or doubled, and its bytes are changed."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

LARGE = {"a": {"b": [1, "c"]}, "d": None}
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 7, 2**31, 2**63, -(2**63), 10**400, 0.5, -0.5, 1e308, float("nan"), float("inf")),
    *("", "a", "inf", "nan", "../x", "/", "\x1b[2J\x07", "\ud800", "x" * 3000, "a,b=c|d|e", "3"),
    *([], {}, [[]], [{}], [None], ["a", 1], {"": ""}, LARGE, [LARGE] * 3),
)


def mutated(content: Any, dice: random.Random) -> Any:
    """A copy of nested dictionaries and lists of which one to three places are changed."""
    content = copy.deepcopy(content)
    for _ in range(dice.randint(1, 3)):
        places = list(_places(content))
        if not places:
            break
        holder, name = dice.choice(places)
        match dice.randrange(4):
            case 0:
                del holder[name]
            case 1 if isinstance(holder, dict):
                holder[dice.choice(("", "other", "\x1b[1m", "count"))] = holder.pop(name)
            case 2:
                other, of_other = dice.choice(places)
                holder[name] = copy.deepcopy(other[of_other])
            case _:
                holder[name] = copy.deepcopy(dice.choice(VALUES))
    return content


def mutated_text(content: Any, write: Callable[[Any], str], seed: int) -> bytes:
    """What ``write`` makes of a mutated copy; for one seed in eight bytes of it are changed, too."""
    dice = random.Random(seed)
    data = bytearray(write(mutated(content, dice)).encode("utf-8", "surrogatepass"))
    if seed % 8 == 0 and data:
        for _ in range(dice.randint(1, 4)):
            place = dice.randrange(len(data))
            data[place : place + dice.randint(0, 3)] = dice.randbytes(dice.randint(0, 2))
            data = data or bytearray(b" ")
    return bytes(data)


def _places(content: Any) -> Any:
    """Each list or dictionary within, with each of its indices or names."""
    if isinstance(content, dict | list):
        for name in list(content) if isinstance(content, dict) else range(len(content)):
            yield content, name
            yield from _places(content[name])
