"""minimac-mlx: a language model that keeps learning, in MLX.

Importing this package sees to it that a fast BLAS is loaded on Linux before MLX is, and does nothing else; MLX
comes with the first public name that needs it (PEP 562), so that `minimac-mlx --help` stays quick.
"""

import importlib
from typing import Any

from mlx_impl.blas import load_with_mlx

load_with_mlx()

_PUBLIC = {
    "BPETokenizer": "tokenizer",
    "Budget": "config",
    "ContinualLLM": "model",
    "ContinualLearner": "learner",
    "ContinualLearningConfig": "config",
    "ModelConfig": "config",
    "PRESETS": "config",
    "Tokenizer": "tokenizer",
    "TrainConfig": "config",
}

__all__ = [
    "PRESETS",
    "BPETokenizer",
    "Budget",
    "ContinualLLM",
    "ContinualLearner",
    "ContinualLearningConfig",
    "ModelConfig",
    "Tokenizer",
    "TrainConfig",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
