"""A sample of a text's keys, read before the text: random batches of windows.

Batches, for one gives the same bytes whenever it is read: its keys stay in a file until the text itself is read, and
are taken over then. More of them are read than are trained on, so that what is trained on comes from many places of
the text; as they are not read again, that takes no more of the LM's time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from tqdm import tqdm

from knn_lm_eval.make.dump_progress import Run, count_entries, is_covered, joined
from knn_lm_eval.make.key_file import KeyFile
from knn_lm_eval.make.key_reading import KeyReader, entries_in
from knn_lm_eval.make.windows import Window, WindowSettings, batches, chunks, cut_windows
from knn_lm_eval.store.key_stream import keys_of
from knn_lm_eval.system.checkpoints import SavedStates
from knn_lm_eval.system.sampling import draw_items

PLACES = 256  # batches to read, where that is no more than the two limits that follow
MOST_READ = 4  # times the keys that are wanted
MOST_OF_TEXT = 1 / 3


@dataclass(frozen=True)
class DrawnBatches:
    """Batches of windows, whose entries are numbered one after the other: the sample's rows.

    Attributes
    ----------
    batches : in text order.
    """

    batches: list[list[Window]]

    def __len__(self) -> int:
        """How many entries they have."""
        return self.first_rows[-1]

    @cached_property
    def first_rows(self) -> list[int]:
        """The first row of each batch, and behind them how many rows there are."""
        return [0, *np.cumsum([entries_in(batch) for batch in self.batches]).tolist()]

    @cached_property
    def entries(self) -> np.ndarray:
        """The entry of each row, int64 ``[rows]``."""
        return np.concatenate([np.arange(window.start, window.stop) for batch in self.batches for window in batch])

    def save(self, states: SavedStates, name: str) -> None:
        """Keep them."""
        windows = [
            (-1 if window.context is None else window.context, window.start, window.stop)
            for batch in self.batches
            for window in batch
        ]
        lengths = [len(batch) for batch in self.batches]
        states.save(name, windows=np.array(windows, np.int64), lengths=np.array(lengths, np.int64))

    @classmethod
    def load(cls, states: SavedStates, name: str) -> DrawnBatches | None:
        """What was kept; None where nothing was."""
        if not (saved := states.load(name)):
            return None
        windows = iter(saved["windows"].tolist())

        def take(length: int) -> list[Window]:
            some = (next(windows) for _ in range(length))
            return [Window(None if context < 0 else context, start, stop) for context, start, stop in some]

        return cls([take(length) for length in saved["lengths"].tolist()])


def draw_batches(
    document_starts: np.ndarray, count: int, settings: WindowSettings, wanted: int, seed: int
) -> DrawnBatches:
    """Random batches, as a dump reads them, with about so many entries as ``keys_to_read`` says.

    Parameters
    ----------
    document_starts, count : the text's, as ``cut_windows`` takes them.
    wanted : entries to train on and to hold out.
    """

    def of_the_text() -> Iterator[list[Window]]:
        for chunk in chunks(cut_windows(document_starts, count, settings), settings):
            yield from batches(chunk, settings)

    def how_many(there: int) -> int:
        return -(-keys_to_read(count, there, wanted) * there // count)

    return DrawnBatches(draw_items(of_the_text, how_many, seed))


def keys_to_read(count: int, there: int, wanted: int) -> int:
    """How many keys of a text of ``count`` entries in ``there`` batches are read, where so many are wanted."""
    many = min(count * PLACES // there, MOST_READ * wanted, int(count * MOST_OF_TEXT))
    return min(count, max(wanted, many))


class TextSample:
    """The keys of drawn batches, in a file beside the dump.

    Parameters
    ----------
    folder : the dump's.
    drawn : the batches.
    dimension : numbers per key.
    """

    def __init__(self, folder: Path, drawn: DrawnBatches, dimension: int) -> None:
        self.drawn = drawn
        self.file = KeyFile(folder / "sample.npy.part", len(drawn), dimension)

    @cached_property
    def _number_of(self) -> dict[int, int]:
        """The number of each drawn batch, by its first window's first entry."""
        return {batch[0].start: number for number, batch in enumerate(self.drawn.batches)}

    @cached_property
    def _kept(self) -> np.ndarray:
        return self.file.read()

    def read_share(
        self, reader: KeyReader, share: int, shares: int, done: list[Run], noted: SavedStates, failed: Path
    ) -> None:
        """Read one of ``shares`` parts of the batches that are not in the rows ``done``, and note each.

        Where this part was begun before, it goes on.

        Parameters
        ----------
        noted : where this part notes what it did.
        failed : the file that another part leaves where it fails: then this one ends.
        """
        rows = self.drawn.first_rows
        todo = [number for number, row in enumerate(rows[:-1]) if not is_covered(done, row, rows[number + 1])]
        todo = todo[len(todo) * share // shares : len(todo) * (share + 1) // shares]
        runs: list[Run] = noted.notes().get("runs_done", [])
        with tqdm(
            total=sum(rows[number + 1] - rows[number] for number in todo),
            initial=count_entries(runs),
            unit=" tokens",
            unit_scale=True,
            desc="Reading a sample",
            disable=share != 0,
        ) as bar:
            for number in todo:
                begin, end = rows[number], rows[number + 1]
                if is_covered(runs, begin, end):
                    continue
                if failed.exists():
                    return
                self.file.write(begin, reader.of_batch(self.drawn.batches[number]))
                runs = joined([*runs, [begin, end]])
                noted.note(runs_done=runs)
                bar.update(end - begin)

    def of_batch(self, batch: list[Window]) -> np.ndarray | None:
        """The keys of a drawn batch's entries, float16 ``[entries, dimension]``; None where it was not drawn."""
        if (number := self._number_of.get(batch[0].start)) is None:
            return None
        return self._kept[self.drawn.first_rows[number] : self.drawn.first_rows[number + 1]]

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """The keys of some rows, float32 ``[len(rows), dimension]``."""
        return keys_of(self._kept, rows)

    def divided(self, train: int, hold_out: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Random rows to train on, and others to hold out; of a small sample both, as far as need be.

        Returns
        -------
        int64 ``[train or fewer]`` and ``[hold_out or fewer]``, each by ascending entry.
        """
        order = np.random.default_rng([seed, 1]).permutation(len(self.drawn))
        train_rows, held_out_rows = order[:train], order[max(0, len(order) - hold_out) :]
        entries = self.drawn.entries
        return train_rows[np.argsort(entries[train_rows])], held_out_rows[np.argsort(entries[held_out_rows])]
