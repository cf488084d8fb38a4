"""Options that `txfm embed` and `txfm impute` share: what is read, which genes are shown, how it is computed."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tools.terminal import Terminal

if TYPE_CHECKING:
    from txfm_model.embedding.encoding import EncodeOptions
    from txfm_model.embedding.over_files import FileOptions
    from txfm_model.model import TxFM


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Samples to read, genes to show, and how."""

    input: str
    """Raw counts: an h5ad file, AnnData in Zarr, a store or a shard corpus."""
    model: str
    """Checkpoint folder, or the name of a model on the Hugging Face hub."""
    out: str
    """File to write, .h5ad or .zarr; must not exist yet."""
    counts_layer: str | None = None
    """Layer of an AnnData file to read in place of X."""
    raw: bool = False
    """Read raw.X of an AnnData file in place of X."""
    gene_ids: str | None = None
    """Column of var with Ensembl gene ids. Default: the index of var."""
    symbols: str | None = None
    """Column of var with symbols, for columns without an Ensembl id. Default: the usual names of such a column."""
    library_size: str | None = None
    """Column of obs with the counts of the whole library, for files that hold a slice of the genes. Default: row sums."""
    duplicates: Literal["error", "sum", "first"] = "error"
    """What to do with several columns of one gene: refuse, sum their counts, or keep the first."""
    non_integer: Literal["error", "ok"] = "error"
    """What to do with counts that are not whole: refuse, or take them as expected counts (RSEM, salmon)."""
    dataset: str | None = None
    """Dataset of a store to read. Default: all of them."""
    obs_filter: str | None = None
    """Samples of a store to read, such as "cell_type == 'T cell' and raw_sum >= 500". Default: all."""
    split: Literal["all", "train", "val"] = "all"
    """Split of a shard corpus to read."""
    empty_samples: Literal["error", "nan"] = "error"
    """What to do with samples without any count: refuse, or give them NaN."""
    min_cell_fraction: float = 0.0
    """Show only genes above zero in at least this share of the dataset's samples, 0 to 1: as shards were filtered for training."""
    n_unmasked: int | None = None
    """Genes shown to the encoder per sample, drawn with --seed. Default: all genes that the dataset measured."""
    views: int = 1
    """Draws of --n-unmasked genes whose results are averaged."""
    seed: int = 0
    """Seed of the draws."""
    temperature: float = 0.0
    """0 draws genes uniformly; else by how often they were seen in training, to this power (mask.temperature of training)."""
    dtype: Literal["float32", "float16"] = "float32"
    """Type of the values that are written."""
    batch_size: int = 32
    """Samples computed at a time; the result depends on it by rounding alone."""
    precision: Literal["auto", "bf16", "no"] = "auto"
    """bf16 autocast or none; auto takes bf16 on a GPU that has it."""
    device: str | None = None
    """Such as cpu or cuda. Default: cuda if there is one, and each process its own."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_cell_fraction <= 1:
            raise ValueError(f"--min-cell-fraction must lie between 0 and 1, got {self.min_cell_fraction}")
        for name in ("n_unmasked", "views", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        if self.views > 1 and self.n_unmasked is None:
            raise ValueError(f"--views {self.views} needs --n-unmasked: with all genes shown every view is the same")


def open_model(options: SampleOptions, terminal: Terminal, label: str) -> "tuple[TxFM, FileOptions]":
    """Open the model on this process' device, and say how files are read and written; OUT is checked before."""
    from txfm_data.anndata_out import output_format
    from txfm_model.embedding.inputs import InputOptions
    from txfm_model.embedding.over_files import FileOptions
    from txfm_model.embedding.processes import Processes
    from txfm_model.model import TxFM

    output_format(options.out)
    if Path(options.out).exists():
        raise FileExistsError(f"{options.out}: exists already; name another --out, or remove it first")
    reading: dict[str, Any] = {name: getattr(options, name) for name in InputOptions.__dataclass_fields__}
    processes = Processes()
    with processes.together():
        model = TxFM.from_pretrained(options.model).to(processes.device(options.device))
    files = FileOptions(
        reading=InputOptions(**reading), empty_samples=options.empty_samples, dtype=options.dtype, model_name=options.model,
        processes=processes, progress=terminal.progress(label), say=terminal.say,
    )  # fmt: skip
    return model, files


def encode_options(options: SampleOptions, layer: int | str = "final") -> "EncodeOptions":
    """How samples are shown to the encoder."""
    from txfm_model.embedding.encoding import EncodeOptions, parse_layer

    return EncodeOptions(
        layer=parse_layer(layer), n_unmasked=options.n_unmasked, views=options.views, seed=options.seed,
        temperature=options.temperature, batch_size=options.batch_size, precision=options.precision,
    )  # fmt: skip
