"""A Hub on loopback, for the real `huggingface_hub` client: repositories, commits, LFS, cards, tokens, in memory.

    with Hub(tokens={"hf_owner": "owner"}) as hub:
        subprocess.run(..., env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": fresh_folder})

Errors are the Hub's own: their status and `X-Error-Code`. What the client asked for is in `hub.requests`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LARGE = (".safetensors", ".bin")  # as in a new repository's .gitattributes: these go through LFS


@dataclass
class File:
    """A file of a commit: its bytes, and whether it is an LFS object."""

    data: bytes
    is_large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def git_id(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    def as_entry(self, path: str) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(self.data), "oid": self.git_id}
        if self.is_large:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.data), "pointerSize": 134}
        return entry


@dataclass
class Repository:
    """Branches name commits; a commit is all its files."""

    owner: str
    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, File]] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, File]) -> str:
        content = repr((branch, len(self.commits), sorted((p, f.git_id) for p, f in files.items())))
        name = hashlib.sha1(content.encode()).hexdigest()
        self.commits[name] = files
        self.branches[branch] = name
        return name


class Refusal(Exception):
    """An answer of the Hub that is an error."""

    def __init__(self, status: int, message: str, code: str | None = None, commit: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.commit = status, message, code, commit


class Hub:
    """The server; a context manager."""

    def __init__(self, tokens: dict[str, str]) -> None:
        self.tokens = tokens
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # LFS, by sha256
        self.requests: list[str] = []
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    def publish(self, repo_id: str, folder: Path) -> None:
        """Put a folder's files there, as if the repository's owner had pushed them."""
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        files = {p.relative_to(folder).as_posix(): File(p.read_bytes(), p.name.endswith(LARGE)) for p in paths}
        self.objects.update({file.sha256: file.data for file in files.values() if file.is_large})
        self.repositories[repo_id] = Repository(repo_id.partition("/")[0])
        self.repositories[repo_id].commit("main", files)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """What a revision holds."""
        repository = self.repositories[repo_id]
        return {p: f.data for p, f in repository.commits[repository.branches.get(revision, revision)].items()}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_hub: Hub

    # --- transport ---

    def _serve(self) -> None:
        url = urlsplit(self.path)
        path, self.query = unquote(url.path), parse_qs(url.query)
        self.body = self._read_body()
        self.server_hub.requests.append(f"{self.command} {path}")
        try:
            for method, pattern, answer in ROUTES:
                if self.command in method and (match := re.fullmatch(pattern, path)):
                    return answer(self, **match.groupdict())
            raise Refusal(404, f"no such route: {self.command} {path}")
        except Refusal as refusal:
            headers = {
                "X-Error-Code": refusal.code,
                "X-Error-Message": refusal.message,
                "X-Repo-Commit": refusal.commit,
            }
            self._send(json.dumps({"error": refusal.message}).encode(), refusal.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, data: bytes, status: int = 200, headers: dict[str, str | None] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, answer: Any, status: int = 200) -> None:
        self._send(json.dumps(answer).encode(), status, {"Content-Type": "application/json"})

    def log_message(self, *_: Any) -> None:
        pass

    # --- who, what, which ---

    def user(self) -> str | None:
        return self.server_hub.tokens.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def repository(self, repo: str, write: bool = False) -> Repository:
        found = self.server_hub.repositories.get(repo)
        if found is None or (found.private and self.user() != found.owner):
            raise Refusal(404 if self.user() else 401, "Repository not found", "RepoNotFound")
        if write and self.user() != found.owner:
            raise Refusal(403, "You have no right to write here")
        return found

    def revision(self, repository: Repository, name: str) -> tuple[str, dict[str, File]]:
        commit = repository.branches.get(name, name)
        if commit not in repository.commits:
            raise Refusal(404, f"Invalid rev id: {name}", "RevisionNotFound")
        return commit, repository.commits[commit]

    # --- answers ---

    def whoami(self) -> None:
        if self.user() is None:
            raise Refusal(401, "Invalid username or password.")
        self._json({"type": "user", "name": self.user(), "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def create(self) -> None:
        wanted = json.loads(self.body)
        owner = self.user()
        if owner is None:
            raise Refusal(401, "Invalid username or password.")
        if (wanted.get("organization") or owner) != owner:
            raise Refusal(
                403, f"You don't have the rights to create a model under the namespace {wanted['organization']}"
            )
        repo = f"{owner}/{wanted['name']}"
        answer = {"url": f"{self.server_hub.url}/{repo}", "name": repo, "id": repo}
        if repo in self.server_hub.repositories:
            return self._json({**answer, "error": "You already created this model repo"}, 409)
        made = self.server_hub.repositories[repo] = Repository(
            owner, "private" in (wanted.get("visibility"), wanted.get("private") and "private")
        )
        made.commit("main", {".gitattributes": File(b"*.safetensors filter=lfs\n", False)})
        return self._json(answer)

    def validate_card(self) -> None:
        """The Hub's rules, as far as they concern a model's card."""
        content = json.loads(self.body)["content"]
        front = re.match(r"---\r?\n(.*?)\n---", content, re.DOTALL)
        data = (yaml.safe_load(front.group(1)) if front else None) or {}
        bases, languages = _as_list(data.get("base_model")), _as_list(data.get("language"))
        results = [result for model in data.get("model-index") or [] for result in model["results"]]
        errors = [
            *(f'"base_model" with value "{b}" is not valid.' for b in bases if not re.fullmatch(_ID, b)),
            *(
                f'"language" {x!r} must be an ISO 639 code.'
                for x in languages
                if not re.fullmatch("[a-z]{2,3}", str(x))
            ),
            *(f'"tags" {tag!r} must be a short string' for tag in data.get("tags") or [] if len(str(tag)) > 96),
            *(
                '"model-index" needs task, dataset, metrics'
                for r in results
                if not {"task", "dataset", "metrics"} <= r.keys()
            ),
        ]
        found = [{"message": message} for message in errors]
        self._json({"errors": found, "warnings": []}, 400 if found else 200)

    def preupload(self, repo: str, revision: str) -> None:
        _, files = self.revision(self.repository(repo, write=True), revision)
        answer = []
        for file in json.loads(self.body)["files"]:
            known = files.get(file["path"])
            oid = None if known is None else known.sha256 if known.is_large else known.git_id
            mode = "lfs" if file["path"].endswith(LARGE) else "regular"
            answer.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": answer})

    def lfs_batch(self, repo: str) -> None:
        self.repository(repo, write=True)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            known = wanted["oid"] in self.server_hub.objects
            upload = {"upload": {"href": f"{self.server_hub.url}/lfs/{wanted['oid']}"}}
            verify = {"verify": {"href": f"{self.server_hub.url}/lfs-verify"}}
            objects.append({**wanted, **({} if known else {"actions": {**upload, **verify}})})
        self._json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "the content is not what was announced")
        self.server_hub.objects[oid] = self.body
        self._send(b"")

    def lfs_verify(self) -> None:
        wanted = json.loads(self.body)
        if len(self.server_hub.objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise Refusal(404, "no such object")
        self._json({})

    def commit(self, repo: str, revision: str) -> None:
        repository = self.repository(repo, write=True)
        _, files = self.revision(repository, revision)
        files = dict(files)
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif item["key"] == "lfsFile":
                files[value["path"]] = File(self.server_hub.objects[value["oid"]], True)
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        commit = repository.commit(revision, files)
        url = f"{self.server_hub.url}/{repo}/commit/{commit}"
        self._json({"success": True, "commitOid": commit, "commitUrl": url})

    def branch(self, repo: str, revision: str) -> None:
        repository = self.repository(repo, write=True)
        if revision in repository.branches:
            raise Refusal(409, "Reference already exists")
        start = (json.loads(self.body or b"{}")).get("startingPoint") or "main"
        repository.branches[revision], _ = self.revision(repository, start)
        self._json({})

    def information(self, repo: str, revision: str = "main") -> None:
        repository = self.repository(repo)
        commit, files = self.revision(repository, revision)
        siblings = [{"rfilename": path, "size": len(file.data)} for path, file in files.items()]
        answer = {"_id": repo, "id": repo, "modelId": repo, "sha": commit, "private": repository.private, "tags": []}
        self._json({**answer, "siblings": siblings, "downloads": 0, "likes": 0})

    def tree(self, repo: str, revision: str, folder: str = "") -> None:
        _, files = self.revision(self.repository(repo), revision)
        prefix = f"{folder}/" if folder else ""
        inside = {path: file for path, file in files.items() if path.startswith(prefix)}
        if folder and not inside:
            raise Refusal(404, f"{folder} does not exist", "EntryNotFound")
        entries, folders = [], set()
        for path, file in inside.items():
            above = path[len(prefix) :].split("/")[:-1]
            folders.update(prefix + "/".join(above[: i + 1]) for i in range(len(above)))
            if not above or "true" in (value.lower() for value in self.query.get("recursive", ())):
                entries.append(file.as_entry(path))
        self._json([{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders] + entries)

    def paths_info(self, repo: str, revision: str) -> None:
        _, files = self.revision(self.repository(repo), revision)
        asked = json.loads(self.body)["paths"]
        self._json([files[path].as_entry(path) for path in asked if path in files])

    def resolve(self, repo: str, revision: str, file: str) -> None:
        commit, files = self.revision(self.repository(repo), revision)
        if file not in files:
            raise Refusal(404, "Entry not found", "EntryNotFound", commit)
        found = files[file]
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if not found.is_large:
            return self._send(found.data, headers={**headers, "ETag": f'"{found.git_id}"'})
        linked = {"X-Linked-Size": str(len(found.data)), "X-Linked-Etag": f'"{found.sha256}"'}
        # On another host, as the Hub's own: to its own host the client would follow, and miss the headers above.
        place = f"{self.server_hub.url.replace('127.0.0.1', 'localhost')}/cdn/{found.sha256}"
        return self._send(b"", 302, {**headers, **linked, "Location": place})

    def content(self, oid: str) -> None:
        data = self.server_hub.objects[oid]
        self._send(data, headers={"ETag": f'"{oid}"'})


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


_ID = r"[\w.-]+(/[\w.-]+)?"
_REPO, _REVISION = r"(?P<repo>[\w.-]+/[\w.-]+)", r"(?P<revision>[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate_card),
    ("POST", f"/api/models/{_REPO}/preupload/{_REVISION}", _Handler.preupload),
    ("POST", f"/api/models/{_REPO}/commit/{_REVISION}", _Handler.commit),
    ("POST", f"/api/models/{_REPO}/branch/{_REVISION}", _Handler.branch),
    ("POST", f"/api/models/{_REPO}/paths-info/{_REVISION}", _Handler.paths_info),
    ("GET", f"/api/models/{_REPO}/tree/{_REVISION}", _Handler.tree),
    ("GET", f"/api/models/{_REPO}/tree/{_REVISION}/(?P<folder>.+)", _Handler.tree),
    ("GET", f"/api/models/{_REPO}/revision/{_REVISION}", _Handler.information),
    ("GET", f"/api/models/{_REPO}", _Handler.information),
    ("POST", f"/{_REPO}\\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", _Handler.lfs_upload),
    ("POST", "/lfs-verify", _Handler.lfs_verify),
    ("GET HEAD", f"/{_REPO}/resolve/{_REVISION}/(?P<file>.+)", _Handler.resolve),
    ("GET HEAD", "/cdn/(?P<oid>[0-9a-f]{64})", _Handler.content),
]
