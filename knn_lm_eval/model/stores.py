"""The datastores that the settings name, opened, checked against each other, and what they weigh."""

from __future__ import annotations

from typing import NamedTuple

from knn_lm_eval.errors import UserError
from knn_lm_eval.lm.fingerprint import check_same_model
from knn_lm_eval.model.settings import RetrievalSettings
from knn_lm_eval.store.choosing import choose_stores
from knn_lm_eval.store.joined import Store, stores_of


class OpenedStores(NamedTuple):
    """What is searched.

    Attributes
    ----------
    store : one datastore, or several as one.
    weights : of each.
    given : all that were named, those that are left out among them: what params are tuned for.
    """

    store: Store
    weights: tuple[float, ...]
    given: Store


def open_stores(settings: RetrievalSettings) -> OpenedStores:
    """Open what ``datastore``, ``datastore_weights``, ``sources`` and ``exclude`` name.

    Raises
    ------
    UserError
        As ``choose_stores``, and where the stores are of different LMs or the weights are not as many as the stores.
    """
    chosen = choose_stores(settings.datastore, settings.verify, settings.sources, settings.exclude)
    given = stores_of(chosen.given)
    weights = settings.datastore_weights or (1.0,) * len(given)
    assert isinstance(weights, tuple), "settings read them"
    if len(weights) != len(given):
        raise UserError(
            f"datastore_weights has {len(weights)} numbers for {len(given)} datastores ({chosen.given.label}); "
            f"give one for each."
        )
    check_same_model([(store.label, store.manifest) for store in given])
    return OpenedStores(chosen.store, tuple(weights[number] for number in chosen.numbers), chosen.given)
