"""Power retention: its three forms against each other, against its definition, and against finite differences."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from engine.backend import mx, on_gpu
from engine.ops.power_retention import EPSILON, power_retention, retention_step, state_features

import mlx.nn as nn

CHUNK = 8
ATTENTION = {"switch_over": 1_000_000}
CHUNKED = {"switch_over": 0, "chunk_size": CHUNK}
ARGUMENTS = ("q", "k", "v", "log_g", "state")


@pytest.fixture
def on_cpu() -> Iterator[None]:
    """MLX has float64 on the CPU only."""
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(device)


@dataclass(frozen=True)
class Case:
    """The sizes of one problem, and its arrays, the same ones every time."""

    time: int
    power: int = 2
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 12  # one full tile of power 2 and a part of one
    value_dim: int = 5
    batch: int = 2
    gated: bool = True
    carried: bool = False

    def arrays(self, dtype: mx.Dtype = mx.float64) -> dict[str, mx.array | None]:
        """q, k, v, log_g and the state that nine tokens before these left behind."""
        before = self.draw(9, seed=1, dtype=dtype)
        state = None
        if self.carried:
            _, state = power_retention(**before, power=self.power, return_state=True)
        return self.draw(self.time, seed=2, dtype=dtype) | {"state": state}

    def draw(self, time: int, seed: int, dtype: mx.Dtype) -> dict[str, mx.array | None]:
        random = np.random.default_rng(seed)
        shapes = {
            "q": (self.batch, self.heads, time, self.head_dim),
            "k": (self.batch, self.kv_heads, time, self.head_dim),
            "v": (self.batch, self.kv_heads, time, self.value_dim),
        }
        arrays = {name: mx.array(random.standard_normal(shape), dtype=dtype) for name, shape in shapes.items()}
        gates = mx.array(-random.exponential(0.3, (self.batch, self.kv_heads, time)), dtype=dtype)
        return {**arrays, "log_g": gates if self.gated else None}


CASES = [
    *(Case(time) for time in (1, 2, 7, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 29)),
    *(Case(29, gated=gated, carried=carried) for gated, carried in [(False, False), (False, True), (True, True)]),
    Case(21, heads=6, kv_heads=2, carried=True),
    Case(21, heads=3, kv_heads=1, gated=False, batch=1),
    Case(19, head_dim=3, value_dim=17),
    Case(3, carried=True),
    *(Case(time, power=1, carried=carried) for time, carried in [(7, False), (CHUNK + 1, True), (29, True)]),
    Case(21, power=1, heads=6, gated=False),
    *(Case(time, power=4, head_dim=5, carried=carried) for time, carried in [(7, False), (CHUNK + 1, True)]),
    Case(17, power=4, head_dim=4, heads=4, gated=False, carried=True),
]


def whole(case: Case, options: dict[str, int], q, k, v, log_g=None, state=None) -> list[mx.array]:
    """y and the state after it, in one call."""
    return list(power_retention(q, k, v, log_g, power=case.power, initial_state=state, return_state=True, **options))


def token_by_token(case: Case, q, k, v, log_g=None, state=None) -> list[mx.array]:
    outputs = []
    for t in range(case.time):
        gate = None if log_g is None else log_g[:, :, t]
        y, state = retention_step(q[:, :, t], k[:, :, t], v[:, :, t], gate, state, power=case.power)
        outputs.append(y)
    return [mx.stack(outputs, axis=2), state]


def in_two_calls(case: Case, cut: int, q, k, v, log_g=None, state=None) -> list[mx.array]:
    outputs = []
    for part in (slice(None, cut), slice(cut, None)):
        gates = None if log_g is None else log_g[:, :, part]
        y, state = whole(case, CHUNKED, q[:, :, part], k[:, :, part], v[:, :, part], gates, state)
        outputs.append(y)
    return [mx.concatenate(outputs, axis=2), state]


def with_gradients(form: Callable[..., list[mx.array]], arrays: dict[str, mx.array | None]) -> dict[str, np.ndarray]:
    """The outputs of a form and the gradients of a weighted sum of them with respect to all of its arguments."""
    given_names = [name for name in ARGUMENTS if arrays[name] is not None]
    given_arrays = [arrays[name] for name in given_names]

    def function(*values: mx.array) -> list[mx.array]:
        return form(**dict(zip(given_names, values, strict=True)))

    random = np.random.default_rng(3)
    cotangents = [mx.array(random.standard_normal(out.shape), dtype=out.dtype) for out in function(*given_arrays)]
    outputs, gradients = mx.vjp(function, given_arrays, cotangents)
    named = dict(zip(["y", "new state"], outputs, strict=True))
    named |= {f"gradient of {name}": gradient for name, gradient in zip(given_names, gradients, strict=True)}
    return {name: np.array(array) for name, array in named.items()}


def definition(case: Case, q, k, v, log_g=None, state=None) -> np.ndarray:
    """The formula itself, token by token and pair by pair; a state has no place in it."""
    assert state is None
    q, k, v = (np.array(array) for array in (q, k, v))
    gates = np.zeros(k.shape[:3]) if log_g is None else np.array(log_g)
    y = np.zeros((*q.shape[:3], v.shape[-1]))
    group = q.shape[1] // k.shape[1]
    for b, h, i in np.ndindex(*q.shape[:3]):
        kv = h // group
        total, normaliser = np.zeros(v.shape[-1]), 0.0
        for j in range(i + 1):
            weight = (q[b, h, i] @ k[b, kv, j] / np.sqrt(q.shape[-1])) ** case.power
            weight *= np.exp(gates[b, kv, j + 1 : i + 1].sum())
            total += weight * v[b, kv, j]
            normaliser += weight
        y[b, h, i] = total / (max(abs(normaliser), 1) if case.power == 1 else normaliser + EPSILON)
    return y


def assert_same(left: dict[str, np.ndarray], right: dict[str, np.ndarray], tolerance: float = 1e-10) -> None:
    assert left.keys() == right.keys()
    for name, array in left.items():
        assert array.dtype == right[name].dtype
        assert_allclose(array, right[name], rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_three_forms_agree_in_values_and_gradients(case: Case) -> None:
    arrays = case.arrays()
    attention = with_gradients(partial(whole, case, ATTENTION), arrays)
    assert_same(with_gradients(partial(whole, case, CHUNKED), arrays), attention)
    assert_same(with_gradients(partial(token_by_token, case), arrays), attention)
    if case.time > 1:
        assert_same(with_gradients(partial(in_two_calls, case, (case.time + 1) // 2), arrays), attention)


@pytest.mark.usefixtures("on_cpu")
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    case=st.builds(
        Case,
        time=st.integers(1, 14),
        power=st.sampled_from([1, 2, 4]),
        heads=st.sampled_from([2, 4]),
        kv_heads=st.sampled_from([1, 2]),
        head_dim=st.integers(1, 11),
        value_dim=st.integers(1, 4),
        batch=st.integers(1, 2),
        gated=st.booleans(),
    ),
    chunk_size=st.integers(1, 5),
)
def test_every_form_is_the_definition(case: Case, chunk_size: int) -> None:
    arrays = case.arrays()
    expected = definition(case, **arrays)
    for form in (
        partial(whole, case, ATTENTION),
        partial(whole, case, {"switch_over": 0, "chunk_size": chunk_size}),
        partial(token_by_token, case),
    ):
        assert_allclose(np.array(form(**arrays)[0]), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(("power", "head_dim"), [(1, 7), (2, 8), (2, 19), (2, 64), (4, 1), (4, 7), (4, 16)])
def test_a_state_read_by_a_query_gives_the_power_of_their_product(power: int, head_dim: int) -> None:
    """φ(q)·φ(k) = (q·k)^p. The ε of the normaliser (or power 1's floor) makes its absolute size visible in y."""
    random = np.random.default_rng(0)
    q, k = random.standard_normal((2, 20, 1, head_dim))
    one, nothing = mx.ones((20, 1, 1), dtype=mx.float64), mx.zeros((20, 1, head_dim), dtype=mx.float64)
    to_array = partial(mx.array, dtype=mx.float64)
    _, state = retention_step(nothing, to_array(k), one, power=power)
    scale = 0.5 / np.abs((q * k).sum(-1)).max() * (1 if power == 1 else EPSILON ** (1 / power))
    y = np.array(retention_step(to_array(q), nothing, one, None, state, power=power, scale=scale)[0])[..., 0]
    weight = y if power == 1 else EPSILON * y / (1 - y)
    expected = (scale * (q * k).sum(-1)) ** power
    assert_allclose(weight, expected, rtol=1e-9, atol=1e-12 * np.abs(expected).max())


@pytest.mark.parametrize(("head_dim", "multisets"), [(32, 528), (64, 2080)])
def test_the_state_of_power_2_is_little_larger_than_it_must_be(head_dim: int, multisets: int) -> None:
    assert multisets <= state_features(head_dim, 2) <= 1.25 * multisets


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("options", [ATTENTION, CHUNKED], ids=["attention", "chunked"])
@pytest.mark.parametrize(
    "case",
    [Case(13, carried=True, heads=4), Case(13, power=1, carried=True), Case(11, power=4, head_dim=3, carried=True)],
    ids=str,
)
def test_gradients_agree_with_finite_differences(case: Case, options: dict[str, int]) -> None:
    arrays = case.arrays()
    random = np.random.default_rng(4)
    cotangents = [
        mx.array(random.standard_normal(out.shape), dtype=out.dtype) for out in whole(case, options, **arrays)
    ]

    def loss(*values: mx.array) -> mx.array:
        outputs = whole(case, options, *values)
        return sum((out * cotangent).sum() for out, cotangent in zip(outputs, cotangents, strict=True))

    values = list(arrays.values())
    gradients = mx.grad(loss, argnums=range(5))(*values)
    step = 1e-5
    for index, name in enumerate(arrays):
        for _ in range(3):
            direction = mx.array(random.standard_normal(values[index].shape), dtype=mx.float64)
            ahead, behind = (
                loss(*values[:index], values[index] + sign * step * direction, *values[index + 1 :]) for sign in (1, -1)
            )
            expected = ((ahead - behind) / (2 * step)).item()
            assert (gradients[index] * direction).sum().item() == pytest.approx(expected, rel=1e-6, abs=1e-6), name


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("options", [ATTENTION, CHUNKED], ids=["attention", "chunked"])
def test_sequences_of_a_batch_know_nothing_of_each_other(options: dict[str, int]) -> None:
    case = Case(21, batch=3, heads=4, carried=True)
    arrays = case.arrays()
    together = whole(case, options, **arrays)
    for b in range(case.batch):
        alone = whole(case, options, **{name: array[b : b + 1] for name, array in arrays.items()})
        for one, all_of_them in zip(alone, together, strict=True):
            assert_allclose(np.array(one[0]), np.array(all_of_them[b]), rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("options", [ATTENTION, CHUNKED], ids=["attention", "chunked"])
def test_no_tokens_change_nothing(options: dict[str, int]) -> None:
    case = Case(0, carried=True)
    arrays = case.arrays()
    y, state = whole(case, options, **arrays)
    assert y.shape == (case.batch, case.heads, 0, case.value_dim)
    assert_allclose(np.array(state), np.array(arrays["state"]))
    _, nothing = whole(case, options, **(arrays | {"state": None}))
    assert nothing.shape == state.shape
    assert not np.array(nothing).any()


@pytest.mark.parametrize("power", [1, 2, 4])
@pytest.mark.parametrize("closed", [-np.inf, -1e4, -100.0])
@pytest.mark.parametrize("options", [ATTENTION, CHUNKED], ids=["attention", "chunked"])
def test_a_closed_gate_forgets_and_stays_finite(power: int, closed: float, options: dict[str, int]) -> None:
    case = Case(25, power=power, head_dim=6, carried=True)
    arrays = case.arrays(mx.float32)
    cut = 11
    gates = np.array(arrays["log_g"])
    gates[:, :, cut] = closed
    results = with_gradients(partial(whole, case, options), arrays | {"log_g": mx.array(gates)})
    assert all(np.isfinite(result).all() for result in results.values())
    after = {name: arrays[name][:, :, cut:] for name in ("q", "k", "v", "log_g")}
    fresh, _ = whole(case, options, **after)
    assert_allclose(results["y"][:, :, cut:], np.array(fresh), rtol=1e-4, atol=1e-5)

    gates[:] = closed
    results = with_gradients(partial(whole, case, options), arrays | {"log_g": mx.array(gates)})
    assert all(np.isfinite(result).all() for result in results.values())


@pytest.mark.parametrize("power", [1, 2, 4])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-4, 1e4])
@pytest.mark.parametrize("options", [ATTENTION, CHUNKED], ids=["attention", "chunked"])
def test_vanishing_and_large_inputs_stay_finite_in_float32(power: int, size: float, options: dict[str, int]) -> None:
    case = Case(25, power=power, head_dim=6)
    arrays = case.arrays(mx.float32)
    for name in ("q", "k"):
        results = with_gradients(partial(whole, case, options), arrays | {name: arrays[name] * size})
        assert all(np.isfinite(result).all() for result in results.values())


@pytest.mark.parametrize("sign", [-1, 1])
def test_power_1_divides_by_its_normaliser_only_where_that_exceeds_1(sign: int) -> None:
    k, v = mx.array([[[[1.0]], [[1.0]]]]), mx.array([[[[3.0]], [[3.0]]]])
    y = power_retention(sign * mx.array([[[[0.25]], [[5.0]]]]), k, v, power=1, scale=1.0)
    assert_allclose(np.array(y).ravel(), [sign * 0.25 * 3, sign * 3])


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("options", [ATTENTION, CHUNKED], ids=["attention", "chunked"])
def test_half_precision_is_summed_in_float32(dtype: mx.Dtype, options: dict[str, int]) -> None:
    case = Case(100, heads=4, value_dim=4)
    arrays = case.arrays(dtype)
    y, state = whole(case, options, **arrays)
    assert y.dtype == dtype
    assert state.dtype == mx.float32
    exact = {name: array.astype(mx.float32) for name, array in arrays.items() if array is not None}
    expected_y, expected_state = whole(case, options, **exact)
    assert mx.array_equal(y, expected_y.astype(dtype))
    assert mx.array_equal(state, expected_state)

    y, state = retention_step(*(arrays[name][:, :, 0] for name in ("q", "k", "v", "log_g")))
    assert (y.dtype, state.dtype) == (dtype, mx.float32)
    _, gradients = mx.vjp(partial(whole, case, options), list(arrays.values())[:4], [expected_y, expected_state])
    assert {gradient.dtype for gradient in gradients} == {dtype}


def test_power_4_with_wide_heads_has_the_attention_form_only() -> None:
    arrays = Case(20, power=4, head_dim=17, value_dim=3).draw(20, 0, mx.float32)
    long, short = (power_retention(**arrays, power=4, **options) for options in (CHUNKED, ATTENTION))
    assert mx.array_equal(long, short)
    with pytest.raises(ValueError, match="head_dim <= 16 only, not 17"):
        power_retention(**arrays, power=4, return_state=True)
    with pytest.raises(ValueError, match="head_dim <= 16 only, not 17"):
        power_retention(**arrays, power=4, initial_state=mx.zeros((2, 2, 5, 4)))
    with pytest.raises(ValueError, match="head_dim <= 16 only, not 17"):
        retention_step(*(arrays[name][:, :, 0] for name in ("q", "k", "v", "log_g")), power=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"power": 3}, "power = 3: should be 1, 2 or 4"),
        ({"chunk_size": 0}, "chunk_size = 0: should be at least 1"),
        ({"switch_over": -1}, "switch_over = -1: should be at least 0"),
        ({"q": mx.zeros((2, 4, 6))}, r"q has shape \(2, 4, 6\): should be \[batch, heads, time, head_dim\]"),
        ({"q": mx.zeros((2, 3, 6, 4))}, "q has 3 heads, which is not a multiple of the 2 of k and v"),
        ({"q": mx.zeros((2, 4, 6, 4), dtype=mx.int32)}, "q is .*int32: should be floating point"),
        ({"k": mx.zeros((2, 2, 6, 3))}, r"k has shape \(2, 2, 6, 3\): should be \(2, 2, 6, 4\)"),
        ({"k": mx.zeros((2, 2, 5, 4))}, r"k has shape \(2, 2, 5, 4\): should be \(2, 2, 6, 4\)"),
        ({"v": mx.zeros((2, 4, 6, 4))}, r"v has shape \(2, 4, 6, 4\): should begin with \(2, 2, 6\)"),
        ({"log_g": mx.zeros((2, 4, 6))}, r"log_g has shape \(2, 4, 6\): should be .* \(2, 2, 6\)"),
        ({"initial_state": mx.zeros((2, 2, 10, 4))}, r"state has shape \(2, 2, 10, 4\): should be \(2, 2, 16, 6\)"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_refused_with_what_would(changes: dict[str, object], message: str) -> None:
    fitting = {
        "q": mx.zeros((2, 4, 6, 4)),
        "k": mx.zeros((2, 2, 6, 4)),
        "v": mx.zeros((2, 2, 6, 5)),
        "log_g": mx.zeros((2, 2, 6)),
    }
    power_retention(**fitting)
    with pytest.raises(ValueError, match=message):
        power_retention(**(fitting | changes))


def test_a_step_takes_one_token() -> None:
    with pytest.raises(ValueError, match=r"one token is q, k, v of \[batch, heads, size\]"):
        retention_step(mx.zeros((1, 2, 1, 4)), mx.zeros((1, 2, 1, 4)), mx.zeros((1, 2, 1, 4)))


def peak_bytes(time: int) -> int:
    """Memory that a forward and backward pass needs beside its inputs."""
    case = Case(time, batch=1, head_dim=32, value_dim=32)
    arrays = list(case.draw(time, 0, mx.float32).values())
    mx.eval(arrays)

    def loss(*values: mx.array) -> mx.array:
        return power_retention(*values, switch_over=0, chunk_size=128).sum()

    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(mx.value_and_grad(loss, argnums=range(4))(*arrays))
    return mx.get_peak_memory() - before


def test_memory_grows_linearly_and_keeps_one_chunk_of_features() -> None:
    """Keeping what one chunk computes, or adding up full lengths chunk by chunk, would take several times as much."""
    short, middle, long = (peak_bytes(tokens) for tokens in (2048, 4096, 8192))
    assert middle / short < 2.1
    assert long / middle < 2.1
    features_bytes = Case(1).heads * state_features(32, 2) * 4
    assert (long - middle) / 4096 < features_bytes / 2


class Retention(nn.Module):
    def __init__(self, width: int, **options: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, 3 * width + 2)
        self.options = options

    def __call__(self, x: mx.array) -> mx.array:
        batch, time, width = x.shape
        *projected, gates = mx.split(self.project(x), [width, 2 * width, 3 * width], axis=-1)
        q, k, v = (y.reshape(batch, time, 2, -1).swapaxes(1, 2) for y in projected)
        return power_retention(q, k, v, nn.log_sigmoid(gates.swapaxes(1, 2)), **self.options)


def test_modules_and_checkpointing_see_the_same_gradients() -> None:
    mx.random.seed(0)
    x = mx.random.normal((2, 21, 16))
    attention = Retention(16, **ATTENTION)
    chunked = Retention(16, **CHUNKED)
    chunked.update(attention.parameters())

    def gradients(model: Retention, checkpointed: bool = False) -> dict[str, dict[str, mx.array]]:
        call = nn.utils.checkpoint(model) if checkpointed else model
        return nn.value_and_grad(model, lambda x: mx.square(call(x)).sum())(x)[1]["project"]

    expected = gradients(attention)
    for found in (gradients(chunked), gradients(chunked, checkpointed=True)):
        for name, gradient in found.items():
            assert_allclose(np.array(gradient), np.array(expected[name]), rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not on_gpu(), reason="on the CPU MLX compiles with g++, for longer than this file may run")
def test_compiled_gives_the_same() -> None:
    case = Case(29, heads=4, carried=True)
    arrays = list(case.arrays(mx.float32).values())
    loss = mx.value_and_grad(lambda *values: whole(case, CHUNKED, *values)[0].sum(), argnums=range(5))
    for plain, compiled in zip(loss(*arrays)[1], mx.compile(loss)(*arrays)[1], strict=True):
        assert_allclose(np.array(compiled), np.array(plain), rtol=1e-4, atol=1e-4)
