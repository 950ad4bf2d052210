"""Telling whether a datastore was made by the model and tokenizer that now want to use it.

The fingerprint is what the model does, not what its files are called: the key that it gives after a few fixed
token ids, and the ids that its tokenizer gives for a fixed text. A renamed or converted copy passes, another
model does not.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from knn_lm_eval.errors import UserError
from knn_lm_eval.lm.language_model import LanguageModel

logger = logging.getLogger(__name__)

PROBE_TEXT = "The 3rd Commission's décision (EU) no. 17/2004 — naïve, isn't it?\n\n\tΩμέγα 東京 = x_1 + 2.5e-3"
PROBE_LENGTH = 16
# bfloat16 instead of float32, or an 8-bit copy, moves a key by 1 to 3 %; another model by more than its length.
SAME_MODEL, SIMILAR_MODEL = 0.05, 0.3


def take_fingerprint(model: LanguageModel, tokenizer: Any) -> dict[str, Any]:
    """The fingerprint of a model and its tokenizer (None leaves it out), ready for JSON."""
    vocabulary = model.inner.get_input_embeddings().weight.shape[0]
    token_ids = [(7 + 37 * i) % vocabulary for i in range(PROBE_LENGTH)]
    # The LM's own key, whatever a datastore keeps of it.
    key = model.projected(None).encode(torch.tensor([token_ids]))[0][0, -1].float().cpu()
    fingerprint: dict[str, Any] = {"token_ids": token_ids, "key": [float(f"{x:.5g}") for x in key.tolist()]}
    if tokenizer is not None:
        fingerprint["tokenizer_sha256"] = tokenizer_checksum(tokenizer)
    return fingerprint


def tokenizer_checksum(tokenizer: Any) -> str:
    """The SHA-256 of the ids that a tokenizer gives for a fixed text."""
    ids = json.dumps(tokenizer(PROBE_TEXT, add_special_tokens=False)["input_ids"])
    return hashlib.sha256(ids.encode()).hexdigest()


class StoreRecord(Protocol):
    """What the manifest of a datastore says that can be compared with a model."""

    @property
    def width(self) -> int: ...
    @property
    def largest_value(self) -> int | None: ...
    @property
    def fingerprint(self) -> dict[str, Any] | None: ...
    @property
    def model(self) -> Mapping[str, Any]: ...


def check_store_model(manifest: StoreRecord, model: LanguageModel, tokenizer: Any, used_by: str) -> None:
    """Check that the datastore of this manifest was made by the model at hand, as far as that can be told.

    A store that was imported without its model has no fingerprint: its width and its largest value are
    compared with the model's, and that this was all is said.

    Raises
    ------
    UserError
        Where it was made by another model.
    """
    made_by = manifest.model["pretrained"] or "a model that it does not name"
    current = take_fingerprint(model, tokenizer)
    if manifest.fingerprint is not None:
        check_fingerprint(manifest.fingerprint, current, made_by, used_by)
        return
    width, vocabulary = len(current["key"]), model.vocabulary_size
    check_model_sizes(manifest.width, manifest.largest_value or 0, width, vocabulary, used_by)
    logger.warning(
        "The datastore has no fingerprint of its model: only its dimension and vocabulary were compared with %s. "
        "Import it with --pretrained to record one.",
        used_by,
    )


def check_same_model(stores: Sequence[tuple[str, StoreRecord]]) -> None:
    """Check that datastores were made by one model, as far as their fingerprints tell; needs no model.

    Parameters
    ----------
    stores : each one's name for messages, and its manifest.

    Raises
    ------
    UserError
        Where two were made by different models.
    """
    known = [(name, manifest, manifest.fingerprint) for name, manifest in stores if manifest.fingerprint is not None]
    for name, manifest, fingerprint in known[1:]:
        first_name, first, of_first = known[0]
        if not _are_alike(of_first, fingerprint):
            raise UserError(
                f"The datastores {first_name} and {name} were made by different models ({first.model['pretrained']} "
                f"and {manifest.model['pretrained']}), so they cannot be searched together; dump them with one model."
            )


def _are_alike(some: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two fingerprints may be of one model, in another dtype perhaps."""
    names = ("token_ids", "tokenizer_sha256")
    if any(name in some and name in other and some[name] != other[name] for name in names):
        return False
    if len(some["key"]) != len(other["key"]):
        return False
    before, now = torch.tensor(some["key"]), torch.tensor(other["key"])
    return float((before - now).norm()) <= SIMILAR_MODEL * float(before.norm())


def check_model_sizes(dimension: int, largest_value: int, width: int, vocabulary: int, used_by: str) -> None:
    """Raise UserError unless keys of this dimension, and values up to this one, can be those of a model that has hidden
    states of this width and this vocabulary."""
    if dimension != width:
        raise UserError(
            f"The datastore's keys have {dimension} numbers and those of {used_by} {width}: "
            f"it was made by another model."
        )
    if largest_value >= vocabulary:
        raise UserError(
            f"The datastore's values go up to {largest_value} and {used_by} has {vocabulary} tokens: "
            f"it was made by another model, or is of another layout than it was imported as."
        )


def check_fingerprint(stored: dict[str, Any], current: dict[str, Any], made_by: str, used_by: str) -> None:
    """Compare the store's fingerprint with that of the model at hand.

    Parameters
    ----------
    stored, current : from ``take_fingerprint``.
    made_by, used_by : the two models' names, for the message.

    Raises
    ------
    UserError
        Where the tokenizers differ, the dimensions differ, or the keys are too far apart.
    """
    advice = (
        f"the datastore was made with {made_by}, this model is {used_by}; use the store's own model or dump another"
    )
    if len(stored["key"]) != len(current["key"]):
        raise UserError(
            f"The datastore's keys have {len(stored['key'])} numbers and this model's {len(current['key'])}: {advice}."
        )
    if "tokenizer_sha256" in current and stored["tokenizer_sha256"] != current["tokenizer_sha256"]:
        raise UserError(f"The datastore's tokenizer is not this model's: {advice}.")
    if stored["token_ids"] != current["token_ids"]:
        raise UserError(f"The datastore's model has another vocabulary than this model: {advice}.")
    before, now = torch.tensor(stored["key"]), torch.tensor(current["key"])
    distance = float((before - now).norm() / before.norm())
    if not distance <= SIMILAR_MODEL:
        raise UserError(f"This model's keys are {distance:.0%} away from the datastore's: {advice}.")
    if distance > SAME_MODEL:
        logger.warning(
            "This model's keys are %.0f %% away from the datastore's (another dtype, quantization or fine-tuning?): "
            "it was made with %s, this model is %s. Retrieval will be worse than with a store of its own.",
            100 * distance,
            made_by,
            used_by,
        )
