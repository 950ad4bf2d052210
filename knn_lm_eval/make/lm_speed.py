"""The time that the LM takes on a datastore's own text: what a budget for an index's searches is a share of."""

from __future__ import annotations

import logging
import time
from itertools import islice

from knn_lm_eval.errors import UserError
from knn_lm_eval.lm.language_model import LanguageModel
from knn_lm_eval.lm.loading import CausalHFLM, recorded_arguments
from knn_lm_eval.lm.reading import Passage, Reader
from knn_lm_eval.make.windows import WindowSettings, batches, chunks, cut_windows, passages
from knn_lm_eval.store.datastore import Datastore

logger = logging.getLogger(__name__)

BATCHES = 3


def lm_microseconds(store: Datastore) -> float:
    """The time that the LM which made the datastore takes for a token, here, in windows as the dump had them.

    Raises
    ------
    UserError
        Where the datastore does not know its model, or that cannot be loaded.
    """
    manifest = store.manifest
    if not manifest.model.get("pretrained") or manifest.windows is None:
        raise UserError(f"The datastore {store.path} does not know its model: give --budget in bytes per entry.")
    lm = CausalHFLM(**recorded_arguments(manifest.model))
    model = LanguageModel(lm.model, manifest.key_type, lm.mixed_precision_dtype, manifest.key_module)
    timed = _first_batches(store, WindowSettings.of_store(manifest.windows), lm.prefix_token_id)
    reader = Reader(model, lm.softmax_dtype)
    reader.target_log_probs(reader.read(timed[0]))  # warms up
    start = time.perf_counter()
    tokens = sum(len(reader.target_log_probs(reader.read(batch))) for batch in timed)
    microseconds = 1e6 * (time.perf_counter() - start) / tokens
    logger.info("The LM takes %.0f us a token here.", microseconds)
    return microseconds


def _first_batches(store: Datastore, settings: WindowSettings, prefix_token_id: int) -> list[list[Passage]]:
    """What the LM reads in the first batches of the dump."""
    windows = cut_windows(store.document_starts, len(store), settings)
    cut = (batch for chunk in chunks(windows, settings) for batch in batches(chunk, settings))
    return [passages(batch, store.values, prefix_token_id) for batch in islice(cut, BATCHES)]
