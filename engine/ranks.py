"""Data-parallel training over several processes (`mlx.launch`); one process is the common case of it."""

from __future__ import annotations

import hashlib
import time
from typing import Any

from engine.backend import mx, scalar
from engine.errors import UserError

from mlx.utils import tree_flatten, tree_map, tree_unflatten


class RankLost(UserError):
    """Another process of this run is gone, or never came."""


class Ranks:
    """This process among those that train one run together. Rank 0 alone decides, writes and speaks.

    Made, it has found the others, and until then no Python code of this process runs, signal handlers included.
    Every exchange waits for all ranks and raises `RankLost` where one is gone; `waiting_since` is when the present one
    began (`time.monotonic()`), None between them.
    """

    def __init__(self) -> None:
        try:
            self._group = mx.distributed.init()
        except RuntimeError as error:
            raise RankLost(f"the ranks did not find each other: {error}") from None
        self.rank: int = self._group.rank()
        self.size: int = self._group.size()
        self.waiting_since: float | None = None

    @property
    def chief(self) -> bool:
        return self.rank == 0

    def sum(self, tree: Any) -> Any:
        """The sum of each array over all ranks."""
        if self.size == 1:
            return tree
        # Sorted, because ranks must exchange arrays in one order, and a loaded tree may be in another than a fresh one.
        return tree_unflatten([(name, self._sum(array)) for name, array in sorted(tree_flatten(tree))])

    def _sum(self, array: mx.array) -> mx.array:
        total = mx.distributed.all_sum(array, group=self._group)
        self.waiting_since = time.monotonic()
        try:
            mx.eval(total)  # one at a time: where a rank is gone, the ring fails the first, and others would hang
        except RuntimeError as error:
            raise RankLost(f"another rank is gone: {error}") from None
        finally:
            self.waiting_since = None
        return total

    def from_chief(self, tree: Any) -> Any:
        """Rank 0's arrays, on every rank. All ranks give a tree of the same shapes and dtypes."""
        if self.size == 1:
            return tree
        chief = self.chief
        return self.sum(tree_map(lambda array: array if chief else mx.zeros_like(array), tree))

    def decide(self, value: int) -> int:
        """Rank 0's number, on every rank."""
        return value if self.size == 1 else int(scalar(self.from_chief(mx.array(value, mx.int32))))

    def decide_number(self, value: float) -> float:
        """As `decide`, for a number that may be rounded to float32 where there are several ranks."""
        return value if self.size == 1 else scalar(self.from_chief(mx.array(value, mx.float32)))

    def any(self, flag: bool) -> bool:
        """Whether it is true on some rank."""
        return flag if self.size == 1 else scalar(self.sum(mx.array(flag, mx.int32))) > 0

    def same(self, text: str) -> bool:
        """Whether all ranks gave the same text."""
        mine = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) >> 1
        return not self.any(self.decide(mine) != mine)
