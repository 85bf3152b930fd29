"""A fast BLAS under MLX on Linux, loaded before MLX binds its symbols.

MLX's Linux CPU wheel links the reference BLAS, which multiplies matrices some fifty times slower than a tuned
one. The dynamic linker resolves `cblas_sgemm` to the first global definition, so loading another BLAS with
RTLD_GLOBAL before `import mlx.core` replaces it. On macOS MLX uses Metal and Accelerate and nothing is done.
"""

import ctypes
import ctypes.util
import os
import sys
from pathlib import Path

_loaded: str | None = None


def load_fast_blas() -> str | None:
    """Load MKL (wheel `mkl`) or a system OpenBLAS; returns its path, or None where neither is needed or found.

    `MINIMAC_BLAS` names another library, or `none` for what MLX brought. Does nothing the second time, and
    nothing where MLX is imported already: then it is too late, and `describe` says so.
    """
    global _loaded
    if sys.platform != "linux" or _loaded or "mlx.core" in sys.modules:
        return _loaded
    wanted = os.environ.get("MINIMAC_BLAS")
    if wanted == "none":
        return None
    for candidate in [wanted] if wanted else _candidates():
        try:
            ctypes.CDLL(candidate, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        _loaded = candidate
        break
    return _loaded


def _candidates() -> list[str]:
    """MKL where pip puts it (the environment's lib folder), then what the system's linker finds."""
    folders = [Path(sys.prefix) / "lib", *(Path(p).parent.parent for p in sys.path if p.endswith("site-packages"))]
    mkl = [str(path) for folder in folders for path in sorted(folder.glob("libmkl_rt.so*"))]
    system = [ctypes.util.find_library(name) for name in ("mkl_rt", "openblas")]
    return list(dict.fromkeys([*mkl, *(name for name in system if name)]))


def describe() -> str:
    """One line for `doctor`: which BLAS serves MLX's CPU backend here, and what to do if it is a slow one."""
    if sys.platform == "darwin":
        return "Accelerate"
    if _loaded:
        return _loaded
    if os.environ.get("MINIMAC_BLAS") == "none":
        return "MLX's own (MINIMAC_BLAS=none)"
    return (
        "MLX's own reference BLAS, about 50 times slower than a tuned one; `pip install mkl` or "
        "`apt install libopenblas0`, and import mlx_impl before mlx.core"
    )
