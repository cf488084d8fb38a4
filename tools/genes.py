"""Write the two gene matrices of a model, with Ensembl ids and symbols, as parquet."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file from a checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tools.runner import Terminal, run_verb


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write the two vectors of each gene that a model holds: codebook (encoder) and gene head (decoder)."""

    model: str
    """checkpoint folder, folder of a training run, or id on the Hugging Face Hub"""
    out: Path
    """parquet file to write: gene_id, symbol, codebook, head; one row for each gene of the vocabulary"""


def run(options: Options, terminal: Terminal) -> Mapping[str, object]:
    """Open the model and write its gene matrices."""
    from txfm_model.genes import export_genes
    from txfm_model.model import TxFM

    if options.out.exists():  # before a model is opened or downloaded
        raise FileExistsError(f"{options.out} exists; choose another name or remove it")
    terminal.say(f"opening {options.model}")
    return export_genes(TxFM.from_pretrained(options.model), options.out)


def summary(result: dict[str, Any]) -> str:
    """Say what was written."""
    return (
        f"wrote {result['path']}: {result['genes']:,} genes, codebook of width {result['codebook_width']}, "
        f"gene head of width {result['head_width']}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Write the two gene matrices of a model, with Ensembl ids and symbols, as parquet."""
    return run_verb("genes", Options, run, summary, argv)


if __name__ == "__main__":
    sys.exit(main())
