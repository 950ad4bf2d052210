"""What the hub of ``helpers.hub_server`` answers to each request of its clients."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from helpers.hub_contents import Blob, Repo
from helpers.hub_requests import Refusal, Request

LICENSES = ("apache-2.0", "cc-by-4.0", "cc-by-sa-4.0", "mit", "other", "unknown")  # some of those that the hub knows
DATE = "2026-01-01T00:00:00.000Z"


class Handler(Request):
    """Answers requests; what answers which is found in ``ROUTES``."""

    def route(self) -> None:
        for method, at, pattern, work in ROUTES:
            found = pattern.fullmatch(self.asked)
            if found and self.server.at == at and self.command in method:
                return work(self, **found.groupdict())
        raise Refusal(404, "", f"{self.command} {self.asked} is not known here")

    def repo(self, kind: str | None, name: str) -> Repo:
        """The repository, if who asks may know of it."""
        repo = self.hub.repos.get(((kind or "models").rstrip("/"), name))
        if repo is None or not repo.may_read(self.user):
            status = 401 if self.user is None else 404  # as the hub does, so as not to tell what is private
            raise Refusal(status, "RepoNotFound", "Repository not found")
        return repo

    def files(self, repo: Repo, revision: str) -> tuple[str, dict[str, Blob]]:
        commit = repo.resolve(revision)
        if commit is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, repo.commits[commit]

    def writable(self, kind: str, name: str) -> Repo:
        repo = self.repo(kind, name)
        if self.user is None:
            raise Refusal(401, "", "Invalid username or password.")
        if not self.may_write or self.user != name.partition("/")[0]:
            raise Refusal(403, "", "you must use a write token to upload to a repository.")
        return repo

    # -------------------------------------------------------------------------------------------- reading

    def whoami(self) -> None:
        if self.user is None:
            raise Refusal(401, "", "Invalid username or password.")
        role = "write" if self.may_write else "read"
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}
        self.answer({"type": "user", "name": self.user, "fullname": self.user, "orgs": [], "auth": auth})

    def info(self, kind: str, name: str, revision: str = "main") -> None:
        repo = self.repo(kind, name)
        commit, files = self.files(repo, revision)
        said = {
            **{"_id": "0" * 24, "id": name, "modelId": name, "author": name.partition("/")[0], "sha": commit},
            **{"private": repo.private, "gated": "manual" if repo.gated else False, "disabled": False, "tags": []},
            **{"downloads": 0, "likes": 0, "lastModified": DATE, "createdAt": DATE, "xetEnabled": False},
            "siblings": [{"rfilename": path} for path in sorted(files)],
        }
        self.answer(said)

    def tree(self, kind: str, name: str, revision: str, path: str | None = None) -> None:
        repo = self.repo(kind, name)
        commit, files = self.files(repo, revision)
        under = f"{path.strip('/')}/" if path and path.strip("/") else ""
        listed: dict[str, Any] = {}
        for inner, blob in sorted(files.items()):
            if not inner.startswith(under):
                continue
            folders = inner.removeprefix(under).split("/")[:-1]
            deep = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
            for depth in range(1, len(folders) + 1 if deep else min(len(folders), 1) + 1):
                folder = under + "/".join(folders[:depth])
                listed.setdefault(folder, {"type": "directory", "oid": "0" * 40, "size": 0, "path": folder})
            if deep or not folders:
                listed[inner] = self.entry(inner, blob)
        if under and not listed:
            raise Refusal(404, "EntryNotFound", f"{path} does not exist on {revision}", {"X-Repo-Commit": commit})
        self.answer(list(listed.values()))

    def entry(self, path: str, blob: Blob) -> dict[str, Any]:
        large = {"oid": blob.sha256, "size": blob.size, "pointerSize": 134}
        committed = {"id": "0" * 40, "title": "test", "date": DATE}
        said = {"type": "file", "oid": blob.sha1, "size": blob.size, "path": path, "lastCommit": committed}
        return said | ({"lfs": large} if blob.large else {})

    def paths_info(self, kind: str, name: str, revision: str) -> None:
        fields = self.fields()
        _, files = self.files(self.repo(kind, name), revision)
        self.answer([self.entry(path, files[path]) for path in fields.get("paths", []) if path in files])

    def refs(self, kind: str, name: str) -> None:
        repo = self.repo(kind, name)
        branches = [
            {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": commit}
            for branch, commit in repo.branches.items()
        ]
        self.answer({"branches": branches, "converts": [], "tags": [], "pullRequests": []})

    def resolve(self, kind: str | None, name: str, revision: str, path: str) -> None:
        repo = self.repo(kind, name)
        if not repo.passes_gate(self.user):
            raise Refusal(403 if self.user else 401, "GatedRepo", f"Access to {name} is restricted.")
        commit, files = self.files(repo, revision)
        if path not in files:
            raise Refusal(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        blob = files[path]
        if blob.large:
            target, status = f"{self.hub.cdn_url}/{blob.sha256}?filename={quote(Path(path).name)}", 302
        else:
            target, status = f"/api/resolve-cache/{(kind or 'models').rstrip('/')}/{name}/{commit}/{path}", 307
        linked = {"X-Linked-Size": str(blob.size), "X-Linked-ETag": f'"{blob.etag}"', "X-Repo-Commit": commit}
        self.answer({}, status, linked | {"Location": target})

    def resolve_cache(self, kind: str, name: str, revision: str, path: str) -> None:
        commit, files = self.files(self.repo(kind, name), revision)
        self.send_blob(files[path], {"X-Repo-Commit": commit})

    def content(self, sha256: str) -> None:
        if sha256 not in self.hub.blobs:
            raise Refusal(404, "", "no such object")
        self.send_blob(self.hub.blobs[sha256], {})

    # -------------------------------------------------------------------------------------------- writing

    def create(self) -> None:
        fields = self.fields()
        if self.user is None:
            raise Refusal(401, "", "Invalid username or password.")
        owner = fields.get("organization") or self.user
        name, kind = f"{owner}/{fields['name']}", f"{fields.get('type') or 'model'}s"
        if not self.may_write or owner != self.user:
            raise Refusal(403, "", f"You don't have the rights to create a {kind[:-1]} under the namespace {owner!r}.")
        said = {"url": f"{self.hub.url}/{'' if kind == 'models' else kind + '/'}{name}", "name": name, "id": "0" * 24}
        if (kind, name) in self.hub.repos:
            return self.answer(said | {"error": "You already created this repo"}, 409)
        is_private = bool(fields.get("private")) or fields.get("visibility") == "private"
        repo = self.hub.repos[kind, name] = Repo(kind, name, private=is_private)
        repo.commit({".gitattributes": self.hub.keep(".gitattributes", b"*.npy filter=lfs diff=lfs merge=lfs -text\n")})
        self.answer(said)

    def branch(self, kind: str, name: str, branch: str) -> None:
        fields, repo = self.fields(), self.writable(kind, name)
        if branch in repo.branches:
            raise Refusal(409, "", "Reference already exists")
        repo.branches[branch], _ = self.files(repo, fields.get("startingPoint", "main"))
        self.answer({})

    def validate_yaml(self) -> None:
        head = re.match(r"---\n(.*?)\n---\n", self.fields()["content"], re.DOTALL)
        said = (yaml.safe_load(head[1]) if head else {}).get("license")
        if said is not None and said not in LICENSES:  # without any there is a warning, on which nobody acts
            message = f'"license" must be one of {", ".join(LICENSES)}'
            plain = self.headers["Accept"] == "text/plain"
            content = message if plain else {"error": message, "errors": [{"message": message}], "warnings": []}
            return self.answer(content, 400)
        self.answer({"errors": [], "warnings": []})

    def preupload(self, kind: str, name: str, revision: str) -> None:
        fields, repo = self.fields(), self.writable(kind, name)
        _, files = self.files(repo, revision)
        modes = []
        for file in fields["files"]:
            path = file["path"]
            is_large = self.hub.is_large(path, file["size"])
            there = {"oid": files[path].etag} if path in files else {}
            modes.append({"path": path, "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False} | there)
        self.answer({"files": modes})

    def batch(self, kind: str | None, name: str) -> None:
        fields, repo = self.fields(), self.writable(kind or "models", name)
        objects = []
        for each in fields["objects"]:
            oid, size = each["oid"], each["size"]
            href, header = f"{self.hub.cdn_url}/upload/{repo.kind}/{name}/{oid}", {}
            if self.hub.part_bytes is not None and size > self.hub.part_bytes:
                header = {"chunk_size": str(self.hub.part_bytes)}
                for number in range(1, -(-size // self.hub.part_bytes) + 1):
                    header[f"{number:05d}"] = f"{href}/{number}"
                href = f"{href}/finish"
            said = {"oid": oid, "size": size, "authenticated": True}
            if oid not in repo.objects:
                verify = {"href": f"{self.hub.url}/verify", "header": {}}
                said["actions"] = {"upload": {"href": href, "header": header}, "verify": verify}
            objects.append(said)
        self.answer({"transfer": "basic", "objects": objects})

    def upload(self, kind: str, name: str, oid: str, part: str | None = None) -> None:
        target = self.hub.new_file()
        with open(target, "wb") as file:
            for block in self.blocks():
                if self.fault.alter and not file.tell():
                    block = bytes([block[0] ^ 1]) + block[1:]
                file.write(block)
        if part is None:
            self.keep_upload(self.hub.repos[kind, name], oid, target)
        else:
            self.hub.upload_parts[oid, int(part)] = target
        self.answer({}, 200, {"ETag": f'"{oid}-{part}"'})

    def finish_upload(self, kind: str, name: str, oid: str) -> None:
        target = self.hub.new_file()
        with open(target, "wb") as file:
            for part in sorted(int(part["partNumber"]) for part in self.fields()["parts"]):
                file.write(self.hub.upload_parts.pop((oid, part)).read_bytes())
        self.keep_upload(self.hub.repos[kind, name], oid, target)
        self.answer({})

    def keep_upload(self, repo: Repo, oid: str, file: Path) -> None:
        if self.hub.keep(".bin", file).sha256 != oid:
            raise Refusal(400, "", "the content's SHA-256 is not its name")
        repo.objects.add(oid)

    def verify(self) -> None:
        fields = self.fields()
        blob = self.hub.blobs.get(fields["oid"])
        if blob is None or blob.size != fields["size"]:
            raise Refusal(404, "", "no such object")
        self.answer({})

    def commit(self, kind: str, name: str, revision: str) -> None:
        lines = [json.loads(line) for line in self.body().splitlines()]
        repo = self.writable(kind, name)
        with self.hub.lock:
            parent, files = self.files(repo, revision)
            files = dict(files)
            for line in lines:
                said = line["value"]
                if line["key"] == "header" and said.get("parentCommit", parent) != parent:
                    raise Refusal(412, "", "A commit has happened since. Please refresh and try again.")
                elif line["key"] == "file":
                    files[said["path"]] = self.hub.keep(said["path"], base64.b64decode(said["content"]))
                elif line["key"] == "lfsFile":
                    if said["oid"] not in repo.objects:
                        raise Refusal(400, "", f"the content of {said['path']} was not uploaded")
                    files[said["path"]] = self.hub.blobs[said["oid"]]
                elif line["key"] == "deletedFile":
                    del files[said["path"]]
            oid = repo.commit(files, revision)
        self.answer({"success": True, "commitUrl": f"{self.hub.url}/{kind}/{name}/commit/{oid}", "commitOid": oid})


READ, SEND = ("GET", "HEAD"), ("POST",)
REPO, ANY_REPO = r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)", r"/(?P<kind>datasets/)?(?P<name>[^/]+/[^/]+)"
CACHED = REPO.replace("/api", "/api/resolve-cache")
UPLOADED = r"(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)/(?P<oid>[0-9a-f]{64})"
REVISION, FILE = r"/(?P<revision>refs/[^/]+/[^/]+|[^/]+)", r"/(?P<path>.+)"
# Of each: methods, where, the path, and what answers.
ROUTES = [
    (methods, at, re.compile(path), answer)
    for methods, at, path, answer in (
        (READ, "hub", "/api/whoami-v2", Handler.whoami),
        (READ, "hub", REPO, Handler.info),
        (READ, "hub", f"{REPO}/revision{REVISION}", Handler.info),
        (READ, "hub", f"{REPO}/tree{REVISION}(?:{FILE})?", Handler.tree),
        (SEND, "hub", f"{REPO}/paths-info{REVISION}", Handler.paths_info),
        (READ, "hub", f"{REPO}/refs", Handler.refs),
        (READ, "hub", f"{ANY_REPO}/resolve{REVISION}{FILE}", Handler.resolve),
        (
            READ,
            "hub",
            f"{CACHED}{REVISION}{FILE}",
            Handler.resolve_cache,
        ),
        (READ, "cdn", "/(?P<sha256>[0-9a-f]{64})", Handler.content),
        (SEND, "hub", "/api/repos/create", Handler.create),
        (SEND, "hub", f"{REPO}/branch/(?P<branch>.+)", Handler.branch),
        (SEND, "hub", "/api/validate-yaml", Handler.validate_yaml),
        (SEND, "hub", f"{REPO}/preupload{REVISION}", Handler.preupload),
        (SEND, "hub", rf"{ANY_REPO}\.git/info/lfs/objects/batch", Handler.batch),
        (("PUT",), "cdn", rf"/upload/{UPLOADED}(?:/(?P<part>\d+))?", Handler.upload),
        (SEND, "cdn", f"/upload/{UPLOADED}/finish", Handler.finish_upload),
        (SEND, "hub", "/verify", Handler.verify),
        (SEND, "hub", f"{REPO}/commit{REVISION}", Handler.commit),
    )
]
