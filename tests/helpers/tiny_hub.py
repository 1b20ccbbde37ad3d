"""A hub's cache folder as huggingface_hub fills it, and a server on the loopback address that answers as a hub does.

The server knows what creating a repository, a commit of small files and a download ask for, and nothing else. The real
hub is never contacted.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

A, B = "a" * 40, "b" * 40
"""Commits."""


def fill(cache: Path, name: str, folder: Path, commit: str = A, ref: str | None = "main") -> Path:
    """Put a folder into a hub's cache: blobs, links to them in snapshots/COMMIT, and the branch or tag that names it."""
    root = cache / f"models--{name.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        blob = root / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(file.read_bytes())
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    if ref is not None:
        (root / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (root / "refs" / ref).write_text(commit)
    return snapshot


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of a hub that is not reached, in a folder that is the current one."""
    monkeypatch.chdir(tmp_path)
    offline(monkeypatch, tmp_path / "cache")
    return tmp_path / "cache"


def offline(patch: pytest.MonkeyPatch, cache: Path) -> None:
    """HF_HUB_CACHE=cache HF_HUB_OFFLINE=1, for a huggingface_hub that is imported already; no token."""
    patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    patch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(cache / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        patch.delenv(name, raising=False)


@dataclass
class Hub:
    """What a served hub holds and has been asked.

    files: content by repository and path. made: bodies of create_repo. commits: (repository, branch, message, paths).
    asked: method and path of every request. tokens: by request, "" for none. deny: the status of every answer.
    public: what it says of every repository.
    """

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    made: list[dict[str, Any]] = field(default_factory=list)
    commits: list[tuple[str, str, str, list[str]]] = field(default_factory=list)
    branches: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    tokens: dict[str, str] = field(default_factory=dict)
    deny: int = 0
    public: bool = False
    url: str = ""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, body: Any = None, status: int = 200, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _begun(self) -> tuple[list[str], bytes] | None:
        """(the path's parts, the body); None where the request has been refused."""
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.asked.append(f"{self.command} {path}")
        self.hub.tokens[self.hub.asked[-1]] = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.hub.deny:
            self._answer({"error": "refused"}, self.hub.deny)
            return None
        return path.split("/"), body

    def do_POST(self) -> None:
        begun = self._begun()
        if begun is None:
            return
        match begun:
            case ["api", "repos", "create"], body:
                told = json.loads(body)
                self.hub.made.append(told)
                name = f"{told['organization']}/{told['name']}"
                self.hub.files.setdefault(name, {})
                self._answer({"url": f"{self.hub.url}/{name}"})
            case ["api", "validate-yaml"], _:
                self._answer({"errors": [], "warnings": []})
            case ["api", "models", _, _, "branch", branch], _:
                self.hub.branches.append(branch)
                self._answer({})
            case ["api", "models", _, _, "preupload", _], body:
                modes = [f | {"uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]
                self._answer({"files": modes})
            case ["api", "models", org, name, "commit", branch], body:
                lines = [json.loads(line) for line in body.splitlines()]
                new = {v["value"]["path"]: base64.b64decode(v["value"]["content"]) for v in lines if v["key"] == "file"}
                self.hub.files[f"{org}/{name}"].update(new)
                self.hub.commits.append((f"{org}/{name}", branch, lines[0]["value"]["summary"], sorted(new)))
                self._answer({"commitUrl": f"{self.hub.url}/{org}/{name}/commit/{B}", "commitOid": B})
            case _:
                self._answer({"error": "unknown"}, 404)

    def do_GET(self) -> None:
        begun = self._begun()
        if begun is None:
            return
        match begun[0]:
            case ["api", "models", org, name] | ["api", "models", org, name, "revision", _] if (
                f"{org}/{name}" in self.hub.files
            ):
                private = not self.hub.public
                self._answer({"id": f"{org}/{name}", "sha": B, "siblings": [], "private": private})
            case ["api", "models", org, name, "tree", commit] if commit == B:
                files = self.hub.files[f"{org}/{name}"]
                self._answer([{"type": "file", "path": p, "size": len(d), "oid": _oid(d)} for p, d in files.items()])
            case [org, name, "resolve", commit, *path] if commit == B:
                data = self.hub.files[f"{org}/{name}"]["/".join(path)]
                self._answer(data, ETag=f'"{_oid(data)}"', X_Repo_Commit=B)
            case _:
                self._answer({"error": "unknown"}, 404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextmanager
def served(patch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """A hub on the loopback address in a thread of this process, which huggingface_hub then takes for its own."""
    from huggingface_hub.utils import close_session

    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    offline(patch, cache)
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    patch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    files = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", files)
    patch.setattr("huggingface_hub.hf_api.api.endpoint", hub.url)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        patch.delenv(name, raising=False)
    close_session()
    try:
        yield hub
    finally:
        close_session()
        server.shutdown()
        server.server_close()
        thread.join()
