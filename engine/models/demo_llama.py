"""A small Llama pretrained here on Python's documentation: a base to fine-tune without any download."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tokenizers

from engine.backend import mx
from engine.data.packing import PackedSequences, batch_indices
from engine.data.text import source_digest
from engine.data.text_dataset import cache_folder, load_text_data
from engine.data.tokenizers import Tokenizer
from engine.durable import sync_path
from engine.errors import UserError
from engine.loading import Loading
from engine.ops.losses import linear_cross_entropy_sum
from engine.profile_retention import TextData

import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten
from mlx_lm.models import llama

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}Answer:\n{{ message['content'] }}{{ eos_token }}\n"
    "{% elif message['role'] == 'user' %}Question: {{ message['content'] }}\n"
    "{% else %}{{ message['content'] }}\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Answer:\n{% endif %}"
)
"""Plain words, because the vocabulary has no tokens for roles; an answer ends with the end of text."""

PYTHON_DOCS = TextData(builtin="python-docs")

_FORMAT = 1
"""Raise it when the same settings and text come to give another model."""
_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_SEED = 0
_ASKED_EVERY_SECONDS = 0.2


@dataclass(frozen=True)
class Pretraining:
    """Shape of the demo's base, and how it is trained: as `profiles/demo.toml`, wide and shallow, with small steps."""

    width: int = 192
    layers: int = 2
    heads: int = 6
    vocab_size: int = 1024
    steps: int = 600
    batch_size: int = 8
    sequence_length: int = 128
    learning_rate: float = 6e-3


def demo_llama(
    loading: Loading,
    settings: Pretraining = Pretraining(),
    text: TextData = PYTHON_DOCS,
    cache: Path | None = None,
) -> Path:
    """The folder of the demo's base: config.json, model.safetensors and a tokenizer, as on the Hugging Face hub.

    The first call pretrains it, in a minute or two on two cores; later ones find it in the cache, keyed by its
    settings and by `text`. `cache` is the folder to use instead of the one beside the packed text. Raises `Interrupted`
    where the run was asked to end, which leaves nothing behind, and `UserError` where the cache cannot be written.
    """
    folder = cache or cache_folder().parent / "models"
    entry = folder / f"demo-llama-{_key(settings, text)}"
    try:
        if not _is_whole(entry):
            folder.mkdir(parents=True, exist_ok=True)
            with _alone(entry.with_suffix(".lock"), loading):
                if not _is_whole(entry):
                    _build(entry, settings, text, loading)
    except OSError as error:
        raise UserError(
            f"model cache {folder}: {error.strerror or error}; "
            "point $RETENTION_TUI_CACHE to a folder with room that can be written"
        ) from None
    return entry


def demo_config(settings: Pretraining = Pretraining(), end_of_text: int = 0) -> dict[str, Any]:
    """The base's config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": settings.width,
        "num_hidden_layers": settings.layers,
        "intermediate_size": 8 * settings.width // 3,
        "num_attention_heads": settings.heads,
        "num_key_value_heads": settings.heads,
        "head_dim": settings.width // settings.heads,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 1024,
        "vocab_size": settings.vocab_size,
        "tie_word_embeddings": True,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "torch_dtype": "float32",
    }


def _key(settings: Pretraining, text: TextData) -> str:
    source = json.dumps([_FORMAT, CHAT_TEMPLATE, asdict(settings), source_digest(text, _SEED), tokenizers.__version__])
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def _is_whole(entry: Path) -> bool:
    return all((entry / name).is_file() for name in _FILES)


def _build(entry: Path, settings: Pretraining, text: TextData, loading: Loading) -> None:
    """Builds beside the entry and renames, so that an entry is whole or absent."""
    for abandoned in entry.parent.glob(f".building-{entry.name}-*"):  # the lock is ours: its builder was killed
        shutil.rmtree(abandoned, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=entry.parent, prefix=f".building-{entry.name}-") as temporary:
        loading.progress("reading the text of the demo's base", 0, None)
        data = load_text_data(text, settings.vocab_size, settings.sequence_length, _SEED)
        config = demo_config(settings, data.tokenizer.end_of_text)
        model = _pretrain(config, data.train, settings, loading)
        built = Path(temporary, "entry")
        _write(built, config, model, data.tokenizer)
        if entry.exists():
            entry.rename(Path(temporary, "damaged"))
        built.rename(entry)
        sync_path(entry.parent)


def _pretrain(
    config: dict[str, Any], sequences: PackedSequences, settings: Pretraining, loading: Loading
) -> llama.Model:
    """Next-token prediction with AdamW, in float32."""
    mx.random.seed(_SEED)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    warmup = 1 + settings.steps // 12
    rise = optim.linear_schedule(0.0, settings.learning_rate, warmup)
    fall = optim.cosine_decay(settings.learning_rate, max(1, settings.steps - warmup))
    schedule = optim.join_schedules([rise, fall], [warmup])
    optimizer = optim.AdamW(schedule, betas=[0.9, 0.95], weight_decay=0.1, bias_correction=True)
    tokens = settings.batch_size * settings.sequence_length

    def mean_loss(rows: mx.array) -> mx.array:
        hidden = model.model(rows[:, :-1]).flatten(0, 1)
        weight = model.model.embed_tokens.weight
        return linear_cross_entropy_sum(hidden, weight, rows[:, 1:].flatten(), mx.ones(tokens, mx.bool_)) / tokens

    loss_and_gradients = nn.value_and_grad(model, mean_loss)
    for step in range(settings.steps):
        loading.progress("pretraining the demo's base", step, settings.steps, "steps")
        rows, _ = sequences.batch(batch_indices(len(sequences), settings.batch_size, step, _SEED))
        loss, gradients = loss_and_gradients(mx.array(rows))
        gradients, _ = optim.clip_grad_norm(gradients, 1.0)
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state, loss)
    loading.progress("pretraining the demo's base", settings.steps, settings.steps, "steps")
    return model


def _write(folder: Path, config: dict[str, Any], model: llama.Model, tokenizer: Tokenizer) -> None:
    tokenizer.save(folder)
    named = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    end = {name: config[name] for name in ("bos_token_id", "eos_token_id")}
    tables = {
        "config.json": config,
        "generation_config.json": end,
        "tokenizer_config.json": {**named, "chat_template": CHAT_TEMPLATE},
    }
    for name, table in tables.items():
        (folder / name).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    for name in _FILES:
        sync_path(folder / name)
    sync_path(folder)


@contextmanager
def _alone(path: Path, loading: Loading) -> Iterator[None]:
    """One builder at a time; those that wait for it can be interrupted."""
    with path.open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                loading.progress("waiting for another run that pretrains the demo's base", 0, None)
                time.sleep(_ASKED_EVERY_SECONDS)
        yield
