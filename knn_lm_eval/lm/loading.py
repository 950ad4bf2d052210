"""Loading a causal LM with the arguments of lm-eval's ``hf`` model, and saying plainly why one cannot be."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from accelerate.utils import get_max_memory
from lm_eval.models.huggingface import HFLM

from knn_lm_eval.errors import UserError, did_you_mean, naming_missing_packages

logger = logging.getLogger(__name__)

BITSANDBYTES_ARGUMENTS = ("load_in_4bit", "load_in_8bit", "bnb_4bit_", "llm_int8_")
# What a datastore may say about loading its model: nothing that runs code, which the datastore's author could choose.
RECORDED_ARGUMENTS = (
    *("pretrained", "revision", "subfolder", "tokenizer", "use_fast_tokenizer", "truncation", "max_length", "dtype"),
    *("softmax_dtype", "mixed_precision_dtype", "add_bos_token", "prefix_token_id", "peft", "delta", "gguf_file"),
    *("parallelize", "batch_size", "max_batch_size", "device"),
)
# The arguments that lm-eval's hf names; it passes others on to the model's class, whose own nobody can list.
HF_ARGUMENTS = [name for name in inspect.signature(HFLM.__init__).parameters if name not in ("self", "kwargs")]
NOT_MISTYPED = ("max_memory",)  # one of the others, though it looks like max_cpu_memory
MISTYPED = 0.8  # how near a name has to be to a known one to be taken for it


class CausalHFLM(HFLM):
    """lm-eval's HFLM for decoder-only models, with a device that exists and errors in one sentence."""

    def __init__(self, pretrained: str | transformers.PreTrainedModel, device: str | None = None, **kwargs: Any):
        self.refuse_mistyped(kwargs)
        if device is None or (device.startswith("cuda") and not torch.cuda.is_available()):
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if kwargs.get("parallelize") and not set(get_max_memory()) - {"cpu"}:
            logger.warning("parallelize=True spreads a model over GPUs; without one, it is not spread.")
            del kwargs["parallelize"]
        try:
            super().__init__(pretrained, device=device, **kwargs)
        except TypeError as error:
            if not (unknown := re.search(r"unexpected keyword argument '(.*)'", str(error))):
                raise
            near = did_you_mean(unknown[1], self.argument_names())
            raise UserError(f"Unknown model argument {unknown[1]!r}{near or '.'}") from error
        accelerator = getattr(self, "accelerator", None)
        if accelerator is not None and not kwargs.get("tp_plan"):
            # HFLM shares requests out only where it sees several GPUs: on CPUs every process would do all of them.
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes

    @classmethod
    def argument_names(cls) -> list[str]:
        """The arguments that are known by name."""
        return HF_ARGUMENTS

    @classmethod
    def refuse_mistyped(cls, given: Collection[str]) -> None:
        """Raise UserError where the name of an argument is nearly a known one."""
        for name in given:
            if name in cls.argument_names() or name in NOT_MISTYPED:
                continue
            if near := did_you_mean(name, cls.argument_names(), MISTYPED):
                raise UserError(f"Unknown model argument {name!r}{near}")

    def shorten_windows(self, most_tokens: int) -> None:
        """Read at most so many tokens at a time from now on."""
        self._max_length = min(self.max_length, most_tokens)

    def _get_config(self, pretrained: str, **kwargs: Any) -> None:
        with _saying_what_cannot_be_loaded(pretrained, "model"):
            super()._get_config(pretrained, **kwargs)

    def _create_tokenizer(self, pretrained: Any, tokenizer: Any = None, **kwargs: Any) -> None:
        named = next((given for given in (tokenizer, pretrained) if isinstance(given, str)), "that was given")
        with _saying_what_cannot_be_loaded(named, "tokenizer"):
            super()._create_tokenizer(pretrained, tokenizer, **kwargs)

    def _get_backend(self, config: Any, backend: Any = "default", **kwargs: Any) -> None:
        super()._get_backend(config, backend=backend, **kwargs)
        if self.backend != "causal" or getattr(config, "is_encoder_decoder", False):
            raise UserError(
                f"{getattr(config, 'model_type', 'This model')} is an encoder-decoder model; "
                f"retrieval is for decoder-only (causal) LMs."
            )

    def _create_model(self, pretrained: str, **kwargs: Any) -> None:
        # lm-eval passes these on as they are, but transformers 5 takes them in a configuration only.
        quantization = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith(BITSANDBYTES_ARGUMENTS)}
        with _saying_what_cannot_be_loaded(pretrained, "model"):
            if quantization:
                kwargs["quantization_config"] = transformers.BitsAndBytesConfig(**quantization)
            super()._create_model(pretrained, **kwargs)


def recorded_arguments(model: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with which to load a datastore's model, from what its manifest says of the model."""
    said = {"pretrained": model["pretrained"]} | model["args"]
    taken = {
        name: value
        for name, value in said.items()
        if name in RECORDED_ARGUMENTS or name.startswith(BITSANDBYTES_ARGUMENTS)
    }
    if left_out := [f"{name}={value}" for name, value in said.items() if name not in taken]:
        logger.warning(
            "The datastore was made with %s, which is not taken from it: give it as an argument if you want it.",
            ", ".join(left_out),
        )
    return taken


@contextmanager
def _saying_what_cannot_be_loaded(name: str, what: str) -> Iterator[None]:
    try:
        with naming_missing_packages():
            yield
    except UserError:
        raise
    except (ImportError, OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"The {what} {name} brings code of its own, which is not run unless you say so; read it, and give "
                f"trust_remote_code=True if you trust it."
            ) from error
        first_line = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(f"Cannot load the {what} {'pretrained=' * (what == 'model')}{name}: {first_line}") from error
