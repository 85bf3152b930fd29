"""AdamW against torch's own, the schedule, clipping, and the optimizer step: compiled, eager, in microbatches.

Both our AdamW (MLX) and the reference's (by hand) are held against `torch.optim.AdamW`, which neither uses.
"""

import itertools
import math
from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
import torch
from comparing import (
    CONFIGS,
    adapter,
    assert_all_close,
    assert_close,
    from_mlx,
    mlx_model,
    to_mlx,
    wave,
    weights,
    windows,
)
from hypothesis import given
from hypothesis import strategies as st

import torch_ref.optim
from mlx_impl import lora
from mlx_impl.arrays import flatten
from mlx_impl.device import can_compile
from mlx_impl.optim import AdamW, clip_by_global_norm, warmup_cosine
from mlx_impl.train import train_steps

SHAPES = {"matrix": (7, 5), "vector": (11,), "table": (3, 4, 2)}
BETAS, EPS, DECAY = (0.9, 0.95), 1e-8, 0.1
Update = Callable[[dict[str, np.ndarray], float], dict[str, np.ndarray]]


def torchs_own(parameters: dict[str, np.ndarray]) -> Update:
    """`torch.optim.AdamW`, told not to decay vectors."""
    held = {name: torch.tensor(array, requires_grad=True) for name, array in parameters.items()}
    groups = [{"params": [p], "weight_decay": DECAY if p.ndim >= 2 else 0.0} for p in held.values()]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=BETAS, eps=EPS)

    def step(gradients: dict[str, np.ndarray], learning_rate: float) -> dict[str, np.ndarray]:
        for name, gradient in gradients.items():
            held[name].grad = torch.tensor(gradient)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        return {name: p.detach().numpy().copy() for name, p in held.items()}

    return step


def ours_in_torch(parameters: dict[str, np.ndarray]) -> Update:
    """`torch_ref.optim.AdamW`."""
    held = {name: torch.tensor(array) for name, array in parameters.items()}
    optimizer = torch_ref.optim.AdamW(list(held.values()), 1.0, BETAS, EPS, DECAY)

    def step(gradients: dict[str, np.ndarray], learning_rate: float) -> dict[str, np.ndarray]:
        optimizer.learning_rate = learning_rate
        optimizer.apply_gradients([torch.tensor(gradients[name]) for name in held])
        return {name: p.numpy().copy() for name, p in held.items()}

    return step


def ours_in_mlx(parameters: dict[str, np.ndarray]) -> Update:
    """`mlx_impl.optim.AdamW`."""
    held = [to_mlx(parameters)]
    optimizer = AdamW(1.0, BETAS, EPS, DECAY)

    def step(gradients: dict[str, np.ndarray], learning_rate: float) -> dict[str, np.ndarray]:
        optimizer.learning_rate = mx.array(learning_rate)
        held[0] = optimizer.apply_gradients(to_mlx(gradients), held[0])
        return from_mlx(held[0])

    return step


# -- AdamW ---------------------------------------------------------------------------


@pytest.mark.parametrize("ours", [ours_in_mlx, ours_in_torch])
def test_adamw_is_torchs_over_many_steps(ours: Callable[[dict[str, np.ndarray]], Update]) -> None:
    parameters = {name: wave(shape, 1.0) for name, shape in SHAPES.items()}
    expected_step, step = torchs_own(parameters), ours(parameters)
    for number in range(50):
        # From 1e-3 down to 1e-6 in size: small gradients are where eps and bias correction show.
        size = np.float32(10 ** -(3 + number % 4))
        gradients = {name: wave(shape, number) * size for name, shape in SHAPES.items()}
        rate = warmup_cosine(number, 50, 5, peak=1e-2)
        expected, actual = expected_step(gradients, rate), step(gradients, rate)
        # Weights are near 1, where an ulp is 1.2e-7: that is what is seen, and all 50 steps could add up.
        assert_all_close(f"step {number}: weight", actual, expected, atol=1e-6)
    assert all(np.abs(expected[name] - parameters[name]).max() > 1e-2 for name in SHAPES)


def test_the_first_step_has_the_size_of_the_rate() -> None:
    """With bias correction m'/sqrt(v') is the gradient's sign; without it the step would be 0.45 times that."""
    parameters = {"vector": wave((9,), 0.0)}
    gradients = {"vector": wave((9,), 1.0)}
    moved = ours_in_mlx(parameters)(gradients, 1e-2)["vector"] - parameters["vector"]
    assert_close("step", moved, -1e-2 * np.sign(gradients["vector"]), atol=2e-7)  # rounding of weights near 1


def test_vectors_do_not_decay_and_matrices_do() -> None:
    parameters = {name: wave(shape, 1.0) for name, shape in SHAPES.items()}
    moved = ours_in_mlx(parameters)({name: np.zeros_like(a) for name, a in parameters.items()}, 0.5)
    assert np.array_equal(moved["vector"], parameters["vector"])
    for name in ("matrix", "table"):
        assert_close(name, moved[name], parameters[name] * (1 - 0.5 * DECAY), of_largest=1e-6)


# -- schedule ------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [warmup_cosine, torch_ref.optim.warmup_cosine], ids=["mlx", "torch"])
def test_the_schedule_rises_to_its_peak_and_ends_at_its_floor(schedule: Callable[..., float]) -> None:
    rates = [schedule(step, 100, 10, peak=2.0, floor=0.25) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == 2.0
    assert rates[54] == pytest.approx((2.0 + 0.5) / 2)  # half way down, 45 of 90 steps after the peak
    assert rates[99] == pytest.approx(0.5)
    assert all(a < b for a, b in itertools.pairwise(rates[:10]))
    assert all(a > b for a, b in itertools.pairwise(rates[9:]))
    assert schedule(150, 100, 10, peak=2.0, floor=0.25) == pytest.approx(0.5)  # past the end


@given(total=st.integers(1, 500), share=st.floats(0, 1), peak=st.floats(1e-6, 1), floor=st.floats(0, 1))
def test_the_schedules_agree_and_stay_within_bounds(total: int, share: float, peak: float, floor: float) -> None:
    warmup = int(total * share)
    for step in range(total):
        rate = warmup_cosine(step, total, warmup, peak, floor)
        assert rate == pytest.approx(torch_ref.optim.warmup_cosine(step, total, warmup, peak, floor))
        assert 0 <= rate <= peak * (1 + 1e-12)
        assert step < warmup or rate >= floor * peak * (1 - 1e-12)


# -- clipping ------------------------------------------------------------------------


@given(scale=st.floats(1e-6, 1e6), limit=st.floats(1e-3, 1e3))
def test_clipping_bounds_the_norm_and_keeps_the_direction(scale: float, limit: float) -> None:
    tree = {name: wave(shape, 2.0) * np.float32(scale) for name, shape in SHAPES.items()}
    wanted = math.sqrt(sum(float(np.square(array.astype(np.float64)).sum()) for array in tree.values()))
    clipped, norm = clip_by_global_norm(to_mlx(tree), limit)
    assert norm.item() == pytest.approx(wanted, rel=1e-5)
    after = from_mlx(clipped)
    factor = min(1.0, limit / (wanted + 1e-6))  # torch's clip_grad_norm_ has this 1e-6 too
    for name, array in tree.items():
        assert_close(name, after[name], array * factor, of_largest=1e-5)  # the norm's own rounding
    gradients, reference_norm = torch_ref.optim.clip_by_global_norm([torch.tensor(a) for a in tree.values()], limit)
    assert reference_norm.item() == pytest.approx(wanted, rel=1e-5)
    for name, gradient in zip(tree, gradients, strict=True):
        assert_close(name, gradient.numpy(), after[name], of_largest=1e-5)


def test_a_norm_below_the_limit_changes_nothing() -> None:
    tree = to_mlx({name: wave(shape, 2.0) for name, shape in SHAPES.items()})
    clipped, _ = clip_by_global_norm(tree, 1e3)
    assert all(mx.array_equal(clipped[name], tree[name]) for name in tree)


# -- the step ------------------------------------------------------------------------

CONFIG = CONFIGS["4:2 untied linear scaling, heads wider than D/H"]
Batches = list[list[tuple[mx.array, mx.array]]]


def trained(batches: Batches, adapted: bool, compiled: bool) -> tuple[list[float], dict[str, np.ndarray]]:
    """Losses and trained weights after one step for each entry of `batches`."""
    model = mlx_model(CONFIG, weights(CONFIG))
    if adapted:
        lora.attach_arrays(model, to_mlx(adapter(CONFIG, rank=2)), scale=2.0)
    rates = [3e-4] * len(batches)
    losses = train_steps(model, batches, rates, max_grad_norm=0.5, compiled=compiled)
    return losses, from_mlx(flatten(model.trainable_parameters()))


def step_batches(number: int) -> list[tuple[mx.array, mx.array]]:
    """Three microbatches of one shape whose masks hold very different numbers of tokens."""
    tokens, mask = windows(CONFIG, 6, 11, phase=number)
    mask[2:4] *= np.arange(11) < 2
    mask[4] = 1.0
    return [(mx.array(tokens[i : i + 2]), mx.array(mask[i : i + 2])) for i in (0, 2, 4)]


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "LoRA"])
def test_microbatches_of_unequal_masks_are_one_big_batch(adapted: bool) -> None:
    many = [step_batches(number) for number in range(5)]
    one = [[(mx.concatenate([t for t, _ in step]), mx.concatenate([m for _, m in step]))] for step in many]
    counts = [m.sum().item() for _, m in many[0]]
    assert max(counts) > 3 * min(counts), "equal counts would not show a mean of means"
    losses, arrays = trained(many, adapted, compiled=False)
    expected_losses, expected = trained(one, adapted, compiled=False)
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    # Seen: 6e-8, an ulp of weights near 1. Means of means, mlx-lm's way, end 2e-3 apart.
    assert_all_close("weight", arrays, expected, atol=3e-6)


@pytest.mark.skipif(not can_compile(), reason="mx.compile needs a C++ compiler here")
@pytest.mark.parametrize("adapted", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize("microbatches", [1, 3])
def test_the_compiled_step_is_the_eager_one(adapted: bool, microbatches: int) -> None:
    batches = [step_batches(number)[:microbatches] for number in range(4)]
    losses, arrays = trained(batches, adapted, compiled=True)
    expected_losses, expected = trained(batches, adapted, compiled=False)
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert_all_close("weight", arrays, expected, atol=3e-6)  # fused kernels may round differently
