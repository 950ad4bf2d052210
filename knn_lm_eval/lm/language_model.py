"""A transformers causal LM taken apart where retrieval needs it: hidden states (keys, queries) and head.

``encode`` runs the body once and keeps two tensors per position: the key (or query) and the hidden state that
goes into the head. ``logits`` then runs the head on any of those positions, as many at a time as memory allows.
The head is always the model's own ``forward`` with its body short-circuited, so soft-capping, logit scales,
tied weights and whatever else a model does there are the model's.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cached_property
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from knn_lm_eval.errors import UserError
from knn_lm_eval.lm.key_layer import find_feed_forward, find_layer, first_output, get_module, hidden_state
from knn_lm_eval.lm.projection import Projection

logger = logging.getLogger(__name__)

KEY_TYPES = ("last_ffn_input", "last_ffn_output")
PROBE_LENGTH = 6  # tokens that are read to see how a model works
# Logits further apart than this (see _distance) are not the same; quantised activations may depend on other tokens.
SAME_LOGITS, SAME_LOGITS_BESIDE_OTHERS = 0.02, 0.05


class LanguageModel:
    """Keys and head of a causal LM.

    Parameters
    ----------
    model : a transformers causal LM, or a PEFT model around one, in evaluation mode.
    key_type : ``last_ffn_input`` (the input of the last layer's feed-forward block) or ``last_ffn_output``
        (the output of the last layer).
    autocast_dtype : run body and head under torch.autocast with this dtype; None does not.
    key_module : the name of the submodule whose input (or output) is the key; None finds it.

    Raises
    ------
    UserError
        Where the last layer or its feed-forward block is not found, ``key_module`` does not exist or gives no
        key per token, or the model is not causal.
    """

    def __init__(
        self,
        model: nn.Module,
        key_type: str = "last_ffn_input",
        autocast_dtype: torch.dtype | None = None,
        key_module: str | None = None,
    ) -> None:
        if key_type not in KEY_TYPES:
            raise UserError(f"knn_keytype={key_type!r} is unknown; use one of {', '.join(KEY_TYPES)}.")
        self.model = model
        # Typed loosely: torch's modules hide what transformers' models have.
        inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        self.inner = inner
        self.body: nn.Module = inner.base_model
        self.key_type, self._autocast_dtype = key_type, autocast_dtype
        self._projection: Projection | None = None
        takes_use_cache = "use_cache" in signature(inner.forward).parameters or hasattr(inner.config, "use_cache")
        self._no_cache = {"use_cache": False} if takes_use_cache else {}
        self._probe = torch.arange(1, 1 + PROBE_LENGTH)[None] % inner.get_input_embeddings().weight.shape[0]
        expected = self._read(self._probe)
        self._check_causality(expected)
        if key_module is None:
            find = find_feed_forward if key_type == "last_ffn_input" else find_layer
            key_module = find(inner, lambda: self._read(self._probe))
        self.key_module_name = key_module
        self.key_module = get_module(inner, self.body, key_module)
        self._body_output_type: type | None = None
        # Some models call a decoder inside their base model instead of it, or don't say what their base model is.
        bodies = [inner.base_model, inner.get_decoder(), *(m for m in inner.children() if hasattr(m, "base_model"))]
        self.has_separate_head = any(self._head_can_be_separated_from(body, expected) for body in dict.fromkeys(bodies))
        if not self.has_separate_head:
            logger.warning(
                "%s computes its logits in a way that cannot be split from its body: logits of whole windows "
                "are kept in memory; use a small batch_size.",
                type(self.inner).__name__,
            )

    @property
    def device(self) -> torch.device:
        """Where input ids go."""
        return self.inner.get_input_embeddings().weight.device

    @cached_property
    def vocabulary_size(self) -> int:
        """The number of logits per position."""
        return self.logits(self.encode(torch.zeros(1, 1, dtype=torch.long))[1][0]).shape[-1]

    def projected(self, projection: Projection | None) -> LanguageModel:
        """The same LM, whose keys go through ``projection``; through none where that is None."""
        other = copy.copy(self)
        other._projection = projection
        return other

    def project(self, keys: Tensor) -> Tensor:
        """Keys as the LM has them, ``[..., width]``, as ``encode`` gives them: ``[..., dimension]``."""
        return keys if self._projection is None else self._projection(keys)

    @torch.inference_mode()
    def encode(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Run the body over a batch of windows, padded on the right.

        Parameters
        ----------
        input_ids : int64 ``[batch, time]``.

        Returns
        -------
        keys : ``[batch, time, dimension]``, in the model's dtype (float32 where projected), on its device.
        hidden : ``[batch, time, width]``, what ``logits`` takes.
        """
        captured: dict[str, Tensor] = {}

        def keep_hidden(module: nn.Module, args: Any, output: Any) -> Any:
            captured["hidden"] = _last_hidden_state(output)
            self._body_output_type = type(output)
            # The head of this call would only be thrown away: leave it one position.
            return _with_last_hidden_state(type(output), captured["hidden"][:, -1:])

        with ExitStack() as stack:
            stack.enter_context(self._autocast())
            stack.enter_context(_capture(self.key_module, self.key_type, captured))
            if self.has_separate_head:
                stack.callback(self.body.register_forward_hook(keep_hidden).remove)
            logits = self.model(input_ids.to(self.device), **self._no_cache).logits
        hidden = captured["hidden"] if self.has_separate_head else logits
        keys = self._key_per_position(captured.get("key"), *hidden.shape[:2])
        # Prompt-tuned models put virtual tokens before the text.
        time = input_ids.shape[1]
        return self.project(keys[:, -time:]), hidden[:, -time:]

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """The logits of ``n`` positions.

        Parameters
        ----------
        hidden : ``[n, width]``, rows of what ``encode`` returned.

        Returns
        -------
        ``[n, vocabulary]``, in the model's dtype.
        """
        if not self.has_separate_head:
            return hidden
        assert self._body_output_type is not None, "encode comes first"
        output = _with_last_hidden_state(self._body_output_type, hidden[None])
        with self._autocast(), _replaced_forward(self.body, output):
            dummy = torch.zeros(1, len(hidden), dtype=torch.long, device=self.device)
            return self.inner(dummy, **self._no_cache).logits[0]

    def capture_keys(self, captured: dict[str, Tensor]) -> AbstractContextManager[None]:
        """Inside, each call leaves its keys in ``captured["key"]``, as the layer has them; see ``project``."""
        return _capture(self.key_module, self.key_type, captured)

    def _autocast(self) -> torch.autocast:
        enabled = self._autocast_dtype is not None
        return torch.autocast(self.device.type, dtype=self._autocast_dtype, enabled=enabled)

    @torch.inference_mode()
    def _read(self, ids: Tensor) -> Tensor:
        """The logits of one row of token ids as the model computes them, without adapters' virtual tokens."""
        with self._autocast():
            return self.inner(ids.to(self.device), **self._no_cache).logits[0].float()

    def _check_causality(self, expected: Tensor) -> None:
        other = self._probe.clone()
        other[0, -1] = 0
        if _distance(self._read(other)[:-1], expected[:-1]) > SAME_LOGITS_BESIDE_OTHERS:
            raise UserError(
                f"{type(self.inner).__name__} is not causal: its prediction of a token depends on the tokens after it "
                f"(models like BERT need is_decoder in their configuration); use a decoder-only LM."
            )

    def _key_per_position(self, key: Tensor | None, batch: int, time: int) -> Tensor:
        """``[batch, time, dimension]`` from what was captured; some layers (OPT's) flatten batch and time."""
        if key is not None:
            if key.shape[:2] == (batch, time):
                return key.reshape(batch, time, -1)
            if key.dim() == 2 and key.shape[0] == batch * time:
                return key.reshape(batch, time, -1)
        shape = "nothing" if key is None else f"numbers of shape {list(key.shape)}"
        raise UserError(
            f"{self.key_module_name} of {type(self.inner).__name__} has {shape} as its "
            f"{self.key_type.rpartition('_')[2]} for {batch} rows of {time} tokens, which is not a key per token; "
            f"choose another with key_module or knn_keytype."
        )

    def _head_can_be_separated_from(self, body: nn.Module, expected: Tensor) -> bool:
        """Whether the logits are a function of the last hidden state of ``body``, position by position."""
        if body is self.inner:
            return False
        self.body = body
        some = torch.tensor([3, 1, 4])
        self.has_separate_head = True
        model, self.model = self.model, self.inner
        try:
            actual = self.logits(self.encode(self._probe)[1][0][some]).float()
        except UserError:
            raise
        except Exception as error:  # any model code may fail in any way when called like this
            logger.debug("head not separable: %r", error)
            return False
        finally:
            self.model = model
        return actual.shape[1:] == expected.shape[1:] and _distance(actual, expected[some]) <= SAME_LOGITS


@contextmanager
def _capture(module: nn.Module, key_type: str, captured: dict[str, Tensor]) -> Iterator[None]:
    def keep_input(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if (given := hidden_state(args, kwargs)) is not None:
            captured["key"] = given

    def keep_output(module: nn.Module, args: Any, output: Any) -> None:
        captured["key"] = first_output(output)

    if key_type == "last_ffn_input":
        handle = module.register_forward_pre_hook(keep_input, with_kwargs=True)
    else:
        handle = module.register_forward_hook(keep_output)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _replaced_forward(module: nn.Module, output: Any) -> Iterator[None]:
    """Inside, calling ``module`` returns ``output`` and computes nothing."""
    replaced = module.__dict__.get("forward")
    module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        if replaced is None:
            del module.forward
        else:
            module.forward = replaced


def _distance(actual: Tensor, expected: Tensor) -> float:
    """How far two tables of logits are apart, as a part of what the logits of a position differ by.

    Rounding to 16 bits or fewer makes some hundredths at most.
    """
    return float((actual - expected).norm() / (expected - expected.mean(dim=-1, keepdim=True)).norm())


def _last_hidden_state(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output.last_hidden_state


def _with_last_hidden_state(output_type: type, hidden: Tensor) -> Any:
    return (hidden,) if output_type is tuple else output_type(last_hidden_state=hidden)
