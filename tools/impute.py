"""Predict the expression of chosen genes, measured or not, with a trained model."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file from a checkout, also by accelerate launch
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tools.runner import Terminal, run_verb
from tools.sample_options import SampleOptions, encode_options, open_model


@dataclass(frozen=True, kw_only=True)
class Options(SampleOptions):
    """Predict ln(1 + normalised count) of chosen genes: a model's predictions, not measurements; not for tests of differences."""

    genes: str | None = None
    """Ensembl ids or symbols with commas between them."""
    genes_file: Path | None = None
    """Text file with an Ensembl id or a symbol on each line, in place of or besides --genes."""


def run(options: Options, terminal: Terminal) -> dict[str, Any]:
    """Predict and write the result, whole or not at all."""
    from txfm_model.impute import impute_file, read_gene_list

    genes = (options.genes or "").split(",")
    if options.genes_file is not None:
        genes += read_gene_list(options.genes_file)
    model, files = open_model(options, terminal, "predicting")
    return impute_file(model, options.input, options.out, genes, options=encode_options(options), files=files)


def summary(result: dict[str, Any]) -> str:
    """Where the predictions are, and what they are."""
    return (
        f"{result['n_obs']:,} samples x {result['genes']:,} genes ({result['genes_measured']:,} of them measured) in "
        f"layers[{result['predicted']!r}]\nfile: {result['out']}\n{result['warning']}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Predict genes."""
    return run_verb("impute", Options, run, summary, argv, positionals=("input",))


if __name__ == "__main__":
    sys.exit(main())
