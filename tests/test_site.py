"""The documentation's site builds without a warning, no link in it is broken, and it fetches nothing from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from helpers.places import REPO

import knn_lm_eval

# What a browser fetches by itself, by tag; <link> only where it is one of these.
FETCHED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
FETCHED_LINKS = {"stylesheet", "icon", "preload", "modulepreload", "preconnect", "manifest"}


class HTMLPage(HTMLParser):
    """The anchors of a page, where it leads, and what a browser fetches to show it."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        has = {name: value or "" for name, value in attrs}
        self.anchors |= {has[name] for name in ("id", "name") if name in has}
        if tag == "a" and "href" in has:
            self.links.append(has["href"])
        if (address := has.get(FETCHED.get(tag, ""))) and (
            tag != "link" or FETCHED_LINKS & set(has.get("rel", "").split())
        ):
            self.fetched.append(address)


def broken(site: Path) -> list[str]:
    """Links within a site that lead to no file or no anchor."""
    parsed = cache(HTMLPage)
    found = []
    for file in sorted(site.rglob("*.html")):
        if file.name == "404.html":  # served from any folder: its links are absolute
            continue
        for link in parsed(file).links + parsed(file).fetched:
            address = urlsplit(link)
            if address.scheme or address.netloc:
                continue
            target = (file.parent / unquote(address.path)).resolve() if address.path else file
            target = target / "index.html" if target.is_dir() else target
            is_there = target.is_file() and target.is_relative_to(site.resolve())
            # Without #__..., by which Material's own script finds its menus and search.
            anchor = "" if address.fragment.startswith("__") else unquote(address.fragment)
            if not is_there or (anchor and anchor not in parsed(target).anchors):
                found.append(f"{file.relative_to(site)}: {link}")
    return found


def foreign(site: Path) -> list[str]:
    """What the pages of a site fetch from elsewhere."""
    pages = sorted(site.rglob("*.html"))
    addresses = [(page, address) for page in pages for address in HTMLPage(page).fetched]
    return [f"{page.name}: {address}" for page, address in addresses if urlsplit(address).netloc]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material", reason="needs the extra docs")
    pytest.importorskip("mkdocstrings", reason="needs the extra docs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(
        command,
        cwd=REPO,
        env=os.environ | {"PYTHONPATH": str(REPO), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    return folder


@pytest.mark.xdist_group("site")
def test_no_link_of_the_site_is_broken(site: Path) -> None:
    assert len(list(site.rglob("*.html"))) > 30
    assert not broken(site)


@pytest.mark.xdist_group("site")
def test_the_site_fetches_nothing_from_elsewhere(site: Path) -> None:
    assert not foreign(site)
    for page in site.rglob("*.html"):  # for which Material's script would fetch Mermaid
        assert 'class="mermaid"' not in page.read_text(encoding="utf-8"), page
    assert "https://" not in re.sub(r"/\*.*?\*/", "", (site / "site.css").read_text(encoding="utf-8"))


@pytest.mark.xdist_group("site")
def test_every_public_name_has_its_docstring_and_every_room_its_box(site: Path) -> None:
    docstrings = (site / "reference" / "docstrings.html").read_text(encoding="utf-8")
    for name in set(knn_lm_eval.__all__) - {"__version__"}:
        home = getattr(knn_lm_eval, name).__module__
        assert f'id="{home}.{name}"' in docstrings
    house = (site / "architecture.html").read_text(encoding="utf-8")
    rooms = set(re.findall(r'<div class="room"><b>(\w+)</b>', house))
    assert rooms >= {file.parent.name for file in (REPO / "knn_lm_eval").glob("*/*.py")} - {"tasks"}


def test_broken_and_foreign_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "there.html").write_text('<h1 id="here">x</h1><a href="../index.html#a%20b">x</a>')
    good = ["folder/there.html#here", "folder/there.html", "#a%20b", "https://example.org/#gone", "#__search"]
    bad = ["gone.html", "folder/there.html#gone", "#gone", "../outside.html"]
    (tmp_path.parent / "outside.html").write_text("")
    links = "".join(f'<a href="{link}">x</a>' for link in good + bad)
    (tmp_path / "index.html").write_text(f'<p id="a b">{links}</p><link rel="canonical" href="https://example.org">')
    assert broken(tmp_path) == [f"index.html: {link}" for link in bad]
    assert not foreign(tmp_path)
    (tmp_path / "index.html").write_text('<script src="https://unpkg.com/x.js"></script><img src="gone.png">')
    assert foreign(tmp_path) == ["index.html: https://unpkg.com/x.js"]
    assert "index.html: gone.png" in broken(tmp_path)
