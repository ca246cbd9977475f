"""Rows of a fine-tuning as tokens: which of them are learned, which rows are held out."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.data.chat_summary import Lengths, Summary
from engine.data.chat_template import ChatTemplate, read_template, use_template
from engine.data.conversations import Conversation, LeftOut, PlainText, Unusable, conversations, format_of, keys_of
from engine.data.rows import Row, check_sources, read_rows
from engine.errors import UserError
from engine.loading import Loading
from engine.profile_lora import ChatData

_TOKENIZED_AT_ONCE = 256
_SPLIT, _CHOICE = 1, 2  # what the seed is used for


class Examples:
    """Rows as tokens, one after the other in memory, each predicting every token from those before it."""

    def __init__(self, rows: Sequence[_Tokens], sequence_length: int) -> None:
        self._tokens = np.concatenate([row.ids for row in rows])
        self._counted = np.concatenate([row.counted for row in rows])
        self._starts = np.cumsum([0, *(len(row.ids) for row in rows)])
        self.sequence_length = sequence_length
        self.lengths: NDArray[np.int64] = np.diff(self._starts) - 1
        """Inputs of each row, of which each predicts one token."""
        self.lengths.setflags(write=False)
        self.tokens = int(self.lengths.sum())
        """Predicted tokens, over all rows."""
        self.counted = int(self._counted.sum())
        """Those of them that are learned."""
        self.largest_token = int(self._tokens.max())

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(
        self, indices: Sequence[int] | NDArray[np.integer], multiple: int = 32
    ) -> tuple[NDArray[np.int32], NDArray[np.bool_], int]:
        """The rows `[n, t + 1]`, which targets count `[n, t]`, and how many of the n·t inputs are not padding.

        Inputs are `rows[:, :-1]`, targets `rows[:, 1:]`. t is the longest row rounded up to `multiple`, but at most
        `sequence_length`; what is shorter ends with zeros, which never count. Raises `IndexError` for rows there are
        none of.
        """
        chosen = np.asarray(indices, dtype=np.int64)
        if not chosen.size or chosen.min() < 0 or chosen.max() >= len(self):
            raise IndexError(f"rows are 0 to {len(self) - 1}, asked for {chosen.tolist()}")
        lengths = self.lengths[chosen]
        width = min(-(-int(lengths.max()) // multiple) * multiple, self.sequence_length)
        rows = np.zeros((len(chosen), width + 1), dtype=np.int32)
        counted = np.zeros((len(chosen), width), dtype=np.bool_)
        for place, (start, length) in enumerate(zip(self._starts[chosen], lengths, strict=True)):
            rows[place, : length + 1] = self._tokens[start : start + length + 1]
            counted[place, :length] = self._counted[start + 1 : start + length + 1]
        return rows, counted, int(lengths.sum())

    def content(self) -> Iterator[bytes]:
        """What names the rows: equal bytes are equal rows in the same order."""
        yield self._starts.astype("<i8").tobytes()
        yield self._tokens.astype("<i4").tobytes()
        yield np.packbits(self._counted).tobytes()


@dataclass(frozen=True)
class ChatDataset:
    """`digest` names tokens, masks and split; `largest_token` has to be below the model's vocabulary."""

    train: Examples
    heldout: Examples
    digest: str
    summary: Summary
    largest_token: int


def check_files(data: ChatData) -> None:
    """Raises `UserError` where a file that the profile names is not there, before anything takes long."""
    check_sources(data)
    if data.chat_template is not None:
        read_template(data.chat_template)


def load_chat_data(data: ChatData, tokenizer: Any, sequence_length: int, seed: int, loading: Loading) -> ChatDataset:
    """Reads, understands, tokenizes and splits the rows of a profile whose paths are absolute.

    `tokenizer` is mlx-lm's `TokenizerWrapper`; tokens, and with `loss_on = "last-answer"` masks, are those of mlx-lm's
    own data sets. Rows have at most `sequence_length` inputs; what is longer is cut at its end and counted. Says in a
    few lines what became of the rows. Raises `UserError`, with file and line where it is a row's fault.
    """
    use_template(tokenizer, data.chat_template)
    rows = read_rows(data, keys_of(data), loading)
    format = format_of(rows.train[0], data)
    reader = _Reader(data, format, tokenizer, sequence_length, loading)
    train = reader.read(rows.train, seed if data.most_rows else None)
    if rows.heldout is None:
        train, heldout = _split(train, data.heldout_fraction, seed)
        repeated = 0
    else:
        heldout = reader.read(rows.heldout)
        learned = {row.key for row in train}
        repeated = sum(row.key in learned for row in heldout)
    return _finished(reader, Examples(train, sequence_length), Examples(heldout, sequence_length), repeated, loading)


def _finished(reader: _Reader, train: Examples, heldout: Examples, repeated: int, loading: Loading) -> ChatDataset:
    digest = hashlib.sha256()
    for side in (train, heldout):
        for part in side.content():
            digest.update(part)
    summary = Summary(
        format=reader.format,
        loss_on=reader.data.loss_on,
        rows=len(train),
        heldout_rows=len(heldout),
        tokens=train.tokens,
        counted=train.counted,
        lengths=Lengths.of(train.lengths),
        truncated_rows=reader.truncated_rows,
        truncated_tokens=reader.truncated_tokens,
        sequence_length=reader.sequence_length,
        left_out={reason: (len(origins), origins[0]) for reason, origins in reader.left_out.origins.items()},
        ignored={key: (len(origins), origins[0]) for key, origins in reader.ignored.items()},
        repeated_rows=repeated,
    )
    for line in summary.lines():
        loading.tell(line)
    for line in summary.warnings():
        loading.warn(line)
    return ChatDataset(train, heldout, digest.hexdigest(), summary, max(train.largest_token, heldout.largest_token))


@dataclass(frozen=True)
class _Tokens:
    """A row: its tokens, and which of them are learned. The first is never, for nothing predicts it."""

    ids: NDArray[np.int32]
    counted: NDArray[np.bool_]

    @property
    def key(self) -> bytes:
        """Equal rows have equal ones."""
        return hashlib.blake2b(self.ids.tobytes() + self.counted.tobytes(), digest_size=16).digest()


class _Reader:
    """Makes rows to tokens, and counts what it had to cut or leave out."""

    def __init__(self, data: ChatData, format: str, tokenizer: Any, sequence_length: int, loading: Loading) -> None:
        self.data, self.format, self.sequence_length = data, format, sequence_length
        self.left_out = LeftOut(lenient=data.dataset is not None)
        self.ignored: dict[str, list[str]] = defaultdict(list)
        self.truncated_rows = self.truncated_tokens = 0
        self._tokenizer, self._loading = tokenizer, loading
        self._template = None if format == "text" else ChatTemplate(tokenizer)

    def read(self, rows: list[Row], seed: int | None = None) -> list[_Tokens]:
        """The usable ones of the rows; with a seed, `data.most_rows` of them at most."""
        meant = conversations(rows, self.data, self.format, self.left_out)
        if seed is not None and self.data.most_rows is not None:
            chosen = np.sort(_shuffled(len(meant), seed, _CHOICE)[: self.data.most_rows])
            meant = [meant[index] for index in chosen]
        made = list(self._fitting(meant))
        if not made:
            reasons = "; ".join(f"{len(origins)}: {reason}" for reason, origins in self.left_out.origins.items())
            raise UserError(f"data: none of the {len(rows)} rows can be learned from ({reasons})")
        return made

    def _fitting(self, meant: Sequence[PlainText | Conversation]) -> Iterator[_Tokens]:
        most = self.sequence_length + 1
        for start in range(0, len(meant), _TOKENIZED_AT_ONCE):
            self._loading.progress("tokenizing", start, len(meant), "rows")
            chunk = meant[start : start + _TOKENIZED_AT_ONCE]
            for origin, row in self._tokenized(chunk):
                if len(row.ids) < 2:
                    self.left_out.add("a single token, which predicts nothing", origin)
                elif not row.counted[:most].any():
                    reason = f"the answer begins after {self.sequence_length:,} tokens (train.sequence_length)"
                    self.left_out.add(reason, origin)
                else:
                    self.truncated_rows += len(row.ids) > most
                    self.truncated_tokens += max(len(row.ids) - most, 0)
                    yield _Tokens(row.ids[:most], row.counted[:most])
        self._loading.progress("tokenizing", len(meant), len(meant), "rows")

    def _tokenized(self, chunk: Sequence[PlainText | Conversation]) -> Iterator[tuple[str, _Tokens]]:
        """Each row with its origin. All texts of a chunk, and their beginnings, go to the tokenizer together."""
        written = []
        for source in chunk:
            try:
                written.append((source.origin, *self._written(source)))
            except Unusable as error:
                self.left_out.judge(error)
        texts = list(dict.fromkeys(text for _, whole, borders in written for text in (whole, *borders)))
        ids = dict(zip(texts, self._ids(texts) if texts else [], strict=True))
        for origin, whole, borders in written:
            yield origin, _Tokens(ids[whole], self._mask(ids[whole], [ids[border] for border in borders]))

    def _written(self, source: PlainText | Conversation) -> tuple[str, list[str]]:
        """A row's text, and its beginnings up to where each answer begins and where it ends."""
        if isinstance(source, PlainText):
            return source.text, [source.text[: source.answer_from], source.text] if source.answer_from else []
        assert self._template is not None
        whole = self._template.whole(source)
        for key in self._template.ignored(source, whole):
            self.ignored[key].append(source.origin)
        if self.data.loss_on == "all":
            return whole, []
        places = [place for place, message in enumerate(source.messages) if message["role"] == "assistant"]
        if self.data.loss_on == "last-answer":
            places = places[-1:]
        return whole, [text for place in places for text in self._template.around(source, whole, place)]

    def _ids(self, texts: list[str]) -> Iterator[NDArray[np.int32]]:
        """The tokens of each text as mlx-lm makes them: plain text gets an end, a template has written its own."""
        plain = self._template is None
        end = self._tokenizer.eos_token_id
        many = self._tokenizer._tokenizer  # mlx-lm's wrapper can take one text at a time only
        encoded = many(texts, add_special_tokens=plain, verbose=False)
        for ids in encoded["input_ids"]:
            ended = [*ids, end] if plain and end is not None and ids[-1:] != [end] else ids
            yield np.array(ended, dtype=np.int32)

    def _mask(self, ids: NDArray[np.int32], borders: Sequence[NDArray[np.int32]]) -> NDArray[np.bool_]:
        """What counts, where `borders` are pairs of beginnings: up to an answer, and with it."""
        counted = np.zeros(len(ids), dtype=np.bool_)
        for before, end in zip(borders[::2], borders[1::2], strict=True):
            # mlx-lm takes the beginning's number of tokens; they differ where a token crosses the border.
            exact = self.data.loss_on == "last-answer" and self._template is not None
            start = len(before) if exact else _agreeing(ids, before)
            counted[start : _agreeing(ids, end)] = True
        if self.data.loss_on == "all":
            counted[:] = True
        counted[:1] = False
        return counted


def _agreeing(one: NDArray[np.int32], other: NDArray[np.int32]) -> int:
    """How many tokens both begin with."""
    shorter = min(len(one), len(other))
    different = np.flatnonzero(one[:shorter] != other[:shorter])
    return int(different[0]) if different.size else shorter


def _split(rows: list[_Tokens], fraction: float, seed: int) -> tuple[list[_Tokens], list[_Tokens]]:
    """Holds out a share of the rows, at least one, chosen by the seed; equal rows fall on one side."""
    alike: dict[bytes, list[int]] = {}
    for index, row in enumerate(rows):
        alike.setdefault(row.key, []).append(index)
    groups = list(alike.values())
    if len(groups) < 2:
        alone = "1 row cannot be"
        same = f"{len(rows)} rows, all alike once they are cut to train.sequence_length, cannot be"
        raise UserError(
            f"data: {alone if len(rows) == 1 else same} split into some to learn from and some held out; "
            "give more, or data.heldout_files"
        )
    held: set[int] = set()
    _, *others = [groups[place] for place in _shuffled(len(groups), seed, _SPLIT)]  # one of them is learned at least
    for group in others:
        if len(held) + len(group) / 2 <= fraction * len(rows):
            held.update(group)
    held = held or {*min(others, key=len)}
    train = [row for index, row in enumerate(rows) if index not in held]
    return train, [rows[index] for index in sorted(held)]


def _shuffled(count: int, seed: int, purpose: int) -> NDArray[np.int64]:
    """A permutation that NumPy keeps the same in all releases, as it does not its `permutation`."""
    keys = np.random.PCG64(np.random.SeedSequence([seed, 0, purpose])).random_raw(count)
    return np.argsort(keys, kind="stable").astype(np.int64)
