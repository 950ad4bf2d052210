"""The files of datastores that other programs published: which is what, by its name, and whether it can be that.

What those programs call ``.npy`` are raw arrays without a header, whose size only the name tells:

- knn-transformers: ``dstore_{model}_{N}_{dim}_keys.npy`` (float16) and ``..._vals.npy`` (int32), the index
  ``index_{model}_{N}_{dim}.indexed``, clusters ``members*.pkl``;
- knnlm-limits: the same, with the index in parts ``..._{start}_{stop}.indexed``, each numbering its entries from 0;
- fairseq (kNN-LM, RetoMaton): ``{prefix}_size{N}_embed{dim}_fp16_keys.npy`` (without ``_fp16`` float32) and
  ``..._vals.npy`` (int64; kNN-LM's first version wrote int16 beside float16 keys), the index ``*.index``. Older
  ones have neither N nor dim in their names;
- efficient-knnlm: the same, and after merging ``..._weights.npy`` (int64): an entry of weight w stands for w.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from knn_lm_eval.errors import UserError
from knn_lm_eval.search.faiss_index import bytes_held, inverted_file, read_index
from knn_lm_eval.search.trial import try_first
from knn_lm_eval.system.memory import allowed_bytes, size_text

VALUE_DTYPES = {"knn-transformers": "int32", "knnlm-limits": "int32", "fairseq": "int64", "efficient-knnlm": "int64"}
LAYOUTS = tuple(VALUE_DTYPES)
WITH_MODEL_NAME = re.compile(r"dstore_(?P<rest>.+_(?P<count>\d+)_(?P<dimension>\d+))")
WITH_SIZE = re.compile(r".*size(?P<count>\d+)_embed(?P<dimension>\d+)(?P<half>_fp16)?")


@dataclass(frozen=True)
class PublishedPart:
    """A published index file, opened, and the entries ``[start, stop)`` that its name says it holds."""

    path: Path
    index: faiss.Index
    start: int
    stop: int


@dataclass(frozen=True)
class PublishedFiles:
    """The files of one published datastore; their sizes are as they should be.

    Attributes
    ----------
    layout : one of ``LAYOUTS``.
    count, dimension : entries and numbers per key.
    values : raw ``value_dtype [count]``.
    keys : raw ``key_dtype [count, dimension]``; None without.
    weights : raw int64 ``[count]``; None without.
    index : its parts in order, one for an index in one file; empty without an index.
    members : the pickled clusters; None without.
    """

    layout: str
    count: int
    dimension: int
    values: Path
    value_dtype: np.dtype
    keys: Path | None
    key_dtype: np.dtype
    weights: Path | None
    index: list[PublishedPart]
    members: Path | None


def find_published(
    sources: Sequence[Path],
    layout: str | None = None,
    count: int | None = None,
    dimension: int | None = None,
    memory: int | None = None,
) -> PublishedFiles:
    """Find out what the files of a published datastore are, and check their sizes.

    Parameters
    ----------
    sources : a folder, or the files.
    layout : one of ``LAYOUTS``; None tells it from the names.
    count, dimension : where the names do not say them, or say them wrongly; None takes the names', then the index's.
    memory : bytes that the opened index may take; None is half of what is available.

    Raises
    ------
    UserError
        Where files are missing, ambiguous, of another size than their name says, or do not belong together, or where
        the index takes more than ``memory``.
    """
    files = _list_files(sources)
    values = _only([path for path in files if path.name.endswith("_vals.npy")], "values (*_vals.npy)", sources)
    if values is None:
        raise UserError(f"{_named(sources)} holds no datastore: a file of values, *_vals.npy, is missing.")
    stem = values.name.removesuffix("_vals.npy")
    keys, weights = (
        next((path for path in files if path.name == f"{stem}_{role}.npy"), None) for role in ("keys", "weights")
    )
    name = WITH_SIZE.fullmatch(stem) or WITH_MODEL_NAME.fullmatch(stem)
    said = name.groupdict() if name else {}
    index, in_parts = _open_index(files, values, said.get("rest"), allowed_bytes(memory))
    layout = layout or _tell_layout(values, said, weights is not None, in_parts)
    count, dimension = _tell_size(values, said, index, count, dimension)
    if not keys and not index:
        raise UserError(
            f"{values} has neither keys ({stem}_keys.npy) nor an index beside it: there is nothing to search."
        )
    value_dtype, key_dtype = _tell_dtypes(layout, values, keys, said, count, dimension)
    _check_size(values, count, 1, value_dtype)
    if keys:
        _check_size(keys, count, dimension, key_dtype)
    if weights:
        _check_size(weights, count, 1, np.dtype(np.int64))
    _check_index(index, count, dimension)
    members = _only([p for p in files if "members" in p.name and p.suffix == ".pkl"], "clusters", sources)
    return PublishedFiles(layout, count, dimension, values, value_dtype, keys, key_dtype, weights, index, members)


def _list_files(sources: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for source in sources:
        if not source.exists():
            raise UserError(f"There is no {source} to import.")
        files += sorted(path for path in source.iterdir() if path.is_file()) if source.is_dir() else [source]
    return files


def _named(sources: Sequence[Path]) -> str:
    return ", ".join(map(str, sources))


def _only(paths: list[Path], what: str, sources: Sequence[Path]) -> Path | None:
    if len(paths) > 1:
        raise UserError(
            f"{_named(sources)} holds several {what}: {', '.join(path.name for path in paths)}; name the files of one "
            f"datastore instead of the folder."
        )
    return paths[0] if paths else None


def _find_index(files: list[Path], values: Path, rest: str | None) -> list[tuple[Path, int | None, int | None]]:
    """The index files, in order, with the start and stop that the names of parts say."""
    if rest is None:
        whole = _only([path for path in files if path.suffix == ".index"], "indexes (*.index)", [values.parent])
        return [(whole, None, None)] if whole else []
    candidates = [path for path in files if path.suffix == ".indexed"]
    part_name = re.compile(rf"index_{re.escape(rest)}_(\d+)_(\d+)\.indexed")
    parts = [(path, int(m[1]), int(m[2])) for path in candidates if (m := part_name.fullmatch(path.name))]
    one = [path for path in candidates if path.name == f"index_{rest}.indexed"]
    if candidates and not parts and not one:
        raise UserError(f"{candidates[0]} is no index of {values.name}: it should be called index_{rest}.indexed.")
    if parts and one:
        raise UserError(f"{one[0]} lies beside an index in parts; name the files to import instead of the folder.")
    return [(one[0], None, None)] if one else sorted(parts, key=lambda part: part[1:])


def _open_index(files: list[Path], values: Path, rest: str | None, allowed: int) -> tuple[list[PublishedPart], bool]:
    """The index's parts, opened, and whether it is one in parts."""
    paths = _find_index(files, values, rest)
    for path, _, _ in paths:
        try_first(path)
    index, held = list[PublishedPart](), 0
    for path, start, stop in paths:
        opened = read_index(path)
        index.append(PublishedPart(path, opened, start or 0, opened.ntotal if stop is None else stop))
        if (held := held + bytes_held(opened)) > allowed:
            raise UserError(
                f"The opened index takes {size_text(held)} of memory and more, and {size_text(allowed)} may be taken: "
                f"give a larger --memory, or leave {path.name} out and build another with build_index."
            )
    return index, any(start is not None for _, start, _ in paths)


def _tell_layout(values: Path, said: dict[str, Any], has_weights: bool, in_parts: bool) -> str:
    if "rest" in said:
        return "knnlm-limits" if in_parts else "knn-transformers"
    if not said:
        raise UserError(f"The name {values.name} does not tell its layout; give --layout ({', '.join(LAYOUTS)}).")
    return "efficient-knnlm" if has_weights else "fairseq"


def _tell_size(
    values: Path, said: dict[str, Any], index: list[PublishedPart], count: int | None, dimension: int | None
) -> tuple[int, int]:
    """Entries and numbers per key: as given, as the names say, or as the index has them."""
    count = count or (int(said["count"]) if said else None)
    dimension = dimension or (int(said["dimension"]) if said else None)
    if index:
        count, dimension = count or index[-1].stop, dimension or index[0].index.d
    if count is None or dimension is None:
        raise UserError(
            f"The name {values.name} does not say how many entries there are; give --count and --dimension."
        )
    return count, dimension


def _tell_dtypes(
    layout: str, values: Path, keys: Path | None, said: dict[str, Any], count: int, dimension: int
) -> tuple[np.dtype, np.dtype]:
    """The dtypes of values and keys; where the names say none, those that the files' sizes allow."""
    value_dtype = np.dtype(VALUE_DTYPES[layout])
    if value_dtype == np.int64 and values.stat().st_size == 2 * count:
        value_dtype = np.dtype(np.int16)
    is_half = VALUE_DTYPES[layout] == "int32" or bool(said.get("half"))
    if keys and not said:
        is_half = keys.stat().st_size == 2 * count * dimension
    return value_dtype, np.dtype(np.float16 if is_half else np.float32)


def _check_size(path: Path, count: int, width: int, dtype: np.dtype) -> None:
    size, expected = path.stat().st_size, count * width * dtype.itemsize
    if size == expected:
        return
    fits = []
    if size % (width * dtype.itemsize) == 0:
        fits.append(f"{size // (width * dtype.itemsize):,} entries of {width}")
    if width > 1 and size % (count * dtype.itemsize) == 0:
        fits.append(f"{count:,} entries of {size // (count * dtype.itemsize)}")
    raise UserError(
        f"{path} has {size:,} bytes, but {count:,} entries of {width} {dtype} take {expected:,}: it holds "
        f"{' or '.join(fits) or 'no whole number of entries'}; copy it again, or give --count and --dimension."
    )


def _check_index(index: list[PublishedPart], count: int, dimension: int) -> None:
    done = 0
    for part in index:
        if part.start != done:
            wrong = "in no part" if part.start > done else "in two parts"
            first, last = sorted((part.start, done))
            raise UserError(
                f"The index has entries {first:,} to {last - 1:,} {wrong}: see {part.path}; copy all parts."
            )
        if part.index.ntotal != part.stop - part.start or part.index.d != dimension:
            raise UserError(
                f"{part.path} holds {part.index.ntotal:,} vectors of {part.index.d} numbers; "
                f"{part.stop - part.start:,} of {dimension} were expected: it is incomplete or of another datastore."
            )
        done = part.stop
    if index and done != count:
        what = f"entries {done:,} to {count - 1:,} are in no part" if len(index) > 1 else f"it holds {done:,}"
        raise UserError(f"The index {index[-1].path} does not cover the {count:,} entries: {what}; copy it again.")


def ids_are_relative(index: list[PublishedPart]) -> bool:
    """Whether parts number their entries from 0, by the first part in whose lists that can be seen."""
    for part in index:
        ivf = inverted_file(part.index)
        for number in range(0 if ivf is None or part.start == 0 else ivf.nlist):
            lists: Any = ivf.invlists  # type: ignore[union-attr]
            if size := lists.list_size(number):
                ids = faiss.rev_swig_ptr(lists.get_ids(number), size)
                if ids.min() < part.start:
                    return True
                if ids.max() >= part.stop - part.start:
                    return False
    return True
