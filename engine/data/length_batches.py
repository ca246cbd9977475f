"""The order of examples of unequal length: like with like, so that little is padded, and still shuffled."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from engine.data.packing import order

_SORTED_TOGETHER = 64
"""Rows of a group at least: more pads less, fewer shuffles better."""


def examples_of(
    lengths: NDArray[np.integer], batch_size: int, step: int, seed: int, group: int = _SORTED_TOGETHER
) -> NDArray[np.int64]:
    """The `batch_size` examples of a step, counted from 1, longest first: a function of its arguments alone.

    An epoch is a permutation of all examples, cut into groups of at least `group`; each group is sorted by length and
    cut into batches, which are shuffled. Epoch follows epoch without a gap and no example is left out, so the batch
    between two epochs holds the end of one and the beginning of the next, of any length.
    """
    known = np.ascontiguousarray(lengths, dtype=np.int32).tobytes()
    epochs, places = np.divmod(np.arange((step - 1) * batch_size, step * batch_size), len(lengths))
    chosen = np.concatenate(
        [_epoch(known, batch_size, seed, int(epoch), group)[places[epochs == epoch]] for epoch in np.unique(epochs)]
    )
    return chosen[np.argsort(-lengths[chosen].astype(np.int64), kind="stable")]


@lru_cache(maxsize=4)
def _epoch(known: bytes, batch_size: int, seed: int, epoch: int, group: int) -> NDArray[np.int64]:
    """All examples in the order of an epoch; `known` is their lengths as int32, which can be hashed.

    Batches count from the first epoch's beginning. So the first `head` examples complete a batch that the epoch before
    began, and those after the last whole batch begin one of the next epoch: both stay as the permutation has them.
    """
    lengths = np.frombuffer(known, dtype=np.int32)
    permutation = order(len(lengths), seed, epoch)
    head = min(-epoch * len(lengths) % batch_size, len(lengths))
    whole = (len(lengths) - head) // batch_size
    middle = permutation[head : head + whole * batch_size]
    batches_together = max(-(-group // batch_size), 1)
    groups = np.arange(len(middle)) // (batches_together * batch_size)
    by_length = middle[np.lexsort((-lengths[middle], groups))].reshape(whole, batch_size)
    keys = np.random.PCG64(np.random.SeedSequence([seed, epoch, 1])).random_raw(whole)
    shuffled = by_length[np.lexsort((keys, np.arange(whole) // batches_together))]
    arranged = np.concatenate([permutation[:head], shuffled.ravel(), permutation[head + middle.size :]])
    arranged.setflags(write=False)
    return arranged
