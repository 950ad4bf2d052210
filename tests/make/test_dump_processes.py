"""A dump that several processes share gives the bytes that one process gives, whatever happens to them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from helpers.places import SCRIPTS
from helpers.ready import Ready, launch, script
from helpers.tiny_model import TRAIN_TEXT, make_llama
from hypothesis import given
from hypothesis import strategies as st

from knn_lm_eval.errors import UserError
from knn_lm_eval.lm.loading import CausalHFLM
from knn_lm_eval.make.dump import Dump, dump_datastore, finish_dump
from knn_lm_eval.make.dump_progress import entries_done, not_done, share_of
from knn_lm_eval.make.index_plan import IndexPlan
from knn_lm_eval.make.key_reading import KeyReader
from knn_lm_eval.make.text import TextSource
from knn_lm_eval.make.windows import Window
from knn_lm_eval.store.datastore import Datastore

FILES = ("keys.npy", "values.npy", "document_starts.npy")
WINDOWS = {"max_length": 16, "stride": 12, "batch_size": 1}
ENVIRONMENT = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of many lengths, the first of them half of the text."""
    words = TRAIN_TEXT.split()
    lines, begin = [" ".join(words[: len(words) // 2])], len(words) // 2
    while begin < len(words):
        length = 1 + (7 * len(lines)) % 40
        lines.append(" ".join(words[begin : begin + length]))
        begin += length
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, text_file: Path) -> Datastore:
    """The store that one process makes."""
    lm = CausalHFLM(str(model_folder), device="cpu")
    return dump_datastore(lm, TextSource(text_file).pieces(), tmp_path_factory.mktemp("stores") / "alone", **WINDOWS)


def assert_same_files(store: Path, expected: Datastore) -> None:
    assert sorted(path.name for path in store.iterdir()) == sorted([*FILES, "manifest.json"])
    for name in FILES:
        assert (store / name).read_bytes() == (expected.path / name).read_bytes(), name
    assert Datastore.open(store).manifest.files == expected.manifest.files


def words(model: Path, text: Path, output: Path, *more: str) -> list[str]:
    """What the command is given."""
    arguments = ["--model_args", f"pretrained={model}", "--text", str(text), "--output", str(output)]
    windows = [word for name, value in WINDOWS.items() for word in (f"--{name}", str(value))]
    return [*arguments, *windows, *more]


def dumping(processes: int, model: Path, text: Path, output: Path, *more: str) -> list[Ready]:
    """The command under way, as so many processes that know of each other."""
    work = script("dump_datastore", *words(model, text, output, *more))
    return launch(work, processes, ENVIRONMENT) if processes > 1 else [Ready(work, ENVIRONMENT)]


chunks_of_a_text = st.lists(st.integers(1, 9), min_size=1, max_size=30).map(
    lambda lengths: [
        [Window(None, end - length, end)] for length, end in zip(lengths, np.cumsum(lengths).tolist(), strict=True)
    ]
)


@given(chunks_of_a_text, st.sets(st.integers(0, 29)), st.integers(1, 8))
def test_shares_are_neighbouring_chunks_and_all_that_isnot_done(chunks, done: set[int], shares: int) -> None:
    runs = [[chunk[0].start, chunk[0].stop] for number, chunk in enumerate(chunks) if number in done]
    expected = [chunk for number, chunk in enumerate(chunks) if number not in done]
    assert list(not_done(chunks, runs)) == expected
    entries = sum(chunk[0].stop - chunk[0].start for chunk in expected)
    parts = [list(share_of(expected, entries, share, shares)) for share in range(shares)]
    assert [chunk for part in parts for chunk in part] == expected
    for part in parts:  # a chunk too much at most
        length = sum(chunk[0].stop - chunk[0].start for chunk in part)
        assert length <= entries / shares + max(chunk[0].stop - chunk[0].start for chunk in chunks)


def test_a_share_goes_on_where_it_ended(
    tmp_path: Path, lm: CausalHFLM, text_file: Path, alone: Datastore, monkeypatch: pytest.MonkeyPatch
) -> None:
    dump = Dump(lm, tmp_path, **WINDOWS)
    dump.prepare(TextSource(text_file).pieces(), resume=False)
    read: list[int] = []
    of_chunk = KeyReader.of_chunk

    def ends_after_five_chunks(self: KeyReader, chunk: list[Window], *rest: Any) -> np.ndarray:
        if len(read) == 5:
            raise KeyboardInterrupt
        read.append(chunk[0].start)
        return of_chunk(self, chunk, *rest)

    monkeypatch.setattr(KeyReader, "of_chunk", ends_after_five_chunks)
    with pytest.raises(KeyboardInterrupt):
        dump.write_share(1, 3)
    assert len(alone) // 4 < read[0] < len(alone) // 2 < len(alone) and entries_done(tmp_path) > 0
    monkeypatch.setattr(
        KeyReader, "of_chunk", lambda self, chunk, *rest: read.append(chunk[0].start) or of_chunk(self, chunk, *rest)
    )
    for share in (2, 1, 0):
        dump.write_share(share, 3)
    assert len(read) == len(set(read))  # nothing twice
    finish_dump(tmp_path)
    assert_same_files(tmp_path, alone)


def test_keys_that_were_lost_are_written_again(
    tmp_path: Path, lm: CausalHFLM, text_file: Path, alone: Datastore
) -> None:
    dump = Dump(lm, tmp_path, **WINDOWS)
    dump.prepare(TextSource(text_file).pieces(), resume=False)
    dump.write_share(0, 2)
    os.truncate(tmp_path / "keys.npy.part", 1000)
    dump_datastore(lm, [], tmp_path, resume=True, **WINDOWS)
    assert_same_files(tmp_path, alone)


@pytest.mark.slow
def test_two_processes_write_what_one_writes(
    tmp_path: Path, model_folder: Path, text_file: Path, alone: Datastore
) -> None:
    output = tmp_path / "store"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, str(SCRIPTS / "dump_datastore.py"), *words(model_folder, text_file, output)]
    run = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert_same_files(output, alone)
    assert run.stdout.count("Next: lm_eval") == 1


@pytest.fixture(scope="module")
def keyless(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, text_file: Path) -> Datastore:
    """What one process makes without keys: an index in parts."""
    lm, folder = CausalHFLM(str(model_folder), device="cpu"), tmp_path_factory.mktemp("stores") / "keyless"
    index = IndexPlan(factory="IVF4,SQ8", parts=3)
    more = {"keys": "none", "index": index, "max_tokens": 2000}
    return dump_datastore(lm, TextSource(text_file).pieces(), folder, **WINDOWS, **more)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["two", "ray"])
@pytest.mark.xdist_group("ray")
def test_several_make_the_index_without_keys_that_one_makes(
    tmp_path: Path,
    model_folder: Path,
    text_file: Path,
    keyless: Datastore,
    by: str,
    request: pytest.FixtureRequest,
) -> None:
    output = tmp_path / "store"
    more = ["--keys", "none", "--factory", "IVF4,SQ8", "--parts", "3", "--max_tokens", "2000"]
    if by == "ray":
        more += ["--ray", request.getfixturevalue("ray_address"), "--workers", "2"]
    processes = dumping(2 if by == "two" else 1, model_folder, text_file, output, *more)
    runs = [process.completed() for process in processes]
    assert [run.returncode for run in runs] == [0] * len(runs), runs
    said = "".join(run.stdout for run in runs)
    assert said.count("without keys. Next: lm_eval") == said.count("against exact search") == 1
    assert {path.name for path in output.iterdir()} == {path.name for path in keyless.path.iterdir()}
    for file in ("values.npy", "document_starts.npy", *(f"index.{number:03d}.faiss" for number in range(3))):
        assert (output / file).read_bytes() == (keyless.path / file).read_bytes(), file
    Datastore.open(output, verify="always")


def has_done(output: Path, enough: int) -> bool:
    """Whether a dump that others are at has written more than so many entries."""
    with suppress(FileNotFoundError):  # what shares noted goes when a resumed dump begins
        return (output / "progress.json").exists() and entries_done(output) > enough
    return False


@pytest.mark.slow
def test_killed_processes_are_resumed_by_another_number_of_them(
    tmp_path: Path, model_folder: Path, text_file: Path, alone: Datastore
) -> None:
    output = tmp_path / "store"
    done = 0
    for processes, kill_all in ((2, False), (3, True)):
        resume = ["--resume"] if done else []
        workers = dumping(processes, model_folder, text_file, output, *resume)
        enough = done + len(alone) // 4
        while workers[0].poll() is None and not has_done(output, enough):
            time.sleep(0.001)
        for worker in workers if kill_all else workers[-1:]:
            worker.send_signal(signal.SIGKILL)
        killed = -signal.SIGKILL
        assert [worker.wait(120) for worker in workers] == ([killed] * 3 if kill_all else [1, killed])
        done = entries_done(output)
        assert enough < done < len(alone)
    (last,) = dumping(1, model_folder, text_file, output, "--resume")
    assert last.wait(300) == 0, last.printed()
    assert_same_files(output, alone)


@pytest.mark.slow
def test_an_error_ends_all_processes_with_one_sentence(tmp_path: Path, tokenizer, text_file: Path) -> None:
    model = make_llama()
    model.model.layers[-1].post_attention_layernorm.weight.data[:] = 1e6
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    runs = [process.completed() for process in dumping(2, tmp_path / "model", text_file, tmp_path / "store")]
    errors = "".join(run.stderr for run in runs)
    assert [run.returncode for run in runs] == [1, 1], runs
    assert errors.count("error: ") == errors.count("not a finite float16 number") == 1, errors


def test_processes_that_would_not_know_of_each_other_are_refused(
    tmp_path: Path, model_folder: Path, text_file: Path
) -> None:
    environment = os.environ | {"WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": ""}
    work = script("dump_datastore", *words(model_folder, text_file, tmp_path / "store"))
    run = Ready(work, environment).completed()
    assert run.returncode == 1 and "error: This is one of 2 processes" in run.stderr
    assert "ACCELERATE_USE_CPU=true" in run.stderr and "Traceback" not in run.stderr


WAITING = """
import os
from knn_lm_eval.errors import report_user_errors
from knn_lm_eval.system.processes import Processes
report_user_errors()
processes = Processes.of_this_launch()
assert processes.first_does(lambda: {"from": processes.rank}) == {"from": 0}
assert processes.each_does(lambda: processes.rank) == processes.rank
if processes.rank == 1:
    os._exit(9)
processes.each_does(lambda: None)
"""


@pytest.mark.slow
def test_nobody_waits_for_a_process_that_died() -> None:
    """Also where no launcher ends the others."""
    first, second = [process.completed(300) for process in launch(partial(exec, WAITING, {}), 2, ENVIRONMENT)]
    assert [first.returncode, second.returncode] == [1, 9]
    assert "error: Another process of this dump died" in first.stderr and "Traceback" not in first.stderr, first


def test_a_begun_dump_of_another_version_is_refused(tmp_path: Path, lm: CausalHFLM) -> None:
    (tmp_path / "progress.json").write_text('{"settings": {}, "fingerprint": {}, "entries_done": 5}')
    with pytest.raises(UserError, match="begun by another version"):
        dump_datastore(lm, [], tmp_path, resume=True)


@pytest.mark.xdist_group("ray")  # one Ray at a time
@pytest.mark.slow
def test_ray_tasks_write_what_one_process_writes_also_where_they_are_killed(
    tmp_path: Path, model_folder: Path, text_file: Path, alone: Datastore, ray_address: str
) -> None:
    output = tmp_path / "store"
    (driver,) = dumping(1, model_folder, text_file, output, "--ray", ray_address, "--workers", "2")
    killed: list[psutil.Process] = []
    while driver.poll() is None and not killed:
        begun = entries_done(output) > 0
        workers = [one for one in psutil.Process().children(recursive=True) if is_worker(one)] if begun else []
        if workers and entries_done(output) > len(alone) // 5:
            for worker in workers:
                worker.send_signal(signal.SIGKILL)
            killed = workers
        time.sleep(0.005)
    run = driver.completed(300)
    assert run.returncode == 0, run
    assert killed and "Next: lm_eval" in run.stdout
    assert_same_files(output, alone)


def is_worker(process: psutil.Process) -> bool:
    try:
        title = " ".join(process.cmdline())  # before the job begins, and then
        return ("ray::Worker" in title or "_write_share" in title) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.xdist_group("ray")  # one Ray at a time
@pytest.mark.slow
def test_an_error_in_a_ray_task_is_told_in_one_sentence(
    ray_address: str, model_folder: Path, text_file: Path, alone: Datastore
) -> None:
    (driver,) = dumping(1, model_folder, text_file, alone.path, "--ray", ray_address)
    run = driver.completed()
    assert run.returncode == 1, run.stderr
    assert "already holds a finished datastore" in run.stderr and "Traceback" not in run.stderr, run.stderr
