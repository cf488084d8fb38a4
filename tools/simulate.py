"""Simulate a small multi-dataset corpus with known gene programs."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file from a checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tools.runner import Terminal, run_verb
from txfm_data.simulate import SimulationConfig, simulate_corpus


@dataclass(frozen=True, kw_only=True)
class Options(SimulationConfig):
    """Simulate a corpus with known gene programs: four single-cell datasets and a bulk one.

    One of the four is a CRISPRi screen, another is meant to be held out of training. All of it is invented.
    """

    out: Path
    """Folder to write; it must not exist, or be empty."""


def run(options: Options, terminal: Terminal) -> dict[str, Any]:
    """Write the corpus."""
    return simulate_corpus(options.out, options, progress=terminal.progress("simulating", "samples"))


def summary(result: dict[str, Any]) -> str:
    """List the datasets, and where the truth is."""
    lines = [f"Simulated corpus (no real data) in {result['out']}, seed {result['seed']}:"]
    lines.append(f"  {'dataset':<12}{'samples':>10}{'genes':>8}{'non-zero':>10}  kind")
    for dataset in result["datasets"]:
        filled = dataset["nnz"] / (dataset["n_obs"] * dataset["n_vars"])
        kind = dataset["modality"] + (", hold out of training" if dataset["held_out"] else "")
        numbers = f"{dataset['n_obs']:>10,}{dataset['n_vars']:>8,}{filled:>10.0%}"
        lines.append(f"  {dataset['name']:<12}{numbers}  {kind}")
    lines += [f"  {n:,} gene pairs in {path}" for path, n in result["relationships"].items()]
    lines.append(f"  truth: {result['truth']}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb."""
    return run_verb("simulate", Options, run, summary, argv, positionals=("out",))


if __name__ == "__main__":
    sys.exit(main())
