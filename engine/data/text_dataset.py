"""The packed text of a profile, built once and kept in a cache that is keyed by content."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
import tokenizers

from engine.data.packing import PackedSequences, open_stream, text_bytes, write_stream
from engine.data.text import Corpus, gzip_bits_per_byte, read_corpus, source_digest
from engine.data.tokenizers import Tokenizer, load_tokenizer, train_bpe
from engine.errors import UserError
from engine.profile_retention import TextData

_FORMAT = 1
_META = "meta.json"
_TRAIN, _HELDOUT = "train.tokens", "heldout.tokens"
_ABANDONED_SECONDS = 24 * 3600


@dataclass(frozen=True)
class TextDataset:
    """Training and held-out sequences, and the tokenizer that made them.

    `digest` names their content: equal digests are equal tokens, whatever the paths and the cache.
    """

    train: PackedSequences
    heldout: PackedSequences
    tokenizer: Tokenizer
    digest: str
    heldout_gzip_bits_per_byte: float


def cache_folder() -> Path:
    """Where packed text is kept: `$RETENTION_TUI_CACHE`, or the platform's cache folder."""
    override = os.environ.get("RETENTION_TUI_CACHE")
    return (Path(override) if override else platformdirs.user_cache_path("retention-tui")) / "data"


def load_text_data(
    data: TextData, vocab_size: int, sequence_length: int, seed: int, cache: Path | None = None
) -> TextDataset:
    """Reads, splits, tokenizes and packs the text, or opens what an earlier run with the same content left.

    `cache` is the folder to use instead of `cache_folder()`. A BPE is trained on the training text alone. A damaged
    entry is built again; of processes that want the same one at once, the first builds it. Raises `UserError` for bad
    text, for text shorter than one sequence, and for a tokenizer that does not fit `vocab_size`.
    """
    tokenizer = None if data.tokenizer == "bpe" else load_tokenizer(Path(data.tokenizer))
    if tokenizer is not None and tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"data.tokenizer: {data.tokenizer} has {tokenizer.vocab_size} tokens, more than model.vocab_size = "
            f"{vocab_size}; set model.vocab_size to at least {tokenizer.vocab_size}"
        )
    source = source_digest(data, seed)
    scheme = f"bpe {vocab_size} {tokenizers.__version__}" if tokenizer is None else tokenizer.digest
    key = hashlib.sha256(f"{_FORMAT}\0{source}\0{scheme}\0{sequence_length}".encode()).hexdigest()[:32]
    entry = (cache or cache_folder()) / key
    if not _is_whole(entry):
        try:
            _build(entry, data, seed, tokenizer, vocab_size)
        except OSError as error:
            raise UserError(
                f"data cache {entry.parent}: {error.strerror or error}; "
                "point $RETENTION_TUI_CACHE to a folder with room that can be written"
            ) from None
    return _open(entry, sequence_length)


def _build(entry: Path, data: TextData, seed: int, tokenizer: Tokenizer | None, vocab_size: int) -> None:
    """Builds beside the entry and renames, so that an entry is whole or absent; a second builder waits."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(entry.parent)
    with entry.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _is_whole(entry):
            return
        corpus = read_corpus(data, seed)
        with tempfile.TemporaryDirectory(dir=entry.parent, prefix=".building-") as temporary:
            built = Path(temporary, "entry")
            _write(built, corpus, tokenizer or train_bpe(corpus.train, vocab_size))
            if entry.exists():
                entry.rename(Path(temporary, "damaged"))
            built.rename(entry)


def _write(folder: Path, corpus: Corpus, tokenizer: Tokenizer) -> None:
    tokenizer.save(folder)
    for name, documents in ((_TRAIN, corpus.train), (_HELDOUT, corpus.heldout)):
        write_stream(folder / name, documents, tokenizer)
    meta = {
        "vocab_size": tokenizer.vocab_size,
        "train_bytes": text_bytes(corpus.train),
        "heldout_bytes": text_bytes(corpus.heldout),
        "heldout_gzip_bits_per_byte": gzip_bits_per_byte(corpus.heldout),
        "sha256": {path.name: _sha256(path) for path in sorted(folder.iterdir())},
    }
    (folder / _META).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def _is_whole(entry: Path) -> bool:
    try:
        meta: dict[str, Any] = json.loads((entry / _META).read_text(encoding="utf-8"))
        return all(_sha256(entry / name) == digest for name, digest in meta["sha256"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _open(entry: Path, sequence_length: int) -> TextDataset:
    meta = json.loads((entry / _META).read_text(encoding="utf-8"))
    tokenizer = load_tokenizer(entry)
    streams = {name: open_stream(entry / name, meta["vocab_size"]) for name in (_TRAIN, _HELDOUT)}
    end = tokenizer.end_of_text
    train = PackedSequences(streams[_TRAIN], sequence_length, meta["train_bytes"], end, keep_tail=False)
    heldout = PackedSequences(streams[_HELDOUT], sequence_length, meta["heldout_bytes"], end, keep_tail=True)
    if not len(train):
        tokens = len(train.stream) - 1
        raise UserError(
            f"data: the training text has {tokens} tokens, fewer than one sequence of train.sequence_length = "
            f"{sequence_length}; give more text or set train.sequence_length to at most {tokens}"
        )
    content = [meta["sha256"][_TRAIN], meta["sha256"][_HELDOUT], tokenizer.digest, str(sequence_length)]
    digest = hashlib.sha256("\0".join(content).encode()).hexdigest()
    return TextDataset(train, heldout, tokenizer, digest, meta["heldout_gzip_bits_per_byte"])


def _remove_abandoned(folder: Path) -> None:
    """What a killed process left half-built."""
    for path in folder.glob(".building-*"):
        try:
            if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
        except OSError:  # its builder has just removed it itself
            continue


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
