import io
import pickle
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.txfm_data.text_files import counts, ensembl, whole, write_text
from txfm_data.sources import table as table_module
from txfm_data.sources import text
from txfm_data.sources.table import TableSource

MATRIX = counts(12, 30)
GENES, SAMPLES = ensembl(30, ".2"), [f"s{i}" for i in range(12)]
SAMPLES_BY_GENES = pd.DataFrame(MATRIX.toarray(), index=SAMPLES, columns=GENES)
GENES_BY_SAMPLES = SAMPLES_BY_GENES.T


@pytest.fixture(autouse=True)
def no_temporary_folder_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send temporary folders to a place that the tests can look at."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))


@pytest.mark.parametrize("index_label", [None, "gene", False])
@pytest.mark.parametrize(
    ("name", "separator"), [("x.tsv", "\t"), ("x.csv", ","), ("x.csv.gz", ","), ("x.txt.gz", "\t")]
)
@pytest.mark.parametrize("orientation", ["genes-by-samples", "samples-by-genes"])
def test_a_table_equals_what_pandas_reads(
    tmp_path: Path, orientation: str, name: str, separator: str, index_label: str | None
) -> None:
    table = GENES_BY_SAMPLES if orientation == "genes-by-samples" else SAMPLES_BY_GENES
    # index_label False leaves the first column without a field in the header, as R does
    path = write_text(tmp_path / name, table.to_csv(sep=separator, index_label=index_label))
    read = pd.read_csv(path, sep=separator, index_col=0)
    with TableSource(path, orientation=orientation) as source:
        assert np.array_equal(whole(source), read.to_numpy().T if table is GENES_BY_SAMPLES else read.to_numpy())
        assert np.array_equal(whole(source), MATRIX.toarray())
        assert source.gene_ids == tuple(GENES)
        assert source.symbols == ("",) * 30
        assert source.obs(0, 12).index.tolist() == SAMPLES
        assert (source.name, source.matrix_name, source.n_obs, source.obs_columns) == (name, "counts", 12, ())
    assert list((tmp_path / "tmp").iterdir()) == []


def test_quotes_and_separators_in_them(tmp_path: Path) -> None:
    text = '"","a","b"\n"G1, alias",1,2\nG2,"3",4\n"G3",5,"6"\n'
    with TableSource(write_text(tmp_path / "x.csv", text), orientation="genes-by-samples") as source:
        assert source.gene_ids == ("G1, alias", "G2", "G3")
        assert whole(source).tolist() == [[1, 3, 5], [2, 4, 6]]


def test_feature_counts(tmp_path: Path) -> None:
    text = (
        '# Program:featureCounts v2.0.1; Command:"featureCounts"\n'
        "Geneid\tChr\tStart\tEnd\tStrand\tLength\tgene_name\t/data/a.bam\t/data/b.bam\n"
        "ENSG00000000003.15\tchrX;chrX\t1;5\t3;9\t-;-\t8\tTSPAN6\t70000\t0\n"
        "ENSG00000000005.6\tchrX\t1\t3\t+\t3\tTNMD\t0\t4\n"
    )
    path = write_text(tmp_path / "counts.txt", text)
    skip = ("Chr", "Start", "End", "Strand", "Length")
    with TableSource(path, orientation="genes-by-samples", symbol_column="gene_name", skip_columns=skip) as source:
        assert source.gene_ids == ("ENSG00000000003.15", "ENSG00000000005.6")
        assert source.symbols == ("TSPAN6", "TNMD")
        assert source.obs(0, 2).index.tolist() == ["/data/a.bam", "/data/b.bam"]
        assert whole(source).tolist() == [[70000, 0], [0, 4]]
    with pytest.raises(
        ValueError, match=r"line 3 \(ENSG00000000003.15\), column 'Chr' holds 'chrX;chrX', not a number"
    ):
        TableSource(path, orientation="genes-by-samples")


def test_columns_to_skip_may_stand_anywhere(tmp_path: Path) -> None:
    path = write_text(tmp_path / "x.tsv", "s\tG1\ttype\tG2\tnote\na\t1\tx\t2\ty\nb\t3\tx\t4\ty\n")
    with TableSource(path, orientation="samples-by-genes", skip_columns=["type", "note"]) as source:
        assert source.gene_ids == ("G1", "G2")
        assert whole(source).tolist() == [[1, 2], [3, 4]]


def test_crlf_blank_lines_a_byte_order_mark_and_expected_counts(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(b"\xef\xbb\xbfs,G1,G2\r\na,1.25,4294967297\r\n\r\nb,0,1e2\r\n\r\n")
    with TableSource(path, orientation="samples-by-genes") as source:
        assert whole(source).tolist() == [[1.25, 4294967297], [0, 100]]
        assert source.gene_ids == ("G1", "G2")


@pytest.mark.parametrize("orientation", ["genes-by-samples", "samples-by-genes"])
def test_a_file_much_larger_than_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, orientation: str) -> None:
    monkeypatch.setattr(text.LineReader.__init__, "__kwdefaults__", {"block_bytes": 1_000})
    matrix = counts(200, 300)
    table = pd.DataFrame(matrix.toarray())
    path = write_text(tmp_path / "x.tsv", (table.T if orientation == "genes-by-samples" else table).to_csv(sep="\t"))
    with TableSource(path, orientation=orientation, _spool_bytes=4_096) as source:
        assert np.array_equal(whole(source), matrix.toarray())


def test_another_process_opens_the_spool_and_not_the_file(tmp_path: Path) -> None:
    path = write_text(tmp_path / "x.tsv", SAMPLES_BY_GENES.to_csv(sep="\t"))
    labels = write_text(tmp_path / "l.tsv", "s\tage\n" + "".join(f"s{i}\t{i}\n" for i in range(12)))
    with TableSource(path, orientation="samples-by-genes", sample_table=labels) as source:
        path.unlink()
        with pickle.loads(pickle.dumps(source.opener()))() as other:
            assert np.array_equal(whole(other), MATRIX.toarray())
            pd.testing.assert_frame_equal(other.obs(0, 12), source.obs(0, 12))
        assert source.obs(3, 4)["age"].tolist() == [3]


@given(
    values=st.integers(1, 5).flatmap(
        lambda n: st.lists(st.lists(st.integers(0, 2**40), min_size=n, max_size=n), min_size=1, max_size=6)
    ),
    separator=st.sampled_from([",", "\t"]),
    by_genes=st.booleans(),
    quoting=st.integers(0, 2),
    block=st.integers(1, 60),
)
def test_what_pandas_writes_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    values: list[list[int]],
    separator: str,
    by_genes: bool,
    quoting: int,
    block: int,
) -> None:
    table = pd.DataFrame(values, index=[f"r{i}" for i in range(len(values))])
    path = tmp_path_factory.mktemp("table") / ("x.csv" if separator == "," else "x.tsv")
    path.write_text(table.to_csv(sep=separator, quoting=quoting))
    orientation = "genes-by-samples" if by_genes else "samples-by-genes"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text.LineReader.__init__, "__kwdefaults__", {"block_bytes": block})
        with TableSource(path, orientation=orientation) as source:  # type: ignore[arg-type]
            assert np.array_equal(whole(source), np.array(values).T if by_genes else np.array(values))


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("", "is empty"),
        ("# only\n# comments\n", "is empty"),
        ("g\ta\tb\n", "has a header but no lines"),
        ("g\ta\ta\nG1\t1\t2\n", r"1 names of samples occur more than once, for example \['a'\]"),
        ("g\ta\t\nG1\t1\t2\n", "sample number 2 has an empty name"),
        ("g\ta\tb\nG1\t1\t2\nG2\t1\n", "line 3 has 2 fields, expected 3"),
        ("#c\ng\ta\tb\nG1\t1\t2\nG2\t1\t2\t3\n", "line 4 has 4 fields, expected 3"),
        ("g\ta\tb\nG1\t1\t\n", r"line 2 \(G1\), column 'b' holds no value"),
        ("g\ta\tb\nG1\t1\t2\nG2\tNaN\t2\n", r"line 3 \(G2\), column 'a' holds no value"),
        ("g\ta\tb\nG1\t1\tNA\n", r"line 2 \(G1\), column 'b' holds no value.*0 where there is none"),
        ("g\ta\tb\nG1\t1\t1,5\n", "holds '1,5', not a number"),
        ("g a b\nG1 1 2\n", "no column is left that could hold counts"),
        ("g\nG1\n", "no column is left that could hold counts"),
        ("g\ta\tb\nG1\t1\t2\nG\xff\t1\t2\n", "line 3: not UTF-8"),
        ('g\ta\tb\nG1\t1\t2\n"G2\t1\t2\n', "line 3 has 1 fields, expected 3"),
        ('g\ta\tb\nG1\t1\t2\n"G2\t' + "1" * 200_000 + "\t2\n", "line 3: quotes do not pair up"),
    ],
)
def test_bad_tables(tmp_path: Path, contents: str, message: str) -> None:
    path = tmp_path / "x.tsv"
    path.write_bytes(contents.encode("latin-1"))
    with pytest.raises(ValueError, match=message) as error:
        TableSource(path, orientation="genes-by-samples")
    assert str(path) in str(error.value)
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize(
    ("header", "name", "message"),
    [
        ("g,a,b", "x.tsv", "ends in .tsv, but its header line .* is separated by commas; rename"),
        ("g\ta\tb", "x.csv.gz", "ends in .csv, but its header line .* is separated by tabs; rename"),
        ("g a b", "x.txt", "neither a tab nor a comma"),
        ("g\ta,b", "x.txt", "both tabs and commas"),
    ],
)
def test_separators_are_not_guessed(tmp_path: Path, header: str, name: str, message: str) -> None:
    path = write_text(tmp_path / name, f"{header}\nG1\t1\t2\n")
    with pytest.raises(ValueError, match=message):
        TableSource(path, orientation="genes-by-samples")


def test_options(tmp_path: Path) -> None:
    path = write_text(tmp_path / "x.tsv", "g\ta\tb\nG1\t1\t2\n")
    with pytest.raises(FileNotFoundError, match="no such file"):
        TableSource(tmp_path / "no.tsv", orientation="genes-by-samples")
    with pytest.raises(ValueError, match="--orientation guess: choose one of genes-by-samples, samples-by-genes"):
        TableSource(path, orientation="guess")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="--symbol-column names a column of a table of genes-by-samples"):
        TableSource(path, orientation="samples-by-genes", symbol_column="a")
    with pytest.raises(ValueError, match=r"--symbol-column names 'symbol', but the columns are \['a', 'b'\]"):
        TableSource(path, orientation="genes-by-samples", symbol_column="symbol")
    with pytest.raises(ValueError, match=r"--skip-columns names 'c', but"):
        TableSource(path, orientation="genes-by-samples", skip_columns=["c"])
    with pytest.raises(ValueError, match="no column is left"):
        TableSource(path, orientation="genes-by-samples", skip_columns=["a", "b"])
    with pytest.raises(ValueError, match="1 of 2 samples have no row"):
        TableSource(path, orientation="genes-by-samples", sample_table=write_text(tmp_path / "l.tsv", "s\tx\na\t1\n"))
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize(
    ("table", "orientation", "hint"),
    [
        (GENES_BY_SAMPLES, "samples-by-genes", "30 of 30 sample names .* try --orientation genes-by-samples"),
        (SAMPLES_BY_GENES, "genes-by-samples", "30 of 30 sample names .* try --orientation samples-by-genes"),
        (GENES_BY_SAMPLES, "genes-by-samples", "the first column names genes .*--gene-map"),
        (SAMPLES_BY_GENES, "samples-by-genes", "the header names genes .*--gene-map"),
    ],
)
def test_the_hint_sees_a_table_that_is_turned(tmp_path: Path, table: pd.DataFrame, orientation: str, hint: str) -> None:
    buffer = io.StringIO()
    table.to_csv(buffer, sep="\t")
    with TableSource(write_text(tmp_path / "x.tsv", buffer.getvalue()), orientation=orientation) as source:  # type: ignore[arg-type]
        assert re.match(hint, source.gene_hint())


def test_a_file_that_changes_between_the_readings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_text(tmp_path / "x.tsv", "g\ta\nG1\t1\nG2\t2\n")
    first_reading = table_module._read_names

    def then_change(*arguments: object) -> object:
        names = first_reading(*arguments)  # type: ignore[arg-type]
        path.write_text("g\ta\nG1\t1\n")
        return names

    monkeypatch.setattr(table_module, "_read_names", then_change)
    with pytest.raises(ValueError, match="changed while it was read"):
        TableSource(path, orientation="genes-by-samples")
    assert list((tmp_path / "tmp").iterdir()) == []
