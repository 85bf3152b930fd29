"""The device that is used, and what MLX may keep of a GPU's memory."""

import os
import subprocess
import sys

import mlx.core as mx
import pytest

from mlx_impl import device
from mlx_impl.errors import InputError


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Cache limits that were set."""
    found: list[int] = []
    monkeypatch.setattr(mx, "set_cache_limit", found.append)
    return found


def test_a_gpu_keeps_a_part_of_the_memory(limits: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.DeviceType.gpu))
    device.use_device("default")
    assert limits == [device.memory_bytes() // device.CACHED]


def test_a_cpu_has_no_such_limit(limits: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.DeviceType.cpu))
    device.use_device("mps")
    assert limits == []


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "is_available", lambda wanted: False)
    with pytest.raises(InputError, match="no GPU"):
        device.use_device("gpu")


def test_what_mlx_is_told_not_to_compile_is_not_called_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")
    assert not device.can_compile()


@pytest.mark.skipif(sys.platform != "linux", reason="no BLAS is loaded elsewhere")
def test_a_blas_that_cannot_be_loaded_is_named() -> None:
    environment = {**os.environ, "MINIMAC_BLAS": "/nowhere/libblas.so"}
    script = "import mlx_impl, mlx.core"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stderr.startswith("MINIMAC_BLAS is '/nowhere/libblas.so', which cannot be loaded (")
    assert done.stderr.endswith("; unset it\n")
    assert done.stderr.count("\n") == 1
