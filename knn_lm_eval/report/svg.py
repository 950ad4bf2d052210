"""Matplotlib's SVG made fit to stand inside an HTML page: tooltips, the page's fonts, and colours that are variables.

A browser shows an element's ``title`` child as its tooltip. Colours named in a style sheet follow the reader's theme,
light or dark.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Element = ElementTree.Element
Tooltips = dict[str, Sequence[str]]  # an artist's gid -> a text for each of its marks, in the order of the data

METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))  # None leaves one out
NUMBER = re.compile(r"\d+\.\d+")
# Clip paths cut nothing off here: all that is drawn lies within the axes. A style element would be the whole page's.
UNWANTED = ("metadata", "style", "clipPath")


def inline_svg(figure: Figure, title: str, tooltips: Tooltips, variables: Mapping[str, str]) -> str:
    """The figure as an ``svg`` element, which takes its fonts and colours from the page.

    Parameters
    ----------
    title : for readers that cannot see.
    tooltips : as above; a single text is the tooltip of all that its artist draws.
    variables : colour (``#rrggbb``, in lower case) -> the CSS variable that takes its place.

    Raises
    ------
    ValueError
        Where an artist did not draw as many marks as it has tooltips.
    """
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}), warnings.catch_warnings():  # text as text
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the reader's browser has it
        figure.savefig(file, format="svg", transparent=True, metadata=METADATA)
    svg = ElementTree.fromstring(file.getvalue())
    _drop_namespaces(svg)
    _drop_unwanted(svg)
    _add_tooltips(svg, tooltips)
    _drop_unused_ids(svg)
    for element in svg.iter():
        _restyle(element, variables)
        if "d" in element.attrib:  # a path
            element.attrib["d"] = _shortened(element.attrib["d"])
    svg.attrib = {"viewBox": svg.attrib["viewBox"], "role": "img", "aria-label": title}
    return ElementTree.tostring(svg, encoding="unicode")


def _drop_namespaces(svg: Element) -> None:
    """HTML knows SVG's elements by their bare names."""
    for element in svg.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}


def _drop_unwanted(svg: Element) -> None:
    for parent in list(svg.iter()):
        parent.attrib.pop("clip-path", None)
        for child in list(parent):
            child.tail = None
            if child.tag in UNWANTED:
                parent.remove(child)
        if parent.tag != "text":
            parent.text = None
        for child in list(parent):
            if child.tag == "defs" and not len(child):
                parent.remove(child)


def _add_tooltips(svg: Element, tooltips: Tooltips) -> None:
    for group in list(svg.iter("g")):
        texts = tooltips.get(group.get("id", ""), ())
        marks = [group] if len(texts) == 1 else _marks(group) if texts else []
        for mark, text in zip(marks, texts, strict=True):
            tooltip = ElementTree.Element("title")
            tooltip.text = text
            mark.insert(0, tooltip)


def _marks(group: Element) -> list[Element]:
    """What an artist drew for its data: markers where it has some, else its paths."""
    drawn = list(_drawn(group))
    return [element for element in drawn if element.tag == "use"] or drawn


def _drawn(group: Element) -> Iterator[Element]:
    for child in group:
        if child.tag in ("path", "use"):
            yield child
        elif child.tag != "defs":
            yield from _drawn(child)


def _drop_unused_ids(svg: Element) -> None:
    """Keep the ids of what is used several times: those come from the content, so that charts may share a page."""
    used = {element.get("href", "").removeprefix("#") for element in svg.iter("use")}
    for element in svg.iter():
        if element.get("id") not in used:
            element.attrib.pop("id", None)


def _restyle(element: Element, variables: Mapping[str, str]) -> None:
    """Put variables in the place of colours, and leave fonts to the page."""
    if "style" not in element.attrib:
        return
    declarations = (part.split(":", 1) for part in element.attrib["style"].split(";") if ":" in part)
    styles = {name.strip(): value.strip() for name, value in declarations}
    styles.pop("font-family", None)
    kept = [f"{name}:{variables.get(value, value)}" for name, value in styles.items()]
    element.attrib["style"] = ";".join(kept)


def _shortened(path: str) -> str:
    """Hundredths of a pixel are enough."""
    return " ".join(NUMBER.sub(lambda number: f"{float(number[0]):.2f}", path).split())
