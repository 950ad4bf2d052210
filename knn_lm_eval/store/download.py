"""Downloading one file: by HTTP range requests, into a part file that a later run goes on with.

A file on the Hugging Face hub is read in the same way, since the hub's own library begins a file anew when it was
interrupted. A file gets its name when it is complete and its checksum is right.

This is no computation with settings, as in ``knn_lm_eval.system.checkpoints``: how far it is is the part file's length,
and whether it may be gone on with is for the server to say (``If-Range``) or for the checksum at the end.
"""

from __future__ import annotations

import http.client
import logging
import re
import ssl
import string
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import SplitResult, quote, unquote, urlsplit, urlunsplit

from tqdm import tqdm

from knn_lm_eval.errors import UserError, printable, shortened
from knn_lm_eval.store.refusals import hub_refusal, one_line, said, told_to_wait
from knn_lm_eval.system.file_contents import examine
from knn_lm_eval.system.files import check_free_space, replace_file
from knn_lm_eval.version import __version__

logger = logging.getLogger(__name__)

HUB_ADDRESS = re.compile(r"hf://datasets/(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?(?P<path>/.*)?")
ATTEMPTS = 6  # in a row without a byte; the waits between them double
FIRST_WAIT = 1.0  # seconds
LONGEST_WAIT = 900.0  # seconds; the hub counts requests over five minutes
TIMEOUT = 60.0  # seconds without an answer
RANGE = 2**32  # bytes per request: content delivery networks refuse to send more than some tens of GiB at once
BLOCK = 2**20
PASSING_ERRORS = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)
PASSING_CODES = (408, 425, 429, 500, 502, 503, 504)
VERSION = re.compile(r"[\x20-\x7e]{1,200}")
# Places in a file have no more digits.
COMMIT = re.compile(r"[0-9a-f]{40}")
CONTENT_RANGE, LENGTH = re.compile(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18})"), re.compile(r"\d{1,18}")


class Remote(NamedTuple):
    """A file's URL and what to send with the request.

    Attributes
    ----------
    page : where the hub shows the data set that the file is in; None elsewhere.
    """

    url: str
    headers: dict[str, str]
    page: str | None = None


def locate(address: str, name: str | None = None) -> Remote:
    """The URL of ``address``, or of the file ``name`` in the folder that it is."""
    if not address.startswith("hf://"):
        parts = _split(address)
        path = parts.path if name is None else f"{parts.path.rstrip('/')}/{name}"
        path = quote(path, safe=string.punctuation)  # what is quoted already stays so
        return Remote(urlunsplit(parts._replace(path=path)), {})
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    if not (hub := HUB_ADDRESS.fullmatch(address)):
        raise UserError(f"{address} is no address on the hub; it should be hf://datasets/user/name or a folder below.")
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"Cannot fetch {address}: HF_HUB_OFFLINE is set; unset it, or give a folder.")
    path = "/".join(filter(None, [(hub["path"] or "").strip("/"), name]))
    revision = hub["revision"] and unquote(hub["revision"])
    url = hf_hub_url(hub["repo"], path, repo_type="dataset", revision=revision)
    token = {key: value for key, value in build_hf_headers().items() if key.lower() == "authorization"}
    return Remote(url, token, f"{constants.ENDPOINT}/datasets/{hub['repo']}")


def pinned(address: str, commit: str | None) -> str:
    """The address of what the hub had at ``commit``, whatever is pushed meanwhile; as it is elsewhere, or for None."""
    hub = HUB_ADDRESS.fullmatch(address)
    return f"hf://datasets/{hub['repo']}@{commit}{hub['path'] or ''}" if hub and commit else address


def check_address(address: str) -> None:
    """Raise UserError where ``address`` is none."""
    if not address.startswith("hf://"):
        _split(address)


def _split(address: str) -> SplitResult:
    """The parts of an http or https address; raises UserError where it is none."""
    try:
        parts = urlsplit(address)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        parts.netloc.encode("ascii")
    except ValueError:  # a bracket without its end, a port that is no number, a host in other letters
        valid = False
    if not valid or re.search(r"[\x00-\x20\x7f]", parts.netloc):
        raise UserError(f"{shortened(address, 200)} is no address; it should be https://host/path or hf://datasets/...")
    return parts


def hub_checksum(address: str, remote: Remote) -> str | None:
    """The SHA-256 of a large file on the hub; None elsewhere."""
    if not address.startswith("hf://"):
        return None
    from huggingface_hub import get_hf_file_metadata

    try:
        etag = get_hf_file_metadata(remote.url).etag or ""
    except Exception as error:  # network errors are those of another library in each of the hub's releases
        if getattr(getattr(error, "response", None), "status_code", None) == 404:
            raise FileNotFoundError(remote.url) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"Cannot fetch {address}: {reason}") from error
    return etag if re.fullmatch(r"[0-9a-f]{64}", etag) else None


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but none from https to what is not encrypted, and shows the hub's token to no other host."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        before, after = urlsplit(req.full_url), _split(newurl)
        if before.scheme == "https" and after.scheme != "https":
            raise UserError(
                f"{before.scheme}://{before.netloc} sends to {printable(newurl):.200}, which is not encrypted; not "
                f"fetched: ask whoever published it, or give that address yourself."
            )
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and after[:2] != before[:2]:  # scheme and host
            request.remove_header("Authorization")
        return request


def download(
    remote: Remote, target: Path, size: int | None = None, checksum: str | None = None, most: int | None = None
) -> str | None:
    """Download a file, going on where an earlier attempt stopped; it appears when it is complete and right.

    A server that says when to come back (``Retry-After``, or the hub's ``RateLimit``) is not asked before.

    Parameters
    ----------
    size, checksum : what it should have; None takes the server's word for the size and checks no checksum.
    most : bytes that it may have, where its size is not known; None is any number.

    Returns
    -------
    The commit that the hub took it from; None where the server says none.

    Raises
    ------
    FileNotFoundError
        Where the server has no such file.
    UserError
        Where the server refuses it or keeps failing, or the file is not what it should be.
    """
    transfer = _Transfer(remote, target, size, checksum, most)
    failures, furthest = 0, transfer.offset
    with transfer.bar:
        while not transfer.is_complete():
            reason = transfer.go_on()
            failures = 0 if transfer.offset > furthest else failures + 1
            furthest = max(furthest, transfer.offset)
            if failures >= ATTEMPTS:
                raise UserError(
                    f"Cannot fetch {remote.url}: {reason}, {ATTEMPTS} times in a row; what came is kept, the same "
                    f"command goes on from there."
                )
            if failures:
                wait = max(transfer.told_to_wait, FIRST_WAIT * 2 ** (failures - 1))
                if wait > LONGEST_WAIT:
                    raise UserError(
                        f"Cannot fetch {remote.url}: {reason}, and not to come back for {wait / 60:,.0f} minutes; what "
                        f"came is kept, the same command goes on from there."
                    )
                logger.warning("Fetching %s: %s; trying again in %.0f s.", remote.url, reason, wait)
                time.sleep(wait)
    transfer.finish()
    return transfer.commit


def forget_part(target: Path) -> None:
    """Remove what an interrupted download of ``target`` left."""
    for end in (".part", ".part.version"):
        target.with_name(target.name + end).unlink(missing_ok=True)


class _Transfer:
    """A download under way: the part file, and how far it is.

    Beside the part lies the version (ETag or date) that the server gave it: where there is no checksum, a part is
    gone on with only while the server still has that version.
    """

    def __init__(
        self, remote: Remote, target: Path, size: int | None, checksum: str | None, most: int | None = None
    ) -> None:
        self.remote, self.target, self.size, self.checksum, self.most = remote, target, size, checksum, most
        self.part = target.with_name(target.name + ".part")
        self.version_file = target.with_name(target.name + ".part.version")
        self.version = self.version_file.read_text(errors="replace") if self.version_file.is_file() else None
        known = self.part.is_file() and (checksum is not None or self.version is not None)
        self.offset = self.part.stat().st_size if known else 0
        if size is not None and self.offset > size:
            self.offset = 0
        self.told_to_wait = 0.0  # seconds, by the last answer
        self.commit: str | None = None
        self.bar = tqdm(
            total=size, initial=self.offset, desc=f"Fetching {target.name}", unit="B", unit_scale=True, delay=1.0
        )

    def is_complete(self) -> bool:
        return self.size is not None and self.offset == self.size

    def go_on(self) -> str:
        """Ask for the next range and store what comes of it; the reason why nothing more came."""
        headers = {"Range": f"bytes={self.offset}-{self.offset + RANGE - 1}", "Accept-Encoding": "identity"}
        headers |= {"User-Agent": f"knn_lm_eval/{__version__}"} | self.remote.headers
        if self.checksum is None and self.version and self.offset:
            headers["If-Range"] = self.version
        request = urllib.request.Request(self.remote.url, headers=headers)
        opener = urllib.request.build_opener(_Redirects)
        self.told_to_wait = 0.0
        try:
            with opener.open(request, timeout=TIMEOUT) as response:
                self._store(response)
            return "the connection ended early"
        except urllib.error.HTTPError as error:
            if self.remote.page is not None and (
                refused := hub_refusal(error, self.remote.page, bool(self.remote.headers))
            ):
                raise UserError(f"Cannot fetch {self.remote.url}: {refused}.") from error
            if error.code in (404, 410):
                raise FileNotFoundError(self.remote.url) from error
            self.told_to_wait = told_to_wait(error)
            if error.code == 416:  # the part is not a beginning of what is there now
                self._restart()
            elif error.code not in PASSING_CODES:
                raise UserError(f"Cannot fetch {self.remote.url}: {said(error)}.") from error
            return said(error)
        except PASSING_ERRORS as error:
            return one_line(str(getattr(error, "reason", None) or error or type(error).__name__))
        except ValueError as error:  # Python's library believes the lengths of headers and chunks
            if isinstance(error, UserError):
                raise
            return f"the answer is no HTTP ({one_line(str(error))})"

    def _store(self, response: Any) -> None:
        content_range = CONTENT_RANGE.fullmatch(response.headers.get("Content-Range") or "")
        if response.status == 206:
            if not content_range or int(content_range[1]) != self.offset:
                raise http.client.HTTPException("the server sent another range than it was asked for")
            total: int | None = int(content_range[2])
        else:  # the server sends it all, from the beginning
            self._restart()
            length = response.headers.get("Content-Length")
            if length is not None and not LENGTH.fullmatch(length):
                raise http.client.HTTPException("the server says no valid Content-Length")
            total = None if length is None else int(length)
        self._check_size(total)
        if self.size is None and total is not None:
            self.size = self.bar.total = total
            check_free_space(self.target.parent, total - self.offset, self.target.name)
        if COMMIT.fullmatch(commit := response.headers.get("X-Repo-Commit") or ""):
            self.commit = commit
        etag = response.headers.get("ETag") or ""
        version = etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified")
        if version and version != self.version and VERSION.fullmatch(version):
            self.version = version
            self.version_file.write_text(version)
        with open(self.part, "r+b" if self.offset else "wb") as file:
            file.seek(self.offset)
            file.truncate()
            block = memoryview(bytearray(BLOCK))
            while count := _read(response, block):
                if self.offset + count > self._end():
                    self._check_size(self._end() + 1)
                file.write(block[:count])
                self.offset += count
                self.bar.update(count)
        if total is None and self.size is None:  # no length was promised: the end is the end
            self.size = self.offset

    def _end(self) -> float:
        """The bytes beyond which nothing is written, whatever the server sends."""
        return next((float(size) for size in (self.size, self.most) if size is not None), float("inf"))

    def _check_size(self, total: int | float | None) -> None:
        """Raise UserError where the server has another number of bytes than there should be, or more than may be."""
        if total is None or total == self.size:
            return
        if self.size is not None:
            more = "more than that" if total == self.size + 1 else f"{total:,}"
            raise UserError(
                f"{self.remote.url} should have {self.size:,} bytes, and has {more} there: it was cut or altered."
            )
        if self.most is not None and total > self.most:
            raise UserError(
                f"{self.remote.url} has more than {self.most:,} bytes, which no such file has; not fetched."
            )

    def _restart(self) -> None:
        self.bar.update(-self.offset)
        self.offset = 0

    def finish(self) -> None:
        """Check the part and give it its name."""
        if self.checksum is not None and examine(self.part).sha256 != self.checksum:
            forget_part(self.target)
            raise UserError(
                f"{self.remote.url} is not what its checksum says: it was altered there or on the way. It was deleted "
                f"here; fetch it again, or ask whoever published it."
            )
        replace_file(self.part, self.target)
        self.version_file.unlink(missing_ok=True)


def _read(response: Any, block: memoryview) -> int:
    """Read into ``block``; what the network refuses is not what the disk does."""
    try:
        return response.readinto(block)  # read() would read on for ever after a negative chunk
    except OSError as error:
        raise ConnectionError(error.strerror or str(error) or type(error).__name__) from error
