"""A stand-in for the Hugging Face Hub on loopback: as much of its HTTP API as the real client asks for when it uploads."""

from __future__ import annotations

import base64
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

TOKEN = "hf_fakeTokenOfATest0123456789"
OWNER = "tester"


@dataclass
class Commit:
    message: str
    files: dict[str, bytes]


@dataclass
class StandInHub:
    """A context; `endpoint` is what HF_ENDPOINT must be."""

    private: dict[str, bool] = field(default_factory=dict)
    """Repositories."""
    commits: list[Commit] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    """Whatever came, headers apart."""
    failures: list[int] = field(default_factory=list)
    """Status of the next commits; used up."""
    gate: threading.Event = field(default_factory=threading.Event)
    """Commits wait for it."""
    blobs: dict[str, bytes] = field(default_factory=dict)

    def __enter__(self) -> StandInHub:
        self.gate.set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                answer(self, hub)

            do_POST = do_PUT = do_GET

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.gate.set()
        self.server.shutdown()
        self.server.server_close()

    def files(self) -> dict[str, bytes]:
        """The newest of each file, of all commits."""
        return {place: content for commit in self.commits for place, content in commit.files.items()}

    def respond(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)", path):
            if match[1] not in self.private:
                return 404, {"error": "Repository not found"}
            return 200, {"id": match[1], "private": self.private[match[1]], "siblings": [], "tags": [], "downloads": 0}
        if re.fullmatch(r"/api/models/[^/]+/[^/]+/preupload/main", path):
            files = json.loads(body)["files"]
            kinds = {True: "lfs", False: "regular"}
            named = [{"path": one["path"], "uploadMode": kinds[is_large(one)], "shouldIgnore": False} for one in files]
            return 200, {"files": named}
        if path.endswith(".git/info/lfs/objects/batch"):
            links = [
                {**one, "actions": {"upload": {"href": f"{self.endpoint}/lfs/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": links}
        if method == "PUT" and path.startswith("/lfs/"):
            self.blobs[path.rpartition("/")[2]] = body
            return 200, {}
        if re.fullmatch(r"/api/models/[^/]+/[^/]+/commit/main", path):
            return self._commit(path, body)
        raise AssertionError(f"nobody foresaw {method} {path}")

    def _create(self, wish: dict[str, Any]) -> tuple[int, Any]:
        name = f"{wish.get('organization') or OWNER}/{wish['name']}"
        answer = {"url": f"{self.endpoint}/{name}", "name": name, "id": name}
        if not name.startswith(f"{OWNER}/"):
            return 403, {"error": "You don't have the rights to create a model under this namespace"}
        if name in self.private:
            return 409, {**answer, "error": "You already created this model repo"}
        self.private[name] = wish.get("visibility") == "private" or bool(wish.get("private"))  # the client's 2.x and 1.x
        return 200, answer

    def _commit(self, path: str, body: bytes) -> tuple[int, Any]:
        self.gate.wait(60)
        if self.failures:
            return self.failures.pop(0), {"error": "out of order"}
        rows = [json.loads(line) for line in body.splitlines()]
        files = {}
        for row in rows[1:]:
            value = row["value"]
            is_lfs = row["key"] == "lfsFile"
            files[value["path"]] = self.blobs[value["oid"]] if is_lfs else base64.b64decode(value["content"])
        self.commits.append(Commit(rows[0]["value"]["summary"], files))
        oid = f"{len(self.commits):040x}"
        name = path.removeprefix("/api/models/").partition("/commit")[0]
        return 200, {"success": True, "commitOid": oid, "commitUrl": f"{self.endpoint}/{name}/commit/{oid}"}


def is_large(file: dict[str, Any]) -> bool:
    return file["size"] > 100_000 or file["path"].endswith((".safetensors", ".png"))


def answer(handler: BaseHTTPRequestHandler, hub: StandInHub) -> None:
    body = read_body(handler)
    hub.bodies += [handler.path.encode(), body]
    if handler.headers.get("Authorization") == f"Bearer {TOKEN}" or handler.path.startswith("/lfs/"):
        status, content = hub.respond(handler.command, handler.path.partition("?")[0], body)
    else:
        status, content = 401, {"error": "Invalid username or password."}
    data = json.dumps(content).encode()
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


def read_body(handler: BaseHTTPRequestHandler) -> bytes:
    if handler.headers.get("Transfer-Encoding") != "chunked":
        return handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
    body = b""
    while size := int(handler.rfile.readline(), 16):
        body += handler.rfile.read(size)
        handler.rfile.readline()
    handler.rfile.readline()
    return body
