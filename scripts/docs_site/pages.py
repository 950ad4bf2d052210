"""MkDocs calls these while it builds the site (mkdocs.yml): GitHub's pages become the site's.

Files that lie outside docs/ become pages, links between files become links between pages, the diagram that GitHub
draws with Mermaid becomes plain HTML (Material would fetch Mermaid from a CDN), and each public name's docstring gets
its place on a page of its own.
"""

from __future__ import annotations

import posixpath
import re
from html import unescape
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

REPO = Path(__file__).resolve().parents[2]
# Files of the repository whose page has another name than the file has in docs/.
PAGES = {
    "README.md": "index.md",
    "docs/README.md": "contents.md",
    "tasks/README.md": "tasks.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "CITATION.cff": "CITATION.cff",  # to download
    "LICENSE": "LICENSE.txt",  # likewise
    "examples/first_steps.ipynb": "first_steps.ipynb",  # likewise
}
DOCSTRINGS = "reference/docstrings.md"

FENCE = re.compile(r"^(?P<fence>```|~~~)(?P<language>\w*).*?^(?P=fence)[ ]*$", re.MULTILINE | re.DOTALL)
BADGE = re.compile(r"^\[?!\[[^\]]*\]\(https://[^)]*\)(\]\([^)]*\))?\n", re.MULTILINE)
LINK = re.compile(r"(?<=\]\()(?![a-z][a-z+.-]*:|#)([^()\s#]+)")
SUBGRAPH = re.compile(r'subgraph \w+\["(?P<title>.*?)"\](?P<rooms>.*?)\n +end', re.DOTALL)
ROOM = re.compile(r'(?P<name>\w+)\["(?P<text>.*?)"\]')
ARROW = re.compile(r"(\w+) --> (\w+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Put the pages in that no file in docs/ is, under their names here."""
    from mkdocs.structure.files import File

    for source, name in PAGES.items():
        if source.startswith("docs/") and (there := files.get_file_from_path(source.removeprefix("docs/"))):
            files.remove(there)
        files.append(File.generated(config, name, abs_src_path=str(REPO / source)))
    files.append(File.generated(config, DOCSTRINGS, content=docstrings_page()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to pages, draw the diagram without JavaScript, and leave out badges, which others' servers draw."""
    name, markdown = page.file.src_uri, BADGE.sub("", markdown)
    source = next((source for source, other in PAGES.items() if other == name), f"docs/{name}")
    done, parts = 0, []
    for block in FENCE.finditer(markdown):
        parts.append(LINK.sub(lambda link: page_link(link[1], source, name), markdown[done : block.start()]))
        parts.append(floors(block[0]) if block["language"] == "mermaid" else block[0])
        done = block.end()
    parts.append(LINK.sub(lambda link: page_link(link[1], source, name), markdown[done:]))
    return "".join(parts)


def page_link(target: str, source: str, name: str) -> str:
    """Where a link of the file ``source`` leads from its page ``name``."""
    file = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    page = PAGES.get(file, file.removeprefix("docs/"))  # MkDocs warns of one that isn't there
    return posixpath.relpath(page, posixpath.dirname(name) or ".")


def docstrings_page() -> str:
    """A page of mkdocstrings' directives, one for each public name."""
    from knn_lm_eval import _HOMES

    names = sorted(name for name in _HOMES if not name.startswith("_"))
    directives = [f"::: knn_lm_eval.{_HOMES[name]}.{name}" for name in names]
    intro = "Each public name as the code describes it; [what they are for](api.md), and [how they are used]"
    return "\n\n".join(["# Docstrings", f"{intro}(../how-to/python.md).", *directives]) + "\n"


def floors(block: str) -> str:
    """The floors of a Mermaid flowchart as HTML: rooms as boxes, and below each what it imports."""
    arrows: dict[str, list[str]] = {}
    for importing, imported in ARROW.findall(block):
        arrows.setdefault(importing, []).append(imported)
    shown = []
    for floor in SUBGRAPH.finditer(block):
        boxes = []
        for room in ROOM.finditer(floor["rooms"]):
            uses = f"<br/><small>imports {', '.join(arrows[room['name']])}</small>" if room["name"] in arrows else ""
            boxes.append(f'<div class="room">{unescape(room["text"])}{uses}</div>')
        title = f"<p>{floor['title']}</p>"
        shown.append(f'<div class="floor">{title}<div class="rooms">{"".join(boxes)}</div></div>')
    return "\n".join(shown)
