"""The commands that README and docs show in code blocks, and how each is tested.

``PYTHONPATH=tests python -m helpers.shown_commands`` prints the list.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from helpers.places import REPO, TASKS

PAGES = [REPO / "README.md", *sorted((REPO / "docs").rglob("*.md")), TASKS / "README.md"]
BLOCK = re.compile(r"^```(?:bash|sh)\n(.*?)^```", re.MULTILINE | re.DOTALL)
VERB = re.compile(r"(?:^|.*? )(?:knn-lm-eval|-m knn_lm_eval\.cli|scripts/(?=\w+\.py)) ?(\w+)(?:\.py)?(?: |$)")
LM_EVAL = re.compile(r"(?:^|.*? )(?:-m )?lm_eval(?: |$)")
ENDS = {"&&", "||", "|", ";", "&", ">", "2>"}


@dataclass
class Shown:
    """A command, where it stands, and whose it is: a verb's, ``lm_eval``'s, or None where another program's."""

    page: Path
    line: str
    program: str | None
    arguments: list[str]

    @property
    def is_whole(self) -> bool:
        """Whether nothing in it stands for something else."""
        return not {"...", "…"} & set(self.arguments)

    @property
    def tested(self) -> str:
        if self.program is None:
            return "not run: another program's, or a script that sets up a machine"
        return "parsed by its own parser" if self.is_whole else "its options are looked up: a part is left out"


def shown_commands() -> list[Shown]:
    """All commands in the code blocks of all pages."""
    found = []
    for page in PAGES:
        for block in BLOCK.findall(page.read_text(encoding="utf-8")):
            for line in block.replace("\\\n", "").splitlines():
                if line.strip() and not line.lstrip().startswith("#"):
                    found.append(_read(page, " ".join(line.split())))
    return found


def _read(page: Path, line: str) -> Shown:
    for pattern, program in ((VERB, None), (LM_EVAL, "lm_eval")):
        if call := pattern.match(line):
            words = shlex.split(line[call.end() :], comments=True)
            end = next((place for place, word in enumerate(words) if word in ENDS), len(words))
            return Shown(page, line, program or call[1], words[:end])
    return Shown(page, line, None, [])


if __name__ == "__main__":
    for shown in shown_commands():
        print(f"{shown.page.relative_to(REPO)}\t{shown.tested}\t{shown.line}")
