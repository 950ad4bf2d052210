"""What the hub of ``helpers.hub_server`` holds, and how it misbehaves."""

from __future__ import annotations

import hashlib
import re
import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

USER, TOKEN = "me", "hf_mine"  # who may write; others' tokens are told by Hub.tokens
LARGE_SUFFIXES = (".bin", ".faiss", ".npy", ".parquet", ".raw", ".safetensors")
LARGE_BYTES = 10_000_000


@dataclass(frozen=True)
class Blob:
    """A file's content, on disk."""

    path: Path
    size: int
    sha256: str
    sha1: str
    large: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.sha1


@dataclass
class Repo:
    """A repository.

    Attributes
    ----------
    kind : ``models`` or ``datasets``.
    gated, private : private ones are their owner's alone; who may read gated ones is in ``readers``.
    branches : the last commit of each.
    commits : each one's files, by path.
    objects : the SHA-256 of each large file that was uploaded, whether or not a commit has it.
    """

    kind: str
    name: str
    private: bool = False
    gated: bool = False
    readers: set[str] = field(default_factory=set)
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    objects: set[str] = field(default_factory=set)

    def commit(self, files: dict[str, Blob], branch: str = "main") -> str:
        """Make these the branch's files."""
        said = f"{self.name} {branch} {len(self.commits)} {sorted((n, b.sha256) for n, b in files.items())}"
        name = hashlib.sha1(said.encode()).hexdigest()
        self.commits[name] = files
        self.objects |= {blob.sha256 for blob in files.values() if blob.large}
        self.branches[branch] = name
        return name

    def resolve(self, revision: str) -> str | None:
        """The commit that a branch or a commit's name means."""
        return self.branches.get(revision, revision if revision in self.commits else None)

    def may_read(self, user: str | None) -> bool:
        return not self.private or user == self.name.partition("/")[0]

    def passes_gate(self, user: str | None) -> bool:
        return not self.gated or user in self.readers or user == self.name.partition("/")[0]


@dataclass
class Fault:
    """What is to go wrong with requests; see ``Hub.fail``."""

    match: str
    status: int | None
    headers: dict[str, str]
    drop_after: int | None
    alter: bool
    delay: float
    times: float


@dataclass(frozen=True)
class Asked:
    """A request that came: where it came to (``hub`` or ``cdn``), what for, and as whom."""

    def __str__(self) -> str:
        return f"{self.at} {self.method} {self.path}"

    at: str
    method: str
    path: str
    range: str | None
    token: str | None
    time: float


class Hub:
    """What the hub holds and how it misbehaves; see ``hub_server``.

    Attributes
    ----------
    url : for ``HF_ENDPOINT``.
    tokens : whose each one is; None where one may read alone.
    read_only : tokens that may not write.
    requests : what was asked so far.
    """

    def __init__(self, folder: Path) -> None:
        self.url = self.cdn_url = ""
        self.repos: dict[tuple[str, str], Repo] = {}
        self.blobs: dict[str, Blob] = {}
        self.tokens, self.read_only = {TOKEN: USER}, set[str]()
        self.requests: list[Asked] = []
        self.part_bytes: int | None = None  # uploads come in parts of so many
        self._faults: list[Fault] = []
        self.upload_parts: dict[tuple[str, int], Path] = {}
        self._uploads = 0
        self._folder = folder
        self.lock = threading.RLock()
        folder.mkdir(parents=True, exist_ok=True)

    def add_model(self, name: str, folder: Path, **how: bool) -> Repo:
        """Publish the files of a folder as a model; ``how`` may say ``private`` or ``gated``."""
        return self._add("models", name, folder, how)

    def add_dataset(self, name: str, folder: Path, **how: bool) -> Repo:
        """Publish the files of a folder as a data set; ``how`` may say ``private`` or ``gated``."""
        return self._add("datasets", name, folder, how)

    def dataset(self, name: str) -> Repo:
        """The data set of that name."""
        return self.repos["datasets", name]

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """What a data set's files hold, by path."""
        repo = self.dataset(name)
        return {path: blob.path.read_bytes() for path, blob in repo.commits[str(repo.resolve(revision))].items()}

    def fail(
        self,
        match: str,
        *,
        status: int | None = None,
        headers: dict[str, str] | None = None,
        drop_after: int | None = None,
        alter: bool = False,
        delay: float = 0.0,
        times: float = 1,
    ) -> None:
        """Let requests go wrong, such as ``hub GET /api/whoami-v2`` or ``cdn GET /SHA256?filename=keys.npy``.

        Parameters
        ----------
        match : a regular expression that is found in those.
        status, headers : answer this instead.
        drop_after : close the connection after so many bytes of the answer's body, or of the upload's.
        alter : send, or keep, a wrong first byte.
        delay : take so many seconds more.
        times : how many requests; infinity for all.
        """
        self._faults.append(Fault(match, status, headers or {}, drop_after, alter, delay, times))

    def heal(self) -> None:
        """Let nothing go wrong any more, and forget what was asked."""
        self._faults.clear()
        self.requests.clear()

    def fault_of(self, request: Asked) -> Fault | None:
        """What is to go wrong with a request; counts it."""
        with self.lock:
            for fault in self._faults:
                if fault.times > 0 and re.search(fault.match, str(request)):
                    fault.times -= 1
                    return fault
        return None

    def asked(self, match: str) -> list[Asked]:
        """The requests that the regular expression is found in, as ``fail`` takes one."""
        return [request for request in self.requests if re.search(match, str(request))]

    def is_large(self, name: str, size: int) -> bool:
        """Whether a file is kept as LFS, and not in git."""
        return name.endswith(LARGE_SUFFIXES) or size > LARGE_BYTES

    def keep(self, name: str, content: bytes | Path) -> Blob:
        """Keep a file's content; ``name`` decides whether it counts as large."""
        with self.lock:
            path = content if isinstance(content, Path) else self._folder / f"{len(self.blobs)}.new"
            if isinstance(content, bytes):
                path.write_bytes(content)
            sha256, size = hashlib.sha256(), path.stat().st_size
            sha1 = hashlib.sha1(f"blob {size}\0".encode())
            with open(path, "rb") as file:
                while block := file.read(2**20):
                    sha256.update(block)
                    sha1.update(block)
            kept = self._folder / sha256.hexdigest()
            if path.parent == self._folder:
                path.replace(kept)
            elif not kept.exists():
                shutil.copyfile(path, kept)
            blob = Blob(kept, size, sha256.hexdigest(), sha1.hexdigest(), self.is_large(name, size))
            self.blobs[blob.sha256] = blob
            return blob

    def new_file(self) -> Path:
        """Where an upload may be put."""
        with self.lock:
            self._uploads += 1
            return self._folder / f"upload-{self._uploads}"

    def environment(self, token: str | None = TOKEN) -> dict[str, str]:
        """The variables by which a process takes this for the hub."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
            "HF_HOME": str(self._folder / "home"),
            "HF_TOKEN": token or "",
        }

    def patch(self, patch: pytest.MonkeyPatch, token: str | None = TOKEN) -> None:
        """Have ``huggingface_hub`` of this process take this for the hub; it read its variables when imported.

        It tries again at once where it would wait.
        """
        from huggingface_hub import constants, file_download, hf_api
        from huggingface_hub.utils import _http

        for name, value in self.environment(token).items():
            patch.setenv(name, value)
        patch.setattr(constants, "ENDPOINT", self.url)
        patch.setattr(hf_api.api, "endpoint", self.url)  # that of the module's own functions
        for module in (constants, file_download):  # earlier releases have it in both
            template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
            patch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        for name, value in (("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
            patch.setattr(constants, name, value)
        patch.setattr(_http, "time", SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None}))
        patch.setattr(constants, "HF_TOKEN_PATH", str(self._folder / "home" / "token"))

    def _add(self, kind: str, name: str, folder: Path, how: dict[str, bool]) -> Repo:
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        repo = self.repos.setdefault((kind, name), Repo(kind, name, **how))
        repo.commit({path.relative_to(folder).as_posix(): self.keep(path.name, path) for path in files})
        return repo
