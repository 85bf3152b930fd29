"""LoRA (Hu et al. 2021) again, in PyTorch, under the same names and shapes as `mlx_impl.lora`.

An adapter is a mapping `<path>.lora_a` (in, r), `<path>.lora_b` (r, out), and a scale: mlx-lm's layout, not
PEFT's. Attaching swaps modules, freezes everything else and never writes to the base's tensors.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mlx_impl.config import LORA_TARGETS
from mlx_impl.errors import DamagedFileError, InputError

Arrays = dict[str, Tensor]


@dataclass(frozen=True)
class LoRAConfig:
    """Shape of an adapter; `scale` is alpha / rank. A copy, because the MLX twin's file imports MLX."""

    rank: int = 14
    alpha: float = 28.0
    dropout: float = 0.0
    targets: tuple[str, ...] = LORA_TARGETS

    @property
    def scale(self) -> float:
        """Factor of the low-rank product."""
        return self.alpha / self.rank


class LoRALinear(nn.Module):
    """y = linear(x) + scale * (dropout(x) @ lora_a) @ lora_b. Zero lora_b makes it the linear layer."""

    def __init__(self, linear: nn.Linear, lora_a: Tensor, lora_b: Tensor, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear = linear
        self.lora_a = nn.Parameter(lora_a)  # (in, r)
        self.lora_b = nn.Parameter(lora_b)  # (r, out)
        self.dropout = nn.Dropout(dropout)
        self.scale = scale
        self.train(linear.training)

    @classmethod
    def from_base(cls, linear: nn.Linear, config: LoRAConfig, generator: torch.Generator) -> "LoRALinear":
        """A fresh adapter: lora_a uniform in +-1/sqrt(in) from `generator`, lora_b zero."""
        bound = 1 / math.sqrt(linear.in_features)
        lora_a = torch.empty(linear.in_features, config.rank).uniform_(-bound, bound, generator=generator)
        return cls(linear, lora_a, torch.zeros(config.rank, linear.out_features), config.scale, config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in x's dtype; the low-rank product is computed in float32."""
        low_rank = (self.dropout(x).float() @ self.lora_a) @ self.lora_b
        return self.linear(x) + (self.scale * low_rank).to(x.dtype)

    @torch.no_grad()
    def fuse(self) -> nn.Linear:
        """A new linear layer with the product added to a copy of the weights; the sum is taken in float32."""
        base = self.linear
        fused = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, dtype=base.weight.dtype)
        fused.weight.copy_(base.weight.float() + self.scale * (self.lora_a @ self.lora_b).T)
        if base.bias is not None:
            fused.bias.copy_(base.bias)
        return fused.requires_grad_(False)


def attach(model: nn.Module, config: LoRAConfig, generator: torch.Generator) -> list[str]:
    """Put a fresh adapter on every target; only its arrays stay trainable. Returns the paths.

    An adapter already attached is detached first. Raises InputError naming the targets that the model does
    not have.
    """
    detach(model)
    linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    missing = set(config.targets) - {path.rpartition(".")[2] for path in linears}
    if missing:
        raise InputError(f"the model has no linear layer called {', '.join(sorted(missing))}")
    paths = [path for path in linears if path.rpartition(".")[2] in config.targets]
    model.requires_grad_(False)
    for path in paths:
        model.set_submodule(path, LoRALinear.from_base(linears[path], config, generator))
    return paths


def attach_arrays(model: nn.Module, arrays: Mapping[str, Tensor], scale: float, dropout: float = 0.0) -> None:
    """Put an existing adapter on the model, replacing the attached one; its arrays are copied as float32.

    Raises DamagedFileError listing every array that fits no layer, has no partner or has the wrong shape.
    """
    detach(model)
    modules = dict(model.named_modules())
    paths = list(dict.fromkeys(name.rpartition(".")[0] for name in arrays))
    wrong = [f"{name} is neither lora_a nor lora_b" for name in arrays if not name.endswith((".lora_a", ".lora_b"))]
    wrong += [problem for path in paths for problem in _misfits(path, modules.get(path), arrays)]
    if wrong or not paths:
        raise DamagedFileError(f"the adapter does not fit the model: {'; '.join(wrong) or 'it holds no arrays'}")
    model.requires_grad_(False)
    for path in paths:
        a, b = (arrays[f"{path}.{name}"].to(torch.float32, copy=True) for name in ("lora_a", "lora_b"))
        linear = modules[path]
        assert isinstance(linear, nn.Linear)
        model.set_submodule(path, LoRALinear(linear, a, b, scale, dropout))


def detach(model: nn.Module) -> None:
    """Take the adapter off; the base's modules and tensors are those from before. They stay frozen."""
    for path, layer in lora_layers(model):
        model.set_submodule(path, layer.linear)


def fuse(model: nn.Module) -> None:
    """Replace every adapted layer by its fused copy. The base's own tensors are not changed, only left."""
    for path, layer in lora_layers(model):
        model.set_submodule(path, layer.fuse())


def lora_layers(model: nn.Module) -> list[tuple[str, LoRALinear]]:
    """The adapted layers with their paths."""
    return [(path, module) for path, module in model.named_modules() if isinstance(module, LoRALinear)]


def adapter_arrays(model: nn.Module) -> Arrays:
    """The attached adapter as a flat mapping, sorted by name; empty if there is none."""
    arrays: Arrays = {}
    for path, layer in lora_layers(model):
        arrays |= {f"{path}.lora_a": layer.lora_a, f"{path}.lora_b": layer.lora_b}
    return dict(sorted(arrays.items()))


def num_parameters(arrays: Mapping[str, Tensor]) -> int:
    """Number of weights in an adapter."""
    return sum(array.numel() for array in arrays.values())


def _misfits(path: str, module: nn.Module | None, arrays: Mapping[str, Tensor]) -> list[str]:
    if not isinstance(module, nn.Linear):
        return [f"{path} is no linear layer of it"]
    a, b = arrays.get(f"{path}.lora_a"), arrays.get(f"{path}.lora_b")
    if a is None or b is None:
        return [f"{path} lacks {'lora_a' if a is None else 'lora_b'}"]
    width_in, width_out = module.in_features, module.out_features
    if a.ndim != 2 or b.ndim != 2 or (a.shape[0], b.shape[1]) != (width_in, width_out) or a.shape[1] != b.shape[0]:
        return [f"{path}: lora_a {list(a.shape)} and lora_b {list(b.shape)} on a layer {width_in} -> {width_out}"]
    return []
