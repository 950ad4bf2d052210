"""Index files that nobody vouches for: a child process reads each first, since faiss's readers may die of one.

A checksum says that a file is as its maker left it. A file without one (an imported index, one of a store that records
none) may hold anything, and faiss believes the sizes in it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from knn_lm_eval.errors import UserError
from knn_lm_eval.system.file_contents import known, note_tried

# What the child does, with the file and how many entries its numbers may name, or nothing, as its arguments.
CHILD = """
import sys
from pathlib import Path
from knn_lm_eval.errors import UserError
from knn_lm_eval.search.index_reading import try_index
try:
    try_index(Path(sys.argv[1]), int(sys.argv[2]) if sys.argv[2] else None)
except UserError as error:
    sys.exit(str(error))
"""


def try_first(path: Path, entries: int | None = None) -> None:
    """Have a child process read and search the index file ``path``, unless one did before and it did not change.

    Parameters
    ----------
    entries : how many entries the file may name; None where that is not known.

    Raises
    ------
    UserError
        Where faiss cannot read it, or the child died of it.
    """
    contents = known(path)
    if contents is not None and contents.tried:
        return
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(path.absolute()), "" if entries is None else str(entries)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    said = child.stderr.strip().splitlines()
    if child.returncode == 1 and said and said[-1].startswith("The index "):
        raise UserError(said[-1])
    if child.returncode:
        how = signal.Signals(-child.returncode).name if child.returncode < 0 else f"status {child.returncode}"
        raise UserError(
            f"The index {path} is damaged or hostile: the process that read it first ended with {how}; build it or "
            f"copy it again."
        )
    if contents is not None:
        note_tried(path, contents)
