"""A loopback server that speaks the Hugging Face hub's protocol, for the hub's own client.

It serves folders as repositories and writes down what it is asked. Repositories of the owner
`broken` fail as their names say: `broken/500` answers every request with status 500, `broken/drop`
ends the connection in the middle of every large file.
"""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

ERROR_CODES = {401: "GatedRepo", 404: "RepoNotFound"}
API = re.compile(r"/api/(models|datasets)/([\w.-]+/[\w.-]+)(?:/(revision|tree)/([^/]+))?(/.*)?")
FILE = re.compile(r"/(datasets/)?([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)")


def sha1(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def commit_of(repo: str, branch: str = "main") -> str:
    """The commit of a branch, `main` or `v2`, of a repository such as `datasets/array/SAT`."""
    return sha1(f"{repo} {branch}".encode())


class Hub:
    """Serves models `<folder>/<id>` and datasets `<folder>/datasets/<id>`."""

    def __init__(self, folder: Path):
        self.folder, self.port = folder, 0
        self.requests: list[str] = []  # such as "GET /… from 100" for a range
        self.interrupt: set[str] = set()  # names of files to interrupt once

    def start(self) -> None:
        """Listen, on the same port after a pause."""
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.server.hub, self.port = self, self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Refuse connections."""
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        ranged = re.search(r"bytes=(\d+)-", self.headers.get("Range", ""))
        hub.requests.append(f"{self.command} {path}" + (f" from {ranged[1]}" if ranged else ""))
        if match := API.fullmatch(path):
            kind, name, question, revision, file = match.groups()
            repo = name if kind == "models" else f"datasets/{name}"
        elif match := FILE.fullmatch(path):
            prefix, name, revision, file = match.groups()
            repo, question = (prefix or "") + name, "file"
        else:
            return self.fail(404)
        owner, _, label = name.partition("/")
        if owner == "broken" and label.isdigit():
            return self.fail(int(label), ERROR_CODES.get(int(label)))
        folder = hub.folder / repo
        if not folder.is_dir():
            return self.fail(404, "RepoNotFound")
        commits = {branch: commit_of(repo, branch) for branch in ("main", "v2")}
        commit = commits.get(revision or "main", revision)
        if commit not in commits.values():
            return self.fail(404, "RevisionNotFound")
        if question == "file":
            return self.send_file(folder / file, commit, int(ranged[1]) if ranged else 0)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        value = {"id": name, "sha": commit, "siblings": []}
        if question == "tree":
            value = [describe(path, folder) for path in files if not file]  # no subfolders
        self.answer(200, json.dumps(value).encode(), commit)

    do_HEAD = do_GET

    def send_file(self, path: Path, commit: str, first: int) -> None:
        if not path.is_file():
            return self.fail(404, "EntryNotFound", commit)
        content, hub = path.read_bytes(), self.server.hub
        sent = content[first:]
        headers = {"ETag": f'"{sha1(content)}"'}
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        always = path.parent.name == "drop" and path.suffix in (".safetensors", ".parquet")
        if always or (self.command == "GET" and path.name in hub.interrupt):
            sent = content[first : len(content) // 2]
            hub.interrupt.discard(path.name)
        self.answer(206 if first else 200, sent, commit, headers, len(content) - first)

    def fail(self, status: int, code: str | None = None, commit: str | None = None) -> None:
        # With Retry-After the client waits one second before each of its retries.
        headers = {"Retry-After": "0"} | ({"X-Error-Code": code} if code else {})
        self.answer(status, b"{}", commit, headers)

    def answer(self, status, body: bytes, commit, headers=None, announced: int | None = None):
        """Send `body`. The connection ends there if it is shorter than `announced`."""
        length = len(body) if announced is None else announced
        self.send_response(status)
        headers = {"Content-Length": length, "X-Repo-Commit": commit} | (headers or {})
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
            self.close_connection = len(body) < length

    def log_message(self, *_) -> None:
        """Print nothing."""


def describe(path: Path, folder: Path) -> dict:
    name, content = str(path.relative_to(folder)), path.read_bytes()
    return {"type": "file", "path": name, "size": len(content), "oid": sha1(content)}
