"""The plan of a build: what pass 1 reads, where pass 2 cuts, and what that takes. Reads no counts.

The permutation of a split is the sort of a hash of the position, so a sample's place needs no table: the plan holds the keys at
which shards begin, and each task sorts what it has. Nothing here depends on workers or on memory.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from shards import codec
from shards.entries import SPLITS, VERSION
from shards.order import SHUFFLE, block_sizes, sort_keys
from shards.samples import SampleTable, read_samples
from shards.scatter import ReadTask, sample_bytes
from shards.select import Chosen, ShardConfig
from shards.spill import Field, record_type

if TYPE_CHECKING:  # a machine that only trains has no tiledbsoma
    from txfm_data.store.protocol import Store

_PLAN_VERSION = 1
_SMALLEST_TASK, _LARGEST_TASK, _MANY_TASKS = 32 * 1024**2, 128 * 1024**2, 1_024
"""Bytes of values that a task of pass 1 holds; large corpora get larger tasks, so that pass 2 finds fewer files."""
_TASK_ROWS = 65_536
_PIECE = 2**22
_FINEST = 20
"""Bits by which keys are counted to find cuts."""
_SAMPLE_BYTES = 30
"""What a block takes a sample besides its values."""


@dataclass(frozen=True)
class SplitPlan:
    """One split. block_samples : (n_blocks,) int64.  shard_blocks : (n_shards + 1,) int64, first block of each shard.

    cuts : (n_shards,) uint64, key at which each shard begins.
    """

    name: str
    block_samples: np.ndarray
    shard_blocks: np.ndarray
    cuts: np.ndarray

    @property
    def n_samples(self) -> int:
        """Samples of the split."""
        return int(self.block_samples.sum())

    @property
    def n_shards(self) -> int:
        """Shards of the split."""
        return len(self.shard_blocks) - 1


@dataclass(frozen=True)
class BuildPlan:
    """All that is decided before counts are read.

    tasks : (n_tasks, 3) int64. Dataset, first and last position of the samples of each task of pass 1.
    bytes_per_sample : of a shard, estimated.  spill_bytes : of all spills, estimated.
    task_bytes : values of the largest task, at most.  block_bytes : values of a block, hardly more.
    """

    config: ShardConfig
    chosen: Chosen
    samples: SampleTable
    splits: tuple[SplitPlan, SplitPlan]
    lanes: int
    tasks: np.ndarray
    bytes_per_sample: float
    spill_bytes: int
    task_bytes: int
    block_bytes: int
    store_datasets: tuple[Any, ...]

    @property
    def fields(self) -> tuple[Field, ...]:
        """Labels of a sample, the batch first."""
        return tuple(map(Field.of, (self.samples.batch, *self.samples.columns)))

    @property
    def obs_columns(self) -> dict[str, str]:
        """Columns of obs that blocks carry besides the batch, and their types."""
        return {column.name: column.kind for column in self.samples.columns}

    @property
    def weights(self) -> tuple[float, ...]:
        """Share of each dataset's train samples that an epoch serves."""
        return tuple(float(self.config.weights.get(record.name, 1.0)) for record in self.chosen.records)

    @property
    def n_bytes(self) -> int:
        """Bytes of all shards, estimated."""
        return round(self.bytes_per_sample * len(self.samples))

    @cached_property
    def key(self) -> str:
        """sha256 of everything that decides the bytes of the corpus."""
        config = asdict(self.config)
        config["selection"] = None if self.chosen.selection is None else self.chosen.selection.sha256
        config["weights"] = self.weights
        tree = {
            "versions": [_PLAN_VERSION, VERSION],
            "config": config,
            "datasets": [asdict(record) for record in self.chosen.records],
            "vocabulary": [self.chosen.vocabulary.fingerprint, list(self.chosen.vocabulary.symbols)],
            "panels": [hashlib.sha256(panel.tobytes()).hexdigest() for panel in self.chosen.panels],
            "samples": self.samples.digest(),
        }
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()

    def read_tasks(self, numbers: list[int]) -> Iterator[ReadTask]:
        """The tasks of pass 1 of these numbers."""
        samples = self.samples
        val_before = np.concatenate([[0], np.cumsum(samples.is_val, dtype=np.int64)])
        labels = [
            array for c in (samples.batch, *samples.columns) for array in (c.values, c.is_missing) if array is not None
        ]
        for number in numbers:
            dataset, low, high = self.tasks[number].tolist()
            part = slice(low, high)
            first_val = int(val_before[low])
            yield ReadTask(
                number, dataset, self.chosen.records[dataset].name, self.chosen.panels[dataset], low - first_val, first_val,
                samples.sample_id[part], samples.library_size[part], samples.nnz[part], samples.is_val[part],
                tuple(array[part] for array in labels),
            )  # fmt: skip


def make_plan(store: "Store", chosen: Chosen, config: ShardConfig) -> BuildPlan:
    """Decide everything that does not need counts.

    Raises
    ------
    ValueError
        If what is asked for is not there, or leaves nothing to train on.
    """
    samples = read_samples(store, chosen, config)
    n_val = int(samples.is_val.sum())
    n_train = len(samples) - n_val
    if n_train == 0:
        raise ValueError("every sample is held out for validation; lower --val-batches")
    is_real = store.dtype.kind == "f"
    most = sample_bytes(samples.nnz, samples.library_size, is_real=is_real)
    per_sample = _estimate(chosen, samples, is_real=is_real)
    lanes = config.lanes if n_train >= config.lanes else 2 ** (n_train.bit_length() - 1)
    splits = []
    for number, (n, n_lanes) in enumerate(((n_train, lanes), (n_val, 1))):
        # The val split is served in stored order: lanes mean nothing there
        sizes = block_sizes(n, config.block_rows, n_lanes) if n else np.empty(0, np.int64)
        splits.append(_split(SPLITS[number], sizes, per_sample, config, SHUFFLE + number))
    tasks = _cut_tasks(samples, most)
    by_task = np.add.reduceat(most, tasks[:, 1])
    largest = int(max(split.block_samples.max(initial=0) for split in splits))
    # A block is a random draw of samples: six standard errors above the mean is never
    block_bytes = int(largest * most.mean() + 6 * np.sqrt(largest) * most.std() + most.max())
    if block_bytes > codec.MAX_DECODED_BYTES:
        fits = max(2, int(largest * codec.MAX_DECODED_BYTES / block_bytes / 1.2))
        raise ValueError(
            f"a block of {largest} samples would take about {block_bytes / 1e6:.0f} MB, and at most "
            f"{codec.MAX_DECODED_BYTES / 1e6:.0f} MB are legal; lower --block to {fits}"
        )
    fields = [Field.of(column) for column in (samples.batch, *samples.columns)]
    spilled = _spilled(chosen, samples, most) + len(samples) * (record_type(fields).itemsize + 8)
    return BuildPlan(
        config, chosen, samples, (splits[0], splits[1]), lanes, tasks, per_sample, int(spilled), int(by_task.max()), block_bytes,
        tuple(store.datasets),
    )  # fmt: skip


def _split(name: str, sizes: np.ndarray, per_sample: float, config: ShardConfig, item: int) -> SplitPlan:
    """Cut the blocks of a split into shards of equal numbers of blocks, to within one."""
    if not len(sizes):
        return SplitPlan(name, sizes, np.zeros(1, np.int64), np.empty(0, np.uint64))
    blocks = max(1, int(config.shard_bytes // (per_sample * sizes.mean())))
    n_shards = -(-len(sizes) // blocks)
    bounds = np.arange(n_shards + 1) * len(sizes) // n_shards
    starts = np.concatenate([[0], np.cumsum(sizes)])
    return SplitPlan(name, sizes, bounds, cut_keys(int(starts[-1]), starts[bounds[:-1]], seed=config.seed, item=item))


def cut_keys(n: int, ranks: np.ndarray, *, seed: int, item: int) -> np.ndarray:
    """Keys of these ranks among the keys of 0..n-1, (n_ranks,) uint64, in memory that does not grow with n.

    Keys are made twice: first they are counted by their leading bits, then those that share them with a cut are sorted.

    ranks : ascending, below n.
    """
    bits = min(_FINEST, max(1, n.bit_length()))
    shift = np.uint64(64 - bits)
    counts = np.zeros(2**bits, np.int64)
    for start in range(0, n, _PIECE):
        keys = sort_keys(start, min(start + _PIECE, n), seed=seed, item=item)
        counts += np.bincount((keys >> shift).astype(np.int64), minlength=2**bits)
    ends = np.cumsum(counts)
    bucket = np.searchsorted(ends, ranks, side="right")
    is_cut = np.zeros(2**bits, bool)
    is_cut[bucket] = True
    kept = []
    for start in range(0, n, _PIECE):
        keys = sort_keys(start, min(start + _PIECE, n), seed=seed, item=item)
        kept.append(keys[is_cut[(keys >> shift).astype(np.int64)]])
    near = np.sort(np.concatenate(kept))
    first = np.searchsorted(near, bucket.astype(np.uint64) << shift)
    found: np.ndarray = near[first + ranks - (ends[bucket] - counts[bucket])]
    return found


def _cut_tasks(samples: SampleTable, most: np.ndarray) -> np.ndarray:
    """Ranges of samples of one dataset each, of bounded bytes: (n_tasks, 3) int64."""
    limit = float(np.clip(most.sum() / _MANY_TASKS, _SMALLEST_TASK, _LARGEST_TASK))
    tasks = []
    for dataset, (low, high) in enumerate(zip(samples.starts[:-1].tolist(), samples.starts[1:].tolist(), strict=True)):
        ends = np.cumsum(most[low:high])
        at = 0
        while at < high - low:
            before = float(ends[at - 1]) if at else 0.0
            stop = int(np.searchsorted(ends, before + limit, side="right"))
            stop = min(max(stop, at + 1), at + _TASK_ROWS)
            tasks.append((dataset, low + at, low + stop))
            at = stop
    return np.array(tasks, np.int64)


def _spilled(chosen: Chosen, samples: SampleTable, most: np.ndarray) -> float:
    """Bytes of all values in spills: what is kept of the most that they take."""
    return float(sum(np.add.reduceat(most, samples.starts[:-1]) * np.array(chosen.kept)))


def _estimate(chosen: Chosen, samples: SampleTable, *, is_real: bool) -> float:
    """Bytes that a sample takes in a shard, from the entropy of gaps between genes and of counts, both taken as geometric."""
    total = 0.0
    for number, (low, high) in enumerate(zip(samples.starts[:-1], samples.starts[1:], strict=True)):
        nnz = float(samples.nnz[low:high].sum(dtype=np.int64)) * chosen.kept[number]
        if not nnz:
            continue
        density = min(1.0, nnz / ((high - low) * len(chosen.panels[number])))
        mean = max(1.0, float(samples.library_size[low:high].sum()) * chosen.kept[number] / nnz)
        bits = _geometric_bits(1 / density) + _geometric_bits(mean) + (4 if mean > 128 else 0)
        total += nnz * (1.08 * bits / 8 + (6 if is_real else 0))
    return total / len(samples) + _SAMPLE_BYTES


def _geometric_bits(mean: float) -> float:
    """Entropy of a geometric distribution over 1, 2, … of this mean."""
    p = 1 / mean
    return 0.0 if p >= 1 else float(-(p * np.log2(p) + (1 - p) * np.log2(1 - p)) / p)
