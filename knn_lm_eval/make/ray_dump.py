"""Dumping a datastore as Ray tasks: one tokenizes, then each loads the model and writes its share of the keys.

All nodes must see the datastore's folder, the text and the model under the same paths, and have this package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from knn_lm_eval.lm.loading import CausalHFLM
from knn_lm_eval.make.dump import Dump, finish_dump, one_dump_in, train_index_of
from knn_lm_eval.make.dump_progress import entries_done, entries_in_all
from knn_lm_eval.make.index_dump import IndexDump
from knn_lm_eval.make.text import TextSource
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.system.ray_cluster import connect, finished_tasks

RETRIES = 3  # of a share whose process or node died
LOOK_EVERY_SECONDS = 1.0


@dataclass(frozen=True)
class DumpPlan:
    """What a task must know to work on a dump.

    Attributes
    ----------
    model_args, device : how to load the LM.
    source : the text.
    output : the datastore's folder.
    settings : other arguments of ``Dump``.
    """

    model_args: dict[str, Any]
    source: TextSource
    output: Path
    device: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def begin(self) -> Dump:
        """Load the LM."""
        lm = CausalHFLM(**self.model_args, device=self.device)
        source = self.source.description()
        return Dump(lm, self.output, source=source, model_args=self.model_args, **self.settings)


def dump_on_ray(address: str, plan: DumpPlan, workers: int | None = None, resume: bool = False) -> Datastore:
    """As ``dump_datastore``, by tasks of a Ray cluster.

    A share whose task dies is begun again, by another process or node, and goes on from what it had written.

    Parameters
    ----------
    address : see ``knn_lm_eval.system.ray_cluster.connect``.
    workers : shares to work on side by side, each with a GPU where the cluster has any; None is one for each GPU.

    Raises
    ------
    UserError
        As ``dump_datastore``, and where there is no cluster or a task died again and again.
    """
    ray = connect(address)
    gpus = int(ray.cluster_resources().get("GPU", 0))
    workers = workers or max(1, gpus)
    needs = {"num_cpus": 1, "num_gpus": 1 if gpus else 0}
    with one_dump_in(plan.output):
        # Tokenizing is not begun again by itself: what a first try left would be in the way.
        prepare = ray.remote(max_retries=0, **needs)(_prepare)
        _wait_for(ray, [prepare.remote(plan, resume, workers)], "Tokenizing", plan.output)
        for_shares = ray.remote(max_retries=RETRIES, **needs)
        if plan.settings.get("keys") == "none":
            read_sample = for_shares(_read_sample)
            tasks = [read_sample.remote(plan, share, workers) for share in range(workers)]
            index_dump = IndexDump(plan.output)
            _wait_for(ray, tasks, "Reading a sample", plan.output, index_dump.sample_read)
            train_index_of(plan.output)
        write_share = for_shares(_write_share)
        tasks = [write_share.remote(plan, share, workers) for share in range(workers)]
        _wait_for(ray, tasks, "Dumping keys", plan.output)
        finish_dump(plan.output)
    return Datastore.open(plan.output)


def _prepare(plan: DumpPlan, resume: bool, shares: int) -> None:
    plan.begin().prepare(plan.source.pieces(), resume, shares)


def _read_sample(plan: DumpPlan, share: int, shares: int) -> None:
    plan.begin().read_sample(share, shares)


def _write_share(plan: DumpPlan, share: int, shares: int) -> None:
    plan.begin().write_share(share, shares)


def _wait_for(
    ray: Any, tasks: list[Any], doing: str, output: Path, progress: Callable[[], tuple[int, int]] | None = None
) -> None:
    """Wait for tasks; ``progress`` tells how many tokens are done, and of how many (None: of the whole text)."""
    then = "what is written is kept: go on with --resume"
    with tqdm(unit=" tokens", unit_scale=True, desc=doing) as bar:
        for _ in finished_tasks(ray, tasks, LOOK_EVERY_SECONDS, then):
            if progress is not None:
                bar.n, bar.total = progress()
                bar.refresh()
            elif (total := entries_in_all(output)) is not None:
                bar.total, bar.n = total, entries_done(output)
                bar.refresh()
