"""The LM that made a datastore, loaded again to read more text as it read the first."""

from __future__ import annotations

from typing import Any

from knn_lm_eval.errors import UserError
from knn_lm_eval.lm.loading import CausalHFLM, recorded_arguments
from knn_lm_eval.store.manifest import Manifest


def load_store_lm(manifest: Manifest, **others: Any) -> CausalHFLM:
    """Load it as the manifest says.

    Parameters
    ----------
    others : arguments that count in the place of the manifest's, such as ``device``, or ``pretrained`` where the model
        has moved.

    Raises
    ------
    UserError
        Where the manifest names no model and ``others`` neither, or it cannot be loaded.
    """
    if not (manifest.model.get("pretrained") or others.get("pretrained")):
        raise UserError("The datastore does not know its model: give --model_args pretrained=NAME.")
    return CausalHFLM(**recorded_arguments(manifest.model) | others)
