"""Data-parallel training over several processes (`mlx.launch`); one process is the common case of it."""

from __future__ import annotations

from typing import Any

from engine.backend import mx, scalar

from mlx.utils import tree_flatten, tree_map, tree_unflatten


class Ranks:
    """This process among those that train one run together. Rank 0 alone decides, writes and speaks."""

    def __init__(self) -> None:
        self._group = mx.distributed.init()
        self.rank: int = self._group.rank()
        self.size: int = self._group.size()

    @property
    def chief(self) -> bool:
        return self.rank == 0

    def sum(self, tree: Any) -> Any:
        """The sum of each array over all ranks."""
        if self.size == 1:
            return tree
        # Sorted, because ranks must exchange arrays in one order, and a loaded tree may be in another than a fresh one.
        named = sorted(tree_flatten(tree))
        return tree_unflatten([(name, mx.distributed.all_sum(array, group=self._group)) for name, array in named])

    def from_chief(self, tree: Any) -> Any:
        """Rank 0's arrays, on every rank. All ranks give a tree of the same shapes and dtypes."""
        if self.size == 1:
            return tree
        chief = self.chief
        return self.sum(tree_map(lambda array: array if chief else mx.zeros_like(array), tree))

    def decide(self, value: int) -> int:
        """Rank 0's number, on every rank; waits for all of them."""
        return value if self.size == 1 else int(scalar(self.from_chief(mx.array(value, mx.int32))))
