"""Joining a Ray cluster, or starting a small one on this machine: what all that runs on Ray begins with."""

from __future__ import annotations

import logging
import os
from typing import Any

from knn_lm_eval.errors import UserError

# Read by Ray where it connects: its own patience with an address that nobody answers at is a quarter of an hour.
# A Ray that starts here by itself reports its use to nobody.
ENVIRONMENT = {
    "RAY_NUM_REDIS_GET_RETRIES": "1",
    "RAY_py_gcs_connect_timeout_s": "5",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def connect(address: str) -> Any:
    """Connect this process to Ray, once; a process that is connected already stays where it is.

    Parameters
    ----------
    address : ``auto`` joins the cluster that runs on this machine, or starts a Ray of this process alone;
        ``HOST:PORT`` joins that cluster.

    Returns
    -------
    The module ``ray``.

    Raises
    ------
    UserError
        Where Ray is not installed, or no cluster answers at the address.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise UserError("Ray is not installed: pip install 'knn-lm-eval[ray]'.") from error
    if ray.is_initialized():
        return ray
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        if address != "auto":
            raise UserError(
                f"No Ray cluster can be joined at address={address} ({str(error).splitlines()[0]}); start one there "
                f"with `ray start --head`, or give address=auto."
            ) from error
        ray.init(address="local", include_dashboard=False, **quiet)
    return ray
