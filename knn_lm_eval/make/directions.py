"""The directions that a store's keys are projected to: those in which a sample of hidden states varies most (PCA).

The sample of a dump is read by the LM before the dump itself: windows that lie anywhere in the text. Only sums over it
are kept, so that memory holds a matrix of the hidden states' width, however large the sample is.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from knn_lm_eval.errors import UserError
from knn_lm_eval.make.key_reading import KeyReader, entries_in
from knn_lm_eval.make.windows import Window, WindowSettings, batches, cut_windows
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.manifest import PROJECTION, ProjectionRecord
from knn_lm_eval.system.files import replace_file
from knn_lm_eval.system.sampling import draw_items

SEED = 0
LEAST_SAMPLE = 2**15  # keys
KEYS_PER_NUMBER = 8  # of the hidden states' width


def sample_size(width: int) -> int:
    """How many hidden states of this width their directions are found from."""
    return max(LEAST_SAMPLE, KEYS_PER_NUMBER * width)


def write_projection(folder: Path, sample: Iterable[np.ndarray], width: int, dimension: int) -> ProjectionRecord:
    """Write the projection to the principal directions of a sample; returns what the manifest says of it.

    Parameters
    ----------
    folder : the store's.
    sample : hidden states, float ``[n, width]``, some at a time.
    dimension : how many directions; at most ``width``.

    Raises
    ------
    UserError
        Where a number of the sample is not finite.
    """
    directions, kept = principal_directions(sample, width, dimension)
    unfinished = folder / f"{PROJECTION}.part"
    with open(unfinished, "wb") as file:
        np.save(file, directions)
    replace_file(unfinished, folder / PROJECTION)
    return {"from": width, "kind": "pca", "variance_kept": round(kept, 4)}


def shared_projection(of: Datastore) -> np.ndarray:
    """The projection of a store, to be another's as well; raises UserError where it has none."""
    if of.projection is None:
        raise UserError(f"The keys of the datastore {of.path} are no projection, which another could share.")
    return of.projection


def copy_projection(of: Datastore, folder: Path) -> ProjectionRecord:
    """Write a store's projection into another's folder; returns what the manifest says of it."""
    assert of.manifest.projection is not None
    unfinished = folder / f"{PROJECTION}.part"
    shutil.copyfile(of.path / PROJECTION, unfinished)
    replace_file(unfinished, folder / PROJECTION)
    return of.manifest.projection


def principal_directions(sample: Iterable[np.ndarray], width: int, dimension: int) -> tuple[np.ndarray, float]:
    """The directions in which a sample varies most, float32 ``[width, dimension]``, and their share of its variance.

    They are orthonormal, those of most variance first. As each could as well point the other way, its largest number
    is positive.
    """
    count, total, products = 0, np.zeros(width), np.zeros((width, width))
    for keys in sample:
        exact = keys.astype(np.float64)
        count += len(exact)
        total += exact.sum(axis=0)
        products += exact.T @ exact
    if not np.isfinite(products).all():
        raise UserError(
            "The model's keys are not finite numbers (NaN, or infinite) in a sample of the text; "
            "check the model's weights and dtype, or use knn_keytype=last_ffn_input."
        )
    mean = total / count
    variances, vectors = np.linalg.eigh(products / count - np.outer(mean, mean))  # ascending
    directions = vectors[:, ::-1][:, :dimension]
    largest = directions[np.abs(directions).argmax(axis=0), np.arange(dimension)]
    in_all = variances.sum()
    kept = variances[::-1][:dimension].sum() / in_all if in_all > 0 else 1.0
    return np.ascontiguousarray(directions * np.sign(largest), dtype=np.float32), float(kept)


def sample_of_text(
    reader: KeyReader, document_starts: np.ndarray, keys: int, show_progress: bool = False
) -> Iterator[np.ndarray]:
    """About so many keys of a text, those of windows drawn at random: float16 ``[n, width]``, a batch's at a time.

    Parameters
    ----------
    reader : of the text's whole keys.
    """
    windows = draw_windows(document_starts, len(reader.values), reader.windows, keys)
    drawn = entries_in(windows)
    with tqdm(total=drawn, unit=" tokens", unit_scale=True, desc="Sampling keys", disable=not show_progress) as bar:
        for batch in batches(windows, reader.windows):
            yield reader.of_batch(batch)
            bar.update(entries_in(batch))


def draw_windows(document_starts: np.ndarray, count: int, settings: WindowSettings, entries: int) -> list[Window]:
    """Random windows of a text, about as many as have so many entries, in text order; each is as likely as another."""
    return draw_items(
        lambda: cut_windows(document_starts, count, settings), lambda there: -(-entries * there // count), SEED
    )
