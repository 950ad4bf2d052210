"""Changes to a file as damage, other programs and strangers make them, and checksums that fit afterwards."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from helpers.mutations import mutated_text

from knn_lm_eval.system.files import sha256
from knn_lm_eval.system.seals import write_sealed_json

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
    seed = int(rng.integers(2**31))
    return f"JSON changed by seed {seed}", mutated_text(json.loads(data), json.dumps, seed)


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


def forge(file: Path, store: Path) -> None:
    """Make every checksum that a store has of one of its files fit it."""
    if file.suffix == ".json":
        _reseal(file)
    if file.parent.suffix == ".codes" and file.suffix == ".npy":
        _reseal(file.parent / "codes.json", lambda content: content["files"].update({file.name: sha256(file)}))
    name = str(file.relative_to(store))

    def record(manifest: dict[str, Any]) -> None:
        for records in (manifest["files"], manifest.get("derived", {})):
            if name in records:
                records[name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}

    if file.name != "manifest.json":
        _reseal(store / "manifest.json", record)


def forget_derived(manifest: Path) -> None:
    """Leave the indexes and clusters of a store without checksums, as older versions and other programs do."""
    _reseal(manifest, lambda content: content.pop("derived", None))


def _reseal(file: Path, change: Callable[[dict[str, Any]], Any] = lambda content: None) -> None:
    """Change a JSON file, whose own checksum fits it afterwards, if there is anything in it that can be sealed."""
    try:
        content = json.loads(file.read_bytes())
        content.pop("sha256", None)
        change(content)
        write_sealed_json(file, content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return


def _with(data: bytes, place: int, run: bytes) -> bytes:
    return data[:place] + run + data[place + len(run) :]
