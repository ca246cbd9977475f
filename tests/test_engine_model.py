"""The model, its losses and its sampling: streaming equals whole sequences, sizes are as advertised."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from engine.backend import mx
from engine.errors import UserError
from engine.generate import generate, sample
from engine.models.power_retention import PowerRetention
from engine.models.retention_lm import RetentionLM, RetentionLMConfig
from engine.ops.losses import linear_cross_entropy_sum
from engine.profile_files import load_profile
from engine.tasks.retention_lm import model_config

import mlx.nn as nn
from mlx.utils import tree_flatten

SMALL = RetentionLMConfig(width=32, layers=2, heads=4, kv_heads=2, vocab_size=50, chunk_size=8, switch_over=16)


@pytest.fixture
def model() -> RetentionLM:
    mx.random.seed(1)
    return RetentionLM(SMALL)


def close(one: mx.array, other: mx.array, tolerance: float = 2e-5) -> bool:
    return one.shape == other.shape and mx.abs(one - other).max().item() <= tolerance * mx.abs(one).max().item()


# The layer


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("time", [1, 13, 40])
def test_streaming_gives_what_whole_sequences_give(power: int, time: int) -> None:
    mx.random.seed(0)
    layer = PowerRetention(32, 4, 2, power=power, chunk_size=8, switch_over=16)
    x = mx.random.normal((3, time, 32))
    log_g = nn.log_sigmoid(mx.random.normal((3, 2, time)) + 2)
    whole = layer(x, log_g)
    streamed = mx.stack([layer.step(x[:, now], log_g[:, :, now]) for now in range(time)], axis=1)
    assert close(whole, streamed, 2e-4)  # a normaliser near zero loses digits in a float32 state
    assert close(layer(x), layer(x, mx.zeros((3, 2, time))))


def test_a_state_for_each_sequence_and_none_left_over() -> None:
    mx.random.seed(0)
    layer = PowerRetention(16, 2)
    x = mx.random.normal((2, 5, 16))
    both = [layer.step(x[:, now]) for now in range(5)]
    layer.reset()
    second = [layer.step(x[1:, now]) for now in range(5)]
    assert close(both[-1][1:], second[-1])
    layer(x)  # a call in between changes nothing for those who stream
    follows = layer.step(x[1:, 0])
    layer.reset()
    assert not close(follows, layer.step(x[1:, 0]))
    assert close(layer(x)[:, 0], layer(x[:, :1])[:, 0])
    layer.reset()
    layer.step(x[:, 0])
    with pytest.raises(ValueError, match=r"1 sequences after 2: call reset\(\)"):
        layer.step(x[:1, 0])
    assert not any("streamed" in name for name, _ in tree_flatten(layer.parameters()))


def test_positions_are_relative() -> None:
    """Rotary positions turn queries and keys alike, so an earlier stretch of forgotten text moves nothing."""
    mx.random.seed(0)
    layer = PowerRetention(32, 1)
    x = mx.random.normal((1, 9, 32))
    cut = mx.array([[[0.0, 0, 0, 0, -1e4, 0, 0, 0, 0]]])  # a gate that forgets all before the fifth token
    assert close(layer(x, cut)[:, 4:], layer(x[:, 4:]), 1e-4)


# The model


def test_reading_in_pieces_gives_the_same_logits(model: RetentionLM) -> None:
    tokens = mx.random.randint(0, 50, (2, 37))
    whole = model(tokens)
    states = None
    for start, stop in ((0, 20), (20, 21), (21, 36), (36, 37)):
        logits, states = model.forward(tokens[:, start:stop], states)
        assert close(whole[:, stop - 1], logits)


def test_a_token_sees_only_what_came_before(model: RetentionLM) -> None:
    tokens = mx.random.randint(0, 50, (1, 30))
    changed = tokens + 0
    changed[0, 20] = (tokens[0, 20] + 7) % 50
    before, after = model(tokens), model(changed)
    assert mx.array_equal(before[:, :20], after[:, :20])
    assert not close(before[:, 20:], after[:, 20:])


@pytest.mark.parametrize(
    ("name", "width", "layers", "vocabulary", "millions"),
    [
        ("retention-ultra-tiny", 64, 3, 1_000, None),
        ("retention-tiny", 256, 6, 50_257, 17),
        ("retention-small", 768, 12, 50_257, 124),
        ("retention-medium", 1024, 24, 50_257, 353),
        ("retention-large", 1280, 36, 50_257, 774),
        ("retention-7b", 4096, 32, 50_257, 7_000),
    ],
)
def test_shipped_sizes(name: str, width: int, layers: int, vocabulary: int, millions: float | None) -> None:
    config = model_config(load_profile(name).model)
    assert (config.width, config.layers, config.vocab_size) == (width, layers, vocabulary)
    assert config.width // config.heads in (32, 64)
    weights = dict(tree_flatten(RetentionLM(config).parameters()))  # lazy: nothing is computed or held
    assert not any(array.shape == (vocabulary, width) for name, array in weights.items() if "embedding" not in name)
    if millions is not None:
        assert sum(array.size for array in weights.values()) / 1e6 == pytest.approx(millions, rel=0.06)


def test_a_folder_loads_again(model: RetentionLM, tmp_path: Path) -> None:
    model.save(tmp_path)
    again = RetentionLM.load(tmp_path)
    tokens = mx.random.randint(0, 50, (1, 10))
    assert again.config == model.config
    assert mx.array_equal(again(tokens), model(tokens))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'), "'llama', should be"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be loaded"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"12345678"), "cannot be loaded"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot be loaded"),
        (
            lambda folder: (folder / "config.json").write_text(
                (folder / "config.json").read_text().replace('"layers": 2', '"layers": 3')
            ),
            "cannot be loaded",
        ),
    ],
)
def test_bad_folders_are_refused_in_one_line(model: RetentionLM, tmp_path: Path, damage, expected: str) -> None:  # type: ignore[no-untyped-def]
    model.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError) as raised:
        RetentionLM.load(tmp_path)
    assert expected in str(raised.value) and str(tmp_path) in str(raised.value) and "\n" not in str(raised.value)


def test_the_folder_is_readable_without_us(model: RetentionLM, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    model.save(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is True
    theirs = load_file(tmp_path / "model.safetensors")
    assert {name: array.shape for name, array in theirs.items()} == {
        name: array.shape for name, array in tree_flatten(model.parameters())
    }
    assert np.array_equal(theirs["embedding.weight"], np.array(model.embedding.weight))


# Losses


@pytest.mark.parametrize("logits_at_once", [1 << 20, 200, 1])
def test_the_loss_is_cross_entropy(logits_at_once: int) -> None:
    """Against MLX's own cross-entropy, with all logits at once, in value and gradients."""
    mx.random.seed(0)
    hidden, weight = mx.random.normal((23, 8)), mx.random.normal((40, 8))
    targets, counted = mx.random.randint(0, 40, (23,)), mx.random.uniform(shape=(23,)) < 0.7

    def ours(hidden: mx.array, weight: mx.array) -> mx.array:
        return 3 * linear_cross_entropy_sum(hidden, weight, targets, counted, logits_at_once=logits_at_once)

    def theirs(hidden: mx.array, weight: mx.array) -> mx.array:
        return 3 * mx.where(counted, nn.losses.cross_entropy(hidden @ weight.T, targets), 0).sum()

    (found, ours_gradients), (expected, theirs_gradients) = (
        mx.value_and_grad(loss, argnums=(0, 1))(hidden, weight) for loss in (ours, theirs)
    )
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    for one, other in zip(ours_gradients, theirs_gradients, strict=True):
        assert close(other, one, 1e-6)


@pytest.mark.parametrize("logits_at_once", [1 << 20, 400])
def test_the_loss_of_bfloat16_has_good_gradients(logits_at_once: int) -> None:
    """Against float32 on the same (rounded) numbers, where most targets are likely, so that slopes are small."""
    mx.random.seed(0)
    weight = mx.random.normal((40, 16)).astype(mx.bfloat16)
    targets = mx.random.randint(0, 40, (64,))
    hidden = (0.5 * weight[targets] + 0.1 * mx.random.normal((64, 16))).astype(mx.bfloat16)

    def gradients(dtype: mx.Dtype) -> tuple[mx.array, ...]:
        def loss(hidden: mx.array, weight: mx.array) -> mx.array:
            return linear_cross_entropy_sum(
                hidden, weight, targets, mx.ones(64, dtype=mx.bool_), logits_at_once=logits_at_once
            )

        return mx.grad(loss, argnums=(0, 1))(hidden.astype(dtype), weight.astype(dtype))

    for exact, found in zip(gradients(mx.float32), gradients(mx.bfloat16), strict=True):
        assert found.dtype == mx.bfloat16
        apart = mx.linalg.norm(found.astype(mx.float32) - exact, stream=mx.cpu)
        assert (apart / mx.linalg.norm(exact, stream=mx.cpu)).item() < 0.02


def test_the_loss_needs_the_memory_of_a_chunk() -> None:
    mx.random.seed(0)
    hidden, weight = mx.random.normal((4096, 16)), mx.random.normal((2000, 16))
    targets, counted = mx.random.randint(0, 2000, (4096,)), mx.ones(4096, dtype=mx.bool_)
    mx.eval(hidden, weight, targets, counted)

    def peak(logits_at_once: int) -> int:
        def loss(hidden: mx.array, weight: mx.array) -> mx.array:
            return linear_cross_entropy_sum(hidden, weight, targets, counted, logits_at_once=logits_at_once)

        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(mx.value_and_grad(loss, argnums=(0, 1))(hidden, weight))
        return mx.get_peak_memory() - before

    all_logits_bytes = 4 * 4096 * 2000
    assert peak(1 << 30) > all_logits_bytes
    assert peak(1 << 18) < all_logits_bytes / 2


def test_the_loss_of_large_logits_is_finite_and_of_nan_is_nan() -> None:
    weight, targets, counted = mx.eye(4), mx.array([1]), mx.array([True])
    large = linear_cross_entropy_sum(mx.array([[1e4, 0, 0, 0]]), weight, targets, counted)
    assert large.item() == pytest.approx(1e4)
    assert math.isnan(linear_cross_entropy_sum(mx.array([[math.nan, 0, 0, 0]]), weight, targets, counted).item())


# Sampling


def tokens_of(model: RetentionLM, prompt: list[int], **options: float) -> list[int]:
    settings = {"max_tokens": 12, "temperature": 1.0, "top_p": 1.0, "seed": 0} | options
    return [token for token in generate(model, prompt, **settings) if token is not None]  # type: ignore[arg-type]


def test_greedy_is_the_likeliest_token_of_the_whole_sequence(model: RetentionLM) -> None:
    prompt = [3, 1, 4, 1, 5]
    sequence = list(prompt)
    for _ in range(12):
        sequence.append(int(mx.argmax(model(mx.array([sequence]))[0, -1]).item()))
    assert tokens_of(model, prompt, temperature=0) == sequence[len(prompt) :]


def test_sampling_depends_on_its_seed_and_on_nothing_else(model: RetentionLM) -> None:
    first = tokens_of(model, [1, 2], seed=5)
    mx.random.seed(99)
    before = mx.random.state[0] + 0
    assert tokens_of(model, [1, 2], seed=5) == first
    assert tokens_of(model, [1, 2], seed=6) != first
    assert mx.array_equal(mx.random.state[0], before)


def test_sampling_follows_the_distribution() -> None:
    """Frequencies of 4,000 draws against softmax, within four standard deviations."""
    logits = mx.array([2.0, 1.0, 0.0, -1.0])
    keys = mx.random.split(mx.random.key(0), 4000)
    for temperature, top_p, kept in ((1.0, 1.0, 4), (0.5, 1.0, 4), (1.0, 0.7, 2), (1.0, 0.6, 1), (1.0, 0.0, 1)):
        expected = np.array(mx.softmax(logits / temperature))
        expected[kept:] = 0
        expected /= expected.sum()
        drawn = mx.stack([sample(logits, temperature, top_p, key) for key in keys])
        found = np.bincount(np.array(drawn), minlength=4) / 4000
        assert np.all(np.abs(found - expected) <= 4 * np.sqrt(expected * (1 - expected) / 4000))


def test_generation_reads_in_pieces_and_stops_where_it_should(model: RetentionLM) -> None:
    made = list(generate(model, [1] * 150, max_tokens=4, temperature=0))
    assert made[:3] == [None] * 3 and len(made) == 7
    end = made[3]
    assert list(generate(model, [1] * 150, max_tokens=4, temperature=0, ends={end})) == [None] * 3
    drawn = generate(model, [1], max_tokens=200, temperature=9.0, top_p=1.0, vocabulary=10)
    assert {token for token in drawn if token is not None} == set(range(10))
    with pytest.raises(ValueError, match="prompt is empty"):
        next(generate(model, [], max_tokens=1))


def test_memory_of_generation_is_constant(model: RetentionLM) -> None:
    def peak(prompt_tokens: int) -> int:
        answer = generate(model, [1] * prompt_tokens, max_tokens=30, temperature=0)
        for _ in range(prompt_tokens // 64 + 2):
            next(answer)
        mx.clear_cache()
        mx.reset_peak_memory()
        list(answer)
        return mx.get_peak_memory()

    peak(64)
    assert peak(64 * 50) <= peak(64) * 1.01
