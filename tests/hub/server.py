"""A small server on the loopback that speaks as much of the hub's API as downloads and uploads of models need."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

COMMIT = "c0" * 20
LARGE = 2**16  # bytes; such files are uploaded on their own, as LFS has it


@dataclass
class Hub:
    """Repositories by name, {file: content}, and what the server does: `faults` of a repository are HTTP codes and
    error codes of the hub; it waits `delay` seconds before it answers, and breaks off files after `cut` bytes."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    faults: dict[str, tuple[int, str]] = field(default_factory=dict)
    token: str | None = None  # that uploads need
    delay: float = 0.0
    cut: int | None = None
    address: str = ""
    requests: list[str] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)


class Handler(BaseHTTPRequestHandler):
    """Answers one request; `hub` is the state."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:  # noqa: N802
        self._read()

    def do_HEAD(self) -> None:  # noqa: N802
        self._read()

    def _read(self) -> None:
        path = self._begin()
        if path.startswith("api/models/"):
            owner, name, *rest = path.removeprefix("api/models/").split("/")
            files = self._files(f"{owner}/{name}")
            if files is None:
                return
            if rest[:1] == ["tree"]:
                tree = [{"type": "file", "path": f, "size": len(x), "oid": _digest(x)} for f, x in files.items()]
                self._send(200, json.dumps(tree).encode())
                return
            if rest[:1] == ["revision"] and rest[1:] not in (["main"], [COMMIT]):
                self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
                return
            siblings = [{"rfilename": file} for file in files]
            self._send(200, json.dumps({"id": f"{owner}/{name}", "sha": COMMIT, "siblings": siblings}).encode())
            return
        owner, name, _, _, *rest = [*path.split("/"), *[""] * 4][: max(4, path.count("/") + 1)]
        files = self._files(f"{owner}/{name}")
        if files is None:
            return
        content = files.get("/".join(rest))
        if content is None:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        self._send(200, content, {"ETag": f'"{_digest(content)}"', "X-Repo-Commit": COMMIT}, cut=self.hub.cut)

    def do_PUT(self) -> None:  # noqa: N802
        path = self._begin()
        self.hub.objects[path.rpartition("/")[2]] = self._body()
        self._send(200, b"")

    def do_POST(self) -> None:  # noqa: N802
        path, body = self._begin(), self._body()
        if self.hub.token is not None and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self._send(401, b"{}", {"X-Error-Message": "Invalid username or password."})
            return
        if path == "api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            self.hub.repositories.setdefault(name, {})
            self._send(200, json.dumps({"url": f"{self.hub.address}/{name}", "id": name}).encode())
        elif "/preupload/" in path:
            found = [
                {"path": f["path"], "uploadMode": "lfs" if f["size"] > LARGE else "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            self._send(200, json.dumps({"files": found}).encode())
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.hub.address}/objects/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            self._send(200, json.dumps({"transfer": "basic", "objects": objects}).encode())
        elif "/commit/" in path:
            name = "/".join(path.split("/")[2:4])
            for line in body.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    self.hub.repositories[name][value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    self.hub.repositories[name][value["path"]] = self.hub.objects[value["oid"]]
            answer = {"success": True, "commitOid": COMMIT, "commitUrl": f"{self.hub.address}/{name}/commit/{COMMIT}"}
            self._send(200, json.dumps(answer).encode())
        else:
            self._send(200, b"{}")

    def _begin(self) -> str:
        time.sleep(self.hub.delay)
        self.hub.requests.append(f"{self.command} {self.path}")
        return unquote(urlparse(self.path).path).lstrip("/")

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _files(self, name: str) -> dict[str, bytes] | None:
        """A repository, or None after an error was sent."""
        code, kind = self.hub.faults.get(name, (404, "RepoNotFound"))
        if name in self.hub.faults or name not in self.hub.repositories:
            self._send(code, b'{"error": "no"}', {"X-Error-Code": kind} if kind else {})
            return None
        return self.hub.repositories[name]

    def _send(self, code: int, content: bytes, headers: dict[str, str] | None = None, cut: int | None = None) -> None:
        self.send_response(code)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:cut])
        if cut is not None:
            self.close_connection = True


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def serving() -> Iterator[Hub]:
    """Yields a hub that answers at its `address`."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
