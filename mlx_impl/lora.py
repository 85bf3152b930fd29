"""LoRA (Hu et al. 2021): a frozen linear layer, quantised or not, plus a trained product of two thin matrices.

An adapter is a mapping of arrays under mlx-lm's names, `<path>.lora_a` (in, r) and `<path>.lora_b` (r, out), and a
scale. Attaching swaps modules and never touches the base arrays, so detaching gives the very same base back.
Adapter arrays are float32 whatever the base's dtype.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_impl.arrays import Arrays
from mlx_impl.base import BaseModel, linear_paths
from mlx_impl.config import LORA_TARGETS
from mlx_impl.errors import DamagedFileError, InputError
from mlx_impl.quantised import LINEAR, dense_weight, linear_shape


@dataclass(frozen=True)
class LoRAConfig:
    """Shape of an adapter; `scale` is alpha / rank."""

    rank: int = 14
    alpha: float = 28.0
    dropout: float = 0.0
    targets: tuple[str, ...] = LORA_TARGETS

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"LoRA rank = {self.rank} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise InputError(f"LoRA dropout = {self.dropout} must lie in [0, 1)")

    @property
    def scale(self) -> float:
        """Factor of the low-rank product."""
        return self.alpha / self.rank


class LoRALinear(nn.Module):
    """y = linear(x) + scale * (dropout(x) @ lora_a) @ lora_b. Zero lora_b makes it the linear layer itself."""

    def __init__(
        self, linear: nn.Module, lora_a: mx.array, lora_b: mx.array, scale: float, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.linear = linear
        self.lora_a = lora_a  # (in, r)
        self.lora_b = lora_b  # (r, out)
        self.dropout = nn.Dropout(dropout)
        self.scale, self.rate = scale, dropout
        self.train(linear.training)  # a new module is in training mode, and would drop out in an eval model

    @classmethod
    def from_base(cls, linear: nn.Module, config: LoRAConfig, key: mx.array) -> "LoRALinear":
        """A fresh adapter: lora_a uniform in +-1/sqrt(in) from `key` (as in mlx-lm), lora_b zero."""
        width_out, width_in = linear_shape(linear)
        bound = 1 / math.sqrt(width_in)
        lora_a = mx.random.uniform(-bound, bound, (width_in, config.rank), key=key)
        return cls(linear, lora_a, mx.zeros((config.rank, width_out)), config.scale, config.dropout)

    def __call__(self, x: mx.array) -> mx.array:
        """(..., in) -> (..., out) in x's dtype; the low-rank product is computed in float32."""
        thin = self.dropout(x) @ self.lora_a  # float32, because lora_a is
        lora_b = self.scale * self.lora_b  # as addmm's alpha it would multiply all of the gradient, twice
        if x.dtype == mx.float32:
            return mx.addmm(self.linear(x), thin, lora_b)
        return self.linear(x) + (thin @ lora_b).astype(x.dtype)

    def fuse(self) -> nn.Linear:
        """A new linear layer with the product added to a copy of the weights; the sum is taken in float32.

        Of a quantised layer the copy is unpacked and stays so, in float32: packed again it would lose of the product.
        """
        width_out, width_in = linear_shape(self.linear)
        delta = self.scale * (self.lora_a @ self.lora_b).T  # (out, in)
        fused = nn.Linear(width_in, width_out, bias="bias" in self.linear)
        fused.weight = dense_weight(self.linear) + delta
        if isinstance(self.linear, nn.Linear):
            fused.weight = fused.weight.astype(self.linear.weight.dtype)
        if "bias" in self.linear:
            fused.bias = self.linear.bias
        fused.freeze()  # like every other weight of an adapted model
        return fused


def attach(model: BaseModel, config: LoRAConfig, key: mx.array) -> list[str]:
    """Put a fresh adapter on every target; only its arrays stay trainable. Returns the paths.

    `key` (see mx.random.key) alone decides the initial lora_a. An adapter already attached is detached first.
    InputError for a rank above that of every target.
    """
    detach(model)
    paths = linear_paths(model, config.targets)
    modules: dict[str, Any] = dict(model.named_modules())
    highest = max(min(linear_shape(modules[path])) for path in paths)
    if config.rank > highest:
        raise InputError(f"rank = {config.rank} is more than any layer can use: at most {highest} (--rank)")
    keys = mx.random.split(key, len(paths))
    swapped = [(p, LoRALinear.from_base(modules[p], config, k)) for p, k in zip(paths, keys, strict=True)]
    _swap(model, swapped)
    return paths


def attach_arrays(model: BaseModel, arrays: Mapping[str, mx.array], scale: float, dropout: float = 0.0) -> None:
    """Put an existing adapter on the model, replacing the attached one. Arrays are cast to float32.

    An adapter of the same layers changes places with the attached one in a few milliseconds. Raises DamagedFileError
    listing every array that fits no layer, has no partner or has the wrong shape; the model is then left bare.
    """
    if _exchange(lora_layers(model), arrays, scale, dropout):
        return
    detach(model)
    modules: dict[str, Any] = dict(model.named_modules())
    paths = list(dict.fromkeys(name.rpartition(".")[0] for name in arrays))
    wrong = [f"{name} is neither lora_a nor lora_b" for name in arrays if not name.endswith((".lora_a", ".lora_b"))]
    wrong += [problem for path in paths for problem in _misfits(path, modules.get(path), arrays)]
    if wrong or not paths:
        raise DamagedFileError(f"the adapter does not fit the model: {'; '.join(wrong) or 'it holds no arrays'}")
    swapped = []
    for path in paths:
        a, b = (_float32(arrays[f"{path}.{name}"]) for name in ("lora_a", "lora_b"))
        swapped.append((path, LoRALinear(modules[path], a, b, scale, dropout)))
    _swap(model, swapped)


def detach(model: BaseModel) -> list[tuple[str, LoRALinear]]:
    """Take the adapter off, and return its layers; the base's modules and arrays are those from before, untouched."""
    layers = lora_layers(model)
    _place(model, [(path, layer.linear) for path, layer in layers])
    return layers


def put_back(model: BaseModel, layers: list[tuple[str, LoRALinear]]) -> None:
    """Attach layers that `detach` took off this model, as they were; making new ones takes ten times as long."""
    _place(model, layers)


@contextlib.contextmanager
def bare(model: BaseModel) -> Iterator[None]:
    """The base without its adapter for the block; afterwards the same adapter is attached again."""
    layers = detach(model)
    try:
        yield
    finally:
        put_back(model, layers)


def fuse(model: BaseModel) -> None:
    """Replace every adapted layer by its fused copy. The base's own arrays are not changed, only left."""
    _place(model, [(path, module.fuse()) for path, module in lora_layers(model)])


def lora_layers(model: BaseModel) -> list[tuple[str, LoRALinear]]:
    """The adapted layers with their paths."""
    if isinstance(model, nn.Module):
        return list(_adapted(model, ""))
    return [(path, module) for path, module in model.named_modules() if isinstance(module, LoRALinear)]


def _adapted(tree: Any, path: str) -> Iterator[tuple[str, LoRALinear]]:
    """The adapted layers below a module, a tenth of the time of going through named_modules."""
    for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(value, LoRALinear):
            yield f"{path}{name}", value
        elif isinstance(value, dict | list):
            yield from _adapted(value, f"{path}{name}.")


def _exchange(
    layers: list[tuple[str, LoRALinear]], arrays: Mapping[str, mx.array], scale: float, dropout: float
) -> bool:
    """Give attached layers other arrays and another scale, where they are of the same layers; else change nothing."""
    if not layers or len(arrays) != 2 * len(layers):
        return False
    changed = []
    for path, layer in layers:
        a, b = arrays.get(f"{path}.lora_a"), arrays.get(f"{path}.lora_b")
        if a is None or b is None or layer.rate != dropout:
            return False
        if a.shape != layer["lora_a"].shape or b.shape != layer["lora_b"].shape:
            return False
        changed.append((layer, _float32(a), _float32(b)))
    for layer, a, b in changed:
        layer["lora_a"], layer["lora_b"], layer.scale = a, b, scale
    return True


def adapter_arrays(model: BaseModel) -> Arrays:
    """The attached adapter as a flat mapping, sorted by name; empty if there is none."""
    arrays = {}
    for path, module in lora_layers(model):
        arrays[f"{path}.lora_a"], arrays[f"{path}.lora_b"] = module.lora_a, module.lora_b
    return dict(sorted(arrays.items()))


def num_parameters(arrays: Mapping[str, mx.array]) -> int:
    """Number of weights in an adapter."""
    return sum(array.size for array in arrays.values())


def _swap(model: BaseModel, layers: list[tuple[str, LoRALinear]]) -> None:
    model.freeze()
    _place(model, layers)
    for _, layer in layers:
        layer.unfreeze(keys=["lora_a", "lora_b"], recurse=False)


def _place(model: BaseModel, layers: Sequence[tuple[str, nn.Module]]) -> None:
    """Put modules in the places of others, by path; `update_modules` takes five times as long."""
    if not isinstance(model, nn.Module):
        if layers:
            model.update_modules(tree_unflatten(list(layers)))
        return
    for path, layer in layers:
        *parents, name = path.split(".")
        place: Any = model
        for parent in parents:
            place = place[int(parent) if isinstance(place, list) else parent]
        place[int(name) if isinstance(place, list) else name] = layer


def _float32(array: mx.array) -> mx.array:
    """The very same array where it is float32 already, so that an adapter put back on is known as the same."""
    return array if array.dtype == mx.float32 else array.astype(mx.float32)


def _misfits(path: str, module: Any, arrays: Mapping[str, mx.array]) -> list[str]:
    if not isinstance(module, LINEAR):
        return [f"{path} is no linear layer of it"]
    width_out, width_in = linear_shape(module)
    a, b = arrays.get(f"{path}.lora_a"), arrays.get(f"{path}.lora_b")
    if a is None or b is None:
        return [f"{path} lacks {'lora_a' if a is None else 'lora_b'}"]
    if a.ndim != 2 or b.ndim != 2 or (a.shape[0], b.shape[1]) != (width_in, width_out) or a.shape[1] != b.shape[0]:
        return [f"{path}: lora_a {list(a.shape)} and lora_b {list(b.shape)} on a layer {width_in} -> {width_out}"]
    return []
