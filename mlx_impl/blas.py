"""A fast BLAS under MLX on Linux, loaded before MLX binds its symbols.

MLX's Linux CPU wheel links the reference BLAS, which multiplies matrices some fifty times slower than a tuned
one. The dynamic linker resolves `cblas_sgemm` to the first global definition, so loading another BLAS with
RTLD_GLOBAL before `import mlx.core` replaces it. On macOS MLX uses Metal and Accelerate and nothing is done.
"""

import os
import sys
from collections.abc import Sequence
from types import ModuleType

_loaded: str | None = None


class _BeforeMLX:
    """Loads the BLAS when MLX is about to be imported, so that a program which never does pays nothing."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        """Find nothing; the import goes on as usual."""
        if name == "mlx.core":
            sys.meta_path.remove(self)
            load_fast_blas()


def load_with_mlx() -> None:
    """See to it that `import mlx.core`, whoever does it, finds the fast BLAS loaded."""
    if sys.platform == "linux" and not any(isinstance(finder, _BeforeMLX) for finder in sys.meta_path):
        sys.meta_path.insert(0, _BeforeMLX())


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
    import ctypes  # with its like below, a tenth of the time of --help

    for candidate in [wanted] if wanted else _candidates():
        try:
            ctypes.CDLL(candidate, mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            if wanted:
                print(f"MINIMAC_BLAS is {wanted!r}, which cannot be loaded ({error}); unset it", file=sys.stderr)
            continue
        _loaded = candidate
        break
    return _loaded


def _candidates() -> list[str]:
    """MKL where pip puts it (the environment's lib folder), then what the system's linker finds."""
    import ctypes.util
    from pathlib import Path

    folders = [
        Path(sys.prefix) / "lib",
        *(Path(p).parent.parent for p in sys.path if p.endswith("site-packages")),
    ]
    mkl = [str(path) for folder in folders for path in sorted(folder.glob("libmkl_rt.so*"))]
    system = [ctypes.util.find_library(name) for name in ("mkl_rt", "openblas")]
    return list(dict.fromkeys([*mkl, *(name for name in system if name)]))


def is_slow() -> bool:
    """Whether MLX's CPU backend multiplies with its own reference BLAS."""
    return sys.platform == "linux" and _loaded is None


def describe() -> str:
    """Which BLAS serves MLX's CPU backend here."""
    if sys.platform == "darwin":
        return "Accelerate"
    return _loaded or "MLX's own reference BLAS, about 50 times slower than a tuned one"
