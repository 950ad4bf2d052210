"""What an interrupted computation leaves: gone on with where the settings are the same, gone when it is finished."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from knn_lm_eval.errors import UserError
from knn_lm_eval.system import checkpoints
from knn_lm_eval.system.checkpoints import SavedStates


def states(folder: Path, **more: object) -> SavedStates:
    return SavedStates(folder / "work.json", {"size": 3, "sources": ["a"]}, **more)  # type: ignore[arg-type]


def test_notes_and_arrays_come_back(tmp_path: Path) -> None:
    begun = states(tmp_path / "new")
    assert begun.resumed() is None and begun.notes() == {} and not begun.fits()
    begun.begin(done=0)
    begun.note(done=5)
    begun.save("sums", numbers=np.arange(4), total=7)
    later = states(tmp_path / "new")
    assert later.begin_or_resume(True, done=0) == later.notes() == {"done": 5} and later.fits()
    arrays = later.load("sums")
    assert arrays["numbers"].tolist() == [0, 1, 2, 3] and int(arrays["total"]) == 7
    assert later.load("others") == {}
    assert SavedStates.found(tmp_path / "new" / "work.json").settings == later.settings


def test_without_resume_it_begins_anew(tmp_path: Path) -> None:
    states(tmp_path).begin(done=9)
    states(tmp_path).save("sums", numbers=np.arange(4))
    (tmp_path / "sums.npz.part.tmp").touch()
    assert states(tmp_path).begin_or_resume(False, done=0) == {"done": 0}
    assert states(tmp_path).load("sums") == {} and states(tmp_path).notes() == {"done": 0}


def test_other_settings_are_named(tmp_path: Path) -> None:
    states(tmp_path, what="The sum").begin()
    other = SavedStates(
        tmp_path / "work.json", {"size": 4, "sources": ["a"], "seed": 1}, what="The sum", instead="delete it"
    )
    assert not other.fits()
    sentence = (
        r"^The sum was begun with size=3, seed=None, now it is size=4, seed=1; give the same settings, or delete it\.$"
    )
    with pytest.raises(UserError, match=sentence):
        other.begin_or_resume(True)
    with pytest.raises(UserError, match=f"What is unfinished in {tmp_path} was begun with .*leave out --resume"):
        SavedStates(tmp_path / "work.json", {}).resumed()


def test_settings_may_stand_beside_the_notes(tmp_path: Path) -> None:
    states(tmp_path, nested=False).begin(done=2)
    assert json.loads((tmp_path / "work.json").read_text()) == {"size": 3, "sources": ["a"], "done": 2}
    assert states(tmp_path, nested=False).resumed() == {"done": 2}
    with pytest.raises(UserError, match="size=3, now it is size=4;"):
        SavedStates(tmp_path / "work.json", {"size": 4}, nested=False).resumed()


def test_all_of_it_goes_and_nothing_else(tmp_path: Path) -> None:
    others = ("[[]x].part", "more.*")
    for name in ("[x].part", "more.1", "result.npy", "result.json", "x.part", "x"):
        (tmp_path / name).touch()
    work = states(tmp_path, others=others)
    work.note(done=1)
    work.save("sums", numbers=np.arange(4))
    (tmp_path / "work.json.tmp").touch()
    work.remove()
    assert {path.name for path in tmp_path.iterdir()} == {"result.npy", "result.json", "x.part", "x"}
    work.remove()  # nothing there


def test_a_state_is_due_some_time_after_the_last(tmp_path: Path, monkeypatch) -> None:
    work = states(tmp_path)
    assert not work.is_due() and work.is_due(0.0) and not work.is_due(1e6)
    monkeypatch.setattr(checkpoints, "CHECKPOINT_SECONDS", 0.0)
    assert work.is_due()


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    (tmp_path / "sums.npz.part").write_bytes(b"PK torn")
    with pytest.raises(UserError, match=r"sums.npz.part is damaged: .*leave out --resume to start anew"):
        states(tmp_path).load("sums")
