"""kNN-LM and RetoMaton retrieval for any Hugging Face causal LM, as a model of lm-evaluation-harness.

The public names are below; each is imported when it is first asked for. Python imports this module at every start
(see _startup.py), so it stays free of imports that cost time.
"""

TYPE_CHECKING = False  # type checkers take it for True; importing `typing` would take a millisecond
if TYPE_CHECKING:
    from knn_lm_eval.errors import UserError
    from knn_lm_eval.make.clustering import cluster_kmeans
    from knn_lm_eval.make.dump import dump_datastore
    from knn_lm_eval.make.importing import import_datastore
    from knn_lm_eval.make.pruning import prune_random
    from knn_lm_eval.model.generation import retrieval_augmented
    from knn_lm_eval.model.knn_hf import KNNHF
    from knn_lm_eval.model.settings import RetrievalSettings
    from knn_lm_eval.search.indexing import build_index
    from knn_lm_eval.store.datastore import Datastore
    from knn_lm_eval.store.fetching import fetch_datastore
    from knn_lm_eval.store.publishing import push_datastore
    from knn_lm_eval.study.inspection import inspect_text
    from knn_lm_eval.study.tuning import tune

__all__ = [
    "KNNHF",
    "Datastore",
    "RetrievalSettings",
    "UserError",
    "__version__",
    "build_index",
    "cluster_kmeans",
    "dump_datastore",
    "fetch_datastore",
    "import_datastore",
    "inspect_text",
    "prune_random",
    "push_datastore",
    "retrieval_augmented",
    "tune",
]

_HOMES = {
    "__version__": "version",
    "KNNHF": "model.knn_hf",
    "Datastore": "store.datastore",
    "RetrievalSettings": "model.settings",
    "UserError": "errors",
    "build_index": "search.indexing",
    "cluster_kmeans": "make.clustering",
    "dump_datastore": "make.dump",
    "fetch_datastore": "store.fetching",
    "import_datastore": "make.importing",
    "inspect_text": "study.inspection",
    "prune_random": "make.pruning",
    "push_datastore": "store.publishing",
    "retrieval_augmented": "model.generation",
    "tune": "study.tuning",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    from knn_lm_eval.errors import naming_missing_packages

    with naming_missing_packages():
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
