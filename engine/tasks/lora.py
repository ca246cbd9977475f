"""Fine-tuning of a pretrained language model: LoRA, DoRA, or all of its weights."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from engine.backend import compute_dtype, mx, on_gpu
from engine.checkpoint import choose_checkpoint
from engine.commands import Generate
from engine.data.chat_dataset import Examples, check_files, load_chat_data
from engine.data.length_batches import examples_of
from engine.errors import UserError
from engine.loading import Loading
from engine.models.adapters import adapter_config, attach, compare_settings, load_adapter, save_adapter
from engine.models.anatomy import Anatomy, CannotCutError, trained_by_layer
from engine.models.cached import speak
from engine.models.pretrained import Base, load_base, vocabulary_size
from engine.models.sharing import twin
from engine.ops.dropout import Keys, take_keys
from engine.ops.losses import cross_entropy_sum, head_cross_entropy_sum, tokens_at_once
from engine.ops.recompute import kept_layer, recomputed_layer
from engine.profile import LoRAProfile
from engine.store import RunDirectory
from engine.tasks import Batch

import mlx.nn as nn
from mlx.utils import tree_map, tree_unflatten
from mlx_lm.utils import get_total_parameters

_SAMPLES, _SAMPLE_BYTES = 64, 1 << 14
"""Of each file of weights, what tells a base from another of its shape."""

_PARTS = {"self_attn": "attention", "mlp": "mlp", "embed_tokens": "embedding", "lm_head": "head"}


class LoRATask:
    """See `engine.tasks.Task`."""

    def __init__(
        self, profile: LoRAProfile, runs_folder: Path, checkpoint: Path | None = None, loading: Loading | None = None
    ) -> None:
        loading = loading or Loading()
        self._profile, self._train = profile, profile.train
        self._borrowed = None
        self.borrowed_weights = profile.adapter.init_from is not None
        if profile.adapter.init_from is not None:
            self._borrowed = checkpoint or _find_adapter(profile.adapter.init_from, runs_folder)
            compare_settings(self._borrowed, profile.adapter)
        check_files(profile.data)
        base = load_base(profile.model, compute_dtype(profile.train.dtype), loading)
        self._take(base, loading)
        if self._borrowed is not None:
            self.load(self._borrowed)  # lazily: what does not fit is refused before rows are read
        self._tokenizer = base.tokenizer
        dataset = load_chat_data(profile.data, base.tokenizer, self._train.sequence_length, profile.seed, loading)
        if dataset.largest_token >= self.vocabulary:
            raise UserError(
                f"{base.name}: its tokenizer made token {dataset.largest_token}, but the model has "
                f"{self.vocabulary:,} of them: tokenizer and model do not belong together"
            )
        reach = base.config.get("max_position_embeddings")
        if isinstance(reach, int) and (longest := int(dataset.train.lengths.max())) > reach:
            loading.warn(f"rows of up to {longest:,} tokens: {base.name} was made for {reach:,} at most")
        self._rows, self._heldout = dataset.train, dataset.heldout
        self.data_digest = hashlib.sha256(f"{dataset.digest}\0{_digest(base)}".encode()).hexdigest()

    def _take(self, base: Base, loading: Loading) -> None:
        """Puts the adapter on a base, and looks where the model can be cut."""
        adapter = self._profile.adapter
        self.size, self.vocabulary = get_total_parameters(base.model), vocabulary_size(base)
        self._config = adapter_config(adapter, base.model, base.name)
        # Everything is trained: then the weights of the beginning must not stay in memory.
        self._bare = twin(base.model).eval() if adapter.method != "full" else None
        self.model, self.keys = base.model, Keys()
        attach(self.model, adapter, self._profile.seed)
        if any("GatedDelta" in type(module).__name__ for _, module in self.model.named_modules()):
            loading.warn(
                "some layers of this model (gated delta rule) go through a text token by token in training: they are "
                "slow, and take tens of GB at 2,048 tokens; shorter sequences or another base will serve you better"
            )
        take_keys(self.model, self.keys, adapter.dropout)
        self.anatomy: Anatomy | None = None
        try:
            self.anatomy = Anatomy(self.model.eval())
            self.anatomy.check()
        except CannotCutError as error:
            self.anatomy = None
            loading.warn(f"this model's layers cannot be taken one by one ({error}): all of it is in memory at once")

    def total_steps(self) -> int:
        train, rows = self._train, len(self._rows.lengths)
        if train.steps is not None:
            return train.steps
        if train.epochs is not None:
            return math.ceil(train.epochs * rows / train.batch_size)
        assert train.tokens is not None
        return math.ceil(train.tokens / (train.batch_size * float(self._rows.lengths.mean())))

    def examples(self, step: int, rank: int, ranks: int) -> Sequence[int]:
        chosen = examples_of(self._rows.lengths, self._train.batch_size, step, self._profile.seed)
        return chosen[rank::ranks].tolist()  # each has long ones and short ones

    def batch(self, examples: Sequence[int]) -> Batch:
        return _batch(self._rows, examples)

    def heldout(self, size: int, most: int | None = None) -> Iterator[Batch]:
        lengths = self._heldout.lengths[:most]
        by_length = np.argsort(-lengths, kind="stable").tolist()
        for start in range(0, len(by_length), size):
            yield _batch(self._heldout, by_length[start : start + size])

    def loss(self, *arrays: mx.array) -> mx.array:
        tokens, targets, counted = self.predicting(*arrays)
        if self.anatomy is None:
            return cross_entropy_sum(self.model(tokens).flatten(0, 1), targets.flatten(), counted.flatten())
        outside, _ = trained_by_layer(self.anatomy, self.model.trainable_parameters())
        run_layer = recomputed_layer if self._train.gradient_checkpointing else kept_layer
        hidden = self.anatomy.hidden(tokens, partial(run_layer, keys=self.keys))
        return head_cross_entropy_sum(
            self._head,
            outside,
            hidden.flatten(0, 1),
            targets.flatten(),
            counted.flatten(),
            tokens_at_once=tokens_at_once(self.vocabulary, on_gpu()),
        )

    def _head(self, outside: Mapping[str, mx.array], rows: mx.array) -> mx.array:
        assert self.anatomy is not None
        if outside:
            self.model.update(tree_unflatten(list(outside.items())))
        return self.anatomy.leave(rows[None])[0]

    def predicting(self, *arrays: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        rows, counted = arrays
        return rows[:, :-1], rows[:, 1:], counted

    def heldout_metrics(self, loss_sum: float, tokens: int) -> Mapping[str, float]:
        loss = loss_sum / tokens
        return {"val_loss": loss, "val_perplexity": math.exp(min(loss, 700.0))}

    def part_of(self, parameter: str) -> str:
        return next((part for word, part in _PARTS.items() if word in parameter.split(".")), "other")

    def initial_parameters(self) -> Any:
        if self._borrowed is not None:
            return self.load(self._borrowed)
        fresh = self._fresh_base()
        attach(fresh, self._profile.adapter, self._profile.seed)
        return _in_float32(fresh.trainable_parameters())

    def _fresh_base(self) -> nn.Module:
        if self._bare is not None:
            return twin(self._bare)
        return load_base(self._profile.model, compute_dtype(self._train.dtype), Loading()).model

    def load(self, folder: Path) -> Any:
        return load_adapter(folder, self.model, self._profile.adapter)

    def save(self, parameters: Any, folder: Path) -> None:
        save_adapter(folder, parameters, self._config)

    def answer(self, parameters: Any | None, ask: Generate) -> Iterator[str | None]:
        if parameters is None:
            if self._bare is None:
                raise UserError("all weights are trained, so the base is not in memory any more")
            return speak(twin(self._bare).eval(), self._tokenizer, ask)
        speaker = twin(self.model)  # it keeps its weights while training goes on; the base's are shared
        if self._profile.adapter.method == "full":
            dtype = compute_dtype(self._train.dtype)
            parameters = tree_map(lambda array: array.astype(dtype), parameters)
        speaker.update(parameters)  # of an adapter in float32, as mlx-lm generates with it
        return speak(speaker.eval(), self._tokenizer, ask)


def _batch(rows: Examples, indices: Sequence[int]) -> Batch:
    padded, counted, real = rows.batch(indices)
    return Batch((mx.array(padded), mx.array(counted)), int(counted.sum()), real, counted.size)


def _in_float32(parameters: Any) -> Any:
    return tree_map(lambda array: array.astype(mx.float32), parameters)


def _digest(base: Base) -> str:
    """Names a base by its config and by some of its weights: to read them all would take too long."""
    config = {key: value for key, value in base.config.items() if not key.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for path in sorted(base.folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\0".encode())
        with path.open("rb") as file:
            for place in range(_SAMPLES):
                file.seek(place * size // _SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _find_adapter(name: str, runs_folder: Path) -> Path:
    """The folder that `adapter.init_from` names: a run (its best checkpoint), a checkpoint or an adapter's folder."""
    for path in (runs_folder / name, Path(name).expanduser()):
        if (path / "run.json").is_file():
            return choose_checkpoint(RunDirectory(path), "best", to_read=True).path
        if (path / "adapters.safetensors").is_file():
            return path
    raise UserError(
        f"adapter.init_from = {name!r}: neither a run in {runs_folder} nor a folder with adapters.safetensors"
    )
