"""A stream of tokens cut into sequences of one length, and the order in which training takes them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.data.tokenizers import Tokenizer

_ENCODED_AT_ONCE = 64


class PackedSequences:
    """Sequences of a token stream, each predicting `sequence_length` tokens from the one before.

    The stream is end-of-text, then every document followed by end-of-text. Sequence i is stream[i·L : i·L + L + 1]:
    neighbours overlap by one token, so that every token after the first is predicted exactly once. With `keep_tail`
    the last sequence may be shorter; without it, tokens that do not fill a sequence are left out.
    """

    def __init__(
        self,
        stream: NDArray[np.unsignedinteger],
        sequence_length: int,
        text_bytes: int,
        end_of_text: int,
        *,
        keep_tail: bool,
    ) -> None:
        predicted = max(len(stream) - 1, 0)
        whole = predicted // sequence_length
        self.stream = stream
        self.sequence_length = sequence_length
        self.tokens: int = predicted if keep_tail else whole * sequence_length
        """Predicted tokens, over all sequences."""
        self.bytes = text_bytes
        """UTF-8 bytes of the documents in the stream (of all of it, also where a tail is left out)."""
        self._end_of_text = end_of_text
        self._count = -(-self.tokens // sequence_length)

    def __len__(self) -> int:
        return self._count

    def batch(self, indices: Sequence[int] | NDArray[np.integer]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """The rows `[n, sequence_length + 1]` and how many tokens each predicts `[n]`.

        Row j holds `lengths[j] + 1` tokens, then end-of-text up to its end; inputs are `rows[:, :-1]`, targets
        `rows[:, 1:]`, of which the first `lengths[j]` count. Raises `IndexError` outside of `0 <= index < len(self)`.
        """
        chosen = np.asarray(indices, dtype=np.int64)
        if chosen.size and (chosen.min() < 0 or chosen.max() >= self._count):
            raise IndexError(f"sequences are 0 to {self._count - 1}, asked for {chosen.min()} to {chosen.max()}")
        starts = chosen * self.sequence_length
        lengths = np.minimum(self.sequence_length, self.tokens - starts)
        offsets = np.arange(self.sequence_length + 1)
        inside = offsets <= lengths[:, None]
        positions = np.where(inside, starts[:, None] + offsets, 0)
        rows = np.where(inside, self.stream[positions], self._end_of_text)
        return rows.astype(np.int32), lengths.astype(np.int32)


def write_stream(path: Path, documents: Sequence[str], tokenizer: Tokenizer) -> None:
    """Writes the stream of the documents as little-endian integers."""
    kind = stream_dtype(tokenizer.vocab_size)
    with path.open("wb") as file:
        file.write(np.array([tokenizer.end_of_text], dtype=kind).tobytes())
        for start in range(0, len(documents), _ENCODED_AT_ONCE):
            for ids in tokenizer.encode_batch(documents[start : start + _ENCODED_AT_ONCE]):
                file.write(np.array([*ids, tokenizer.end_of_text], dtype=kind).tobytes())


def open_stream(path: Path, vocab_size: int) -> NDArray[np.unsignedinteger]:
    """The stream in a file, memory-mapped and read-only."""
    return np.memmap(path, dtype=stream_dtype(vocab_size), mode="r")


def stream_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """16 bits a token where every id fits, else 32."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def text_bytes(documents: Iterable[str]) -> int:
    """UTF-8 bytes of the documents."""
    return sum(len(document.encode()) for document in documents)


@lru_cache(maxsize=4)
def order(n_sequences: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The permutation of `range(n_sequences)` in which an epoch takes them: a function of its arguments alone.

    Sorts the raw output of a PCG64, which NumPy keeps the same in all releases, as it does not its `permutation`.
    """
    keys = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(n_sequences)
    permutation = np.argsort(keys, kind="stable").astype(np.int64)
    permutation.setflags(write=False)
    return permutation


def batch_indices(n_sequences: int, batch_size: int, step: int, seed: int) -> NDArray[np.int64]:
    """The `batch_size` sequences of a step, counted from 0: a function of its arguments alone.

    Epoch follows epoch without a gap, so a batch may hold the end of one and the beginning of the next, or several.
    """
    epochs, places = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), n_sequences)
    parts = [order(n_sequences, seed, int(epoch))[places[epochs == epoch]] for epoch in np.unique(epochs)]
    return np.concatenate(parts)
