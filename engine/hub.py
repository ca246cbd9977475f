"""Models and data sets of the Hugging Face hub: what is here is taken as it is, what is not is downloaded.

Only data is fetched: safetensors, JSON, tokenizers, templates, parquet; no code and no pickles.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from engine.errors import UserError
from engine.loading import Loading

_MODEL_FILES = ["model*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model", "*.tiktoken"]
"""Nothing that mlx-lm does not fetch itself: what it has downloaded is whole for us too."""
_CONVERTED = "refs/convert/parquet"
"""Where the hub keeps every data set as parquet, so that no script of its author has to run."""
_LISTEN_SECONDS = 0.2


def fetch_model(name: str, revision: str | None, loading: Loading) -> Path:
    """The folder of a model's snapshot, from the hub's cache on this machine if it is whole there.

    Raises `UserError` where it cannot be had, saying what to do; lets `Interrupted` through within a moment, what has
    arrived staying for the next time.
    """
    folder = _here("model", name, revision or "main", _MODEL_FILES)
    if folder is not None and is_whole(folder):
        return folder
    answer = _download("model", name, [{"revision": revision or "main", "patterns": _MODEL_FILES}], loading)
    return Path(answer["folder"])


def fetch_dataset(name: str, config: str, split: str, loading: Loading) -> list[Path]:
    """The files of one split: parquet of the hub's own conversion, else parquet or JSON lines of its author.

    Errors as in `fetch_model`.
    """
    converted = [f"{config}/{split}/*.parquet", f"{config}/partial-{split}/*.parquet"]
    attempts: list[dict[str, Any]] = [{"revision": _CONVERTED, "patterns": converted}]
    if config == "default":
        attempts.append({"revision": "main", "patterns": [f"*{split}*.parquet", f"*{split}*.jsonl"]})
    if config == "default" and split == "train":  # a data set that is not split has this one alone
        attempts.append({"revision": "main", "patterns": ["*.parquet", "*.jsonl"]})
    for attempt in attempts:
        folder = _here("dataset", name, attempt["revision"], attempt["patterns"])
        if folder is not None and (files := _matching(folder, attempt["patterns"])):
            return files
    answer = _download("dataset", name, attempts, loading, {"config": config, "split": split})
    return [Path(answer["folder"]) / file for file in answer["files"]]


def is_whole(folder: Path) -> bool:
    """Whether a model's folder has its config and all files of its weights."""
    present = {path.name for path in folder.glob("model*.safetensors")}
    if not present or not (folder / "config.json").is_file():
        return False
    try:
        index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
        return set(index.get("weight_map", {}).values()) <= present
    except FileNotFoundError:
        return True
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def _here(kind: str, name: str, revision: str, patterns: list[str]) -> Path | None:
    """The snapshot in this machine's cache; None where it is not known to be whole. Touches no network."""
    try:
        return Path(
            snapshot_download(name, repo_type=kind, revision=revision, allow_patterns=patterns, local_files_only=True)
        )
    except LocalEntryNotFoundError:
        return None
    except HFValidationError:
        raise UserError(f"{_key(kind)} = {name!r} is neither a folder nor a name on the hub, OWNER/NAME") from None


def _matching(folder: Path, patterns: list[str]) -> list[Path]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [file for file in files if any(fnmatch(file.relative_to(folder).as_posix(), p) for p in patterns)]


def _download(
    kind: str,
    name: str,
    attempts: list[dict[str, Any]],
    loading: Loading,
    part: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Lets a process of its own download, tells how far it is, and ends it where the run shall end."""
    request = json.dumps({"kind": kind, "name": name, "attempts": attempts})
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "engine.hub_download", request],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "HF_HUB_CACHE": constants.HF_HUB_CACHE, "HF_ENDPOINT": constants.ENDPOINT},
        start_new_session=True,  # Ctrl+C is for the run
    )
    what, answer = f"downloading {name}", {"error": "failed", "detail": "its process ended"}
    try:
        loading.progress(what, 0, None, "bytes")
        for line in _lines(process, loading):
            said = json.loads(line)
            if "total" in said:
                loading.progress(what, said["done"], said["total"], "bytes")
            else:
                answer = said
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # nothing is lost: what has arrived is on disk
        process.communicate()
    if "error" in answer:
        raise UserError(_words(kind, name, attempts[0]["revision"], answer["error"], answer["detail"], part or {}))
    return answer


def _lines(process: subprocess.Popen[bytes], loading: Loading) -> Iterator[bytes]:
    """The process's lines as they come; what the run was asked meanwhile is listened to."""
    assert process.stdout is not None
    pending = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            loading.listen()
            if not selector.select(_LISTEN_SECONDS):
                continue
            read = os.read(process.stdout.fileno(), 65536)
            if not read:
                return
            *lines, pending = (pending + read).split(b"\n")
            yield from lines


def _key(kind: str) -> str:
    return "model.init_from" if kind == "model" else "data.dataset"


def _words(kind: str, name: str, revision: str, error: str, detail: str, part: dict[str, str]) -> str:
    noun = "model" if kind == "model" else "data set"
    last = name.rpartition("/")[2]
    if kind == "model":
        elsewhere = f'give its folder (model.init_from = "~/models/{last}")'
    else:
        elsewhere = f'give its files (data.files = ["~/data/{last}"])'
    elsewhere = f"download it where there is a network and {elsewhere}, or set HF_HOME to a cache that has it"
    match error:
        case "unreachable":
            return f"{name} is not on this machine and {constants.ENDPOINT} cannot be reached ({detail}); {elsewhere}"
        case "unknown":
            there = f"no such folder, and no such {noun} on the hub"
            return f"{_key(kind)} = {name!r}: {there}; if it is a private one, log in with: hf auth login"
        case "gated":
            url = f"{constants.ENDPOINT}/{'' if kind == 'model' else 'datasets/'}{name}"
            return f"{name} is given out on conditions: accept them at {url}, then log in with: hf auth login"
        case "revision":
            return f"model.revision = {revision!r}: {name} has no such branch, tag or commit"
        case "full":
            return f"{name} does not fit on the disk ({detail}); make room, or set HF_HOME to a folder on another disk"
        case "unwritable":
            return f"{name} cannot be downloaded to {constants.HF_HUB_CACHE} ({detail}); set HF_HOME to another folder"
        case "damaged":
            return f"{name}: a file that was downloaded does not have its checksum and was deleted; try again"
        case "nothing":
            return f"{name}: {_what_there_is(json.loads(detail), part)}"
    return f"{name} could not be downloaded: {detail}; {elsewhere}"


def _what_there_is(files: list[str], part: dict[str, str]) -> str:
    """Why none of a repository's files was what was asked for."""
    if not part:
        return "it has no files that a model could be loaded from"
    folders = {tuple(file.split("/")[:2]) for file in files if file.endswith(".parquet") and file.count("/") == 2}
    configs, splits = (
        {config for config, _ in folders},
        {split for config, split in folders if config == part["config"]},
    )
    if splits:
        return f"data.split = {part['split']!r} is not in it; it has {', '.join(sorted(splits))}"
    if configs:
        return f"data.dataset_config = {part['config']!r} is not in it; it has {', '.join(sorted(configs))}"
    return f"it has no parquet and no JSON lines for data.split = {part['split']!r}"
