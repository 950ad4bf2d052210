"""Dumping a datastore as Ray tasks: one tokenizes, then each writes its share of the keys; a worker loads the LM once.

All nodes must see the datastore's folder, the text and the model under the same paths, and have this package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from knn_lm_eval.lm.loading import CausalHFLM
from knn_lm_eval.make.dump import Dump, finish_dump, one_dump_in, train_index_of
from knn_lm_eval.make.dump_progress import entries_done, entries_in_all
from knn_lm_eval.make.index_dump import IndexDump
from knn_lm_eval.make.text import TextSource
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.system.ray_cluster import Head
from knn_lm_eval.system.ray_jobs import RETRIES, Hand, Needs, kept_hands, run_jobs

_loaded: dict[str, CausalHFLM] = {}  # by a worker, of the one dump that it works on


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
        """Load the LM, unless this process did for a task before."""
        name = repr((self.model_args, self.device))
        if name not in _loaded:
            _loaded[name] = CausalHFLM(**self.model_args, device=self.device)
        lm = _loaded[name]
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
    head = Head(address)
    gpus = int(sum(node.resources.get("GPU", 0) for node in head.nodes))
    shares = workers or max(1, gpus)
    needs = Needs(gpus=1 if gpus else 0)
    with one_dump_in(plan.output), kept_hands(head) as kept:
        # Tokenizing is not begun again by itself: what a first try left would be in the way.
        run = partial(_run, head, needs=needs, output=plan.output, kept=kept)
        run(_prepare, {0: (plan, resume, shares)}, retries=0, doing="Tokenizing")
        jobs = {share: (plan, share, shares) for share in range(shares)}
        if plan.settings.get("keys") == "none":
            progress = IndexDump(plan.output).sample_read
            run(_read_sample, jobs, retries=RETRIES, doing="Reading a sample", progress=progress)
            train_index_of(plan.output)
        run(_write_share, jobs, retries=RETRIES, doing="Dumping keys")
        finish_dump(plan.output)
    return Datastore.open(plan.output)


def _prepare(plan: DumpPlan, resume: bool, shares: int) -> None:
    plan.begin().prepare(plan.source.pieces(), resume, shares)


def _read_sample(plan: DumpPlan, share: int, shares: int) -> None:
    plan.begin().read_sample(share, shares)


def _write_share(plan: DumpPlan, share: int, shares: int) -> None:
    plan.begin().write_share(share, shares)


def _run(
    head: Head,
    function: Callable[..., None],
    jobs: Mapping[int, tuple[Any, ...]],
    *,
    needs: Needs,
    retries: int,
    doing: str,
    output: Path,
    kept: list[Hand],
    progress: Callable[[], tuple[int, int]] | None = None,
) -> None:
    """Run jobs; ``progress`` tells how many tokens are done, and of how many (None: of the whole text)."""
    then = "what is written is kept: go on with --resume"
    with tqdm(unit=" tokens", unit_scale=True, desc=doing) as bar:
        for _ in run_jobs(head, function, jobs, needs, retries, then, kept=kept):
            if progress is not None:
                bar.n, bar.total = progress()
                bar.refresh()
            elif (total := entries_in_all(output)) is not None:
                bar.total, bar.n = total, entries_done(output)
                bar.refresh()
