"""Where things lie and what may be imported, as far as lint-imports (see pyproject.toml) does not look."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.places import REPO, TASKS

PACKAGE = REPO / "knn_lm_eval"
TESTS = REPO / "tests"
# Folders with modules; tasks/ is one by a link in the package, or lies beside it alone.
ROOMS = {file.parent.name for file in PACKAGE.glob("*/*.py")} | {"tasks"}
MODULES = sorted({*PACKAGE.rglob("*.py"), *TASKS.glob("*.py")})
# Top-level modules whose distribution has another name.
DISTRIBUTIONS = {"faiss": "faiss-cpu", "yaml": "pyyaml"}
# Of the published code's own checkout, which study/published_code.py is given.
NOT_DISTRIBUTED = {"knnlm", "retomaton"}


def imported(file: Path) -> Iterator[str]:
    """The modules that a file imports, in functions too; a name of the package itself as knn_lm_eval:NAME."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "knn_lm_eval":
            yield from (f"knn_lm_eval:{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{file}: a relative import"
            yield node.module


def test_no_test_module_imports_another() -> None:
    files = sorted(TESTS.rglob("*.py"))
    not_to_be_imported = {file.stem for file in files if file.stem.startswith("test_")} | {"conftest"}
    assert len(not_to_be_imported) > 30
    found = [
        f"{file.relative_to(TESTS)} imports {name}"
        for file in files
        for name in imported(file)
        if not_to_be_imported & set(name.split("."))
    ]
    assert not found


def test_the_tests_folders_are_the_package_s() -> None:
    folders = {file.relative_to(TESTS).parts[0] for file in TESTS.rglob("test_*.py") if file.parent != TESTS}
    assert folders - {"torture"} == ROOMS  # of all rooms at once


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_a_room_s_init_says_what_lives_there_and_no_more(room: str) -> None:
    folder = TASKS if room == "tasks" else PACKAGE / room
    module = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
    assert ast.get_docstring(module)
    assert len(module.body) == 1


def test_modules_ask_the_rooms_not_the_package_for_names() -> None:
    """The package's own names are imported late, so that lint-imports would not see where such an arrow leads."""
    rooms = {f"knn_lm_eval:{name}" for name in ROOMS | {"_startup", "compiling", "errors", "version"}}
    found = [
        f"{file.relative_to(REPO)} imports {name}"
        for file in MODULES
        if file != PACKAGE / "__init__.py"
        for name in imported(file)
        if name.startswith("knn_lm_eval:") and name not in rooms
    ]
    assert not found


def test_what_is_imported_is_declared() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [name for name in project["optional-dependencies"] if name != "test"]
    requirements = project["dependencies"] + [r for name in extras for r in project["optional-dependencies"][name]]
    declared = {normal(re.match(r"[\w.-]+", requirement)[0]) for requirement in requirements}
    places: dict[str, str] = {}
    for file in MODULES:
        for name in imported(file):
            places.setdefault(re.split(r"[.:]", name)[0], str(file.relative_to(REPO)))
    foreign = places.keys() - sys.stdlib_module_names - NOT_DISTRIBUTED - {"knn_lm_eval"}
    assert {"numpy", "torch", "ray"} <= foreign
    assert not {places[name]: name for name in foreign if normal(DISTRIBUTIONS.get(name, name)) not in declared}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
