"""Ingest count matrices into a store."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

if __package__ in (None, ""):  # run as a file from a checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tools.runner import Terminal, run_kinds, run_verb


@dataclass(frozen=True, kw_only=True)
class H5adOptions:
    """Ingest raw counts from an h5ad file as one dataset of a store, all or nothing.

    The file is read twice in bounded memory: once to check every value, once to write.
    """

    file: str
    """The h5ad file."""
    store: str
    """Folder of the store; made if there is none."""
    dataset: str
    """Name of the dataset in the store: letters, digits, '-', '_' and '.'."""
    values: Literal["counts"]
    """What the matrix holds. `counts`: raw whole-number counts (UMIs or reads), checked value by value."""
    layer: str | None = None
    """Layer to read in place of X."""
    raw: bool = False
    """Read raw.X in place of X."""
    gene_ids: str | None = None
    """Column of var with Ensembl gene ids, with or without version. Default: the index of var."""
    symbols: str | None = None
    """Column of var with gene symbols. Default: feature_name, gene_symbol(s), symbol or gene_name, whichever is there."""
    batch: str | None = None
    """Column of obs with experimental batches, which are held out whole for validation. Default: one batch."""
    perturbation: str | None = None
    """Column of obs with the perturbation of each sample; goes with --control."""
    control: str | None = None
    """Value of the perturbation column that marks unperturbed samples."""
    cell_type: str | None = None
    """Column of obs with cell types."""
    library_size: str | None = None
    """Column of obs with the counts of the whole library, for files that hold a slice of the genes. Default: row sums."""
    modality: Literal["sc", "bulk"] = "sc"
    """`sc`: single cells. `bulk`: bulk RNA-seq profiles."""
    duplicates: Literal["error", "sum", "first"] = "error"
    """What to do with several columns of one gene id: refuse, sum their counts, or keep the first."""
    empty_samples: Literal["error", "drop"] = "error"
    """What to do with samples without any count: refuse, or leave them out and say how many."""


def run_h5ad(options: H5adOptions, terminal: Terminal) -> dict[str, Any]:
    """Ingest one h5ad file."""
    from txfm_data import ingest

    arguments = vars(options).copy()
    arguments.pop("values")
    path, store, dataset = (arguments.pop(name) for name in ("file", "store", "dataset"))
    result = ingest.h5ad(
        path, store, dataset, **arguments, progress=terminal.progress("checking, then writing", "samples")
    )
    terminal.say(f"matched {result['genes_matched']} of {result['genes_in_file']} genes")
    return result


def summary_h5ad(result: dict[str, Any]) -> str:
    """One paragraph on what was ingested."""
    dropped = f", {result['n_dropped_empty']} samples without counts left out" if result["n_dropped_empty"] else ""
    return (
        f"{result['dataset']}: {result['n_obs']:,} samples x {result['n_panel']:,} genes (matched {result['genes_matched']:,} of "
        f"{result['genes_in_file']:,} columns{dropped}), {result['nnz']:,} non-zero counts, sum {result['total']:,}\n"
        f"store: {result['store']}"
    )


def main_h5ad(argv: Sequence[str] | None = None) -> int:
    """Ingest raw counts from an h5ad file."""
    return run_verb("ingest h5ad", H5adOptions, run_h5ad, summary_h5ad, argv, positionals=("file",))


def main(argv: Sequence[str] | None = None) -> int:
    """Ingest one kind of source."""
    return run_kinds("ingest", {"h5ad": main_h5ad}, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
