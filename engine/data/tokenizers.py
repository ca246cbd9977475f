"""Tokenizers: a byte-level BPE trained in place, or any Hugging Face tokenizer folder."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # unset, the library warns on stderr after a fork

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from engine.errors import UserError

END_OF_TEXT = "<|endoftext|>"
"""The special token that ends a document in a tokenizer trained here."""

_KNOWN_ENDS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|eot_id|>", "<|im_end|>")
_COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


class DetokenizerStream(Protocol):
    """Turns token ids into text one by one; a character comes out when all of its bytes have."""

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""
        ...

    def finish(self) -> str:
        """What is left at the end: U+FFFD for bytes that never became a character."""
        ...


class Tokenizer:
    """Text to token ids and back.

    Text is plain: a special token spelled out in it is encoded as ordinary characters, and `decode` leaves special
    tokens out. `companions` are the files beside tokenizer.json that a loader wants (tokenizer_config.json, …).
    """

    def __init__(self, description: str, end_of_text: str, companions: Mapping[str, str]) -> None:
        self._description = description
        self._companions = dict(companions)
        self._backend = tokenizers.Tokenizer.from_str(description)
        self._backend.no_truncation()  # a folder may carry a limit that would cut documents in silence
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        end_id = self._backend.token_to_id(end_of_text)
        if end_id is None:
            raise ValueError(f"{end_of_text!r} is not in the vocabulary")
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self.end_of_text: int = end_id
        self.vocab_size: int = max(vocabulary.values()) + 1
        """Rows that an embedding needs: the largest id plus one."""
        self.digest: str = hashlib.sha256(f"{end_of_text}\0{description}".encode()).hexdigest()
        self._byte_table = self._bytes_of_tokens(vocabulary) if _is_byte_level(description) else None

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text; no special tokens are added."""
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts at once, on all cores."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids, without special tokens; U+FFFD where the bytes are not UTF-8."""
        return str(self._backend.decode(list(ids), skip_special_tokens=True))

    def stream(self) -> DetokenizerStream:
        """A fresh incremental detokenizer: what it emits, joined, is `decode` of the same ids."""
        return _WindowStream(self) if self._byte_table is None else _ByteStream(self._byte_table)

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json and its companions, so that `transformers.AutoTokenizer` loads the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self._description, encoding="utf-8")
        for name, content in self._companions.items():
            (folder / name).write_text(content, encoding="utf-8")

    def _bytes_of_tokens(self, vocabulary: Mapping[str, int]) -> list[bytes]:
        added = self._backend.get_added_tokens_decoder()
        byte_of = _byte_of_character()
        table = [b""] * self.vocab_size
        for token, index in vocabulary.items():
            if index in added:
                table[index] = b"" if added[index].special else token.encode()
            else:
                table[index] = bytes(byte_of[character] for character in token)
        return table


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE of at most `vocab_size` tokens (Sennrich et al. 2016, over bytes as in GPT-2).

    Deterministic, and lossless for any text: all 256 bytes are in the vocabulary. Text that holds too few repeated
    pairs gives a smaller vocabulary.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "bos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    return Tokenizer(backend.to_str(), END_OF_TEXT, {"tokenizer_config.json": json.dumps(config, indent=2) + "\n"})


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder that holds a tokenizer.json, such as a Hugging Face model folder.

    Raises `UserError` where the folder, the file or an end-of-text token is missing, or a file cannot be read.
    """
    path = folder / "tokenizer.json"
    if not folder.is_dir():
        raise UserError(f"tokenizer {folder}: no such folder; give a folder that holds a tokenizer.json, or `bpe`")
    if not path.is_file():
        raise UserError(f"tokenizer {folder}: has no tokenizer.json; a fast tokenizer's save_pretrained writes one")
    description = _read_text(path)
    companions = {name: _read_text(folder / name) for name in _COMPANIONS if (folder / name).is_file()}
    try:
        vocabulary = tokenizers.Tokenizer.from_str(description).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises bare Exception for a file that it cannot parse
        raise UserError(f"tokenizer {path}: not a tokenizer.json: {' '.join(str(error).split())}") from None
    named = [_end_named_in(folder / name, content) for name, content in companions.items() if name in _COMPANIONS[:2]]
    for end_of_text in (*named, *_KNOWN_ENDS):
        if end_of_text in vocabulary:
            return Tokenizer(description, end_of_text, companions)
    raise UserError(f"tokenizer {folder}: no end-of-text token; name one as eos_token in tokenizer_config.json")


class _ByteStream:
    """For byte-level vocabularies: every token is a known string of bytes."""

    def __init__(self, table: list[bytes]) -> None:
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(self._table[token])

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class _WindowStream:
    """For any other vocabulary: decodes the last few tokens again and emits what is new.

    A token is decoded together with the one before, because a decoder may treat the first token of a text differently
    (a leading space). Tokens that end in U+FFFD are held back, at most `_LONGEST_HELD` of them.
    """

    _LONGEST_HELD = 8

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._held: list[int] = []

    def push(self, token: int) -> str:
        self._held.append(token)
        text = self._new_text()
        if not text or (text.endswith("\ufffd") and len(self._held) < self._LONGEST_HELD):
            return ""
        self._context, self._held = self._held, []
        return text

    def finish(self) -> str:
        text = self._new_text()
        self._context, self._held = [], []
        return text

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._held)[len(before) :]


def _is_byte_level(description: str) -> bool:
    decoder: Any = json.loads(description).get("decoder") or {}
    return bool(decoder.get("type") == "ByteLevel")


def _byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: printable Latin-1 stands for itself, the rest is moved to 256 and on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(moved)}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"tokenizer {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"tokenizer {path}: not UTF-8 text") from None


def _end_named_in(path: Path, content: str) -> str | None:
    try:
        table: Any = json.loads(content)
    except json.JSONDecodeError as error:
        raise UserError(f"tokenizer {path}: not valid JSON: {error}") from None
    end = table.get("eos_token") if isinstance(table, dict) else None
    return end.get("content") if isinstance(end, dict) else end
