"""Fetching datastores from the network: a folder behind an https address, or in a data set of the Hugging Face hub.

An address is ``https://host/path/of/folder`` or ``hf://datasets/user/name[@revision][/folder]``. The folder's
manifest lists its files with sizes and checksums, so nothing else needs to be listed. The manifest comes last, so a
folder with a manifest is complete and is used without asking the network again. How a file comes is in
``knn_lm_eval.store.download``.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict
from urllib.parse import unquote, urlsplit, urlunsplit

from knn_lm_eval.errors import UserError, shortened
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.download import check_address, download, forget_part, hub_checksum, locate, pinned
from knn_lm_eval.store.manifest import FORMAT, MANIFEST, FileRecord, Manifest
from knn_lm_eval.system.file_contents import contents_of
from knn_lm_eval.system.files import (
    MOST_JSON_BYTES,
    cache_root,
    check_free_space,
    disk_errors_in,
    read_json,
    replace_file,
    write_json,
)
from knn_lm_eval.system.json_schema import check_json
from knn_lm_eval.system.locks import DAY, locked
from knn_lm_eval.system.seals import check_seal

logger = logging.getLogger(__name__)

ORIGIN = "fetched.json"
PLAIN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")
PUBLISHED_SUFFIXES = (".npy", ".index", ".indexed", ".pkl")


class _Addresses(TypedDict):
    addresses: list[str]


class _OriginJSON(_Addresses, total=False):
    sha256: str


def is_address(datastore: str | os.PathLike) -> bool:
    """Whether ``datastore`` is an address and not a folder."""
    return str(datastore).startswith(("https://", "http://", "hf://"))


def open_datastore(datastore: str | os.PathLike, verify: str = "auto") -> Datastore:
    """Open the datastore in a folder, or fetch it from an address into the cache first; ``verify`` as there."""
    return Datastore.open(fetched_folder(datastore), verify)


def fetched_folder(datastore: str | os.PathLike) -> Path:
    """The folder of a datastore, which is fetched first where it is an address."""
    return fetch_datastore(str(datastore)) if is_address(datastore) else Path(datastore)


def fetch_datastore(address: str, output: str | Path | None = None, repair: bool = False) -> Path:
    """Fetch the datastore at ``address`` with its indexes and clusterings; one that is there already is not asked for.

    Parameters
    ----------
    output : the folder; None is one of its own in the cache, ``$KNN_LM_EVAL_CACHE`` or ~/.cache/knn_lm_eval.
    repair : verify what is there already, and fetch anew what is missing or damaged.

    Returns
    -------
    The folder.

    Raises
    ------
    UserError
        Where the address does not answer or holds no datastore, the manifest names files outside of the folder, a
        file is not what the manifest says, or the disk is too small. What came stays, and the next run goes on.
    """
    check_address(address)
    folder = cache_folder(address) if output is None else Path(output)
    with _claimed(folder, [address]):
        if not (folder / MANIFEST).is_file():
            pending = folder / f"{MANIFEST}.new"
            content, pinned_address = _fetch_manifest(address, pending)
            _fetch_missing(pinned_address, folder, _list_files(content, address))
            replace_file(pending, folder / MANIFEST)
        elif repair:
            _repair(address, folder)
    return folder


def _repair(address: str, folder: Path) -> None:
    """Fetch anew what is missing or damaged of a store that was fetched; says where the address has another now."""
    pending = folder / f"{MANIFEST}.new"
    try:
        Manifest.read(folder)
        here = _list_files(read_json(folder / MANIFEST), address)
    except UserError as error:
        logger.warning("%s", error)
        content, pinned_address = _fetch_manifest(address, pending)
        _fetch_missing(pinned_address, folder, _list_files(content, address))
        replace_file(pending, folder / MANIFEST)
        return
    wrong = {name: record for name, record in here.items() if not _is_there(folder / name, record)}
    try:
        content, pinned_address = _fetch_manifest(address, pending)
        there = _list_files(content, address)
    except UserError:
        if wrong:
            raise
        return  # without a network, what is here is what there is
    finally:
        pending.unlink(missing_ok=True)
    own = Manifest.read(folder).files
    changed = any(there.get(name) != here[name] for name in own)
    gone = [name for name in wrong if there.get(name) != wrong[name]]
    if gone:
        raise UserError(
            f"{folder / gone[0]} is damaged or missing, and {address} has not what was recorded for it; make it again, "
            f"or fetch what is there now into another --output."
        )
    _fetch_missing(pinned_address, folder, wrong)
    if changed:
        logger.warning(
            "%s has changed since it was fetched into %s; to have what is there now, fetch into another --output.",
            address,
            folder,
        )


def _fetch_manifest(address: str, pending: Path) -> tuple[dict[str, Any], str]:
    """Put the manifest there is now at ``pending``; returns its content, and the address of what is there with it."""
    pending.unlink(missing_ok=True)  # of a run that was interrupted: there may be a newer one
    forget_part(pending)
    try:
        commit = download(locate(address, MANIFEST), pending, most=MOST_JSON_BYTES)
    except FileNotFoundError as error:
        raise UserError(
            f"There is no datastore at {address}: it has no {MANIFEST}; for the files of other programs give "
            f"fetch_datastore the address of each file."
        ) from error
    return check_seal(pending, read_json(pending), "fetch it again"), pinned(address, commit)


def _fetch_missing(address: str, folder: Path, files: dict[str, FileRecord]) -> None:
    """Download the files that are not there, or not as they should be."""
    missing = {name: record for name, record in files.items() if not _is_there(folder / name, record)}
    for name in files.keys() - missing.keys():
        forget_part(folder / name)  # of a run that ended between the file's name and the part's last trace
    parts = (folder / f"{name}.part" for name in missing)
    have = sum(part.stat().st_size for part in parts if part.is_file())
    needed = sum(record["bytes"] for record in missing.values())
    check_free_space(folder, needed - have, f"the files of {address}")
    for name, record in missing.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            download(locate(address, name), folder / name, record["bytes"], record["sha256"])
        except FileNotFoundError as error:
            raise UserError(f"The datastore at {address} is incomplete: {name} is missing there.") from error


def fetch_files(addresses: Sequence[str], output: str | Path | None = None) -> Path:
    """Fetch single files, such as another program's datastore, into one folder, to be imported from there.

    Parameters
    ----------
    output : the folder; None is one of its own in the cache.

    Raises
    ------
    UserError
        As for ``fetch_datastore``. Only the hub tells checksums; elsewhere the size is all that is checked.
    """
    for address in addresses:
        check_address(address)
    folder = cache_folder(" ".join(addresses)) if output is None else Path(output)
    names = [unquote(urlsplit(address).path.rsplit("/", 1)[-1]) for address in addresses]
    for name in names:
        if not PLAIN_NAME.fullmatch(name) or names.count(name) > 1:
            raise UserError(f"{name!r} cannot name a file of its own in {folder}; leave it out.")
    with _claimed(folder, list(addresses)):
        for address, name in zip(addresses, names, strict=True):
            if (folder / name).is_file():
                forget_part(folder / name)
            else:
                remote = locate(address)
                try:
                    download(remote, folder / name, None, hub_checksum(address, remote))
                except FileNotFoundError as error:
                    raise UserError(f"There is no file at {address}.") from error
    return folder


def cache_folder(address: str) -> Path:
    """Where what comes from ``address`` lies in the cache."""
    readable = re.sub(r"[^A-Za-z0-9.-]+", "_", address.partition("://")[2].partition("?")[0])[:80].strip("_.")
    return cache_root() / "datastores" / f"{readable}-{hashlib.sha256(address.encode()).hexdigest()[:12]}"


@contextmanager
def _claimed(folder: Path, addresses: list[str]) -> Iterator[None]:
    """Hold the folder for what comes from there; other processes of the same evaluation wait.

    Raises UserError where something else lies in it. What it says of itself stays when all has come, so it is no
    unfinished state as in ``knn_lm_eval.system.checkpoints``.
    """
    with disk_errors_in(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / ".lock", str(folder), seconds=DAY):
            if (folder / ORIGIN).is_file():
                _check_origin(folder, addresses)
            elif any(path.name not in (".lock", f"{ORIGIN}.tmp") for path in folder.iterdir()):
                raise UserError(f"{folder} holds files that were not fetched; choose another --output.")
            else:
                write_json(folder / ORIGIN, _origin(addresses))
            yield


def _origin(addresses: list[str]) -> dict[str, Any]:
    """What a folder says of where it came from: it may be published, so it keeps no query (``?token=...``), only a
    checksum to recognise the addresses by."""
    shown = [urlunsplit(urlsplit(address)._replace(query="", fragment="")) for address in addresses]
    checksum = hashlib.sha256(" ".join(addresses).encode()).hexdigest()
    return {"addresses": shown} if shown == addresses else {"addresses": shown, "sha256": checksum}


def _check_origin(folder: Path, addresses: list[str]) -> None:
    """Raise UserError where the folder came from elsewhere."""
    said = read_json(folder / ORIGIN)
    check_json(said, _OriginJSON, folder / ORIGIN, "choose another --output")
    if said["addresses"] == addresses and said != _origin(addresses):
        write_json(folder / ORIGIN, _origin(addresses))  # an earlier version's, with its queries
    elif said != _origin(addresses):
        others = shortened(" ".join(said["addresses"]), 300)
        raise UserError(f"{folder} holds what was fetched from {others}; choose another --output.")


def _list_files(content: dict[str, Any], address: str) -> dict[str, FileRecord]:
    """What the manifest says of each file of the datastore, by its path in the folder."""
    if content.get("format") != FORMAT:
        raise UserError(f"The {MANIFEST} at {address} is not that of a {FORMAT}.")
    manifest = Manifest.of_json(content, f"The {MANIFEST} at {address}")
    files = manifest.files | manifest.derived
    for name in files:
        if not all(PLAIN_NAME.fullmatch(part) for part in name.split("/")) or name in (MANIFEST, ORIGIN):
            raise UserError(
                f"The {MANIFEST} at {address} names the file {name!r}, which no datastore has; not fetched."
            )
    return files


def _is_there(path: Path, record: FileRecord) -> bool:
    return path.is_file() and path.stat().st_size == record["bytes"] and contents_of(path).sha256 == record["sha256"]
