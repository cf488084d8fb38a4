"""What a benchmark ran on."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "numpy", "numba", "pyarrow", "webdataset", "accelerate")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """CPU, cores, load, GPU (empty without one), system and versions: plain values."""
    return {
        "cpu": _of_cpu("model name") or platform.processor() or platform.machine(), "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "load": os.getloadavg()[0], "has_avx512_bf16": has_avx512_bf16(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "", "system": platform.platform(),
        "python": platform.python_version(), **{name: _version(name) for name in _PACKAGES},
    }  # fmt: skip


def has_avx512_bf16() -> bool:
    """Whether this CPU multiplies bf16 numbers itself; False where there is no /proc."""
    return "avx512_bf16" in _of_cpu("flags").split()


def _of_cpu(key: str) -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
