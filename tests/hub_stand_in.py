"""A stand-in for the Hugging Face hub on this machine: the few answers that a download needs, as slow as is wished."""

from __future__ import annotations

import hashlib
import json
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

_PIECE_BYTES = 100_000


class HubStandIn:
    """Serves `repositories`: {"models/OWNER/NAME": {revision: folder}}; files from 100 kB on are large files (LFS)."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, Path]] = {}
        self.gated: set[str] = set()
        self.bytes_a_second = math.inf
        self.holds_at = math.inf
        """Of a large file so many bytes are given, and no more until this is larger."""
        self.requested: list[str] = []
        self.ranges: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.holds_at = math.inf
        self._server.shutdown()
        self._server.server_close()

    def entries(self, folder: Path) -> list[dict[str, Any]]:
        """The files of a repository as the hub's API tells them."""
        found = []
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            content = path.read_bytes()
            entry: dict[str, Any] = {"path": path.relative_to(folder).as_posix(), "size": len(content)}
            entry["oid"] = hashlib.sha1(content).hexdigest()
            if len(content) >= _PIECE_BYTES:
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
            found.append(entry)
        return found


def commit_of(revision: str) -> str:
    return hashlib.sha1(revision.encode()).hexdigest()


def _handler(hub: HubStandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            hub.requested.append(self.path)
            path = unquote(urlsplit(self.path).path)
            if path.startswith("/api/"):
                self._tell(path.removeprefix("/api/"))
            else:
                self._give(path.removeprefix("/"))

        do_HEAD = do_GET

        def _tell(self, path: str) -> None:
            part = next(part for part in ("/revision/", "/tree/", "") if part in path)
            name, _, revision = path.partition(part) if part else (path, "", "main")
            found = self._find(name, revision)
            if found is None:
                return
            folder, commit = found
            entries = hub.entries(folder)
            if part == "/tree/":
                self._json([{"type": "file", **entry} for entry in entries])
                return
            siblings = [
                {
                    "rfilename": entry["path"],
                    "size": entry["size"],
                    "blobId": entry["oid"],
                    **(
                        {"lfs": {"sha256": entry["lfs"]["oid"], "size": entry["size"], "pointerSize": 134}}
                        if "lfs" in entry
                        else {}
                    ),
                }
                for entry in entries
            ]
            self._json({"id": name.partition("/")[2], "sha": commit, "siblings": siblings})

        def _give(self, path: str) -> None:
            name, _, rest = path.partition("/resolve/")
            revision, _, file = rest.partition("/")
            name = name if name.startswith("datasets/") else f"models/{name}"
            found = self._find(name, revision)
            if found is None:
                return
            folder, commit = found
            entry = next((entry for entry in hub.entries(folder) if entry["path"] == file), None)
            if entry is None:
                self._refuse(404, "EntryNotFound")
                return
            content = (folder / file).read_bytes()
            start = 0
            if wanted := self.headers.get("Range"):
                hub.ranges.append(wanted)
                start = int(wanted.removeprefix("bytes=").partition("-")[0])
            self.send_response(206 if start else 200)
            self.send_header("X-Repo-Commit", commit)
            self.send_header("ETag", f'"{entry.get("lfs", entry)["oid"]}"')
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            if self.command == "HEAD":
                return
            for at in range(start, len(content), _PIECE_BYTES):
                piece = content[at : at + _PIECE_BYTES]
                time.sleep(len(piece) / hub.bytes_a_second if len(content) >= _PIECE_BYTES else 0)
                while at >= hub.holds_at:
                    time.sleep(0.01)
                try:
                    self.wfile.write(piece)
                except OSError:
                    return

        def _find(self, name: str, revision: str) -> tuple[Path, str] | None:
            """A repository's folder at a branch or commit, and the commit; an error is answered where there is none."""
            if name in hub.gated:
                self._refuse(403, "GatedRepo")
            elif name not in hub.repositories:
                self._refuse(401, "RepoNotFound")
            else:
                for known, folder in hub.repositories[name].items():
                    if revision in (known, commit_of(known)):
                        return folder, commit_of(known)
                self._refuse(404, "RevisionNotFound")
            return None

        def _refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _json(self, value: Any) -> None:
            content = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None: ...

    return Handler


@contextmanager
def hub_stand_in() -> Iterator[HubStandIn]:
    hub = HubStandIn()
    try:
        yield hub
    finally:
        hub.close()
