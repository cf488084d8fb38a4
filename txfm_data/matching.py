"""Columns of someone's matrix against a vocabulary: by Ensembl id, by symbol where a column has no such id."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from txfm_data.vocabulary import Vocabulary, is_ensembl_gene

Duplicates = Literal["error", "sum", "first"]
NonInteger = Literal["error", "ok"]


@dataclass(frozen=True)
class Match:
    """Which gene each column is.

    token_ids : (n_vars,) int32. Token id of each column that stands for its gene, -1 for every other column.
    column_of : (n_vars,) int64. Column that each column's counts go to: itself, or the first of its gene.
    n_matched : columns that carry a gene of the vocabulary.
    """

    token_ids: np.ndarray
    column_of: np.ndarray
    n_matched: int


def match_columns(
    vocabulary: Vocabulary,
    gene_ids: Sequence[str],
    symbols: Sequence[str],
    *,
    duplicates: Duplicates,
    where: str,
) -> Match:
    """Match columns to genes.

    A column is matched by its id; if that is no Ensembl id, by its symbol, or by the id read as a symbol. A symbol
    that names several genes of the vocabulary matches none.

    Raises
    ------
    ValueError
        If nothing matches, with examples; or if two columns match one gene and `duplicates` is "error".
    """
    tokens = vocabulary.index_of(gene_ids)
    is_id = np.fromiter((is_ensembl_gene(g) for g in gene_ids), bool, len(gene_ids))
    names = [s or g for g, s in zip(gene_ids, symbols, strict=True)]
    tokens = np.where(is_id, tokens, vocabulary.index_of_symbols(names))
    n_matched = int((tokens >= 0).sum())
    if n_matched == 0:
        raise ValueError(
            f"{where}: none of its {len(gene_ids)} genes is among the {len(vocabulary)} of the model (found for example "
            f"{list(gene_ids[:3])}, expected like {list(vocabulary.gene_ids[:2])} or {list(vocabulary.symbols[:2])}); "
            "name the right columns with --gene-ids or --symbols"
        )
    column_of = np.arange(len(tokens))
    seen: dict[int, int] = {}
    repeated = []
    for column in np.flatnonzero(tokens >= 0):
        first = seen.setdefault(int(tokens[column]), int(column))
        if first != column:
            repeated.append(int(column))
            column_of[column] = first if duplicates == "sum" else column
    if repeated and duplicates == "error":
        gene = vocabulary.gene_ids[tokens[repeated[0]]]
        raise ValueError(
            f"{where}: {len(repeated)} columns match a gene that another column matches already, for example {gene}; "
            "pass --duplicates sum or --duplicates first"
        )
    tokens[repeated] = -1
    return Match(tokens, column_of, n_matched)
