"""What is installed here: packages and their versions, and what libraries say of themselves when they are asked.

Works where anything but this package is missing or broken: versions are read without importing, and libraries are
imported by child processes, which may die of it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from knn_lm_eval.errors import EXTRAS, REQUIRED, printable

SELF = "knn-lm-eval"
FAISS = ("faiss-cpu", "faiss-gpu", "faiss")  # any of which brings the module faiss; the last one is conda's
DISTRIBUTIONS = {"faiss": FAISS} | {module: (name,) for module, name in REQUIRED.items()}
SECONDS = 300  # that a library may take to be asked

# What is asked of a library, by a child; each prints one line of JSON.
TORCH = """
import json, torch
found = []
for number in range(torch.cuda.device_count()):
    about, (free, total) = torch.cuda.get_device_properties(number), torch.cuda.mem_get_info(number)
    found.append({"name": about.name, "capability": f"{about.major}.{about.minor}", "free": free, "total": total})
print(json.dumps({
    "cuda": torch.version.cuda, "hip": torch.version.hip, "threads": torch.get_num_threads(), "gpus": found,
    "mps": torch.backends.mps.is_available(),
}))
"""
FAISS_BUILD = """
import json, faiss
gpus = faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0
# A faiss-gpu has GPU classes, whether or not there is a GPU.
build = {"options": faiss.get_compile_options().split(), "for_gpus": hasattr(faiss, "StandardGpuResources")}
print(json.dumps(build | {"gpus": gpus, "threads": faiss.omp_get_max_threads()}))
"""
DISCOVERY = """
import json
import lm_eval.models
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager
model = get_model("knn-hf")
print(json.dumps({"model": f"{model.__module__}.{model.__name__}", "tasks": "python_docs" in TaskManager().all_tasks}))
"""


@dataclass(frozen=True)
class Package:
    """A package that this one uses.

    Attributes
    ----------
    module : what is imported.
    version : None where it is not installed.
    needed : the versions that are admitted, as in ``>=1.0,<2``; empty where nothing says so.
    extra : that brings it; empty where it comes with the package.
    fault : why it will not do, in a few words; empty otherwise.
    """

    module: str
    version: str | None
    needed: str
    extra: str
    fault: str


def packages() -> list[Package]:
    """All packages that are used, those first that come with this one."""
    admitted = _admitted_versions()
    return [_package(module, admitted) for module in (*sorted(REQUIRED), *sorted(EXTRAS))]


def _package(module: str, admitted: dict[str, Any]) -> Package:
    version, needed, fault = None, "", ""
    for name in DISTRIBUTIONS.get(module, (module,)):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        specifier = admitted.get(name.replace("_", "-"))
        needed = "" if specifier is None else str(specifier)
        if specifier is not None and not specifier.contains(version, prereleases=True):
            fault = f"needs {needed}"
        break
    if importlib.util.find_spec(module) is None:  # its record may have outlived it
        version, fault = None, "not installed"
    return Package(module, version, needed, " or ".join(EXTRAS.get(module, ())), fault)


def _admitted_versions() -> dict[str, Any]:
    """By distribution the versions that this package's own record admits; nothing where it has none."""
    try:
        from packaging.requirements import Requirement

        requirements = [Requirement(text) for text in importlib.metadata.requires(SELF) or ()]
    except (ImportError, importlib.metadata.PackageNotFoundError):
        return {}
    # Of an extra's and the usual ones: the tests' own are not asked for.
    own = [one for one in requirements if "test" not in str(one.marker or "")]
    return {one.name.replace("_", "-"): one.specifier for one in own}


def ask(source: str) -> dict[str, Any]:
    """What the child says that runs ``source``, or what went wrong with it, as ``fault``."""
    try:
        command = [sys.executable, "-W", "ignore", "-c", source]
        child = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return {"fault": f"no answer in {SECONDS} seconds"}
    except OSError as error:
        return {"fault": f"could not be asked: {error.strerror}"}
    if child.returncode < 0:
        return {"fault": f"died of {signal.Signals(-child.returncode).name} when it was imported"}
    try:
        return json.loads(child.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        said = child.stderr.strip().splitlines() or [f"exit status {child.returncode}"]
        return {"fault": printable(said[-1])[:300]}


def python() -> dict[str, str]:
    """The interpreter, and what it runs on."""
    return {
        "version": platform.python_version(),
        "implementation": platform.python_implementation(),
        "executable": sys.executable,
        "platform": platform.platform(),
    }


def environment(names: Sequence[str]) -> dict[str, str]:
    """Those of these environment variables that are set."""
    return {name: printable(os.environ[name]) for name in names if name in os.environ}
