"""How fast a device multiplies matrices: what training is compared with."""

import time
from typing import Literal

import torch

_SIZES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}


def matmul_rate(device: torch.device, precision: Literal["bf16", "no"], seconds: float = 0.6) -> float:
    """FLOP/s of products of square matrices, the best of a few sizes and repetitions.

    float32 products are computed as torch's settings say, which is without TF32 unless somebody allowed it.

    Parameters
    ----------
    device
        Where.
    precision
        bf16, or float32 for "no".
    seconds
        That each size may take, after one product that warms up.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    generator = torch.Generator().manual_seed(0)
    best = 0.0
    for n in _SIZES.get(device.type, _SIZES["cpu"]):
        left, right = (torch.randn(n, n, generator=generator).to(device, dtype) for _ in range(2))
        out = torch.empty(n, n, dtype=dtype, device=device)
        best = max(best, _rate(left, right, out, seconds))
    return best


def _rate(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, seconds: float) -> float:
    """Best of the repetitions that fit into `seconds`."""
    work = 2.0 * len(left) ** 3
    torch.mm(left, right, out=out)
    _wait(left.device)
    best, repeat, since = 0.0, 1, time.perf_counter()
    while True:
        start = time.perf_counter()
        for _ in range(repeat):
            torch.mm(left, right, out=out)
        _wait(left.device)
        spent = time.perf_counter() - start
        best = max(best, repeat * work / spent)
        if time.perf_counter() - since > seconds:
            return best
        if spent < 0.02:  # a GPU takes as long to be told as to do it
            repeat *= 4


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
