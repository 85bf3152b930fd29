"""What only a Mac can tell of itself: its GPU's cores, the bandwidth of its memory, the power it draws.

Each is read from the output of a program that macOS brings along. Nobody who wrote this had a Mac: the tests know these
outputs from their documentation only, and what cannot be read is left out of the results.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from mlx_impl import chips, device

PROFILER = ("/usr/sbin/system_profiler", "SPDisplaysDataType", "-json")
REGISTRY = ("/usr/sbin/ioreg", "-r", "-c", "AGXAccelerator", "-d", "1")
POWER = ("sudo", "-n", "/usr/bin/powermetrics", "--samplers", "cpu_power,gpu_power", "-i", "1000", "-n")

Run = Callable[[Sequence[str]], str | None]


def output(command: Sequence[str]) -> str | None:
    """What a program prints; None where it is not there, fails or takes longer than half a minute."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None


def describe(run: Run = output, platform: str = sys.platform, chip: str | None = None) -> dict[str, Any] | None:
    """Chip, GPU cores and bandwidth (GB/s, from the table of `mlx_impl.chips`), as far as known; None if no Mac."""
    if platform != "darwin":
        return None
    name = chip or device.chip()
    cores = cores_of_profiler(run(PROFILER) or "") or cores_of_registry(run(REGISTRY) or "")
    found = chips.find(name, cores)
    return {"chip": name, "gpu_cores": cores, "bandwidth_gb_s": found.bandwidth if found else None}


def cores_of_profiler(text: str) -> int | None:
    """GPU cores in the JSON of system_profiler; None where it does not say."""
    try:
        displays = json.loads(text)["SPDisplaysDataType"]
        return next((int(display["sppci_cores"]) for display in displays if "sppci_cores" in display), None)
    except (ValueError, KeyError, TypeError):
        return None


def cores_of_registry(text: str) -> int | None:
    """GPU cores in the output of ioreg; None where it does not say."""
    found = re.search(r'"gpu-core-count"\s*=\s*(\d+)', text)
    return int(found.group(1)) if found else None


def watts_of(text: str) -> dict[str, float] | None:
    """Mean watts of CPU, GPU and all together over the samples that powermetrics printed; None without any."""
    found = {}
    for name, label in (("cpu", "CPU Power"), ("gpu", "GPU Power"), ("together", r"Combined Power \([^)]*\)")):
        values = [float(value) / 1000 for value in re.findall(rf"^{label}: ([\d.]+) mW", text, re.MULTILINE)]
        if values:
            found[name] = sum(values) / len(values)
    return found or None


def watts_while(
    work: Callable[[], Any], seconds: int = 5, command: Sequence[str] = POWER, platform: str = sys.platform
) -> dict[str, float] | None:
    """Mean watts while `work` is repeated; None where powermetrics is not there or asks for a password."""
    if platform != "darwin":
        return None
    with tempfile.TemporaryFile("w+") as printed:  # a pipe that nobody reads meanwhile could fill up
        try:
            meter = subprocess.Popen(
                [*command, str(seconds)], stdin=subprocess.DEVNULL, stdout=printed, stderr=subprocess.DEVNULL
            )
        except OSError:
            return None
        work()
        while meter.poll() is None:
            work()
        printed.seek(0)
        return watts_of(printed.read()) if meter.returncode == 0 else None
