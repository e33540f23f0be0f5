"""A stand-in for the Hugging Face Hub on loopback: the few calls that its client makes for a model's repository."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

RESOLVE = re.compile(r"/(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
MODEL = re.compile(r"/api/models/(?P<id>[^/]+/[^/]+?)(?:/(?P<what>revision|preupload|commit)/(?P<revision>[^/]+))?")


@dataclass
class Repo:
    """The commits of a repository, the last one last: sha -> file -> content."""

    private: bool
    commits: dict[str, dict[str, bytes]]

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.head]


@dataclass
class Hub:
    """What was asked of the stand-in, and what it holds."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)  # large files by their SHA-256
    calls: list[str] = field(default_factory=list)
    committing: threading.Event = field(default_factory=threading.Event)
    stalled: threading.Event | None = None  # a commit waits for it

    def add(self, name: str, files: dict[str, bytes], *, private: bool = False) -> Repo:
        repo = self.repos[name] = Repo(private, {commit_id(files): files})
        return repo


def commit_id(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self._path()
        if found := RESOLVE.fullmatch(path):
            repo = self.hub.repos.get(found["id"])
            files = repo.commits.get(found["revision"], repo.files) if repo else {}
            if repo is None or found["file"] not in files:
                return self._answer(404, {"error": "not found"}, {"X-Error-Code": "EntryNotFound"})
            content = files[found["file"]]
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            return self._send(200, content, {"ETag": etag, "X-Repo-Commit": repo.head})
        if found := MODEL.fullmatch(path):
            repo = self.hub.repos.get(found["id"])
            if repo is None:
                return self._answer(404, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"})
            siblings = [{"rfilename": name} for name in repo.files]
            return self._answer(
                200, {"id": found["id"], "modelId": found["id"], "sha": repo.head, "siblings": siblings, "tags": []}
            )
        return self._answer(404, {"error": path})

    def do_PUT(self) -> None:
        content = self._body()
        self.hub.stored[self._path().rpartition("/")[2]] = content
        self._send(200, b"")

    def do_POST(self) -> None:
        path, body = self._path(), self._body()
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.hub.url}/upload/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return self._answer(200, {"transfer": "basic", "objects": objects})
        found = MODEL.fullmatch(path)
        if found and found["what"] == "preupload":
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": files})
        if found and found["what"] == "commit":
            return self._commit(found["id"], [json.loads(line) for line in body.decode().splitlines()])
        return self._answer(404, {"error": path})

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or 'somebody'}/{asked['name']}"
        if name in self.hub.repos:
            return self._answer(409, {"error": "exists", "url": f"{self.hub.url}/{name}"})
        self.hub.add(
            name, {".gitattributes": b""}, private=asked.get("private") or asked.get("visibility") == "private"
        )
        return self._answer(200, {"url": f"{self.hub.url}/{name}"})

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        self.hub.committing.set()
        if self.hub.stalled is not None:
            self.hub.stalled.wait(60)
            return self._answer(503, {"error": "stopped"})
        repo = self.hub.repos[name]
        files = dict(repo.files)
        for line in lines:
            key, value = line["key"], line["value"]
            if key == "header" and value.get("parentCommit", repo.head) != repo.head:
                return self._answer(412, {"error": "another commit came first"})
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        repo.commits[commit_id(files)] = files
        url = f"{self.hub.url}/{name}/commit/{repo.head}"
        return self._answer(200, {"success": True, "commitOid": repo.head, "commitUrl": url})

    def _path(self) -> str:
        self.hub.calls.append(f"{self.command} {self.path}")
        return unquote(urlsplit(self.path).path)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _answer(self, code: int, value: object, headers: dict[str, str] | None = None) -> None:
        self._send(code, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, code: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def hub_standin() -> Iterator[Hub]:
    """The stand-in while the block runs."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
