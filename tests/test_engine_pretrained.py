"""Pretrained bases and adapters: mlx-lm loads what we write and we what it writes; what cannot be used is one line."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_llama import write_tiny_llama

from engine.backend import mx
from engine.commands import Generate
from engine.errors import UserError
from engine.events import Event, LoadingProgress
from engine.generate import generate
from engine.lines import LineWriter
from engine.loading import Loading
from engine.models.adapters import adapter_config, attach, attach_saved, load_adapter, save_adapter
from engine.models.cached import CachedModel, prompt_tokens, speak
from engine.models.pretrained import Base, instantiate, load_base, vocabulary_size
from engine.models.sharing import twin
from engine.profile_lora import Adapter, PretrainedModel

import mlx.nn as nn
import mlx.optimizers as optim
import mlx_lm
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.trainer import TrainingArgs, train
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import quantize_model, save_config

TOKENS = mx.array([[5, 17, 200, 9, 31]])


def load(folder: Path | str, dtype: mx.Dtype | None = mx.float32, **model: Any) -> Base:
    return load_base(PretrainedModel(init_from=str(folder), **model), dtype, Loading())


def flat(tree: Any) -> dict[str, mx.array]:
    return dict(tree_flatten(tree))


def same(ours: Any, theirs: Any) -> bool:
    ours, theirs = flat(ours), flat(theirs)
    return ours.keys() == theirs.keys() and all(mx.array_equal(ours[name], theirs[name]) for name in ours)


def moved(model: nn.Module, size: float = 0.3) -> Any:
    """The trained weights as some training might leave them."""
    mx.random.seed(1)
    weights = tree_map(lambda array: array + size * mx.random.normal(array.shape), model.trainable_parameters())
    model.update(weights)
    return weights


# Bases


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_a_base_is_what_mlx_lm_loads(tmp_path: Path, model_type: str) -> None:
    folder = write_tiny_llama(tmp_path / "m", model_type=model_type, tied=model_type != "qwen3")
    base, (theirs, _) = load(folder), mlx_lm.load(str(folder))
    assert same(base.model.parameters(), theirs.parameters())
    assert mx.array_equal(base.model(TOKENS), theirs(TOKENS))
    assert not flat(base.model.trainable_parameters())
    assert vocabulary_size(base) == json.loads((folder / "config.json").read_text())["vocab_size"]
    shapes = {name: array.shape for name, array in flat(instantiate(base.config).parameters()).items()}
    assert shapes == {name: array.shape for name, array in flat(theirs.parameters()).items()}


def test_weights_are_read_when_they_are_needed_and_in_the_dtype_that_was_asked_for(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "m", width=256, layers=3)
    size = (folder / "model.safetensors").stat().st_size
    mx.clear_cache()
    before = mx.get_active_memory()
    base = load(folder, mx.bfloat16)
    assert mx.get_active_memory() - before < size / 20
    assert {array.dtype for array in flat(base.model.parameters()).values()} == {mx.bfloat16}
    mx.eval(base.model.parameters())
    assert mx.get_active_memory() - before < size / 2 * 1.05


def test_quantizing_on_load_is_what_mlx_lm_converts_to_and_never_holds_the_model_twice(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "m", width=256, layers=6, hidden=1024)
    size = (folder / "model.safetensors").stat().st_size
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    base = load(folder, mx.float32, quantize_bits=4)
    assert mx.get_peak_memory() - before < size / 2  # a quarter of it is left, and one module is in the making
    theirs, config = mlx_lm.load(str(folder), return_config=True)[::2]
    theirs, config = quantize_model(theirs, config, 64, 4)
    assert same(base.model.parameters(), theirs.parameters())
    assert base.config["quantization"] == config["quantization"]
    shapes = {name: array.shape for name, array in flat(instantiate(base.config).parameters()).items()}
    assert shapes == {name: array.shape for name, array in flat(theirs.parameters()).items()}


def test_what_is_quantized_already_stays_and_says_so(tmp_path: Path, quantized: Path) -> None:
    said: list[Event] = []
    base = load_base(PretrainedModel(init_from=str(quantized), quantize_bits=8), mx.float32, Loading(said.append))
    assert base.config["quantization"]["bits"] == 4
    assert ["4 bits" in str(event) for event in said if not isinstance(event, LoadingProgress)] == [True]


def test_quantizing_is_told_to_its_end(tmp_path: Path) -> None:
    said: list[Event] = []
    folder = write_tiny_llama(tmp_path / "m", width=64)
    load_base(PretrainedModel(init_from=str(folder), quantize_bits=4), mx.float32, Loading(said.append))
    told = [event for event in said if isinstance(event, LoadingProgress) and event.what == "quantizing to 4 bits"]
    assert told[0].done == 0 and told[-1].done == told[-1].total == 15
    assert "15 of 15 modules" in [line for event in said for line in LineWriter().lines(event)][-1]


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    """A base in 4 bits, as mlx-lm saves one."""
    plain = write_tiny_llama(tmp_path / "plain", width=64)
    model, config = mlx_lm.load(str(plain), return_config=True)[::2]
    model, config = quantize_model(model, config, 32, 4)
    folder = tmp_path / "quantized"
    mlx_lm.utils.save_model(folder, model)
    save_config(config, folder / "config.json")
    for file in plain.glob("*token*"):
        shutil.copy(file, folder)
    return folder


def _only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _cut_off(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def _amended(**entries: Any) -> Callable[[Path], None]:
    def amend(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | entries))

    return amend


def _adapter_only(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


def _shard_lost(folder: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


BROKEN = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "there is no config.json"),
    "config is no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "has no weights: it needs model.safetens"),
    "only pickles": (_only_pickles, "has only pytorch_model.bin, which could run code"),
    "cut off": (_cut_off, "model.safetensors is incomplete: .* bytes; download or copy it again"),
    "a page in its place": (
        lambda folder: (folder / "model.safetensors").write_text("<html>"),
        "is no safetensors file",
    ),
    "a shard lost": (_shard_lost, "2 of 2 files of weights are missing: model-00001"),
    "unknown": (_amended(model_type="power-retention"), "model_type = 'power-retention' is none that"),
    "not a name": (_amended(model_type="..os"), r"model_type = '\.\.os' is none that"),
    "another shape": (_amended(intermediate_size=48), "its model cannot be loaded: Expected shape"),
    "another vocabulary": (
        _amended(vocab_size=300),
        "embed_tokens.weight has 320 rows, vocab_size says 300; they do not belong together",
    ),
    "no tokenizer": (
        lambda folder: (folder / "tokenizer.json").unlink(),
        "there is no tokenizer.json in it",
    ),
    "other layers": (_amended(num_hidden_layers=3), "its model cannot be loaded: Missing 9 parameters"),
    "brings code": (_amended(model_file="model.py"), "asks to run code that came with the model"),
    "an adapter": (_adapter_only, "is an adapter, not a base: name it as adapter.init_from"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_base_that_cannot_be_loaded_is_told_in_one_line(tiny_llama: Path, tmp_path: Path, case: str) -> None:
    spoil, told = BROKEN[case]
    folder = shutil.copytree(tiny_llama, tmp_path / "m")
    spoil(folder)
    with pytest.raises(UserError, match=told) as caught:
        load(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such folder"):
        load(tmp_path / "nowhere")


def test_code_that_came_with_a_tokenizer_is_not_run(tiny_llama: Path, tmp_path: Path) -> None:
    folder, mark = shutil.copytree(tiny_llama, tmp_path / "m"), tmp_path / "was-run"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Tokenizer: pass\n")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": [None, "evil.Tokenizer"]}, "tokenizer_class": "Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="asks to run code that came with it; model"):
        load(folder)
    assert not mark.exists()
    said: list[Event] = []
    with pytest.raises(UserError):
        trusting = PretrainedModel(init_from=str(folder), trust_remote_code=True)
        load_base(trusting, mx.float32, Loading(said.append))
    assert mark.exists() and "may run code" in str(said[0])


# What learns


def test_lora_begins_as_mlx_lms_does(tiny_llama: Path) -> None:
    ours, (theirs, _) = load(tiny_llama).model, mlx_lm.load(str(tiny_llama))
    attach(ours, Adapter(rank=4, alpha=8, layers=1, targets=["q_proj", "mlp.up_proj"]), seed=7)
    theirs.freeze()
    mx.random.seed(7)
    keys = ["mlp.up_proj", "self_attn.q_proj"]
    linear_to_lora_layers(theirs, 1, {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": keys})
    assert same(ours.trainable_parameters(), theirs.trainable_parameters())
    assert {name.split(".")[2] for name in flat(ours.trainable_parameters())} == {"1"}


@pytest.mark.parametrize(
    ("wished", "told"),
    [
        ({"targets": ["q_proj", "q_prj"]}, "'q_prj' is no module of the model's layers; did you mean 'q_proj'\\?"),
        ({"targets": ["self_attn.up_proj"]}, "it has down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"),
        ({"layers": 3}, "adapter.layers = 3: the model has 2 layers"),
    ],
)
def test_what_the_model_has_not_is_told_with_what_it_has(tiny_llama: Path, wished: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        attach(load(tiny_llama).model, Adapter(**wished), 0)


EXPERTS = {
    "model_type": "qwen3_moe",
    **{"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "moe_intermediate_size": 32, "head_dim": 16},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2},
    **{"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True, "tie_word_embeddings": True},
    **{"rms_norm_eps": 1e-5, "rope_theta": 1e4, "vocab_size": 100, "max_position_embeddings": 128},
}


def test_experts_learn_by_lora_and_not_by_dora() -> None:
    model = instantiate(EXPERTS)
    attach(model, Adapter(targets=["switch_mlp.up_proj", "v_proj"]), 0)
    assert len(flat(model.trainable_parameters())) == 8
    with pytest.raises(UserError, match='"dora" does not work here: SwitchLinear'):
        attach(instantiate(EXPERTS), Adapter(method="dora", targets=["all"]), 0)
    with pytest.raises(UserError, match="config: no model can be made of it: "):
        instantiate(EXPERTS | {"num_attention_heads": 0, "head_dim": None})


def test_targets_name_modules_by_their_last_parts(tiny_llama: Path) -> None:
    def names(*targets: str) -> set[str]:
        model = load(tiny_llama).model
        attach(model, Adapter(targets=list(targets)), 0)
        return {name.split(".", 3)[3].rpartition(".")[0] for name in flat(model.trainable_parameters())}

    assert names("v_proj", "mlp.down_proj") == {"self_attn.v_proj", "mlp.down_proj"}
    assert names("all") == names("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def test_all_weights_of_the_last_layers_learn_or_of_everything(tiny_llama: Path, quantized: Path) -> None:
    model = load(tiny_llama).model
    attach(model, Adapter(method="full"), 0)
    assert flat(model.trainable_parameters()).keys() == flat(model.parameters()).keys()
    attach(model, Adapter(method="full", layers=1), 0)
    assert {name.rpartition("layers.")[2][0] for name in flat(model.trainable_parameters())} == {"1"}
    with pytest.raises(UserError, match="the base is quantized"):
        attach(load(quantized).model, Adapter(method="full"), 0)


# Their files


@pytest.mark.parametrize("kind", ["lora", "dora", "full", "qlora"])
def test_mlx_lm_loads_what_we_save_and_says_the_same(
    tiny_llama: Path, quantized: Path, tmp_path: Path, kind: str
) -> None:
    folder = quantized if kind == "qlora" else tiny_llama
    adapter = Adapter(method="lora" if kind == "qlora" else kind, rank=4, alpha=8, dropout=0.5, layers=2)
    base = load(folder)
    attach(base.model, adapter, 0)
    weights = moved(base.model)
    save_adapter(tmp_path, weights, adapter_config(adapter, base.model, base.name))
    theirs, tokenizer = mlx_lm.load(str(folder), adapter_path=str(tmp_path))
    base.model.eval()
    assert mx.array_equal(base.model(TOKENS), theirs(TOKENS))
    ask = Generate("a", "What is a lambda?", max_tokens=20, temperature=0)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": ask.prompt}], add_generation_prompt=True)
    said = "".join(piece or "" for piece in speak(base.model, base.tokenizer, ask))
    assert said == mlx_lm.generate(theirs, tokenizer, prompt, max_tokens=20)
    fresh = load(folder).model
    assert same(attach_saved(fresh, tmp_path), weights)
    attach(fresh, adapter, 3) if kind == "full" else None
    assert same(load_adapter(tmp_path, fresh, adapter), weights)


def test_we_load_what_mlx_lm_trained(tiny_llama: Path, tmp_path: Path) -> None:
    model, _ = mlx_lm.load(str(tiny_llama))
    model.freeze()
    parameters = {"rank": 2, "scale": 20.0, "dropout": 0.0}
    linear_to_lora_layers(model, 1, parameters)
    rows = [(np.arange(20) % 50, 0)] * 4
    arguments = TrainingArgs(
        batch_size=2, iters=2, max_seq_length=32, adapter_file=str(tmp_path / "adapters.safetensors")
    )
    train(model, optim.Adam(1e-2), rows, rows, arguments)
    wrote = {"model": str(tiny_llama), "fine_tune_type": "lora", "num_layers": 1, "lora_parameters": parameters}
    save_config(wrote, tmp_path / "adapter_config.json")
    model.eval()
    base = load(tiny_llama)
    base.model.update(attach_saved(base.model, tmp_path))
    assert mx.array_equal(base.model.eval()(TOKENS), model(TOKENS))
    resumed = load(tiny_llama).model
    adapter = Adapter(rank=2, alpha=40, layers=1)
    attach(resumed, adapter, 0)
    assert same(load_adapter(tmp_path, resumed, adapter), model.trainable_parameters())


def test_we_load_what_mlx_lm_trained_of_all_layers_but_not_of_the_embedding(tiny_llama: Path, tmp_path: Path) -> None:
    model, _ = mlx_lm.load(str(tiny_llama))
    model.freeze()
    for layer in model.layers:
        layer.unfreeze()
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), flat(moved(model)))
    save_config({"fine_tune_type": "full", "num_layers": -1}, tmp_path / "adapter_config.json")
    base = load(tiny_llama)
    base.model.update(attach_saved(base.model, tmp_path))
    assert same(base.model.trainable_parameters(), model.trainable_parameters())
    assert mx.array_equal(base.model(TOKENS), model(TOKENS))


@pytest.mark.parametrize(
    ("ours", "told"),
    [
        ({"rank": 8, "alpha": 16}, "has rank 4, adapter.rank is 8"),
        ({"alpha": 20}, "has scale 2, the profile's alpha / rank is 5; set adapter.alpha = 8"),
        ({"method": "dora"}, "is of method lora, adapter.method is dora"),
        ({"layers": 1}, "is on 2 layers, adapter.layers is 1"),
        ({"targets": ["q_proj", "v_proj"]}, "has model.layers.0.mlp.down_proj.lora_a, which is not trained here"),
        (
            {"width": 64},
            "its model.layers.0.self_attn.q_proj.lora_a is 32 x 4, this model's is 64 x 4 .*on one",
        ),
    ],
)
def test_an_adapter_of_another_model_or_shape_is_told_by_its_first_difference(
    tiny_llama: Path, tmp_path: Path, ours: dict[str, Any], told: str
) -> None:
    first = Adapter(rank=4, alpha=8)
    base = load(tiny_llama)
    attach(base.model, first, 0)
    save_adapter(tmp_path, base.model.trainable_parameters(), adapter_config(first, base.model, "one"))
    folder = write_tiny_llama(tmp_path / "other", width=ours.pop("width", 32))
    model, adapter = load(folder).model, Adapter(**{"rank": 4, "alpha": 8, **ours})
    attach(model, adapter, 0)
    with pytest.raises(UserError, match=told):
        load_adapter(tmp_path, model, adapter)


@pytest.mark.parametrize(
    ("wrote", "told"),
    [
        (None, "is no adapter: there is no adapter_config.json"),
        ("{", "adapter_config.json cannot be read"),
        ('{"peft_type": "LORA"}', "was written by PEFT"),
        ('{"lora_parameters": {"alpha": 3}, "num_layers": 1}', "lora_parameters should have rank and scale"),
        ('{"fine_tune_type": "ia3"}', "should be lora, dora or full"),
        ('{"lora_parameters": {"rank": 4, "scale": 2.0}, "num_layers": 1}', "there is no adapters.safetensors"),
    ],
)
def test_a_folder_that_is_no_adapter_is_told_in_one_line(
    tiny_llama: Path, tmp_path: Path, wrote: str | None, told: str
) -> None:
    if wrote is not None:
        (tmp_path / "adapter_config.json").write_text(wrote)
    with pytest.raises(UserError, match=told):
        attach_saved(load(tiny_llama).model, tmp_path)


# Twins


def test_a_twin_shares_every_array_and_nothing_else(tiny_llama: Path) -> None:
    first = load(tiny_llama).model
    attach(first, Adapter(rank=2), 0)
    second = twin(first)
    ours, theirs = flat(first.parameters()), flat(second.parameters())
    assert ours.keys() == theirs.keys() and all(ours[name] is theirs[name] for name in ours)
    assert mx.array_equal(first(TOKENS), second(TOKENS))
    before = first(TOKENS)
    moved(second)
    second.eval()
    second.freeze()
    second.layers[0].self_attn.scale = 0.0
    assert mx.array_equal(first(TOKENS), before) and not mx.array_equal(second(TOKENS), before)
    assert first.training and flat(first.trainable_parameters())
    assert all(flat(first.parameters())[name] is ours[name] for name in ours)


def test_what_is_in_a_tree_twice_is_in_its_twin_twice() -> None:
    shared = nn.Linear(2, 2)
    module = nn.Sequential(shared, nn.ReLU(), shared)
    second = twin(module)
    assert second.layers[0] is second.layers[2] and second.layers[0] is not shared


# Answers


def test_an_answer_begins_in_the_template_and_ends_at_any_of_the_ends(tiny_llama: Path) -> None:
    base = load(tiny_llama)
    ask = Generate("a", "hello", max_tokens=12, temperature=1.0, seed=5)
    prompt = prompt_tokens(base.tokenizer, ask.prompt)
    assert prompt == base.tokenizer.encode("user:\nhello<|endoftext|>\nassistant:\n")
    settings = {"max_tokens": 12, "temperature": 1.0, "seed": 5, "vocabulary": len(base.tokenizer)}
    tokens = [token for token in generate(CachedModel(base.model), prompt, **settings) if token is not None]
    assert len(tokens) == 12

    def said() -> str:
        return "".join(piece or "" for piece in speak(base.model, base.tokenizer, ask))

    assert said() == base.tokenizer.decode(tokens)
    end = tokens[6]
    base.tokenizer.eos_token_ids = {*base.tokenizer.eos_token_ids, end}
    assert said() == base.tokenizer.decode(tokens[: tokens.index(end)])


def test_without_a_template_a_prompt_is_gone_on_from(tmp_path: Path) -> None:
    base = load(write_tiny_llama(tmp_path / "m", template=False))
    assert prompt_tokens(base.tokenizer, "hello") == base.tokenizer.encode("hello")
    assert prompt_tokens(base.tokenizer, "") == [base.tokenizer.eos_token_id]
    assert re.match(".", "".join(p or "" for p in speak(base.model, base.tokenizer, Generate("a", "", 8))))
