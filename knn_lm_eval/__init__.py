"""kNN-LM and RetoMaton retrieval for any Hugging Face causal LM, as a model of lm-evaluation-harness.

Python imports this module at every start (see _startup.py), so it stays free of imports that cost time.
"""

import os

TYPE_CHECKING = False  # type checkers take it for True; importing `typing` would take a millisecond
if TYPE_CHECKING:
    from knn_lm_eval.datastore import Datastore
    from knn_lm_eval.errors import UserError
    from knn_lm_eval.generation import retrieval_augmented
    from knn_lm_eval.knn_hf import KNNHF

__version__ = "0.1.0"
__all__ = ["KNNHF", "Datastore", "UserError", "retrieval_augmented"]

_HOMES = {
    "KNNHF": "knn_hf",
    "Datastore": "datastore",
    "UserError": "errors",
    "retrieval_augmented": "generation",
}

# In a source checkout tasks/ and scripts/ lie beside the package, in a wheel inside it. This makes the names
# knn_lm_eval.tasks (an entry point) and knn_lm_eval.scripts true in both.
_checkout = os.path.dirname(__path__[0])
if os.path.isfile(os.path.join(_checkout, "pyproject.toml")):
    __path__.append(_checkout)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
