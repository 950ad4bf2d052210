"""One browser, and one page to explore a tiny model's datastore, for all tests of this folder."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
from helpers.browser import Browser, obstacle, open_browser
from helpers.places import SCRIPTS

from knn_lm_eval.store.datastore import Datastore


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if missing := obstacle():
        pytest.skip(missing)
    with open_browser() as browser:
        yield browser


@pytest.fixture(scope="session")
def address(clustered: Datastore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where ``explore`` serves its page; what it says goes to ``server.log``."""
    if missing := obstacle("gradio"):
        pytest.skip(missing)
    model_args = f"datastore={clustered.path},k=30,lmbda=0.4,knn_temp=2.0,retomaton=True,clusters=kmeans"
    log = tmp_path_factory.mktemp("server") / "server.log"
    command = [sys.executable, SCRIPTS / "explore.py", "--model_args", model_args, "--device", "cpu"]
    with open(log, "w") as errors:
        server = subprocess.Popen(
            [*map(str, command), "--max_tokens", "300"], stdout=subprocess.PIPE, stderr=errors, text=True
        )
        assert server.stdout is not None
        try:
            line = server.stdout.readline()
            found = re.match(r"Open (http://127\.0\.0\.1:\d+/) in a browser; Ctrl-C closes the page\.$", line)
            assert found, line + log.read_text()
            yield found[1]
            server.terminate()
            server.wait(timeout=60)
            said = log.read_text()
            assert server.returncode == 143, said
            assert said.rstrip().endswith("interrupted: the page is closed; the same command opens it again."), said
            assert "Traceback" not in said, said
        finally:
            server.kill()
            server.wait()
            server.stdout.close()
