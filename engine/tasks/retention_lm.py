"""Pretraining of a power-retention language model from text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine.backend import compute_dtype, mx
from engine.checkpoint import choose_checkpoint
from engine.commands import Generate
from engine.data.packing import PackedSequences, batch_indices
from engine.data.text_dataset import load_text_data
from engine.data.tokenizers import load_tokenizer
from engine.errors import UserError
from engine.generate import generate
from engine.models.anatomy import Anatomy
from engine.models.retention_lm import RetentionLM, RetentionLMConfig
from engine.ops.dropout import Keys
from engine.ops.losses import linear_cross_entropy_sum
from engine.profile import RetentionProfile
from engine.profile_retention import RetentionModel
from engine.store import RunDirectory
from engine.tasks import Batch

from mlx.utils import tree_flatten, tree_map

_FREE_TO_CHANGE = {"chunk_size", "switch_over"}
_PARTS = {"embedding": "embedding", "retention": "retention", "gate": "retention", "mlp": "mlp"}


class RetentionLMTask:
    """See `engine.tasks.Task`."""

    def __init__(self, profile: RetentionProfile, runs_folder: Path, checkpoint: Path | None = None) -> None:
        self._profile, self._train = profile, profile.train
        self._dtype = compute_dtype(profile.train.dtype)
        self._runs_folder, data, init_from = runs_folder, profile.data, profile.model.init_from
        self.borrowed_weights = init_from is not None
        if init_from is not None:
            borrowed = checkpoint or _find_weights(init_from, runs_folder)
            if data.tokenizer == "bpe":  # weights only mean something with the tokenizer that they were trained with
                data = data.model_copy(update={"tokenizer": str(borrowed)})
        dataset = load_text_data(data, profile.model.vocab_size, self._train.sequence_length, profile.seed)
        self._tokenizer, self._sequences, self._heldout = dataset.tokenizer, dataset.train, dataset.heldout
        self.data_digest = dataset.digest
        self._config = model_config(profile.model)
        self._make_model()

    def _make_model(self) -> None:
        self.model, self.keys = RetentionLM(self._config), Keys()
        self.anatomy, self.vocabulary = Anatomy(self.model), self._config.vocab_size
        self.size = sum(array.size for _, array in tree_flatten(self.model.parameters()))
        train = self._profile.train
        self.model.gradient_checkpointing = train.gradient_checkpointing and train.backward == "whole"

    def total_steps(self) -> int:
        train = self._train
        if train.steps is not None:
            return train.steps
        if train.epochs is not None:
            return math.ceil(train.epochs * len(self._sequences) / train.batch_size)
        assert train.tokens is not None
        return math.ceil(train.tokens / (train.batch_size * train.sequence_length))

    def examples(self, step: int, rank: int, ranks: int) -> Sequence[int]:
        chosen = batch_indices(len(self._sequences), self._train.batch_size, step - 1, self._profile.seed)
        share = self._train.batch_size // ranks
        return chosen[rank * share : (rank + 1) * share].tolist()

    def batch(self, examples: Sequence[int]) -> Batch:
        return _batch(self._sequences, examples)

    def heldout(self, size: int, most: int | None = None) -> Iterator[Batch]:
        count = len(self._heldout) if most is None else min(most, len(self._heldout))
        for start in range(0, count, size):
            yield _batch(self._heldout, range(start, min(start + size, count)))

    def loss(self, *arrays: mx.array) -> mx.array:
        tokens, targets, counted = self.predicting(*arrays)
        hidden = self.model.hidden_states(tokens).flatten(0, 1)
        return linear_cross_entropy_sum(hidden, self.model.embedding.weight, targets.flatten(), counted.flatten())

    def predicting(self, *arrays: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        rows, lengths = arrays
        return rows[:, :-1], rows[:, 1:], mx.arange(rows.shape[1] - 1) < lengths[:, None]

    def heldout_metrics(self, loss_sum: float, tokens: int) -> Mapping[str, float]:
        loss = loss_sum / tokens
        tokens_per_byte = self._heldout.tokens / self._heldout.bytes
        return {
            "val_loss": loss,
            "val_perplexity": math.exp(min(loss, 700.0)),
            "val_bits_per_byte": loss / math.log(2) * tokens_per_byte,
        }

    def part_of(self, parameter: str) -> str:
        return next((part for word, part in _PARTS.items() if word in parameter.split(".")), "norm")

    def initial_parameters(self) -> Any:
        if (init_from := self._profile.model.init_from) is not None:
            return self.load(_find_weights(init_from, self._runs_folder))
        mx.random.seed(self._profile.seed)
        return RetentionLM(self._config).trainable_parameters()

    def load(self, folder: Path) -> Any:
        loaded = RetentionLM.load(folder)
        # How the op is cut into chunks changes no number that a weight depends on.
        theirs, ours = asdict(loaded.config), asdict(self._config)
        if differing := [name for name in ours if ours[name] != theirs[name] and name not in _FREE_TO_CHANGE]:
            name = differing[0]
            raise UserError(f"{folder}: its model has {name} = {theirs[name]}, the profile has {name} = {ours[name]}")
        return loaded.trainable_parameters()

    def save(self, parameters: Any, folder: Path) -> None:
        shape = RetentionLM(self._config)  # one of its own, so that nothing keeps these weights afterwards
        shape.update(parameters)
        shape.save(folder)
        self._tokenizer.save(folder)

    def answer(self, parameters: Any | None, ask: Generate) -> Iterator[str | None]:
        if parameters is None:
            parameters = self.initial_parameters()
        speaker = RetentionLM(self._config)  # a shape of its own, so that it keeps its weights while training goes on
        speaker.update(tree_map(lambda array: array.astype(self._dtype), parameters))
        return speak(speaker, self._tokenizer, ask)


def _batch(sequences: PackedSequences, indices: Sequence[int]) -> Batch:
    rows, lengths = sequences.batch(indices)
    tokens = int(lengths.sum())
    return Batch((mx.array(rows), mx.array(lengths)), tokens, tokens, rows.shape[0] * (rows.shape[1] - 1))


def speak(model: RetentionLM, tokenizer: Any, ask: Generate) -> Iterator[str | None]:
    """Continues a text, piece by piece; None while the prompt is still being read."""
    prompt = [tokenizer.end_of_text, *tokenizer.encode(ask.prompt)]
    text = tokenizer.stream()
    for token in generate(
        model,
        prompt,
        max_tokens=ask.max_tokens,
        temperature=ask.temperature,
        top_p=ask.top_p,
        seed=ask.seed,
        ends={tokenizer.end_of_text},
        vocabulary=tokenizer.vocab_size,
    ):
        yield None if token is None else text.push(token)


def load_speaker(folder: Path) -> tuple[RetentionLM, Any]:
    """The model and tokenizer of a checkpoint folder, for `speak`, in this machine's own dtype."""
    model = RetentionLM.load(folder)
    model.set_dtype(compute_dtype("auto"))
    return model, load_tokenizer(folder)


def model_config(model: RetentionModel) -> RetentionLMConfig:
    """The shape that a profile's `[model]` describes."""
    return RetentionLMConfig(**{name: getattr(model, name) for name in RetentionLMConfig.__dataclass_fields__})


def _find_weights(name: str, runs_folder: Path) -> Path:
    """The folder that `model.init_from` names: a run (its best checkpoint), a checkpoint or any model folder."""
    for path in (runs_folder / name, Path(name).expanduser()):
        if (path / "run.json").is_file():
            return choose_checkpoint(RunDirectory(path), "best", to_read=True).path
        if (path / "model.safetensors").is_file():
            return path
    raise UserError(f"model.init_from = {name!r}: neither a run in {runs_folder} nor a folder with model.safetensors")
