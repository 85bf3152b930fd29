"""The operations rewritten for a CPU against MLX's own, values and gradients."""

import contextlib
import gc
import io
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_impl import kernels
from mlx_impl.device import can_compile
from mlx_impl.loss import cross_entropy


@pytest.fixture(params=["on its own", "for a compiled step"])
def either(request: pytest.FixtureRequest) -> Iterator[None]:
    """Once with powers, and once with what is written for the compiler."""
    with kernels.compiling() if request.param != "on its own" else contextlib.nullcontext():
        yield


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> mx.array:
    return mx.random.normal(shape, scale=scale, key=mx.random.key(seed))


def assert_same(ours: mx.array, theirs: mx.array, tolerance: float = 2e-6) -> None:
    assert ours.shape == theirs.shape
    scale = max(1.0, mx.abs(theirs).max().item())
    assert mx.abs(ours - theirs).max().item() <= tolerance * scale


def plain_swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return nn.silu(gate) * up


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("small", [0, 1000], ids=["sigmoid again", "sigmoid kept"])
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_swiglu(monkeypatch: pytest.MonkeyPatch, scale: float, small: int) -> None:
    monkeypatch.setattr(kernels, "SMALL", small)
    gate, up, weight = drawn(3, 50, scale=scale), drawn(3, 50, seed=1), drawn(3, 50, seed=2)
    assert_same(kernels.swiglu(gate, up), plain_swiglu(gate, up))
    ours, theirs = (
        mx.grad(lambda *x, f=f: (f(*x) * weight).sum(), argnums=(0, 1))(gate, up)
        for f in (kernels.swiglu, plain_swiglu)
    )
    for a, b in zip(ours, theirs, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("shape", [(7,), (3, 5), (3000, 700), (2, 300, 400)])
def test_sum_of_squares(shape: tuple[int, ...]) -> None:
    """MLX's own sum of 2.1 million squares is wrong in the third digit."""
    x = drawn(*shape)
    exact = np.square(np.array(x, np.float64)).sum()
    assert kernels.sum_of_squares(x).item() == pytest.approx(exact, rel=5e-6)


@pytest.mark.usefixtures("either")
def test_exponentials() -> None:
    x = mx.concatenate([drawn(1000, scale=3), mx.linspace(-87, 87, 1001)])
    exact = np.exp(np.array(x, np.float64))
    error = np.abs(np.array(kernels.exp(x), np.float64) / exact - 1)
    assert error[:1000].max() < 1e-6
    assert error.max() < 6e-6  # x / ln 2 is rounded to 24 bits, and x with it
    slopes = mx.grad(lambda x: (2 * kernels.exp(x)).sum())(x)
    np.testing.assert_allclose(np.array(slopes), 2 * exact, rtol=6e-6)
    lowest = mx.array([-1e30, -mx.inf, -200.0, 0.0, mx.nan])
    np.testing.assert_array_equal(np.array(kernels.exp(lowest)), [0, 0, 0, 1, np.nan])


@pytest.mark.skipif(not can_compile(), reason="mx.compile needs a C++ compiler here")
def test_a_compiled_exponential_is_the_same() -> None:
    x = drawn(1000, scale=20)
    with kernels.compiling():
        compiled, expected = mx.compile(kernels.exp)(x), kernels.exp(x)
    np.testing.assert_array_equal(np.array(compiled), np.array(expected))


@pytest.mark.usefixtures("either")
def test_swiglu_of_extremes() -> None:
    x, one = mx.array([-1e4, -200.0, 0.0, 200.0, 1e4]), mx.ones(5)
    np.testing.assert_array_equal(np.array(kernels.swiglu(x, one)), [0, 0, 0, 200, 1e4])
    np.testing.assert_allclose(
        np.array(mx.grad(lambda x: kernels.swiglu(x, one).sum())(x)), [0, 0, 0.5, 1, 1], atol=1e-30
    )
    assert mx.isnan(kernels.swiglu(mx.array([mx.nan]), mx.ones(1))).item()


def test_16_bit_numbers_keep_their_type_and_their_accuracy() -> None:
    gate, up = drawn(3, 50, scale=5).astype(mx.bfloat16), drawn(3, 50, seed=1).astype(mx.bfloat16)
    found = kernels.swiglu(gate, up)
    assert found.dtype == mx.bfloat16
    exact = plain_swiglu(gate.astype(mx.float32), up.astype(mx.float32))
    np.testing.assert_allclose(np.array(found.astype(mx.float32)), np.array(exact), rtol=2e-2, atol=1e-3)


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("mask", ["causal", "causal after 4", None, "boolean", "additive"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("block", [2, 64])
def test_attention(monkeypatch: pytest.MonkeyPatch, mask: str | None, heads: int, kv_heads: int, block: int) -> None:
    monkeypatch.setattr(kernels, "QUERIES", block)
    queries, keys = (7, 7) if mask == "causal" else (5, 9)
    mask = "causal" if mask == "causal after 4" else mask
    q, k, v = drawn(2, heads, queries, 8), drawn(2, kv_heads, keys, 8, seed=1), drawn(2, kv_heads, keys, 8, seed=2)
    weight = drawn(2, heads, queries, 8, seed=3)
    seen = mx.tril(mx.ones((queries, keys), dtype=mx.bool_), 2)
    sees = {"boolean": seen, "additive": mx.where(seen, drawn(queries, keys, seed=4), -1e9)}.get(mask, mask)

    def ours(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return kernels.attention(q, k, v, 0.3, sees)

    def theirs(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=sees)

    assert_same(ours(q, k, v), theirs(q, k, v))
    gradients = [
        mx.grad(lambda *qkv, f=f: (f(*qkv) * weight).sum(), argnums=(0, 1, 2))(q, k, v) for f in (ours, theirs)
    ]
    for a, b in zip(*gradients, strict=True):
        assert_same(a, b)


@pytest.mark.usefixtures("either")
def test_attention_of_large_scores() -> None:
    q = drawn(1, 2, 6, 8, scale=100)
    assert_same(
        kernels.attention(q, q, q, 1.0, "causal"),
        mx.fast.scaled_dot_product_attention(q, q, q, scale=1.0, mask="causal"),
    )


def in_chunks(monkeypatch: pytest.MonkeyPatch, rows: int, vocabulary: int) -> None:
    """Logits of so many positions at a time, on a GPU and on a CPU."""
    monkeypatch.setattr(kernels, "ROWS", rows)
    monkeypatch.setattr(kernels, "LOGITS", rows * vocabulary)


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("rows", [1, 4, 512])
def test_the_loss_in_chunks_is_that_of_whole_logits(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    in_chunks(monkeypatch, rows, 30)
    hidden, weight = drawn(2, 5, 8), drawn(30, 8, seed=1)
    targets = mx.random.randint(0, 30, (2, 5), key=mx.random.key(2))
    mask = mx.array([[1.0, 0, 1, 0.5, 1], [0, 0, 2, 1, 1]])

    def ours(hidden: mx.array, weight: mx.array) -> mx.array:
        return 3 * kernels.summed_cross_entropy(hidden, weight, targets, mask)

    def theirs(hidden: mx.array, weight: mx.array) -> mx.array:
        logits = hidden @ weight.T
        chosen = mx.take_along_axis(logits, targets[..., None], axis=-1).squeeze(-1)
        return 3 * ((mx.logsumexp(logits, axis=-1) - chosen) * mask).sum()

    assert_same(ours(hidden, weight), theirs(hidden, weight))
    for a, b in zip(*(mx.grad(f, argnums=(0, 1))(hidden, weight) for f in (ours, theirs)), strict=True):
        assert_same(a, b)


def operations(*arrays: mx.array) -> str:
    """The graph that evaluating arrays would run, in Graphviz's language."""
    graph = io.StringIO()
    mx.export_to_dot(graph, *arrays)
    return graph.getvalue()


def test_only_what_is_asked_for_is_computed() -> None:
    hidden, weight, targets, mask = drawn(4, 8), drawn(30, 8, seed=1), mx.array([0, 1, 2, 3]), mx.ones(4)
    mx.eval(hidden)  # not part of the graph

    def loss(hidden: mx.array, weight: mx.array) -> mx.array:
        return kernels.summed_cross_entropy(hidden, weight, targets, mask)

    value, by_hidden = mx.value_and_grad(loss)(hidden, weight)
    everything, slopes = mx.value_and_grad(loss, argnums=(0, 1))(hidden, weight)
    graphs = operations(loss(hidden, weight)), operations(value, by_hidden), operations(everything, *slopes)
    assert [graph.count("Matmul") for graph in graphs] == [1, 2, 3]
    if kernels.on_cpu():
        assert "Subtract" not in operations(kernels.swiglu(hidden, hidden))  # as in the slope


def peak(work: Callable[[], Any]) -> int:
    """Bytes at the peak of a computation, above what was there before and will be there after it."""
    gc.collect()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(work())
    return mx.get_peak_memory() - before


def kept(layer: Callable[[mx.array], mx.array], x: mx.array, layers: int) -> float:
    """Bytes that a layer keeps for the backward pass: what so many more of them add to the peak.

    The least of some peaks: MLX allocates ahead of what it computes, the further the busier the machine is.
    """
    mx.eval(x)

    def total(x: mx.array, layers: int) -> mx.array:
        for _ in range(layers):
            x = layer(x)
        return x.sum()

    graded = mx.grad(total)
    graphs = [partial(graded, layers=n) for n in (layers, 2 * layers)]
    found = [min(peak(partial(graph, x)) for _ in range(7)) for graph in graphs]
    return (found[1] - found[0]) / layers


@pytest.mark.skipif(not kernels.on_cpu(), reason="a GPU computes with MLX's own kernels")
def test_attention_keeps_no_scores_of_the_keys_that_come_after(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "QUERIES", 8)
    k = drawn(1, 2, 64, 2, seed=1)
    scores = 4 * 8 * 64 * 64  # bytes

    def layer(attend: Callable[..., mx.array]) -> Callable[[mx.array], mx.array]:
        return lambda q: attend(q, k, k, scale=0.5, mask="causal")

    ours, theirs = (
        kept(layer(f), drawn(1, 8, 64, 2), 20) for f in (kernels.attention, mx.fast.scaled_dot_product_attention)
    )
    assert ours < 0.75 * scores, ours / scores  # 0.56 of them are seen; the rest are sums, queries and what comes out
    assert ours < 0.75 * theirs, (ours / scores, theirs / scores)


@pytest.mark.skipif(not kernels.on_cpu(), reason="a GPU computes with MLX's own kernels")
def test_a_large_swiglu_keeps_no_more_than_what_goes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    x = drawn(1, 1000)
    small, plain = (kept(lambda x, f=f: f(x, x), x, 100) / x.nbytes for f in (kernels.swiglu, plain_swiglu))
    monkeypatch.setattr(kernels, "SMALL", 10)
    large = kept(lambda x: kernels.swiglu(x, x), x, 100) / x.nbytes
    assert large < 1.3 < 1.7 < small < 2.3 < plain, (large, small, plain)


@pytest.mark.skipif(not kernels.on_cpu(), reason="a GPU computes with MLX's own kernels")
@pytest.mark.skipif(not can_compile(), reason="mx.compile needs a C++ compiler here")
def test_a_compiled_step_keeps_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large SwiGLU's exponentials are the same in both passes, and computed twice so as not to be kept."""
    graded, x = mx.value_and_grad(lambda x: kernels.swiglu(x, x).sum()), drawn(3, 50)
    found = []
    for small in (0, 1000):
        monkeypatch.setattr(kernels, "SMALL", small)
        found.append(operations(*kernels.compiled(lambda x: graded(x))(x)).count("LeftShift"))
    assert found == [2, 1]


def test_the_logits_of_all_positions_never_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets, mask = drawn(256, 8), drawn(2000, 8, seed=1), mx.arange(256), mx.ones(256)
    mx.eval(hidden, weight, targets, mask)
    graded = mx.value_and_grad(partial(kernels.summed_cross_entropy, targets=targets, mask=mask))
    found = []
    for rows in (256, 8):
        in_chunks(monkeypatch, rows, len(weight))
        found.append(peak(lambda: graded(hidden, weight)))
    # On a CPU some of them do, see `LOGITS`.
    assert found[1] < 0.5 * found[0], found


def test_the_loss_of_logits_that_overflow_an_exponential() -> None:
    hidden, weight = mx.array([[1000.0], [-1000.0]]), mx.array([[1.0], [0.5], [0.0]])
    targets, mask = mx.array([0, 1]), mx.ones(2)
    assert kernels.summed_cross_entropy(hidden, weight, targets, mask).item() == 500
    gradient = mx.grad(partial(kernels.summed_cross_entropy, weight=weight, targets=targets, mask=mask))(hidden)
    np.testing.assert_array_equal(np.array(gradient), [[0], [-0.5]])
    assert mx.isnan(kernels.summed_cross_entropy(hidden * mx.nan, weight, targets, mask)).item()


def test_cross_entropy_and_its_gradient() -> None:
    logits = drawn(2, 3, 11, scale=20)
    targets = mx.random.randint(0, 11, (2, 3), key=mx.random.key(1))

    def theirs(logits: mx.array) -> mx.array:
        return nn.losses.cross_entropy(logits, targets, reduction="none")

    assert_same(cross_entropy(logits, targets), theirs(logits))
    ours, other = (mx.grad(lambda x, f=f: f(x).sum())(logits) for f in (lambda x: cross_entropy(x, targets), theirs))
    assert_same(ours, other)
