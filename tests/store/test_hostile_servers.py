"""Servers that send what they should not: one sentence, nothing beyond the known size, nothing for the terminal."""

from __future__ import annotations

import json
import socket
import threading
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from knn_lm_eval.errors import UserError, printable
from knn_lm_eval.store import download
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.fetching import fetch_datastore, fetch_files

OK = b"HTTP/1.1 200 OK\r\n"
PARTIAL = b"HTTP/1.1 206 Partial Content\r\n"
NINES = b"9" * 40


class Server:
    """Sends the same bytes to whoever connects, and then, where it is ``endless``, the last of them for ever."""

    def __init__(self, answer: bytes, endless: bool = False) -> None:
        self.answer, self.endless, self.sent = answer, endless, 0
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self.socket.accept()
                with suppress(OSError), connection:
                    connection.recv(2**16)
                    connection.sendall(self.answer)
                    while self.endless and self.sent < 2**30:
                        self.sent += connection.send(self.answer[-1:] * 2**16)


@pytest.fixture
def serve() -> Iterator:
    """Make a server."""
    servers: list[Server] = []

    def start(answer: bytes, endless: bool = False) -> Server:
        servers.append(Server(answer, endless))
        return servers[-1]

    yield start
    for server in servers:
        server.socket.close()


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KNN_LM_EVAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(download, "TIMEOUT", 5.0)


def redirect(to: bytes) -> bytes:
    return b"HTTP/1.1 302 Found\r\nLocation: " + to + b"\r\nContent-Length: 0\r\n\r\n"


ANSWERS = {
    "no HTTP": b"\x00\x01\x02\x03",
    "nothing": b"",
    "a status that is none": b"HTTP/1.1 abc OK\r\n\r\n",
    "a status of many digits": b"HTTP/1.1 " + NINES + b" OK\r\n\r\n",
    "a reason that paints": b"HTTP/1.1 403 \x1b[2J\x1b]0;x\x07\r\nContent-Length: 0\r\n\r\n",
    "a long reason": b"HTTP/1.1 403 " + b"x" * 30_000 + b"\r\nContent-Length: 0\r\n\r\n",
    "a length that is none": OK + b"Content-Length: abc\r\n\r\n{}",
    "a length with a sign": OK + b"Content-Length: +2\r\n\r\n{}",
    "a negative length": OK + b"Content-Length: -5\r\n\r\n{}",
    "a length of many digits": OK + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n{}",
    "a huge length": OK + b"Content-Length: 999999999999999999\r\n\r\n{}",
    "a huge range": PARTIAL + b"Content-Range: bytes 0-1/" + NINES + b"\r\nContent-Length: 2\r\n\r\n{}",
    "a range of many digits": PARTIAL + b"Content-Range: bytes 0-1/" + b"9" * 5000 + b"\r\nContent-Length: 2\r\n\r\n{}",
    "a large range": PARTIAL + b"Content-Range: bytes 0-1/999999999999999999\r\nContent-Length: 2\r\n\r\n{}",
    "another range": PARTIAL + b"Content-Range: bytes 5-6/7\r\nContent-Length: 2\r\n\r\n{}",
    "no range": PARTIAL + b"Content-Length: 2\r\n\r\n{}",
    "a negative chunk": OK + b"Transfer-Encoding: chunked\r\n\r\n-5\r\n{}",
    "a chunk that is none": OK + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n{}",
    "a chunk of many digits": OK + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 5000 + b"\r\n{}",
    "an odd version": OK + b'ETag: "\xff\x01"\r\nContent-Length: 9\r\n\r\n{}',
    "a long header": OK + b"X: " + b"x" * 2**17 + b"\r\n\r\n{}",
    "many headers": OK + b"X: x\r\n" * 5000 + b"\r\n{}",
    "a redirect to an open bracket": redirect(b"http://[::1/x"),
    "a redirect to a port that is none": redirect(b"http://127.0.0.1:abc/x"),
    "a redirect to a port of many digits": redirect(b"http://127.0.0.1:" + NINES + b"/x"),
    "a redirect to a file": redirect(b"file:///etc/passwd"),
    "a redirect to ftp": redirect(b"ftp://127.0.0.1/x"),
    "a redirect to itself": redirect(b"/manifest.json"),
    "a redirect to what paints": redirect(b"http://\x1b[2J/x"),
    "a redirect to nothing": redirect(b""),
    "a deep manifest": OK + b"Content-Length: 100000\r\n\r\n" + b"[" * 100_000,
    "a manifest of numbers": OK + b"Content-Length: 6\r\n\r\n[1, 2]",
    "a manifest that paints": OK + b'Content-Length: 42\r\n\r\n{"format": "\\u001b[2J", "count": "x"}      ',
}


@pytest.mark.parametrize("what", ANSWERS)
def test_whatever_a_server_answers_gives_one_sentence(serve, what: str, tmp_path: Path) -> None:
    server = serve(ANSWERS[what])
    with pytest.raises(UserError) as caught:
        fetch_datastore(server.url, tmp_path / "store")
    said = str(caught.value)
    assert "\n" not in said and said == printable(said) and len(said) < 700


ENDLESS = {
    "no length": OK + b"\r\n ",
    "a negative chunk": OK + b"Transfer-Encoding: chunked\r\n\r\n-5\r\n ",
    "one huge chunk": OK + b"Transfer-Encoding: chunked\r\n\r\nffffffffffff\r\n ",
    "a huge length": OK + b"Content-Length: 1073741824\r\n\r\n ",
    "a range": PARTIAL + b"Content-Range: bytes 0-1073741823/1073741824\r\n\r\n ",
}


@pytest.mark.parametrize("what", ENDLESS)
def test_an_endless_manifest_is_not_fetched(serve, what: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("knn_lm_eval.store.fetching.MOST_JSON_BYTES", 2**22)
    server = serve(ENDLESS[what], endless=True)
    tracemalloc.start()
    with pytest.raises(UserError, match="has more than 4,194,304 bytes, which no such file|when reading chunk size"):
        fetch_datastore(server.url, tmp_path / "store")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 2**23
    assert sum(path.stat().st_size for path in (tmp_path / "store").iterdir()) <= 2**22 + 2**10


@pytest.mark.parametrize("what", ["no length", "a negative chunk", "one huge chunk"])
def test_nothing_is_written_beyond_the_known_size(serve, what: str, tmp_path: Path) -> None:
    remote = download.Remote(serve(ENDLESS[what], endless=True).url, {})
    with pytest.raises(UserError, match="should have 1,000 bytes, and has more than that|when reading chunk size"):
        download.download(remote, tmp_path / "a.npy", size=1000, checksum="0" * 64)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 1000


@pytest.mark.parametrize("target", ["http://example.org/x", "ftp://example.org/x"])
def test_https_is_not_redirected_to_what_is_not_encrypted(target: str) -> None:
    request = download.urllib.request.Request("https://example.org/manifest.json")
    with pytest.raises(UserError, match="not encrypted|is no address"):
        download._Redirects().redirect_request(request, None, 302, "", {}, target)


@pytest.mark.parametrize(
    "address",
    ["http://[::1/store", "http://", "https:///x", "http://host:port/x", "http://host:99999/x", "http://a b/x"],
)
def test_addresses_that_are_none_are_named(address: str, tmp_path: Path) -> None:
    for fetch in (lambda: fetch_datastore(address, tmp_path / "a"), lambda: fetch_files([address], tmp_path / "b")):
        with pytest.raises(UserError):
            fetch()


def test_a_manifest_with_a_file_of_absurd_size_is_refused(serve, store: Datastore, tmp_path: Path) -> None:
    content = json.loads((store.path / "manifest.json").read_text())
    content.pop("sha256", None)
    content["files"]["values.npy"]["bytes"] = 2**52
    body = json.dumps(content).encode()
    server = serve(OK + b"Content-Length: " + str(len(body)).encode() + b"\r\n\r\n" + body)
    with pytest.raises(UserError, match="Not enough disk space"):
        fetch_datastore(server.url, tmp_path / "store")
