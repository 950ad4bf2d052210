"""Which keys are clustered: the store's own or, where it has none, those that its index's codes stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faiss

from knn_lm_eval.errors import UserError
from knn_lm_eval.search.code_tables import CodeTables
from knn_lm_eval.search.decoded_keys import DecodedKeys
from knn_lm_eval.search.faiss_index import open_index, split_parts
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.index_files import index_checksums, index_names
from knn_lm_eval.store.key_stream import KeyRows
from knn_lm_eval.system.memory import allowed_bytes

CODES = "codes.npy.part"


class ClusteredKeys:
    """The keys that a clustering reads.

    Parameters
    ----------
    datastore : the store.
    index : the index whose codes stand for them; None takes the store's keys and, where it has none, its only index.

    Attributes
    ----------
    keys : the keys; where they are decoded ``lay_out`` comes before any is read.
    settings : what the clustering's JSON says of it.

    Raises
    ------
    UserError
        Where there is no such index, keys cannot be made of its codes, or RetoMaton could not use the clusters.
    """

    def __init__(self, datastore: Datastore, index: str | None = None) -> None:
        self.keys: KeyRows
        self.settings: dict[str, Any] = {}
        if index is None and datastore.keys is not None:
            self.keys = datastore.keys
            return
        name = index or only_index(datastore, "clusters are made of the codes of a single index")
        opened, metadata = open_index(datastore, name)
        if datastore.keys is None:
            check_walkable(datastore, name, opened, metadata["factory"])
        self.keys = DecodedKeys(opened)
        self.settings = {
            "codes_of": {"index": name, "factory": metadata["factory"], "files": index_checksums(datastore, name)}
        }

    def lay_out(self, folder: Path, memory: int | None) -> None:
        """Write what need be into the folder of the unfinished clustering, whose ``*.npy.part`` go in the end.

        Parameters
        ----------
        memory : bytes that may be taken; None is half of what is available.
        """
        if isinstance(self.keys, DecodedKeys):
            self.keys.lay_out(folder / CODES, allowed_bytes(memory))


def check_walkable(datastore: Datastore, name: str, index: faiss.Index, factory: str) -> None:
    """Raise UserError where RetoMaton, for which clusters are, cannot walk by the codes of the index alone."""
    if CodeTables.of(split_parts(index)[0][0]) is None:
        raise UserError(
            f"The datastore {datastore.path} has no keys, and RetoMaton, which clusters are for, has no distances by "
            f"the codes of its index {name!r} ({factory}); dump it again, with --factory auto or with keys."
        )


def only_index(datastore: Datastore, why: str) -> str:
    """The name of the index of a store without keys; raises UserError, which says ``why``, where it is not one."""
    if len(names := index_names(datastore)) != 1:
        raise UserError(f"The datastore {datastore.path} has no keys, and {len(names)} indexes: {why}.")
    return names[0]
