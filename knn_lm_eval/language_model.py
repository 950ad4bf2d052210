"""A transformers causal LM taken apart where retrieval needs it: hidden states (keys, queries) and head.

``encode`` runs the body once and keeps two tensors per position: the key (or query) and the hidden state that
goes into the head. ``logits`` then runs the head on any of those positions, as many at a time as memory allows.
The head is always the model's own ``forward`` with its body short-circuited, so soft-capping, logit scales,
tied weights and whatever else a model does there are the model's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from knn_lm_eval.errors import UserError

logger = logging.getLogger(__name__)

KEY_TYPES = ("last_ffn_input", "last_ffn_output")
# What decoder layers call their feed-forward block; OPT-like layers have it as two bare linear maps.
FEED_FORWARD_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "fc1", "mixer")


class CausalLM:
    """Keys and head of a causal LM.

    Parameters
    ----------
    model : a transformers causal LM, or a PEFT model around one, in evaluation mode.
    key_type : ``last_ffn_input`` (the input of the last layer's feed-forward block) or ``last_ffn_output``
        (the output of the last layer).
    autocast_dtype : run body and head under torch.autocast with this dtype; None does not.

    Raises
    ------
    UserError
        Where the model has no layer that can be recognised as the last one, or no feed-forward block in it.
    """

    def __init__(
        self, model: nn.Module, key_type: str = "last_ffn_input", autocast_dtype: torch.dtype | None = None
    ) -> None:
        if key_type not in KEY_TYPES:
            raise UserError(f"knn_keytype={key_type!r} is unknown; use one of {', '.join(KEY_TYPES)}.")
        self.model = model
        # Typed loosely: torch's modules hide what transformers' models have.
        inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        self.inner = inner
        self.body: nn.Module = inner.base_model
        self.key_type, self._autocast_dtype = key_type, autocast_dtype
        self.key_module_name, self._key_module = _find_key_module(self.inner, self.body, key_type)
        self._no_cache = {"use_cache": False} if hasattr(self.inner.config, "use_cache") else {}
        self._body_output_type: type | None = None
        # Some models (OPT) call a decoder inside their base model instead of the base model.
        bodies = dict.fromkeys((inner.base_model, inner.get_decoder()))
        self.has_separate_head = any(self._head_can_be_separated_from(body) for body in bodies)
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

    @torch.inference_mode()
    def encode(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Run the body over a batch of windows, padded on the right.

        Parameters
        ----------
        input_ids : int64 ``[batch, time]``.

        Returns
        -------
        keys : ``[batch, time, dimension]``, in the model's dtype, on its device.
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
            stack.enter_context(_capture(self._key_module, self.key_type, captured))
            if self.has_separate_head:
                stack.callback(self.body.register_forward_hook(keep_hidden).remove)
            logits = self.model(input_ids.to(self.device), **self._no_cache).logits
        hidden = captured["hidden"] if self.has_separate_head else logits
        # Some layers (OPT's) flatten batch and time; prompt-tuned models put virtual tokens before the text.
        keys = captured["key"].reshape(*hidden.shape[:2], -1)
        time = input_ids.shape[1]
        return keys[:, -time:], hidden[:, -time:]

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
        """Inside, each call of the model leaves its keys in ``captured["key"]``, shaped as the layer has them."""
        return _capture(self._key_module, self.key_type, captured)

    def _autocast(self) -> torch.autocast:
        enabled = self._autocast_dtype is not None
        return torch.autocast(self.device.type, dtype=self._autocast_dtype, enabled=enabled)

    def _head_can_be_separated_from(self, body: nn.Module) -> bool:
        """Whether the logits are a function of the last hidden state of ``body``, position by position."""
        if body is self.inner:
            return False
        self.body = body
        ids = torch.arange(1, 6)[None] % self.inner.get_input_embeddings().weight.shape[0]
        some = torch.tensor([3, 1, 4])
        with torch.inference_mode(), self._autocast():
            expected = self.inner(ids.to(self.device), **self._no_cache).logits[0].float()
            self.has_separate_head = True
            try:
                actual = self.logits(self._encode_inner(ids)[some]).float()
            except Exception as error:  # any model code may fail in any way when called like this
                logger.debug("head not separable: %r", error)
                return False
        return actual.shape[1:] == expected.shape[1:] and torch.allclose(actual, expected[some], rtol=1e-2, atol=1e-2)

    def _encode_inner(self, ids: Tensor) -> Tensor:
        model, self.model = self.model, self.inner
        try:
            return self.encode(ids)[1][0]
        finally:
            self.model = model


@contextmanager
def _capture(module: nn.Module, key_type: str, captured: dict[str, Tensor]) -> Iterator[None]:
    def keep_input(module: nn.Module, args: tuple, kwargs: dict) -> None:
        captured["key"] = args[0] if args else kwargs["hidden_states"]

    def keep_output(module: nn.Module, args: Any, output: Any) -> None:
        captured["key"] = output[0] if isinstance(output, tuple) else output

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


def _last_hidden_state(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output.last_hidden_state


def _with_last_hidden_state(output_type: type, hidden: Tensor) -> Any:
    return (hidden,) if output_type is tuple else output_type(last_hidden_state=hidden)


def _find_key_module(inner: Any, body: nn.Module, key_type: str) -> tuple[str, nn.Module]:
    """The name and the module whose input or output is the key: in the last layer of the longest layer list."""
    lists = [(name, m) for name, m in body.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    depth = getattr(inner.config.get_text_config(decoder=True), "num_hidden_layers", None)
    layers = [(name, m) for name, m in lists if len(m) == depth] or lists
    if not layers:
        raise UserError(f"{type(inner).__name__} has no list of layers: its keys cannot be found.")
    name, layer = f"{layers[0][0]}.{len(layers[0][1]) - 1}", layers[0][1][-1]
    if key_type == "last_ffn_output":
        return name, layer
    for child in FEED_FORWARD_NAMES:
        if isinstance(module := getattr(layer, child, None), nn.Module):
            return f"{name}.{child}", module
    raise UserError(
        f"{type(inner).__name__}: no feed-forward block is known in its last layer {name}, which has "
        f"{', '.join(child for child, _ in layer.named_children())}; use knn_keytype=last_ffn_output."
    )
