"""How a run meets its machine: processes, device, precision, threads."""

import logging
import os
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import TYPE_CHECKING, Literal

import torch

from txfm_model.config import LoopConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

Precision = Literal["bf16", "no"]
PATIENCE = timedelta(hours=1)
"""How long processes wait for each other: the main one may be writing a large checkpoint to slow storage."""
TWO_CPU_PROCESSES = (
    "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 --num_machines 1 "
    "--mixed_precision no --dynamo_backend no tools/train.py ..."
)


def start_accelerator(loop: LoopConfig) -> "Accelerator":
    """Join the processes that the launcher started, on CUDA where there is one and else on the CPU.

    Autocast is ours (`autocast`), and so is the sharding of data: Accelerate gives device, DDP, reductions.
    """
    from accelerate import Accelerator, InitProcessGroupKwargs

    accelerator = Accelerator(
        mixed_precision="no",
        cpu=not torch.cuda.is_available(),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    expected = expected_processes(loop, os.environ)
    if expected is not None and accelerator.num_processes < expected:
        logger.warning(
            "training runs in %d process(es), not in the %s%d that were asked for; `accelerate launch --cpu` "
            "starts one, two CPU processes start with: %s",
            accelerator.num_processes,
            "at least " if loop.num_processes_expected is None else "",
            expected,
            TWO_CPU_PROCESSES,
        )
    threads = choose_cpu_threads(loop, accelerator.num_processes, accelerator.device.type, os.environ)
    if threads is not None:
        torch.set_num_threads(threads)
    return accelerator


def expected_processes(loop: LoopConfig, environ: Mapping[str, str]) -> int | None:
    """Find how many processes were asked for, as far as configuration or the launcher's environment tell."""
    if loop.num_processes_expected is not None:
        return loop.num_processes_expected
    for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if environ.get(name, "").isdigit():
            return int(environ[name])
    launched = "ACCELERATE_MIXED_PRECISION" in environ
    if launched and "MASTER_ADDR" in environ:  # its one-process launcher sets this when it was asked for more than one
        return 2
    return None


def choose_cpu_threads(loop: LoopConfig, processes: int, device: str, environ: Mapping[str, str]) -> int | None:
    """Threads of PyTorch in this process; None leaves its default. CPU processes share the cores.

    `accelerate launch` sets OMP_NUM_THREADS to 1 where nothing else was asked for, which would leave cores idle.
    """
    if loop.cpu_threads is not None:
        return loop.cpu_threads
    is_launched = "ACCELERATE_MIXED_PRECISION" in environ
    if device != "cpu" or (processes == 1 and not is_launched):
        return None
    here = int(environ.get("LOCAL_WORLD_SIZE", processes))
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, cores // here)


def choose_precision(asked: str, device: torch.device, environ: Mapping[str, str]) -> Precision:
    """Resolve `loop.precision`: bf16 on a GPU that has it or where the launcher asks for it, else none.

    Raises
    ------
    ValueError
        If the launcher asks for a precision other than bf16 or none.
    """
    if asked == "auto":
        launcher = environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if launcher not in ("no", "bf16"):
            raise ValueError(
                f"accelerate launch asks for mixed precision {launcher!r}; training knows bf16 and no. "
                f"Launch with --mixed_precision bf16, or give loop.precision"
            )
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if has_bf16 or launcher == "bf16" else "no"
    return "bf16" if asked == "bf16" else "no"


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[None]:
    """Context in which a forward pass runs."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
