"""Fetching against a local HTTP server that knows ranges, drops connections, and sends what it should not."""

from __future__ import annotations

import json
import re
import shutil
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from helpers.stores import change_json, flip_bit, let_age

from knn_lm_eval import KNNHF, Datastore, UserError
from knn_lm_eval.make.clustering import cluster_kmeans
from knn_lm_eval.search.faiss_index import open_index
from knn_lm_eval.store import download
from knn_lm_eval.store.clusters import Clusters
from knn_lm_eval.store.fetching import cache_folder, fetch_datastore, fetch_files, open_datastore
from knn_lm_eval.store.manifest import file_record


@dataclass
class Server:
    """A folder behind HTTP, and how it misbehaves.

    Attributes
    ----------
    drop_after : cut the connection after so many bytes of a body; None sends all.
    drops : how many more connections to cut.
    ranges : whether range requests are understood.
    status : answer everything but the manifest with this instead.
    alter : file names whose first byte is sent wrongly.
    cut : file names of which half is there.
    redirect_to : send requests for files on to this address.
    requests : (path, range, authorization) of each request so far.
    """

    root: Path
    url: str = ""
    drop_after: int | None = None
    drops: int = 10**9
    ranges: bool = True
    status: int = 0
    alter: tuple[str, ...] = ()
    cut: tuple[str, ...] = ()
    redirect_to: str = ""
    requests: list[tuple[str, str | None, str | None]] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    """Answers for ``server.how``."""

    def do_GET(self) -> None:
        how: Server = self.server.how
        how.requests.append((self.path, self.headers["Range"], self.headers["Authorization"]))
        name = unquote(urlsplit(self.path).path).lstrip("/")
        path = how.root / name
        if how.status and path.name != "manifest.json":
            return self.send_error(how.status)
        if how.redirect_to and path.name != "manifest.json":
            self.send_response(302)
            self.send_header("Location", how.redirect_to + "/" + str(path.relative_to(how.root)))
            return self.end_headers()
        if not path.is_file():
            return self.send_error(404)
        content = path.read_bytes()
        if path.name in how.alter:
            content = bytes([content[0] ^ 1]) + content[1:]
        if path.name in how.cut:
            content = content[: len(content) // 2]
        etag = f'"{sha256(content).hexdigest()}"'
        start, stop = 0, len(content)
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"] or "")
        if how.ranges and asked and self.headers["If-Range"] in (None, etag):
            start, stop = int(asked[1]), min(int(asked[2]) + 1, len(content))
            if start >= len(content):
                return self.send_error(416)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        else:
            self.send_response(200)
        for header, value in (("Content-Length", str(stop - start)), ("ETag", etag), ("X-Repo-Commit", "0" * 40)):
            self.send_header(header, value)
        self.end_headers()
        if self.command == "HEAD":
            return None
        if how.drop_after is not None and stop - start > how.drop_after and how.drops > 0:
            how.drops -= 1
            stop = start + how.drop_after
            self.close_connection = True
        self.wfile.write(content[start:stop])

    do_HEAD = do_GET

    def log_message(self, *arguments: object) -> None:
        """Keep quiet."""


@pytest.fixture
def serve() -> Iterator:
    """Make a server of a folder."""
    servers = []

    def start(root: Path, **how: object) -> Server:
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        server.how = Server(root, f"http://127.0.0.1:{server.server_port}", **how)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return server.how

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KNN_LM_EVAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "FIRST_WAIT", 0.001)
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, store: Datastore) -> Datastore:
    """The tiny store with clusters, as a web server would hold it."""
    folder = tmp_path_factory.mktemp("published") / "store"
    shutil.copytree(store.path, folder)
    store = Datastore.open(folder)
    cluster_kmeans(store, name="km", num_clusters=40, sample=400, overwrite=True)
    return store


def assert_same(folder: Path, published: Datastore) -> None:
    manifest = json.loads((published.path / "manifest.json").read_text())
    for name in ("manifest.json", *manifest["files"], *manifest["derived"]):
        assert (folder / name).read_bytes() == (published.path / name).read_bytes(), name
    assert not list(folder.rglob("*.part*")) and not list(folder.rglob("*.new"))


def test_a_fetched_store_has_indexes_and_clusters_and_is_fetched_once(serve, published: Datastore, caplog) -> None:
    server = serve(published.path.parent)
    store = open_datastore(f"{server.url}/store")
    assert_same(store.path, published)
    assert open_index(store)[0].ntotal == len(store) and len(Clusters.open(store, "km")) == 40
    asked = len(server.requests)
    server.status = 500  # nobody asks any more
    assert open_datastore(f"{server.url}/store").path == store.path
    assert len(server.requests) == asked


def test_knn_hf_takes_an_address(serve, published: Datastore, model_folder: Path, monkeypatch) -> None:
    server = serve(published.path.parent)
    lm = KNNHF(str(model_folder), datastore=f"{server.url}/store/", k=5, retomaton=True, clusters="km")
    assert lm.retriever.datastore.path == cache_folder(f"{server.url}/store/")
    monkeypatch.setenv("KNN_LM_EVAL_DATASTORE", f"{server.url}/store/")
    assert KNNHF(k=5).pretrained == str(model_folder)


def test_a_token_in_the_address_stays_in_each_request(serve, published: Datastore) -> None:
    server = serve(published.path.parent)
    fetch_datastore(f"{server.url}/store?token=a%20b")
    assert all(path.endswith("?token=a%20b") for path, _, _ in server.requests)


def test_a_token_in_the_address_is_not_kept_in_the_folder(serve, published: Datastore, tmp_path: Path) -> None:
    server, folder = serve(published.path), tmp_path / "store"
    address = f"{server.url}?token=secret"
    fetch_datastore(address, folder)
    assert "secret" not in (folder / "fetched.json").read_text()
    fetch_datastore(address, folder)
    with pytest.raises(UserError, match="holds what was fetched from"):
        fetch_datastore(f"{server.url}?token=other", folder)
    # A folder of an earlier version is known, and forgets the token, too.
    (folder / "fetched.json").write_text(json.dumps({"addresses": [address]}))
    fetch_datastore(address, folder)
    assert "secret" not in (folder / "fetched.json").read_text()
    fetch_datastore(address, folder)


@pytest.mark.parametrize("ranges", [True, False])
def test_dropped_connections_are_gone_on_with(serve, published: Datastore, ranges: bool) -> None:
    keys_bytes = (published.path / "keys.npy").stat().st_size
    server = serve(published.path.parent, drop_after=keys_bytes // 5 + 1, drops=10**9 if ranges else 4, ranges=ranges)
    assert_same(fetch_datastore(f"{server.url}/store"), published)
    starts = [range_ for path, range_, _ in server.requests if path.endswith("keys.npy")]
    assert len(starts) == 5
    if ranges:  # nothing was asked for twice
        assert [int(re.findall(r"\d+", start)[0]) for start in starts] == [i * (keys_bytes // 5 + 1) for i in range(5)]


def test_large_files_come_in_ranges(serve, published: Datastore, monkeypatch) -> None:
    monkeypatch.setattr(download, "RANGE", 50_000)
    server = serve(published.path.parent)
    assert_same(fetch_datastore(f"{server.url}/store"), published)
    assert sum(path.endswith("keys.npy") for path, _, _ in server.requests) > 2


def test_a_later_run_goes_on_with_what_came(serve, published: Datastore, tmp_path: Path) -> None:
    server = serve(published.path.parent, drop_after=100_000, drops=1)
    opened = download._Transfer.go_on

    def killed(self: object) -> str:
        reason = opened(self)
        if server.drops == 0:
            raise KeyboardInterrupt
        return reason

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(download._Transfer, "go_on", killed)
        fetch_datastore(f"{server.url}/store")
    folder = cache_folder(f"{server.url}/store")
    assert (folder / "keys.npy.part").stat().st_size == 100_000
    with pytest.raises(UserError, match="is not a datastore"):
        Datastore.open(folder)
    del server.requests[:]
    assert_same(fetch_datastore(f"{server.url}/store"), published)
    ranges = [range_ for path, range_, _ in server.requests if path.endswith("keys.npy")]
    assert len(ranges) == 1 and ranges[0].startswith("bytes=100000-")


def test_a_server_that_sends_nothing_is_given_up_on(serve, published: Datastore) -> None:
    server = serve(published.path.parent, drop_after=0)
    with pytest.raises(UserError, match="the connection ended early, 6 times in a row; what came is kept"):
        fetch_datastore(f"{server.url}/store")
    server.drop_after, server.status = None, 503
    del server.requests[:]
    with pytest.raises(UserError, match="the server says 503 .*, 6 times in a row"):
        fetch_datastore(f"{server.url}/store")
    assert len(server.requests) == 1 + 6
    server.status = 403
    with pytest.raises(UserError, match="the server says 403"):
        fetch_datastore(f"{server.url}/store")
    server.status = 0
    assert_same(fetch_datastore(f"{server.url}/store"), published)
    with pytest.raises(UserError, match=r"Cannot fetch http://127.0.0.1:1/store/manifest.json: .*refused"):
        fetch_datastore("http://127.0.0.1:1/store")


def test_a_file_that_was_cut_or_altered_is_refused(serve, published: Datastore) -> None:
    server = serve(published.path.parent, alter=("index.faiss",))
    with pytest.raises(UserError, match="index.faiss is not what its checksum says: it was altered"):
        fetch_datastore(f"{server.url}/store")
    folder = cache_folder(f"{server.url}/store")
    assert not (folder / "index.faiss").exists() and not (folder / "index.faiss.part").exists()
    server.alter, server.cut = (), ("index.faiss",)
    with pytest.raises(UserError, match="should have .* bytes, and has .* there: it was cut or altered"):
        fetch_datastore(f"{server.url}/store")
    server.cut = ()
    del server.requests[:]
    assert_same(fetch_datastore(f"{server.url}/store"), published)
    assert not any(path.endswith("keys.npy") for path, _, _ in server.requests)  # what was right stayed


def test_a_finished_file_that_changed_meanwhile_is_fetched_anew(serve, published: Datastore) -> None:
    server = serve(published.path.parent, alter=("index.faiss",))
    with pytest.raises(UserError, match="index.faiss is not what"):
        fetch_datastore(f"{server.url}/store")
    values = cache_folder(f"{server.url}/store") / "values.npy"
    values.write_bytes(bytes(len(values.read_bytes())))
    server.alter = ()
    assert_same(fetch_datastore(f"{server.url}/store"), published)


def test_addresses_without_a_datastore_are_refused(serve, published: Datastore, tmp_path: Path) -> None:
    shutil.copytree(published.path, tmp_path / "remote" / "store")
    server = serve(tmp_path / "remote")
    with pytest.raises(UserError, match="There is no datastore at .*/nothing: it has no manifest.json"):
        fetch_datastore(f"{server.url}/nothing")
    (tmp_path / "remote" / "store" / "values.npy").unlink()
    with pytest.raises(UserError, match="incomplete: values.npy is missing there"):
        fetch_datastore(f"{server.url}/store")
    (tmp_path / "remote" / "store" / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"manifest.json at .*/store is not that of a"):
        fetch_datastore(f"{server.url}/store")
    with pytest.raises(UserError, match="hf://models/x is no address on the hub"):
        fetch_datastore("hf://models/x")


@pytest.mark.parametrize(
    "name", ["../evil", "/tmp/evil", "a/../../evil", ".bashrc", "a\\..\\evil", "manifest.json", ""]
)
@pytest.mark.parametrize("place", ["files", "derived"])
def test_a_manifest_cannot_name_files_outside(serve, published: Datastore, tmp_path: Path, name: str, place) -> None:
    shutil.copytree(published.path, tmp_path / "remote" / "store")
    path = tmp_path / "remote" / "store" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest[place][name] = {"bytes": 4, "sha256": "0" * 64}
    change_json(path, **{place: manifest[place]})
    server = serve(tmp_path / "remote")
    with pytest.raises(UserError, match="names the file .*, which no datastore has"):
        fetch_datastore(f"{server.url}/store")
    assert len(server.requests) == 1


def test_raw_keys_of_another_type_are_refused(published: Datastore, tmp_path: Path) -> None:
    shutil.copytree(published.path, tmp_path / "store")
    for keys in ({"file": "keys.npy", "dtype": "object"}, {"file": "../keys.npy", "dtype": "float16"}):
        change_json(tmp_path / "store" / "manifest.json", keys=keys)
        with pytest.raises(UserError, match="manifest.json is damaged"):
            Datastore.open(tmp_path / "store")


def test_a_full_disk_is_noticed_first(serve, published: Datastore, monkeypatch) -> None:
    server = serve(published.path.parent)
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match="Not enough disk space"):
        fetch_datastore(f"{server.url}/store")
    assert not any("npy" in path for path, _, _ in server.requests)


def test_a_folder_of_something_else_is_left_alone(serve, published: Datastore, tmp_path: Path) -> None:
    server = serve(published.path.parent)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="holds files that were not fetched; choose another --output"):
        fetch_datastore(f"{server.url}/store", tmp_path / "mine")
    fetch_datastore(f"{server.url}/store", tmp_path / "new")
    with pytest.raises(UserError, match="holds what was fetched from"):
        fetch_datastore(f"{server.url}/other", tmp_path / "new")


# ------------------------------------------------------------------------------------------------ single files


def test_published_files_are_fetched_and_gone_on_with_by_version(serve, tmp_path: Path) -> None:
    (tmp_path / "remote").mkdir()
    contents = {name: np.random.default_rng(0).bytes(300_000) for name in ("d_vals.npy", "d_keys.npy")}
    for name, content in contents.items():
        (tmp_path / "remote" / name).write_bytes(content)
    server = serve(tmp_path / "remote", drop_after=100_000)
    addresses = [f"{server.url}/{name}" for name in contents]
    folder = fetch_files(addresses, tmp_path / "files")
    assert {name: (folder / name).read_bytes() for name in contents} == contents
    asked = len(server.requests)
    fetch_files(addresses, tmp_path / "files")
    assert len(server.requests) == asked
    # Half of another version is not gone on with.
    (folder / "d_vals.npy").unlink()
    (folder / "d_vals.npy.part").write_bytes(b"old" * 1000)
    (folder / "d_vals.npy.part.version").write_text('"old"')
    fetch_files(addresses, tmp_path / "files")
    assert (folder / "d_vals.npy").read_bytes() == contents["d_vals.npy"]
    with pytest.raises(UserError, match=r"There is no file at .*/no_vals.npy"):
        fetch_files([f"{server.url}/no_vals.npy"])
    with pytest.raises(UserError, match="cannot name a file"):
        fetch_files([f"{server.url}/%2E%2E"])


def test_an_address_may_have_any_letters(serve, tmp_path: Path) -> None:
    (tmp_path / "remote" / "dépôt 1").mkdir(parents=True)
    (tmp_path / "remote" / "dépôt 1" / "d_vals.npy").write_bytes(b"x")
    server = serve(tmp_path / "remote")
    for path in ("dépôt 1", "d%C3%A9p%C3%B4t%201"):
        folder = fetch_files([f"{server.url}/{path}/d_vals.npy"])
        assert (folder / "d_vals.npy").read_bytes() == b"x"


@pytest.mark.parametrize("target, kept", [("https://hub/b", True), ("https://other/b", False)])
def test_a_redirect_keeps_the_token_on_the_same_host(target: str, kept: bool) -> None:
    request = urllib.request.Request("https://hub/a", headers={"Authorization": "Bearer secret"})
    followed = download._Redirects().redirect_request(request, None, 302, "Found", {}, target)
    assert followed.has_header("Authorization") == kept


def test_fetching_again_mends_what_is_damaged(serve, published: Datastore, tmp_path: Path, caplog) -> None:
    server = serve(published.path.parent)
    address, folder = f"{server.url}/store", tmp_path / "here"
    fetch_datastore(address, folder)
    let_age(folder)
    Datastore.open(folder)
    for name in ("keys.npy", "index.faiss", "clusters/km/members.npy"):
        flip_bit(folder / name, 2000)
    (folder / "values.npy").unlink()
    asked = len(server.requests)
    fetch_datastore(address, folder, repair=True)
    assert_same(folder, published)
    assert len({path for path, _, _ in server.requests[asked:]}) == 5  # the manifest and what was wrong
    flip_bit(folder / "manifest.json", (folder / "manifest.json").read_bytes().index(b"dimension") * 8)
    fetch_datastore(address, folder, repair=True)
    assert_same(folder, published)
    let_age(folder)
    asked = len(server.requests)
    fetch_datastore(address, folder, repair=True)
    assert len(server.requests) == asked + 1
    server.status = 500
    assert fetch_datastore(address, folder, repair=True) == folder  # all is well, with or without the network


def test_a_store_that_changed_at_its_address_is_told_of(serve, published: Datastore, tmp_path: Path, caplog) -> None:
    shutil.copytree(published.path, tmp_path / "remote" / "store")
    server = serve(tmp_path / "remote")
    address, folder = f"{server.url}/store", tmp_path / "here"
    fetch_datastore(address, folder)
    remote = Datastore.open(tmp_path / "remote" / "store")
    np.save(remote.path / "values.npy", np.array(remote.values)[::-1])
    files = remote.manifest.files | {"values.npy": file_record(remote.path / "values.npy")}
    replace(remote.manifest, files=files).write(remote.path)
    fetch_datastore(address, folder, repair=True)
    assert "has changed since it was fetched" in caplog.text
    flip_bit(folder / "values.npy", 2000)
    with pytest.raises(UserError, match=r"values.npy is damaged or missing, and .* has not what was recorded for it"):
        fetch_datastore(address, folder, repair=True)
