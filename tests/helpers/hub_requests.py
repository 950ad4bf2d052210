"""A request to the hub of ``helpers.hub_server``: who asks for what, what goes wrong, and how answers are sent."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from time import monotonic, sleep
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from helpers.hub_contents import Asked, Blob, Fault, Hub

BLOCK = 2**16
NO_FAULT = Fault("", None, {}, None, False, 0, 0)


class Refusal(Exception):
    """An answer that says no."""

    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        self.status, self.message = status, message
        self.headers = {"X-Error-Code": code, "X-Error-Message": message} | (headers or {})


class Dropped(Exception):
    """The connection is closed, whatever was to come."""


class Request(BaseHTTPRequestHandler):
    """One request; ``route`` answers it."""

    def do_any(self) -> None:
        self.hub: Hub = self.server.hub
        parts = urlsplit(self.path)
        self.asked, self.query = unquote(parts.path), parse_qs(parts.query)
        token = (self.headers["Authorization"] or "").removeprefix("Bearer ") or None
        self.user = self.hub.tokens.get(token or "")
        self.may_write = self.user is not None and token not in self.hub.read_only
        request = Asked(self.server.at, self.command, self.path, self.headers["Range"], token, monotonic())
        self.hub.requests.append(request)
        self.fault = self.hub.fault_of(request) or NO_FAULT
        try:
            sleep(self.fault.delay)
            if self.fault.status is not None:
                self.body()
                raise Refusal(self.fault.status, "", "as the test wants it", self.fault.headers)
            if token is not None and self.user is None:
                raise Refusal(401, "", "Invalid credentials in Authorization header")
            if self.server.at == "cdn" and token is not None:
                raise Refusal(400, "", "Only one auth mechanism allowed")
            self.route()
        except Refusal as refusal:
            self.answer({"error": refusal.message}, refusal.status, refusal.headers)
        except (Dropped, ConnectionError):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_any

    def log_message(self, *arguments: object) -> None:
        """Keep quiet."""

    def route(self) -> None:
        raise NotImplementedError

    # -------------------------------------------------------------------------------------------- what requests say

    def body(self) -> bytes:
        """The request's body, whole."""
        return b"".join(self.blocks())

    def blocks(self) -> Iterator[bytes]:
        """The request's body in blocks; of an upload that is to be dropped, its beginning."""
        left = self.fault.drop_after
        for block in self.chunks():
            if left is not None and len(block) >= left:
                raise Dropped
            left = None if left is None else left - len(block)
            yield block

    def chunks(self) -> Iterator[bytes]:
        """The body as it comes, also where its length was not said."""
        if "chunked" in (self.headers["Transfer-Encoding"] or ""):
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers["Content-Length"] or 0)
        while left:
            block = self.rfile.read(min(left, BLOCK))
            if not block:
                raise Dropped
            left -= len(block)
            yield block

    def fields(self) -> dict[str, Any]:
        """The request's body, JSON or a form's."""
        body = self.body()
        if "json" in (self.headers["Content-Type"] or ""):
            return json.loads(body or b"{}")
        return parse_qs(body.decode())

    # -------------------------------------------------------------------------------------------- answers

    def answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """Answer with JSON, or with plain text."""
        is_text = isinstance(content, str)
        body = content.encode() if is_text else json.dumps(content).encode()
        self.send_response(status)
        kind = "text/plain" if is_text else "application/json"
        named = {"Content-Type": kind, "Content-Length": str(len(body))} | (headers or {})
        for name, value in named.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_blob(self, blob: Blob, headers: dict[str, str]) -> None:
        """Answer with a file, or the range of it that is asked for."""
        start, stop = 0, blob.size
        etag = f'"{blob.etag}"'
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        if asked and self.headers["If-Range"] in (None, etag):
            start, stop = int(asked[1]), min(int(asked[2] or blob.size) + 1, blob.size)
            if start >= blob.size:
                raise Refusal(416, "", "no such range")
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{blob.size}")
        else:
            self.send_response(200)
        named = {"Content-Length": str(stop - start), "ETag": etag, "Accept-Ranges": "bytes"}
        for name, value in (named | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault.drop_after is not None and stop - start > self.fault.drop_after:
            stop = start + self.fault.drop_after
        with open(blob.path, "rb") as file:
            file.seek(start)
            if self.fault.alter and stop > start:
                self.wfile.write(bytes([file.read(1)[0] ^ 1]))
            while block := file.read(min(BLOCK, stop - file.tell())):
                self.wfile.write(block)
