"""Keys of fewer numbers than the LM's hidden states have: their coordinates along a few directions.

Dumping and querying project here alone, in float32, so that the same hidden state gives the same numbers. Nothing is
subtracted. Where the directions are those in which the hidden states vary most, what is left out is nearly the same
for all of them: squared distances lose next to nothing, and inner products a number that is nearly the same for all
neighbours of a query, which the softmax over them does not see.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


class Projection:
    """What a datastore's keys are of the LM's hidden states.

    Parameters
    ----------
    directions : float32 ``[width, dimension]``, the datastore's ``projection.npy``.
    """

    def __init__(self, directions: np.ndarray) -> None:
        self.width, self.dimension = directions.shape
        # Copied, since torch warns of arrays that it could write to and must not.
        table = torch.from_numpy(np.array(directions, dtype=np.float32))
        self._on = lru_cache(maxsize=None)(table.to)

    @torch.inference_mode()
    def __call__(self, keys: Tensor) -> Tensor:
        """The keys ``[..., width]`` (of any dtype, on any device) as float32 ``[..., dimension]``, on their device."""
        with torch.autocast(keys.device.type, enabled=False):
            return keys.float() @ self._on(keys.device)
