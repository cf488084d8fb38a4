"""Genes of a source's columns, against a plain reference; gene maps from every kind of table, and bad ones by name."""

import gzip

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from txfm_data.gene_map import GeneMap, read_gene_map
from txfm_data.gene_matching import match_genes
from txfm_data.vocabulary import GeneStatistics, Vocabulary, is_ensembl_gene, write_vocabulary

TP53, CD99, ACTB = "ENSG00000141510", "ENSG00000002586", "ENSG00000075624"


def match(gene_ids, symbols=None, **options):
    return match_genes(gene_ids, symbols or [""] * len(gene_ids), where="in.h5ad", **options)


IDS = st.sampled_from(
    [TP53, f"{TP53}.18", f"{CD99}.1", f"{CD99}.20_PAR_Y", "ENSMUSG00000059552", "TP53", "ERCC-00002", "x", ""]
)


@given(
    st.lists(st.tuples(IDS, st.sampled_from(["", "TP53", "CD99", "ACTB", "none"])), min_size=1, max_size=12),
    st.sampled_from(["error", "sum", "first"]),
    st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    st.booleans(),
)
def test_matching_is_that_of_a_plain_reference(columns, duplicates, min_matched, with_map):
    gene_map = {"TP53": TP53, "ACTB": f"{ACTB}.17", "CD99": CD99} if with_map else {}
    ids, symbols = zip(*columns, strict=True)
    expected = []
    for gene, symbol in columns:
        if gene[:3] == "ENS":
            expected.append("" if gene.endswith("_PAR_Y") else gene.split(".")[0])
        else:
            expected.append((gene_map.get(gene) or gene_map.get(symbol) or "").split(".")[0])
    n, n_kinds = sum(map(bool, expected)), len(set(expected) - {""})
    fails = n == 0 or n / len(columns) < min_matched or (duplicates == "error" and n > n_kinds)
    options = {"duplicates": duplicates, "min_matched": min_matched, "gene_map": gene_map if with_map else None}
    if fails:
        with pytest.raises(ValueError, match=r"^in\.h5ad: "):
            match(ids, symbols, **options)
        return
    genes = match(ids, symbols, **options)
    assert list(genes.gene_ids) == list(dict.fromkeys(filter(None, expected)))
    seen = set()
    for column, gene in enumerate(expected):
        kept = gene and not (duplicates == "first" and gene in seen)
        assert genes.column_gene[column] == (genes.gene_ids.index(gene) if kept else -1)
        if gene and gene not in seen:
            own = symbols[column] or ("" if is_ensembl_gene(ids[column]) else ids[column])
            assert genes.symbols[genes.gene_ids.index(gene)] == own
        seen.add(gene)
    assert genes.column_gene.dtype == np.int64
    assert genes.n_by_id == sum(map(is_ensembl_gene, ids)) and genes.n_by_id + genes.n_by_symbol == n
    assert (genes.n_columns, genes.n_duplicates) == (len(columns), n - n_kinds)


def test_the_id_read_as_a_symbol_comes_before_the_symbol():
    genes = match(["TP53", "g2"], ["ACTB", "ACTB"], gene_map={"TP53": TP53, "ACTB": ACTB})
    assert genes.gene_ids == (TP53, ACTB) and genes.symbols == ("ACTB", "ACTB") and genes.n_by_symbol == 2


def test_the_second_copy_of_a_pseudoautosomal_gene_is_not_the_first():
    ids = [f"{CD99}.20", f"{CD99}.20_PAR_Y", f"{CD99}_PAR_Y"]
    assert match(ids, ["CD99"] * 3, gene_map={"CD99": CD99}, min_matched=0).column_gene.tolist() == [0, -1, -1]


@pytest.mark.parametrize(
    ("gene_ids", "options", "message"),
    [
        (["TP53", "ACTB"], {}, r"0 of 2 columns match a gene, expected at least one; no Ensembl gene ids like 'ENSG.*: \['TP53', "
         r"'ACTB'\]; translate symbols with --gene-map FILE$"),
        (["TP53"], {"min_matched": 0.0}, "0 of 1 columns"),
        (["TP53"], {"hint": "column 'ensembl' holds 7."}, r"\['TP53'\]; column 'ensembl' holds 7; translate symbols"),
        (["x"], {"gene_map": {"TP53": TP53}}, r"nor in the gene map of 1 names: .* give a --gene-map FILE that has these names"),
        ([TP53, *"abcdefgh"], {}, r"1 of 9 columns match a gene, expected at least 50% \(--min-matched\).* and 3 more; .*, or "
         "lower --min-matched if the others are no genes"),
        ([TP53, f"{TP53}.2", ACTB], {}, rf"1 genes stand on more than one column, for example \['{TP53}'\] \({TP53} as "
         rf"\['{TP53}', '{TP53}\.2'\]\); pass --duplicates sum or --duplicates first"),
        ([], {}, "has no columns"),
    ],
)  # fmt: skip
def test_what_does_not_match_is_named_with_its_remedies(gene_ids, options, message):
    with pytest.raises(ValueError, match=rf"^in\.h5ad: .*{message}"):
        match(gene_ids, **options)


def test_bad_arguments_are_named():
    for options, message in (
        ({"min_matched": 1.5}, "--min-matched is 1.5"), ({"min_matched": float("nan")}, "--min-matched is nan"),
        ({"duplicates": "last"}, "--duplicates is 'last'"), ({"symbols": ["a", "b"]}, "1 gene ids but 2 symbols"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            match([TP53], **options)


def test_half_of_the_columns_is_enough():
    assert match([TP53, "a"]).n_by_id == 1
    assert match([TP53, "a", "b"], min_matched=1 / 3).column_gene.tolist() == [0, -1, -1]


EXPECTED = {"TP53": TP53, "ACTB": ACTB}
TABLES = {
    "features.tsv": f"{TP53}\tTP53\tGene Expression\n{ACTB}\tACTB\tGene Expression\nCD3\tCD3_TotalSeq\tAntibody Capture\n",
    "features5.tsv": f"{TP53}\tTP53\tGene Expression\tchr17\t1\n{ACTB}\tACTB\tGene Expression\tchr7\t5\n",
    "ids.csv": f"{TP53}.18,TP53\n{ACTB}.2,ACTB\n",
    "names.csv": f"symbol,gene\r\nTP53,{TP53}\r\nACTB,{ACTB}\r\n",
    "blank.tsv": f"\ufeffTP53\t{TP53}\n\n ACTB \t{ACTB}\n\t{CD99}\n",
    "quoted.csv": f'"gene_id","name"\n"{TP53}","TP53"\n"{ACTB}","ACTB"\n',
    "wide.tsv": f"chr\tGene_Name\tentrez\tensgene\n17\tTP53\t7157\t{TP53}\n7\tACTB\t60\t{ACTB}\n",
    "par.tsv": f"{TP53}\tTP53\n{ACTB}\tACTB\n{TP53}.3_PAR_Y\tTP53\n",
    "unnamed.tsv": f"{TP53}\tTP53\n{ACTB}\tACTB\n{CD99}\t{CD99}\n",
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("zipped", [False, True])
def test_tables_are_read_by_what_is_in_them(tmp_path, name, zipped):
    raw = TABLES[name].encode()
    path = tmp_path / (name + ".gz" * zipped)
    path.write_bytes(gzip.compress(raw) if zipped else raw)
    genes = read_gene_map(path)
    assert genes == EXPECTED and genes.ambiguous == {}


def test_another_kind_of_id_is_mapped_too(tmp_path):
    (tmp_path / "entrez.tsv").write_text(f"entrez\tensembl\n7157\t{TP53}\n60\t{ACTB}\n")
    genes = read_gene_map(tmp_path / "entrez.tsv")
    assert match(["7157", "60"], gene_map=genes).gene_ids == (TP53, ACTB)


def test_a_symbol_of_several_ids_maps_to_none():
    genes = GeneMap([("A", TP53), ("A", f"{TP53}.3"), ("B", ACTB), ("B", CD99), ("", TP53), ("C", "x")])
    assert genes == {"A": TP53} and genes.ambiguous == {"B": (ACTB, CD99)}


def test_a_vocabulary_is_a_gene_map(tmp_path):
    vocabulary = Vocabulary((TP53, ACTB, CD99), ("TP53", "ACTB", ""))
    statistics = GeneStatistics(np.zeros(3, np.int64), np.zeros(3, np.int64), np.zeros(3))
    write_vocabulary(tmp_path / "vocab.parquet", vocabulary, statistics)
    assert read_gene_map(tmp_path / "vocab.parquet") == EXPECTED


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "is empty"), (b"\n\n", "is empty"), (b"TP53\nACTB\n", "has one column"),
        (b"TP53,P53\nACTB,b\n", r"exactly one column must hold .*, found 0 \(column 1: 0%, column 2: 0%\).*\['ACTB', 'b'\]"),
        (f"{TP53},{TP53}\n".encode(), r"found 2 \(column 1: 100%, column 2: 100%\)"),
        (f"{TP53},TP53\n{ACTB}\n".encode(), "line 2 has 1 fields, the first line 2; the table is ragged"),
        (f"{TP53},x,y\n".encode(), r"has 3 columns, and none is named symbol, .* or name \(its first line is"),
        (b"\xff\xfe\x00,\x01\n", "not a table of text"), (b"PAR1 but no parquet", "not a readable parquet file"),
        (f"A,{TP53}\nA,{ACTB}\n".encode(), r"maps no symbol to one Ensembl id \(1 stand for several\)"),
        (gzip.compress(f"A,{TP53}\n".encode() * 999, mtime=0)[:40], "cut or damaged"),
    ],
)  # fmt: skip
def test_bad_tables_are_named(tmp_path, raw, message):
    (tmp_path / "map.txt").write_bytes(raw)
    with pytest.raises(ValueError, match=rf"map\.txt: .*{message}"):
        read_gene_map(tmp_path / "map.txt")


def test_a_missing_file_and_a_parquet_file_without_the_columns_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file; --gene-map takes"):
        read_gene_map(tmp_path / "none.tsv")
    pq.write_table(pa.table({"gene": [TP53]}), tmp_path / "p.parquet")
    with pytest.raises(ValueError, match=r"p\.parquet: --gene-map needs columns 'gene_id' and 'symbol'.*\['gene'\]"):
        read_gene_map(tmp_path / "p.parquet")


@pytest.mark.parametrize(
    "name", ["GENCODEv44_Gene_id2name.csv", "annotables_grch37.tsv.gz", "annotables_grch38.tsv.gz"]
)
def test_published_tables_are_read(real_data, name):
    genes = read_gene_map(real_data / "gene_tables" / name)
    assert {symbol: genes[symbol] for symbol in EXPECTED} == EXPECTED
    assert len(genes) > 30_000 and 100 < len(genes.ambiguous) < len(genes) / 4
    assert not set(genes) & set(genes.ambiguous)
