"""Tuning on a validation text: the best settings of a grid, and an adaptive lmbda, from one pass over the text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from knn_lm_eval.errors import UserError
from knn_lm_eval.model.knn_hf import KNNHF
from knn_lm_eval.model.params import CONDITIONS, Params, tuned_contents
from knn_lm_eval.model.settings import RetrievalSettings
from knn_lm_eval.model.stores import open_stores
from knn_lm_eval.store.joined import Store, open_clusters
from knn_lm_eval.study.fitting import AdaptiveFit, fit_adaptive
from knn_lm_eval.study.grid import KNN_TEMPS, LMBDAS, Axis, Best, Surface, find_best, make_grid, on_edges
from knn_lm_eval.study.grid_scorer import GridScorer
from knn_lm_eval.study.run import find_tasks, load_knn_hf, perplexity, score_tasks, write_csv

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

TUNED = ("params", "k", "lmbda", "ngram_lmbda", "knn_temp")


@dataclass(frozen=True)
class Tuning:
    """What ``tune`` found.

    Attributes
    ----------
    params : the best settings, for a file that ``params=FILE`` takes.
    surfaces, best : the grid, one surface per search or walk, and its best setting.
    defaults : the papers' settings, as a surface of one point; all 0 where the grid's searches or walks lack them.
    fit : the adaptive lmbda; None where none was asked for.
    base_log_prob, tokens : of the LM alone, the sum of all tokens' log-probabilities; how many there were.
    seconds : by stage.
    datastore : what was tuned for.
    """

    params: Params
    surfaces: list[Surface]
    best: Best
    defaults: Surface
    fit: AdaptiveFit | None
    base_log_prob: float
    tokens: int
    seconds: dict[str, float]
    datastore: Store

    def rows(self) -> Iterator[dict[str, Any]]:
        """All settings of the grid and their perplexities."""
        for surface in self.surfaces:
            for settings, log_prob in surface.settings():
                yield self._row(settings, log_prob, surface)

    def summary(self) -> list[dict[str, Any]]:
        """The LM alone, the papers' defaults, the best setting, and the adaptive lmbda, as far as there are such."""
        rows: list[dict[str, Any]] = [
            {"": "LM alone", "token_perplexity": perplexity(self.base_log_prob, self.tokens)},
        ]
        if self.defaults.log_prob.any():
            settings, log_prob = next(self.defaults.settings())
            rows.append({"": "defaults"} | self._row(settings, log_prob, self.defaults))
        rows.append({"": "best"} | self._row(self.best.settings, self.best.log_prob, self.best.surface))
        if (fit := self.fit) is not None:
            kind = fit.lmbda.plain()["kind"]
            settings = self.best.settings | {"knn_temp": fit.knn_temp, "lmbda": kind}
            rows.append({"": kind} | settings | {"token_perplexity": math.exp(-fit.log_prob)})
            if fit.saved_searches:
                rows[-1]["saved_searches"] = round(fit.saved_searches, 4)
        return rows

    def edges(self) -> dict[str, float]:
        """The best setting's values that lie on the grid's edge, where better ones may lie beyond."""
        names = on_edges(self.best, self.surfaces, self.datastore.kept)
        return {name: self.best.settings[name] for name in names}

    def write_grid(self, path: Path) -> None:
        """Write ``rows`` as CSV."""
        write_csv(path, list(self.rows()))

    def _row(self, settings: dict[str, Any], log_prob: float, surface: Surface) -> dict[str, Any]:
        # All digits that there are, so that rows may be compared with separate evaluations.
        row = settings | {"token_perplexity": perplexity(log_prob, self.tokens)}
        if "min_knns" in surface.fixed:
            row["saved_searches"] = round(1 - surface.searches / self.tokens, 4)
        return row


def tune(
    model_args: dict[str, Any],
    tasks: Sequence[str],
    *,
    k: Axis | None = None,
    knn_temp: Axis = KNN_TEMPS,
    lmbda: Axis = LMBDAS,
    probe: Axis | None = None,
    min_knns: Axis | None = None,
    max_knns: Axis | None = None,
    ngram_lmbda: Axis | None = None,
    adaptive: Literal["none", "buckets", "gate"] = "none",
    saved_searches: float = 0.0,
    seed: int = 0,
    metadata: dict[str, Any] | None = None,
    limit: float | None = None,
    allow_test: bool = False,
) -> Tuning:
    """The best settings for the text of some tasks, from one pass over it.

    Parameters
    ----------
    model_args : as for ``KNNHF``; with ``retomaton=True`` RetoMaton is tuned.
    tasks : perplexity tasks on a validation split.
    k, knn_temp, lmbda, probe, min_knns, max_knns : what to try, see ``Axis``; ``k`` None is 16, 64, 256 and 1024 as far
        as the store has so many (RetoMaton: the largest), the others None the model's own.
    ngram_lmbda : weights of n-grams to try; None leaves n-grams out.
    adaptive : fit an lmbda per token as well: by nearest distance, or by a small network over LM and neighbours.
    saved_searches : the fraction of searches to do without: by a gate's threshold, or by RetoMaton's min_knns.
    seed : for ``adaptive``.
    metadata, limit : as for lm-eval: what tasks ask for; documents per task.
    allow_test : tune on a test split all the same.

    Raises
    ------
    UserError
        Where arguments do not fit together, or a task is none to tune on.
    """
    retomaton = bool(model_args.get("retomaton"))
    _check_model_args(model_args)
    _check_saved_searches(saved_searches, retomaton, adaptive)
    if ngram_lmbda and adaptive != "none":
        raise UserError(f"--adaptive {adaptive} is fitted without n-grams: leave it or --ngram_lmbda out.")
    if limit is not None and not limit > 0:
        raise UserError(f"--limit {limit:g} must be above 0.")
    axes = {"k": k, "probe": probe, "min_knns": min_knns, "max_knns": max_knns, "ngram_lmbda": ngram_lmbda}
    entries = open_stores(RetrievalSettings.take_from(model_args)[0]).store.kept
    grid = make_grid(entries, retomaton, knn_temp=knn_temp, lmbda=lmbda, **axes)
    manager = find_tasks(tasks, model_args, metadata)
    loaded_tasks = load_tasks(tasks, manager, allow_test)

    # Any lmbda and temperature will do; they are given so that no saved default counts.
    of_ngrams = 0.5 if ngram_lmbda else 0.0
    lm = load_knn_hf(
        model_args, excludes=True, k=grid.k[-1], lmbda=0.5, knn_temp=1.0, ngram_lmbda=of_ngrams, params=False
    )
    scorer = GridScorer(lm, grid, None if adaptive == "none" else seed)
    score_tasks(lm, scorer, loaded_tasks, manager, limit)
    best = find_best(scorer.surfaces, scorer.tokens_scored, saved_searches)
    fit = None
    if adaptive != "none" and scorer.sample is not None:
        number = next(i for i, surface in enumerate(scorer.surfaces) if surface is best.surface)
        fit = fit_adaptive(scorer.sample, best, number, adaptive, saved_searches, seed)
    tuned_for = {"tasks": list(tasks), "limit": limit, "seed": seed}
    return Tuning(
        _make_params(lm, scorer, best, fit, tuned_for),
        scorer.surfaces,
        best,
        scorer.defaults,
        fit,
        scorer.base_log_prob,
        scorer.tokens_scored,
        scorer.seconds,
        lm.retriever.datastore,
    )


def load_tasks(names: Sequence[str], manager: TaskManager, allow_test: bool) -> list[Any]:
    """The tasks, none of which is scored on its test split unless that is allowed."""
    tasks: list[Any] = []
    for name in names:
        if name not in manager.all_subtasks:
            raise UserError(f"There is no task called {name!r}; `lm_eval ls tasks` lists them.")
        task = manager.load([name])["tasks"][name]
        if task.OUTPUT_TYPE != "loglikelihood_rolling":
            raise UserError(f"{name} is no perplexity task: tune on one that is, such as wikitext103_valid.")
        if task.has_test_docs() and not allow_test:
            other = f"{name}_valid"
            advice = f"such as {other}" if other in manager.all_subtasks else "such as wikitext103_valid"
            raise UserError(
                f"{name} is scored on its test split, and what is tuned there says nothing about new text: tune on "
                f"another, {advice}, or force it with --allow_test."
            )
        tasks.append(task)
    return tasks


def _check_model_args(model_args: dict[str, Any]) -> None:
    if given := [name for name in TUNED if name in model_args]:
        raise UserError(f"{given[0]} is what tune looks for: leave it out of --model_args (--k sets a grid).")
    if model_args.get("carry_state"):
        raise UserError("carry_state=True cannot be tuned with: leave it out of --model_args.")


def _check_saved_searches(saved_searches: float, retomaton: bool, adaptive: str) -> None:
    if not 0 <= saved_searches < 1:
        raise UserError(f"--saved_searches {saved_searches:g} must be at least 0 and below 1.")
    if saved_searches and not retomaton and adaptive != "gate":
        raise UserError("--saved_searches needs --adaptive gate, or retomaton=True in --model_args.")
    if saved_searches and retomaton and adaptive == "gate":
        raise UserError("--saved_searches is for a gate or for RetoMaton, not for both together.")


def _make_params(
    lm: KNNHF, scorer: GridScorer, best: Best, fit: AdaptiveFit | None, tuned_for: dict[str, Any]
) -> Params:
    store, searched = lm.augmentation.given, lm.retriever.datastore
    settings = {name: value for name, value in best.settings.items() if value is not None}
    named = lm.settings.get("clusters")
    clusters = None if named is None else open_clusters(searched, str(named))
    result = {"token_perplexity": perplexity(best.log_prob, scorer.tokens_scored)}
    if fit is not None:
        settings |= {"lmbda": fit.lmbda.plain(), "knn_temp": fit.knn_temp}
        result = {
            "token_perplexity": math.exp(-fit.log_prob),
            "constant_token_perplexity": math.exp(-fit.constant_log_prob),
            "sampled_tokens": fit.tokens,
        }
    return Params(
        settings,
        {
            "datastore": store.name,
            "keys_sha256": store.keys_checksum,
            "model": store.manifest.model["pretrained"],
            "conditions": {name: lm.settings[name] for name in CONDITIONS if name in lm.settings},
            "contents": tuned_contents(lm.retriever.checksums(), clusters),
            "tasks": tuned_for["tasks"],
            "limit": tuned_for["limit"],
            "context_len": lm.context_len,
            "max_length": lm.max_length,
            "tokens": scorer.tokens_scored,
            "seed": tuned_for["seed"],
            "base_token_perplexity": perplexity(scorer.base_log_prob, scorer.tokens_scored),
            **result,
        },
    )
