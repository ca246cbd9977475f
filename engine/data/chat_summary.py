"""What became of the rows of a fine-tuning, in numbers and in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Lengths:
    """How long the training rows are, in inputs, after truncation. `histogram[i]` counts 2ⁱ to 2ⁱ⁺¹ − 1."""

    shortest: int
    median: int
    p90: int
    longest: int
    histogram: tuple[int, ...]

    @classmethod
    def of(cls, lengths: NDArray[np.integer]) -> Lengths:
        median, p90 = np.quantile(lengths, [0.5, 0.9], method="lower")
        bins = np.frexp(lengths.astype(np.float64))[1] - 1
        counts = tuple(np.bincount(bins).tolist())
        return cls(int(lengths.min()), int(median), int(p90), int(lengths.max()), counts)

    def bars(self) -> str:
        """The histogram from the shortest row on, one character for each power of two."""
        counts = self.histogram[self.shortest.bit_length() - 1 :]
        most = max(counts)
        return "".join(_BARS[-(-count * (len(_BARS) - 1) // most)] if count else " " for count in counts)


@dataclass(frozen=True)
class Summary:
    """`tokens` and `counted` are predicted tokens of the training rows: all of them, and those that are learned."""

    format: str
    loss_on: str
    rows: int
    heldout_rows: int
    tokens: int
    counted: int
    lengths: Lengths
    truncated_rows: int
    """Of both sides, as are the tokens that were cut off them."""
    truncated_tokens: int
    sequence_length: int
    left_out: Mapping[str, tuple[int, str]]
    """Rows that are not learned, by their reason: how many, and where the first came from."""
    ignored: Mapping[str, tuple[int, str]]
    """What the chat template writes nothing of: in how many rows, and where the first came from."""
    repeated_rows: int
    """Held-out rows that are learned too."""

    def lines(self) -> list[str]:
        return [
            f"data: {_rows(self.rows)} to learn from, {self.heldout_rows:,} held out, format {self.format}; "
            f"{self.tokens:,} tokens, {self._share_learned()}",
            f"lengths {self.lengths.shortest:,} to {self.lengths.longest:,}, median {self.lengths.median:,}, "
            f"90 % up to {self.lengths.p90:,}: {self.lengths.bars()}",
        ]

    def warnings(self) -> list[str]:
        """What was not taken as it was."""
        lines = [
            f"data: {_rows(count)} left out: {reason} (the first is {first})"
            for reason, (count, first) in self.left_out.items()
        ]
        lines += [
            f"data: the chat template has no place for {key}, which {_rows(count)} {'has' if count == 1 else 'have'}: "
            f"not learned (the first is {first})"
            for key, (count, first) in self.ignored.items()
        ]
        if self.truncated_rows:
            share = self.truncated_rows / (self.rows + self.heldout_rows)
            lines.append(
                f"data: {_rows(self.truncated_rows)} ({100 * share:.1f} %) truncated to {self.sequence_length:,} "
                f"tokens, {self.truncated_tokens:,} tokens cut off; train.sequence_length is the limit"
            )
        if self.repeated_rows:
            lines.append(f"data: {self.repeated_rows:,} of {self.heldout_rows:,} held-out rows are learned too")
        return lines

    def _share_learned(self) -> str:
        if self.loss_on == "all":
            return "all of them learned"
        return f"{100 * self.counted / self.tokens:.0f} % of them answers"


def _rows(count: int) -> str:
    return f"{count:,} row{'' if count == 1 else 's'}"
