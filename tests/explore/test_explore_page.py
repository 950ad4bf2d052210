"""The explorer's page in a browser: typing, clicking, sliding, visitors, and texts that mean harm."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from helpers.browser import Browser
from helpers.tiny_model import EVAL_TEXT, MAX_LENGTH, TRAIN_TEXT

from knn_lm_eval import KNNHF, Datastore
from knn_lm_eval.study.inspection import inspect_text

pytestmark = pytest.mark.xdist_group("browser")

TEXT = EVAL_TEXT[:60] + TRAIN_TEXT[300:350]
HOSTILE = "</script><img src=x onerror=alert(1)>{{7*7}}${7*7}<b>bold</b>&lt;\"'"


@pytest.fixture(scope="module")
def visitor(browser: Browser, address: str) -> Iterator[Any]:
    """A page that is open."""
    with browser.page() as page:
        page.goto(address)
        yield page
    assert not browser.outside and not browser.complaints


def read(page: Any, text: str) -> None:
    """Type a text, and have it read."""
    page.fill("#text textarea", text)
    page.click("#read")
    joined = "[...document.querySelectorAll('#tokens button')].map(b => b.innerText).join('')"
    page.wait_for_function(f"text => {joined} == text", arg=text.replace("\n", "⏎"))
    settled(page)


def settled(page: Any) -> None:
    """Wait until nothing is under way."""
    page.wait_for_function(
        "() => document.querySelector('#summary .token-view') && !document.querySelector('.progress-text, .generating')"
    )
    page.wait_for_timeout(150)


def shown_text(page: Any) -> str:
    """The text as it was typed, from its tokens."""
    return "".join(page.locator("#tokens button").all_inner_texts()).replace("⏎", "\n")


def perplexities(page: Any) -> list[float]:
    """With retrieval, and by the LM alone."""
    return [float(text.replace(",", "")) for text in page.locator("#summary strong").all_inner_texts()]


def slide(page: Any, name: str, value: float) -> None:
    """Put a slider somewhere, and wait for what that changes."""
    before = page.inner_text("#summary code")
    box = page.locator(f"#{name} input[type=number]")
    box.fill(str(value))
    box.press("Enter")
    page.wait_for_function("before => document.querySelector('#summary code').innerText != before", arg=before)
    settled(page)


def test_a_typed_text_is_coloured_and_begins_with_what_changed_most(visitor: Any, clustered: Datastore) -> None:
    read(visitor, TEXT)
    assert shown_text(visitor) == TEXT
    lm = KNNHF(datastore=clustered.path, k=30, lmbda=0.4, knn_temp=2.0, retomaton=True, clusters="kmeans", device="cpu")
    tokens = inspect_text(lm, TEXT)
    most = max(range(len(tokens)), key=lambda i: abs(tokens[i].gain))
    chosen = visitor.locator("#tokens button.chosen")
    assert chosen.count() == 1 and chosen.get_attribute("data-token") == str(most)
    details = visitor.inner_text("#details")
    assert f"token {most + 1}:" in details and f"({tokens[most].gain:+.3f} nats)" in details
    for token, button in zip(tokens, visitor.locator("#tokens button").all(), strict=True):
        assert ("47, 127, 209" if token.gain > 0 else "224, 122, 32") in button.evaluate("b => b.style.background")
    assert f"{len(tokens)} tokens, {sum(token.searched for token in tokens)} searches." in visitor.inner_text(
        "#summary"
    )


def test_a_click_and_the_arrow_keys_open_a_token(visitor: Any) -> None:
    read(visitor, TEXT)
    buttons = visitor.locator("#tokens button")
    buttons.nth(4).click()
    visitor.wait_for_function("() => document.querySelector('#details').innerText.includes('token 5:')")
    rows = visitor.locator("#details tbody tr").all_inner_texts()
    assert rows and all(re.match(r"[\d.e-]+\t[\d,.]+\t(pointer|cluster|search)\t\d+\t\d+\t", row) for row in rows)
    buttons.nth(4).press("ArrowRight")
    visitor.wait_for_function("() => document.querySelector('#details').innerText.includes('token 6:')")
    assert visitor.locator("#tokens button.chosen").get_attribute("data-token") == "5"


def test_sliders_mix_anew(visitor: Any) -> None:
    read(visitor, TEXT)
    mixed, lm = perplexities(visitor)
    assert mixed != lm
    slide(visitor, "lmbda", 0)
    assert perplexities(visitor) == [lm, lm]
    assert "retrieval changes nothing" in visitor.inner_text("#details")
    slide(visitor, "lmbda", 0.4)
    assert perplexities(visitor) == [mixed, lm]
    for name, value, said in (("log_temp", 1.5, "knn_temp=31.62"), ("k", 3, "k=3,"), ("min_knns", 256, "min_knns=inf")):
        slide(visitor, name, value)
        assert said in visitor.inner_text("#summary code")
    tokens = visitor.locator("#tokens button").count()
    assert f"{tokens} tokens, {tokens} searches." in visitor.inner_text("#summary")  # min_knns: always
    for name, value in (("log_temp", 0.301), ("k", 30), ("min_knns", 1)):
        slide(visitor, name, value)
    assert perplexities(visitor) == pytest.approx([mixed, lm], rel=1e-3)


def test_the_walk_says_where_candidates_came_from(visitor: Any) -> None:
    read(visitor, TEXT)
    visitor.get_by_role("tab", name="RetoMaton's walk").click()
    rows = visitor.locator("#walk tbody tr")
    assert rows.count() == visitor.locator("#tokens button").count()
    cells = [row.split("\t") for row in rows.all_inner_texts()]
    assert cells[0][2:6] == ["0", "0", "0", "30"]  # the first step has nothing to follow
    assert any(row[5] == "–" and int(row[3]) > 0 for row in cells)
    rows.nth(2).click()
    visitor.wait_for_function("() => document.querySelector('#walk_details').innerText.includes('token 3:')")
    assert "RetoMaton: " in visitor.inner_text("#walk_details")
    visitor.get_by_role("tab", name="Tokens").click()


def test_two_visitors_do_not_see_each_other(visitor: Any, browser: Browser, address: str) -> None:
    read(visitor, TEXT)
    own = perplexities(visitor)
    with browser.page() as other:
        other.goto(address)
        other.fill("#text textarea", EVAL_TEXT[100:190])
        visitor.fill("#text textarea", TEXT[:50])
        other.click("#read")
        visitor.click("#read")  # while the other's is read
        for page, text in ((other, EVAL_TEXT[100:190]), (visitor, TEXT[:50])):
            page.wait_for_function(
                "text => [...document.querySelectorAll('#tokens button')].map(b => b.innerText).join('') == text",
                arg=text,
            )
        settled(visitor)
        now = perplexities(visitor)
        slide(other, "lmbda", 0.9)
        assert shown_text(other) == EVAL_TEXT[100:190] and perplexities(other)[1] != own[1]
        assert perplexities(visitor) == now != own and shown_text(visitor) == TEXT[:50]


def test_html_in_a_text_is_text(visitor: Any, browser: Browser) -> None:
    read(visitor, f"{HOSTILE}\n  two\n\n{HOSTILE}")
    assert shown_text(visitor) == f"{HOSTILE}\n  two\n\n{HOSTILE}"
    assert visitor.locator("#tokens img, #tokens b, #details img").count() == 0
    visitor.locator("#tokens button").nth(3).click()
    visitor.get_by_role("tab", name="Continue the text").click()
    visitor.click("#go_on")
    visitor.wait_for_selector("#both .side >> nth=1")
    visitor.get_by_role("tab", name="Tokens").click()
    assert not browser.complaints


def test_a_text_beyond_the_window_is_read_in_windows(visitor: Any) -> None:
    read(visitor, EVAL_TEXT[:300])
    tokens = visitor.locator("#tokens button").count()
    windows = -(-tokens // MAX_LENGTH)
    assert windows > 1 and shown_text(visitor) == EVAL_TEXT[:300]
    said = f"Read in {windows} windows of at most {MAX_LENGTH} tokens, as in scoring"
    assert said in visitor.inner_text("#summary")


def test_what_cannot_be_read_is_said_on_the_page(visitor: Any) -> None:
    for text, said in (
        ("", "The text is empty: type or paste one."),
        (EVAL_TEXT * 3, "tokens, and at most 300 tokens are read: give a shorter one."),
    ):
        visitor.fill("#text textarea", text)
        visitor.click("#read")
        visitor.wait_for_function("said => document.querySelector('#summary').innerText.includes(said)", arg=said)
        assert visitor.locator("#tokens button").count() == 0
    read(visitor, TEXT)  # and then all is well again
    assert shown_text(visitor) == TEXT


def test_continuations_stand_side_by_side(visitor: Any) -> None:
    visitor.fill("#text textarea", TRAIN_TEXT[300:340])
    visitor.get_by_role("tab", name="Continue the text").click()
    box = visitor.locator("#new_tokens input[type=number]")
    box.fill("12")
    box.press("Enter")
    visitor.click("#go_on")
    visitor.wait_for_function("() => document.querySelector('#both').innerText.includes('greedy')")
    both = visitor.locator("#both .side").all_inner_texts()
    assert [side.split("\n")[0] for side in both] == ["With retrieval", "The LM alone"] and both[0] != both[1]
    visitor.get_by_role("tab", name="Tokens").click()


def test_the_dark_look_is_dark(browser: Browser, address: str) -> None:
    colours = {}
    for scheme in ("light", "dark"):
        with browser.page(scheme) as page:
            page.goto(address)
            page.wait_for_selector("h1")
            colours[scheme] = page.locator("h1").evaluate("h => getComputedStyle(h).color")
    assert colours == {"light": "rgb(27, 32, 39)", "dark": "rgb(228, 232, 238)"}
