"""What the readers of files share: rows behind labels, and how another process opens the same matrix."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, Self

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.sparse as sp

from txfm_data.sources.hashing import file_sha256, files_sha256
from txfm_data.sources.protocol import CHUNK_BYTES, Source
from txfm_data.sources.spool import Spool, SpooledMatrix

SPOOL_BYTES = 256 * 1024**2
"""Memory in which a matrix that comes by genes is turned into rows."""
_OBS, _VAR = "obs.parquet", "var.parquet"


class Rows(Protocol):
    """A matrix that gives row ranges; see `Source` for the methods."""

    def cuts(self, max_bytes: int) -> list[tuple[int, int]]:
        """Consecutive row ranges of at most about `max_bytes`."""
        ...

    def read(self, start: int, stop: int) -> sp.csr_matrix:
        """Rows [start, stop)."""
        ...

    def close(self) -> None:
        """Release files."""
        ...


@dataclass(frozen=True, kw_only=True)
class Opened:
    """Everything that an opened file offers.

    where, name, matrix_name, gene_ids, symbols : as of `Source`.
    labels : of the samples; the index holds their names.
    rows : the matrix.  files : what is hashed, below `root`.  hint : text of `Source.gene_hint`.
    reopen : picklable; opens the same in another process.
    """

    where: str
    name: str
    matrix_name: str
    gene_ids: tuple[str, ...]
    symbols: tuple[str, ...]
    labels: pd.DataFrame
    rows: Rows
    files: tuple[Path, ...]
    root: Path
    hint: str
    reopen: Callable[[], Source]


class OpenedSource:
    """A `Source` made of what a file offers; see there for attributes and methods."""

    matrix_hint = ""

    def __init__(self, opened: Opened) -> None:
        self._opened = opened
        self.where, self.name, self.matrix_name = opened.where, opened.name, opened.matrix_name
        self.gene_ids, self.symbols = opened.gene_ids, opened.symbols
        self.n_obs = len(opened.labels)
        self.obs_columns: tuple[str, ...] = tuple(opened.labels.columns)
        self._sha256 = ""

    def obs(self, start: int, stop: int) -> pd.DataFrame:
        """Labels of samples [start, stop); the index holds their names."""
        return self._opened.labels.iloc[start:stop]

    def cuts(self, max_bytes: int = CHUNK_BYTES) -> list[tuple[int, int]]:
        """Consecutive row ranges that cover the matrix, each at most about `max_bytes` (one row at the least)."""
        return self._opened.rows.cuts(max_bytes)

    def read(self, start: int, stop: int) -> sp.csr_matrix:
        """Rows [start, stop): columns sorted and unique in a row, zeros not stored.

        Raises
        ------
        IndexError
            If the rows are not within the matrix.
        ValueError
            If the file turns out to be damaged there.
        """
        if not 0 <= start <= stop <= self.n_obs:
            raise IndexError(f"{self.where}: rows {start} to {stop} of a matrix with {self.n_obs} rows")
        return self._opened.rows.read(start, stop)

    def content_sha256(self) -> str:
        """Hash of the bytes of the count files (not of the sample table); read once."""
        if not self._sha256:
            files, root = self._opened.files, self._opened.root
            self._sha256 = file_sha256(files[0]) if files == (root,) else files_sha256(files, root)
        return self._sha256

    def gene_hint(self) -> str:
        """What to try when the gene ids do not match."""
        return self._opened.hint

    def opener(self) -> Callable[[], Source]:
        """A picklable function that opens the same matrix in another process, valid while this source is open."""
        return self._opened.reopen

    def close(self) -> None:
        """Release files and remove temporary folders; a second call does nothing."""
        self._opened.rows.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def spooled(  # one argument a fact of the source
    spool: Spool,
    *,
    path: Path,
    matrix_name: str,
    gene_ids: tuple[str, ...],
    symbols: tuple[str, ...],
    labels: pd.DataFrame,
    files: tuple[Path, ...],
    hint: str,
) -> Opened:
    """Finish a spool and put the labels into its folder, from where other processes take both."""
    matrix = spool.finish()
    pq.write_table(pa.Table.from_pandas(labels), matrix.folder / _OBS)
    pq.write_table(pa.table({"gene_id": list(gene_ids), "symbol": list(symbols)}), matrix.folder / _VAR)
    return Opened(
        where=str(path), name=path.name, matrix_name=matrix_name, gene_ids=gene_ids, symbols=symbols, labels=labels,
        rows=matrix, files=files, root=path, hint=hint,
        reopen=partial(reopen_spooled, matrix.folder, path=path, matrix_name=matrix_name, files=files, hint=hint),
    )  # fmt: skip


def reopen_spooled(folder: Path, *, path: Path, matrix_name: str, files: tuple[Path, ...], hint: str) -> OpenedSource:
    """Open what `spooled` left in a folder; closing it leaves the folder to the source that made it.

    Raises
    ------
    FileNotFoundError
        If that source was closed, or this machine does not see its temporary folder.
    """
    matrix = SpooledMatrix(folder)
    genes = pq.read_table(folder / _VAR)
    return OpenedSource(
        Opened(
            where=str(path), name=path.name, matrix_name=matrix_name,
            gene_ids=tuple(genes["gene_id"].to_pylist()), symbols=tuple(genes["symbol"].to_pylist()),
            labels=pq.read_table(folder / _OBS).to_pandas(), rows=matrix, files=files, root=path, hint=hint,
            reopen=partial(reopen_spooled, folder, path=path, matrix_name=matrix_name, files=files, hint=hint),
        )
    )  # fmt: skip
