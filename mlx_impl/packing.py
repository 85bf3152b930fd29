"""MLX's quantised weights as settings and shapes: what config.json says of them, and what the files must then hold.

Affine quantisation keeps a matrix `<path>.weight` (out, in) as three: `.weight` (out, in * bits / 32) uint32, and
`.scales` and `.biases`, (out, in / group_size) each. A layer is quantised where the file has its scales, as mlx-lm
takes it. Reading needs no MLX; packing is MLX's own (see `quantised`).
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from mlx_impl.errors import DamagedFileError, InputError

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
KEYS = ("quantization", "quantization_config")

Shape = tuple[int, ...]


class Packing(NamedTuple):
    """`bits` a weight, and how many neighbours in a row share a scale and a bias."""

    bits: int
    group_size: int = 64

    def as_config(self) -> dict[str, Any]:
        """As mlx-lm writes it."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": "affine"}


@dataclass(frozen=True)
class Quantization:
    """How a model's matrices are packed: all alike but for those named."""

    default: Packing
    layers: Mapping[str, Packing] = field(default_factory=dict)

    def of(self, path: str) -> Packing:
        """The packing of the layer at a dotted path."""
        return self.layers.get(path, self.default)


def read_quantization(config: Mapping[str, Any], where: str) -> Quantization | None:
    """What a config.json says; None where the weights are not quantised.

    Raises InputError for other kinds than MLX's affine one, DamagedFileError for what makes no sense.
    """
    described = config.get("quantization")
    if described is None:
        other = config.get("quantization_config")
        if other is None:
            return None
        method = other.get("quant_method") if isinstance(other, dict) else other
        raise InputError(f"{where}: the weights are quantised by {method!r:.60}; only MLX's own kind is read")
    if not isinstance(described, dict):
        raise DamagedFileError(f"{where}: quantization is no object")
    layers = {path: _packing(value, f"{where}, {path}") for path, value in described.items() if isinstance(value, dict)}
    return Quantization(_packing(described, where), layers)


def _packing(described: Mapping[str, Any], where: str) -> Packing:
    mode = described.get("mode", "affine")
    if mode != "affine":
        raise InputError(f"{where}: quantization mode {mode!r:.60}; only affine is read here")
    bits, group_size = described.get("bits"), described.get("group_size")
    if type(bits) is not int or type(group_size) is not int or bits not in BITS or group_size not in GROUP_SIZES:
        raise DamagedFileError(
            f"{where}: {bits!r:.60} bits in groups of {group_size!r:.60}; there are {', '.join(map(str, BITS))} bits "
            f"in groups of {', '.join(map(str, GROUP_SIZES))}"
        )
    return Packing(bits, group_size)


def packed_shapes(
    shapes: Mapping[str, Shape], quantization: Quantization, there: Container[str], where: str
) -> dict[str, Shape]:
    """The shapes (see `modeldir.expected_shapes`) that files have whose layers with scales in `there` are packed.

    Raises DamagedFileError for a row that its groups do not divide.
    """
    result: dict[str, Shape] = {}
    for name, shape in shapes.items():
        path = name.removesuffix(".weight")
        if len(shape) != 2 or path == name or f"{path}.scales" not in there:
            result[name] = shape
            continue
        rows, width = shape
        packing = quantization.of(path)
        if width % packing.group_size:
            raise DamagedFileError(f"{where}: {name} has rows of {width}, no multiple of {packing.group_size}")
        result[name] = (rows, width * packing.bits // 32)
        result[f"{path}.scales"] = result[f"{path}.biases"] = (rows, width // packing.group_size)
    return result


def dense_shape(path: str, packed: Shape, beside: Sequence[Shape | None], packing: Packing, where: str) -> Shape:
    """The shape that a packed matrix, or a stack of them, stands for; `beside` are those of its scales and biases.

    None in there means that the file has none. Raises DamagedFileError where they do not belong together.
    """
    *rows, stored = packed
    width = stored * 32 // packing.bits
    wanted = (*rows, width // packing.group_size)
    if len(packed) < 2 or width % packing.group_size or stored * 32 % packing.bits or set(beside) != {wanted}:
        there = " and ".join("none" if shape is None else str(list(shape)) for shape in beside)
        raise DamagedFileError(
            f"{where}: {path}.weight {list(packed)} of {packing.bits} bits in groups of {packing.group_size} "
            f"has scales and biases {there}"
        )
    return (*rows, width)


def unpack(weight: np.ndarray, scales: np.ndarray, biases: np.ndarray, bits: int) -> np.ndarray:
    """The float32 matrix (..., out, in) of a packed one: code * scale + bias, codes being a row's bits in their order.

    Scales and biases of 16 bits are widened first: MLX dequantises to float32 in float32.
    """
    stream = np.unpackbits(weight.astype("<u4").view(np.uint8), axis=-1, bitorder="little")
    codes = np.packbits(stream.reshape(*scales.shape, -1, bits), axis=-1, bitorder="little")[..., 0]
    scales, biases = (array.astype(np.float32)[..., None] for array in (scales, biases))
    return (codes * scales + biases).reshape(*weight.shape[:-1], -1)
