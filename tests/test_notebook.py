"""The notebook's cells run, with the tiny model, and it is kept without what they printed."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.places import REPO

NOTEBOOK = REPO / "examples" / "first_steps.ipynb"
COLAB = "https://colab.research.google.com/github"


def code_cells() -> list[dict[str, Any]]:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def badge_wanted(project: dict[str, Any]) -> str | None:
    """The address behind a Colab badge, of a project whose repository is on GitHub; Colab opens no others."""
    for address in project.get("urls", {}).values():
        if repository := re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(\.git)?/?", address):
            return f"{COLAB}/{repository[1]}/blob/main/{NOTEBOOK.relative_to(REPO)}"
    return None


def test_no_outputs_are_kept() -> None:
    cells = code_cells()
    assert 5 <= len(cells) <= 10
    assert not [cell["id"] for cell in cells if cell["outputs"] or cell["execution_count"] is not None]


def test_the_colab_badge_is_that_of_the_repository() -> None:
    """Without a repository's address in pyproject.toml there is none, which no link could be made of."""
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = badge_wanted(project)
    found = re.findall(rf"{COLAB}/[\w./-]+", NOTEBOOK.read_text(encoding="utf-8"))
    assert found == ([wanted] if wanted else [])
    assert badge_wanted({"urls": {"Repository": "https://github.com/a/b.git"}}) == (
        f"{COLAB}/a/b/blob/main/examples/first_steps.ipynb"
    )


@pytest.mark.slow
def test_all_cells_run_with_the_tiny_model(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ipykernel")
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setenv("KNN_LM_EVAL_TINY_MODEL", str(model_folder))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    # The kernel of this Python, whatever kernels the machine has installed.
    kernels = tmp_path / "jupyter" / "kernels" / "python3"
    kernels.mkdir(parents=True)
    (kernels / "kernel.json").write_text(
        json.dumps(
            {
                "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
                "display_name": "Python 3",
                "language": "python",
            }
        )
    )
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert "%pip install" in first.source  # with a network alone
    first.source = "pass"
    work = tmp_path / "work"
    work.mkdir()
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(work)}})
    client.execute()
    printed = "".join(output.get("text", "") for cell in code_cells_of(notebook) for output in cell.outputs)
    assert "2,000 entries of 32 numbers" in printed
    perplexities = re.findall(r"token perplexity (\d+\.\d\d)", printed)
    assert len(perplexities) == 3 and len(set(perplexities)) == 3
    page = notebook.cells[-2].outputs[-1]["data"]["text/html"]
    assert page.startswith("<iframe srcdoc=") and "specifies" not in page.partition("srcdoc")[0]
    assert json.loads((work / "first_steps" / "tuned.json").read_text())
    shutil.rmtree(work)


def code_cells_of(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]
