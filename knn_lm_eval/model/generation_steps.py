"""The sequences that ``generate`` is at, noted where it prepares each step's inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class GenerationSteps:
    """The sequences whose next token ``forward`` predicts, as ``generate`` hands them over from step to step.

    Attributes
    ----------
    is_prompt : whether the step at hand reads a further chunk of the prompt (``prefill_chunk_size``).
    is_noted : whether there is a step at hand.
    """

    def __init__(self) -> None:
        self.is_prompt, self.is_noted = False, False
        self._waiting: Tensor | None = None
        self._read: Tensor | None = None

    def note(self, input_ids: Tensor | None, cache: Any) -> None:
        """Note what is about to be read: whole sequences, longer than those before, or a chunk of the prompt alone.

        Parameters
        ----------
        input_ids : int64 ``[batch, time]``; None where sequences begin with embeddings.
        cache : of what was read so far, as transformers has it, or None.
        """
        self.is_prompt = False
        if input_ids is not None and self._read is not None and hasattr(cache, "get_seq_length"):
            read = self._read.shape[1]
            if input_ids.shape[1] <= read == int(cache.get_seq_length()):
                input_ids, self.is_prompt = torch.cat([self._read, input_ids], dim=1), True
        self._waiting = self._read = input_ids
        self.is_noted = True

    def take(self) -> Tensor | None:
        """The sequences of the step at hand, int64 ``[batch, time]``, once; None where there are none."""
        waiting, self._waiting, self.is_noted = self._waiting, None, False
        return waiting
