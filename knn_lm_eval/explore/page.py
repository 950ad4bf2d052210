"""The page itself, made with Gradio: what stands where, and what answers what. It asks nobody outside for anything."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass

# Read when gradio is imported; what a run sent in is nobody else's business.
os.environ["GRADIO_ANALYTICS_ENABLED"] = os.environ["GRADIO_RUN_HISTORY"] = "False"

import gradio as gr  # noqa: E402

from knn_lm_eval.errors import UserError  # noqa: E402
from knn_lm_eval.explore.visit import Desk, Shown, Visit  # noqa: E402
from knn_lm_eval.report import explore_views as views  # noqa: E402
from knn_lm_eval.study.continuation import MAX_NEW_TOKENS, Sampling  # noqa: E402
from knn_lm_eval.study.exploration import ExploredSettings, Explorer  # noqa: E402

VISITORS = 16  # whose texts are kept; who came first is forgotten first
WAITING = 64  # requests to the LM that may wait
COLDEST, HOTTEST = -2.0, 4.0  # decimal logarithms of the temperature
LEAST_MIN_KNNS = 256  # how far the slider reaches at least
# A click on a token (or a step of a walk), and in the text the arrow keys, choose it.
ON_LOAD = """
const choose = (chosen) => {
  element.querySelectorAll(".chosen").forEach((one) => one.classList.remove("chosen"));
  if (chosen.tagName === "BUTTON") chosen.classList.add("chosen");
  trigger("select", { token: Number(chosen.dataset.token) });
};
element.addEventListener("click", (event) => {
  const chosen = event.target.closest("[data-token]");
  if (chosen) choose(chosen);
});
element.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!step || !event.target.dataset.token) return;
  const next = element.querySelector(`button[data-token="${Number(event.target.dataset.token) + step}"]`);
  if (next) { next.focus(); choose(next); event.preventDefault(); }
});
"""


@dataclass(frozen=True)
class Sliders:
    """The settings' controls."""

    lmbda: gr.Slider
    own_weight: gr.Checkbox
    log_temp: gr.Slider
    k: gr.Slider
    min_knns: gr.Slider

    @property
    def controls(self) -> list[gr.Slider | gr.Checkbox]:
        """In the order in which ``settings`` takes their values."""
        return [self.lmbda, self.own_weight, self.log_temp, self.k, self.min_knns]

    def settings(
        self, lmbda: float, own_weight: bool, log_temp: float, k: float, min_knns: float
    ) -> Callable[[], ExploredSettings]:
        """What gives the settings that the controls stand for; called, it may raise UserError."""
        needed = math.inf if min_knns == self.min_knns.maximum else min_knns
        return lambda: ExploredSettings(round(k), None if own_weight else lmbda, 10**log_temp, needed)


def make_page(explorer: Explorer, name: str) -> gr.Blocks:
    """The page for an LM with the datastore ``name``; ``serve`` opens it."""
    desk = Desk(explorer)
    with gr.Blocks(title=f"{name}: neighbours", analytics_enabled=False) as page:
        gr.HTML(
            views.heading(
                "What retrieval brings",
                f"{name}: type or paste a text of at most {explorer.max_tokens:,} tokens, and click a token.",
            ),
            apply_default_css=False,
        )
        with gr.Row():
            with gr.Column(scale=3, min_width=360):
                text = gr.Textbox(label="Text", lines=9, max_lines=16, elem_id="text")
                read = gr.Button("Read", variant="primary", elem_id="read")
            with gr.Column(scale=1, min_width=280):
                sliders = _sliders(explorer)
        summary = _html("summary")
        with gr.Tab("Tokens"):
            tokens, details = _html("tokens", ON_LOAD), _html("details")
        with gr.Tab("RetoMaton's walk"):
            walk, walk_details = _html("walk", ON_LOAD), _html("walk_details")
        with gr.Tab("Continue the text"):
            asked, go_on, both = _continuing(explorer)
        _connect(desk, text, read, sliders, [summary, tokens, details, walk, walk_details])
        _connect_generation(desk, text, sliders, asked, go_on, both)
    page.queue(max_size=WAITING, api_open=False)
    return page


def serve(page: gr.Blocks, host: str, port: int | None) -> str:
    """Open the page, and return its address; raises UserError where that cannot be."""
    theme = gr.themes.Base(
        primary_hue="blue",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            share=False,
            inbrowser=False,
            prevent_thread_lock=True,
            quiet=True,
            footer_links=[],
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            max_file_size=1,
            state_session_capacity=VISITORS,
            theme=theme,
            css=views.style(),
        )
    except OSError as error:
        at = host if port is None else f"{host}:{port}"
        raise UserError(f"Cannot open a page at {at} ({error}): give another --port or --host.") from error
    return address


def _html(name: str, on_load: str | None = None) -> gr.HTML:
    return gr.HTML("", elem_id=name, js_on_load=on_load, apply_default_css=False)


def _sliders(explorer: Explorer) -> Sliders:
    first, kind = explorer.first, explorer.weight_per_token
    needed = max(LEAST_MIN_KNNS, 2 * first.min_knns) if math.isfinite(first.min_knns) else LEAST_MIN_KNNS
    lmbda = 0.25 if first.lmbda is None else first.lmbda
    log_temp = min(max(math.log10(first.knn_temp), COLDEST), HOTTEST)
    tuned = f"per token, as tuned ({kind})"
    return Sliders(
        lmbda=_slider("lmbda", 0, 1, lmbda, 0.01, "the neighbours' weight"),
        own_weight=gr.Checkbox(kind is not None, label=tuned, visible=kind is not None, elem_id="own_weight"),
        log_temp=_slider("log_temp", COLDEST, HOTTEST, log_temp, 0.01, "log10 of the temperature", "knn_temp"),
        k=_slider("k", 1, first.k, first.k, 1, "neighbours of a search"),
        min_knns=_slider(
            "min_knns",
            0,
            needed,
            min(first.min_knns, needed),
            1,
            "search where fewer survive; right end: always",
            visible=explorer.walks,
        ),
    )


def _slider(
    name: str,
    least: float,
    most: float,
    value: float,
    step: float,
    info: str,
    label: str | None = None,
    visible: bool = True,
) -> gr.Slider:
    shown = label or name
    return gr.Slider(least, most, value, step=step, label=shown, info=info, elem_id=name, visible=visible)


def _continuing(explorer: Explorer) -> tuple[list[gr.Slider | gr.Number], gr.Button, gr.HTML]:
    """The controls of generation, in the order in which their values are taken."""
    most = min(MAX_NEW_TOKENS, explorer.lm.max_length - 1)
    with gr.Row():
        new_tokens = _slider("new_tokens", 1, most, min(48, most), 1, "at most", "new tokens")
        temperature = _slider("temperature", 0, 2, 0, 0.05, "0 is greedy", "sampling temperature")
        seed = gr.Number(0, label="seed", info="of both", precision=0, elem_id="seed")
    go_on = gr.Button("Continue", variant="primary", elem_id="go_on")
    return [new_tokens, temperature, seed], go_on, _html("both")


def _connect(desk: Desk, text: gr.Textbox, read: gr.Button, sliders: Sliders, parts: list[gr.HTML]) -> None:
    """Reading, sliding and choosing tokens; each visitor's text is in a state of their own."""
    visit = gr.State(None)
    summary, tokens, details, walk, walk_details = parts
    shown = [summary, tokens, details, walk, walk_details]

    def as_parts(answer: Shown) -> tuple[str, ...]:
        return answer.summary, answer.tokens, answer.details, answer.walk, answer.details

    def read_text(typed: str, *values: float) -> tuple[Visit | None | str, ...]:
        now, answer = desk.read(typed, sliders.settings(*values))  # type: ignore[arg-type]
        return now, *as_parts(answer)

    def slide(now: Visit | None, *values: float) -> tuple[str, ...] | list[dict]:
        if now is None:
            return [gr.skip() for _ in shown]
        return as_parts(desk.change(now, sliders.settings(*values)))  # type: ignore[arg-type]

    def choose(now: Visit | None, event: gr.EventData) -> tuple[str, str]:
        answer = desk.choose(now, int(event.token))
        return answer, answer

    gr.on(
        [read.click, text.submit],
        read_text,
        [text, *sliders.controls],
        [visit, *shown],
        concurrency_id="model",
        concurrency_limit=1,
        api_visibility="private",
    )
    gr.on(
        [control.change for control in sliders.controls],
        slide,
        [visit, *sliders.controls],
        shown,
        trigger_mode="always_last",
        show_progress="hidden",
        concurrency_limit=4,
        api_visibility="private",
    )
    gr.on(
        [tokens.select, walk.select],
        choose,
        [visit],
        [details, walk_details],
        trigger_mode="always_last",
        show_progress="hidden",
        concurrency_limit=4,
        api_visibility="private",
    )


def _connect_generation(
    desk: Desk,
    text: gr.Textbox,
    sliders: Sliders,
    asked: list[gr.Slider | gr.Number],
    go_on: gr.Button,
    both: gr.HTML,
) -> None:
    def generate(prompt: str, new_tokens: float, temperature: float, seed: float | None, *values: float) -> str:
        settings = sliders.settings(*values)  # type: ignore[arg-type]
        return desk.go_on(prompt, settings, round(new_tokens), Sampling(temperature, int(seed or 0)))

    go_on.click(
        generate,
        [text, *asked, *sliders.controls],
        both,
        concurrency_id="model",
        concurrency_limit=1,
        api_visibility="private",
    )
