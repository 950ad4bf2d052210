"""The pages of ``inspect_neighbours`` and ``compare --report`` in a browser."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from helpers.browser import Browser
from helpers.results import documents, write_results

from knn_lm_eval.report.comparison import compare
from knn_lm_eval.report.page import report_page
from knn_lm_eval.report.results import read_folder
from knn_lm_eval.report.token_page import token_page
from knn_lm_eval.report.tokens import InspectedToken, Neighbour, WalkStep

pytestmark = pytest.mark.xdist_group("browser")

HOSTILE = "</script></template><img src=x onerror=alert(1)>{{ 7*7 }}"


def neighbour(entry: int, value: str, **more: Any) -> Neighbour:
    return Neighbour(entry, 2.5, 0.5, value, f"{HOSTILE} before", "law", 3, **more)


TOKENS = [
    InspectedToken("The", 0.5, 0.1, 0.4, True, [neighbour(11, "The"), neighbour(12, " an")], found=9, hits=1),
    InspectedToken(
        HOSTILE, 0.2, 0.0, 0.01, False, [neighbour(21, "x")], found=1, hits=0
    ),  # changed most, for the worse
    InspectedToken("\n\n", 0.1, 0.5, 0.3, True, [neighbour(31, "\n\n")], p_ngram=0.25, found=1, hits=1),
    InspectedToken(" end", 0.1, 0.0, 0.1, True, []),
]


def check(page: Any, browser: Browser) -> None:
    """The details of the second token are open; a click and an arrow open others."""
    buttons, details = page.locator(".tokens button"), page.locator(".token-view .details")
    assert "".join(buttons.all_inner_texts()) == f"The{HOSTILE}⏎⏎ end"
    assert page.locator(".tokens button.chosen").inner_text() == HOSTILE
    said = details.inner_text()
    assert "token 2: 20.00 times less probable by retrieval (-2.996 nats); no search was made" in said
    assert f"{HOSTILE} beforex" in said and "0 of 1 neighbour have this token as value." in said
    assert page.locator("img").count() == 0
    buttons.nth(2).click()
    assert "token 3: 3.00 times more probable" in details.inner_text() and "n-grams" in details.inner_text()
    buttons.nth(2).press("ArrowRight")
    assert "No neighbour was found" in details.inner_text()
    buttons.nth(3).press("ArrowRight")  # there is none behind
    buttons.nth(0).click()
    rows = details.locator("tbody tr").all_inner_texts()
    assert [row.split("\t")[:4] for row in rows] == [["0.5000", "2.5", "3", "11"], ["0.5000", "2.5", "3", "12"]]
    marks = details.locator("tbody mark")
    assert [mark.get_attribute("class") for mark in marks.all()] == [None, "other"]  # the one that has the token
    assert not browser.complaints and not browser.outside


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_of_a_text(scheme: str, browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(token_page(TOKENS, HOSTILE, HOSTILE), encoding="utf-8")
    with browser.page(scheme) as page:
        page.goto((tmp_path / "page.html").as_uri())
        check(page, browser)


def test_the_texts_of_a_report(browser: Browser, tmp_path: Path) -> None:
    write_results(tmp_path, documents(20, 0.2)[0])
    step = WalkStep(3, 2, 1, 0, 0.7, 0.3, 0.0)
    walked = [InspectedToken("on", 0.5, 0.6, 0.55, False, [neighbour(7, "on", came_by="pointer")], step=step)]
    others = [
        {"file": "a.json", "settings": "kNN-LM", "tokens": json.loads(json.dumps([asdict(token) for token in TOKENS]))},
        {
            "file": "b.json",
            "settings": "RetoMaton",
            "tokens": json.loads(json.dumps([asdict(token) for token in walked])),
        },
    ]
    report = report_page(compare(read_folder([tmp_path])[0], resamples=50), others, [], "t")
    (tmp_path / "report.html").write_text(report, encoding="utf-8")
    with browser.page() as page:
        page.goto((tmp_path / "report.html").as_uri())
        second = page.locator(".token-view").nth(1)
        assert "2 came as pointers, 1 from the pointers' clusters, none by a search" in second.inner_text()
        assert second.locator("td").nth(2).inner_text() == "pointer"
        page.evaluate("document.querySelectorAll('.token-view')[1].remove()")
        check(page, browser)
