"""Verifying all that lies in a datastore's folder: its own files, and what was made from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from knn_lm_eval.errors import UserError
from knn_lm_eval.store.clusters import METADATA, Clusters, cluster_names
from knn_lm_eval.store.datastore import Datastore, check_size, own_files
from knn_lm_eval.store.index_files import IndexFiles, find_parts, index_names
from knn_lm_eval.store.manifest import MANIFEST, FileRecord, Manifest
from knn_lm_eval.store.suffixes import FOLDER as SUFFIXES
from knn_lm_eval.store.suffixes import METADATA as OF_SUFFIXES
from knn_lm_eval.store.suffixes import has_suffixes, open_suffixes
from knn_lm_eval.store.verification import Expected, verify_files
from knn_lm_eval.system.files import read_json
from knn_lm_eval.system.seals import check_seal, is_sealed

OWN_CHECKSUM, NO_OWN_CHECKSUM = "its own checksum", "no checksum of its own"
SEALED = ("params.json",)


@dataclass(frozen=True)
class Verdict:
    """What came of verifying a file, or what several files are together.

    Attributes
    ----------
    name : the file's path in the folder.
    bytes : its size; None where it is missing.
    how : how it was verified.
    fault : what is wrong, in one sentence; None where nothing is.
    """

    name: str
    bytes: int | None
    how: str
    fault: str | None


def verify_store(folder: Path, read_all: bool = True) -> list[Verdict]:
    """Verify each file of the datastore in ``folder`` that something is known of.

    Parameters
    ----------
    read_all : read also what was verified before and did not change since.

    Raises
    ------
    UserError
        Where there is no datastore.
    """
    if not folder.is_dir() or not (folder / MANIFEST).is_file():
        Manifest.read(folder)  # says what there is instead
    verdicts = [_sealed(folder, MANIFEST)]
    if verdicts[0].fault is None:
        manifest = Manifest.read(folder)
        verdicts += _recorded(folder, own_files(folder, manifest), manifest.files, read_all)
        derived = {name: record for name, record in manifest.derived.items() if (folder / name).exists()}
        expected = [Expected(folder / name, record.get("sha256")) for name, record in derived.items()]
        verdicts += _recorded(folder, expected, derived, read_all)
        verdicts += [_sealed(folder, name) for name in SEALED if (folder / name).is_file()]
        verdicts += _codes(folder, read_all)
        if all(verdict.fault is None for verdict in verdicts):
            verdicts += _together(folder)
    return verdicts


def _recorded(folder: Path, expected: list[Expected], records: dict[str, FileRecord], read_all: bool) -> list[Verdict]:
    """What came of files that the manifest records."""
    faults: dict[Path, str] = {}
    for file in expected:
        try:
            check_size(folder, file.path.relative_to(folder).as_posix(), records)
        except UserError as error:
            faults[file.path] = str(error)
    whole = [file for file in expected if file.path not in faults]
    found = {finding.file.path: finding for finding in verify_files(whole, [f.path for f in whole] if read_all else [])}
    verdicts = []
    for path in (file.path for file in expected):
        size = path.stat().st_size if path.is_file() else None
        how, fault = (found[path].how, found[path].fault) if path in found else ("size", faults[path])
        verdicts.append(Verdict(path.relative_to(folder).as_posix(), size, how, fault))
    return verdicts


def _sealed(folder: Path, name: str) -> Verdict:
    """What came of a JSON file that says a checksum of its own content, or none."""
    path, how = folder / name, NO_OWN_CHECKSUM
    try:
        content = read_json(path)
        how = OWN_CHECKSUM if is_sealed(content) else NO_OWN_CHECKSUM
        check_seal(path, content, "fetch it, or make it, again")
        if name == MANIFEST:
            Manifest.read(folder)
    except UserError as error:
        return Verdict(name, path.stat().st_size, how, str(error))
    return Verdict(name, path.stat().st_size, how, None)


def _codes(folder: Path, read_all: bool) -> Iterator[Verdict]:
    """What came of the codes that lie beside indexes; each folder says the checksums of its files."""
    for said in sorted([*folder.glob("*.codes/codes.json"), *folder.glob("*.scan/scan.json")]):
        verdict = _sealed(folder, said.relative_to(folder).as_posix())
        yield verdict
        if verdict.fault is None:
            checksums = read_json(said).get("files", {})
            files = [Expected(said.parent / name, str(checksum)) for name, checksum in checksums.items()]
            there = [file for file in files if file.path.is_file()]
            for file in files:
                if file not in there:
                    name = file.path.relative_to(folder).as_posix()
                    yield Verdict(name, None, "size", f"{file.path} is missing; delete the folder {said.parent}.")
            for finding in verify_files(there, [file.path for file in there] if read_all else []):
                name = finding.file.path.relative_to(folder).as_posix()
                yield Verdict(name, finding.file.path.stat().st_size, finding.how, finding.fault)


def _together(folder: Path) -> Iterator[Verdict]:
    """What is wrong with files that are as recorded, or that nobody recorded: they do not fit each other."""
    store = Datastore.open(folder)  # all was read
    opened: dict[str, Callable[[], object]] = {
        IndexFiles(folder, name).metadata.name: partial(find_parts, store, name) for name in index_names(store)
    }
    opened |= {f"clusters/{name}/{METADATA}": partial(Clusters.open, store, name) for name in cluster_names(store)}
    if has_suffixes(store):
        opened[f"{SUFFIXES}/{OF_SUFFIXES}"] = partial(open_suffixes, store)
    recorded = store.manifest.files.keys() | store.manifest.derived.keys()
    for name, open_it in opened.items():
        try:
            open_it()
        except UserError as error:
            yield Verdict(name, (folder / name).stat().st_size, "opened", str(error))
    for name, how in store.verification.of_files(folder).items():
        if name not in recorded:
            yield Verdict(name, (folder / name).stat().st_size, how, None)
