"""Taking over datastores that other programs wrote, without copying their large files.

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

import datetime
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from faiss.contrib.factory_tools import reverse_index_factory
from tqdm import tqdm

from knn_lm_eval.errors import UserError
from knn_lm_eval.lm.fingerprint import check_model_sizes, take_fingerprint
from knn_lm_eval.make.members import import_members
from knn_lm_eval.search.faiss_index import METRICS, inverted_file, read_index
from knn_lm_eval.store.datastore import FORMAT, FORMAT_VERSION, MANIFEST, Datastore, file_record, record_derived
from knn_lm_eval.store.index_files import IndexFiles
from knn_lm_eval.system.files import (
    check_free_space,
    check_new_folder,
    disk_errors_in,
    finished_folder,
    write_json,
    write_npy_header,
)
from knn_lm_eval.version import __version__

logger = logging.getLogger(__name__)

VALUE_DTYPES = {"knn-transformers": "int32", "knnlm-limits": "int32", "fairseq": "int64", "efficient-knnlm": "int64"}
LAYOUTS = tuple(VALUE_DTYPES)
WITH_MODEL_NAME = re.compile(r"dstore_(?P<rest>.+_(?P<count>\d+)_(?P<dimension>\d+))")
WITH_SIZE = re.compile(r".*size(?P<count>\d+)_embed(?P<dimension>\d+)(?P<half>_fp16)?")
PUBLISHED_PROBE = 32
CLUSTERS = "members"
CHUNK = 2**20


@dataclass(frozen=True)
class IndexPart:
    """A published index file, opened, and the entries ``[start, stop)`` that its name says it holds."""

    path: Path
    index: faiss.Index
    start: int
    stop: int


@dataclass(frozen=True)
class Published:
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
    index: list[IndexPart]
    members: Path | None


def find_published(
    sources: Sequence[Path], layout: str | None = None, count: int | None = None, dimension: int | None = None
) -> Published:
    """Find out what the files of a published datastore are, and check their sizes.

    Parameters
    ----------
    sources : a folder, or the files.
    layout : one of ``LAYOUTS``; None tells it from the names.
    count, dimension : where the names do not say them, or say them wrongly; None takes the names', then the index's.

    Raises
    ------
    UserError
        Where files are missing, ambiguous, of another size than their name says, or do not belong together.
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
    index_paths = _find_index(files, values, said.get("rest"))
    in_parts = any(start is not None for _, start, _ in index_paths)
    layout = layout or _tell_layout(values, said, weights is not None, in_parts)
    count = count or (int(said["count"]) if said else None)
    dimension = dimension or (int(said["dimension"]) if said else None)
    index = [
        IndexPart(path, opened := read_index(path), start or 0, opened.ntotal if stop is None else stop)
        for path, start, stop in index_paths
    ]
    if index:
        count, dimension = count or index[-1].stop, dimension or index[0].index.d
    if count is None or dimension is None:
        raise UserError(
            f"The name {values.name} does not say how many entries there are; give --count and --dimension."
        )
    if not keys and not index:
        raise UserError(
            f"{values} has neither keys ({stem}_keys.npy) nor an index beside it: there is nothing to search."
        )

    value_dtype = np.dtype(VALUE_DTYPES[layout])
    if value_dtype == np.int64 and values.stat().st_size == 2 * count:
        value_dtype = np.dtype(np.int16)
    half = VALUE_DTYPES[layout] == "int32" or bool(said.get("half"))
    if keys and not said:
        half = keys.stat().st_size == 2 * count * dimension
    key_dtype = np.dtype(np.float16 if half else np.float32)
    _check_size(values, count, 1, value_dtype)
    if keys:
        _check_size(keys, count, dimension, key_dtype)
    if weights:
        _check_size(weights, count, 1, np.dtype(np.int64))
    _check_index(index, count, dimension)
    members = _only([p for p in files if "members" in p.name and p.suffix == ".pkl"], "clusters", sources)
    return Published(layout, count, dimension, values, value_dtype, keys, key_dtype, weights, index, members)


def import_datastore(
    sources: Sequence[str | Path],
    output: str | Path,
    *,
    layout: str | None = None,
    count: int | None = None,
    dimension: int | None = None,
    copy: bool = False,
    pretrained: str | None = None,
    key_type: str = "last_ffn_input",
    key_module: str | None = None,
    document_starts: str | Path | None = None,
) -> Datastore:
    """Make a datastore in the folder ``output`` of published files.

    Values, weights and clusters are converted; keys and index stay where they are, behind symbolic links. The
    folder appears when it is finished.

    Parameters
    ----------
    sources, layout, count, dimension : as for ``find_published``.
    copy : copy the keys and the index, too.
    pretrained : the model that made the store. Its sizes are compared with the store's, and its fingerprint is
        recorded where its weights can be loaded; None records none.
    key_type, key_module : what the keys are, as for ``CausalLM``.
    document_starts : a .npy file of the entries at which documents begin, ascending from 0; None is one stream.

    Raises
    ------
    UserError
        Where the files are not a published datastore, do not fit each other or the model, or ``output`` holds
        something already.
    """
    output = check_new_folder(output)
    published = find_published([Path(source) for source in sources], layout, count, dimension)
    model = _read_config(pretrained)
    if model and model["width"] != published.dimension:
        raise UserError(
            f"The keys have {published.dimension} numbers and {pretrained} has hidden states of {model['width']}: "
            f"it did not make this datastore."
        )
    starts = _read_starts(document_starts, published.count)
    with disk_errors_in(output), finished_folder(output) as folder:
        _fill(folder, published, starts, model, (key_type, key_module), copy)
    return Datastore.open(output)


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


def _tell_layout(values: Path, said: dict[str, Any], has_weights: bool, in_parts: bool) -> str:
    if "rest" in said:
        return "knnlm-limits" if in_parts else "knn-transformers"
    if not said:
        raise UserError(f"The name {values.name} does not tell its layout; give --layout ({', '.join(LAYOUTS)}).")
    return "efficient-knnlm" if has_weights else "fairseq"


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


def _check_index(index: list[IndexPart], count: int, dimension: int) -> None:
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


def _ids_are_relative(index: list[IndexPart]) -> bool:
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


def _read_config(pretrained: str | None) -> dict[str, Any] | None:
    if pretrained is None:
        return None
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(pretrained, trust_remote_code=False)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise UserError(f"Cannot read the model --pretrained {pretrained}: {first_line}") from error
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{pretrained} is an encoder-decoder model; retrieval is for decoder-only (causal) LMs.")
    text = config.get_text_config(decoder=True)
    name = str(Path(pretrained).resolve()) if Path(pretrained).is_dir() else pretrained
    return {"pretrained": name, "vocabulary": text.vocab_size, "width": text.hidden_size}


def _read_starts(path: str | Path | None, count: int) -> np.ndarray:
    if path is None:
        return np.zeros(1, dtype=np.int64)
    try:
        starts = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"Cannot read --document_starts {path}: it is not a .npy file of integers ({error})."
        ) from error
    integers = starts.ndim == 1 and len(starts) > 0 and starts.dtype.kind in "iu"
    if not integers or starts[0] != 0 or starts[-1] >= count or (np.diff(starts.astype(np.int64)) <= 0).any():
        raise UserError(
            f"{path} should hold the documents' first entries: integers, ascending from 0, below {count:,}."
        )
    return starts.astype(np.int64)


def _fill(
    folder: Path,
    published: Published,
    starts: np.ndarray,
    model: dict[str, Any] | None,
    key: tuple[str, str | None],
    copy: bool,
) -> None:
    """Write everything that the datastore's folder holds; the manifest comes before what is derived from it."""
    large = [path for path in (published.keys, *(part.path for part in published.index)) if path]
    copied = sum(path.stat().st_size for path in large) if copy else 0
    check_free_space(folder, copied + 8 * published.count, "the datastore's files")
    beyond = None if model is None else (model["vocabulary"], model["pretrained"])
    largest = _convert(published.values, published.value_dtype, published.count, folder / "values.npy", 0, beyond)
    np.save(folder / "document_starts.npy", starts)
    names = ["values.npy", "document_starts.npy"]
    if published.weights:
        _convert(published.weights, np.dtype(np.int64), published.count, folder / "weights.npy", 1, None)
        names.append("weights.npy")
    if published.keys:
        _place(published.keys, folder / "keys.raw", copy)
        names.append("keys.raw")
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "count": published.count,
        "dimension": published.dimension,
        "documents": len(starts),
        "largest_value": largest,
        "value_dtype": "int32",
        "keys": {"file": "keys.raw", "dtype": published.key_dtype.name} if published.keys else None,
        "key_type": key[0],
        "key_module": key[1],
        "source": {"imported": published.layout, "values": str(published.values.resolve())},
        "model": {"pretrained": model and model["pretrained"], "args": {}, "vocabulary": model and model["vocabulary"]},
        "fingerprint": model and _take_fingerprint(model["pretrained"], published, largest, *key),
        "files": {name: file_record(folder / name) for name in names},
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {"knn_lm_eval": __version__},
    }
    write_json(folder / MANIFEST, manifest)
    store = Datastore.open(folder)
    if published.index:
        _import_index(store, published.index, copy)
    if published.members:
        import_members(store, CLUSTERS, published.members)


def _convert(
    source: Path, dtype: np.dtype, count: int, target: Path, smallest: int, beyond: tuple[int, str] | None
) -> int:
    """Stream a raw array of integers into an int32 .npy file; returns the largest.

    ``smallest`` and, with the model's name, ``beyond`` (excluded) bound what it may hold.
    """
    numbers = np.memmap(source, dtype=dtype, mode="r", shape=(count,))
    limit, whose = beyond or (2**31, "")
    largest = 0
    bar = tqdm(total=count, desc=f"Reading {source.name}", unit=" entries", unit_scale=True, disable=count < CHUNK)
    with open(target, "wb") as file, bar:
        write_npy_header(file, np.int32, (count,))
        for start in range(0, count, CHUNK):
            chunk = np.asarray(numbers[start : start + CHUNK])
            if (wrong := np.flatnonzero((chunk < smallest) | (chunk >= limit))).size:
                entry, number = start + int(wrong[0]), int(chunk[wrong[0]])
                allowed = f"{smallest:,} to {limit - 1:,}" + (f", {whose}'s vocabulary" if whose else "")
                raise UserError(
                    f"{source} has {number:,} at entry {entry:,}, which is not in {allowed}: it is damaged, "
                    f"of another layout, or another model's."
                )
            largest = max(largest, int(chunk.max()))
            file.write(chunk.astype(np.int32).tobytes())
            bar.update(len(chunk))
    return largest


def _place(source: Path, target: Path, copy: bool) -> None:
    if not copy:
        target.symlink_to(source.resolve())
        return
    size = source.stat().st_size
    bar = tqdm(total=size, desc=f"Copying {source.name}", unit="B", unit_scale=True, disable=size < 2**28)
    with open(source, "rb") as read, open(target, "wb") as write, bar:
        while block := read.read(2**22):
            write.write(block)
            bar.update(len(block))


def _take_fingerprint(
    pretrained: str, published: Published, largest: int, key_type: str, key_module: str | None
) -> dict[str, Any] | None:
    """The model's fingerprint; None, with a warning, where its weights or its tokenizer cannot be loaded."""
    from knn_lm_eval.lm.language_model import CausalLM
    from knn_lm_eval.lm.loading import CausalHFLM

    try:
        lm = CausalHFLM(pretrained)
    except (OSError, RuntimeError, ImportError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        logger.warning("No fingerprint is recorded: %s cannot be loaded (%s).", pretrained, reason)
        return None
    model = CausalLM(lm.model, key_type, key_module=key_module)
    fingerprint = take_fingerprint(model, lm.tokenizer)
    sizes = {"dimension": published.dimension, "largest_value": largest}
    check_model_sizes(sizes, len(fingerprint["key"]), model.vocabulary_size, pretrained)
    return fingerprint


def _import_index(store: Datastore, parts: list[IndexPart], copy: bool) -> None:
    """Put the index's files in their place, and write what can be read from them into its JSON."""
    files, index = IndexFiles(store.path), parts[0].index
    targets = [files.index] if len(parts) == 1 else [files.part(number) for number in range(len(parts))]
    for part, target in zip(parts, targets, strict=True):
        _place(part.path, target, copy)
    ivf = inverted_file(index)
    metadata: dict[str, Any] = {
        "factory": _factory(index),
        "sim_func": next((name for name, metric in METRICS.items() if metric == index.metric_type), None),
        "keys_sha256": store.keys_checksum,
        "count": len(store),
        "type": type(index).__name__,
        "nlist": None if ivf is None else ivf.nlist,
        "probe": None if ivf is None else min(PUBLISHED_PROBE, ivf.nlist),
        "imported": parts[0].path.name,
        "quality": "not measured",
        "bytes": sum(target.stat().st_size for target in targets),
    }
    if metadata["sim_func"] is None:
        raise UserError(f"{parts[0].path} ranks neither by L2 nor by inner product; build another with build_index.")
    if len(parts) > 1:
        metadata["part_ids"] = "relative" if _ids_are_relative(parts) else "absolute"
        metadata["parts"] = [
            {"start": part.start, "stop": part.stop, "bytes": target.stat().st_size}
            for part, target in zip(parts, targets, strict=True)
        ]
    write_json(files.metadata, metadata)
    record_derived(store.path, [files.metadata.name, *(target.name for target in targets)])


def _factory(index: faiss.Index) -> str:
    """The factory string, or the type's name where faiss cannot tell."""
    try:
        return reverse_index_factory(index)
    except NotImplementedError:
        return type(index).__name__
