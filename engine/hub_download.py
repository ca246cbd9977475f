"""One download from the Hugging Face hub, in a process of its own so that it can be abandoned at any moment.

Reads one request as JSON from its arguments, and says how it goes on standard output, one JSON object a line:
{"done", "total"} in bytes as it goes, and at the end {"folder", "files"} or {"error", "detail"}.
Ends with the process that asked for it, whose end closes standard input.

Large files are fetched here and not by the hub's library, which begins anew where a download was cut off: what has
arrived stays beside the cache's blobs, and the library then finds it whole.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_url, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.utils import build_hf_headers, filter_repo_objects

_LARGE_BYTES = 1_000_000
_CHUNK_BYTES = 1_000_000
"""Of the hub's library, which reads ten times as much at once: too coarse to show, and lost when cut off."""
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


class _Failure(Exception):
    def __init__(self, kind: str, detail: object = "") -> None:
        super().__init__(kind, str(detail))


class _Counter:
    """In the place of tqdm's bar: says what has arrived."""

    done = total = 0

    def __init__(self, *_: Any, initial: int = 0, **__: Any) -> None:
        self.update(initial)

    def __enter__(self) -> _Counter:
        return self

    def __exit__(self, *_: object) -> None: ...

    def update(self, count: float | None = 1) -> None:
        _Counter.done += int(count or 0)
        _say(done=_Counter.done, total=_Counter.total)


def main() -> None:
    threading.Thread(target=_end_with_asker, daemon=True).start()
    constants.DOWNLOAD_CHUNK_SIZE = _CHUNK_BYTES
    request = json.loads(sys.argv[1])
    try:
        _say(**_download(request["kind"], request["name"], request["attempts"]))
    except _Failure as failure:
        kind, detail = failure.args
        _say(error=kind, detail=detail)
    except OfflineModeIsEnabled:
        _say(error="unreachable", detail="HF_HUB_OFFLINE is set")
    except Exception as error:
        _say(error=_kind_of(error), detail=" ".join(str(error).split())[:200])


def _end_with_asker() -> None:
    while os.read(0, 1):  # not of sys.stdin, whose lock it would hold when the interpreter ends
        pass
    os._exit(1)


def _download(kind: str, name: str, attempts: list[dict[str, Any]]) -> dict[str, Any]:
    """Fetches what the first attempt whose revision has such files asks for."""
    seen: list[str] = []
    seen_at = None
    for attempt in attempts:
        if seen and attempt["revision"] != seen_at:
            break  # what is elsewhere is not what was asked for: it may mix several configurations
        try:
            info = HfApi().repo_info(name, repo_type=kind, revision=attempt["revision"], files_metadata=True)
        except RevisionNotFoundError:
            if attempt is attempts[-1] and not seen:
                raise
            continue
        entries: list[Any] = getattr(info, "siblings", None) or []
        names = [entry.rfilename for entry in entries]
        files = sorted(filter_repo_objects(names, allow_patterns=attempt["patterns"]))
        seen, seen_at = sorted(names), attempt["revision"]
        if not files:
            continue
        blobs = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=kind) / "blobs"
        blobs.mkdir(parents=True, exist_ok=True)
        large = [e for e in entries if e.rfilename in files and (e.size or 0) > _LARGE_BYTES and _has_digest(e)]
        with _alone(blobs):
            missing = [entry for entry in large if not (blobs / entry.lfs.sha256).exists()]
            _Counter.total = sum(entry.size or 0 for entry in missing)
            _check_room(blobs, _Counter.total - sum(_arrived(blobs, entry) for entry in missing))
            for entry in missing:
                url = hf_hub_url(name, entry.rfilename, repo_type=kind, revision=info.sha)
                _fetch(url, _partial(blobs, entry), blobs / entry.lfs.sha256, entry.size or 0)
        folder = snapshot_download(name, repo_type=kind, revision=attempt["revision"], allow_patterns=files)
        return {"folder": folder, "files": files}
    raise _Failure("nothing", json.dumps(seen))


def _fetch(url: str, partial: Path, whole: Path, size: int) -> None:
    """Goes on where the file was cut off; its name in the cache is what its bytes add up to."""
    arrived = partial.stat().st_size if partial.exists() else 0
    if arrived > size:
        partial.unlink()
        arrived = 0
    with partial.open("ab", buffering=0) as file:
        http_get(url, file, resume_size=arrived, expected_size=size, headers=build_hf_headers(), tqdm_class=_Counter)
    with partial.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != whole.name:
        partial.unlink()
        raise _Failure("damaged", url)
    partial.rename(whole)


def _has_digest(entry: Any) -> bool:
    """Whether it has a checksum that may name a file: what a hub says is no path to be trusted."""
    return bool(entry.lfs and re.fullmatch(r"[0-9a-f]{64}", entry.lfs.sha256 or ""))


def _partial(blobs: Path, entry: Any) -> Path:
    return blobs / f"{entry.lfs.sha256}.partial"


def _arrived(blobs: Path, entry: Any) -> int:
    partial = _partial(blobs, entry)
    return partial.stat().st_size if partial.exists() else 0


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One download into a folder at a time; another waits, and then finds what it wants."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _check_room(folder: Path, needed: int) -> None:
    if (free := shutil.disk_usage(folder).free) < needed:
        raise _Failure("full", f"{needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free in {folder.parent}")


def _kind_of(error: Exception) -> str:
    if isinstance(error, GatedRepoError):
        return "gated"
    if isinstance(error, RepositoryNotFoundError):
        return "unknown"
    if isinstance(error, RevisionNotFoundError):
        return "revision"
    if isinstance(error, HfHubHTTPError):
        return "refused"
    # httpx's errors of transport have no ancestor in common with those of Python
    lost = LocalEntryNotFoundError | ConnectionError | TimeoutError
    if isinstance(error, lost) or type(error).__module__.startswith("httpx"):
        return "unreachable"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "full"
    if isinstance(error, OSError) and error.errno in _UNWRITABLE:
        return "unwritable"
    return "failed"


def _say(**values: Any) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
