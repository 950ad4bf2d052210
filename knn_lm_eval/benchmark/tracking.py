"""Saving a cell's results as ``lm_eval`` saves its own, and telling wandb, trackio and the hub of them as it does."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from lm_eval.loggers import EvaluationTracker
from lm_eval.utils import simple_parse_args_string

from knn_lm_eval.benchmark.cell import Cell
from knn_lm_eval.errors import UserError, did_you_mean, shortened

logger = logging.getLogger(__name__)

PACKAGES = {"wandb_args": "wandb", "trackio_args": "trackio"}
# What lm-eval's tracker takes, but for what is given here or has no place in a file.
HUB_ARGUMENTS = [
    name for name in inspect.signature(EvaluationTracker).parameters if name not in ("output_path", "token")
]
Results = dict[str, Any]
Samples = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Trackers:
    """Who is told of results, by the arguments that ``lm_eval`` has under these names; empty ones are told nothing."""

    wandb_args: dict[str, Any] = field(default_factory=dict)
    wandb_config_args: dict[str, Any] = field(default_factory=dict)
    trackio_args: dict[str, Any] = field(default_factory=dict)
    hf_hub_log_args: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def names(cls) -> list[str]:
        """The arguments' names."""
        return [one.name for one in fields(cls)]

    @classmethod
    def read(cls, content: Mapping[str, Any], where: str) -> Trackers:
        """Those among a file's keys, each with keys and values, or ``key=value,...`` as on a command line.

        Raises
        ------
        UserError
            Where one is neither, or the hub is to be given what lm-eval does not know.
        """
        read = {name: _arguments(content.get(name), f"{where}: {name}") for name in cls.names()}
        for name in read["hf_hub_log_args"]:
            if name == "token":
                raise UserError(f"{where}: hf_hub_log_args: a token does not belong in a file; set HF_TOKEN.")
            if name not in HUB_ARGUMENTS:
                near = did_you_mean(name, HUB_ARGUMENTS, 0)
                raise UserError(f"{where}: hf_hub_log_args: unknown key {shortened(name)}{near}")
        return cls(**read)

    def check(self) -> None:
        """Raise UserError where a package or a token is missing: better before the work than behind it."""
        for name, package in PACKAGES.items():
            if getattr(self, name) and importlib.util.find_spec(package) is None:
                raise UserError(f"{name} needs the package {package}, which is not installed: pip install {package}")
        if self._pushes and not os.environ.get("HF_TOKEN"):
            raise UserError("hf_hub_log_args pushes to the hub, for which HF_TOKEN has to be set to a token.")

    @property
    def _pushes(self) -> bool:
        return any(self.hf_hub_log_args.get(f"push_{what}_to_hub") for what in ("results", "samples"))

    def tell(self, cell: Cell, results: Results, samples: Samples) -> None:
        """Tell of a cell's results, which are saved: where that fails there is a warning, and no more.

        Each cell is a run of its own, by the cell's name unless the arguments have a ``name``.
        """
        ways: dict[str, Callable[[Cell, Results, Samples], None]] = {
            "wandb": self._tell_wandb,
            "trackio": self._tell_trackio,
            "the hub": self._tell_hub,
        }
        wanted = dict(zip(ways, (self.wandb_args, self.trackio_args, self._pushes), strict=True))
        for name, way in ways.items():
            if wanted[name]:
                try:
                    way(cell, results, samples)
                except Exception as error:
                    logger.warning("%s is saved, but %s could not be told: %s", cell, name, shortened(error, 300))

    def _tell_wandb(self, cell: Cell, results: Results, samples: Samples) -> None:
        from lm_eval.loggers import WandbLogger

        run = WandbLogger({"name": str(cell)} | self.wandb_args, dict(self.wandb_config_args))
        try:
            run.post_init(results)
            run.log_eval_result()
            run.log_eval_samples(samples)
        finally:
            run.run.finish()

    def _tell_trackio(self, cell: Cell, results: Results, samples: Samples) -> None:
        from lm_eval.loggers import TrackioLogger

        run = TrackioLogger({"name": str(cell)} | self.trackio_args)
        try:
            run.post_init(results)
            run.log_eval_result()
            run.log_eval_samples(samples)
        finally:
            run.finish()

    def _tell_hub(self, cell: Cell, results: Results, samples: Samples) -> None:
        # lm-eval pushes files as it writes them: what it writes here is a copy. Where pushing fails it goes on.
        with tempfile.TemporaryDirectory(prefix="knn_lm_eval-") as folder:
            tracker = EvaluationTracker(folder, token=os.environ["HF_TOKEN"], **self.hf_hub_log_args)
            tracker.api = hub = FailuresNoted(tracker.api)
            save_as_lm_eval(tracker, cell, results, samples)
            if hub.failures:
                raise hub.failures[0]
            tracker.recreate_metadata_card()


class FailuresNoted:
    """An object whose methods note what they raise, for those whose callers do not say it."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.failures: list[Exception] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._inner, name)

        def call(*values: Any, **named: Any) -> Any:
            try:
                return method(*values, **named)
            except Exception as error:
                self.failures.append(error)
                raise

        return call


def save_as_lm_eval(tracker: EvaluationTracker, cell: Cell, results: Results, samples: Samples) -> None:
    """Write results and samples by lm-eval's own hand, where its tracker does."""
    tracker.general_config_tracker.log_experiment_args(
        model_source=cell.kind,
        model_args=cell.args,
        system_instruction=cell.task_settings.get("system_instruction"),
        chat_template=None,
        fewshot_as_multiturn=True,
    )
    tracker.save_results_aggregated(results=results, samples=samples)
    for task in results["configs"]:
        # Copies, for lm-eval changes what a sample has to a form that its other loggers do not read.
        tracker.save_results_samples(task_name=task, samples=[dict(sample) for sample in samples[task]])


def _arguments(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if isinstance(value, str):
        if not all("=" in part for part in value.split(",")):
            raise UserError(f"{where}: {shortened(value)} should be keys and values, or key=value,key=value.")
        return simple_parse_args_string(value)
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise UserError(f"{where}: {shortened(value)} should be keys and values, or key=value,key=value.")
    return dict(value)
