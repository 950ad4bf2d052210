"""Without a package that can be left out, or one that someone took away, everything says in one sentence what to do."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.gguf_files import write_gguf
from helpers.places import REPO
from helpers.tiny_model import make_llama
from transformers import PreTrainedTokenizerFast

from knn_lm_eval import errors
from knn_lm_eval.errors import MissingPackage, UserError, missing_package, naming_missing_packages
from knn_lm_eval.store.datastore import Datastore

# In front of a program: the modules that HIDDEN names are not found, as if they were not installed. Libraries that
# only look whether one can be found see the same.
HIDE = """
import os
from importlib.machinery import PathFinder

_find, _hidden = PathFinder.find_spec.__func__, os.environ["HIDDEN"].split()
PathFinder.find_spec = classmethod(
    lambda cls, name, path=None, target=None: None if name in _hidden else _find(cls, name, path, target)
)
"""
COMMANDS = {
    "bitsandbytes": "pip install 'knn-lm-eval[bnb]'",
    "faiss": "pip install 'knn-lm-eval[cpu]' or pip install 'knn-lm-eval[gpu]' (for NVIDIA GPUs)",
    "gguf": "pip install 'knn-lm-eval[gguf]'",
    "gradio": "pip install 'knn-lm-eval[explore]'",
    "matplotlib": "pip install matplotlib",
    "peft": "pip install 'knn-lm-eval[peft]'",
    "ray": "pip install 'knn-lm-eval[ray]'",
    "yaml": "pip install pyyaml",
}


def run_without(hidden: str, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments as if the modules that ``hidden`` names were not installed."""
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    path = os.pathsep.join([str(tmp_path), str(REPO), str(REPO / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"HIDDEN": hidden, "PYTHONPATH": path}
    return subprocess.run([sys.executable, *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True)


def assert_said(done: subprocess.CompletedProcess[str], module: str) -> None:
    """One sentence with the commands, no traceback, and an exit status that says that it failed."""
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == f"error: {missing_package(module)}"


@pytest.mark.parametrize("module", COMMANDS)
def test_the_sentence_has_the_commands(module: str) -> None:
    assert str(missing_package(module)) == f"{module}, which this needs, is not installed: {COMMANDS[module]}"


def test_every_package_of_the_project_has_a_command() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = {re.match(r"[\w.-]+", requirement)[0] for requirement in project["dependencies"]}
    assert set(errors.REQUIRED.values()) == required
    extras = {name for names in errors.EXTRAS.values() for name in names}
    assert extras == {name for name in project["optional-dependencies"] if name not in ("docs", "plot", "test")}


def test_it_is_a_user_s_error_and_an_import_error_in_other_processes_too() -> None:
    error = pickle.loads(pickle.dumps(missing_package("faiss")))
    assert isinstance(error, UserError) and isinstance(error, ImportError)
    assert error.name == "faiss" and str(error) == str(missing_package("faiss"))


def test_other_import_errors_stay_as_they_are() -> None:
    for other in (
        ModuleNotFoundError("No module named 'knn_lm_eval.nowhere'", name="knn_lm_eval.nowhere"),
        ModuleNotFoundError("No module named 'their_own'", name="their_own"),
        ImportError("cannot import name 'x' from 'numpy'"),
        ImportError("libcudart.so.12: cannot open shared object file"),
    ):
        with pytest.raises(ImportError) as raised, naming_missing_packages():
            raise other
        assert raised.value is other


def test_a_submodule_and_a_library_s_own_sentence_count(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingPackage, match=r"^faiss,"), naming_missing_packages():
        raise ModuleNotFoundError("No module named 'faiss.contrib'", name="faiss.contrib")
    monkeypatch.setattr(errors.importlib.util, "find_spec", lambda name: None if name == "gguf" else object())
    with pytest.raises(MissingPackage, match=r"^gguf,"), naming_missing_packages():
        raise ImportError("Please install torch and gguf>=0.10.0 to load a GGUF checkpoint in PyTorch.")


def lm_eval(tmp_path: Path, hidden: str, model_args: str) -> subprocess.CompletedProcess[str]:
    arguments = ["--model", "knn-hf", "--model_args", model_args, "--tasks", "python_docs", "--limit", "1"]
    return run_without(hidden, tmp_path, "-c", f"from helpers.programs import be_lm_eval; be_lm_eval({arguments})")


def test_lm_eval_without_faiss(tmp_path: Path) -> None:
    assert_said(lm_eval(tmp_path, "faiss", "datastore=nowhere"), "faiss")


def test_explore_without_gradio(tmp_path: Path) -> None:
    done = run_without("gradio", tmp_path, "-m", "knn_lm_eval.cli", "explore", "--model_args", "datastore=nowhere")
    assert_said(done, "gradio")


@pytest.mark.parametrize("hidden", ["gguf", "peft", "bitsandbytes", "ray"])
def test_lm_eval_without_what_an_argument_needs(
    hidden: str, tmp_path: Path, model_folder: Path, store: Datastore, tokenizer: PreTrainedTokenizerFast
) -> None:
    if hidden == "gguf":
        write_gguf(tmp_path / "a.gguf", make_llama(intermediate_size=64), tokenizer)
    extra = {
        "gguf": f"pretrained={tmp_path},gguf_file=a.gguf",
        "peft": f"pretrained={model_folder},peft={tmp_path}",
        "bitsandbytes": f"pretrained={model_folder},load_in_8bit=True",
        "ray": f"pretrained={model_folder},retriever=ray",
    }
    assert_said(lm_eval(tmp_path, hidden, f"datastore={store.path},{extra[hidden]}"), hidden)


@pytest.mark.parametrize(
    ("hidden", "arguments"),
    [
        ("faiss", ["build_index", "--datastore", "STORE", "--name", "other"]),
        ("faiss", ["cluster_datastore", "--datastore", "STORE", "--method", "kmeans", "--name", "other"]),
        ("faiss", ["import_datastore", "text", "--output", "other", "--layout", "fairseq"]),
        ("faiss", ["speed", "--model_args", "datastore=x", "--text", "text"]),
        ("faiss", ["foss_curve", "--model_args", "datastore=x", "--tasks", "python_docs", "--output", "out"]),
        ("rich", ["compare", "results.json", "results.json"]),
        ("transformers", ["dump_datastore", "--model_args", "pretrained=x", "--dataset", "text", "--output", "other"]),
        ("yaml", ["benchmark", "matrix.yaml"]),
    ],
)
def test_a_verb_without_what_it_needs(hidden: str, arguments: list[str], tmp_path: Path, store: Datastore) -> None:
    (tmp_path / "text").write_text("a text")
    (tmp_path / "results.json").write_text('{"results": {"law": {"alias": "law", "word_perplexity,none": 2.0}}}')
    (tmp_path / "matrix.yaml").write_text("output: out\n")
    given = [str(store.path) if argument == "STORE" else argument for argument in arguments]
    assert_said(run_without(hidden, tmp_path, "-m", "knn_lm_eval.cli", *given), hidden)


@pytest.mark.parametrize("hidden", ["faiss", "torch", " ".join(sorted(errors.REQUIRED | errors.EXTRAS))])
def test_doctor_works_without_what_it_misses(hidden: str, tmp_path: Path) -> None:
    done = run_without(hidden, tmp_path, "-m", "knn_lm_eval.cli", "doctor", "--json")
    assert (done.returncode, done.stderr) == (1, "")
    found = json.loads(done.stdout)
    missing = {package["module"] for package in found["packages"] if package["version"] is None}
    assert missing >= set(hidden.split())
    needed = missing - (errors.EXTRAS.keys() - {"faiss"})
    assert sorted(found["faults"]) == sorted(str(missing_package(module)) for module in needed)
    assert {one["package"] for one in found["features"] if one["install"]} == missing & errors.EXTRAS.keys()


def test_python_without_faiss(tmp_path: Path) -> None:
    source = """
        import knn_lm_eval
        try:
            knn_lm_eval.KNNHF
        except ImportError as error:
            assert isinstance(error, knn_lm_eval.UserError)
            print(error)
    """
    done = run_without("faiss", tmp_path, "-c", re.sub(r"^        ", "", source, flags=re.MULTILINE))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{missing_package('faiss')}\n"


def test_a_tokenizer_that_cannot_be_loaded_is_told_as_a_model_is(model_folder: Path, tmp_path: Path) -> None:
    make_llama().save_pretrained(tmp_path / "model")
    from knn_lm_eval.lm.loading import CausalHFLM

    with pytest.raises(UserError, match=r"^Cannot load the tokenizer .*nowhere: "):
        CausalHFLM(str(model_folder), tokenizer=str(tmp_path / "nowhere"))
