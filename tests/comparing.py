"""What parity tests share: weights without a random generator, both models side by side, and good failures.

Arrays cross between the two libraries as numpy float32 under Hugging Face's names. A failure names the tensor, the
worst index and both values; `first_divergence` finds the module in which two forward passes part.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn
import numpy as np
import torch
from mlx.utils import tree_flatten

import mlx_impl.loss
import mlx_impl.model
import torch_ref.loss
import torch_ref.model
from mlx_impl.config import LORA_TARGETS, ModelConfig
from mlx_impl.modeldir import expected_shapes

Arrays = dict[str, np.ndarray]

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""With theta 500000 and heads 8 wide it keeps two frequencies, blends one and stretches one: all three cases."""

CONFIGS = {
    "1:1 tied": ModelConfig(61, 32, 2, 4, 4, 48, 64),
    "3:1 untied biases theta 500000": ModelConfig(
        67, 36, 3, 3, 1, 40, 64, 1e-5, 500000.0, False, attention_bias=True, mlp_bias=True
    ),
    "12:3 tied llama3": ModelConfig(61, 96, 2, 12, 3, 56, 2**17, rope_base=500000.0, rope_scaling=LLAMA3),
    "4:2 untied linear scaling, heads wider than D/H": ModelConfig(
        53, 32, 2, 4, 2, 48, 64, tie_embeddings=False, head_dim=14,
        rope_scaling={"rope_type": "linear", "factor": 4.0},
    ),
}  # fmt: skip


# -- numbers without a generator -----------------------------------------------------


def wave(shape: tuple[int, ...], phase: float) -> np.ndarray:
    """sin of a quadratic in the index: float32, root mean square 1/sqrt(2), and of full rank.

    A linear phase would make every matrix a rank-2 one, in which many mistakes do not show.
    """
    index = np.arange(int(np.prod(shape)), dtype=np.float64)
    return np.sin(0.6180339887 * index * index + phase).astype(np.float32).reshape(shape)


def weights(config: ModelConfig) -> Arrays:
    """Weights of a model by formula, scaled so that activations and logits have about unit size."""
    arrays = {}
    for number, (name, shape) in enumerate(expected_shapes(config).items()):
        ones = float(name.endswith("norm.weight"))
        scale = np.sqrt(2 / shape[1]) if len(shape) == 2 else 0.2
        arrays[name] = (ones + scale * wave(shape, number)).astype(np.float32)
    return arrays


def adapter(config: ModelConfig, rank: int) -> Arrays:
    """An adapter on every projection by formula, with both factors far from zero."""
    arrays = {}
    shapes = [(n, s) for n, s in expected_shapes(config).items() if n.split(".")[-2] in LORA_TARGETS]
    for number, (name, shape) in enumerate(s for s in shapes if s[0].endswith("weight")):
        path = name.removesuffix(".weight")
        arrays[f"{path}.lora_a"] = wave((shape[1], rank), 100 + number) * np.float32(np.sqrt(2 / shape[1]))
        arrays[f"{path}.lora_b"] = wave((rank, shape[0]), 200 + number) * np.float32(np.sqrt(0.1 / rank))
    return arrays


def windows(config: ModelConfig, batch: int, length: int, phase: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Windows of int64 tokens (B, T+1) that follow a rule, and a float32 mask (B, T) that leaves some targets out.

    The next token is the last one's double plus a small wave, so that there is something to learn.
    """
    tokens = np.zeros((batch, length + 1), dtype=np.int64)
    tokens[:, 0] = np.arange(batch) * 7 + phase
    for t in range(length):
        tokens[:, t + 1] = 2 * tokens[:, t] + 1 + (t + phase) % 3
        tokens %= config.vocab_size
    mask = (np.arange(batch * length).reshape(batch, length) % 5 != 3).astype(np.float32)
    return tokens, mask


# -- both models ---------------------------------------------------------------------


def mlx_model(config: ModelConfig, arrays: Arrays) -> mlx_impl.model.ContinualLLM:
    """The MLX model with these weights."""
    model = mlx_impl.model.ContinualLLM(config)
    model.load_weights([(name, mx.array(array)) for name, array in arrays.items()])
    return model


def torch_model(config: ModelConfig, arrays: Arrays) -> torch_ref.model.ContinualLLM:
    """The torch model with these weights."""
    model = torch_ref.model.ContinualLLM(config)
    model.load_state_dict(to_torch(arrays))
    return model


def to_mlx(arrays: Arrays) -> dict[str, mx.array]:
    """The same arrays in MLX."""
    return {name: mx.array(array) for name, array in arrays.items()}


def to_torch(arrays: Arrays) -> dict[str, torch.Tensor]:
    """The same arrays in torch, copied."""
    return {name: torch.tensor(array) for name, array in arrays.items()}


def from_mlx(tree: Any) -> Arrays:
    """A tree of MLX arrays as flat numpy arrays."""
    return {name: np.array(array) for name, array in tree_flatten(tree)}


def from_torch(arrays: Mapping[str, torch.Tensor]) -> Arrays:
    """Named torch tensors as numpy arrays, copied."""
    return {name: array.detach().numpy().copy() for name, array in arrays.items()}


def mlx_loss_gradients(model: Any, tokens: np.ndarray, mask: np.ndarray) -> tuple[float, Arrays]:
    """Summed next-token loss of an MLX model and its gradients."""
    t, m = mx.array(tokens), mx.array(mask)
    value_and_grad = mlx.nn.value_and_grad(model, lambda: mlx_impl.loss.next_token_loss(model, t, m)[0])
    loss, gradients = value_and_grad()
    mx.eval(loss, gradients)  # together: one by one, each would keep the others' activations alive
    return loss.item(), from_mlx(gradients)


def torch_loss_gradients(model: torch.nn.Module, tokens: np.ndarray, mask: np.ndarray) -> tuple[float, Arrays]:
    """Summed next-token loss of a torch model and its gradients."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss, _ = torch_ref.loss.next_token_loss(model, torch.tensor(tokens), torch.tensor(mask))
    gradients = torch.autograd.grad(loss, list(trained.values()))
    return loss.item(), from_torch(dict(zip(trained, gradients, strict=True)))


# -- comparisons ---------------------------------------------------------------------


def assert_close(what: str, actual: Any, expected: Any, atol: float = 0.0, of_largest: float = 0.0) -> float:
    """Compare whole arrays; returns the largest difference.

    The bound is `atol` plus `of_largest` times the largest expected magnitude: what rounding does to sums is
    proportional to their terms and not to how far they cancel.
    """
    a, b = np.asarray(actual, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    assert a.shape == b.shape, f"{what}: shape {a.shape}, expected {b.shape}"
    assert np.isfinite(b).all(), f"{what}: the expected array is not finite"
    difference = np.abs(a - b)
    bound = atol + of_largest * np.abs(b).max(initial=0.0)
    worst = tuple(int(i) for i in np.unravel_index(np.argmax(np.nan_to_num(difference, nan=np.inf)), a.shape))
    assert (difference <= bound).all(), (
        f"{what}: worst at {list(worst)}: {a[worst]:.9g}, expected {b[worst]:.9g}, "
        f"{difference[worst]:.3g} apart, at most {bound:.3g}"
    )
    return float(difference[worst])


def assert_all_close(what: str, actual: Arrays, expected: Arrays, atol: float = 0.0, of_largest: float = 0.0) -> None:
    """Compare two sets of arrays of the same names; a tensor of zeros would prove nothing and fails."""
    assert sorted(actual) == sorted(expected), f"{what}: {sorted(set(actual) ^ set(expected))} in one only"
    for name, array in expected.items():
        assert np.abs(array).max() > 0, f"{what} of {name}: all zero"
        assert_close(f"{what} of {name}", actual[name], array, atol, of_largest)


def assert_logits_close(ours: Any, reference: torch.nn.Module, tokens: np.ndarray, atol: float) -> None:
    """Compare the logits of an MLX and a torch model; on failure name the first module where they part."""
    with torch.no_grad():
        expected = reference(torch.tensor(tokens)).numpy()
    actual = np.array(ours(mx.array(tokens)))
    try:
        assert_close("logits", actual, expected, atol)
    except AssertionError as error:
        raise AssertionError(f"{error}; first: {first_divergence(ours, reference, tokens, atol)}") from None


def first_divergence(ours: Any, reference: torch.nn.Module, tokens: np.ndarray, atol: float) -> str:
    """The first module, in order of execution, whose outputs differ by more than `atol`, and where most."""
    with _traced_torch(reference) as expected, torch.no_grad():
        reference(torch.tensor(tokens))
    with _traced_mlx(ours) as actual:
        ours(mx.array(tokens))
    for path in [path for path in expected if path in actual]:
        try:
            assert_close(path or "the model", actual[path], expected[path], atol)
        except AssertionError as error:
            return str(error)
    return "no module differs"


@contextmanager
def _traced_torch(model: torch.nn.Module) -> Iterator[Arrays]:
    outputs: Arrays = {}

    def record(path: str) -> Callable:
        return lambda module, inputs, output: outputs.update({path: output.detach().numpy()})

    handles = [module.register_forward_hook(record(path)) for path, module in model.named_modules()]
    yield outputs
    for handle in handles:
        handle.remove()


@contextmanager
def _traced_mlx(model: Any) -> Iterator[Arrays]:
    """MLX has no hooks: the classes' `__call__` is replaced while the block runs."""
    outputs: Arrays = {}
    paths = {id(module): path for path, module in model.named_modules()}
    classes = {type(module) for _, module in model.named_modules() if callable(module)}
    originals = {cls: cls.__call__ for cls in classes}

    def recording(original: Callable) -> Callable:
        def call(module: Any, *args: Any, **kwargs: Any) -> Any:
            output = original(module, *args, **kwargs)
            if id(module) in paths:
                outputs[paths[id(module)]] = np.array(output)
            return output

        return call

    for cls, original in originals.items():
        cls.__call__ = recording(original)
    try:
        yield outputs
    finally:
        for cls, original in originals.items():
            cls.__call__ = original
