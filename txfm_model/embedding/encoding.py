"""Samples through the encoder: which genes are shown of each, in which views, and what the views are averaged to."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from txfm_data.progress import Progress, ignore
from txfm_model.embedding.samples import Panel, Part, part_of_rows
from txfm_model.launch import autocast
from txfm_model.model import TxFM

if TYPE_CHECKING:
    from scipy.sparse import csr_array, csr_matrix

Layer = int | Literal["final"]
Compute = Callable[[Tensor, Tensor, Panel], np.ndarray]
"""From genes shown (b, K) int64 and their values (b, K) float32 of samples of one panel to (b, width) float32."""


@dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """How samples are shown to the encoder.

    layer : "final", or a number as of `TxFM.encode`.  n_unmasked : genes shown of each sample; None shows all measured.
    views : draws of so many genes whose results are averaged.  seed : of the draws.
    temperature : 0 draws uniformly; else as in training, by how often genes were seen there.
    batch_size : samples computed at a time.  precision : bf16 autocast or none; auto takes bf16 on a GPU that has it.
    """

    layer: Layer = "final"
    n_unmasked: int | None = None
    views: int = 1
    seed: int = 0
    temperature: float = 0.0
    batch_size: int = 32
    precision: Literal["auto", "bf16", "no"] = "no"

    def __post_init__(self) -> None:
        for name in ("batch_size", "n_unmasked", "views"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.views > 1 and self.n_unmasked is None:
            raise ValueError(
                f"views is {self.views}, but all genes are shown, so that every view would be the same; give n_unmasked too"
            )
        if self.precision not in ("auto", "bf16", "no"):
            raise ValueError(f"precision must be auto, bf16 or no, got {self.precision!r}")
        if not (0 <= self.seed < 2**63):
            raise ValueError(f"seed must be 0 or more and below 2^63, got {self.seed}")


def parse_layer(text: str | int) -> Layer:
    """Read "final" or a number; what is neither is refused with the name of the option it may belong to."""
    if text == "final" or isinstance(text, int):
        return text  # type: ignore[return-value]
    if text.isdecimal():
        return int(text)
    raise ValueError(
        f'layer: expected "final" or the number of a layer of the model, got {text!r}; '
        "a layer of the AnnData object that holds the counts is named by counts_layer"
    )


def check_options(model: TxFM, options: EncodeOptions) -> None:
    """Refuse a layer or a draw that this model cannot give, before anything is read.

    Raises
    ------
    ValueError
        With what would do.
    """
    layer, last = parse_layer(options.layer), model.config.blocks + model.config.decoder_blocks
    if layer != "final" and not 0 <= layer <= last:
        raise ValueError(
            f"layer {layer} is none of this model's; take 0 to {model.config.blocks} for its encoder, up to {last} for its "
            "decoder, or final"
        )
    if options.temperature and (model.statistics is None or not model.statistics.n_measured.any()):
        raise ValueError(
            f"temperature is {options.temperature}, but this model does not say how often genes were seen in its training; "
            "draw uniformly (temperature 0)"
        )


def resolve_precision(asked: str, device: torch.device) -> Literal["bf16", "no"]:
    """Choose bf16 where it was asked for, or on a GPU that has it; else none."""
    if asked == "auto":
        return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    return "bf16" if asked == "bf16" else "no"


def n_views(options: EncodeOptions, panel: Panel) -> int:
    """Views of a sample of this panel: one where all of it is shown."""
    return options.views if options.n_unmasked is not None and options.n_unmasked < len(panel.shown) else 1


@torch.inference_mode()
def over_samples(
    model: TxFM,
    part: Part,
    panels: Sequence[Panel],
    options: EncodeOptions,
    width: int,
    compute: Compute,
    progress: Progress = ignore,
) -> np.ndarray:
    """Apply `compute` to every sample of a part and average its views, (n, width) float32; NaN for samples without counts.

    Samples of one panel are computed together, so that none is padded. The model is left in the mode it came in.
    """
    values_ND = np.full((len(part), width), np.nan, np.float32)
    device = model.head.weight.device
    was_training = model.training
    model.eval()
    done = 0
    try:
        with autocast(device, resolve_precision(options.precision, device)):
            for panel_id, rows in _batches(part, options.batch_size):
                panel = panels[panel_id]
                views = n_views(options, panel)
                values_BP = _log1p_rows(part, rows, panel.shown, model)
                total_BD = np.zeros((len(rows), width), np.float32)
                for view in range(views):
                    gene_ids_BK, values_BK = _view(model, part.row_id[rows], panel.shown, values_BP, options, view)
                    ids, values = torch.from_numpy(gene_ids_BK).to(device), torch.from_numpy(values_BK).to(device)
                    total_BD += compute(ids, values, panel)
                values_ND[rows] = total_BD / np.float32(views)
                done += len(rows)
                progress(done, len(part))
    finally:
        model.train(was_training)
    return values_ND


def _batches(part: Part, batch_size: int) -> Iterator[tuple[int, np.ndarray]]:
    """Panel and rows of each batch; samples without counts are in none."""
    filled = np.flatnonzero(part.library_size > 0)
    for panel_id in np.unique(part.panel_id[filled]):
        rows = filled[part.panel_id[filled] == panel_id]
        for start in range(0, len(rows), batch_size):
            yield int(panel_id), rows[start : start + batch_size]


def _log1p_rows(part: Part, rows: np.ndarray, genes_P: np.ndarray, model: TxFM) -> np.ndarray:
    """Values of chosen samples over the genes that may be shown, (B, P) float32, as the model's configuration makes them."""
    place = np.full(len(model.vocabulary), -1, np.int64)
    place[genes_P] = np.arange(len(genes_P))
    starts, ends = part.indptr[rows], part.indptr[rows + 1]
    sample = np.repeat(np.arange(len(rows)), ends - starts)
    begin = np.cumsum(ends - starts) - (ends - starts)
    entries = np.arange(len(sample)) + (starts - begin)[sample]
    column = place[part.token_ids[entries]]
    shown = column >= 0
    sample, column = sample[shown], column[shown]
    counts = part.counts[entries][shown].astype(np.float64)
    if model.config.preprocessing == "library_log1p":
        counts *= (model.config.target_sum / part.library_size[rows])[sample]
    values_BP = np.zeros((len(rows), len(genes_P)), np.float32)
    values_BP[sample, column] = np.log1p(counts)
    return values_BP


def _view(
    model: TxFM, row_id: np.ndarray, genes_P: np.ndarray, values_BP: np.ndarray, options: EncodeOptions, view: int
) -> tuple[np.ndarray, np.ndarray]:
    """Genes shown in a view, (B, K) int64, and their values; a function of (seed, view, row)."""
    B, P = values_BP.shape
    if options.n_unmasked is None or options.n_unmasked >= P:
        return np.tile(genes_P, (B, 1)), values_BP
    from txfm_data.kernels import draw_rows, stream_key  # numba, needed only here

    position_BK = np.empty((B, options.n_unmasked), np.uint16)
    if options.temperature == 0:
        identity, swaps = np.arange(P, dtype=np.uint16), np.empty(options.n_unmasked, np.uint32)
        draw_rows(options.seed, view, row_id, identity, swaps, position_BK)
    else:
        from txfm_data.weighted_draw import draw_weighted, inverse_weights

        if model.statistics is None:
            raise ValueError("this model has no statistics of genes to draw by; use temperature 0")
        weights, race = inverse_weights(model.statistics.n_nonzero, options.temperature), np.empty(2 * P)
        tokens = genes_P.astype(np.uint16)
        for b, row in enumerate(row_id):
            draw_weighted(np.uint64(stream_key(options.seed, view, row)), tokens, weights, race, position_BK[b])
    at = position_BK.astype(np.int64)
    return genes_P[at], np.take_along_axis(values_BP, at, axis=1)


def part_of_matrix(
    model: TxFM, counts: "csr_matrix | csr_array", token_ids: np.ndarray, library_size: np.ndarray, first_row: int = 0
) -> tuple[Part, Panel]:
    """Samples of a matrix in memory as a part, checked, and the panel of its columns.

    Parameters
    ----------
    counts
        (n, n_vars) scipy CSR. Raw counts; repeated entries are summed.
    token_ids
        (n_vars,) integer. Token id of each column, -1 where the vocabulary has no such gene.
    library_size
        (n,) float64. Counts of each sample over all genes profiled in its source, matched or not.
    first_row
        Number of the first row, for draws and messages.

    Raises
    ------
    ValueError
        On NaN, infinite or negative counts, a library size that is not above 0, columns that match no gene of the
        vocabulary, or two columns for one gene.
    """
    token_ids = np.asarray(token_ids)
    library_size = np.asarray(library_size, dtype=np.float64)
    panel = _panel_of_columns(model, counts, token_ids)
    _check_samples(counts, library_size, first_row)
    rows: Any = counts
    if not rows.has_canonical_format:
        rows = counts.copy()
        rows.sum_duplicates()
    return part_of_rows(rows, token_ids, library_size, first_row), panel


def _panel_of_columns(model: TxFM, counts: "csr_matrix | csr_array", token_ids: np.ndarray) -> Panel:
    if token_ids.shape != (counts.shape[1],):
        raise ValueError(f"token_ids: expected one for each of the {counts.shape[1]} columns, got {token_ids.shape}")
    if len(token_ids) and token_ids.max() >= len(model.vocabulary):
        raise ValueError(f"token_ids: {token_ids.max()} is not in the vocabulary of {len(model.vocabulary)} genes")
    genes = np.sort(token_ids[token_ids >= 0]).astype(np.int64)
    if len(genes) == 0:
        raise ValueError(
            f"none of the {counts.shape[1]} genes is in the model's vocabulary of {len(model.vocabulary)}; "
            f"check that ids are Ensembl gene ids of the same species"
        )
    twice = genes[1:][genes[1:] == genes[:-1]]
    if len(twice):
        raise ValueError(
            f"{len(twice)} gene(s) have more than one column, for example "
            f"{model.vocabulary.gene_ids[twice[0]]}; keep one column for each gene"
        )
    return Panel(name="the matrix", measured=genes, shown=genes, n_genes=counts.shape[1], n_obs=counts.shape[0])


def _check_samples(counts: "csr_matrix | csr_array", library_size: np.ndarray, first_row: int) -> None:
    if counts.format != "csr":
        raise TypeError(f"counts must be a scipy CSR matrix, got format {counts.format}; call .tocsr()")
    if library_size.shape != (counts.shape[0],):
        raise ValueError(f"library_size: expected one for each of {counts.shape[0]} rows, got {library_size.shape}")
    bad_entries = np.flatnonzero(~(np.isfinite(counts.data) & (counts.data >= 0)))
    if len(bad_entries):
        row = int(np.searchsorted(counts.indptr, bad_entries[0], side="right")) - 1 + first_row
        value = counts.data[bad_entries[0]]
        raise ValueError(f"row {row}: counts must be finite and not negative, got {value}; embed raw counts")
    bad_rows = np.flatnonzero(~(np.isfinite(library_size) & (library_size > 0)))
    if len(bad_rows):
        raise ValueError(
            f"row {bad_rows[0] + first_row}: library size must be above 0, got {library_size[bad_rows[0]]} "
            f"({len(bad_rows)} such row(s)); remove samples without counts"
        )
