"""What a recipe's steps will take, without a network: disk computed, time and memory estimated, or unknown.

Sizes come from the recipe (``sizes``), which has them because a model or a data set that is not here cannot be asked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from knn_lm_eval.benchmark.estimate import matrix_product_speed
from knn_lm_eval.errors import UserError
from knn_lm_eval.make.clustering import ENTRIES_PER_CLUSTER, MOST_COMPARED
from knn_lm_eval.reproduce.recipe import Recipe
from knn_lm_eval.reproduce.run import Marks
from knn_lm_eval.reproduce.steps import Step, steps_of
from knn_lm_eval.search.choosing import choose_factory, estimated_bytes
from knn_lm_eval.search.faiss_index import inverted_file, make_index
from knn_lm_eval.search.kmeans import LEAST_PER_CLUSTER, SAMPLE_PER_CLUSTER
from knn_lm_eval.search.training import sample_size, training_bytes
from knn_lm_eval.search.two_levels import PROBE
from knn_lm_eval.store.clusters import cluster_dtype, entry_dtype

ADDING_SECONDS = 12e-6  # a key, beside finding its list; docs/measurements/large.md
CONVERTING_SECONDS = 20.0  # a model of 135M parameters
ITERATIONS = 20  # of k-means, by default
HALF = 2  # bytes


@dataclass(frozen=True)
class Costs:
    """What a step takes; None is unknown.

    Attributes
    ----------
    disk : bytes that stay.
    memory : bytes at most, estimated.
    seconds : on this machine, estimated from the speed at which it multiplies matrices.
    """

    disk: int | None = None
    memory: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class PlannedStep:
    """A step, whether it is finished, and what it takes."""

    step: Step
    finished: bool
    costs: Costs


def plan(recipe: Recipe, output: Path) -> list[PlannedStep]:
    """The steps with what they take.

    Raises
    ------
    UserError
        As ``steps_of``, and where the folder has a datastore of other settings.
    """
    estimator, marks = Estimator(recipe), Marks(output)
    steps = steps_of(recipe, output, lambda outcome: None)
    return [PlannedStep(step, marks.is_finished(step), estimator.costs(step)) for step in steps]


class Estimator:
    """The costs of a recipe's steps.

    Parameters
    ----------
    speed : floating-point operations a second; None measures this machine.
    """

    def __init__(self, recipe: Recipe, speed: float | None = None) -> None:
        self.recipe, sizes = recipe, recipe["sizes"]
        self.speed = matrix_product_speed() if speed is None else speed
        self.entries, self.parameters = recipe.entries, sizes.get("parameters")
        kept = recipe["dump"].get("keys", "all")
        self.dimension = kept if isinstance(kept, int) else sizes.get("dimension")
        self.without_keys = kept == "none"

    def costs(self, step: Step) -> Costs:
        """Of one step."""
        kind = step.name.partition(" ")[0]
        if kind in ("fetch", "import"):
            return Costs()
        if kind == "model":
            size = None if self.parameters is None else HALF * self.parameters
            return Costs(size, size, CONVERTING_SECONDS)
        if kind in ("tune", "evaluate"):
            return self._scoring(step.name)
        if self.entries is None or self.dimension is None:
            return Costs()
        return {"dump": self._dump, "index": self._index, "cluster": self._cluster}[kind]()

    def _reading(self, tokens: float) -> float | None:
        """Seconds in which the LM reads so many tokens: two operations a parameter and token."""
        return None if self.parameters is None else 2 * self.parameters * tokens / self.speed

    def _model_memory(self) -> int | None:
        if self.parameters is None:
            return None
        return self.parameters * (HALF if self.recipe["model"].get("dtype") in ("float16", "bfloat16") else 2 * HALF)

    def _dump(self) -> Costs:
        assert self.entries is not None and self.dimension is not None
        dump, memory = self.recipe["dump"], self._model_memory()
        window = dump.get("max_length", 1024)
        seconds = self._reading(self.entries * window / dump.get("stride", window))
        disk = 4 * self.entries
        if not self.without_keys:
            return Costs(disk + HALF * self.dimension * self.entries, memory, seconds)
        index = self._index()
        joined = None if seconds is None or index.seconds is None else seconds + index.seconds
        return Costs(disk + (index.disk or 0), max(memory or 0, index.memory or 0) or None, joined)

    def _index(self) -> Costs:
        assert self.entries is not None and self.dimension is not None
        index = self.recipe["index"]
        sim_func, factory = index.get("sim_func", "l2"), index.get("factory", "auto")
        if factory == "auto":
            factory = choose_factory(self.entries, self.dimension, sim_func)
        try:
            made = make_index(factory, self.dimension, sim_func)
            sample = sample_size(factory, self.dimension, sim_func, self.entries, index.get("train_sample"))
        except UserError:
            return Costs()  # the build says what is wrong
        lists = 0 if (ivf := inverted_file(made)) is None else ivf.nlist
        compared = lists if "HNSW" not in factory else 0
        work = 2 * self.dimension * compared * (self.entries + 10 * sample)  # 10 iterations
        return Costs(
            round(estimated_bytes(factory, self.entries, self.dimension, sim_func) * self.entries),
            training_bytes(factory, self.dimension, sim_func, sample) if sample else None,
            self.entries * ADDING_SECONDS + work / self.speed,
        )

    def _cluster(self) -> Costs:
        assert self.entries is not None and self.dimension is not None
        cluster = self.recipe["cluster"]
        if cluster["method"] != "kmeans":
            return Costs(self._cluster_bytes(self.entries), None, None)
        number = cluster.get("num_clusters") or max(1, self.entries // ENTRIES_PER_CLUSTER)
        two_levels = number > MOST_COMPARED
        default = (LEAST_PER_CLUSTER if two_levels else SAMPLE_PER_CLUSTER) * number
        sample = min(cluster.get("sample") or default, self.entries)
        compared = 2 * math.sqrt(PROBE * number) if two_levels else number
        work = 2 * self.dimension * compared * (cluster.get("iterations", ITERATIONS) * sample + self.entries)
        memory = (HALF if two_levels else 2 * HALF) * self.dimension * sample + 12 * self.dimension * number
        return Costs(self._cluster_bytes(number), memory, work / self.speed)

    def _cluster_bytes(self, number: int) -> int:
        """Each entry's cluster, the members by cluster, and where they begin."""
        assert self.entries is not None
        of_entry = sum(np.dtype(dtype).itemsize for dtype in (cluster_dtype(number), entry_dtype(self.entries)))
        return of_entry * self.entries + 8 * (number + 1)

    def _scoring(self, name: str) -> Costs:
        """The LM's reading, once for all settings or methods; without the searches."""
        kind, _, tuned = name.partition(" ")
        tasks = self.recipe["tune"][tuned]["tasks"] if kind == "tune" else self._evaluated_tasks()
        counts = [self.recipe["sizes"].get("tokens", {}).get(task) for task in tasks]
        if None in counts:
            return Costs(None, self._model_memory(), None)
        scoring = self.recipe["scoring"]
        window, context = scoring.get("max_length", 1024), scoring.get("context_len", 1)
        return Costs(0, self._model_memory(), self._reading(sum(counts) * window / max(1, window - context)))

    def _evaluated_tasks(self) -> list[str]:
        tasks: Any = self.recipe["evaluate"].get("tasks") or {}
        return [(tasks[name] or {}).get("task", name) if isinstance(tasks, dict) else name for name in tasks]
