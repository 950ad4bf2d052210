"""The LM's keys of the windows that a store's text is cut into."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from knn_lm_eval.lm.language_model import LanguageModel
from knn_lm_eval.make.windows import Window


def keys_of_windows(
    model: LanguageModel, prefix_token_id: int, values: np.ndarray, batch: list[Window]
) -> Iterator[Tensor]:
    """Read a batch of windows at once; the keys of each window's entries, ``[entries, dimension]``, as the LM has them.

    Parameters
    ----------
    values : the store's.
    """
    input_ids = torch.zeros(len(batch), max(window.length for window in batch), dtype=torch.long)
    for row, window in zip(input_ids, batch, strict=True):
        row[: window.length] = torch.from_numpy(window.tokens(values, prefix_token_id))
    keys = model.encode(input_ids)[0]
    for row_keys, window in zip(keys, batch, strict=True):
        yield row_keys[window.length - (window.stop - window.start) : window.length]
