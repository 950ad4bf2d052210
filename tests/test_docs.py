"""The documentation names what exists: links, headings, commands, options, public names."""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.places import REPO, SCRIPTS, TASKS

import knn_lm_eval
from knn_lm_eval.cli import main as cli

DOCS = REPO / "docs"
README = REPO / "README.md"
VERBS, API, ARCHITECTURE = (DOCS / name for name in ("reference/verbs.md", "reference/api.md", "architecture.md"))
PAGES = [README, REPO / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md")), TASKS / "README.md"]
MOST_LINES = 150  # of the README: a newcomer reads it to the end

LINK = re.compile(r"\[[^\]]*\]\(([^()\s]+)\)")
FENCE = re.compile(r"^(```|~~~)")
INLINE_CODE = re.compile(r"`([^`]+)`")
VERB_CALL = re.compile(r"(?:knn-lm-eval |(?:python |torchrun .*)?scripts/|-m knn_lm_eval\.cli )(\w+)(?:\.py)?\b")
OPTION = re.compile(r"(?<!\S)--[A-Za-z]\w*")
NOT_VERBS = {"VERB", "NAME"}  # what stands for any of them
# Options of other programs that the text speaks of.
OTHERS_OPTIONS = {"--output_path", "--log_samples", "--num_fewshot", "--apply_chat_template", "--model", "--samples"}
OTHERS_OPTIONS |= {"--nproc_per_node", "--scope", "--use_cache"}
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))


def split_page(page: Path) -> tuple[str, list[tuple[str, str]]]:
    """A page's prose, and its code blocks with their languages."""
    prose: list[str] = []
    blocks: list[tuple[str, str]] = []
    language, code = None, []
    for line in page.read_text(encoding="utf-8").splitlines():
        if FENCE.match(line):
            if language is None:
                language, code = line.strip("`~ "), []
            else:
                blocks.append((language, "\n".join(code)))
                language = None
        elif language is None:
            prose.append(line)
        else:
            code.append(line)
    assert language is None, f"{page} has a code block without an end"
    return "\n".join(prose), blocks


def anchors(page: Path) -> set[str]:
    """What GitHub calls a page's headings."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#{1,6} +(.*?) *$", split_page(page)[0], flags=re.MULTILINE):
        text = LINK.sub(lambda link: link[0][1:].partition("](")[0], heading)
        name = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        found[name] = found.get(name, -1) + 1
    return {name if number == 0 else f"{name}-{number}" for name, last in found.items() for number in range(last + 1)}


def broken_links(page: Path) -> list[str]:
    """The relative links of a page that lead nowhere."""
    broken = []
    for target in LINK.findall(split_page(page)[0]):
        if re.match(r"[a-z][a-z+.-]*:", target):  # an address
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        is_there = file.is_relative_to(REPO) and file.exists()
        if not is_there or (anchor and (file.suffix != ".md" or anchor not in anchors(file))):
            broken.append(target)
    return broken


def sections(page: Path) -> dict[str, str]:
    """The text below each heading of the second level."""
    parts = re.split(r"^## +(.*?) *$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def command_lines(page: Path) -> Iterator[str]:
    """What a page shows to be typed: the lines of its code blocks, and code in the text, without comments."""
    prose, blocks = split_page(page)
    for language, code in blocks:
        if language in ("bash", "sh", ""):
            yield from (line.partition(" #")[0] for line in code.replace("\\\n", " ").splitlines())
    yield from inline_code(prose)


def inline_code(text: str) -> list[str]:
    return [" ".join(code.split()) for code in INLINE_CODE.findall(text)]


def verb_called(line: str, verbs: set[str]) -> tuple[str, str] | None:
    """The verb that a line calls, and what follows it."""
    call = VERB_CALL.search(line)
    if call is None:  # in the text a verb may stand without its program: `build_index --factory auto`
        word, _, rest = line.partition(" ")
        return (word, rest) if word in verbs else None
    return call[1], line[call.end() :]


@pytest.fixture(scope="module")
def options() -> dict[str, set[str]]:
    """The options that each verb's --help shows."""
    argv, shown = sys.argv, {}
    try:
        for verb in cli.verbs():
            with contextlib.redirect_stdout(io.StringIO()) as page, pytest.raises(SystemExit, match="0"):
                cli.main([verb, "--help"])
            shown[verb] = set(re.findall(r"(?<![\w-])--\w+", page.getvalue()))
    finally:
        sys.argv = argv
    return shown


def wrong_options(page: Path, options: dict[str, set[str]]) -> list[str]:
    """Options in a page that their verb, or where none is named any verb, does not have."""
    wrong = []
    of_any = set().union(*options.values()) | OTHERS_OPTIONS
    for line in command_lines(page):
        call = verb_called(line, set(options))
        if call and call[0] in options:
            wrong += [f"{call[0]} {name}" for name in OPTION.findall(call[1]) if name not in options[call[0]]]
        elif line.startswith("--"):
            wrong += [name for name in OPTION.findall(line) if name not in of_any]
    return wrong


def test_a_newcomer_reads_the_readme_to_its_end() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


@every_page
def test_links_lead_to_files_and_headings(page: Path) -> None:
    assert not broken_links(page)


@every_page
def test_the_verbs_and_scripts_named_exist(page: Path) -> None:
    verbs = set(cli.verbs())
    known = verbs | set(cli.RENAMED) | NOT_VERBS
    text = page.read_text(encoding="utf-8")
    assert not [verb for verb in re.findall(r"knn-lm-eval ([a-z]\w*)", text) if verb not in known]
    scripts = set(re.findall(r"scripts/(\w+\.(?:py|sh))", text)) - {f"{name}.py" for name in NOT_VERBS}
    assert not [name for name in scripts if not (SCRIPTS / name).is_file()]


@every_page
def test_the_options_shown_exist(page: Path, options: dict[str, set[str]]) -> None:
    assert not wrong_options(page, options)


def test_each_verb_has_its_row_and_its_section(options: dict[str, set[str]]) -> None:
    rows = re.findall(r"^\| \[`(\w+)`\]", README.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(rows) == sorted(options)
    described = {name: text for name, text in sections(VERBS).items() if name in options}
    assert sorted(described) == sorted(options)
    for verb, text in described.items():
        named = {name for code in inline_code(text) if code.startswith("--") for name in OPTION.findall(code)}
        assert named <= options[verb], verb
        assert "- Reads: " in text and "- Writes: " in text, verb


@every_page
def test_python_code_is_python_and_imports_what_exists(page: Path) -> None:
    public = set(sections(API))
    for language, code in split_page(page)[1]:
        if language != "python" or (page == API and "from " not in code):  # there: a signature
            continue
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("knn_lm_eval"):
                names = {alias.name for alias in node.names}
                if node.module == "knn_lm_eval":
                    assert names <= public
                else:
                    assert names <= set(dir(importlib.import_module(node.module or "")))


def test_each_public_name_has_its_section() -> None:
    described = sections(API)
    for name in set(knn_lm_eval.__all__) - {"__version__"}:
        assert name in described, f"{API} has no section {name}"
        value: Any = getattr(knn_lm_eval, name)
        if inspect.isfunction(value):
            signature = described[name].partition("```python\n")[2].partition("```")[0]
            for parameter in inspect.signature(value).parameters:
                assert re.search(rf"\b{parameter}\b", signature), f"{API}: {name} has a parameter {parameter}"


def modules_named() -> set[str]:
    """The modules that the architecture's page names, as ``room/module``: in its table of rooms and in its text."""
    text = ARCHITECTURE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", text, flags=re.MULTILINE)
    in_table = {f"{room}/{name}" for room, what in rows for name in INLINE_CODE.findall(what) if name.isidentifier()}
    return in_table | {f"{room}/{name}" for room, name in re.findall(r"`(?!scripts)(\w+)/([a-z]\w*)\.py`", text)}


def test_the_architecture_names_every_module_and_no_other() -> None:
    package = REPO / "knn_lm_eval"
    modules = {str(path.relative_to(package).with_suffix("")) for path in package.glob("*/*.py")}
    modules |= {f"tasks/{path.stem}" for path in TASKS.glob("*.py")}
    verbs = {f"cli/{verb}" for verb in cli.verbs()}  # each has its row elsewhere
    here = {module for module in modules if not module.endswith(("/__init__", "/__main__")) and "tasks/" not in module}
    assert here - verbs <= modules_named()
    assert modules_named() <= modules


# ------------------------------------------------------------------------- that these checks can fail


def test_broken_links_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "REPO", tmp_path)
    (tmp_path / "there.md").write_text("# A `code` heading, it's\n\n## Twice\n\n## Twice\n")
    page = tmp_path / "page.md"
    good = ["there.md", "there.md#a-code-heading-its", "there.md#twice-1", "#here", "https://example.org/no.md"]
    bad = ["gone.md", "there.md#gone", "there.md#twice-2", "#not-here", "../outside.md"]
    page.write_text("# Here\n\n" + "\n".join(f"[x]({link})" for link in good + bad) + "\n\n```\n[x](in_code.md)\n```\n")
    (tmp_path.parent / "outside.md").write_text("")
    assert broken_links(page) == bad


def test_options_that_a_verb_lacks_are_found(tmp_path: Path) -> None:
    options = {"tune": {"--k"}, "dump_datastore": {"--text", "--output"}}
    page = tmp_path / "page.md"
    page.write_text(
        "Say `tune --kk 1`, `--text`, `--k` or `--textt`.\n\n```bash\nknn-lm-eval tune --k 1 \\\n    --q 2  # --no\n"
        "torchrun --nproc_per_node 8 scripts/dump_datastore.py --text a --outputs b\n"
        "torchrun -m knn_lm_eval.cli dump_datastore --resum\nlm_eval --tasks law\n```\n"
    )
    assert sorted(wrong_options(page, options)) == sorted(
        ["tune --kk", "--textt", "tune --q", "dump_datastore --outputs", "dump_datastore --resum"]
    )
