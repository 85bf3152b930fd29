"""What everything else asks of a base model, and how its linear layers are found by name.

`BaseModel` is a structural type: our `ContinualLLM` has it by construction. LoRA, the steps of a lesson, the Fisher and
generation see a model only through it. Pretraining and the learner still take our own class, for its configuration.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from mlx_impl.cache import Cache
from mlx_impl.errors import InputError


class BaseModel(Protocol):
    """A causal language model. It is also an `nn.Module`: parameters(), update(), freeze(), train(), eval()."""

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

    def train(self, mode: bool = True) -> Any:
        """Switch dropout on, or with False off."""


def linear_paths(model: BaseModel, targets: Sequence[str]) -> list[str]:
    """Dotted paths of the linear layers whose last name is in `targets`, in the model's order.

    Raises InputError naming the targets that the model does not have.
    """
    paths = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path.rpartition(".")[2] in targets
    ]
    missing = sorted(set(targets) - {path.rpartition(".")[2] for path in paths})
    if missing:
        raise InputError(f"the model has no linear layer called {', '.join(missing)}")
    return sorted(paths, key=_natural)


def _natural(path: str) -> list[tuple[int, str]]:
    """Sort key under which layer 10 comes after layer 2."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]
