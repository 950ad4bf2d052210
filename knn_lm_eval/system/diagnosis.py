"""What is here and what is missing: the installation, the machine, the caches, and what follows for each feature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from knn_lm_eval.errors import FEATURES, missing_package
from knn_lm_eval.system import installation
from knn_lm_eval.system.caches import cache_folders, folder_bytes
from knn_lm_eval.system.machine import machine
from knn_lm_eval.version import __version__

QUESTIONS = {"torch": installation.TORCH, "faiss": installation.FAISS_BUILD, "lm_eval": installation.DISCOVERY}
# None of these holds a secret.
VARIABLES = (
    *("KNN_LM_EVAL_CACHE", "KNN_LM_EVAL_NO_HOOK", "HF_HOME", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES"),
    *("OMP_NUM_THREADS", "NUMBA_CACHE_DIR", "NUMBA_NUM_THREADS", "ACCELERATE_USE_CPU"),
)
NEEDED = ("faiss",)  # for an evaluation with knn-hf, beside what always comes with the package


def examine() -> dict[str, Any]:
    """All that is known of this installation, as JSON can hold it."""
    packages = [asdict(package) for package in installation.packages()]
    there = {package["module"] for package in packages if package["version"] is not None}
    asked = [name for name in QUESTIONS if name in there]
    with ThreadPoolExecutor() as children:
        answers = dict(zip(asked, children.map(installation.ask, (QUESTIONS[name] for name in asked)), strict=True))
    return {
        "knn_lm_eval": __version__,
        "python": installation.python(),
        "machine": machine(),
        "environment": installation.environment(VARIABLES),
        "packages": packages,
        **{name: answers.get(name, {"fault": "not installed"}) for name in QUESTIONS},
        "caches": [
            {"what": what, "path": str(folder), "bytes": folder_bytes(folder)}
            for what, folder in cache_folders().items()
        ],
        "features": [
            {
                "feature": feature,
                "package": module,
                "install": None if module in there else str(missing_package(module)),
            }
            for module, feature in FEATURES.items()
        ],
        "faults": faults(packages, answers),
    }


def faults(packages: Sequence[dict[str, Any]], answers: Mapping[str, dict[str, Any]]) -> list[str]:
    """Why an evaluation with knn-hf cannot run, a sentence for each reason."""
    found, missing = [], {package["module"] for package in packages if package["version"] is None}
    for package in packages:
        module = package["module"]
        if module in missing and (module in NEEDED or not package["extra"]):
            found.append(str(missing_package(module)))
        elif module not in missing and package["fault"]:
            found.append(f"{module} {package['version']} does not suit this version, which {package['fault']}.")
    for name, answer in answers.items():
        if "fault" in answer and not (name == "lm_eval" and found):  # its fault is a consequence then
            found.append(f"{name} is installed and cannot be used: {answer['fault']}")
    if answers.get("lm_eval", {}).get("tasks") is False:
        found.append(
            "lm-eval does not find the tasks, for which KNN_LM_EVAL_NO_HOOK=1 would be a reason: without it, or with "
            "lm_eval --include_path and the package's folder tasks, it does."
        )
    return found
