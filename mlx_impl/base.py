"""What everything else asks of a base model, and how its linear layers are found by name.

`BaseModel` is a structural type: our `ContinualLLM` has it by construction, and `ForeignLLM` gives it to what mlx-lm
opens. LoRA, lessons, the Fisher, generation and evaluation see a model only through it. Pretraining takes our own.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from mlx_impl.cache import Cache
from mlx_impl.config import LORA_TARGETS
from mlx_impl.errors import InputError
from mlx_impl.memory import Shape
from mlx_impl.quantised import LINEAR


class BaseModel(Protocol):
    """A causal language model. It is also an `nn.Module`: parameters(), update(), freeze(), train(), eval()."""

    @property
    def config(self) -> Shape:
        """Its sizes and its context."""

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The transformer layers, first to last."""

    @property
    def vocab_size(self) -> int:
        """Number of logits."""

    @property
    def head_weight(self) -> mx.array | None:
        """(V, D) where the logits are the product of hidden states and this matrix, else None."""

    def __call__(self, tokens: mx.array, cache: Sequence[Cache] | None = None) -> mx.array:
        """Logits (B, T, V) of tokens (B, T), after those in the cache."""

    def hidden(self, tokens: mx.array, cache: Sequence[Cache] | None = None) -> mx.array:
        """Final hidden states (B, T, D) of tokens (B, T)."""

    def head(self, hidden: mx.array) -> mx.array:
        """Logits (..., V) of hidden states (..., D)."""

    def make_cache(self, window: int | None = None) -> Sequence[Any]:
        """One cache a layer, growing or of a fixed window."""

    def parameters(self) -> dict:
        """Tree of all weights."""

    def trainable_parameters(self) -> dict:
        """Tree of the weights that are not frozen."""

    def named_modules(self) -> list[tuple[str, nn.Module]]:
        """Every module with its dotted path."""

    def update(self, parameters: dict, strict: bool = True) -> Any:
        """Replace weights by those of a tree of the same names."""

    def update_modules(self, modules: Any, strict: bool = True) -> Any:
        """Replace modules by those of a tree of the same names."""

    def freeze(self) -> Any:
        """Exclude every weight from training."""

    def unfreeze(self) -> Any:
        """Include every weight again."""

    def train(self, mode: bool = True) -> Any:
        """Switch dropout on, or with False off."""


def linear_paths(model: BaseModel, targets: Sequence[str]) -> list[str]:
    """Dotted paths of the linear layers inside the transformer layers whose last name is in `targets`, in their order.

    The default, LORA_TARGETS, means every linear layer where a model does not have all of these names: some fuse
    them, so that those they share would leave half of the layer out. What chooses a mixture's experts is then left as
    it is. Raises InputError naming targets that are not there and the names that are.
    """
    inside = {id(module) for layer in model.layers for _, module in layer.named_modules()}
    paths = [path for path, module in model.named_modules() if isinstance(module, LINEAR) and id(module) in inside]
    names = {path.rpartition(".")[2] for path in paths}
    if set(targets) == set(LORA_TARGETS) and not names >= set(targets):
        gates = _gates(model)
        paths = [path for path in paths if path not in gates]
        targets = list({path.rpartition(".")[2] for path in paths})
    missing = sorted(set(targets) - names)
    if missing:
        there = ", ".join(sorted(names))
        raise InputError(f"the model has no linear layer called {', '.join(missing)}; it has {there}")
    return sorted((path for path in paths if path.rpartition(".")[2] in targets), key=_natural)


def _gates(model: BaseModel) -> set[str]:
    """Paths of what stands in a mixture beside its stacks of experts, which mlx-lm calls SwitchGLU and the like."""
    modules = dict(model.named_modules())
    stacked = {path.rpartition(".")[0] for path, module in modules.items() if type(module).__name__ in _STACKS}
    return {path for path in modules if path.rpartition(".")[0].removesuffix(".router") in stacked}


_STACKS = ("SwitchGLU", "SwitchMLP")


def _natural(path: str) -> list[tuple[int, str]]:
    """Sort key under which layer 10 comes after layer 2."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]
