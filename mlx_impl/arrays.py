"""Trees of arrays and flat mappings of them, with the types that MLX's own functions leave open."""

import hashlib
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_impl.errors import DamagedFileError

Tree = Any
Arrays = dict[str, mx.array]


def flatten(tree: Tree) -> Arrays:
    """A tree's arrays under their dotted names, in the tree's order."""
    flat = tree_flatten(tree)
    assert isinstance(flat, list)
    return {str(name): array for name, array in flat}


def unflatten(arrays: Arrays) -> Tree:
    """The tree of which `arrays` is the flat form."""
    return tree_unflatten(list(arrays.items()))


def load(path: Path) -> Arrays:
    """The arrays of a safetensors file, read on first use. Check files from outside first (see `modeldir`)."""
    arrays = mx.load(str(path))
    assert isinstance(arrays, dict)
    return arrays


def digest_of(arrays: Arrays) -> str:
    """Sha256 of the arrays with their names, shapes and types, whatever their order."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.shape} {array.dtype}\n".encode())
        digest.update(np.array(mx.view(array.reshape(-1), mx.uint8)).data)
    return digest.hexdigest()


def check_finite(arrays: Arrays, where: str) -> None:
    """DamagedFileError naming arrays with a NaN or an infinity, ten at most; computes all of them."""
    bad = [name for name, array in arrays.items() if not mx.isfinite(array).all().item()]
    if bad:
        raise DamagedFileError(f"{where}: not all values are finite in {', '.join(bad[:10])}")
