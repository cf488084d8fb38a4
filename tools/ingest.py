"""Ingest count matrices into a store."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

if __package__ in (None, ""):  # run as a file from a checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tools.runner import Terminal, run_kinds, run_verb
from tools.sizes import parse_size


@dataclass(frozen=True, kw_only=True)
class _Common:
    """What every kind of source shares."""

    store: str
    """Folder of the store, or its address (s3://bucket/name); made if there is none."""
    backend: Literal["soma", "zarr"] = "soma"
    """Backend of a store that this ingest makes: TileDB-SOMA, Census-shaped; or Zarr v3, which anndata.read_zarr opens."""
    batch: str | None = None
    """Label of the samples with experimental batches, which are held out whole for validation. Default: one batch."""
    perturbation: str | None = None
    """Label with the perturbation of each sample; goes with --control."""
    control: str | None = None
    """Value of the perturbation label that marks unperturbed samples."""
    cell_type: str | None = None
    """Label with cell types."""
    obs_columns: tuple[str, ...] | None = None
    """Labels to keep besides those named above; the word none for no others. Default: all of the source."""
    gene_map: str | None = None
    """Table of symbols and Ensembl ids: a 10x features file or any two columns. Default: the store's own genes."""
    min_matched: float = 0.5
    """Least fraction of the source's genes, 0 to 1, that must match an Ensembl id."""
    duplicates: Literal["error", "sum", "first"] = "error"
    """What to do with several columns of one gene id: refuse, sum their counts, or keep the first."""
    empty_samples: Literal["error", "drop"] = "error"
    """What to do with samples without any count: refuse, or leave them out and say how many (reads the source twice)."""
    other_organisms: Literal["error", "drop"] = "error"
    """What to do with genes of other organisms, which a store does not hold: refuse, or leave them out and say how many."""
    workers: int = 0
    """Processes on this machine that read and write blocks; 0 works in this process, without Dask."""
    dask_scheduler: str | None = None
    """Address of a Dask scheduler (tcp://host:8786) whose workers see the same files, in place of --workers."""
    memory_budget: str = "2GiB"
    """Memory for all of it, such as 2GiB; blocks are sized to stay within it."""
    dry_run: bool = False
    """Write nothing: say what would be read, written and needed."""


@dataclass(frozen=True, kw_only=True)
class _Counts:
    """What the sources that are files share."""

    dataset: str
    """Name of the dataset in the store: letters, digits, '-', '_' and '.'."""
    values: Literal["counts", "normalized"]
    """What the matrix holds. `counts`: raw counts, checked value by value. `normalized`: no counts; training refuses them."""
    non_integer: Literal["error", "ok"] = "error"
    """Whether counts may be expected counts that are not whole (RSEM, salmon); such a store keeps float64."""
    library_size: str | None = None
    """Label with the counts of the whole library, for files that hold a slice of the genes. Default: sums over the file."""


@dataclass(frozen=True, kw_only=True)
class H5adOptions(_Counts, _Common):
    """Ingest an h5ad file as one dataset of a store, all or nothing, in bounded memory."""

    file: str
    """The h5ad file, or its address (s3://bucket/file.h5ad)."""
    layer: str | None = None
    """Layer to read in place of X."""
    raw: bool = False
    """Read raw.X in place of X."""
    gene_ids: str | None = None
    """Column of var with Ensembl gene ids, with or without version. Default: the index of var."""
    symbols: str | None = None
    """Column of var with gene symbols. Default: feature_name, gene_symbol(s), symbol or gene_name, whichever is there."""
    modality: Literal["sc", "bulk"] = "sc"
    """`sc`: single cells. `bulk`: bulk RNA-seq profiles."""


@dataclass(frozen=True, kw_only=True)
class TenxOptions(_Counts, _Common):
    """Ingest a 10x Genomics .h5 file or mtx folder as one dataset of a store."""

    path: str
    """The .h5 file, or the folder with matrix.mtx, barcodes.tsv and features.tsv (each with or without .gz)."""
    feature_type: str = "Gene Expression"
    """Features to keep; others (antibodies, guides) are counted and left out."""
    genome: str | None = None
    """Genome to keep, where the file holds several."""
    sample_table: str | None = None
    """TSV or CSV with labels of the samples; its first column holds the barcodes."""
    modality: Literal["sc", "bulk"] = "sc"
    """`sc`: single cells. `bulk`: bulk RNA-seq profiles."""


@dataclass(frozen=True, kw_only=True)
class GctOptions(_Counts, _Common):
    """Ingest a GCT file of gene counts, as GTEx gives them, as one dataset of a store."""

    file: str
    """The .gct or .gct.gz file."""
    sample_table: str | None = None
    """TSV or CSV with labels of the samples (GTEx: the sample attributes); its first column holds their names."""
    modality: Literal["sc", "bulk"] = "bulk"
    """`sc`: single cells. `bulk`: bulk RNA-seq profiles."""


@dataclass(frozen=True, kw_only=True)
class StarOptions(_Counts, _Common):
    """Ingest a folder of STAR gene counts, as the GDC gives TCGA, as one dataset of a store."""

    folder: str
    """The folder; files may lie in one subfolder each."""
    sample_sheet: str | None = None
    """The GDC's sample sheet (TSV), which names the sample of each file and gives its labels."""
    column: Literal["unstranded", "stranded_first", "stranded_second"] = "unstranded"
    """Which counts to read."""
    sample_name: str = "sample_id"
    """Column of the sample sheet that names the samples; file_id where one sample has several files."""
    sample_table: str | None = None
    """TSV or CSV with further labels; its first column holds the samples' names."""
    modality: Literal["sc", "bulk"] = "bulk"
    """`sc`: single cells. `bulk`: bulk RNA-seq profiles."""


@dataclass(frozen=True, kw_only=True)
class TableOptions(_Counts, _Common):
    """Ingest a TSV or CSV matrix as one dataset of a store."""

    file: str
    """The table, plain or gzip; its first column names the rows."""
    orientation: Literal["genes-by-samples", "samples-by-genes"]
    """What the rows and the columns are."""
    symbol_column: str | None = None
    """Column with gene symbols (genes-by-samples)."""
    skip_columns: tuple[str, ...] = ()
    """Columns that are no samples, such as featureCounts' Chr, Start, End, Strand and Length (genes-by-samples)."""
    sample_table: str | None = None
    """TSV or CSV with labels of the samples; its first column holds their names."""
    modality: Literal["sc", "bulk"] = "bulk"
    """`sc`: single cells. `bulk`: bulk RNA-seq profiles."""


@dataclass(frozen=True, kw_only=True)
class CensusOptions(_Common):
    """Ingest a slice of the CELLxGENE Census, or of a store of the same shape, one dataset of the store for each of its datasets.

    A dataset that the store holds already from the same slice is left as it is, so a run that was stopped goes on where it was.
    """

    version: str | None = None
    """Census release: a build date such as 2025-11-08, `stable` or `latest`; resolved once and recorded."""
    uri: str | None = None
    """Folder or address of a Census-shaped collection, in place of --version; needs no network."""
    organism: str = "homo_sapiens"
    """Organism of the slice."""
    obs_filter: str | None = None
    """Cells to take, in the Census' language: "tissue_general == 'lung' and assay in ['10x 3\\' v3']"."""
    var_filter: str | None = None
    """Genes to take, in the same language. Library sizes stay those of all genes (raw_sum)."""
    dataset_ids: str | None = None
    """File with one Census dataset id a line; others are left out."""
    max_samples: int | None = None
    """Largest number of cells: a seeded random subset of the slice. Default: all."""
    seed: int = 0
    """Seed of that subset."""
    include_non_primary: bool = False
    """Take cells that are copies of cells in other datasets too (is_primary_data == False)."""
    cell_type: str | None = "cell_type"
    """Label with cell types."""
    empty_samples: Literal["error", "drop"] = "drop"
    """What to do with samples whose raw_sum is zero: refuse, or leave them out and say how many."""
    tiledb_config: tuple[str, ...] = ()
    """Settings of TileDB, such as vfs.s3.region=eu-west-1 or vfs.s3.proxy_host=proxy.example; HTTPS_PROXY is honoured."""


@dataclass(frozen=True, kw_only=True)
class ListOptions(_Common):
    """Ingest several sources that a YAML file lists, each as one dataset, all of them or none, side by side with --workers.

    Each entry names its kind (h5ad, 10x, gct, star or table), path, dataset and values, and any option of that kind, spelled with
    underscores. Options given here hold for entries that do not say otherwise.
    """

    file: str
    """The YAML file: a list of entries such as {kind: h5ad, path: a.h5ad, dataset: a, values: counts, batch: plate}."""


def _ingest(call: str, positional: tuple[str, ...], arguments: dict[str, Any], terminal: Terminal) -> dict[str, Any]:
    """Call the function of that name in `txfm_data.ingest` with the options as its arguments."""
    from txfm_data import ingest
    from txfm_data.parallel import Workers

    n, scheduler, memory = (arguments.pop(name) for name in ("workers", "dask_scheduler", "memory_budget"))
    arguments["workers"] = Workers(n=n, scheduler=scheduler, memory=parse_size(memory))
    if arguments["obs_columns"] == ("none",):
        arguments["obs_columns"] = ()
    if "tiledb_config" in arguments:
        arguments["tiledb_config"] = _settings(arguments["tiledb_config"])
    given = [arguments.pop(name) for name in positional]
    result = getattr(ingest, call)(*given, **arguments, progress=terminal.progress("ingesting", "samples"))
    for found in result.get("datasets", [result]):
        terminal.say(f"{found['dataset']}: matched {found['genes_matched']} of {found['genes_in_file']} genes")
    return dict(result)


def _run(call: str, *positional: str) -> Callable[[Any, Terminal], dict[str, Any]]:
    """What runs one kind of source."""

    def run(options: Any, terminal: Terminal) -> dict[str, Any]:
        return _ingest(call, positional, vars(options).copy(), terminal)

    return run


def _settings(pairs: tuple[str, ...]) -> dict[str, str]:
    """KEY=VALUE pairs as a dict."""
    wrong = [pair for pair in pairs if "=" not in pair]
    if wrong:
        raise ValueError(
            f"--tiledb-config takes KEY=VALUE, such as vfs.s3.region=eu-west-1; got {wrong[0].partition('=')[0]!r}"
        )
    return dict(pair.split("=", 1) for pair in pairs)


run_h5ad = _run("h5ad", "file", "store", "dataset")
run_tenx = _run("tenx", "path", "store", "dataset")
run_gct = _run("gct", "file", "store", "dataset")
run_star = _run("star", "folder", "store", "dataset")
run_table = _run("table", "file", "store", "dataset")
run_census = _run("census", "store")


def run_list(options: ListOptions, terminal: Terminal) -> dict[str, Any]:
    """Ingest the sources of a list."""
    arguments = vars(options).copy()
    arguments["sources"] = _read_list(arguments.pop("file"))
    return _ingest("many", ("sources", "store"), arguments, terminal)


def _read_list(name: str) -> list[dict[str, Any]]:
    from txfm_data.yaml_file import read_yaml

    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give a YAML file with a list of sources")
    entries = read_yaml(path)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(
            f"{path}: expected a list of entries, such as: - {{kind: h5ad, path: a.h5ad, dataset: a, values: counts}}"
        )
    for at, entry in enumerate(entries):
        if entry.get("values") not in ("counts", "normalized"):
            raise ValueError(
                f"{path}: entry {at + 1} must say what its matrix holds, values: counts or values: normalized"
            )
    return entries


def summary(result: dict[str, Any]) -> str:
    """A line a dataset, and where the store is; of a dry run, what it would read, write and need."""
    if "datasets" not in result:
        return f"{_line(result)}\nstore: {result['store']}"
    lines = _plan(result) if "plan" in result else []
    lines += [_line(found) for found in result["datasets"]]
    if result.get("there_already"):
        lines.append(f"already there: {', '.join(result['there_already'])}")
    return "\n".join([*lines, f"store: {result['store']}"])


def _plan(result: dict[str, Any]) -> list[str]:
    """What a slice of the Census is: datasets as a table if nothing was ingested yet."""
    lines = []
    for key, value in result["plan"].items():
        if key == "datasets" or value in (None, []):
            continue
        if key.startswith("bytes_"):
            value = f"{value / 1e9:,.2f} GB"
        elif isinstance(value, int):
            value = f"{value:,}"
        lines.append(f"{key.replace('_', ' ')}: {', '.join(map(str, value)) if isinstance(value, list) else value}")
    if result.get("dry_run"):
        lines.append(f"memory budget: {result['memory_bytes'] / 1e9:,.2f} GB")
        for part in result["plan"]["datasets"]:
            lines.append(
                f"  {part['dataset_id']}: {part['n_obs']:,} samples x {part['n_panel']:,} genes, {part['title']}"
            )
        lines.append("dry run, nothing written")
    return lines


def _line(found: dict[str, Any]) -> str:
    genes = f"matched {found['genes_matched']:,} of {found['genes_in_file']:,} columns"
    if found["genes_of_other_organisms"]:
        genes += f", left out {found['genes_of_other_organisms']:,} of other organisms"
    if found.get("dry_run"):
        return (
            f"{found['dataset']} (dry run, nothing written): {found['n_obs']:,} samples x {found['n_panel']:,} genes ({genes}), "
            f"about {found['nnz_estimated']:,} non-zero values, {found['store_bytes_estimated'] / 1e6:,.1f} MB of store, "
            f"{found['blocks']} blocks within {found['memory_bytes'] / 2**20:,.0f} MiB\n"
            f"labels kept: {', '.join(found['obs_columns']) or 'none'}"
        )
    dropped = f", {found['n_dropped_empty']} samples without counts left out" if found["n_dropped_empty"] else ""
    return (
        f"{found['dataset']}: {found['n_obs']:,} samples x {found['n_panel']:,} genes ({genes}{dropped}), "
        f"{found['nnz']:,} non-zero values, sum {found['total']:,}"
    )


def main_h5ad(argv: Sequence[str] | None = None) -> int:
    """Ingest an h5ad file."""
    return run_verb("ingest h5ad", H5adOptions, run_h5ad, summary, argv, positionals=("file",))


def main_tenx(argv: Sequence[str] | None = None) -> int:
    """Ingest a 10x Genomics .h5 file or mtx folder."""
    return run_verb("ingest 10x", TenxOptions, run_tenx, summary, argv, positionals=("path",))


def main_census(argv: Sequence[str] | None = None) -> int:
    """Ingest a slice of the CELLxGENE Census."""
    return run_verb("ingest census", CensusOptions, run_census, summary, argv)


def main_gct(argv: Sequence[str] | None = None) -> int:
    """Ingest a GCT file of gene counts (GTEx)."""
    return run_verb("ingest gct", GctOptions, run_gct, summary, argv, positionals=("file",))


def main_star(argv: Sequence[str] | None = None) -> int:
    """Ingest a folder of STAR gene counts (TCGA, from the GDC)."""
    return run_verb("ingest star", StarOptions, run_star, summary, argv, positionals=("folder",))


def main_table(argv: Sequence[str] | None = None) -> int:
    """Ingest a TSV or CSV matrix."""
    return run_verb("ingest table", TableOptions, run_table, summary, argv, positionals=("file",))


def main_list(argv: Sequence[str] | None = None) -> int:
    """Ingest several sources that a YAML file lists, all of them or none."""
    return run_verb("ingest list", ListOptions, run_list, summary, argv, positionals=("file",))


KINDS = {
    "h5ad": main_h5ad,
    "10x": main_tenx,
    "census": main_census,
    "gct": main_gct,
    "star": main_star,
    "table": main_table,
    "list": main_list,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Ingest one kind of source."""
    return run_kinds("ingest", KINDS, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
