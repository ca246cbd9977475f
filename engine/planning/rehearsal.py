"""A kind's task with random numbers for data: real steps, without text, tokenizer or network."""

from __future__ import annotations

from collections.abc import Sequence

from engine.backend import mx
from engine.models.retention_lm import RetentionLM
from engine.profile import Profile, RetentionProfile
from engine.tasks import Batch
from engine.tasks.retention_lm import RetentionLMTask, model_config


class RetentionLMRehearsal(RetentionLMTask):
    """Begins with random weights, also where a run would borrow some."""

    def __init__(self, profile: RetentionProfile) -> None:  # not its parent's, which reads the text
        self._profile = profile
        self._borrowed = None
        self._config = model_config(profile.model)
        self.model = RetentionLM(self._config)
        self.model.gradient_checkpointing = profile.train.gradient_checkpointing

    def batch(self, examples: Sequence[int]) -> Batch:
        count, length = len(examples), self._profile.train.sequence_length
        rows = mx.random.randint(0, self._config.vocab_size, (count, length + 1), dtype=mx.int32)
        lengths = mx.full((count,), length, dtype=mx.int32)
        mx.eval(rows, lengths)
        return Batch((rows, lengths), count * length)


def rehearsal(profile: Profile) -> RetentionLMRehearsal:
    """The task of a profile's kind, with random data."""
    assert isinstance(profile, RetentionProfile)
    return RetentionLMRehearsal(profile)
