"""Measure the stream of training batches beside its parts, their floors, and another loader."""

import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file from a checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tools.runner import Terminal, run_kinds, run_verb, to_jsonable


@dataclass(frozen=True, kw_only=True)
class LoaderOptions:
    """Samples per second, and per CPU-second of the whole process, of the stream and of each of its parts alone.

    Medians of rounds in which all rows take turns, after one round that warms up. Goals stand beside the numbers.
    """

    shards: str | None = None
    """Folder of a shard corpus; else a droplet corpus is simulated into a temporary one."""
    samples: int = 100_000
    """Samples to simulate."""
    genes: int = 20_000
    """Genes to simulate; about 12 % of them are above zero in a sample."""
    batch: int = 512
    """Samples of a batch; a multiple of the lanes of the corpus."""
    n_unmasked: int = 2048
    """Genes shown of each sample."""
    rounds: int = 5
    """Rounds that count."""
    threads: int | None = None
    """Threads that read and decode, besides the one that draws masks. Default: none for a local corpus, four for a remote one."""
    annbatch_python: Path | None = None
    """Python in which annbatch can be imported, to measure it in the same rounds."""
    annbatch_collection: Path | None = None
    """Its collection of the same samples; needed with --annbatch-python."""
    out: Path | None = None
    """File to write the result to as JSON, besides printing it."""
    seed: int = 0
    """Seed of the simulation and of the stream."""

    def __post_init__(self) -> None:
        if (self.annbatch_python is None) != (self.annbatch_collection is None):
            raise ValueError("give --annbatch-python and --annbatch-collection together, or neither")
        for name in ("samples", "genes", "batch", "n_unmasked", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if self.out is not None and not self.out.absolute().parent.is_dir():
            raise ValueError(f"--out {self.out}: there is no folder {self.out.parent}")


def run_loader(options: LoaderOptions, terminal: Terminal) -> dict[str, Any]:
    """Simulate if need be, then measure."""
    from shards.bench.corpus import DropletConfig, write_corpus
    from shards.bench.loader import LoaderConfig, bench_loader
    from shards.manifest import Corpus

    config = LoaderConfig(
        batch=options.batch, n_unmasked=options.n_unmasked, rounds=options.rounds, threads=options.threads, seed=options.seed
    )  # fmt: skip
    annbatch: list[str] = []
    if options.annbatch_python is not None:
        script = Path(__file__).resolve().with_name("annbatch_epoch.py")
        annbatch = [*map(str, (options.annbatch_python, script, options.annbatch_collection)), str(options.batch)]
    with ExitStack() as stack:
        address = options.shards
        if address is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="txfm-bench-")))
            droplets = DropletConfig(samples=options.samples, genes=options.genes, seed=options.seed)
            address = str(write_corpus(folder / "shards", droplets, progress=terminal.progress("simulating")))
        progress = terminal.progress("measuring", "runs")
        result = bench_loader(Corpus(address), config, annbatch=annbatch, progress=progress)
        result["corpus"]["is_simulated"] = options.shards is None
    if options.out is not None:
        options.out.write_text(json.dumps(to_jsonable(result), indent=1) + "\n", encoding="utf-8")
    return result


def summarize_loader(result: dict[str, Any]) -> str:
    """Rates of the rows, then the goals."""
    corpus, machine = result["corpus"], result["machine"]
    name = "simulated samples (no real data)" if corpus["is_simulated"] else f"samples of {corpus['address']}"
    lines = [
        f"{corpus['samples']:,} {name}, {corpus['nonzero']:,.0f} of {corpus['genes']:,} genes above zero; {machine['cpu']}, "
        f"{machine['cores']} cores, load {machine['load']:.1f}; medians of {result['settings']['rounds']} rounds",
        f"{'row':<46}{'samples/s':>12}{'per CPU-s':>12}",
    ]
    for row in result["rows"]:
        if row["samples_per_s"] is None:
            lines.append(f"{row['label']:<46}{'-':>12}{'-':>12}  {row['why']}")
        else:
            lines.append(f"{row['label']:<46}{row['samples_per_s']:>12,.0f}{row['samples_per_cpu_s']:>12,.0f}")
    lines += ["", f"{'number':<46}{'found':>12}{'goal':>12}"]
    for goal in result["goals"]:
        found = "-" if goal["value"] is None else _number(goal["value"], goal["unit"])
        wanted = (
            "" if goal["goal"] is None else f"{'≥' if goal['is_least'] else '≤'} {_number(goal['goal'], goal['unit'])}"
        )
        verdict = {True: "met", False: "MISSED", None: goal["why"]}[goal["is_met"]]
        lines.append(f"{goal['about']:<46}{found:>12}{wanted:>12}  {verdict}".rstrip())
    return "\n".join([*lines, *(f"Note: {note}." for note in result["notes"])])


def _number(value: float, unit: str) -> str:
    text = f"{value:,.0f}" if value >= 100 else f"{value:.2f}" if unit in ("x", "s") else f"{value:.1f}"
    return text if unit == "x" else f"{text} {unit}"


def main_loader(argv: Sequence[str] | None = None) -> int:
    """The stream of training batches, its kernels and their floors; annbatch beside them where it is installed."""
    return run_verb("bench loader", LoaderOptions, run_loader, summarize_loader, argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the kind that is named first."""
    return run_kinds("bench", {"loader": main_loader}, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
