"""Which machine this is, and what follows for the numbers: device, dtype, memory, versions.

16-bit arithmetic is faster than float32 on Apple's GPUs and several times slower on MLX's CPU backend. bfloat16 is
native from M3 on; before, float16 is the faster one.
"""

import functools
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from typing import Any

import mlx.core as mx

from mlx_impl import blas
from mlx_impl.errors import InputError

PACKAGES = (
    "mlx",
    "mlx-lm",
    "numpy",
    "sentencepiece",
    "tokenizers",
    "transformers",
    "torch",
    "safetensors",
    "gguf",
)


CACHED = 4
"""A GPU's freed buffers are kept for the next ones, up to this part of the memory: a step's are all of one shape."""


def use_device(name: str) -> None:
    """Make `cpu` or `gpu` MLX's device; `default` and `mps` (the original's word) leave its choice.

    On a GPU what MLX keeps of freed memory is limited to a part of the machine's, which is a Mac's whole memory.
    """
    if name == "cpu":
        mx.set_default_device(mx.Device(mx.DeviceType.cpu))
    elif name == "gpu":
        if not mx.is_available(mx.Device(mx.DeviceType.gpu)):
            raise InputError('no GPU that MLX can use here; set device="default"')
        mx.set_default_device(mx.Device(mx.DeviceType.gpu))
    if mx.default_device().type == mx.DeviceType.gpu:
        mx.set_cache_limit(memory_bytes() // CACHED)


def compute_dtype() -> mx.Dtype:
    """float32 on a CPU, float16 on M1 and M2, bfloat16 on M3 and later and on CUDA.

    `MINIMAC_DTYPE` (float32, float16, bfloat16) overrides.
    """
    named = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
    wanted = os.environ.get("MINIMAC_DTYPE")
    if wanted:
        if wanted not in named:
            raise InputError(f"MINIMAC_DTYPE is {wanted!r}; {', '.join(named)} are known")
        return named[wanted]
    if mx.default_device().type == mx.DeviceType.cpu:
        return mx.float32
    return mx.float16 if apple_generation(chip()) in (1, 2) else mx.bfloat16


def training_dtype() -> mx.Dtype:
    """As `compute_dtype`, but never float16: small gradients vanish in it unless the loss is scaled."""
    dtype = compute_dtype()
    return mx.float32 if dtype == mx.float16 else dtype


def keep_quantised() -> bool:
    """Whether quantised weights stay packed: not on a CPU, where products with them take 4 to 10 times as long.

    `MINIMAC_QUANTISED` (keep, unpack) overrides.
    """
    wanted = os.environ.get("MINIMAC_QUANTISED")
    if wanted not in (None, "", "keep", "unpack"):
        raise InputError(f"MINIMAC_QUANTISED is {wanted!r}; keep and unpack are known")
    return wanted == "keep" if wanted else mx.default_device().type != mx.DeviceType.cpu


def can_compile() -> bool:
    """Whether `mx.compile` works here: unless it is disabled; on a CPU it needs a C++ compiler at run time."""
    if "MLX_DISABLE_COMPILE" in os.environ:
        return False
    return mx.default_device().type == mx.DeviceType.gpu or _compiles_on_cpu()


@functools.cache
def _compiles_on_cpu() -> bool:
    try:
        mx.eval(mx.compile(lambda x: mx.exp(x) * 2 + 1)(mx.zeros(3)))
    except (RuntimeError, OSError):
        return False
    return True


def dtype_name(dtype: mx.Dtype) -> str:
    """float32, float16 or bfloat16."""
    return str(dtype).rpartition(".")[2]


def apple_generation(name: str) -> int | None:
    """3 for "Apple M3 Pro"; None for any other chip."""
    found = re.match(r"Apple M(\d+)", name)
    return int(found.group(1)) if found else None


def chip() -> str:
    """The processor's name as the system gives it."""
    if sys.platform == "darwin":
        return _sysctl("machdep.cpu.brand_string") or platform.processor()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def memory_bytes() -> int:
    """Physical memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def under_rosetta() -> bool:
    """Whether this is an Intel Python translated on Apple Silicon, where MLX's GPU cannot be used."""
    return sys.platform == "darwin" and _sysctl("sysctl.proc_translated") == "1"


def describe() -> dict[str, Any]:
    """What `doctor` and benchmark files say of the machine."""
    return {
        "chip": chip(),
        "cores": os.cpu_count(),
        "memory_bytes": memory_bytes(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "device": str(mx.default_device().type).rpartition(".")[2],
        "dtype": dtype_name(compute_dtype()),
        "blas": blas.describe() if mx.default_device().type == mx.DeviceType.cpu else None,
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }


def advice() -> list[str]:
    """What the owner of this machine should do, worst first; empty if all is well."""
    lines = []
    if under_rosetta():
        lines.append(
            "this Python is an Intel build under Rosetta, so MLX cannot use the GPU: install an arm64 Python "
            "(python.org or `brew install python`) and make a new virtual environment with it"
        )
    elif sys.platform == "darwin" and platform.machine() != "arm64":
        lines.append("this is an Intel Mac: MLX needs Apple Silicon")
    if sys.platform == "linux" and mx.default_device().type == mx.DeviceType.cpu and blas.is_slow():
        lines.append(
            "no fast BLAS was found, so everything is many times slower: pip install mkl, or apt install libopenblas0"
        )
    if memory_bytes() < 8 * 2**30:
        lines.append("less than 8 GB of memory: keep to small models and --batch-size 1")
    return lines


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _sysctl(name: str) -> str | None:
    try:
        done = subprocess.run(["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
