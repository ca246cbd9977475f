"""Gradients a layer at a time: those of the whole graph, of every architecture that can be cut, in less memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_llama import write_rows, write_tiny_llama

from engine.attending import Abandoned
from engine.backend import mx
from engine.commands import Generate, Pause, Resume, Stop
from engine.events import Alarm, State, StateChanged, StepCompleted
from engine.loading import Loading
from engine.models.anatomy import Anatomy, CannotCutError
from engine.models.pretrained import instantiate
from engine.ops.losses import head_cross_entropy_sum
from engine.planner import plan
from engine.profile import LoRAProfile, Profile, parse_profile
from engine.ranks import Ranks
from engine.tasks import Batch, make_task
from engine.tasks.lora import LoRATask
from engine.update import Gradient, Update

import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

TableOf = Callable[..., LoRAProfile]


def profile_of(base: Path, rows: Path, adapter: dict[str, Any] | None = None, **train: Any) -> LoRAProfile:
    table = {
        "kind": "lora",
        "model": {"init_from": str(base)},
        "adapter": {"rank": 4, "alpha": 8, **(adapter or {})},
        "data": {"files": [str(rows)]},
        "train": {"steps": 3, "batch_size": 4, "micro_batch_size": 4, "sequence_length": 48, **train},
    }
    made = parse_profile(table)
    assert isinstance(made, LoRAProfile)
    return made


def beginning(task: LoRATask) -> Any:
    """Weights with which every part of a gradient is something: LoRA's B is zero at first."""
    mx.random.seed(5)
    return tree_map(lambda array: array + 0.05 * mx.random.normal(array.shape), task.initial_parameters())


def gradient_of(profile: LoRAProfile, folder: Path, compiled: bool = False) -> Gradient:
    task = make_task(profile, folder)
    assert isinstance(task, LoRATask)
    warnings: list[str] = []
    update = Update(task, profile.train, Ranks(), mx.float32, compiled=compiled, warn=warnings.append)
    assert not warnings
    update.restore(beginning(task), None)
    batch = task.batch(task.examples(1, 0, 1))
    for part in (batch, batch):  # sums go on from those before
        update.accumulate(part, seed=3)
    gradient = update.collect()
    if not profile.adapter.dropout:
        assert update.loss(batch) / batch.tokens == pytest.approx(gradient.loss, rel=1e-5)
    return gradient


def assert_same(one: Gradient, other: Gradient, tolerance: float = 1e-5) -> None:
    assert one.loss == pytest.approx(other.loss, rel=1e-6)
    first, second = dict(tree_flatten(one.sums)), dict(tree_flatten(other.sums))
    assert first.keys() == second.keys()
    for name, array in first.items():
        largest = float(np.abs(array).max())
        assert largest > 0, name
        np.testing.assert_allclose(np.array(second[name]), np.array(array), atol=tolerance * largest, err_msg=name)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows"), 24)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "gemma", "olmo2", "cohere", "starcoder2"])
def test_it_makes_the_gradients_of_the_whole_graph(model_type: str, rows: Path, tmp_path: Path) -> None:
    base = write_tiny_llama(tmp_path / "base", model_type=model_type)
    adapter = {"targets": ["all"]}
    whole = gradient_of(profile_of(base, rows, adapter, backward="whole"), tmp_path)
    assert_same(gradient_of(profile_of(base, rows, adapter, backward="layerwise"), tmp_path), whole)
    plain = profile_of(base, rows, adapter, backward="whole", gradient_checkpointing=False)
    assert_same(gradient_of(plain, tmp_path), whole)


@pytest.mark.parametrize(
    "adapter",
    [
        {"method": "dora"},
        {"method": "full"},
        {"method": "full", "layers": 1},
        {"layers": 1},
        {"targets": ["down_proj"]},
        {"targets": ["v_proj"], "layers": 2},
    ],
    ids=str,
)
def test_whatever_is_trained(adapter: dict[str, Any], rows: Path, tmp_path: Path) -> None:
    base = write_tiny_llama(tmp_path / "base", layers=3, tied="layers" in adapter)
    whole = gradient_of(profile_of(base, rows, adapter, backward="whole"), tmp_path)
    assert_same(gradient_of(profile_of(base, rows, adapter, backward="layerwise"), tmp_path), whole)


@pytest.mark.parametrize("bits", [4, 8])
def test_of_a_quantized_base(bits: int, rows: Path, tmp_path: Path) -> None:
    base = write_tiny_llama(tmp_path / "base", width=64)

    def quantized(**train: Any) -> LoRAProfile:
        table = profile_of(base, rows, **train).model_dump(by_alias=True)
        table["model"] |= {"quantize_bits": bits, "quantize_group_size": 32}
        made = parse_profile(table)
        assert isinstance(made, LoRAProfile)
        return made

    whole = gradient_of(quantized(backward="whole"), tmp_path)
    assert_same(gradient_of(quantized(backward="layerwise"), tmp_path), whole)


def test_one_compiled_function_does_for_all_layers_that_are_alike(rows: Path, tmp_path: Path) -> None:
    base = write_tiny_llama(tmp_path / "base", layers=3)
    plain = gradient_of(profile_of(base, rows, backward="layerwise"), tmp_path)
    assert_same(gradient_of(profile_of(base, rows, backward="layerwise"), tmp_path, compiled=True), plain)


def test_our_own_model_too(tiny_profile: Callable[..., Profile], tmp_path: Path) -> None:
    sums = []
    for backward in ("whole", "layerwise"):
        profile = tiny_profile(**{"train.backward": backward})
        task = make_task(profile, tmp_path)
        update = Update(task, profile.train, Ranks(), mx.float32, compiled=False)
        update.restore(task.initial_parameters(), None)
        update.accumulate(task.batch(task.examples(1, 0, 1)))
        sums.append(update.collect())
    assert_same(sums[1], sums[0])


@pytest.mark.parametrize("backward", ["whole", "layerwise"])
def test_dropout_is_the_same_both_ways(backward: str, rows: Path, tmp_path: Path) -> None:
    """Finite differences of the loss with the masks of one seed, along a random direction."""
    base = write_tiny_llama(tmp_path / "base")
    profile = profile_of(base, rows, {"dropout": 0.3}, backward=backward)
    task = make_task(profile, tmp_path)
    assert isinstance(task, LoRATask)
    update = Update(task, profile.train, Ranks(), mx.float32, compiled=False)
    batch, start = task.batch(task.examples(1, 0, 1)), beginning(task)

    def at(parameters: Any, seed: int = 3) -> Gradient:
        update.restore(parameters, None)
        update.accumulate(batch, seed=seed)
        return update.collect()

    gradient = at(start)
    assert at(start, seed=4).loss != gradient.loss  # other masks
    assert at(start).loss == gradient.loss
    mx.random.seed(1)
    direction = tree_map(lambda array: mx.random.normal(array.shape), start)
    step = 2e-3
    ahead, behind = (
        at(tree_map(lambda array, along, sign=sign: array + sign * step * along, start, direction)) for sign in (1, -1)
    )
    along = sum(
        float((g * d).sum()) for (_, g), (_, d) in zip(*map(tree_flatten, (gradient.sums, direction)), strict=True)
    )
    assert (ahead.loss - behind.loss) / (2 * step) == pytest.approx(along / batch.tokens, rel=2e-2)


def test_gradient_checkpointing_draws_the_same_masks(rows: Path, tmp_path: Path) -> None:
    base = write_tiny_llama(tmp_path / "base")
    made = [
        gradient_of(
            profile_of(base, rows, {"dropout": 0.3}, backward="whole", gradient_checkpointing=recompute), tmp_path
        )
        for recompute in (False, True)
    ]
    assert_same(made[1], made[0])


def test_the_loss_in_chunks_has_the_gradients_of_the_loss_at_once() -> None:
    mx.random.seed(0)
    hidden, weight = mx.random.normal((50, 16)), mx.random.normal((100, 16))
    targets, counted = mx.random.randint(0, 100, (50,)), mx.random.uniform(shape=(50,)) > 0.3

    def at_once(hidden: mx.array, weight: mx.array) -> mx.array:
        return (nn.losses.cross_entropy(hidden @ weight.T, targets) * counted).sum()

    expected, slopes = mx.value_and_grad(at_once, argnums=[0, 1])(hidden, weight)
    for tokens in (7, 50, 64):

        def in_chunks(hidden: mx.array, weight: mx.array, tokens: int = tokens) -> mx.array:
            return 2 * head_cross_entropy_sum(
                lambda weights, rows: rows @ weights["w"].T,
                {"w": weight},
                hidden,
                targets,
                counted,
                tokens_at_once=tokens,
            )

        loss, found = mx.value_and_grad(in_chunks, argnums=[0, 1])(hidden, weight)
        assert float(loss) == pytest.approx(2 * float(expected), rel=1e-6)
        for one, other in zip(found, slopes, strict=True):
            np.testing.assert_allclose(np.array(one), 2 * np.array(other), atol=1e-4)


def test_the_peak_is_that_of_a_layer(tmp_path: Path) -> None:
    """Twice the layers: whole without recomputation keeps twice as much, layer by layer only one more input each."""
    batch, length, width = 4, 128, 64

    def peak(layers: int, backward: str) -> int:
        from engine.planning.rehearsal import rehearsal

        base = write_tiny_llama(tmp_path / f"{layers}", layers=layers, width=width, hidden=512)
        shape = {"batch_size": batch, "micro_batch_size": batch, "sequence_length": length}
        profile = profile_of(base, base, backward=backward, gradient_checkpointing=False, **shape)
        task = rehearsal(profile)
        update = Update(task, profile.train, Ranks(), mx.float32, compiled=False)
        update.restore(task.initial_parameters(), None)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        update.accumulate(task.batch(range(batch)))
        return mx.get_peak_memory() - before

    grown = {way: peak(8, way) - peak(4, way) for way in ("whole", "layerwise")}
    inputs = 4 * 4 * batch * length * width
    adapters = 4 * 4 * 4 * (4 * 2 * width + 3 * (width + 512))  # four layers' sums
    assert grown["layerwise"] <= 1.3 * (inputs + adapters)
    assert grown["whole"] > 4 * grown["layerwise"]


# What cannot be cut


class _Tangled(nn.Module):
    """Its layers are not one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(20, 8)
        self.layers = [nn.Linear(8, 8), nn.Linear(8, 8)]

    def __call__(self, tokens: mx.array) -> mx.array:
        x = self.embed_tokens(tokens)
        y = self.layers[0](x)
        return self.embed_tokens.as_linear(self.layers[1](y * 2) + x)


def test_what_cannot_be_cut_says_why() -> None:
    with pytest.raises(CannotCutError, match="something happens between its layers"):
        Anatomy(_Tangled()).check()
    with pytest.raises(CannotCutError, match="Linear has no list of layers"):
        Anatomy(nn.Linear(2, 2))


def test_a_model_that_cannot_be_cut_is_trained_whole_and_says_so(rows: Path, tmp_path: Path) -> None:
    """Gemma 2 and 3 scale, Mamba has no attention: each is either cut rightly or taken whole, never wrongly."""
    base = write_tiny_llama(tmp_path / "base")
    profile = profile_of(base, rows, backward="layerwise")
    task = make_task(profile, tmp_path)
    assert isinstance(task, LoRATask)
    task.anatomy = None
    warnings: list[str] = []
    update = Update(task, profile.train, Ranks(), mx.float32, compiled=False, warn=warnings.append)
    assert warnings == ["train.backward = layerwise is not possible with this model (it is no stack of layers): "
                        "taking the whole way"]  # fmt: skip
    update.restore(beginning(task), None)
    update.accumulate(task.batch(task.examples(1, 0, 1)), seed=3)
    whole = gradient_of(profile_of(base, rows, backward="whole"), tmp_path)
    assert update.collect().loss == pytest.approx(whole.loss, rel=1e-6)


ARCHITECTURES = {
    "mistral": {"model_type": "mistral"},
    "phi3": {"model_type": "phi3"},
    "gemma2": {"model_type": "gemma2"},
    "gemma3_text": {"model_type": "gemma3_text", "head_dim": 16, "sliding_window": 4, "sliding_window_pattern": 2},
    "smollm3": {"model_type": "smollm3"},
    "qwen3_moe": {
        "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "moe_intermediate_size": 32, "norm_topk_prob": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_cut_rightly_or_not_at_all(name: str) -> None:
    config = {
        "hidden_size": 32, "num_hidden_layers": 4, "intermediate_size": 64, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "vocab_size": 96,
        "max_position_embeddings": 128, "tie_word_embeddings": True, **ARCHITECTURES[name],
    }  # fmt: skip
    mx.random.seed(0)
    model = instantiate(config)
    anatomy = Anatomy(model)
    parts = anatomy.check()
    assert len(parts) == 4
    tokens = mx.random.randint(0, 96, (2, 12))
    hidden, arguments = anatomy.enter(tokens)
    for halves, layer, given in zip(parts, anatomy.layers, arguments, strict=True):
        for half in halves:
            hidden = half.run(layer, hidden, *given.positional, **dict(given.named))
    whole = np.array(model(tokens))
    np.testing.assert_allclose(np.array(anatomy.leave(hidden)), whole, atol=1e-4 * np.abs(whole).max())


GRANITE = {
    "model_type": "granite", "residual_multiplier": 0.5, "embedding_multiplier": 1.0, "logits_scaling": 1.0,
    "attention_multiplier": 0.2, "attention_bias": False, "mlp_bias": False, "rope_scaling": None,
}  # fmt: skip


MINICPM = {"model_type": "minicpm", "scale_depth": 0.7, "scale_emb": 1.0, "dim_model_base": 32}


@pytest.mark.parametrize(
    ("own", "halves"), [(GRANITE, 2), ({"model_type": "gemma2"}, 2), (MINICPM, 1)], ids=lambda own: str(own)[:30]
)
def test_a_layer_that_scales_is_no_plain_pair_of_halves_beside_massive_activations_either(
    own: dict[str, Any], halves: int
) -> None:
    config = {
        "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "vocab_size": 96,
        "max_position_embeddings": 128, "tie_word_embeddings": True, **own,
    }  # fmt: skip
    mx.random.seed(0)
    model = instantiate(config)
    embedding = np.array(model.model.embed_tokens.weight)
    embedding[1, 3] = 3000.0  # as the first token's are in models that were trained
    model.model.embed_tokens.weight = mx.array(embedding)
    anatomy = Anatomy(model)
    parts = anatomy.check()
    assert [len(pair) for pair in parts] == [halves, halves]
    hidden, arguments = anatomy.enter(mx.array([[1, 2, 3, 4]]))
    for pair, layer, given in zip(parts, anatomy.layers, arguments, strict=True):
        added = np.array(layer(hidden, *given.positional) - hidden)
        cut = hidden
        for half in pair:
            cut = half.run(layer, cut, *given.positional)
        np.testing.assert_allclose(np.array(cut - hidden), added, atol=1e-3)
        hidden = cut


# Between layers


def test_a_validation_between_layers_changes_no_gradient(rows: Path, tmp_path: Path) -> None:
    base = write_tiny_llama(tmp_path / "base")
    profile = profile_of(base, rows, {"dropout": 0.3}, backward="layerwise")
    task = make_task(profile, tmp_path)
    assert isinstance(task, LoRATask)
    update = Update(task, profile.train, Ranks(), mx.float32, compiled=False)
    update.restore(beginning(task), None)
    batch = task.batch(task.examples(1, 0, 1))

    def gradient(pulse: Callable[[], None]) -> Gradient:
        update.accumulate(batch, seed=3, pulse=pulse)
        return update.collect()

    def validate() -> None:
        update.loss(batch)

    assert_same(gradient(validate), gradient(lambda: None))


def test_weights_that_were_exchanged_may_be_in_another_order(rows: Path, tmp_path: Path) -> None:
    base = write_tiny_llama(tmp_path / "base", tied=False)
    profile = profile_of(base, rows, {"method": "full"}, backward="layerwise")
    task = make_task(profile, tmp_path)
    assert isinstance(task, LoRATask)
    update = Update(task, profile.train, Ranks(), mx.float32, compiled=False)
    batch = task.batch(task.examples(1, 0, 1))

    def gradient(parameters: Any) -> Gradient:
        update.restore(parameters, None)
        update.accumulate(batch)
        return update.collect()

    parameters = beginning(task)
    in_another = tree_unflatten(sorted(tree_flatten(parameters)))  # as several ranks leave it
    assert_same(gradient(in_another), gradient(parameters))


@pytest.fixture
def slow(tmp_path: Path) -> LoRAProfile:
    """A step in one micro-batch, long enough to be met half-way."""
    base = write_tiny_llama(tmp_path / "slow", layers=6, width=64, hidden=256)
    rows = write_rows(tmp_path / "slow-rows", 40, "messages")
    table = profile_of(base, rows, backward="layerwise").model_dump(mode="json", by_alias=True)
    table["train"] |= {"steps": 500, "batch_size": 8, "micro_batch_size": 8, "sequence_length": 64}
    table |= {"host": {"keep_awake": False}, "validate": {"every": 0}, "checkpoint": {"every": 0}}
    made = parse_profile(table)
    assert isinstance(made, LoRAProfile)
    return made


def test_commands_are_served_between_layers(slow: LoRAProfile, ride: Callable[..., Any]) -> None:
    run = ride(slow)
    run.until_step(1)
    run.send(Pause())
    run.until(lambda event: isinstance(event, StateChanged) and event.state is State.PAUSED)
    steps = len(run.of(StepCompleted))
    run.send(Generate(answer="a", prompt="What is passage 3 about?", max_tokens=3, temperature=0))
    run.until(lambda event: event.kind == "answer_ended")
    assert len(run.of(StepCompleted)) == steps
    run.send(Resume())
    run.until_step(steps + 1)
    run.send(Stop())
    assert run.end().state is State.STOPPED
    assert not [alarm for alarm in run.of(Alarm) if alarm.level == "critical"]


def test_a_pause_in_a_step_changes_no_loss(slow: LoRAProfile, ride: Callable[..., Any]) -> None:
    def trained(interrupt: bool) -> list[float]:
        run = ride(slow.model_copy(update={"train": slow.train.model_copy(update={"steps": 3})}))
        if interrupt:
            run.until_step(1)
            run.send(Pause())
            run.until(lambda event: isinstance(event, StateChanged) and event.state is State.PAUSED)
            run.send(Generate(answer="a", prompt="What is passage 3 about?", max_tokens=2, temperature=0.5))
            run.until(lambda event: event.kind == "answer_ended")
            run.send(Resume())
        run.end()
        return [step.metrics["loss"] for step in run.of(StepCompleted)]

    assert trained(interrupt=True) == trained(interrupt=False)


def test_what_is_abandoned_is_done_again(rows: Path, tmp_path: Path) -> None:
    base = write_tiny_llama(tmp_path / "base")
    profile = profile_of(base, rows, backward="layerwise")
    task = make_task(profile, tmp_path, loading=Loading())
    assert isinstance(task, LoRATask)
    update = Update(task, profile.train, Ranks(), mx.float32, compiled=False)
    update.restore(beginning(task), None)
    batch: Batch = task.batch(task.examples(1, 0, 1))
    pulses = 0

    def give_up_at_the_third() -> None:
        nonlocal pulses
        pulses += 1
        if pulses == 3:
            raise Abandoned

    with pytest.raises(Abandoned):
        update.accumulate(batch, seed=3, pulse=give_up_at_the_third)
    update.drop()
    for _ in range(2):
        update.accumulate(batch, seed=3, pulse=give_up_at_the_third)
    assert pulses == 3 + 2 * (2 * 2)  # once a layer, each way
    assert_same(update.collect(), gradient_of(profile, tmp_path))


def test_what_was_planned_by_layers_and_cannot_be_cut_takes_micro_batches_that_fit(
    tmp_path: Path, rows: Path, ride: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Anatomy) -> None:
        raise CannotCutError("as a test has it")

    monkeypatch.setattr(Anatomy, "check", refuse)
    base = write_tiny_llama(tmp_path / "base")
    limit = plan(profile_of(base, rows, backward="whole", micro_batch_size=1)).predicted_peak_bytes
    table = profile_of(base, rows, backward="layerwise").model_dump(mode="json", by_alias=True)
    table |= {"guard": {"memory": {"limit_gb": 1.3 * limit / 1e9}}, "host": {"keep_awake": False}}
    run = ride(parse_profile(table))
    assert run.end().exit_code == 0
    assert {step.metrics["micro_batch_size"] for step in run.of(StepCompleted)} == {1}
    texts = [alarm.text for alarm in run.of(Alarm)]
    assert any("layerwise is not possible with this model" in text for text in texts)
    assert any(text.startswith("micro-batch 4 → 1") for text in texts), texts
