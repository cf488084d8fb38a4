"""What a user decides about an ingest, whatever the kind of source."""

from dataclasses import dataclass, field
from typing import Literal

from txfm_data.gene_matching import Duplicates
from txfm_data.matching import NonInteger
from txfm_data.parallel import Workers
from txfm_data.store.protocol import Values

EmptySamples = Literal["error", "drop"]
OtherOrganisms = Literal["error", "drop"]
Modality = Literal["sc", "bulk"]
BackendName = Literal["soma", "zarr"]

_MIB = 1024**2
_BASE_BYTES = 640 * _MIB
"""What the process needs before it holds any counts: the interpreter, Arrow, TileDB, tables of genes."""
_WORKER_BASE_BYTES = 400 * _MIB
_PER_BLOCK = 8
"""Memory that a block takes while it is checked, matched and written, as a multiple of its rows' own bytes."""
_LARGEST_BLOCK = 256 * _MIB


@dataclass(frozen=True, kw_only=True)
class IngestOptions:
    """Options of every kind of ingest.

    values : what the matrix holds, as the user says; never guessed.
    non_integer : whether expected counts that are not whole (RSEM, salmon) are legal.
    batch, perturbation, cell_type : columns of the source's labels.  control : value that marks unperturbed samples.
    library_size : column with the counts of the whole library; by default the sum over all columns of the source.
    library_is_sum : whether that must be just the sum, as in the Census, where all genes are read.
    obs_columns : labels to keep besides; all if None.
    gene_map : table of symbols and Ensembl ids; by default the store's own genes.
    min_matched : least fraction of columns that must become genes.
    other_organisms : whether genes of other organisms than the store's are refused, or left out; their counts stay in the library
        size, as those of columns that are no genes do.
    backend : of a store that this ingest makes.
    workers : where blocks are worked on, and the memory that all of it may use.
    """

    values: Values = "counts"
    non_integer: NonInteger = "error"
    batch: str | None = None
    perturbation: str | None = None
    control: str | None = None
    cell_type: str | None = None
    library_size: str | None = None
    library_is_sum: bool = False
    obs_columns: tuple[str, ...] | None = None
    modality: Modality = "sc"
    gene_map: str | None = None
    min_matched: float = 0.5
    duplicates: Duplicates = "error"
    empty_samples: EmptySamples = "error"
    other_organisms: OtherOrganisms = "error"
    backend: BackendName = "soma"
    workers: Workers = field(default_factory=Workers)

    def __post_init__(self) -> None:
        if (self.perturbation is None) != (self.control is None):
            raise ValueError(
                "--perturbation and --control go together: the column, and the value that marks unperturbed samples"
            )
        if not 0 <= self.min_matched <= 1:
            raise ValueError(f"--min-matched is a fraction from 0 to 1, got {self.min_matched}")
        self.block_bytes()

    def block_bytes(self) -> int:
        """Bytes of the rows of one block, so that all blocks in work stay within the memory budget.

        Raises
        ------
        ValueError
            If the budget leaves no room for any block; names the least that would do.
        """
        n = max(1, self.workers.n)
        base = _BASE_BYTES + (self.workers.n * _WORKER_BASE_BYTES)
        room = (self.workers.memory - base) // n
        if room < 64 * _MIB:
            least = (base + n * 64 * _MIB) // _MIB
            raise ValueError(
                f"--memory-budget {self.workers.memory // _MIB}MiB is too small for {n} process(es); give at least {least}MiB"
            )
        return min(_LARGEST_BLOCK, room // _PER_BLOCK)
