"""Taking over datastores that other programs wrote, without copying their large files.

Values, weights and clusters are converted; the keys and the index are linked to, or copied. Which programs, and how
their files are told from one another, is in ``knn_lm_eval.make.published_files``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from faiss.contrib.factory_tools import reverse_index_factory
from tqdm import tqdm

from knn_lm_eval.errors import UserError
from knn_lm_eval.lm.fingerprint import check_model_sizes, take_fingerprint
from knn_lm_eval.make.members import check_memory, import_members
from knn_lm_eval.make.published_files import PublishedFiles, PublishedPart, find_published, ids_are_relative
from knn_lm_eval.search.faiss_index import METRICS, inverted_file
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.index_files import IndexFiles
from knn_lm_eval.store.manifest import (
    DOCUMENT_STARTS,
    ORDER_OF_IMPORTS,
    VALUES,
    WEIGHTS,
    KeysFile,
    Manifest,
    file_record,
    now,
    record_derived,
)
from knn_lm_eval.system.arrays import map_npy
from knn_lm_eval.system.files import (
    check_free_space,
    check_new_folder,
    disk_errors_in,
    finished_folder,
    write_npy_header,
)
from knn_lm_eval.system.seals import write_sealed_json
from knn_lm_eval.version import __version__

logger = logging.getLogger(__name__)

PUBLISHED_PROBE = 32
CLUSTERS = "members"
RAW_KEYS = "keys.raw"
CHUNK = 2**20


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
    memory: int | None = None,
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
    key_type, key_module : what the keys are, as for ``LanguageModel``.
    document_starts : a .npy file of the entries at which documents begin, ascending from 0; None is one stream.
    memory : bytes that it may take, beside the model that ``pretrained`` names; None is half of what is available. Only
        clusters, and kinds of indexes that faiss does not map, take any that grows with the entries.

    Raises
    ------
    UserError
        Where the files are not a published datastore, do not fit each other, the model or ``memory``, or ``output``
        holds something already.
    """
    output = check_new_folder(output)
    published = find_published([Path(source) for source in sources], layout, count, dimension, memory)
    if published.members:
        check_memory(published.members, memory)
    model = _read_config(pretrained)
    if model and model["width"] != published.dimension:
        raise UserError(
            f"The keys have {published.dimension} numbers and {pretrained} has hidden states of {model['width']}: "
            f"it did not make this datastore."
        )
    starts = _read_starts(document_starts, published.count)
    with disk_errors_in(output), finished_folder(output) as folder:
        _fill(folder, published, starts, model, (key_type, key_module), copy, memory)
    return Datastore.open(output)


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
    starts = map_npy(Path(path), "give another --document_starts")
    integers = starts.ndim == 1 and len(starts) > 0 and starts.dtype.kind in "iu"
    if not integers or starts[0] != 0 or starts[-1] >= count or not _ascend(starts):
        raise UserError(
            f"{path} should hold the documents' first entries: integers, ascending from 0, below {count:,}."
        )
    return starts


def _ascend(starts: np.ndarray) -> bool:
    """Whether each is more than the one before it."""
    runs = (starts[begin : begin + CHUNK + 1].astype(np.int64) for begin in range(0, len(starts), CHUNK))
    return all((np.diff(run) > 0).all() for run in runs)


def _fill(
    folder: Path,
    published: PublishedFiles,
    starts: np.ndarray,
    model: dict[str, Any] | None,
    key: tuple[str, str | None],
    copy: bool,
    memory: int | None,
) -> None:
    """Write everything that the datastore's folder holds; the manifest comes before what is derived from it."""
    large = [path for path in (published.keys, *(part.path for part in published.index)) if path]
    copied = sum(path.stat().st_size for path in large) if copy else 0
    check_free_space(folder, copied + 8 * published.count + 8 * len(starts), "the datastore's files")
    names, largest = _write_arrays(folder, published, starts, model, copy)
    manifest = Manifest(
        count=published.count,
        dimension=published.dimension,
        documents=len(starts),
        largest_value=largest,
        value_dtype="int32",
        keys=KeysFile(RAW_KEYS, published.key_dtype.name) if published.keys else None,
        key_type=key[0],
        key_module=key[1],
        source={"imported": published.layout, "values": str(published.values.resolve())},
        model={
            "pretrained": model["pretrained"] if model else None,
            "args": {},
            "vocabulary": model["vocabulary"] if model else None,
        },
        fingerprint=model and _take_fingerprint(model["pretrained"], published, largest, *key),
        files={name: file_record(folder / name, published.key_dtype if name == RAW_KEYS else None) for name in names},
        created=now(),
        versions={"knn_lm_eval": __version__},
        order=ORDER_OF_IMPORTS,
    )
    manifest.write(folder)
    store = Datastore.open(folder)
    if published.index:
        _import_index(store, published.index, copy)
    if published.members:
        import_members(store, CLUSTERS, published.members, memory=memory)


def _write_arrays(
    folder: Path, published: PublishedFiles, starts: np.ndarray, model: dict[str, Any] | None, copy: bool
) -> tuple[list[str], int]:
    """Write the store's own files; returns their names, and the largest value."""
    beyond = None if model is None else (model["vocabulary"], model["pretrained"])
    largest = _convert(published.values, published.value_dtype, published.count, folder / VALUES, 0, beyond)
    with open(folder / DOCUMENT_STARTS, "wb") as file:
        write_npy_header(file, np.int64, (len(starts),))
        for begin in range(0, len(starts), CHUNK):
            file.write(starts[begin : begin + CHUNK].astype(np.int64).tobytes())
    names = [VALUES, DOCUMENT_STARTS]
    if published.weights:
        _convert(published.weights, np.dtype(np.int64), published.count, folder / WEIGHTS, 1, None)
        names.append(WEIGHTS)
    if published.keys:
        _place(published.keys, folder / RAW_KEYS, copy)
        names.append(RAW_KEYS)
    return names, largest


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
    with bar, open(target, "wb") as file:
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
    with bar, open(source, "rb") as read, open(target, "wb") as write:
        while block := read.read(2**22):
            write.write(block)
            bar.update(len(block))


def _take_fingerprint(
    pretrained: str, published: PublishedFiles, largest: int, key_type: str, key_module: str | None
) -> dict[str, Any] | None:
    """The model's fingerprint; None, with a warning, where its weights or its tokenizer cannot be loaded."""
    from knn_lm_eval.lm.language_model import LanguageModel
    from knn_lm_eval.lm.loading import CausalHFLM

    try:
        lm = CausalHFLM(pretrained)
    except (OSError, RuntimeError, ImportError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        logger.warning("No fingerprint is recorded: %s cannot be loaded (%s).", pretrained, reason)
        return None
    model = LanguageModel(lm.model, key_type, key_module=key_module)
    fingerprint = take_fingerprint(model, lm.tokenizer)
    check_model_sizes(published.dimension, largest, len(fingerprint["key"]), model.vocabulary_size, used_by=pretrained)
    return fingerprint


def _import_index(store: Datastore, parts: list[PublishedPart], copy: bool) -> None:
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
        metadata["part_ids"] = "relative" if ids_are_relative(parts) else "absolute"
        metadata["parts"] = [
            {"start": part.start, "stop": part.stop, "bytes": target.stat().st_size}
            for part, target in zip(parts, targets, strict=True)
        ]
    write_sealed_json(files.metadata, metadata)
    record_derived(store.path, [files.metadata.name, *(target.name for target in targets)])


def _factory(index: faiss.Index) -> str:
    """The factory string, or the type's name where faiss cannot tell."""
    try:
        return reverse_index_factory(index)
    except NotImplementedError:
        return type(index).__name__
