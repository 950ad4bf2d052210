"""Why a server refuses a file, in words, and when it wants to be asked again."""

from __future__ import annotations

import email.utils
import re
import time
import urllib.error
from urllib.parse import urlsplit

from knn_lm_eval.errors import printable

LOGIN = "log in (`hf auth login`, or HF_TOKEN)"
LONGEST_REASON = 200  # characters of what a server says
SECONDS, RATE_LIMIT = re.compile(r"\d{1,9}"), re.compile(r";\s*t=(\d{1,9})")


def told_to_wait(error: urllib.error.HTTPError) -> float:
    """The seconds after which the server wants to be asked again (``Retry-After``, the hub's ``RateLimit``), or 0."""
    value = (error.headers.get("Retry-After") or "").strip()
    if SECONDS.fullmatch(value):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):  # no date
        limit = RATE_LIMIT.search(error.headers.get("RateLimit") or "") if error.code == 429 else None
        return float(limit[1]) if limit else 0.0


def hub_refusal(error: urllib.error.HTTPError, page: str, has_token: bool) -> str | None:
    """Why the hub refuses a file of the data set at ``page``, and what to do; None for reasons that any server has."""
    code, name = error.headers.get("X-Error-Code"), urlsplit(page).path.partition("/datasets/")[2]
    if code == "GatedRepo":
        access = "is gated, and your login has no access" if has_token else f"is gated: {LOGIN}"
        return f"{name} {access}; ask for access at {page}"
    if code == "RevisionNotFound":
        return f"{name} has no such revision; {page} shows which there are"
    if code == "RepoNotFound":
        hidden = "or your login may not see it" if has_token else f"or it is private: {LOGIN}"
        return f"there is no data set {name} on the hub, {hidden}"
    if error.code == 401:
        return f"the hub does not take your token; {LOGIN} anew, or go without"
    if error.code == 403:
        return f"{said(error)}; ask for access at {page}, and {LOGIN}"
    return None


def said(error: urllib.error.HTTPError) -> str:
    """What the server answered."""
    return f"the server says {error.code} {one_line(str(error.reason))}"


def one_line(text: str) -> str:
    """What a server says, for a sentence."""
    return printable(" ".join(text.split()))[:LONGEST_REASON]
