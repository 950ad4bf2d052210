"""kNN-LM and RetoMaton retrieval for any Hugging Face causal LM, as a model of lm-evaluation-harness.

The public names are below; each is imported when it is first asked for. Python imports this module at every start
(see _startup.py), so it stays free of imports that cost time.
"""

TYPE_CHECKING = False  # type checkers take it for True; importing `typing` would take a millisecond
if TYPE_CHECKING:
    from knn_lm_eval.errors import UserError
    from knn_lm_eval.model.generation import retrieval_augmented
    from knn_lm_eval.model.knn_hf import KNNHF
    from knn_lm_eval.store.datastore import Datastore
    from knn_lm_eval.study.inspection import inspect_text
    from knn_lm_eval.study.tuning import tune

__all__ = ["KNNHF", "Datastore", "UserError", "__version__", "inspect_text", "retrieval_augmented", "tune"]

_HOMES = {
    "__version__": "version",
    "KNNHF": "model.knn_hf",
    "Datastore": "store.datastore",
    "UserError": "errors",
    "retrieval_augmented": "model.generation",
    "tune": "study.tuning",
    "inspect_text": "study.inspection",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
