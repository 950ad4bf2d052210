"""transformers, datasets, our tasks, publishing and fetching, through the network code that they have for the hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from helpers.hub_server import Hub
from helpers.hub_session import perplexity
from helpers.places import REPO
from helpers.tiny_model import EVAL_TEXT
from pyarrow import parquet
from transformers import AutoModelForCausalLM

from knn_lm_eval.store.datastore import Datastore


@pytest.fixture(scope="module")
def wikitext(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of the form of Salesforce/wikitext: configurations in folders, splits in parquet files, empty rows."""
    folder = tmp_path_factory.mktemp("wikitext")
    configurations = []
    for name in ("wikitext-103-raw-v1", "wikitext-2-raw-v1"):
        (folder / name).mkdir()
        splits = []
        for split in ("test", "train", "validation"):
            rows = ["", f" = {split} = \n", "", f" {EVAL_TEXT[:300]} \n", ""]
            parquet.write_table(pyarrow.table({"text": rows}), folder / name / f"{split}-00000-of-00001.parquet")
            splits.append(f"  - split: {split}\n    path: {name}/{split}-*\n")
        configurations.append(f"- config_name: {name}\n  data_files:\n{''.join(splits)}")
    (folder / "README.md").write_text(f"---\nconfigs:\n{''.join(configurations)}---\n# WikiText\n")
    return folder


def test_a_user_of_the_hub(
    hub: Hub, store: Datastore, model_folder: Path, wikitext: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_model("org/tiny", model_folder)
    hub.add_dataset("Salesforce/wikitext", wikitext)
    hub.part_bytes = 100_000
    hub.fail("cdn GET .*model.safetensors", drop_after=10_000)
    hub.fail("hub .*/tree/.*", status=429, headers={"Retry-After": "1"})
    hub.fail("cdn PUT ", status=503)
    hub.fail("cdn GET .*keys.npy", drop_after=50_000, times=2)
    environment = os.environ | hub.environment() | {"KNN_LM_EVAL_CACHE": str(tmp_path / "cache")}
    run = subprocess.run(
        [sys.executable, "-m", "helpers.hub_session", str(store.path)],
        **{"capture_output": True, "text": True, "cwd": REPO / "tests"},
        env=environment | {"PYTHONPATH": str(REPO)},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    said = json.loads(run.stdout.splitlines()[-1])
    for name in ("manifest.json", *store.manifest.files, *store.manifest.derived):
        content = (store.path / name).read_bytes()
        assert content == hub.files("me/store")[name] == (Path(said["folder"]) / name).read_bytes()
    assert len(hub.asked("cdn GET .*keys.npy")) == 3 and len(hub.asked("cdn GET .*model.safetensors")) == 2

    # The same without a hub.
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    assert said["weights"] == float(sum(weights.detach().double().abs().sum() for weights in model.parameters()))
    assert said["rows"] == ["", " = validation = \n", "", f" {EVAL_TEXT[:300]} \n", ""]
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)  # takes a second
    monkeypatch.setenv("KNN_LM_EVAL_DATA", str(wikitext / "wikitext-103-raw-v1"))
    assert said["perplexity"] == pytest.approx(perplexity(str(model_folder), store.path), rel=1e-9)
