"""Publishing datastores on a hub, and fetching them from there, through the hub's own client and real requests."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers.hub_server import Hub
from helpers.places import SCRIPTS
from helpers.stores import flip_bit, let_age, make_store

from knn_lm_eval import Datastore, UserError
from knn_lm_eval.cli.main import SAME_COMMAND, main
from knn_lm_eval.make.clustering import cluster_kmeans
from knn_lm_eval.search.indexing import build_index
from knn_lm_eval.store import fetching, publishing
from knn_lm_eval.store.fetching import fetch_datastore
from knn_lm_eval.store.manifest import Manifest
from knn_lm_eval.store.publishing import prepare_push, push, push_datastore
from knn_lm_eval.system.seals import write_sealed_json

ADDRESS = "hf://datasets/me/store"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A datastore with an index and clusters."""
    store = make_store(tmp_path_factory.mktemp("stores") / "store")
    build_index(store, "IVF16,RaBitQfs")
    cluster_kmeans(store, num_clusters=20, sample=1000)
    return store.path


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(made, tmp_path / "store")


def own(folder: Path) -> dict[str, bytes]:
    """The files of a store, by the manifest."""
    content = json.loads((folder / "manifest.json").read_text())
    names = ["manifest.json", *content["files"], *content.get("derived", {})]
    return {name: (folder / name).read_bytes() for name in names}


def test_what_is_pushed_is_what_is_fetched(hub: Hub, store: Path, tmp_path: Path) -> None:
    assert push_datastore(store, "me/store", "mit") == ADDRESS
    there = hub.files("me/store")
    assert {name: there[name] for name in own(store)} == own(store)
    assert there.keys() - own(store).keys() == {"README.md", ".gitattributes"}  # no locks, no scan
    assert not hub.dataset("me/store").private
    fetched = fetch_datastore(ADDRESS, tmp_path / "fetched")
    assert own(fetched) == own(store)
    commit = hub.dataset("me/store").branches["main"]
    assert all(f"/resolve/{commit}/" in asked.path for asked in hub.asked("hub GET .*/resolve/.*npy"))
    # Again: nothing is uploaded, nothing is committed.
    hub.heal()
    push_datastore(store, "me/store", "mit")
    assert not hub.asked(" PUT ") and hub.dataset("me/store").branches["main"] == commit


def test_an_interrupted_upload_is_gone_on_with(hub: Hub, store: Path) -> None:
    hub.part_bytes = 40_000  # keys.npy in three
    hub.fail(" PUT ", drop_after=1000, times=float("inf"))
    with pytest.raises(
        UserError, match=r"Cannot push to me/store: .*; what was uploaded is kept, the same command goes on"
    ):
        push_datastore(store, "me/store", "mit")
    assert hub.files("me/store").keys() == {".gitattributes"}
    hub.heal()
    hub.fail("hub POST .*/commit/", status=503, times=float("inf"))
    with pytest.raises(UserError, match="the hub says 503"):
        push_datastore(store, "me/store", "mit")
    assert hub.files("me/store").keys() == {".gitattributes"}
    uploaded = len(hub.asked(" PUT "))
    assert uploaded >= 3
    hub.heal()
    push_datastore(store, "me/store", "mit")
    assert not hub.asked(" PUT ")
    assert own(store).items() <= hub.files("me/store").items()


def heed_ctrl_c() -> None:
    """A shell's background has it ignored, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_a_push_that_was_ended_is_gone_on_with(hub: Hub, tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", count=40_000, dimension=128).path  # keys of more than 10 MB
    command = [sys.executable, str(SCRIPTS / "push_datastore.py"), str(store), "me/store", "--license", "mit"]
    for number, status in ((signal.SIGKILL, -9), (signal.SIGINT, 130)):
        hub.heal()
        hub.fail("cdn PUT", delay=60)
        environment = os.environ | hub.environment()
        run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=heed_ctrl_c)
        until = time.monotonic() + 60
        while not hub.asked("cdn PUT") and time.monotonic() < until:
            time.sleep(0.05)
        run.send_signal(number)
        said = run.communicate()[1]
        assert run.returncode == status, said
        assert hub.files("me/store").keys() == {".gitattributes"}
    assert f"interrupted: {SAME_COMMAND}" in said.splitlines() and "Traceback" not in said, said
    hub.heal()
    push_datastore(store, "me/store", "mit")
    assert own(store).items() <= hub.files("me/store").items()


def test_another_store_takes_the_place_of_the_first(hub: Hub, store: Path, tmp_path: Path, monkeypatch) -> None:
    push_datastore(store, "me/store", "mit")
    before = own(store)
    mine = hub.dataset("me/store")
    (tmp_path / "figure.png").write_bytes(b"x")
    files = mine.commits[mine.branches["main"]]
    mine.commit(files | {"figure.png": hub.keep("figure.png", tmp_path / "figure.png")})
    other = make_store(tmp_path / "other", count=500, seed=1)
    fetch_missing = fetching._fetch_missing

    def pushed_meanwhile(*arguments: object) -> None:
        push_datastore(other.path, "me/store", "mit")
        fetch_missing(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(fetching, "_fetch_missing", pushed_meanwhile)
        assert own(fetch_datastore(ADDRESS, tmp_path / "old")) == before  # as it was when it was begun
    assert hub.files("me/store").keys() == own(other.path).keys() | {"README.md", ".gitattributes", "figure.png"}
    assert own(fetch_datastore(ADDRESS, tmp_path / "new")) == own(other.path)


def test_a_branch_is_made_and_fetched(hub: Hub, store: Path, tmp_path: Path) -> None:
    push_datastore(make_store(tmp_path / "other", count=500).path, "me/store", "mit")
    assert push_datastore(store, "me/store", "mit", revision="v2") == f"{ADDRESS}@v2"
    assert len(Datastore.open(fetch_datastore(ADDRESS, tmp_path / "main"))) == 500
    assert own(fetch_datastore(f"{ADDRESS}@v2", tmp_path / "v2")) == own(store)
    assert f"datastore={ADDRESS}@v2" in hub.files("me/store", "v2")["README.md"].decode()
    with pytest.raises(UserError, match=r"me/store has no such revision; http.*/datasets/me/store shows which"):
        fetch_datastore(f"{ADDRESS}@v3", tmp_path / "v3")


def test_what_was_deleted_here_is_not_promised_there(hub: Hub, store: Path, tmp_path: Path) -> None:
    shutil.rmtree(store / "clusters")
    push_datastore(store, "me/store", "mit")
    fetched = fetch_datastore(ADDRESS, tmp_path / "fetched")
    assert set(Manifest.read(fetched).derived) == {"index.json", "index.faiss"}
    (store / "index.faiss").unlink()
    with pytest.raises(
        UserError, match=r"is not whole, and nothing was pushed: index.faiss is missing beside index.json"
    ):
        push_datastore(store, "me/store", "mit")


def test_only_a_whole_store_is_pushed(hub: Hub, store: Path, tmp_path: Path) -> None:
    let_age(store)
    Datastore.open(store)
    flip_bit(store / "keys.npy", 9000)
    with pytest.raises(UserError, match=r"is not whole, and nothing was pushed: .*keys.npy"):
        push_datastore(store, "me/store", "mit")
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "progress.json").write_text("{}")
    with pytest.raises(UserError, match="is not finished"):
        push_datastore(tmp_path / "unfinished", "me/store", "mit")
    with pytest.raises(UserError, match="no such folder"):
        push_datastore(tmp_path / "nothing", "me/store", "mit")
    assert not hub.requests


def test_a_change_during_the_push_is_found(hub: Hub, store: Path) -> None:
    package = prepare_push(store, "me/store", "mit")
    flip_bit(store / "keys.npy", 9000)
    with pytest.raises(UserError, match=r"keys.npy on the hub is not what was verified here"):
        push(package)


@pytest.mark.parametrize(
    ("repo", "license", "said"),
    [
        ("store", "mit", "'store' names no data set on the hub; it should be USER/NAME"),
        ("hf://datasets/me/store", "mit", "names no data set"),
        ("me/../store", "mit", "names no data set"),
        ("me/store", "MIT: yes", "is none that the hub knows"),
        ("me/store", "gpl-99", r'"license" must be one of .*; give another --license'),
        ("you/store", "mit", "the hub says 403 You don't have the rights .*: the name must be yours"),
        ("me/thesis", "mit", "is there already and holds no datastore .data.csv.; push to another name"),
    ],
)
def test_what_cannot_be_pushed_is_said(
    hub: Hub, store: Path, tmp_path: Path, repo: str, license: str, said: str
) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "data.csv").write_text("1")
    (tmp_path / "thesis" / "README.md").write_text("mine")
    hub.add_dataset("me/thesis", tmp_path / "thesis")
    with pytest.raises(UserError, match=said) as caught:
        push_datastore(store, repo, license)
    assert "\n" not in str(caught.value)
    assert not hub.asked(" PUT ") and hub.files("me/thesis")["README.md"] == b"mine"


def test_who_may_not_write_is_told(hub: Hub, store: Path, monkeypatch) -> None:
    hub.read_only.add("hf_reads")
    hub.tokens["hf_reads"] = "me"
    for token, said in (
        ("", "nobody is logged in; log in .`hf auth login`, or HF_TOKEN. with a token that may write"),
        ("hf_wrong", "the hub says 401 Invalid .*: it does not take your token; log in"),
        ("hf_reads", "the hub says 403 .*: the name must be yours .*, and the token one that may write"),
    ):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(UserError, match=said):
            push_datastore(store, "me/store", "mit")
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    hub.fail("hub POST /api/repos/create", status=429, headers={"Retry-After": "300"}, times=float("inf"))
    with pytest.raises(UserError, match="the hub says 429.*: too many requests; wait some minutes"):
        push_datastore(store, "me/store", "mit")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="Cannot push to me/store: .*refused; what was uploaded is kept"):
        push_datastore(store, "me/store", "mit")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set; unset it"):
        push_datastore(store, "me/store", "mit")


def test_a_private_store_is_its_owners(hub: Hub, store: Path, tmp_path: Path, monkeypatch) -> None:
    push_datastore(store, "me/store", "mit", private=True)
    assert hub.dataset("me/store").private
    fetch_datastore(ADDRESS, tmp_path / "mine")
    hub.tokens["hf_yours"] = "you"
    for token, said in (
        ("", r"there is no data set me/store on the hub, or it is private: log in \(`hf auth login`"),
        ("hf_yours", "there is no data set me/store on the hub, or your login may not see it"),
        ("hf_wrong", "the hub does not take your token; log in"),
    ):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(UserError, match=said):
            fetch_datastore(ADDRESS, tmp_path / f"theirs{token}")
    hub.dataset("me/store").private = False
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    with pytest.raises(UserError, match="me/store is there already, and public"):
        push_datastore(store, "me/store", "mit", private=True)


def test_a_store_is_not_changed_while_it_is_pushed(hub: Hub, store: Path, monkeypatch) -> None:
    held = []

    @contextmanager
    def change(folder: Path) -> Iterator[None]:
        held.append(folder)
        yield

    monkeypatch.setattr(publishing, "one_change_of", change)
    push_datastore(store, "me/store", "mit")
    assert held == [store]
    monkeypatch.setattr(publishing.os, "access", lambda folder, how: False)  # on a disk that is read only
    push_datastore(store, "me/store", "mit")
    assert held == [store]


def test_another_commit_meanwhile_is_not_overwritten(hub: Hub, store: Path, monkeypatch) -> None:
    replaced = publishing._replaced

    def committed_meanwhile(*arguments: Any) -> list[str]:
        hub.dataset("me/store").commit({"x.txt": hub.keep("x.txt", b"x")})
        return replaced(*arguments)

    monkeypatch.setattr(publishing, "_replaced", committed_meanwhile)
    with pytest.raises(UserError, match="the hub says 412 .*: somebody else has changed it meanwhile; push again"):
        push_datastore(store, "me/store", "mit")
    assert hub.files("me/store") == {"x.txt": b"x"}


def test_the_command_shows_the_card_and_pushes(hub: Hub, store: Path, capsys, monkeypatch) -> None:
    command = ["push_datastore", str(store), "me/store", "--license", "CC-BY-4.0", "--model", "org/tiny"]
    monkeypatch.setenv("HF_TOKEN", "")
    write_sealed_json(store / "params.json", {"settings": {"k": 256}})
    assert main([*command, "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert "license: cc-by-4.0" in said and "pretrained=org/tiny,datastore=hf://datasets/me/store,k=256" in said
    assert "| `index` | `IVF16,RaBitQfs` |" in said and "| `kmeans` | 20 |" in said
    assert re.search(r"^keys.npy +96,128$", said, flags=re.MULTILINE)
    assert "would have 11 files of" in said and not hub.requests
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    assert main([*command, "--private", "--verify", "auto"]) == 0
    assert "hf://datasets/me/store: 11 files of" in capsys.readouterr().out
    assert hub.dataset("me/store").private and "Use it" in hub.files("me/store")["README.md"].decode()
