"""The commands that README and docs show in code blocks, and verbs at the end of their help, and how each is tested.

``PYTHONPATH=tests python -m helpers.shown_commands`` prints the list. ``tests/test_shown_commands.py`` runs them, in a
folder that holds what they name (``helpers.shown_folder``).
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from helpers.places import REPO, TASKS
from helpers.shown_tables import NOT_RUN, REPLACED

from knn_lm_eval.cli.main import verbs

PAGES = [*(REPO / name for name in ("README.md", "CONTRIBUTING.md")), *sorted((REPO / "docs").rglob("*.md"))]
PAGES.append(TASKS / "README.md")
BLOCK = re.compile(r"^```(?:bash|sh)\n(.*?)^```", re.MULTILINE | re.DOTALL)
FILE = re.compile(r'^```\w+ title="(.+)"\n(.*?)^```', re.MULTILINE | re.DOTALL)
VERB = re.compile(r"(?:^|.*? )(?:knn-lm-eval|-m knn_lm_eval\.cli|scripts/(?=\w+\.py)) ?(\w+)(?:\.py)?(?: |$)")
LM_EVAL = re.compile(r"(?:^|.*? )(?:-m )?lm_eval(?: |$)")
ENDS = {"&&", "||", "|", ";", "&", ">", "2>"}


@dataclass(frozen=True)
class Shown:
    """A command as a page, or a verb's module, shows it."""

    page: Path
    line: str

    @property
    def not_run(self) -> str | None:
        """Why it is not run; None where it is."""
        reasons = [reason for beginning, reason in NOT_RUN.items() if self.line.startswith(beginning)]
        assert len(reasons) < 2, f"several reasons not to run {self.line}"
        return reasons[0] if reasons else None

    @property
    def replaced(self) -> dict[str, str]:
        """What is put in the place of what, so that it is small and nothing is left out."""
        return {old: new for old, new in REPLACED.items() if re.search(old, self.line)}

    @property
    def run_as(self) -> str:
        line = self.line
        for old, new in self.replaced.items():
            line = re.sub(old, new, line)
        return line

    @property
    def program(self) -> tuple[str, list[str]] | None:
        """Whose it is, a verb's or ``lm_eval``'s, and the arguments; None of other programs."""
        for pattern, program in ((VERB, None), (LM_EVAL, "lm_eval")):
            if call := pattern.match(self.line):
                words = shlex.split(self.line[call.end() :], comments=True)
                end = next((place for place, word in enumerate(words) if word in ENDS), len(words))
                return program or call[1], words[:end]
        return None

    @property
    def tested(self) -> str:
        """How, in words."""
        if self.not_run:
            return f"not run: {self.not_run}{', parsed by its own parser' if self.program else ''}"
        return "run" if self.run_as == self.line else f"run as: {self.run_as}"


@dataclass(frozen=True)
class Block:
    """The commands of a code block, which a reader types one after the other, and the files that their page shows."""

    page: Path
    commands: tuple[Shown, ...]
    files: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return f"{self.page.relative_to(REPO)}: {self.commands[0].line[:50]}"


def shown_blocks() -> list[Block]:
    """All code blocks with commands, of all pages, and the examples that no page has; those that show the same once."""
    found: dict[tuple[tuple[str, ...], tuple[tuple[str, str], ...]], Block] = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        files = tuple(FILE.findall(text))
        for block in BLOCK.findall(text):
            lines = [" ".join(line.split()) for line in block.replace("\\\n", "").splitlines()]
            lines = [line for line in lines if line and not line.startswith("#")]
            found.setdefault((tuple(lines), files), Block(page, tuple(Shown(page, line) for line in lines), files))
    in_pages = {shown.line for block in found.values() for shown in block.commands}
    examples = [Shown(file, import_module(f"knn_lm_eval.cli.{verb}").EXAMPLE) for verb, file in verbs().items()]
    return [*found.values(), *(Block(one.page, (one,), ()) for one in examples if one.line not in in_pages)]


def shown_commands() -> list[Shown]:
    """All of them, each of a page once."""
    return list({command: None for block in shown_blocks() for command in block.commands})


if __name__ == "__main__":
    for shown in shown_commands():
        print(f"{shown.page.relative_to(REPO)}\t{shown.line}\n\t{shown.tested}")
