"""A stand-in for the Hub on this machine: it takes what `huggingface_hub` pushes, and answers as the Hub would."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

REPOSITORY = "somebody/aligned"


class Hub(ThreadingHTTPServer):
    """Attributes: `address`, for `HF_ENDPOINT`; `created`, the repositories; `files`, the newest content by name."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Request)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.created: list[str] = []
        self.files: dict[str, bytes] = {}

    def answer(self, path: str, body: bytes) -> dict:
        """The answer to a request, after doing what it asks for."""
        if path == "/api/repos/create":
            repository = json.loads(body)
            self.created.append(f"{repository['organization']}/{repository['name']}")
            return {"url": f"{self.address}/{self.created[-1]}"}
        if path == f"/api/models/{REPOSITORY}/preupload/main":
            return {"files": [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in _named(body)]}
        if path == f"/api/models/{REPOSITORY}/commit/main":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return {"commitUrl": f"{self.address}/{REPOSITORY}/commit/main", "commitOid": "0" * 40}
        return {}


def _named(body: bytes) -> list[dict]:
    return [{"path": file["path"]} for file in json.loads(body)["files"]]


class _Request(BaseHTTPRequestHandler):
    def do_GET(self):
        self._reply(b"")

    def do_POST(self):
        self._reply(self._body())

    def _body(self) -> bytes:
        if "content-length" in self.headers:
            return self.rfile.read(int(self.headers["content-length"]))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        return b"".join(chunks)

    def _reply(self, body: bytes) -> None:
        answer = json.dumps(self.server.answer(self.path, body)).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_) -> None:
        """Nothing: the tests look at what arrived."""


@contextmanager
def hub() -> Iterator[Hub]:
    """A hub that answers as long as the context lasts."""
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
