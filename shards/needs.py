"""What a build takes in memory and on disk, and the refusal of one that cannot be done with what there is."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from shards.samples import DTYPES
from shards.shuffle import BuildPlan
from txfm_data.parallel import Workers

_MIB = 1024**2
_BASE_BYTES = 576 * _MIB
"""What the process needs before it holds anything: the interpreter, Arrow, TileDB and its buffers, tables of genes."""
_WORKER_BASE_BYTES = 400 * _MIB
_SCAN_BYTES = 96 * _MIB
"""One part of a scan, read, restricted and packed."""
_TASK_COPIES = 2
"""Values of a task of pass 1 are held as they come, and in the order of the shuffle."""
_BLOCK_COPIES = 4
"""A block is lifted from the values of its group, made an Arrow batch, and compressed."""
_LARGEST_GROUP = 256 * _MIB
_INDEX_BYTES = 12
"""Where the samples of one shard are in one spill."""
_OWN_BYTES, _SPARE_BYTES = 25, 24
"""Bytes a sample of the sample table without further labels, and of what is computed from it for a moment."""


@dataclass(frozen=True)
class Memory:
    """How a memory budget is used. group_bytes : of values that pass 2 holds at once, per process.  total : of all."""

    group_bytes: int
    total: int


def check_samples(n: int, kinds: list[str], memory: int) -> None:
    """Refuse more samples than a budget can list, before they are listed.

    kinds : types of the columns of obs that are asked for.
    """
    need = _BASE_BYTES + n * (_OWN_BYTES + _SPARE_BYTES + sum(DTYPES[kind]().itemsize for kind in kinds))
    if need > memory:
        raise ValueError(
            f"listing {n} samples takes about {_mib(need)}, the memory budget is {_mib(memory)}; raise --memory-budget to at least "
            f"{_mib(need)}, or ask for fewer --obs columns"
        )


def plan_memory(plan: BuildPlan, workers: Workers) -> Memory:
    """How the budget is shared out.

    Raises
    ------
    ValueError
        If it leaves no room for one task or one block in each process; names the least that would do.
    """
    n = max(1, workers.n)
    base = _BASE_BYTES + workers.n * _WORKER_BASE_BYTES + plan.samples.n_bytes + _SPARE_BYTES * len(plan.samples)
    base += _INDEX_BYTES * len(plan.tasks) * sum(split.n_shards for split in plan.splits)
    read = _SCAN_BYTES + _TASK_COPIES * plan.task_bytes
    block = plan.block_bytes
    least = max(read, (1 + _BLOCK_COPIES) * block)
    if base + n * least > workers.memory:
        raise ValueError(
            f"shuffling {len(plan.samples)} samples in {n} process(es) takes at least {_mib(base + n * least)}, the memory budget "
            f"is {_mib(workers.memory)}; raise --memory-budget, or lower --workers or --block"
        )
    room = (workers.memory - base) // n - _BLOCK_COPIES * block
    group = max(block, min(_LARGEST_GROUP, room))
    return Memory(group, base + n * max(read, group + _BLOCK_COPIES * block))


def check_disk(plan: BuildPlan, folder: Path, what: str) -> None:
    """Refuse a build whose spills and shards have no room.

    folder : where they go. What an earlier run left there is room: it is used, or removed.

    Raises
    ------
    OSError
        Names what is needed and what there is.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
    free = shutil.disk_usage(existing).free + there
    need = plan.spill_bytes + plan.n_bytes
    if need > free:
        raise OSError(
            f"{what}: about {_mib(need)} are needed there ({_mib(plan.spill_bytes)} of spills, {_mib(plan.n_bytes)} of shards) and "
            f"{_mib(free)} are free; free some, or name another disk with --out or --scratch"
        )


def _mib(n_bytes: int) -> str:
    return f"{-(-n_bytes // _MIB):,} MiB"
