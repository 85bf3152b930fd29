"""The operations rewritten for a CPU against MLX's own, values and gradients."""

import io
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_impl import kernels
from mlx_impl.loss import cross_entropy


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> mx.array:
    return mx.random.normal(shape, scale=scale, key=mx.random.key(seed))


def assert_same(ours: mx.array, theirs: mx.array, tolerance: float = 2e-6) -> None:
    assert ours.shape == theirs.shape
    scale = max(1.0, mx.abs(theirs).max().item())
    assert mx.abs(ours - theirs).max().item() <= tolerance * scale


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_silu(scale: float) -> None:
    x, weight = drawn(3, 50, scale=scale), drawn(3, 50, seed=1)
    assert_same(kernels.silu(x), nn.silu(x))
    ours, theirs = (mx.grad(lambda x, f=f: (f(x) * weight).sum())(x) for f in (kernels.silu, nn.silu))
    assert_same(ours, theirs)


def test_silu_of_extremes() -> None:
    x = mx.array([-1e4, -200.0, 0.0, 200.0, 1e4])
    np.testing.assert_array_equal(np.array(kernels.silu(x)), [0, 0, 0, 200, 1e4])
    assert mx.isfinite(mx.grad(lambda x: kernels.silu(x).sum())(x)).all().item()
    assert mx.isnan(kernels.silu(mx.array([mx.nan]))).item()


@pytest.mark.parametrize("mask", ["causal", "causal after 4", None, "boolean", "additive"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
def test_attention(mask: str | None, heads: int, kv_heads: int) -> None:
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


def test_attention_of_large_scores() -> None:
    q = drawn(1, 2, 6, 8, scale=100)
    assert_same(
        kernels.attention(q, q, q, 1.0, "causal"),
        mx.fast.scaled_dot_product_attention(q, q, q, scale=1.0, mask="causal"),
    )


@pytest.mark.parametrize("rows", [1, 4, 512])
def test_the_loss_in_chunks_is_that_of_whole_logits(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(kernels, "ROWS", rows)
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
        assert "Subtract" not in operations(kernels.silu(hidden))  # as in the slope


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
