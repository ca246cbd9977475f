"""One optimizer update: the same step for every split, true norms, AdamW as published, and its learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.backend import mx
from engine.optimizer import AdamW, learning_rate
from engine.profile import Profile, Train
from engine.ranks import Ranks
from engine.tasks import Batch, make_task
from engine.tasks.retention_lm import RetentionLMTask
from engine.update import Gradient, Update

import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map


@pytest.fixture
def task(tiny_profile: Callable[..., Profile], tmp_path: Path) -> RetentionLMTask:
    made = make_task(tiny_profile(**{"train.batch_size": 12, "train.micro_batch_size": 12}), tmp_path)
    assert isinstance(made, RetentionLMTask)
    return made


def make_update(task: RetentionLMTask, **train: Any) -> Update:
    settings = Train(steps=10, clip_norm=train.pop("clip_norm", 0), learning_rate=1e-2, **train)
    update = Update(task, settings, Ranks(), mx.float32, compiled=False)
    update.restore(task.initial_parameters(), None)
    return update


def ragged_batch(task: RetentionLMTask) -> Batch:
    """Twelve sequences of quite different lengths, so that a mean over micro-batches would be wrong."""
    batch = task.batch(task.examples(1, rank=0, ranks=1))
    lengths = mx.array([32, 1, 17, 5, 32, 2, 9, 30, 1, 1, 25, 12])
    tokens = int(lengths.sum().item())
    return Batch((batch.arrays[0], lengths), tokens, tokens, 12 * 32)


def split(batch: Batch, sizes: Sequence[int]) -> list[Batch]:
    parts, start = [], 0
    for size in sizes:
        rows, lengths = (array[start : start + size] for array in batch.arrays)
        tokens = int(lengths.sum().item())
        parts.append(Batch((rows, lengths), tokens, tokens, rows.size))
        start += size
    assert start == batch.arrays[0].shape[0]
    return parts


def collect(update: Update, batches: Sequence[Batch]) -> Gradient:
    for batch in batches:
        update.accumulate(batch)
    return update.collect()


@pytest.mark.parametrize("sizes", [[6, 6], [4, 4, 4], [1, 11], [5, 2, 4, 1], [1] * 12])
def test_any_split_gives_the_same_step(task: RetentionLMTask, sizes: list[int]) -> None:
    batch = ragged_batch(task)
    whole, parts = make_update(task), make_update(task)
    expected, found = collect(whole, [batch]), collect(parts, split(batch, sizes))
    assert found.tokens == expected.tokens == batch.tokens
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert found.norm == pytest.approx(expected.norm, rel=1e-6)
    difference = tree_map(lambda one, other: mx.square(one - other).sum(), expected.sums, found.sums)
    apart = math.sqrt(sum(square.item() for _, square in tree_flatten(difference))) / batch.tokens
    assert apart <= 4e-6 * expected.norm  # float32 rounding of sums in another order
    # Adam divides an entry by its own size, which makes rounding large where the gradient is nothing but rounding.
    whole.apply(expected, 1e-2)
    parts.apply(found, 1e-2)
    for (name, one), (_, other), (_, gradient) in zip(
        tree_flatten(whole.parameters), tree_flatten(parts.parameters), tree_flatten(expected.sums), strict=True
    ):
        solid = mx.abs(gradient) > 1e-3 * mx.abs(gradient).max()
        assert mx.where(solid, mx.abs(one - other), 0).max().item() <= 1e-6, name


def test_loss_and_norms_are_those_of_the_mean_gradient(task: RetentionLMTask) -> None:
    batch = ragged_batch(task)
    rows, lengths = (np.array(array) for array in batch.arrays)
    update = make_update(task)
    gradient = collect(update, split(batch, [7, 5]))

    model = task.model
    model.update(update.parameters)

    def mean_loss(model: Any) -> mx.array:
        losses = nn.losses.cross_entropy(model(mx.array(rows[:, :-1])), mx.array(rows[:, 1:]))
        mask = mx.array(np.arange(rows.shape[1] - 1) < lengths[:, None])
        return mx.where(mask, losses, 0).sum() / mask.sum()

    loss, gradients = nn.value_and_grad(model, mean_loss)(model)
    squares = {
        name: float(np.square(np.array(array, dtype=np.float64)).sum()) for name, array in tree_flatten(gradients)
    }
    assert gradient.loss == pytest.approx(loss.item(), rel=1e-5)
    assert gradient.norm == pytest.approx(math.sqrt(sum(squares.values())), rel=1e-5)
    embedding = math.sqrt(sum(square for name, square in squares.items() if name.startswith("embedding.")))
    mlp = math.sqrt(sum(square for name, square in squares.items() if ".mlp." in name))
    assert gradient.part_norms["embedding"] == pytest.approx(embedding, rel=1e-5)
    assert gradient.part_norms["mlp"] == pytest.approx(mlp, rel=1e-5)
    assert set(gradient.part_norms) == {"embedding", "retention", "mlp", "norm"}
    assert math.hypot(*gradient.part_norms.values()) == pytest.approx(gradient.norm, rel=1e-9)


def test_a_long_gradient_is_clipped_to_the_norm(task: RetentionLMTask) -> None:
    """The second moment after one step is (1 − β₂)·g², so it tells which gradient reached the optimizer."""
    batch = ragged_batch(task)

    def applied_norm(clip_norm: float) -> float:
        update = make_update(task, clip_norm=clip_norm)
        update.apply(collect(update, [batch]), 1e-3)
        moments = [array for name, array in update.optimizer_state().items() if name.endswith(".v")]
        return math.sqrt(sum(array.sum().item() for array in moments) / (1 - 0.95))

    norm = collect(make_update(task), [batch]).norm
    assert applied_norm(0) == pytest.approx(norm, rel=1e-5)
    assert applied_norm(norm / 3) == pytest.approx(norm / 3, rel=1e-5)
    assert applied_norm(norm * 3) == pytest.approx(norm, rel=1e-5)


def test_gradient_checkpointing_changes_memory_and_nothing_else(
    tiny_profile: Callable[..., Profile], tmp_path: Path
) -> None:
    results = []
    for checkpointing in (False, True, False):
        overrides = {"train.gradient_checkpointing": checkpointing, "model.layers": 6, "train.sequence_length": 256}
        task = make_task(tiny_profile(**overrides), tmp_path)
        update = Update(task, Train(steps=1), Ranks(), mx.float32, compiled=False)
        update.restore(task.initial_parameters(), None)
        batches = [task.batch(task.examples(1, rank=0, ranks=1))]
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        gradient = collect(update, batches)
        results.append((gradient, mx.get_peak_memory() - before))
    (plain, plain_bytes), (recomputed, recomputed_bytes), (again, again_bytes) = results
    assert recomputed_bytes < 0.6 * plain_bytes
    assert again_bytes > 0.9 * plain_bytes
    assert again.norm == plain.norm
    for (name, one), (_, other) in zip(tree_flatten(plain.sums), tree_flatten(recomputed.sums), strict=True):
        assert mx.abs(one - other).max().item() <= 1e-5 * mx.abs(one).max().item(), name


def test_accumulating_needs_the_memory_of_one_gradient(tiny_profile: Callable[..., Profile], tmp_path: Path) -> None:
    """The new sums take the old ones' place: at the peak 1.04 instead of 1.25 times the weights' size here."""
    overrides = {"model.width": 256, "model.heads": 4, "train.batch_size": 4}
    task = make_task(tiny_profile(**overrides), tmp_path)
    assert isinstance(task, RetentionLMTask)
    update = make_update(task)
    size = sum(array.nbytes for _, array in tree_flatten(update.parameters))
    for example in task.examples(1, rank=0, ranks=1):
        batch = task.batch([example])
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        update.accumulate(batch)
    assert mx.get_active_memory() == before
    assert mx.get_peak_memory() - before < 1.15 * size


def test_adamw_is_as_published() -> None:
    """Algorithm 2 of arXiv 1711.05101 in NumPy, with the decay on matrices only."""
    train = Train(steps=10, learning_rate=0.1, weight_decay=0.3, beta1=0.8, beta2=0.9)
    optimizer = AdamW(train)
    rng = np.random.default_rng(0)
    ours = {"matrix": mx.array(rng.normal(size=(3, 4))), "vector": mx.array(rng.normal(size=4))}
    ours = tree_map(lambda array: array.astype(mx.float32), ours)
    optimizer.init(ours)
    theirs = {name: np.array(array, dtype=np.float64) for name, array in ours.items()}
    first, second = ({name: np.zeros_like(array) for name, array in theirs.items()} for _ in range(2))
    for step in range(1, 6):
        rate = 0.1 / step
        gradients = {name: rng.normal(size=array.shape) for name, array in theirs.items()}
        optimizer.learning_rate = rate
        ours = optimizer.apply_gradients(
            {name: mx.array(gradient).astype(mx.float32) for name, gradient in gradients.items()}, ours
        )
        for name, gradient in gradients.items():
            first[name] = 0.8 * first[name] + 0.2 * gradient
            second[name] = 0.9 * second[name] + 0.1 * gradient**2
            move = first[name] / (1 - 0.8**step) / (np.sqrt(second[name] / (1 - 0.9**step)) + 1e-8)
            decay = 0.3 if theirs[name].ndim > 1 else 0.0
            theirs[name] = theirs[name] - rate * (move + decay * theirs[name])
    for name, array in theirs.items():
        assert np.allclose(np.array(ours[name]), array, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "muon", "adafactor", "lion"])
def test_every_optimizer_learns_and_is_resumed_exactly(
    name: str, tiny_profile: Callable[..., Profile], tmp_path: Path
) -> None:
    profile = tiny_profile(**{"train.optimizer": name})
    task = make_task(profile, tmp_path)
    batch = task.batch(task.examples(1, 0, 1))

    def steps(update: Update, count: int) -> list[float]:
        found = []
        for _ in range(count):
            gradient = collect(update, [batch])
            update.apply(gradient, 1e-1 if name == "sgd" else 3e-3)
            found.append(gradient.loss)
        return found

    def begin() -> Update:
        update = Update(task, profile.train, Ranks(), mx.float32, compiled=False)
        update.restore(task.initial_parameters(), None)
        return update

    whole = steps(begin(), 6)
    first = begin()
    losses = steps(first, 3)
    mx.save_safetensors(str(tmp_path / "state.safetensors"), first.optimizer_state())
    state = mx.load(str(tmp_path / "state.safetensors"))
    assert isinstance(state, dict)
    second = Update(task, profile.train, Ranks(), mx.float32, compiled=False)
    second.restore(first.parameters, state)
    assert losses + steps(second, 3) == whole
    assert whole[-1] < whole[0] - 0.1


class TestLearningRate:
    def course(self, **settings: Any) -> list[float]:
        train = Train(steps=100, learning_rate=1.0, final_learning_rate=0.1, warmup_steps=20, **settings)
        return [learning_rate(train, step, 100) for step in range(1, 101)]

    @pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
    def test_rises_in_a_line_to_the_peak(self, schedule: str) -> None:
        assert self.course(schedule=schedule)[:20] == pytest.approx([step / 20 for step in range(1, 21)])

    def test_cosine(self) -> None:
        course = self.course()
        expected = [0.1 + 0.9 * (1 + math.cos(math.pi * (step - 20) / 81)) / 2 for step in range(20, 101)]
        assert course[19:] == pytest.approx(expected)
        assert course[-1] == pytest.approx(0.1, abs=1e-3)

    def test_linear_and_constant(self) -> None:
        course = self.course(schedule="linear")
        assert np.allclose(np.diff(course[19:]), -0.9 / 81)
        assert set(self.course(schedule="constant")[20:]) == {1.0}

    @pytest.mark.parametrize(
        ("schedule", "theirs"),
        [("exponential", optim.exponential_decay(1.0, 0.97)), ("step", optim.step_decay(1.0, 0.5, 7))],
    )
    def test_exponential_and_step_are_mlxs(self, schedule: str, theirs: Callable[[int], mx.array]) -> None:
        rate = 0.97 if schedule == "exponential" else 0.5
        course = self.course(schedule=schedule, decay_rate=rate, decay_steps=7)
        expected = [max(float(theirs(mx.array(step))), 0.1) for step in range(81)]
        assert course[19:] == pytest.approx(expected, rel=1e-5)

    def test_every_step_learns(self) -> None:
        assert all(
            learning_rate(Train(steps=steps), step, steps) > 0 for steps in (1, 2, 9) for step in range(1, steps + 1)
        )

    def test_without_warm_up_the_first_step_is_almost_the_peak(self) -> None:
        assert 0.99 < learning_rate(Train(steps=1000, learning_rate=1.0), 1, 1000) <= 1.0
