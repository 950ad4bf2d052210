"""Names that users give and that become files: one rule, and what is taken already."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from knn_lm_eval.errors import UserError
from knn_lm_eval.system.files import read_json

# What lies in a store's folder beside indexes and clusterings, without its ending. A disk may not tell Keys from keys.
RESERVED = {
    *("manifest", "params", "progress", "fetched", "failed"),
    *("keys", "values", "document_starts", "weights", "removed", "lm_log_probs", "clusters", "suffixes"),
}
MOST_BYTES = 100  # endings come behind it, and file systems take 255
# "index.000" is the first part of the index "index"; the others are files that are under way.
TAKEN_ENDINGS = re.compile(r"\.(\d{3}|part|tmp|new|codes|faiss|json|npy|progress|lock)$")


def check_plain_name(name: str, what: str) -> str:
    """The name, where it names something in a folder and nothing outside of it; else UserError.

    Parameters
    ----------
    what : what it is to name, for the sentence, such as "an index".
    """
    name = str(name)
    is_one_part = name not in ("", ".", "..") and not re.search(r"[/\\\x00-\x1f\x7f]", name)
    if not is_one_part or Path(name).name != name:
        raise UserError(f"{name!r} cannot name {what}: it should be a plain folder name.")
    return name


def check_new_name(name: str, what: str) -> str:
    """As ``check_plain_name``, for something that is to be made: the name must not be another file's, either."""
    name = check_plain_name(name, what)
    if name.casefold() in RESERVED or TAKEN_ENDINGS.search(name.casefold()) or name.startswith("."):
        raise UserError(
            f"{name!r} cannot name {what}: a file of the datastore is, or may be, called so; choose another."
        )
    if len(name.encode("utf-8", "surrogatepass")) > MOST_BYTES:
        raise UserError(f"{name[:20]!r}... cannot name {what}: it is longer than {MOST_BYTES} bytes; choose another.")
    return name


def check_output(output: Path) -> None:
    """Raise UserError where ``output``, a file that is no part of a store, would overwrite a store's own file.

    Files are told apart without their last ending: what writes ``x.json`` often writes ``x.csv`` and pictures beside
    it, and an index lies in several files of one name.
    """
    output = output.expanduser().resolve()
    for folder in output.parents[:3]:
        manifest = folder / "manifest.json"
        if not manifest.is_file():
            continue
        names: set[str] = set(RESERVED)
        with suppress(UserError):  # a damaged one: other files that it may name are not known
            content = read_json(manifest)
            for part in ("files", "derived"):
                names |= set(content.get(part) or {})
        taken = {Path(name).with_suffix("").as_posix().casefold() for name in names} | RESERVED
        if output.relative_to(folder).with_suffix("").as_posix().casefold() in taken:
            raise UserError(
                f"{output} would overwrite a file of the datastore {folder}, or be taken for one; give another output."
            )
