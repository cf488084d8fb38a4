"""Score a model: relationship recall of its gene representations."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if __package__ in (None, ""):  # run as a file from a checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tools.runner import Terminal, run_kinds, run_verb

if TYPE_CHECKING:
    import numpy as np

MATRICES = ("codebook", "head")


@dataclass(frozen=True, kw_only=True)
class RelationshipOptions:
    """Relationship recall: whether genes known to be related lie close together in a model."""

    model: str | None = None
    """Folder or hub id of a TxFM checkpoint."""
    genes: Path | None = None
    """In place of a model: a parquet file of `txfm genes` (gene_id, symbol, codebook, head)."""
    annotations: tuple[Path, ...] = ()
    """Files with the header entity1,entity2, or folders of them; else those of efaar_benchmarking."""
    matrix: Literal["both", "codebook", "head"] = "both"
    """Gene vectors to score: the encoder's table, the weight of the last layer, or both."""
    control_draws: int = 3
    """Random matrices of the same shape that are scored beside each, at least 2."""
    seed: int = 0
    """Seed of the random matrices."""

    def __post_init__(self) -> None:
        if (self.model is None) == (self.genes is None):
            raise ValueError("give either --model or --genes, and not both: one of them holds the gene vectors")
        if self.control_draws < 2:
            raise ValueError(f"--control-draws must be at least 2, got {self.control_draws}")


def run_relationships(options: RelationshipOptions, terminal: Terminal) -> dict[str, Any]:
    """Read annotations first, since they are what is most often missing; then the vectors; then score."""
    from txfm_eval.annotations import find_annotations, read_annotation
    from txfm_eval.relationships import evaluate_relationships

    files = find_annotations(options.annotations)
    annotations = [read_annotation(path) for path in files]
    terminal.say(f"annotations: {', '.join(str(path) for path in files)}")
    symbols, matrices = _from_file(options.genes) if options.genes else _from_model(str(options.model))
    names = MATRICES if options.matrix == "both" else (options.matrix,)
    progress = terminal.progress("scoring", "matrices")
    result = evaluate_relationships(
        {name: matrices[name] for name in names},
        symbols,
        annotations,
        draws=options.control_draws,
        seed=options.seed,
        progress=progress,
    )
    source = {"model": options.model, "genes": str(options.genes) if options.genes else None}
    return {"kind": "relationships", **source, "annotations": [str(path) for path in files], **result}


def _from_model(model: str) -> tuple[tuple[str, ...], dict[str, "np.ndarray"]]:
    from txfm_model.model import TxFM

    loaded = TxFM.from_pretrained(model)
    weights = {"codebook": loaded.tokens.codebook, "head": loaded.head.weight}
    return loaded.vocabulary.symbols, {name: w.detach().float().cpu().numpy() for name, w in weights.items()}


def _from_file(path: Path) -> tuple[tuple[str, ...], dict[str, "np.ndarray"]]:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: not a readable parquet file ({error}); write it with txfm genes") from error
    missing = [name for name in ("symbol", *MATRICES) if name not in table.column_names]
    if missing:
        raise ValueError(f"{path}: has no column {missing}; expected what txfm genes writes")
    matrices = {}
    for name in MATRICES:
        flat = table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        if table.num_rows == 0 or len(flat) % table.num_rows:
            raise ValueError(f"{path}: the vectors of column {name} have no common length; write it again")
        matrices[name] = np.asarray(flat, np.float32).reshape(table.num_rows, -1)
    return tuple(symbol or "" for symbol in table["symbol"].to_pylist()), matrices


def summarize_relationships(result: dict[str, Any]) -> str:
    """Show recall in percent by list, with the random matrices beside it."""
    universe, databases = result["universe"], result["databases"]
    lines = [
        f"Relationship recall in percent over {universe['n_genes']:,} of {universe['n_genes_in_matrix']:,} genes "
        f"({universe['n_null_pairs']:,} pairs).",
        "  one-sided: above 95 % of all pairs; two-sided: also below 95 % of them. Random: mean and sd of "
        f"{result['random_draws']} draws.",
    ]
    for name, scores in result["matrices"].items():
        lines.append(f"{name} ({scores['n_dims']} columns)")
        lines.append(f"  {'list':<16}{'pairs':>9}{'one-sided':>11}{'random':>14}{'two-sided':>11}{'random':>14}")
        for database, recall in scores["recall"].items():
            random = scores["random"][database]
            cells = [f"{recall['n_pairs']:>9,}"]
            for side in ("one_sided", "two_sided"):
                value = recall[f"{side}_percent"]
                if value is None:
                    cells.append(f"{'-':>11}{'-':>14}")
                else:
                    spread = f"{random[f'{side}_percent']:.2f} ± {random[f'{side}_sd']:.2f}"
                    cells.append(f"{value:>11.2f}{spread:>14}")
            lines.append(f"  {database:<16}{''.join(cells)}")
    listed = ", ".join(f"{name} {part['n_pairs']:,} of {part['n_listed_pairs']:,}" for name, part in databases.items())
    lines.append(f"Pairs with both genes compared: {listed}.")
    left_out = {
        "in no list": "n_in_no_list",
        "ambiguous symbol": "n_ambiguous_symbol",
        "no symbol": "n_without_symbol",
    }
    lines.append(f"Genes left out: {', '.join(f'{universe[key]:,} {why}' for why, key in left_out.items())}.")
    return "\n".join([*lines, *(f"Note: {note}." for note in result["notes"])])


def main_relationships(argv: Sequence[str] | None = None) -> int:
    """Recall of known gene relationships by the codebook and the gene head."""
    return run_verb("evaluate relationships", RelationshipOptions, run_relationships, summarize_relationships, argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the kind that is named first."""
    return run_kinds("evaluate", {"relationships": main_relationships}, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
