"""Build shuffled training shards from a store."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file from a checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tools.runner import Terminal, run_verb
from tools.sizes import parse_size


@dataclass(frozen=True, kw_only=True)
class Options:
    """Build a folder of WebDataset shards: all samples shuffled, whole experimental batches held out."""

    store: str
    """Folder or address of the store."""
    out: str
    """Folder of the shards; must not exist yet, or be empty."""
    datasets: tuple[str, ...] = ()
    """Names of the datasets to take. Default: all of the store."""
    min_cells: int = 0
    """A dataset keeps a gene that is above zero in at least so many of its samples."""
    min_cell_fraction: float = 0.0
    """The same as a share of the dataset's samples, 0 to 1. 0.05 suits small runs; genes that fail are unknown, not zero."""
    val_batches: float = 0.1
    """Share of each dataset's experimental batches to hold out, 0 to below 1; at least one, never all."""
    seed: int = 0
    """Seed of the shuffle and of the choice of batches."""
    block: int = 1024
    """Samples per block, the unit that is read and checked."""
    lanes: int = 16
    """Independent sequences of blocks; the number of training processes must divide it, and it the global batch."""
    shard_bytes: str = "256MiB"
    """Size of a shard, such as 256MiB or 1GB."""
    memory_budget: str = "4GiB"
    """Memory for the shuffle, such as 4GiB; a corpus that does not fit is refused before it is read."""


def run(options: Options, terminal: Terminal) -> dict[str, Any]:
    """Build the shards."""
    from shards.select import ShardConfig
    from shards.writer import build_shards
    from txfm_data.store.opening import open_store

    config = ShardConfig(
        datasets=options.datasets, min_cells=options.min_cells, min_cell_fraction=options.min_cell_fraction,
        val_batches=options.val_batches, seed=options.seed, block_rows=options.block, lanes=options.lanes,
        shard_bytes=parse_size(options.shard_bytes), memory_budget=parse_size(options.memory_budget),
    )  # fmt: skip
    return build_shards(
        open_store(options.store), options.out, config, progress=terminal.progress("reading, then writing")
    )


def summary(result: dict[str, Any]) -> str:
    """A line for the corpus and one for each dataset."""
    lines = [
        f"{result['n_train']:,} train and {result['n_val']:,} validation samples, {result['n_genes']:,} genes, in "
        f"{result['shards']} "
        f"shards of {result['blocks']} blocks, {result['bytes_per_sample']:,.0f} bytes a sample, {result['lanes']} lanes"
    ]
    for d in result["datasets"]:
        how = {
            "batches": f"held out {', '.join(d['val_batches'][:4])}{' …' if len(d['val_batches']) > 4 else ''}",
            "samples": "a single batch: samples held out, not a batch",
            "none": "nothing held out",
        }[d["held_out"]]
        lines.append(f"  {d['name']}: {d['n_train']:,} + {d['n_val']:,} samples, {d['n_genes']:,} genes, {how}")
    return "\n".join([*lines, f"shards: {result['out']}"])


def main(argv: Sequence[str] | None = None) -> int:
    """Build shards."""
    return run_verb("shard", Options, run, summary, argv)


if __name__ == "__main__":
    sys.exit(main())
