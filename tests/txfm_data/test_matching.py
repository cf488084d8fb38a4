"""Columns against a vocabulary: by id, by symbol, ambiguous symbols, duplicates, nothing at all."""

import numpy as np
import pytest

from txfm_data.matching import match_columns
from txfm_data.vocabulary import Vocabulary, is_ensembl_gene, strip_version

IDS = tuple(f"ENSG{i:011d}" for i in range(5))
VOCABULARY = Vocabulary(IDS, ("A", "B", "B", "", "E"))


def match(ids, symbols=None, duplicates="error"):
    return match_columns(VOCABULARY, ids, symbols or [""] * len(ids), duplicates=duplicates, where="file")


def test_ids_come_first_then_symbols_then_the_id_read_as_a_symbol():
    got = match([IDS[3] + ".12", "x", "E", IDS[1], "ENSG99999999999"], ["A", "A", "", "E", "E"])
    assert got.token_ids.tolist() == [3, 0, 4, 1, -1] and got.n_matched == 4
    assert got.column_of.tolist() == [0, 1, 2, 3, 4]


def test_a_symbol_of_several_genes_matches_none():
    assert match([IDS[0], "B", ""]).token_ids.tolist() == [0, -1, -1]


@pytest.mark.parametrize(("rule", "column_of"), [("sum", [0, 1, 0, 0]), ("first", [0, 1, 2, 3])])
def test_duplicates_by_rule(rule, column_of):
    got = match([IDS[2] + ".1", IDS[4], IDS[2] + ".2", IDS[2]], duplicates=rule)
    assert got.token_ids.tolist() == [2, 4, -1, -1] and got.column_of.tolist() == column_of and got.n_matched == 4


def test_duplicates_and_nothing_matched_are_errors():
    with pytest.raises(ValueError, match=r"file: 1 columns match a gene .* ENSG00000000002; pass --duplicates"):
        match([IDS[2], IDS[2] + ".2"])
    with pytest.raises(ValueError, match=r"none of its 2 genes is among the 5 .*found for example \['mu', 'nu'\]"):
        match(["mu", "nu"])


@pytest.mark.parametrize(
    ("gene", "stripped", "is_id"),
    [
        ("ENSG00000141510.18", "ENSG00000141510", True), ("ENSMUSG00000059552", "ENSMUSG00000059552", True),
        ("ENSG00000182378.14_PAR_Y", "ENSG00000182378.14_PAR_Y", False), ("TP53", "TP53", False), ("", "", False),
        ("ENST00000269305.9", "ENST00000269305", False), ("AC000.1", "AC000", False),
    ],
)  # fmt: skip
def test_ensembl_ids(gene, stripped, is_id):
    assert (strip_version(gene), is_ensembl_gene(gene)) == (stripped, is_id)


def test_vocabularies_are_told_apart_by_their_ids_alone():
    assert VOCABULARY.fingerprint == Vocabulary(IDS, ("",) * 5).fingerprint
    assert VOCABULARY.fingerprint != Vocabulary(IDS[::-1], ("",) * 5).fingerprint
    with pytest.raises(ValueError, match="1 gene ids occur more than once"):
        Vocabulary((IDS[0], IDS[0]), ("", ""))
    with pytest.raises(ValueError, match="5 gene ids but 1 symbols"):
        Vocabulary(IDS, ("",))
    with pytest.raises(ValueError, match="at most 65535"):
        Vocabulary(tuple(map(str, range(65_536))), ("",) * 65_536)
    assert np.array_equal(VOCABULARY.index_of([IDS[4] + ".3", "x"]), [4, -1])
