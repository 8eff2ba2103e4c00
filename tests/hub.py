"""A server that speaks the protocol of the Hugging Face hub, with faults that a test chooses.

https://huggingface.co/docs/hub/api: `/api/models/REPO/revision/REV?blobs=true` lists the files with size and
digest; `/REPO/resolve/COMMIT/PATH` sends a file, also from the middle.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "8c1a6ec29e1d5d6b34f0a0f3a3d2c1b0e9f8a7b6"
LFS_SIZE = 1024  # smaller files are in git itself, as configs are


@dataclass
class Hub:
    """What the server has, how it fails, and what it was asked.

    `cuts` maps a path to the offsets at which the connection breaks, once each. `answers` maps a path (or
    "api") to a status and an error code of the hub. `lies` maps a path to what is sent instead of it.
    """

    repositories: dict[str, Mapping[str, bytes]] = field(default_factory=dict)
    cuts: dict[str, list[int]] = field(default_factory=dict)
    answers: dict[str, tuple[int, str]] = field(default_factory=dict)
    lies: dict[str, bytes] = field(default_factory=dict)
    token: str = ""
    ignores_ranges: bool = False
    holds: threading.Event | None = None  # a file is sent up to its cut, and then the server waits
    requests: list[tuple[str, str]] = field(default_factory=list)  # path and range
    url: str = ""

    def asked_for(self, path: str) -> list[str]:
        """The ranges with which a file was asked for, empty for a whole file."""
        return [sent for asked, sent in self.requests if asked == path]


def digest_of(content: bytes) -> str:
    if len(content) >= LFS_SIZE:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        if path.startswith("api/models/"):
            self._list(path.removeprefix("api/models/"))
        else:
            repo, _, rest = path.partition("/resolve/")
            self._send(repo, rest.partition("/")[2])

    def _refuse(self, name: str, repo: str) -> bool:
        status, code = self.hub.answers.get(name, (200, ""))
        if repo not in self.hub.repositories:
            status, code = 404, "RepoNotFound"
        elif self.hub.token and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            status, code = 401, "GatedRepo"
        if status == 200:
            return False
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()
        return True

    def _list(self, path: str) -> None:
        repo, _, revision = path.partition("/revision/")
        self.hub.requests.append((f"api:{repo}@{revision}", ""))
        if self._refuse("api", repo):
            return
        siblings = []
        for name, content in self.hub.repositories[repo].items():
            entry = {"rfilename": name, "size": len(content), "blobId": digest_of(content)[:40]}
            if len(content) >= LFS_SIZE:
                entry["lfs"] = {"size": len(content), "sha256": digest_of(content), "pointerSize": 130}
            siblings.append(entry)
        document = {"id": repo, "sha": COMMIT, "siblings": siblings, "cardData": {"license": "apache-2.0"}}
        data = json.dumps(document | {"tags": [], "downloads": 0}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _send(self, repo: str, name: str) -> None:
        asked = self.headers.get("Range", "")
        self.hub.requests.append((name, asked))
        if self._refuse(name, repo):
            return
        content = self.hub.lies.get(name, self.hub.repositories[repo][name])
        begin = 0
        if (match := re.match(r"bytes=(\d+)-", asked)) and not self.hub.ignores_ranges:
            begin = int(match[1])
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - begin))
        self.end_headers()
        cuts = self.hub.cuts.get(name)
        end = cuts.pop(0) if cuts else len(content)
        self.wfile.write(content[begin:end])
        self.wfile.flush()
        if end < len(content):
            if self.hub.holds:
                self.hub.holds.wait(30)
            self.close_connection = True
            self.connection.close()


@contextmanager
def serve_hub(**repositories: Mapping[str, bytes]) -> Iterator[Hub]:
    """Serve repositories; `org__name` stands for `org/name`."""
    hub = Hub({name.replace("__", "/"): files for name, files in repositories.items()})
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def use_hub(monkeypatch: pytest.MonkeyPatch, hub: Hub, home: Path) -> None:
    """Let this process talk to the server, without waiting between tries, and keep files in `home`."""
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _http

    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for module in (file_download, _http):
        monkeypatch.setattr(module.time, "sleep", lambda _: None)


def files_of(folder: Path) -> dict[str, bytes]:
    """The files below a folder by path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
