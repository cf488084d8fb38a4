"""Embed the samples of an h5ad file with a trained model."""

import secrets
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

if __package__ in (None, ""):  # run as a file from a checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tools.runner import Terminal, run_verb

_CHUNK_BYTES = 2 * 1024**2


@dataclass(frozen=True, kw_only=True)
class Options:
    """Embed raw counts: writes a copy of the file with the embedding in obsm; obs, var and everything else stay as they are."""

    file: str
    """The h5ad file with raw counts."""
    model: str
    """Checkpoint folder, or the name of a model on the Hugging Face hub."""
    out: str
    """h5ad file to write; must not exist yet."""
    embed_key: str = "X_txfm"
    """Name of the embedding in obsm."""
    layer: str | None = None
    """Layer to read in place of X."""
    raw: bool = False
    """Read raw.X in place of X."""
    gene_ids: str | None = None
    """Column of var with Ensembl gene ids. Default: the index of var."""
    symbols: str | None = None
    """Column of var with symbols, for columns without an Ensembl id. Default: the usual names of such a column."""
    library_size: str | None = None
    """Column of obs with the counts of the whole library, for files that hold a slice of the genes. Default: row sums."""
    duplicates: Literal["error", "sum", "first"] = "error"
    """What to do with several columns of one gene: refuse, sum their counts, or keep the first."""
    empty_samples: Literal["error", "nan"] = "error"
    """What to do with samples without any count: refuse, or give them an embedding of NaN."""
    min_cell_fraction: float = 0.0
    """Show only genes above zero in at least this share of the file's samples, 0 to 1: as shards were filtered for training."""
    n_unmasked: int | None = None
    """Genes shown to the encoder per sample, drawn with --seed. Default: all matched genes."""
    seed: int = 0
    """Seed of that draw."""
    batch_size: int = 32
    """Samples computed at a time; the result does not depend on it."""
    device: str | None = None
    """Such as cpu or cuda. Default: cuda if there is one."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_cell_fraction <= 1:
            raise ValueError(f"--min-cell-fraction must lie between 0 and 1, got {self.min_cell_fraction}")


def run(options: Options, terminal: Terminal) -> dict[str, Any]:
    """Embed the file and write the copy, whole or not at all."""
    import torch

    from txfm_data.matching import match_columns
    from txfm_data.sources.h5ad import H5adSource
    from txfm_model.model import TxFM

    out = Path(options.out)
    if out.exists():
        raise FileExistsError(f"{out}: exists already; name another --out, or remove it first")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = TxFM.from_pretrained(options.model).to(device)
    with H5adSource(
        options.file, layer=options.layer, raw=options.raw, gene_ids=options.gene_ids, symbols=options.symbols
    ) as source:
        match = match_columns(
            model.vocabulary,
            source.gene_ids,
            source.symbols,
            duplicates=options.duplicates,
            where=options.file,
        )
        terminal.say(f"matched {match.n_matched} of {len(source.gene_ids)} genes")
        tokens = _shown(options, source, match, terminal)
        embedding = _embed(options, source, match.column_of, tokens, model, terminal)
    n_nan = int((embedding != embedding).any(axis=1).sum())
    provenance = {
        "model": options.model, "vocabulary_sha256": model.vocabulary.fingerprint, "genes_matched": match.n_matched,
        "genes_in_file": len(match.token_ids), "genes_shown": int((tokens >= 0).sum()),
        "min_cell_fraction": options.min_cell_fraction, "n_unmasked": options.n_unmasked or "all shown", "seed": options.seed,
        "target_sum": model.config.target_sum, "matrix": source.matrix_name, "library_size": options.library_size or "row sums",
        **{f"model_{key}": str(value) for key, value in model.provenance.items() if isinstance(value, str | int | float)},
    }  # fmt: skip
    _write_copy(Path(options.file), out, options.embed_key, embedding, provenance)
    return {
        "out": str(out), "obsm": options.embed_key, "n_obs": len(embedding), "width": embedding.shape[1],
        "genes_matched": match.n_matched, "genes_in_file": len(match.token_ids), "genes_shown": int((tokens >= 0).sum()),
        "n_without_counts": n_nan,
    }  # fmt: skip


def _by_gene(part: Any, column_of: Any) -> Any:
    """The same counts with those of a gene's several columns in one."""
    import scipy.sparse as sp

    moved = sp.csr_matrix((part.data, column_of[part.indices], part.indptr), shape=part.shape)
    moved.sum_duplicates()
    return moved


def _shown(options: Options, source: Any, match: Any, terminal: Terminal) -> Any:
    """Token id of each column that is shown, -1 elsewhere: all matched ones, or those that enough samples express."""
    import numpy as np

    from txfm_data.sources.protocol import chunks

    if options.min_cell_fraction == 0:
        return match.token_ids
    expressed, progress = np.zeros(len(match.token_ids), np.int64), terminal.progress("counting")
    for start, part in chunks(source):
        expressed += np.bincount(_by_gene(part, match.column_of).indices, minlength=len(expressed))
        progress(start + part.shape[0], source.n_obs)
    tokens = np.where(expressed >= np.ceil(options.min_cell_fraction * source.n_obs), match.token_ids, -1)
    if not (tokens >= 0).any():
        raise ValueError(
            f"{options.file}: no matched gene is above zero in {options.min_cell_fraction:.0%} of its {source.n_obs} samples; "
            "lower --min-cell-fraction"
        )
    terminal.say(f"showing {int((tokens >= 0).sum())} of the matched genes")
    return tokens


def _embed(options: Options, source: Any, column_of: Any, tokens: Any, model: Any, terminal: Terminal) -> Any:
    import numpy as np

    from txfm_data.ingest import check_counts, library_sizes
    from txfm_data.sources.protocol import chunks
    from txfm_model.embed import embed_samples

    out = np.full((source.n_obs, model.config.width), np.nan, np.float32)
    progress = terminal.progress("embedding")
    for start, part in chunks(source, _CHUNK_BYTES):
        check_counts(part, source, start)
        size = library_sizes(source, start, part, options.library_size)
        filled = np.flatnonzero(size > 0)
        if len(filled) < len(size) and options.empty_samples == "error":
            empty = start + int(np.argmin(size > 0))
            name = source.obs(empty, empty + 1).index[0]
            raise ValueError(
                f"{options.file}: sample {name!r} has no count at all, so no library size; pass --empty-samples nan to give "
                "such samples an embedding of NaN"
            )
        part = _by_gene(part, column_of)
        for low, high in _runs(filled):
            out[start + low : start + high] = embed_samples(
                model, part[low:high], tokens, size[low:high], batch_size=options.batch_size,
                n_unmasked=options.n_unmasked, seed=options.seed, first_row=start + low,
            )  # fmt: skip
        progress(start + part.shape[0], source.n_obs)
    return out


def _runs(rows: Any) -> list[tuple[int, int]]:
    """Runs of consecutive numbers, as (first, one past the last)."""
    import numpy as np

    return [
        (int(run[0]), int(run[-1]) + 1) for run in np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1) if len(run)
    ]


def _write_copy(source: Path, out: Path, key: str, embedding: Any, provenance: dict[str, Any]) -> None:
    """Copy the file as it is and add obsm and uns; nothing of it passes through memory."""
    import h5py
    from anndata.io import write_elem

    out.parent.mkdir(parents=True, exist_ok=True)
    staging = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    try:
        shutil.copyfile(source, staging)
        with h5py.File(staging, "r+") as file:
            for group, name, value in (("obsm", key, embedding), ("uns", f"txfm_{key}", provenance)):
                if group not in file:
                    write_elem(file, group, {})
                if name in file[group]:
                    del file[group][name]
                write_elem(file[group], name, value)
        staging.rename(out)
    finally:
        staging.unlink(missing_ok=True)


def summary(result: dict[str, Any]) -> str:
    """Where the embedding is, and how many genes matched."""
    return (
        f"{result['n_obs']:,} samples x {result['width']} in obsm[{result['obsm']!r}], matched {result['genes_matched']:,} of "
        f"{result['genes_in_file']:,} genes\nfile: {result['out']}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Embed a file."""
    return run_verb("embed", Options, run, summary, argv, positionals=("file",))


if __name__ == "__main__":
    sys.exit(main())
