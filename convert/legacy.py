"""The original project's .pt files, as plain values and numpy arrays: the one place that needs PyTorch.

A .pt file is a pickle in a zip archive. It is read with `weights_only=True` and nothing else, after the archive was
seen to be no larger inside than outside, and the pickle not to do what that still lets it: make arrays of a size that
it only names, and tuples that no time is enough to hash.
"""

import errno
import pickletools
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from mlx_impl.errors import DamagedFileError, InputError, printable

_MOST_IN_TUPLES = 1_000_000  # values; the sizes of a tensor are a few


def read_pt(path: Path) -> Any:
    """What a .pt file holds; its tensors are numpy arrays, of real numbers float32.

    They are looked for three dictionaries or lists deep. Raises DamagedFileError for what is no such file or holds
    anything but tensors and plain values, InputError where PyTorch is not installed.
    """
    torch = _torch(path)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            inside, outside = sum(entry.file_size for entry in entries), path.stat().st_size
            if inside > outside or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise DamagedFileError(
                    f"{path}: {inside:,} bytes packed into {outside:,}, but .pt files are not compressed"
                )
            pickles = [archive.read(entry) for entry in entries if entry.filename.endswith(".pkl")]
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (zipfile.BadZipFile, struct.error, EOFError, RuntimeError, OverflowError, ValueError) as error:
        raise DamagedFileError(f"{path}: no .pt file ({printable(str(error), 200)})") from None
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise DamagedFileError(f"{path}: no .pt file (a place before its beginning)") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escape sequences in texts, from the standard library
        for content in pickles:
            _check_pickle(content, path)
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises anything
        said = str(error).rpartition("WeightsUnpickler error: ")[2].strip().partition("\n")[0]  # not how to trust it
        raise DamagedFileError(
            f"{path}: not read as a .pt file of tensors ({type(error).__name__}: {printable(said, 200)})"
        ) from None
    return _plain(value, torch, path, outside)


def _check_pickle(content: bytes, path: Path) -> None:
    """DamagedFileError for a pickle that makes memory of a number alone, or tuples of far more values than it has.

    A tuple may stand in another many times and costs nothing, until it is hashed as a dictionary's key. So each counts
    here as the values in it, on a stack like the one that reading uses.
    """
    sizes: list[int] = []
    marks: list[int] = []
    memo: dict[Any, int] = {}
    try:
        for step, argument, _ in pickletools.genops(content):
            if step.name == "GLOBAL" and str(argument).endswith(("bytearray", "Tensor")):
                raise DamagedFileError(
                    f"{path}: makes a {printable(str(argument), 80)}, but only plain values are read"
                )
            if step.name == "MARK":
                marks.append(len(sizes))
                continue
            if step.name.endswith("PUT"):
                memo[argument] = sizes[-1]
                continue
            below, start = len(step.stack_before), len(sizes)
            if pickletools.markobject in step.stack_before:  # all that came since, and what stands before it
                below, start = step.stack_before.index(pickletools.markobject), marks.pop()
            values = 1 + sum(sizes[start - below :]) if "TUPLE" in step.name else 1
            if values > _MOST_IN_TUPLES:
                raise DamagedFileError(f"{path}: a tuple of {values:,} values, at most {_MOST_IN_TUPLES:,} are read")
            if step.name.endswith("GET"):
                values = memo.get(argument, 1)
            del sizes[start - below :]
            sizes += [values] * len(step.stack_after)
    except (ValueError, IndexError) as error:
        raise DamagedFileError(f"{path}: no .pt file ({printable(str(error), 200)})") from None


def write_pt(path: Path, value: Any, dtype: str = "float32") -> None:
    """Write a value with float32 arrays in it as a .pt file of `dtype` (float32, float16, bfloat16).

    An array that stands at two places, like a tied head, is written once. InputError where PyTorch is not installed.
    """
    torch = _torch(path)
    tensors: dict[int, Any] = {}

    def tensor(array: np.ndarray) -> Any:
        if id(array) not in tensors:
            writable = np.require(array, requirements=["C", "W"])  # PyTorch warns of others
            tensors[id(array)] = torch.from_numpy(writable).to(getattr(torch, dtype))
        return tensors[id(array)]

    with open(path, "wb") as file:  # given a path, PyTorch writes its name into the archive
        torch.save(_mapped(value, np.ndarray, tensor), file)


def _torch(path: Path) -> Any:
    try:
        import torch
    except ModuleNotFoundError:
        raise InputError(f"{path}: .pt files need PyTorch; pip install 'minimac-mlx[torch]'") from None
    return torch


def _plain(value: Any, torch: Any, path: Path, room: int) -> Any:
    """Tensors as arrays, all of them together no larger than the file of `room` bytes: many may share its values.

    Only the second name of a tensor is free, as a tied head has it.
    """
    left = room
    unshared: dict[tuple, np.ndarray] = {}

    def array(tensor: Any) -> np.ndarray:
        nonlocal left
        if tensor.device.type != "cpu":
            raise DamagedFileError(f"{path}: a tensor {list(tensor.shape)} without values ({tensor.device})")
        if tensor.layout != torch.strided or tensor.is_complex() or tensor.is_quantized:
            raise DamagedFileError(f"{path}: a {tensor.dtype} tensor in {tensor.layout} layout, which is not read")
        place = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if place in unshared:
            return unshared.pop(place)
        left -= tensor.numel() * tensor.element_size()
        if left < 0:
            raise DamagedFileError(f"{path}: a tensor {list(tensor.shape)} claims more than the file holds")
        real = tensor.detach().float() if tensor.is_floating_point() else tensor.detach()
        unshared[place] = real.contiguous().numpy()
        return unshared[place]

    return _mapped(value, torch.Tensor, array)


def _mapped(
    value: Any, kind: type, function: Any, depth: int = 3, seen: dict[tuple[int, int], Any] | None = None
) -> Any:
    """The value with `function` applied to all of a kind in its dictionaries and lists; not deeper than `depth`.

    They may hold themselves, and one may stand at a million places: at each depth, each is gone through once.
    """
    if isinstance(value, kind):
        return function(value)
    if not isinstance(value, dict | list) or not depth:
        return value
    seen = {} if seen is None else seen
    key = id(value), depth
    if key not in seen:
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        mapped = {name: _mapped(item, kind, function, depth - 1, seen) for name, item in pairs}
        seen[key] = mapped if isinstance(value, dict) else list(mapped.values())
    return seen[key]
