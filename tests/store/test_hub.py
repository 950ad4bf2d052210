"""Fetching from a hub, by real requests to one on loopback that redirects, refuses, drops and delays."""

from __future__ import annotations

import email.utils
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.hub_server import Hub
from helpers.places import SCRIPTS
from helpers.stores import change_json, flip_bit, make_store

from knn_lm_eval import UserError
from knn_lm_eval.store import download
from knn_lm_eval.store.fetching import cache_folder, fetch_datastore, fetch_files

ADDRESS = "hf://datasets/me/store"


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were waited for servers, or would have been."""
    waited: list[float] = []
    monkeypatch.setattr(download.time, "sleep", waited.append)
    return waited


@pytest.fixture
def store(tmp_path: Path, hub: Hub) -> Path:
    """A store that is on the hub, in a folder of a data set with a picture."""
    made = make_store(tmp_path / "there" / "store").path
    (tmp_path / "there" / "picture.png").write_bytes(b"x")
    hub.add_dataset("me/store", made)
    hub.add_dataset("me/stores", tmp_path / "there")
    return made


def assert_same(folder: Path, store: Path) -> None:
    for path in store.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()
    assert not list(folder.rglob("*.part*"))


def test_a_data_set_of_the_hub_is_fetched_by_the_script(hub: Hub, store: Path, tmp_path: Path, monkeypatch) -> None:
    """In a process of its own, whose libraries read where the hub is from their environment."""
    monkeypatch.setenv("KNN_LM_EVAL_CACHE", str(tmp_path / "cache"))
    hub.fail("cdn GET .*keys.npy", drop_after=10_000, times=3)
    hub.fail("hub GET .*manifest.json", status=429, headers={"Retry-After": "1"})
    run = subprocess.run(
        [sys.executable, str(SCRIPTS / "fetch_datastore.py"), "hf://datasets/me/stores/store"],
        **{"capture_output": True, "text": True, "env": os.environ | hub.environment()},
    )
    assert run.returncode == 0, run.stderr
    assert_same(cache_folder("hf://datasets/me/stores/store"), store)
    ranges = [int(str(request.range).split("=")[1].split("-")[0]) for request in hub.asked("cdn GET .*keys.npy")]
    assert ranges == [0, 10_000, 20_000, 30_000]
    first, second = hub.asked("hub GET .*main/store/manifest.json")
    assert second.time - first.time >= 1
    # The hub's token is shown to the hub alone.
    assert {request.token for request in hub.asked("^hub .*/resolve")} == {"hf_mine"}
    assert {request.token for request in hub.asked("^cdn ")} == {None}


def test_single_files_are_checked_by_the_hubs_checksums(hub: Hub, store: Path, tmp_path: Path) -> None:
    address = "hf://datasets/me/stores/store/keys.npy"
    hub.fail("cdn GET .*keys.npy", drop_after=10_000)
    assert (fetch_files([address], tmp_path / "a") / "keys.npy").read_bytes() == (store / "keys.npy").read_bytes()
    hub.fail("cdn GET .*keys.npy", alter=True)
    with pytest.raises(UserError, match=r"keys.npy is not what its checksum says: it was altered"):
        fetch_files([address], tmp_path / "b")
    assert not list((tmp_path / "b").glob("keys*"))
    with pytest.raises(UserError, match="There is no file at hf://datasets/me/stores/gone.npy"):
        fetch_files(["hf://datasets/me/stores/gone.npy"], tmp_path / "c")


def test_a_gated_data_set_says_where_to_ask(hub: Hub, store: Path, tmp_path: Path, monkeypatch) -> None:
    repo = hub.add_dataset("org/gated", store, gated=True)
    page = f"ask for access at {hub.url}/datasets/org/gated"
    with pytest.raises(UserError, match=f"org/gated is gated, and your login has no access; {page}"):
        fetch_datastore("hf://datasets/org/gated", tmp_path / "a")
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(UserError, match=rf"org/gated is gated: log in \(`hf auth login`, or HF_TOKEN\); {page}"):
        fetch_datastore("hf://datasets/org/gated", tmp_path / "a")
    hub.fail("hub GET .*manifest.json", status=403)
    with pytest.raises(UserError, match=f"the server says 403 Forbidden; {page}, and log in"):
        fetch_datastore("hf://datasets/org/gated", tmp_path / "a")
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    repo.readers.add("me")
    assert_same(fetch_datastore("hf://datasets/org/gated", tmp_path / "a"), store)


def test_names_that_are_none_are_said(hub: Hub, store: Path) -> None:
    for address, said in (
        ("hf://datasets/me/none", "there is no data set me/none on the hub, or your login may not see it"),
        ("hf://datasets/me/store@v9", "me/store has no such revision"),
        ("hf://datasets/me/stores", "There is no datastore at .*stores: it has no manifest.json"),
        ("hf://me/store", "hf://me/store is no address on the hub; it should be hf://datasets/"),
    ):
        with pytest.raises(UserError, match=said):
            fetch_datastore(address)


def test_the_hub_may_be_switched_off_or_out_of_reach(hub: Hub, tmp_path: Path, monkeypatch) -> None:
    hub.url = "http://127.0.0.1:9"  # where nobody answers
    hub.patch(monkeypatch)
    with pytest.raises(UserError, match=r"Cannot fetch http://127.0.0.1:9/.*refused, 6 times in a row"):
        fetch_datastore(ADDRESS, tmp_path / "a")
    with pytest.raises(UserError, match=r"Cannot fetch hf://datasets/me/store/d_vals.npy: "):
        fetch_files([f"{ADDRESS}/d_vals.npy"], tmp_path / "b")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        fetch_datastore(ADDRESS, tmp_path / "a")
    assert not hub.requests


@pytest.mark.parametrize(
    ("headers", "least", "most"),
    [
        ({"Retry-After": "7"}, 7, 7),
        ({"Retry-After": "a date"}, 60, 100),
        (
            {"RateLimit": '"resolvers";r=0;t=165', "RateLimit-Policy": '"fixed window";"resolvers";q=3000;w=300'},
            165,
            165,
        ),
        ({"Retry-After": "0"}, 1, 1),
        ({"Retry-After": "soon"}, 1, 1),
        ({"Retry-After": "Mon, 99 Foo 99999"}, 1, 1),
        ({"Retry-After": "-5", "RateLimit": "t"}, 1, 1),
        ({}, 1, 1),
    ],
)
def test_a_limit_is_waited_for(
    hub: Hub, store: Path, tmp_path: Path, waits: list[float], headers: dict[str, str], least: float, most: float
) -> None:
    dates = {"a date": email.utils.formatdate(time.time() + 100, usegmt=True)}
    headers = {name: dates.get(value, value) for name, value in headers.items()}
    hub.fail("cdn GET .*keys.npy", status=429, headers=headers)
    assert_same(fetch_datastore(ADDRESS, tmp_path / "a"), store)
    assert len(waits) == 1 and least <= waits[0] <= most


def test_a_limit_of_hours_is_said(hub: Hub, store: Path, tmp_path: Path, waits: list[float]) -> None:
    hub.fail("cdn GET .*keys.npy", status=429, headers={"Retry-After": "7200"})
    with pytest.raises(UserError, match="429 .*, and not to come back for 120 minutes; what came is kept"):
        fetch_datastore(ADDRESS, tmp_path / "a")
    hub.fail("cdn GET .*keys.npy", status=503, headers={"Retry-After": "9"}, times=6)
    with pytest.raises(UserError, match="the server says 503 .*, 6 times in a row"):
        fetch_datastore(ADDRESS, tmp_path / "a")
    assert waits == [9, 9, 9, 9, 16]
    assert_same(fetch_datastore(ADDRESS, tmp_path / "a"), store)


def test_a_full_disk_leaves_nothing_half(hub: Hub, store: Path, tmp_path: Path, monkeypatch) -> None:
    """The kernel itself refuses to write more than so many bytes of a file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"Cannot write to .*/a: File too large; free some space, or"):
            fetch_datastore(ADDRESS, tmp_path / "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    left = {path.name: path.stat().st_size for path in (tmp_path / "a").iterdir()}
    assert left["keys.npy.part"] == 50_000 and "keys.npy" not in left and "manifest.json" not in left
    hub.heal()
    assert_same(fetch_datastore(ADDRESS, tmp_path / "a"), store)
    assert [request.range for request in hub.asked("keys.npy")][-1].startswith("bytes=50000-")
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    hub.heal()
    with pytest.raises(UserError, match="Not enough disk space"):
        fetch_datastore(ADDRESS, tmp_path / "b")
    assert not hub.asked("npy")


def test_a_network_that_ends_is_not_a_disk_that_is_full(hub: Hub, store: Path, tmp_path: Path, monkeypatch) -> None:
    read, refused = download._read, []

    def unreachable(response: object, block: memoryview) -> int:
        if not refused:
            refused.append(1)
            raise ConnectionError("No route to host")
        return read(response, block)

    class Response:
        def readinto(self, block: memoryview) -> int:
            raise OSError(113, "No route to host")

    with pytest.raises(ConnectionError, match="No route to host"):
        download._read(Response(), memoryview(bytearray(1)))
    monkeypatch.setattr(download, "_read", unreachable)
    assert_same(fetch_datastore(ADDRESS, tmp_path / "a"), store)


def test_what_is_damaged_is_mended_from_the_commit_that_is_there(hub: Hub, store: Path, tmp_path: Path) -> None:
    folder = fetch_datastore(ADDRESS, tmp_path / "a")
    flip_bit(folder / "keys.npy", 9000)
    hub.heal()
    fetch_datastore(ADDRESS, folder, repair=True)
    assert_same(folder, store)
    commit = hub.dataset("me/store").branches["main"]
    assert [request.path for request in hub.asked("hub .*npy")] == [f"/datasets/me/store/resolve/{commit}/keys.npy"]
    flip_bit(folder / "manifest.json", (folder / "manifest.json").read_bytes().index(b"dimension") * 8)
    fetch_datastore(ADDRESS, folder, repair=True)
    assert_same(folder, store)


def test_a_manifest_of_the_hub_cannot_name_files_outside(hub: Hub, store: Path, tmp_path: Path) -> None:
    files = json.loads((store / "manifest.json").read_text())["files"]
    change_json(store / "manifest.json", files=files | {"../x": {"bytes": 1, "sha256": "0" * 64}})
    hub.add_dataset("me/store", store)
    with pytest.raises(UserError, match="names the file '../x', which no datastore has"):
        fetch_datastore(ADDRESS, tmp_path / "a")
