"""A model folder as the hub has them, made in a fraction of a second, and rows to teach it with."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from engine.backend import mx
from engine.data.tokenizers import END_OF_TEXT, train_bpe

from mlx.utils import tree_flatten

TEMPLATE = (
    "{% if tools %}tools: {{ tools | tojson }}{{ eos_token }}\n{% endif %}"
    "{% for message in messages %}{{ message['role'] }}:\n{{ message['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)
_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_WORDS = topics["lambda"].split() + topics["while"].split()


def write_tiny_llama(
    folder: Path,
    *,
    layers: int = 2,
    width: int = 32,
    heads: int = 2,
    kv_heads: int | None = None,
    hidden: int | None = None,
    vocab: int = 320,
    template: bool = True,
    tied: bool = True,
    model_type: str = "llama",
    seed: int = 0,
) -> Path:
    """Writes config.json, model.safetensors with random float32 weights, and a tokenizer whose end is `END_OF_TEXT`.

    `model_type` is any architecture of mlx-lm that is content with the common fields; `template` gives a chat template
    in which every message ends with the end of text.
    """
    from mlx_lm.utils import _get_classes

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_bpe([topics[key] for key in sorted(topics)[:6]], vocab)
    tokenizer.save(folder)
    _amend(folder / "tokenizer_config.json", {"chat_template": TEMPLATE} if template else {})
    config: dict[str, Any] = {
        "architectures": [_CLASSES.get(model_type, "")],
        "model_type": model_type,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "intermediate_size": hidden or 2 * width,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads or heads,
        "head_dim": width // heads,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 2048,
        "vocab_size": tokenizer.vocab_size,
        "tie_word_embeddings": tied,
        "bos_token_id": tokenizer.end_of_text,
        "eos_token_id": tokenizer.end_of_text,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    model_class, arguments = _get_classes(config)
    mx.random.seed(seed)
    weights = dict(tree_flatten(model_class(arguments.from_dict(config)).parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    return folder


def tiny_row(index: int, kind: str) -> dict[str, Any]:
    """Row `index` of a kind: text, messages, tools (messages with a tool beside them), or completion.

    Rows differ in words and in length: about 15 to 60 words.
    """
    start = 7 * index % len(_WORDS)
    passage = " ".join((_WORDS + _WORDS)[start : start + 12 + index % 5 * 11])
    question, answer = f"What is passage {index} about?", f"It says: {passage}."
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if kind == "text":
        return {"text": f"{question}\n{answer}"}
    if kind == "messages":
        return {"messages": messages}
    if kind == "tools":
        tool = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}
        return {"messages": messages, "tools": [tool]}
    if kind == "completion":
        return {"prompt": question, "completion": answer}
    raise ValueError(f"no rows of kind {kind!r}")


def write_rows(folder: Path, n: int, kind: str = "messages", name: str = "train") -> Path:
    """Writes `n` rows of a kind to `name`.jsonl in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(tiny_row(index, kind)) + "\n" for index in range(n)), encoding="utf-8")
    return path


def _amend(path: Path, entries: dict[str, Any]) -> None:
    table = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**table, "pad_token": END_OF_TEXT, **entries}, indent=2), encoding="utf-8")
