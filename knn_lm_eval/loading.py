"""Loading a causal LM with the arguments of lm-eval's ``hf`` model, and saying plainly why one cannot be."""

from __future__ import annotations

import re
from typing import Any

import torch
import transformers
from lm_eval.models.huggingface import HFLM

from knn_lm_eval.errors import UserError


class CausalHFLM(HFLM):
    """lm-eval's HFLM for decoder-only models, with a device that exists and errors in one sentence."""

    def __init__(self, pretrained: str | transformers.PreTrainedModel, device: str | None = None, **kwargs: Any):
        if device is None or (device.startswith("cuda") and not torch.cuda.is_available()):
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            super().__init__(pretrained, device=device, **kwargs)
        except TypeError as error:
            if not (unknown := re.search(r"unexpected keyword argument '(.*)'", str(error))):
                raise
            raise UserError(f"Unknown model argument {unknown[1]!r}.") from error

    def _get_config(self, pretrained: str, **kwargs: Any) -> None:
        try:
            super()._get_config(pretrained, **kwargs)
        except (OSError, ValueError) as error:
            first_line = str(error).strip().splitlines()[0]
            raise UserError(f"Cannot load the model pretrained={pretrained}: {first_line}") from error

    def _get_backend(self, config: Any, backend: Any = "default", **kwargs: Any) -> None:
        super()._get_backend(config, backend=backend, **kwargs)
        if self.backend != "causal" or getattr(config, "is_encoder_decoder", False):
            raise UserError(
                f"{getattr(config, 'model_type', 'This model')} is an encoder-decoder model; "
                f"retrieval is for decoder-only (causal) LMs."
            )
