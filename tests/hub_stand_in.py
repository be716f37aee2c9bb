"""A hub of one process: as much of its protocol as publishing and fetching small files need."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

SHA = "a" * 40


class Hub(ThreadingHTTPServer):
    """Repositories by name, each a mapping from file names to contents."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.refuse = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args) -> None:
        pass

    def answer(self, content, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_POST(self) -> None:
        hub, body, parts = self.server, self.body(), self.path.split("?")[0].strip("/").split("/")
        if hub.refuse:
            self.answer({"error": "You have no right to do this"}, 403)
        elif self.path == "/api/repos/create":
            facts = json.loads(body)
            name = "/".join(filter(None, (facts.get("organization"), facts["name"])))
            hub.repositories.setdefault(name, {})
            if facts.get("private") or facts.get("visibility") == "private":
                hub.private.add(name)
            self.answer({"url": f"{hub.address}/{name}", "name": name, "id": SHA})
        elif parts[:1] == ["api"] and "preupload" in parts:
            names = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif parts[:1] == ["api"] and "commit" in parts:
            name = "/".join(parts[2:4])
            for line in body.splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    hub.repositories[name][item["value"]["path"]] = base64.b64decode(item["value"]["content"])
            url = f"{hub.address}/{name}/commit/{SHA}"
            self.answer({"success": True, "commitUrl": url, "commitOid": SHA})
        else:
            self.answer({}, 404)

    def do_GET(self) -> None:
        hub, parts = self.server, [unquote(p) for p in self.path.split("?")[0].strip("/").split("/")]
        if parts[:1] == ["api"]:
            if parts[1] != "models":
                self.answer({})
                return
            name, files = "/".join(parts[2:4]), hub.repositories.get("/".join(parts[2:4]))
            if files is None:
                self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            elif "tree" in parts:
                self.answer([{"type": "file", "path": p, "size": len(c), "oid": SHA} for p, c in files.items()])
            else:
                self.answer({"id": name, "modelId": name, "sha": SHA, "siblings": [{"rfilename": p} for p in files]})
            return
        name, file = "/".join(parts[:2]), "/".join(parts[4:])
        content = hub.repositories.get(name, {}).get(file)
        if content is None:
            self.answer({}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=SHA)
            return
        tag = hashlib.sha256(content).hexdigest()[:40]
        self.answer(content, ETag=f'"{tag}"', X_Repo_Commit=SHA)

    def do_HEAD(self) -> None:
        self.do_GET()


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that answers for as long as the context lasts."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
