"""How far a dump is: the runs of entries whose keys are written.

While a dump is at work its folder holds ``progress.json`` (the settings, and the runs of entries that were done when
the dump was last started) and, for each process that shares it, ``progress.N.json`` with the runs that it has done
since.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypedDict

from knn_lm_eval.errors import UserError, shortened
from knn_lm_eval.make.windows import Window
from knn_lm_eval.store.manifest import VALUES, ProjectionRecord
from knn_lm_eval.system.arrays import map_npy
from knn_lm_eval.system.checkpoints import PROGRESS, SavedStates
from knn_lm_eval.system.json_schema import Count, Positive

# Entries [begin, end) that are done.
Run = list[int]
START_ANEW = "delete the folder"
# Who fails leaves this file, so that the others stop at their next chunk.
FAILED = "dump.failed"


class _ShareNotes(TypedDict, total=False):
    runs_done: list[list[Count]] | None


class _DumpNotes(_ShareNotes, total=False):
    key_module: str | None
    fingerprint: dict[str, Any]
    segment_entries: Positive
    segments_left: list[Count]
    sampled: list[list[Count]]
    projection: ProjectionRecord


def dump_states(output: Path, settings: dict[str, Any] | None = None) -> SavedStates:
    """What the unfinished dump in ``output`` has noted; ``settings`` None are those that it was begun with."""
    file, others = output / PROGRESS, ["progress.*"]
    how: dict[str, Any] = {"what": f"The dump in {output}", "instead": START_ANEW, "others": others}
    if settings is None:
        return SavedStates.found(file, notes=_DumpNotes, **how)
    return SavedStates(file, settings, notes=_DumpNotes, **how)


def share_states(output: Path, share: int) -> SavedStates:
    """What the process with that number has noted; of a dump into an index, of the segment with that number."""
    return states_of_share(output / f"progress.{share}.json")


def entries_in_all(output: Path) -> int | None:
    """How many entries the unfinished dump in ``output`` will have; None before the text is tokenized."""
    if dump_states(output, {}).notes().get("runs_done") is None:
        return None
    return len(map_npy(output / VALUES, START_ANEW))


def entries_done(output: Path) -> int:
    """How many keys the unfinished dump in ``output`` has written; 0 before the text is tokenized."""
    return count_entries(runs_written(output))


def runs_written(output: Path) -> list[Run]:
    """All that is done, by ``progress.json`` and by the shares' own files."""
    states = dump_states(output, {})
    return joined([*_checked(states.notes(), states.file), *runs_noted(output.glob("progress.*.json"))])


def runs_noted(files: Iterable[Path]) -> list[Run]:
    """What shares have noted in their own files."""
    return joined(run for file in files for run in _checked(states_of_share(file).notes(), file))


def states_of_share(file: Path) -> SavedStates:
    """What a share has noted in a file of its own."""
    return SavedStates(file, {}, instead=START_ANEW, nested=False, notes=_ShareNotes)


def _checked(notes: dict[str, Any], file: Path) -> list[Run]:
    """The runs that were noted; raises UserError where one is none."""
    runs: list[Run] = list(notes.get("runs_done") or [])
    if wrong := [run for run in runs if len(run) != 2 or run[0] > run[1]]:
        raise UserError(f"{file} is damaged: runs_done has {shortened(wrong[0])}, which is no run; {START_ANEW}.")
    return runs


def joined(runs: Iterable[Run]) -> list[Run]:
    """The same entries in as few runs as can be, in order."""
    result: list[Run] = []
    for begin, end in sorted(runs):
        if result and begin <= result[-1][1]:
            result[-1][1] = max(end, result[-1][1])
        else:
            result.append([begin, end])
    return result


def count_entries(runs: Iterable[Run]) -> int:
    """How many entries are in the runs."""
    return sum(end - begin for begin, end in runs)


def not_done(chunks: Iterable[list[Window]], runs: list[Run]) -> Iterator[list[Window]]:
    """The chunks that are in none of the runs (which are in order)."""
    for chunk in chunks:
        if not is_covered(runs, chunk[0].start, chunk[-1].stop):
            yield chunk


def is_covered(runs: list[Run], begin: int, end: int) -> bool:
    """Whether one of the runs (which are in order) has all of the entries ``[begin, end)``."""
    run = bisect_right(runs, begin, key=lambda run: run[0]) - 1
    return run >= 0 and runs[run][1] >= end


def share_of(chunks: Iterable[list[Window]], entries: int, share: int, shares: int) -> Iterator[list[Window]]:
    """Share number ``share`` of ``chunks``, which hold so many entries: neighbours in the text, about as many each."""
    before = 0
    for chunk in chunks:
        if before * shares // entries == share:
            yield chunk
        before += chunk[-1].stop - chunk[0].start
