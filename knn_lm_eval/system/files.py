"""Writing files so that nobody ever sees half of one, and hashing them with a progress bar."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from knn_lm_eval.errors import UserError
from knn_lm_eval.system.caches import CACHE_VARIABLE as CACHE_VARIABLE
from knn_lm_eval.system.caches import cache_root as cache_root
from knn_lm_eval.system.locks import locked

MOST_JSON_BYTES = 2**26
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, one's share of it, or the longest file that may be


def fsync(path: Path) -> None:
    """Make what was written to ``path`` (a file or a folder) survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_file(temporary: Path, final: Path) -> None:
    """Put a finished temporary file in the place of ``final``, all at once."""
    fsync(temporary)
    os.replace(temporary, final)
    fsync(final.parent)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` in UTF-8, all at once."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    replace_file(temporary, path)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` as JSON, all at once."""
    write_text(path, json_text(content))


def json_text(content: dict[str, Any]) -> str:
    """What ``write_json`` writes."""
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises UserError where the file is not one, or too large, too deep or with numbers of too
    many digits for anything that is written here."""
    if (size := path.stat().st_size) > MOST_JSON_BYTES:
        raise UserError(f"{path} is damaged: it has {size:,} bytes, and no file of its kind has {MOST_JSON_BYTES:,}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # JSON's and UTF-8's errors; a number of thousands of digits
        raise UserError(f"{path} is damaged: it is not valid JSON ({error}).") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it should hold a JSON object.")
    return content


def write_npy_header(file: BinaryIO, dtype: Any, shape: tuple[int, ...]) -> None:
    """Write the .npy header of a C-ordered array; its length does not depend on ``shape[0]``."""
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def sha256(path: Path, progress: bool = True) -> str:
    """The hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with (
        open(path, "rb") as file,
        tqdm(
            total=path.stat().st_size,
            unit="B",
            unit_scale=True,
            desc=f"Checksum of {path.name}",
            disable=not progress or path.stat().st_size < 2**28,
        ) as bar,
    ):
        while block := file.read(2**22):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def check_free_space(folder: Path, needed: int, purpose: str) -> None:
    """Raise UserError unless the disk that holds ``folder`` has ``needed`` bytes (and 1 % to spare)."""
    free = shutil.disk_usage(folder).free
    if needed * 1.01 > free:
        raise UserError(
            f"Not enough disk space in {folder}: {purpose} take {needed / 2**30:.2f} GiB and "
            f"{free / 2**30:.2f} GiB are free; free some space or choose another folder."
        )


def check_writable(file: Path) -> None:
    """Raise UserError where ``file`` could not be written, before the work whose result it is; makes its folder."""
    with disk_errors_in(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_dir():
            raise UserError(f"{file} is a folder, and a file is to be written there; choose another name.")
        with tempfile.TemporaryFile(dir=file.parent) as trial:  # without a name, whenever this ends
            trial.write(bytes(2**16))


@contextmanager
def held_output(output: Path, is_folder: bool = False) -> Iterator[None]:
    """Hold a file, or a folder for several, for the work whose results it is to have: by one process at a time.

    Raises UserError, before the work, where it could not be written or another process is at work on it.
    """
    with ExitStack() as held:
        check_writable(output / ".trial" if is_folder else output)
        lock = output / ".lock" if is_folder else output.with_name(f".{output.name}.lock")
        with disk_errors_in(lock.parent):
            held.enter_context(locked(lock, str(output)))
        yield


def check_new_folder(output: str | Path) -> Path:
    """The absolute path of a folder to be made; raises UserError where something is there already."""
    output = Path(os.path.abspath(output))  # "." has no name of its own
    if output.is_symlink() or (output.exists() and (not output.is_dir() or any(output.iterdir()))):
        raise UserError(f"{output} exists already; choose another --output.")
    return output


@contextmanager
def finished_folder(output: Path) -> Iterator[Path]:
    """A hidden folder to write a new ``output`` into, as ``unfinished_folder``, by one process at a time.

    Raises UserError where another process is at work on it, or finished it in the meantime.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with locked(output.with_name(f".{output.name}.lock"), str(output)) as is_left:
        check_new_folder(output)
        with unfinished_folder(output, is_left) as folder:
            yield folder


@contextmanager
def unfinished_folder(output: Path, is_left: bool) -> Iterator[Path]:
    """A hidden folder beside ``output`` to write into, which takes its place when all went well; else it is removed.

    Its name is always the same, so whoever calls this holds a lock; ``is_left`` is what ``locked`` says: whether a
    process that died may have left such folders. Raises UserError where there are some that this program did not leave.
    """
    folder, replaced = output.with_name(f".{output.name}.unfinished"), _replaced(output)
    if is_left and replaced.exists() and not output.exists():
        os.replace(replaced, output)  # between the two steps of replacing it
    for hidden in (folder, replaced):
        if is_left:
            shutil.rmtree(hidden, ignore_errors=True)
        elif hidden.exists():
            raise UserError(f"{hidden} is in the way, and no run that was killed left it; move or delete it.")
    folder.mkdir()
    try:
        yield folder
        for path in folder.rglob("*"):
            if not path.is_symlink():
                fsync(path)
        fsync(folder)
        replace_folder(folder, output)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def replace_folder(finished: Path, final: Path) -> None:
    """Put a finished folder in the place of ``final``; what was there goes when that is done."""
    replaced = _replaced(final)
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(final, replaced)
    os.replace(finished, final)
    fsync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _replaced(final: Path) -> Path:
    """Where what was at ``final`` waits until something else is there."""
    return final.with_name(f".{final.name}.replaced")


@contextmanager
def disk_errors_in(folder: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write (full, read-only, no permission) into a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno is None or isinstance(error, ConnectionError):
            raise
        remedy = "; free some space, or choose another folder" if error.errno in FULL else ""
        raise UserError(f"Cannot write to {folder}: {error.strerror or error}{remedy}.") from error
