"""A local stand-in for the Hub: it accepts what `huggingface_hub` pushes, and answers like the Hub."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

REPOSITORY = "somebody/aligned"
COMMIT = "0" * 40


class Hub(ThreadingHTTPServer):
    """The state of the stand-in.

    Attributes:
        address: the URL for `HF_ENDPOINT`. created: the repositories. private: the private ones among them.
        contents: the newest files of each repository, keyed by name.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Request)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.created: list[str] = []
        self.private: set[str] = set()
        self.contents: dict[str, dict[str, bytes]] = {}

    @property
    def files(self) -> dict[str, bytes]:
        """Return the files of `REPOSITORY`."""
        return self.contents.setdefault(REPOSITORY, {})

    def answer(self, path: str, body: bytes) -> dict | list:
        """Do what a request asks for, and return the answer."""
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        found = re.match(r"/api/models/([\w.-]+/[\w.-]+)/(\w+)", path)
        if not found:
            return {}
        repository, asked = found.groups()
        files = self.contents.setdefault(repository, {})
        if asked == "preupload":
            return {"files": [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in _named(body)]}
        if asked == "commit":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return {"commitUrl": f"{self.address}/{repository}/commit/main", "commitOid": COMMIT}
        if asked == "revision":
            return {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
        if asked == "tree":
            return [{"type": "file", "path": n, "size": len(c), "oid": _digest(c)} for n, c in files.items()]
        return {}

    def file(self, path: str) -> bytes | None:
        """Return the file at an address; `None` if there is no such file."""
        found = re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/\w+/(.*)", path)
        return self.contents.get(found[1], {}).get(found[2]) if found else None

    def _create(self, asked: dict) -> dict:
        name = f"{asked['organization']}/{asked['name']}"
        self.created.append(name)
        if asked.get("private") or asked.get("visibility") == "private":
            self.private.add(name)
        return {"url": f"{self.address}/{name}"}


def _named(body: bytes) -> list[dict]:
    return [{"path": file["path"]} for file in json.loads(body)["files"]]


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


class _Request(BaseHTTPRequestHandler):
    def do_GET(self):
        self._get()

    def do_HEAD(self):
        self._get()

    def do_POST(self):
        self._reply(json.dumps(self.server.answer(self.path, self._body())).encode())

    def _get(self) -> None:
        if "/resolve/" not in self.path:
            self._reply(json.dumps(self.server.answer(self.path.partition("?")[0], b"")).encode())
            return
        content = self.server.file(self.path)
        if content is None:
            self._reply(b"", 404, {"X-Error-Code": "EntryNotFound"})
        else:
            self._reply(content, 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{_digest(content)}"'})

    def _body(self) -> bytes:
        if "content-length" in self.headers:
            return self.rfile.read(int(self.headers["content-length"]))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        return b"".join(chunks)

    def _reply(self, answer: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"content-type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer)

    def log_message(self, *_) -> None:
        """Log nothing: the tests check only the files."""


@contextmanager
def hub() -> Iterator[Hub]:
    """Return a context in which a hub answers requests."""
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
