"""A server on this machine that speaks as much of the Hugging Face Hub's protocol as a download needs: questions about
files, redirects to another host for large ones, ranges, gates. It logs what it is asked, and does wrong what is set."""

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import unquote

COMMIT = "c0ffee" * 6 + "c0ff"
LARGE = (".safetensors", ".model", "tokenizer.json")


@dataclass(frozen=True)
class Asked:
    """One request: its method, the file's name, the range, and whether a token came along."""

    method: str
    name: str
    range: str
    token: str
    large_storage: bool


@dataclass
class Hub:
    """Files by `owner/name/path`, and the misbehaviour of the server."""

    files: dict[str, bytes] = field(default_factory=dict)
    gated: dict[str, int] = field(default_factory=dict)  # repository -> status without an accepted licence
    status: dict[str, int] = field(default_factory=dict)  # file's name -> status of its GET
    stated_size: dict[str, int] = field(default_factory=dict)
    stated_hash: dict[str, str] = field(default_factory=dict)
    cut_after: dict[str, int] = field(default_factory=dict)  # file's name -> bytes in all, then connections break
    ignores_ranges: bool = False
    stall: threading.Event | None = None  # answers wait for it after their first bytes
    asked: list[Asked] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ranges(self, name: str) -> list[tuple[int, int]]:
        """The ranges that were asked for, last byte included, in their order in the file."""
        found = (re.fullmatch(r"bytes=(\d+)-(\d+)", a.range) for a in self.asked if a.name == name and a.range)
        return sorted({(int(match[1]), int(match[2])) for match in found if match})

    def sent(self, name: str, data: bytes) -> bytes:
        """What of an answer is sent before the connection breaks."""
        if name not in self.cut_after:
            return data
        left = self.cut_after[name]
        self.cut_after[name] = max(0, left - len(data))
        return data[:left]


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def running(hub: Hub) -> Iterator[Hub]:
    """The server, for as long as the context lasts."""
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are a part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self) -> None:
        storage = self.path.startswith("/storage/")
        key = unquote(re.sub(r"^/(storage/)?|resolve/[^/]+/", "", self.path))
        name, hub = PurePosixPath(key).name, self.hub
        token = self.headers.get("Authorization", "")
        hub.asked.append(Asked(self.command, name, self.headers.get("Range", ""), token, storage))
        repository = "/".join(key.split("/")[:2])
        if not storage and repository in hub.gated:
            return self._refuse(hub.gated[repository], "GatedRepo")
        if key not in hub.files:
            return self._refuse(404, "EntryNotFound")
        if self.command == "GET" and name in hub.status:
            return self._refuse(hub.status[name], "")
        if name.endswith(LARGE) and not storage:
            return self._redirect(key, name)
        self._content(name, hub.files[key])

    def _refuse(self, status: int, code: str) -> None:
        self._headers(status, {"X-Error-Code": code, "X-Error-Message": "no"} if code else {}, 0)

    def _redirect(self, key: str, name: str) -> None:
        data = self.hub.files[key]
        stated = {
            "X-Linked-Size": str(self.hub.stated_size.get(name, len(data))),
            "X-Linked-Etag": f'"{self.hub.stated_hash.get(name) or hashlib.sha256(data).hexdigest()}"',
            "Location": f"http://localhost:{self.hub.port}/storage/{key}",
        }
        self._headers(302, stated, 0)

    def _content(self, name: str, data: bytes) -> None:
        begin, end = 0, len(data)
        facts = {"ETag": f'"{git_hash(data)}"'}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted and not self.hub.ignores_ranges:
            begin, end = int(wanted[1]), min(int(wanted[2]) + 1, len(data))
            facts["Content-Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
        self._headers(206 if "Content-Range" in facts else 200, facts, end - begin)
        if self.command == "GET":
            self._send(self.hub.sent(name, data[begin:end]), end - begin)

    def _send(self, data: bytes, promised: int) -> None:
        if self.hub.stall is not None:
            self.wfile.write(data[:1000])
            self.wfile.flush()
            data = data[1000:]
            promised -= 1000
            self.hub.stall.wait()
        self.wfile.write(data)
        if len(data) < promised:
            self.close_connection = True
            self.connection.close()

    def _headers(self, status: int, facts: dict[str, str], length: int) -> None:
        self.send_response(status)
        for name, value in {"X-Repo-Commit": COMMIT, **facts, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()
