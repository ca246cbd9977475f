"""A kind's task with random numbers for data: real steps, without text, tokenizer or network."""

from __future__ import annotations

from collections.abc import Sequence

from engine.backend import mx
from engine.profile import LoRAProfile, Profile, RetentionProfile
from engine.tasks import Batch, Task
from engine.tasks.retention_lm import RetentionLMTask, model_config


class RetentionLMRehearsal(RetentionLMTask):
    """Begins with random weights, also where a run would borrow some."""

    def __init__(self, profile: RetentionProfile) -> None:  # not its parent's, which reads the text
        self._profile = profile
        self._borrowed = None
        self._config = model_config(profile.model)
        self._make_model()

    def batch(self, examples: Sequence[int]) -> Batch:
        count, length = len(examples), self._profile.train.sequence_length
        rows = mx.random.randint(0, self._config.vocab_size, (count, length + 1), dtype=mx.int32)
        lengths = mx.full((count,), length, dtype=mx.int32)
        mx.eval(rows, lengths)
        return Batch((rows, lengths), *(3 * (count * length,)))


def rehearsal(profile: Profile) -> Task:
    """The task of a profile's kind, with random data."""
    if isinstance(profile, LoRAProfile):
        from engine.planning.rehearsal_lora import LoRARehearsal  # loads mlx-lm, which takes a second

        return LoRARehearsal(profile)
    assert isinstance(profile, RetentionProfile)
    return RetentionLMRehearsal(profile)
