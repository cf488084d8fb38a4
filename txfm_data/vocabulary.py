"""The vocabulary: the ordered union of all genes a store, a shard corpus or a model knows.

A gene's key is its Ensembl id without version; its row number in the vocabulary is its token id.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

MAX_GENES = 65_535
"""Token ids are uint16 (DESIGN.md, "vocabulary")."""

_ENSEMBL_GENE = re.compile(r"ENS[A-Z]{0,6}G\d{11}")
_COLUMNS = ("gene_id", "symbol", "n_measured", "n_nonzero", "mean_log1p")


def strip_version(gene_id: str) -> str:
    """Ensembl id without its version: ``ENSG00000141510.18`` becomes ``ENSG00000141510``.

    Only a numeric suffix goes: GENCODE's ``_PAR_Y`` marks another gene and stays.
    """
    head, dot, tail = gene_id.partition(".")
    return head if dot and tail.isdigit() else gene_id


def is_ensembl_gene(gene_id: str) -> bool:
    """Whether `gene_id` is an Ensembl gene id of any species, with or without version."""
    return _ENSEMBL_GENE.fullmatch(strip_version(gene_id)) is not None


_ORGANISMS = {
    "ENSG": "homo_sapiens", "ENSMUSG": "mus_musculus", "ENSMMUG": "macaca_mulatta", "ENSCJAG": "callithrix_jacchus",
    "ENSPTRG": "pan_troglodytes",
}  # fmt: skip


def organism_of(gene_id: str) -> str:
    """Organism of an Ensembl gene id by its prefix, in the spelling of the Census; the prefix itself if it is none of them."""
    prefix = gene_id[: gene_id.index("G") + 1] if "G" in gene_id else gene_id
    return _ORGANISMS.get(prefix, prefix)


@dataclass(frozen=True)
class Vocabulary:
    """Ordered gene ids and, beside them, symbols ("" where none is known).

    Raises
    ------
    ValueError
        On more genes than a uint16 can number, on duplicates, or on lists of different length.
    """

    gene_ids: tuple[str, ...]
    symbols: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.gene_ids) != len(self.symbols):
            raise ValueError(f"vocabulary: {len(self.gene_ids)} gene ids but {len(self.symbols)} symbols")
        if len(self.gene_ids) > MAX_GENES:
            raise ValueError(
                f"vocabulary: {len(self.gene_ids)} genes, at most {MAX_GENES} fit a uint16 token id; keep fewer genes"
            )
        if len(self._rows) != len(self.gene_ids):
            twice = [gene for gene, n in Counter(self.gene_ids).items() if n > 1]
            raise ValueError(f"vocabulary: {len(twice)} gene ids occur more than once, for example {twice[:3]}")

    def __len__(self) -> int:
        return len(self.gene_ids)

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {gene: row for row, gene in enumerate(self.gene_ids)}

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the gene ids in order; symbols do not enter, they are only names."""
        return hashlib.sha256("\n".join(self.gene_ids).encode()).hexdigest()

    def index_of(self, gene_ids: Sequence[str]) -> np.ndarray:
        """Token id of each Ensembl id, version ignored: int32, -1 where the vocabulary has no such gene."""
        return np.fromiter((self._rows.get(strip_version(g), -1) for g in gene_ids), np.int32, len(gene_ids))

    def index_of_symbols(self, symbols: Sequence[str]) -> np.ndarray:
        """Token id of each symbol: int32, -1 where it is empty, unknown or names several genes."""
        counts = Counter(self.symbols)
        rows = {s: row for row, s in enumerate(self.symbols) if s and counts[s] == 1}
        return np.fromiter((rows.get(s, -1) for s in symbols), np.int32, len(symbols))


@dataclass(frozen=True)
class GeneStatistics:
    """Per gene of a vocabulary, over the samples of the train split.

    n_measured : (G,) int64. Samples whose panel holds the gene.
    n_nonzero : (G,) int64. Samples with a count above zero.
    mean_log1p : (G,) float64. Mean of ln(1 + L c / library size) over the samples that measured it; 0 if none did.
    """

    n_measured: np.ndarray
    n_nonzero: np.ndarray
    mean_log1p: np.ndarray


def write_vocabulary(path: str | Path, vocabulary: Vocabulary, statistics: GeneStatistics) -> None:
    """Write a vocabulary and its statistics as parquet; row number is the token id."""
    table = pa.table(
        {
            "gene_id": pa.array(vocabulary.gene_ids, pa.string()),
            "symbol": pa.array(vocabulary.symbols, pa.string()),
            "n_measured": pa.array(statistics.n_measured, pa.int64()),
            "n_nonzero": pa.array(statistics.n_nonzero, pa.int64()),
            "mean_log1p": pa.array(statistics.mean_log1p, pa.float64()),
        }
    )
    pq.write_table(table, str(path))


def read_vocabulary(path: str | Path) -> tuple[Vocabulary, GeneStatistics]:
    """Read what `write_vocabulary` wrote.

    Raises
    ------
    ValueError
        If the file is not a parquet table with the columns of a vocabulary.
    """
    try:
        # Not `pq.read_table`: its threads and read-ahead take 50 MB for a table of 2.
        with pq.ParquetFile(str(path), pre_buffer=False) as file:
            table = file.read(use_threads=False)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: not a readable vocabulary (parquet): {error}") from error
    missing = [name for name in _COLUMNS if name not in table.column_names]
    if missing:
        raise ValueError(f"{path}: a vocabulary needs columns {list(_COLUMNS)}, missing {missing}")
    vocabulary = Vocabulary(tuple(table["gene_id"].to_pylist()), tuple(table["symbol"].to_pylist()))
    numbers = (table[name].to_numpy().copy() for name in _COLUMNS[2:])
    return vocabulary, GeneStatistics(*numbers)
