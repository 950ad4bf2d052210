"""Changes to a file as damage, other programs and strangers make them, and checksums that fit afterwards."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from knn_lm_eval.store.manifest import file_record

ODD_VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 7, 2**31, -(2**31), 2**63, 10**30, 0.5, -0.5, 1e308),
    *(float("nan"), float("inf"), -float("inf")),
    *("", "x", "inf", "nan", "../../x", "\x1b[31mred", "x" * 5000, "\ud800"),
    *([], [[]], [1, 2], [None], {}, {"a": {}}, {"": 0}),
]
EXTREME_NUMBERS = [0, 1, -1, 2, 127, -128, 255, 2**15, 2**31 - 1, -(2**31), 2**62, -(2**62), np.nan, np.inf, -np.inf]


def mutate(data: bytes, suffix: str, rng: np.random.Generator) -> tuple[str, bytes]:
    """A description, and the changed file."""
    ways = [flip_bit, flip_bit, set_byte, cut_off, append, zero_a_run, repeat_a_run, swap_runs, empty]
    if suffix == ".json":
        ways = [change_json] * 8 + [nest_json] + ways
    elif suffix == ".npy":
        ways = [change_numbers] * 3 + [change_header] * 3 + ways
    way = ways[rng.integers(len(ways))]
    if not data:
        way = append
    return way(data, rng)


def flip_bit(data: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    place, bit = int(rng.integers(len(data))), int(rng.integers(8))
    return f"bit {bit} of byte {place} flipped", _with(data, place, bytes([data[place] ^ (1 << bit)]))


def set_byte(data: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    place, byte = int(rng.integers(len(data))), int(rng.integers(256))
    return f"byte {place} set to {byte}", _with(data, place, bytes([byte]))


def cut_off(data: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    place = int(rng.integers(len(data)))
    return f"cut off at {place}", data[:place]


def append(data: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    more = rng.bytes(int(rng.integers(1, 64)))
    return f"{len(more)} bytes more", data + more


def zero_a_run(data: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    start, size = int(rng.integers(len(data))), int(rng.integers(1, 4097))
    size = min(size, len(data) - start)
    return f"{size} zeros at {start}", _with(data, start, bytes(size))


def repeat_a_run(data: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    start, size = int(rng.integers(len(data))), int(rng.integers(1, 513))
    return f"{size} bytes at {start} twice", data[: start + size] + data[start:]


def swap_runs(data: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    size = int(rng.integers(1, max(2, min(512, len(data) // 2 + 1))))
    one, other = (int(place) for place in rng.integers(0, max(1, len(data) - size), 2))
    first, second = data[one : one + size], data[other : other + size]
    return f"{size} bytes at {one} and {other} swapped", _with(_with(data, one, second), other, first)


def empty(data: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    return "emptied", b""


def change_json(data: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    """One of its values, at any depth, is another one or gone."""
    content = json.loads(data)
    places = list(_places(content))
    holder, key = places[rng.integers(len(places))]
    before = holder[key]
    choices = [*ODD_VALUES, "gone", "number"]
    value = choices[rng.integers(len(choices))]
    if value == "gone":
        del holder[key]
    elif value == "number" and isinstance(before, (int, float)) and not isinstance(before, bool):
        value = holder[key] = before + [1, -1, before, 0.5][rng.integers(4)]
    else:
        holder[key] = value
    text = json.dumps(content, indent=1)
    return f"JSON {key!r}: {str(before)[:40]!r} -> {str(value)[:40]!r}", text.encode()


def nest_json(data: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    forms = [
        b"[" * 50_000,
        b'{"a":' * 50_000,
        b'{"count": ' + b"9" * 9000 + b"}",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe{}",
    ]
    form = forms[rng.integers(len(forms))]
    return f"JSON {form[:12]!r}...", form


def change_numbers(data: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    """Some numbers of an array are others."""
    array = np.load(io.BytesIO(data))
    if not array.size:
        return append(data, rng)
    places = rng.integers(0, array.size, int(rng.integers(1, 4)))
    value = EXTREME_NUMBERS[rng.integers(len(EXTREME_NUMBERS))]
    with np.errstate(all="ignore"):
        array.reshape(-1)[places] = np.array(value, dtype=np.float64).astype(array.dtype)
    file = io.BytesIO()
    np.save(file, array)
    return f"numbers at {places.tolist()} set to {value}", file.getvalue()


def change_header(data: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    """The header says another shape, order or dtype, or holds what is no header."""
    size = 10 + int.from_bytes(data[8:10], "little")
    header = data[10:size].decode("latin1")
    changes = [
        ("False", "True "),
        ("'<", "'>"),
        ("<i4", "<f4"),
        ("<i8", "<u8"),
        ("<f2", "<i2"),
        ("'descr': '<", "'descr': '|"),
        ("(", "(-"),
        ("(", "(9"),
        ("(", "(999999999999,"),
        (")", "999)"),
        (", }", ", 'x': __import__('os')}"),
        ("<i4", "|O8"),
        ("<f2", "|V2"),
    ]
    old, new = changes[rng.integers(len(changes))]
    changed = header.replace(old, new, 1).rstrip() + "\n"
    changed = (
        changed.ljust(len(header) - 1)[: len(header) - 1].rstrip("\n") + "\n"
        if len(changed) <= len(header)
        else changed
    )
    raw = changed.encode("latin1")
    return f"header {old!r} -> {new!r}", data[:8] + len(raw).to_bytes(2, "little") + raw + data[size:]


def forge(file: Path, store: Path, forget_derived: bool = False) -> None:
    """Make the checksums that a store has of one of its files fit it; or forget all those of what was made from it."""
    manifest = store / "manifest.json"
    try:
        content = json.loads(manifest.read_bytes())
        name = str(file.relative_to(store))
        for records in (content["files"], content.get("derived", {})):
            if name in records:
                records[name] = file_record(file)
        if forget_derived:
            content.pop("derived", None)
        manifest.write_text(json.dumps(content, indent=1))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return  # the manifest itself is what was changed


def _places(content: Any) -> Any:
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in list(items):
        yield content, key
        yield from _places(value)


def _with(data: bytes, place: int, run: bytes) -> bytes:
    return data[:place] + run + data[place + len(run) :]
