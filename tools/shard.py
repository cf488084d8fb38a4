"""Build shuffled training shards from a store."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):  # run as a file from a checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tools.runner import Terminal, run_verb
from tools.sizes import parse_size

if TYPE_CHECKING:
    from shards.select import ShardConfig


@dataclass(frozen=True, kw_only=True)
class Options:
    """Build a folder of WebDataset shards: all samples shuffled, whole experimental batches held out."""

    store: str
    """Folder or address of the store."""
    out: str
    """Folder of the shards, which must not exist yet, or be empty; or an address (s3://bucket/name)."""
    datasets: tuple[str, ...] = ()
    """Names of the datasets to take. Default: all of the store."""
    min_cells: int = 0
    """A dataset keeps a gene that is above zero in at least so many of its samples."""
    min_cell_fraction: float = 0.0
    """The same as a share of the dataset's samples, 0 to 1. 0.05 suits small runs; genes that fail are unknown, not zero."""
    selection: str | None = None
    """Folder of a selection, which chooses datasets, samples and genes in place of the three options above."""
    val_batches: float | None = None
    """Share of each dataset's experimental batches to hold out, 0 to below 1; at least one, never all. Default: 0.1, or what
    the selection says."""
    weight: tuple[str, ...] = ()
    """NAME=SHARE: share of a dataset's train samples that each epoch serves, above 0 to 1; others serve all. May be repeated."""
    obs: tuple[str, ...] = ()
    """Columns of obs that shards carry besides the batch, such as cell_type,donor_id."""
    seed: int = 0
    """Seed of the shuffle and of the choice of batches."""
    block: int = 1024
    """Samples per block, the unit that is read and checked."""
    lanes: int = 16
    """Independent sequences of blocks; the number of training processes must divide it, and it the global batch."""
    mix_blocks: int = 2
    """Blocks whose samples a lane of the training stream mixes at a time."""
    shard_bytes: str = "256MiB"
    """Size of a shard, such as 256MiB or 1GB; about, since shards are cut before they are compressed."""
    workers: int = 0
    """Processes on this machine that read and write; 0 works in this process, without Dask."""
    dask_scheduler: str | None = None
    """Address of a Dask scheduler (tcp://host:8786) whose workers see the same files, in place of --workers."""
    memory_budget: str = "2GiB"
    """Memory for all of it, such as 2GiB; a build that does not fit is refused before counts are read."""
    scratch: str | None = None
    """Folder for what is unfinished. Default: beside --out, or for an address the system's temporary folder."""
    dry_run: bool = False
    """Write nothing: say what would be read, written and needed."""


def run(options: Options, terminal: Terminal) -> dict[str, Any]:
    """Build the shards, or say what that would take."""
    from shards.writer import build_shards, plan_shards
    from txfm_data.parallel import Workers
    from txfm_data.store.opening import open_store

    config = config_of(options)
    workers = Workers(n=options.workers, scheduler=options.dask_scheduler, memory=parse_size(options.memory_budget))
    store = open_store(options.store)
    if options.dry_run:
        return plan_shards(store, options.out, config, workers=workers, scratch=options.scratch)
    progress = terminal.progress("reading, then writing")
    return build_shards(store, options.out, config, workers=workers, scratch=options.scratch, progress=progress)


def config_of(options: Options) -> "ShardConfig":
    """What goes into the shards and how they are cut."""
    from shards.select import ShardConfig

    return ShardConfig(
        datasets=options.datasets, min_cells=options.min_cells, min_cell_fraction=options.min_cell_fraction,
        selection=options.selection, val_batches=options.val_batches, weights=_weights(options.weight),
        obs_columns=tuple(name for names in options.obs for name in names.split(",") if name), seed=options.seed,
        block_rows=options.block, lanes=options.lanes, mix_blocks=options.mix_blocks,
        shard_bytes=parse_size(options.shard_bytes),
    )  # fmt: skip


def _weights(pairs: tuple[str, ...]) -> dict[str, float]:
    """NAME=SHARE pairs as a dict."""
    weights: dict[str, float] = {}
    for pair in pairs:
        name, _, share = pair.rpartition("=")
        try:
            weight = float(share)
        except ValueError:
            name = ""
        if not name:
            raise ValueError(f"--weight takes NAME=SHARE, such as atlas=0.5; got {pair!r}")
        if name in weights:
            raise ValueError(f"--weight names dataset {name!r} twice")
        weights[name] = weight
    return weights


def summary(result: dict[str, Any]) -> str:
    """A line for the corpus and one for each dataset; of a dry run, what it would read, write and need."""
    lines = _dry_lines(result) if result.get("dry_run") else _lines(result)
    for d in result["datasets"]:
        how = {
            "batches": f"held out {', '.join(d['val_batches'][:4])}{' …' if len(d['val_batches']) > 4 else ''}",
            "samples": "a single batch: samples held out, not a batch",
            "selection": "held out as the selection says",
            "none": "nothing held out",
        }[d["held_out"]]
        weight = "" if d["weight"] == 1 else f", {d['weight']:.4g} of them in each epoch"
        lines.append(f"  {d['name']}: {d['n_train']:,} + {d['n_val']:,} samples, {d['n_genes']:,} genes, {how}{weight}")
    end = "dry run, nothing written" if result.get("dry_run") else f"shards: {result['out']}"
    return "\n".join([*lines, end])


def _counts(result: dict[str, Any]) -> str:
    return (
        f"{result['n_train']:,} train and {result['n_val']:,} validation samples, {result['n_genes']:,} genes, in "
        f"{result['shards']:,} shards of {result['blocks']:,} blocks"
    )


def _lines(result: dict[str, Any]) -> list[str]:
    n = result["n_train"] + result["n_val"]
    return [
        f"{_counts(result)}, {result['bytes_per_sample']:,.0f} bytes a sample, {result['lanes']} lanes",
        f"{result['seconds']:,.1f} s, {n / result['seconds']:,.0f} samples/s"
        f"{', going on with an unfinished build' if result['resumed'] else ''}",
    ]


def _dry_lines(result: dict[str, Any]) -> list[str]:
    return [
        f"{_counts(result)}, {result['lanes']} lanes",
        f"reads {result['store']} in {result['read_tasks']:,} parts",
        f"writes about {result['bytes_estimated'] / 1e9:,.3f} GB to {result['out']} "
        f"({result['bytes_per_sample_estimated']:,.0f} bytes a sample)",
        f"before that, {result['spill_bytes_estimated'] / 1e9:,.3f} GB to {result['stage']}, which is removed at the end",
        f"takes up to {result['memory_bytes'] / 2**20:,.0f} MiB of memory",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Build shards."""
    return run_verb("shard", Options, run, summary, _joined(sys.argv[1:] if argv is None else argv))


def _joined(argv: Sequence[str]) -> list[str]:
    """The same words with all that follows any `--weight` behind one: of a repeated flag, parsers keep the last alone."""
    words, weights, is_weight = [], [], False
    for word in argv:
        name, equals, value = word.partition("=")
        if name == "--weight":
            is_weight = not equals
            weights += [value] if equals else []
        elif is_weight and not word.startswith("--"):
            weights.append(word)
        else:
            is_weight = False
            words.append(word)
    asked = any(word.partition("=")[0] == "--weight" for word in argv)
    return [*words, "--weight", *weights] if asked else words


if __name__ == "__main__":
    sys.exit(main())
