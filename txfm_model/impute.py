"""Predicted expression of chosen genes, measured or not: what the decoder makes of a sample's embedding."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from txfm_data.matching import Duplicates, NonInteger
from txfm_data.progress import Progress, ignore
from txfm_data.vocabulary import Vocabulary, is_ensembl_gene
from txfm_model.embed import part_of_anndata
from txfm_model.embedding.encoding import EncodeOptions, check_options, over_samples
from txfm_model.embedding.over_files import FileOptions, run_file
from txfm_model.embedding.samples import Panel, SampleInput
from txfm_model.model import TxFM

if TYPE_CHECKING:
    from txfm_data.anndata_out import Matrix
    from txfm_model.embedding.encoding import Compute

LAYER = "txfm_predicted"
"""Layer that holds the predictions."""
UNS = "txfm_impute"
WARNING = (
    "These values are predictions of a model, not measurements. They are smoother than data: do not test them for differential "
    "expression, and do not count them as evidence that a gene is expressed. Of genes that the dataset did not measure, no "
    "prediction was ever checked on this dataset."
)


def choose_genes(vocabulary: Vocabulary, genes: Sequence[str]) -> np.ndarray:
    """Token ids of genes named by Ensembl id (version ignored) or symbol, in the order given, (n,) int64.

    Raises
    ------
    ValueError
        If none is named, one is unknown, ambiguous or named twice; with the names near to it.
    """
    names = [name.strip() for name in genes if name.strip()]
    if not names:
        raise ValueError("no gene is named; give Ensembl ids or symbols")
    tokens = np.where(
        [is_ensembl_gene(name) for name in names], vocabulary.index_of(names), vocabulary.index_of_symbols(names)
    ).astype(np.int64)
    unknown = [name for name, token in zip(names, tokens, strict=True) if token < 0]
    if unknown:
        raise ValueError(_unknown(vocabulary, unknown))
    seen: dict[int, str] = {}
    for name, token in zip(names, tokens.tolist(), strict=True):
        if token in seen:
            raise ValueError(f"{seen[token]} and {name} name the same gene, {vocabulary.gene_ids[token]}; name it once")
        seen[token] = name
    return tokens


def _unknown(vocabulary: Vocabulary, unknown: list[str]) -> str:
    name = unknown[0]
    several = [gene for gene, symbol in zip(vocabulary.gene_ids, vocabulary.symbols, strict=True) if symbol == name]
    if len(several) > 1:
        return (
            f"the symbol {name} names {len(several)} genes of the model; name one of {', '.join(several[:5])} by its id"
        )
    pool = [*vocabulary.gene_ids] if is_ensembl_gene(name) else [symbol for symbol in vocabulary.symbols if symbol]
    near = difflib.get_close_matches(name, pool, n=3, cutoff=0.6)
    by_case = {gene.upper(): gene for gene in pool}
    if not near and name.upper() in by_case:
        near = [by_case[name.upper()]]
    hint = f"; did you mean {' or '.join(near)}?" if near else f"; it knows for example {', '.join(pool[:3])}"
    more = f" ({len(unknown)} names are unknown: {', '.join(unknown[:5])})" if len(unknown) > 1 else ""
    return f"the model knows no gene {name} among its {len(vocabulary):,}{more}{hint}"


def read_gene_list(path: str | Path) -> list[str]:
    """Names from a text file: the first word of each line; empty lines and those that begin with # say nothing.

    Raises
    ------
    ValueError, OSError
        If the file cannot be read as text.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file ({error}); give one gene on each line") from error
    words = [line.replace(",", " ").split() for line in lines if not line.lstrip().startswith("#")]
    return [word[0] for word in words if word]


def predictor_of(model: TxFM, tokens: np.ndarray) -> "Compute":
    """Return the function that predicts chosen genes of shown samples: ln(1 + normalised count), float32.

    Under the activation softmax the counts are shared among the genes that the dataset measured and the chosen ones.
    """
    device = model.head.weight.device
    chosen_g = torch.from_numpy(tokens).to(device)

    def predict(gene_ids_BK: Tensor, values_BK: Tensor, panel: Panel) -> np.ndarray:
        cls_BD = model.encode(gene_ids_BK, values_BK)
        measured_BG = None
        if model.config.activation == "softmax":
            measured_G = torch.zeros(len(model.vocabulary), dtype=torch.bool, device=device)
            measured_G[torch.from_numpy(panel.measured).to(device)] = True
            measured_G[chosen_g] = True
            measured_BG = measured_G.expand(len(cls_BD), -1)
        found: np.ndarray = model.decode(cls_BD, measured_BG=measured_BG).log1p_BG[:, chosen_g].float().cpu().numpy()
        return found

    return predict


def impute_anndata(
    model: TxFM,
    adata: Any,
    genes: Sequence[str],
    *,
    counts_layer: str | None = None,
    gene_ids: str | None = None,
    symbols: str | None = None,
    library_size: str | None = None,
    duplicates: Duplicates = "error",
    non_integer: NonInteger = "error",
    n_unmasked: int | None = None,
    views: int = 1,
    seed: int = 0,
    temperature: float = 0.0,
    batch_size: int = 32,
    precision: Literal["auto", "bf16", "no"] = "no",
    dtype: Literal["float32", "float16"] = "float32",
    progress: Progress = ignore,
) -> Any:
    """Predict chosen genes for the samples of an AnnData object in memory; `impute_file` does the same for what is larger.

    Parameters
    ----------
    adata
        An `anndata.AnnData` with raw counts.
    genes
        Ensembl ids or symbols, of genes that `adata` has and of others that the model knows.
    counts_layer, gene_ids, symbols, library_size, duplicates, non_integer, n_unmasked, views, seed, temperature, batch_size,
    precision, dtype
        As in `txfm_model.embed.embed_anndata`.

    Returns
    -------
    anndata.AnnData
        Its obs, the chosen genes as var (symbol, measured, measured_fraction), ``layers["txfm_predicted"]`` with the
        predicted ln(1 + normalised count), and the warning that goes with it in ``uns["txfm_impute"]``.

    Raises
    ------
    KeyError, ValueError
        If a gene or a named column does not exist, nothing matches, or values cannot be counts.
    """
    from txfm_data.anndata_out import predicted_anndata

    tokens = choose_genes(model.vocabulary, genes)
    options = EncodeOptions(
        n_unmasked=n_unmasked,
        views=views,
        seed=seed,
        temperature=temperature,
        batch_size=batch_size,
        precision=precision,
    )
    check_options(model, options)
    part, panel = part_of_anndata(
        model, adata, counts_layer=counts_layer, gene_ids=gene_ids, symbols=symbols, library_size=library_size,
        duplicates=duplicates, non_integer=non_integer,
    )  # fmt: skip
    values = over_samples(model, part, [panel], options, len(tokens), predictor_of(model, tokens), progress)
    var = _var(model.vocabulary, tokens, (panel,))
    uns = {UNS: {"warning": WARNING, "unit": _unit(model), "views": views, "seed": seed}}
    return predicted_anndata(adata.obs.copy(), var, LAYER, values.astype(dtype, copy=False), uns)


def impute_file(
    model: TxFM,
    source: str | Path,
    out: str | Path,
    genes: Sequence[str],
    *,
    options: EncodeOptions | None = None,
    files: FileOptions | None = None,
) -> dict[str, Any]:
    """Predict chosen genes for all samples of a file, store or shard corpus, in bounded memory.

    The result is a new AnnData file: obs as in the input, the chosen genes as var, and the layer ``txfm_predicted``.

    Parameters
    ----------
    source
        An h5ad file, AnnData in Zarr, a store or a shard corpus.
    out
        Name that ends in .h5ad or .zarr; there must be nothing yet.
    genes
        Ensembl ids or symbols, measured or not.
    options, files
        How samples are shown, and how files are read and written.

    Returns
    -------
    dict
        out, layer_out, genes, genes_measured, warning and what else `run_file` returns; empty but for the first process.

    Raises
    ------
    FileExistsError, FileNotFoundError, ValueError, OSError
        With nothing left at `out` or beside it.
    """
    tokens = choose_genes(model.vocabulary, genes)
    options, files = options or EncodeOptions(), files or FileOptions()
    if options.layer != "final":
        raise ValueError(f"layer {options.layer}: predictions come from the last layer alone; leave it out")
    files.say(f"warning: {WARNING}")
    measured = 0

    def write(opened: SampleInput, path: Path, matrix: "Matrix", about: dict[str, Any]) -> None:
        from txfm_data.anndata_out import write_anndata

        nonlocal measured
        var = _var(model.vocabulary, tokens, opened.panels)
        measured = int(var["measured"].sum())
        uns = {UNS: {**about, "warning": WARNING, "unit": _unit(model)}}
        write_anndata(path, n_obs=opened.n_obs, obs=opened.obs(), var=var, matrices=[matrix], uns=uns)

    result = run_file(
        model, source, out, element=f"layers/{LAYER}", width=len(tokens), compute=predictor_of(model, tokens),
        options=options, files=files, write=write,
    )  # fmt: skip
    if not result:
        return {}
    return {**result, "predicted": LAYER, "genes": len(tokens), "genes_measured": measured, "warning": WARNING}


def _unit(model: TxFM) -> str:
    if model.config.preprocessing == "log1p":
        return "ln(1 + count)"
    return f"ln(1 + {model.config.target_sum:g} x count / library size)"


def _var(vocabulary: Vocabulary, tokens: np.ndarray, panels: Sequence[Panel]) -> Any:
    """Data frame of the chosen genes: whether all samples measured them, and what share of the datasets' samples did."""
    import pandas as pd

    n_obs = np.array([panel.n_obs for panel in panels], np.float64)
    measured_Ng = np.stack([np.isin(tokens, panel.measured) for panel in panels])
    return pd.DataFrame(
        {
            "symbol": [vocabulary.symbols[token] for token in tokens],
            "measured": measured_Ng.all(axis=0),
            "measured_fraction": (n_obs @ measured_Ng) / max(n_obs.sum(), 1.0),
        },
        index=pd.Index([vocabulary.gene_ids[token] for token in tokens]),
    )
