"""The published wrappers (neulab/knn-transformers) around the same model, index and values, to compare with.

Their code is not part of this package: it is imported from a checkout that the user names.
"""

from __future__ import annotations

import logging
import math
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import faiss
import numpy as np
import scipy.sparse
import torch
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch.nn.utils.rnn import pad_sequence

from knn_lm_eval.search.index_retriever import IndexRetriever
from knn_lm_eval.store.clusters import Clusters
from knn_lm_eval.study.run import one_store
from knn_lm_eval.system.timing import now

if TYPE_CHECKING:
    from knn_lm_eval.model.knn_hf import KNNHF

# Scores a text: seconds, log-likelihood, fraction of saved searches (None for kNN-LM).
ScoreText = Callable[[str], tuple[float, float, float | None]]


def why_not(lm: KNNHF) -> str | None:
    """What keeps the published code from running with these settings, if anything does."""
    retriever, model = lm.retriever, lm.language_model
    index = faiss.downcast_index(retriever.index) if isinstance(retriever, IndexRetriever) else None
    if not isinstance(index, faiss.IndexIVF):
        return f"it needs an index with inverted lists, which {retriever.factory} has not"
    if not hasattr(model.inner, "lm_head"):
        return f"{type(model.inner).__name__} has no head of the name lm_head"
    if retriever.datastore.projection is not None:
        return "the datastore's keys are a projection of the hidden states, which it searches for as they are"
    if retriever.sim_func != "l2" or model.inner.dtype != torch.float32:
        return "it needs knn_sim_func=l2 and dtype=float32"
    if not lm.augmentation.mixture.weight.constant:  # none, or 0
        return "it needs a constant lmbda above 0"
    longest = getattr(model.inner.config, "max_position_embeddings", math.inf)
    if longest <= lm.max_length:
        return f"it reads the last target too, which needs --max_length below {longest}"
    return None


class PublishedCode:
    """The store of ``lm``, laid out as knn-transformers has it, and functions that score texts with its wrappers.

    Parameters
    ----------
    lm : a loaded ``knn-hf`` for which ``why_not`` finds nothing.
    checkout : the folder of knn-transformers' code; it is executed.
    folder : where the values, a link to the index and the clusters are put.
    """

    def __init__(self, lm: KNNHF, checkout: Path, folder: Path) -> None:
        sys.path.insert(0, str(checkout.resolve()))
        from knnlm import DIST, KEY_TYPE, KNNWrapper, get_dstore_path, get_index_path, logger

        logger.setLevel(logging.WARNING)
        self.lm, self.folder = lm, folder
        store, settings = one_store(lm, "The published code"), lm.settings
        store.require_all("the published code")
        self.model: Any = lm.language_model.inner
        name = (str(folder), self.model.config.model_type, len(store), store.dimension)
        store.values.tofile(f"{get_dstore_path(*name)}_vals.npy")
        if settings["recompute_dists"]:
            store.require_keys("recompute_dists=True").tofile(f"{get_dstore_path(*name)}_keys.npy")
        Path(get_index_path(*name)).symlink_to(store.path.resolve() / f"{settings['index']}.faiss")
        key_module = lm.language_model.key_module
        key_type = KEY_TYPE.from_string(settings["knn_keytype"])
        capture = (lambda _: key_module, key_type is KEY_TYPE.last_ffn_input)
        KNNWrapper.model_layer_to_capture[self.model.config.model_type] = {key_type: capture}
        self.arguments = {
            "dstore_size": len(store),
            "dstore_dir": str(folder),
            "dimension": store.dimension,
            "knn_sim_func": DIST.l2,
            "knn_keytype": key_type,
            "no_load_keys": not settings["recompute_dists"],
            "move_dstore_to_mem": True,
            "knn_gpu": False,
            **{name: settings[name] for name in ("recompute_dists", "k", "lmbda", "knn_temp", "probe")},
        }

    def knn_lm(self, batch_size: int) -> ScoreText:
        """Its kNN-LM."""
        from knnlm import KNNWrapper

        return self._score_with(lambda: KNNWrapper(**self.arguments), batch_size)

    def retomaton(self, min_knns: float, max_knns: int, clusters: str | None) -> ScoreText:
        """Its RetoMaton, one window at a time: the rows of a batch would go on with each other's pointers.

        Its pointers' clusters are sorted by their counts with an unstable sort, whose order among equal counts is
        no one's choice; here it is made stable, so that the figures can be compared.
        """
        import retomaton

        retomaton.logger.setLevel(logging.WARNING)
        members = None
        if clusters is not None:
            store = one_store(self.lm, "The published code")
            ours = Clusters.open(store, clusters)
            ones = np.ones(len(ours.members), dtype=np.int64)
            shape = (len(ours.member_starts) - 1, len(store))
            csr = scipy.sparse.csr_matrix((ones, np.asarray(ours.members), np.asarray(ours.member_starts)), shape)
            members = self.folder / "clusters.pkl"
            members.write_bytes(pickle.dumps(csr))

        class StableSort(type(torch)):  # type: ignore[misc]
            """torch, with an argsort that keeps the order of equals."""

            def __getattr__(self, name: str) -> Any:
                return getattr(torch, name)

            def argsort(self, *args: Any, **kwargs: Any) -> torch.Tensor:
                return torch.argsort(*args, **kwargs, stable=True)

        retomaton.torch = StableSort("torch")
        arguments = self.arguments | {"min_knns": min_knns, "max_knns": max_knns, "members": members}
        return self._score_with(lambda: retomaton.RetomatonWrapper(**arguments), 1)

    def _score_with(self, make_wrapper: Callable[[], Any], batch_size: int) -> ScoreText:
        lm, model = self.lm, self.model
        wrapper = make_wrapper()

        def score(text: str) -> tuple[float, float, float | None]:
            ids = lm.tok_encode(text)
            windows = get_rolling_token_windows(ids, lm.prefix_token_id, lm.max_length, context_len=1)
            pairs = [make_disjoint_window(window) for window in windows]
            log_likelihood = 0.0
            wrapper.no_lookup_counter_history = []
            wrapper.break_into(model)  # reads the index and the values: not timed
            start = now()
            for first in range(0, len(pairs), batch_size):
                batch = pairs[first : first + batch_size]
                # The wrappers search where the next label is not -100, so the last target is read as well.
                texts = [torch.tensor(context + continuation) for context, continuation in batch]
                labels = [torch.tensor([-100] * len(context) + rest) for context, rest in batch]
                padded = pad_sequence(texts, batch_first=True).to(lm.device)
                padded_labels = pad_sequence(labels, batch_first=True, padding_value=-100).to(lm.device)
                with torch.no_grad():
                    log_probs = model(input_ids=padded, labels=padded_labels).logits[:, :-1]
                asked = padded_labels[:, 1:] != -100
                target_log_probs = log_probs.gather(-1, padded[:, 1:, None])[..., 0][asked]
                log_likelihood += float(target_log_probs.double().sum())
                del log_probs
            seconds = now() - start
            # One item per search. Its own metric leaves out the tokens after the last one.
            searches = len(wrapper.no_lookup_counter_history)
            wrapper.break_out()
            return seconds, log_likelihood, 1 - searches / len(ids) if searches else None

        return score
