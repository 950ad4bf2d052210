"""Publishing a datastore as a data set of the Hugging Face hub: what of it, with which card, in one commit.

What is large is uploaded first, file by file; what is there already is not uploaded again, so that an interrupted push
goes on. Then one commit takes all of it in: whoever fetches the store meanwhile has the old one or the new one, whole.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from knn_lm_eval.errors import UserError, counted, printable, shortened
from knn_lm_eval.store.card import dataset_card
from knn_lm_eval.store.change import one_change_of
from knn_lm_eval.store.manifest import MANIFEST, FileRecord, Manifest
from knn_lm_eval.store.refusals import LOGIN, one_line
from knn_lm_eval.store.whole_store import verify_store
from knn_lm_eval.system.files import json_text, read_json
from knn_lm_eval.system.seals import check_seal, sealed

logger = logging.getLogger(__name__)

CARD, ATTRIBUTES, PARAMS = "README.md", ".gitattributes", "params.json"
REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
LARGE = 10_000_000  # bytes; these go one by one, so that Ctrl-C ends an upload at once
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}")
KEPT = "what was uploaded is kept, the same command goes on"


@dataclass(frozen=True)
class Package:
    """What is published of a datastore.

    Attributes
    ----------
    folder, repo, revision : where it lies, and what it is to be on the hub.
    files : the files that go there as they are, by their paths in the folder.
    manifest, card : the content of the two files that are made for it.
    """

    folder: Path
    repo: str
    revision: str | None
    files: dict[str, FileRecord]
    manifest: bytes
    card: str

    @property
    def address(self) -> str:
        """What ``datastore=`` is to be."""
        return hub_address(self.repo, self.revision)

    @property
    def sizes(self) -> dict[str, int]:
        """The bytes of each file on the hub."""
        made = {CARD: len(self.card.encode()), MANIFEST: len(self.manifest)}
        return made | {name: record["bytes"] for name, record in self.files.items()}


def hub_address(repo: str, revision: str | None) -> str:
    """The address of a data set that is a datastore."""
    return f"hf://datasets/{repo}{'' if revision is None else f'@{revision}'}"


def prepare_push(
    folder: str | Path,
    repo: str,
    license: str,
    *,
    model: str | None = None,
    revision: str | None = None,
    read_all: bool = True,
) -> Package:
    """Verify a datastore, and make of it what is published; nothing is asked of a network.

    Parameters
    ----------
    repo : the data set, ``USER/NAME``.
    license : the hub's name of the licence under which the text's tokens and keys may be given away.
    model : the LM's id on the hub, for the card; None takes what the manifest says.
    revision : the branch; None is the hub's default, ``main``.
    read_all : read also those files that were verified before and did not change since.

    Raises
    ------
    UserError
        Where there is no datastore, or it is not whole, or a name is none.
    """
    folder = Path(os.path.abspath(folder))
    if not REPO.fullmatch(repo):
        raise UserError(f"{shortened(repo)} names no data set on the hub; it should be USER/NAME.")
    if not LICENSE.fullmatch(license := license.lower()):
        raise UserError(f"--license {shortened(license)} is none that the hub knows; give one such as cc-by-4.0.")
    verdicts = verify_store(folder, read_all)
    wrong = [verdict.fault for verdict in verdicts if verdict.fault is not None]
    if wrong:
        raise UserError(f"The datastore {folder} is not whole, and nothing was pushed: {wrong[0]}")
    whole = (folder / MANIFEST).read_bytes()
    recorded = Manifest.of_json(check_seal(folder / MANIFEST, json.loads(whole), "push again"), folder / MANIFEST)
    manifest = _published_manifest(folder, recorded)
    files = manifest.files | manifest.derived
    for name in (verdict.name for verdict in verdicts):
        if name not in files and name.endswith((".faiss", "clusters.json")):
            logger.warning("%s stays here: the manifest does not record it.", folder / name)
    card = dataset_card(
        manifest,
        hub_address(repo, revision),
        license,
        size=sum(record["bytes"] for record in files.values()),
        indexes={Path(name).stem: read_json(folder / name) for name in files if _is_index(folder, name)},
        clusters={
            name.split("/")[1]: int(read_json(folder / name)["num_clusters"])
            for name in files
            if re.fullmatch(r"clusters/[^/]+/clusters\.json", name)
        },
        settings=read_json(folder / PARAMS)["settings"] if (folder / PARAMS).is_file() else None,
        model=model,
    )
    if manifest != recorded:
        whole = json_text(sealed(manifest.to_json())).encode()
    return Package(folder, repo, revision, files, whole, card)


def push_datastore(
    folder: str | Path,
    repo: str,
    license: str,
    *,
    model: str | None = None,
    private: bool = False,
    revision: str | None = None,
) -> str:
    """Publish the datastore in ``folder`` as the data set ``repo``; its address.

    What is not named here is as for ``prepare_push``.

    Parameters
    ----------
    private : who may not see the hub's private data sets cannot fetch it; one that is public already is refused.

    Raises
    ------
    UserError
        As ``prepare_push``; and where nobody is logged in, the hub refuses it or is not reached, or something else is
        there. What was uploaded is not uploaded again.
    """
    check_login()
    return push(prepare_push(folder, repo, license, model=model, revision=revision), private)


def push(package: Package, private: bool = False) -> str:
    """Upload and commit what was prepared; see ``push_datastore``."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    api = check_login()
    repo: dict[str, Any] = {"repo_id": package.repo, "repo_type": "dataset"}
    with _hub_errors(package.repo), _unchanged(package.folder):
        _check_card(package.card)  # before the upload, which may take hours
        api.create_repo(**repo, private=True if private else None, exist_ok=True)
        if package.revision is not None:
            api.create_branch(**repo, branch=package.revision, exist_ok=True)
        there = api.repo_info(**repo, revision=package.revision)
        if private and not there.private:
            raise UserError(
                f"{package.repo} is there already, and public; make it private in its settings on the hub, or push to "
                f"another name."
            )
        gone = _replaced(api, package, {sibling.rfilename for sibling in there.siblings or []}, there.sha)
        made = {MANIFEST: package.manifest, CARD: package.card.encode()}
        files = [CommitOperationAdd(name, package.folder / name) for name in package.files]
        for file in files:
            if package.files[file.path_in_repo]["bytes"] >= LARGE:
                api.preupload_lfs_files(**repo, additions=[file], revision=package.revision)
        commit = api.create_commit(
            **repo,
            operations=[
                *files,
                *(CommitOperationAdd(name, content) for name, content in made.items()),
                *(CommitOperationDelete(name) for name in gone),
            ],
            commit_message=f"A datastore of {counted(len(package.files), 'file')}",
            revision=package.revision,
            parent_commit=there.sha,
        )
        _check_arrived(
            package, {file.path: file for file in api.list_repo_tree(**repo, recursive=True, revision=commit.oid)}
        )
    return package.address


def _check_card(card: str) -> None:
    """Raise UserError where the hub does not take the card: of what it says, the licence alone is the user's."""
    from huggingface_hub import DatasetCard

    try:
        DatasetCard(card).validate(repo_type="dataset")
    except ValueError as error:
        raise UserError(f"The hub does not take the card: {one_line(str(error))}; give another --license.") from error
    except Exception as error:  # earlier releases ask huggingface.co, wherever the hub is; the commit asks again
        logger.debug("The card is not checked: %s", error)


@contextmanager
def _unchanged(folder: Path) -> Iterator[None]:
    """Let nobody append to the store or take entries from it meanwhile, where this may lock it."""
    with one_change_of(folder) if os.access(folder, os.W_OK) else nullcontext():
        yield


def _check_arrived(package: Package, there: dict[str, Any]) -> None:
    """Raise UserError where the hub has other files now than those that were verified."""
    for name, size in package.sizes.items():
        checksum = package.files[name]["sha256"] if name in package.files else None
        large = getattr(there.get(name), "lfs", None)  # of small files the hub says no SHA-256
        if getattr(there.get(name), "size", None) != size or (large and checksum not in (None, large.sha256)):
            raise UserError(
                f"{name} on the hub is not what was verified here: it was changed while it was pushed; push again."
            )


def _published_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """The manifest without what is recorded and was deleted since; raises UserError where a part of it is left."""
    is_there = {name: (folder / name).is_file() for name in manifest.derived}
    for name in [name for name in is_there if not is_there[name]]:
        left = [other for other in is_there if is_there[other] and _belongs_to(other) == _belongs_to(name)]
        if left:
            raise UserError(
                f"The datastore {folder} is not whole, and nothing was pushed: {name} is missing beside {left[0]}; "
                f"make or fetch it again, or delete all of it."
            )
    return replace(manifest, derived={name: record for name, record in manifest.derived.items() if is_there[name]})


def _belongs_to(name: str) -> str:
    """The index, the clustering or the suffix array that a file is a part of."""
    return name.rpartition("/")[0] or re.sub(r"(?:\.\d{3})?\.(?:faiss|json)$", "", name)


def _is_index(folder: Path, name: str) -> bool:
    return "/" not in name and name.endswith(".json") and "factory" in read_json(folder / name)


def _replaced(api: Any, package: Package, names: set[str], commit: str) -> list[str]:
    """The files of a store that is there which the new one has not; raises UserError where something else is there."""
    others = sorted(names - {CARD, ATTRIBUTES})
    if not others:
        return []
    if MANIFEST not in names:
        raise UserError(
            f"{package.repo} is there already and holds no datastore ({', '.join(map(printable, others[:3]))}"
            f"{', ...' if others[3:] else ''}); push to another name."
        )
    there = api.hf_hub_download(package.repo, MANIFEST, repo_type="dataset", revision=commit)
    try:
        content = read_json(Path(there))
        before = Manifest.of_json(content, f"The {MANIFEST} of {package.repo}")
    except UserError as error:
        logger.warning("%s It is replaced, and other files that it may have named stay.", error)
        return []
    if Path(there).read_bytes() != package.manifest:
        logger.warning("%s holds a datastore of %s entries, which is replaced.", package.repo, f"{before.count:,}")
    return sorted(names & (before.files.keys() | before.derived.keys()) - package.files.keys())


def check_login() -> Any:
    """The hub's client; raises UserError where nobody is logged in."""
    from huggingface_hub import HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise UserError("Cannot push to the hub: HF_HUB_OFFLINE is set; unset it.")
    if get_token() is None:
        raise UserError(f"Cannot push to the hub: nobody is logged in; {LOGIN} with a token that may write.")
    return HfApi()


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """Turn what the hub's client raises into a UserError: its errors are those of other libraries, by its release."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"Cannot push to {repo}: {_sentence(error)}.") from error


def _sentence(error: BaseException) -> str:
    """What went wrong on the hub, and what to do about it."""
    chain: list[BaseException] = [error]
    while (deeper := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(deeper)
    of_system = [each.strerror for each in chain if isinstance(each, OSError) and each.strerror]
    reason = one_line(of_system[-1] if of_system else str(error) or type(error).__name__).rstrip(".")
    if CARD in reason:
        return f"{reason}; give another --license"
    response = next((found for each in chain if (found := getattr(each, "response", None)) is not None), None)
    status = getattr(response, "status_code", None)
    message = one_line(response.headers.get("X-Error-Message") or "") if response is not None else ""
    said = f"the hub says {status}{f' {message}' if message else ''}"
    if status == 401:
        return f"{said}: it does not take your token; {LOGIN} anew"
    if status == 403:
        return f"{said}: the name must be yours or your organisation's, and the token one that may write to it"
    if status in (409, 412):
        return f"{said}: somebody else has changed it meanwhile; push again, {KEPT}"
    if status == 429:
        return f"{said}: too many requests; wait some minutes, {KEPT}"
    if status is not None:
        return f"{said}; {KEPT}"
    return f"{reason}; {KEPT}"
