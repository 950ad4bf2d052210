"""A benchmark's cells spread over several processes or machines; those that may share a pass stay together.

Who does which cells follows from the matrix alone, and not from what is finished.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import NamedTuple

from knn_lm_eval.benchmark.cell import Cell
from knn_lm_eval.benchmark.matrix import Matrix
from knn_lm_eval.errors import UserError, shortened


class Share(NamedTuple):
    """The ``number``-th of so many shares, from 1 on."""

    number: int
    shares: int

    def __str__(self) -> str:
        return f"{self.number}/{self.shares}"


def parse_share(text: str) -> Share:
    """Reads ``3/16``; raises UserError where that is no share."""
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text.strip(), re.ASCII)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError(f"{shortened(text)} is no share of the cells; give its number and how many there are: 3/16.")
    return Share(int(found[1]), int(found[2]))


def passes(cells: Sequence[Cell]) -> list[list[Cell]]:
    """The cells of one model and one task, which may share the reading of its texts; in the matrix's order."""
    return [list(group) for _, group in groupby(cells, lambda cell: (cell.model, cell.task))]


def share_of(matrix: Matrix, share: Share) -> Matrix:
    """The matrix with one share's cells, of which there may be none where there are more shares than cells.

    Passes are halved, the largest first, only as long as there are fewer pieces than shares. The pieces then go, the
    largest first, to the share that has the fewest cells.
    """
    numbers = {str(cell.folder): number for number, cell in enumerate(matrix.cells)}
    pieces = passes(matrix.cells)
    while len(pieces) < min(share.shares, len(matrix.cells)):
        largest = max(range(len(pieces)), key=lambda place: len(pieces[place]))
        middle = (len(pieces[largest]) + 1) // 2
        pieces[largest : largest + 1] = [pieces[largest][:middle], pieces[largest][middle:]]
    sizes = [0] * min(share.shares, len(pieces))
    chosen: list[Cell] = []
    for piece in sorted(pieces, key=len, reverse=True):
        least = sizes.index(min(sizes))
        sizes[least] += len(piece)
        if least == share.number - 1:
            chosen += piece
    return replace(matrix, cells=sorted(chosen, key=lambda cell: numbers[str(cell.folder)]))
