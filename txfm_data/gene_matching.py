"""Columns of a source that become genes of a panel: by Ensembl id, or by a symbol that a gene map translates."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from txfm_data.matching import Duplicates
from txfm_data.vocabulary import is_ensembl_gene, strip_version

__all__ = ["Duplicates", "Genes", "match_genes"]

_EXAMPLES = 5
_SUFFIX = re.compile(r"[._]")


@dataclass(frozen=True)
class Genes:
    """How the columns of a source become genes of a panel.

    gene_ids, symbols : the panel, in order of first appearance; ids are unique and without version, symbols are those
    of a gene's first column ("" where it has none).
    column_gene : (n_vars,) int64. Panel gene of each column, -1 where the column is dropped.
    n_by_id, n_by_symbol : columns that carry a gene, by what told so; a column that "first" drops is counted too.
    n_columns : columns of the source.
    n_duplicates : columns whose gene an earlier column carries.
    """

    gene_ids: tuple[str, ...]
    symbols: tuple[str, ...]
    column_gene: np.ndarray
    n_by_id: int
    n_by_symbol: int
    n_columns: int
    n_duplicates: int


def match_genes(
    gene_ids: Sequence[str],
    symbols: Sequence[str],
    *,
    where: str,
    duplicates: Duplicates = "error",
    min_matched: float = 0.5,
    gene_map: Mapping[str, str] | None = None,
    hint: str = "",
) -> Genes:
    """Match columns to genes.

    A column whose id is an Ensembl gene id carries that gene. Any other is looked up in the gene map, by its id read as
    a symbol and then by its symbol. What neither tells is no gene: spike-ins, antibodies, totals. The second copy of a
    pseudoautosomal gene (``_PAR_Y``) is not looked up: its symbol is that of the copy on X.

    Parameters
    ----------
    gene_ids, symbols
        One a column; "" where the source has none.
    where
        The source, as messages name it.
    duplicates
        Several columns of one gene: refuse, sum them, or keep the first.
    min_matched
        Least fraction of the columns that must carry a gene, 0 to 1.
    gene_map
        Symbol (or other id) to Ensembl id, such as `txfm_data.gene_map.read_gene_map` gives.
    hint
        What the source says about where its Ensembl ids are, for the error.

    Raises
    ------
    ValueError
        If no column, or less than `min_matched` of them, carries a gene; if several carry one and `duplicates` is
        "error"; or if an argument is not one of those above.
    """
    _check_arguments(gene_ids, symbols, where, duplicates, min_matched)
    found = [_gene_of(gene, symbol, gene_map or {}) for gene, symbol in zip(gene_ids, symbols, strict=True)]
    n_by_id = sum(by_id for _, by_id in found)
    n_matched = sum(bool(gene) for gene, _ in found)
    if n_matched == 0 or n_matched < min_matched * len(found):
        missed = [name for name, (gene, _) in zip(gene_ids, found, strict=True) if not gene]
        raise ValueError(_too_few(where, missed, n_matched, min_matched, gene_map, hint))
    position: dict[str, int] = {}
    column_gene = np.full(len(found), -1, np.int64)
    panel_symbols: list[str] = []
    repeated: list[str] = []
    for column, (gene, by_id) in enumerate(found):
        if not gene:
            continue
        if gene not in position:
            position[gene] = len(position)
            panel_symbols.append(symbols[column] or ("" if by_id else gene_ids[column]))
        else:
            repeated.append(gene)
            if duplicates == "first":
                continue
        column_gene[column] = position[gene]
    if repeated and duplicates == "error":
        examples = list(dict.fromkeys(repeated))
        columns = [name for name, (gene, _) in zip(gene_ids, found, strict=True) if gene == examples[0]]
        raise ValueError(
            f"{where}: {len(examples)} genes stand on more than one column, for example {examples[:3]} ({examples[0]} as "
            f"{columns[:3]}); pass --duplicates sum or --duplicates first"
        )
    return Genes(
        gene_ids=tuple(position), symbols=tuple(panel_symbols), column_gene=column_gene, n_by_id=n_by_id,
        n_by_symbol=n_matched - n_by_id, n_columns=len(found), n_duplicates=len(repeated),
    )  # fmt: skip


def _gene_of(gene_id: str, symbol: str, gene_map: Mapping[str, str]) -> tuple[str, bool]:
    """Ensembl id without version, "" for none, and whether the column's own id said so."""
    if is_ensembl_gene(gene_id):
        return strip_version(gene_id), True
    if is_ensembl_gene(_SUFFIX.split(gene_id, maxsplit=1)[0]):
        return "", False
    for name in (gene_id, symbol):
        gene = strip_version(gene_map.get(name, "")) if name else ""
        if is_ensembl_gene(gene):
            return gene, False
    return "", False


def _check_arguments(
    gene_ids: Sequence[str], symbols: Sequence[str], where: str, duplicates: Duplicates, min_matched: float
) -> None:
    if len(gene_ids) != len(symbols):
        raise ValueError(f"{where}: {len(gene_ids)} gene ids but {len(symbols)} symbols, expected one of each a column")
    if duplicates not in ("error", "sum", "first"):
        raise ValueError(f"--duplicates is {duplicates!r}, expected error, sum or first")
    if not 0 <= min_matched <= 1:
        raise ValueError(f"--min-matched is {min_matched}, expected a fraction from 0 to 1")
    if len(gene_ids) == 0:
        raise ValueError(f"{where}: has no columns, so no genes; nothing to ingest")


def _too_few(
    where: str, missed: list[str], n_matched: int, min_matched: float, gene_map: Mapping[str, str] | None, hint: str
) -> str:
    n = len(missed) + n_matched
    least = "at least one" if n_matched == 0 else f"at least {min_matched:.0%} (--min-matched)"
    looked_up = f", nor in the gene map of {len(gene_map)} names" if gene_map else ""
    remedies = [
        "give a --gene-map FILE that has these names" if gene_map else "translate symbols with --gene-map FILE",
    ]
    if n_matched:
        remedies.append("lower --min-matched if the others are no genes")
    return (
        f"{where}: {n_matched} of {n} columns match a gene, expected {least}; no Ensembl gene ids like 'ENSG00000141510'"
        f"{looked_up}: {missed[:_EXAMPLES]}{f' and {len(missed) - _EXAMPLES} more' if len(missed) > _EXAMPLES else ''}; "
        f"{hint.rstrip('.') + '; ' if hint else ''}{', or '.join(remedies)}"
    )
