"""Small simulated sources of a corpus in their true formats, at the places where a build looks for them.

Each dataset gets its own draw of counts over a part of one set of genes, with the labels that its ingest names. Nothing in it is
measured. For trying a corpus file, and for tests, before hundreds of gigabytes are downloaded.
"""

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

if TYPE_CHECKING:
    import pandas as pd

    from txfm_data.corpora.recipe import Corpus, CorpusDataset

_TYPES, _BATCHES, _PERTURBATIONS = 3, 6, 6
_CONTROL_SHARE = 0.2
_SHARE_MEASURED = 0.7
_DEPTH = {"sc": 4.0, "bulk": 400.0}
"""Mean count of a gene; depths vary between samples by a factor of about two (single cells, 0.7 on the log scale)."""
_DEPTH_SD = {"sc": 0.7, "bulk": 0.2}
_GENE_MODEL = "# gene-model: GENCODE v36"
_GDC_HEADER = (
    "gene_id gene_name gene_type unstranded stranded_first stranded_second tpm_unstranded fpkm_unstranded "
    "fpkm_uq_unstranded"
)
_GDC_SUMS = ("N_unmapped", "N_multimapping", "N_noFeature", "N_ambiguous")
_GDC_SHEET = ("File ID", "File Name", "Data Category", "Data Type", "Project ID", "Case ID", "Sample ID", "Sample Type")
_SHEET_LABELS = tuple(name.lower().replace(" ", "_") for name in _GDC_SHEET)


@dataclass(frozen=True)
class SmallSource:
    """One small dataset in memory.

    counts : (n, P) int32 CSR.  gene_ids : without version.  labels : one row a sample, the index its names.
    """

    counts: sp.csr_matrix
    gene_ids: tuple[str, ...]
    symbols: tuple[str, ...]
    labels: "pd.DataFrame"


def write_small_sources(
    corpus: "Corpus", folder: str | Path, *, samples: int = 240, genes: int = 300, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Write every dataset of a corpus as a small file of its own kind below `folder`.

    samples : of each single-cell dataset; a bulk one gets a quarter.  genes : of all datasets together; each measures a part.

    Returns
    -------
    dict
        For each dataset: kind, path, n_obs, n_vars.

    Raises
    ------
    ValueError
        If a dataset is read from a service, so that there is no file to write, or a size is too small.
    """
    if samples < 40 or genes < 40:
        raise ValueError(f"samples and genes must be at least 40, got {samples} and {genes}")
    folder, written = Path(folder), {}
    for number, dataset in enumerate(corpus.datasets):
        n = samples if dataset.modality == "sc" else max(24, samples // 4)
        small = draw_small(dataset, number, n, genes, seed)
        path = folder / str(dataset.ingest.get("path", ""))
        _write(dataset, small, path, folder)
        written[dataset.name] = {
            "kind": dataset.kind, "path": str(path), "n_obs": n, "n_vars": small.counts.shape[1],
        }  # fmt: skip
    return written


def draw_small(dataset: "CorpusDataset", number: int, n_obs: int, n_genes: int, seed: int) -> SmallSource:
    """Counts and labels of one dataset; a function of its arguments alone.

    number : of the dataset in its corpus.
    """
    import pandas as pd

    rng = np.random.default_rng([seed, 3, number])
    panel = np.sort(rng.permutation(n_genes)[: max(40, int(n_genes * _SHARE_MEASURED))])
    cell_type, batch = (rng.permutation(np.arange(n_obs) % k) for k in (_TYPES, _BATCHES))
    perturbation = np.where(rng.random(n_obs) < _CONTROL_SHARE, 0, 1 + rng.permutation(n_obs) % _PERTURBATIONS)
    base = np.random.default_rng([seed, 1]).normal(0.0, 1.0, n_genes)[panel]
    effects = np.random.default_rng([seed, 2]).normal(0.0, 1.0, (_TYPES + _PERTURBATIONS + 1, n_genes))[:, panel]
    shift = effects[cell_type] * 0.5
    if dataset.ingest.get("perturbation") is not None:
        strong = (perturbation > 0) & (perturbation <= _PERTURBATIONS // 2)  # the others do nothing
        shift += np.where(strong[:, None], effects[_TYPES + perturbation], 0.0)
    depth = _DEPTH[dataset.modality] * np.exp(rng.normal(0.0, _DEPTH_SD[dataset.modality], (n_obs, 1)))
    counts = rng.poisson(depth * np.exp(base + shift - 0.5)).astype(np.int32)
    counts[counts.sum(axis=1) == 0, 0] = 1  # a sample without counts has no profile
    given = dataset.ingest
    labels: dict[str, Sequence[Any]] = {}
    if given.get("batch") is not None:
        labels[str(given["batch"])] = [f"batch{b}" for b in batch]
    if given.get("cell_type") is not None:
        labels[str(given["cell_type"])] = [f"type{t}" for t in cell_type]
    if given.get("perturbation") is not None:
        labels[str(given["perturbation"])] = [str(given["control"]) if p == 0 else f"SIM{p:05d}" for p in perturbation]
    names = [f"{dataset.name}-{row}" for row in range(n_obs)]
    return SmallSource(
        sp.csr_matrix(counts), tuple(f"ENSG{99_000_000_001 + g:011d}" for g in panel),
        tuple(f"SIM{g + 1:05d}" for g in panel), pd.DataFrame(labels, index=pd.Index(names, dtype=object)),
    )  # fmt: skip


def _write(dataset: "CorpusDataset", small: SmallSource, path: Path, folder: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    match dataset.kind:
        case "h5ad":
            write_h5ad(dataset, small, path)
        case "10x":
            (write_tenx_h5 if path.suffix == ".h5" else write_mtx)(small, path)
        case "gct":
            write_gct(small, path)
        case "star":
            write_star(dataset, small, path, folder / str(dataset.ingest.get("sample_sheet", "sample_sheet.tsv")))
        case "table":
            write_table(dataset, small, path)
        case kind:
            raise ValueError(f"dataset {dataset.name}: kind {kind} is read from a service; there is no file to write")
    for key, write in (("sample_table", _write_labels), ("gene_map", _write_gene_map)):
        if dataset.ingest.get(key) is not None:
            write(dataset, small, folder / str(dataset.ingest[key]))


def _text(path: Path, lines: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(data, 1, mtime=0) if path.suffix == ".gz" else data)


def _named(dataset: "CorpusDataset", small: SmallSource) -> list[str]:
    """Names of the genes as the source has them."""
    if dataset.gene_ids == "symbol":
        return list(small.symbols)
    return [f"{gene}.1" for gene in small.gene_ids] if dataset.gene_ids == "ensembl_version" else list(small.gene_ids)


def write_h5ad(dataset: "CorpusDataset", small: SmallSource, path: Path) -> None:
    """An h5ad: dense where the corpus says so of the source, else CSR; labels in obs, names of genes where the ingest looks."""
    import anndata as ad
    import pandas as pd

    given, counts = dataset.ingest, small.counts.astype(np.float32)
    x = counts.toarray() if dataset.source.matrix == "dense" else counts
    var = pd.DataFrame({given.get("symbols") or "gene_name": small.symbols}, index=_named(dataset, small))
    if given.get("gene_ids") is not None:
        var[str(given["gene_ids"])] = _named(dataset, small)
        var.index = pd.Index(small.symbols)
    adata = ad.AnnData(x, small.labels.copy(), var)
    if given.get("layer") is not None:
        adata.layers[str(given["layer"])] = x
        adata.X = np.log1p(x)
    if given.get("raw"):
        adata.raw = adata.copy()
        adata.X = np.log1p(x)
    adata.write_h5ad(path)


def write_mtx(small: SmallSource, path: Path) -> None:
    """The folder of CellRanger 3: matrix.mtx, barcodes.tsv and features.tsv, all gzip."""
    entries = small.counts.T.tocoo()
    head = ["%%MatrixMarket matrix coordinate integer general", f"{entries.shape[0]} {entries.shape[1]} {entries.nnz}"]
    body = [f"{g + 1} {c + 1} {v}" for g, c, v in zip(entries.row, entries.col, entries.data, strict=True)]
    genes = zip(small.gene_ids, small.symbols, strict=True)
    _text(path / "matrix.mtx.gz", [*head, *body])
    _text(path / "barcodes.tsv.gz", list(small.labels.index))
    _text(path / "features.tsv.gz", [f"{gene}\t{symbol}\tGene Expression" for gene, symbol in genes])


def write_tenx_h5(small: SmallSource, path: Path) -> None:
    """The h5 file of CellRanger 3."""
    import h5py

    n_obs, n_genes = small.counts.shape
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        group["data"], group["indices"] = small.counts.data.astype(np.int32), small.counts.indices.astype(np.int64)
        group["indptr"], group["shape"] = small.counts.indptr.astype(np.int64), np.array([n_genes, n_obs], np.int32)
        group["barcodes"] = np.array(list(small.labels.index), "S")
        for name, values in (
            ("id", small.gene_ids), ("name", small.symbols), ("feature_type", ("Gene Expression",) * n_genes),
            ("genome", ("GRCh38",) * n_genes),
        ):  # fmt: skip
            group[f"features/{name}"] = np.array(values, "S")


def write_gct(small: SmallSource, path: Path) -> None:
    """A GCT 1.2 file as GTEx has it: genes x samples, ids with version in Name, symbols in Description."""
    dense = small.counts.toarray().T
    lines = ["#1.2", f"{dense.shape[0]}\t{dense.shape[1]}", "\t".join(["Name", "Description", *small.labels.index])]
    for gene, symbol, row in zip(small.gene_ids, small.symbols, dense, strict=True):
        lines.append("\t".join([f"{gene}.1", symbol, *map(str, row)]))
    _text(path, lines)


def write_star(dataset: "CorpusDataset", small: SmallSource, path: Path, sheet: Path) -> None:
    """A folder a file as gdc-client leaves them, and the sample sheet; the batch is the project."""
    head = [_GENE_MODEL, _GDC_HEADER.replace(" ", "\t")]
    head += [f"{name}\t\t\t{10 * at + 1}\t{10 * at + 2}\t{10 * at + 3}\t\t\t" for at, name in enumerate(_GDC_SUMS)]
    batch = dataset.ingest.get("batch")
    projects = small.labels[batch].tolist() if batch in small.labels else ["batch0"] * small.counts.shape[0]
    rows = ["\t".join(_GDC_SHEET)]
    for number, (sample, values) in enumerate(zip(small.labels.index, small.counts.toarray(), strict=True)):
        file = f"{number:08d}.rna_seq.augmented_star_gene_counts.tsv"
        genes = zip(small.gene_ids, small.symbols, values.tolist(), strict=True)
        body = [
            f"{gene}.1\t{symbol}\tprotein_coding\t{v}\t{v // 2}\t{v - v // 2}\t0\t0\t0" for gene, symbol, v in genes
        ]
        _text(path / f"id-{number}" / file, [*head, *body])
        kinds = ("Transcriptome Profiling", "Gene Expression Quantification", f"TCGA-{projects[number].upper()}")
        rows.append("\t".join([f"id-{number}", file, *kinds, f"TCGA-{number}", sample, "Primary Tumor"]))
    _text(sheet, rows)


def write_table(dataset: "CorpusDataset", small: SmallSource, path: Path) -> None:
    """A table of counts, by tabs or by commas as the name of the file ends, the way round that the ingest says."""
    separator = "," if ".csv" in path.suffixes else "\t"
    names, samples, dense = _named(dataset, small), list(small.labels.index), small.counts.toarray()
    if dataset.ingest.get("orientation") == "genes-by-samples":
        symbols = [str(dataset.ingest["symbol_column"])] if dataset.ingest.get("symbol_column") else []
        lines = [separator.join(["gene", *symbols, *samples])]
        for name, symbol, row in zip(names, small.symbols, dense.T, strict=True):
            lines.append(separator.join([name, *([symbol] if symbols else []), *map(str, row)]))
    else:
        lines = [separator.join(["sample", *names])]
        lines += [separator.join([name, *map(str, row)]) for name, row in zip(samples, dense, strict=True)]
    _text(path, lines)


def _write_labels(dataset: "CorpusDataset", small: SmallSource, path: Path) -> None:
    labels, separator = small.labels, "," if ".csv" in path.suffixes else "\t"
    if dataset.kind == "star":  # what the sample sheet says already
        labels = labels.drop(columns=[name for name in labels.columns if name in _SHEET_LABELS])
    lines = [separator.join(["sample", *labels.columns])]
    lines += [separator.join([name, *map(str, row)]) for name, row in zip(labels.index, labels.to_numpy(), strict=True)]
    _text(path, lines)


def _write_gene_map(dataset: "CorpusDataset", small: SmallSource, path: Path) -> None:
    """Symbols and ids, added to those that are there: datasets may share a map."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else ["gene_id\tgene_name"]
    known = set(lines)
    new = (f"{gene}\t{symbol}" for gene, symbol in zip(small.gene_ids, small.symbols, strict=True))
    _text(path, lines + [line for line in new if line not in known])
