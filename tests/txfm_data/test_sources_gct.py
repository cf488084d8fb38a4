import gzip
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.txfm_data.text_files import counts, whole, write_gct, write_text
from txfm_data.sources import text
from txfm_data.sources.gct import GctSource
from txfm_data.sources.protocol import chunks


@pytest.fixture(autouse=True)
def no_temporary_folder_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send temporary folders to a place that the tests can look at."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))


@pytest.mark.parametrize("numbered", [False, True])
@pytest.mark.parametrize("name", ["x.gct", "x.gct.gz"])
def test_a_gct_file_equals_what_pandas_reads(tmp_path: Path, name: str, numbered: bool) -> None:
    matrix = counts(80, 30)
    path = write_gct(tmp_path / name, matrix, numbered=numbered)
    table = pd.read_csv(path, sep="\t", skiprows=2, index_col="Name").drop(columns=["id"] if numbered else [])
    with GctSource(path) as source:
        assert np.array_equal(whole(source), table.drop(columns="Description").to_numpy().T)
        assert np.array_equal(whole(source), matrix.toarray())
        assert source.gene_ids == tuple(table.index)
        assert source.symbols == tuple(table["Description"])
        assert source.obs(0, 80).index.tolist() == [f"GTEX-{i}" for i in range(80)]
        assert (source.where, source.name, source.matrix_name, source.n_obs) == (str(path), name, "counts", 80)
        assert "--gene-map" in source.gene_hint()
        assert len(source.content_sha256()) == 64
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_file_much_larger_than_the_spools_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text.LineReader.__init__, "__kwdefaults__", {"block_bytes": 1_000})
    matrix = counts(300, 400)
    path = write_gct(tmp_path / "x.gct", matrix)
    with GctSource(path, _spool_bytes=4_096) as source:
        assert np.array_equal(whole(source), matrix.toarray())
        assert len(source.cuts(2_000)) > 10


def test_memory_is_bounded_whatever_the_size_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text.LineReader.__init__, "__kwdefaults__", {"block_bytes": 20_000})
    peaks = []
    for n_genes in (400, 1_600):
        path = write_gct(tmp_path / "x.gct", counts(1_000, n_genes, density=0.5))
        tracemalloc.start()
        with GctSource(path, _spool_bytes=2**18) as source:
            for _ in chunks(source, 2**18):
                pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    dense = 8 * 1_000 * 1_600
    assert peaks[1] < 1.3 * peaks[0] + 2**19, "names of genes may grow"
    assert peaks[1] < dense / 4


def test_another_process_opens_the_spool_and_not_the_file(tmp_path: Path) -> None:
    matrix = counts(20, 30)
    path = write_gct(tmp_path / "x.gct", matrix)
    labels = write_text(
        tmp_path / "labels.tsv", "s\tage\tsite\n" + "".join(f"GTEX-{i}\t{i}\tS{i}\n" for i in range(25))
    )
    source = GctSource(path, sample_table=labels)
    opener = pickle.loads(pickle.dumps(source.opener()))
    sha256 = source.content_sha256()
    path.unlink()
    labels.unlink()
    with opener() as other, other.opener()() as third:
        for same in (other, third):
            assert np.array_equal(whole(same), matrix.toarray())
            assert (same.gene_ids, same.symbols) == (source.gene_ids, source.symbols)
            pd.testing.assert_frame_equal(same.obs(3, 9), source.obs(3, 9))
            assert same.obs_columns == source.obs_columns == ("age", "site")
            assert (same.where, same.name, same.gene_hint()) == (source.where, source.name, source.gene_hint())
    assert np.array_equal(source.read(3, 5).toarray(), matrix[3:5].toarray())
    assert source.content_sha256() == sha256
    source.close()
    source.close()
    with pytest.raises(FileNotFoundError):
        opener()


def test_expected_counts_and_large_counts_survive(tmp_path: Path) -> None:
    path = write_text(
        tmp_path / "x.gct", "#1.2\n2\t2\t\nName\tDescription\ta\tb\nG1\t\t1.25\t4294967296\nG2\tx y\t0\t1e3\n"
    )
    with GctSource(path) as source:
        assert whole(source).tolist() == [[1.25, 0], [4294967296, 1000]]
        assert source.symbols == ("", "x y")


def test_rows_have_sorted_columns_and_no_zeros(tmp_path: Path) -> None:
    with GctSource(write_gct(tmp_path / "x.gct", counts(9, 9))) as source:
        rows = source.read(0, 9)
        assert rows.has_sorted_indices
        assert (rows.data != 0).all()
        assert source.read(4, 4).shape == (0, 9)
        with pytest.raises(IndexError):
            source.read(0, 10)


@given(
    values=st.integers(1, 6).flatmap(
        lambda n: st.lists(st.lists(st.integers(0, 2**40), min_size=n, max_size=n), min_size=1, max_size=8)
    ),
    end=st.sampled_from(["\n", "\r\n"]),
    last=st.booleans(),
)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, values: list[list[int]], end: str, last: bool
) -> None:
    lines = [
        "#1.2",
        f"{len(values)}\t{len(values[0])}",
        "\t".join(["Name", "Description", *map(str, range(len(values[0])))]),
    ]
    lines += ["\t".join(map(str, [f"G{i}", "s", *row])) for i, row in enumerate(values)]
    path = tmp_path_factory.mktemp("gct") / "x.gct"
    path.write_bytes((end.join(lines) + end * last).encode())
    with GctSource(path) as source:
        assert np.array_equal(whole(source), np.array(values).T)


HEAD = "#1.2\n2\t2\nName\tDescription\ta\tb\n"


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("", "first line is '', expected '#1.2'"),
        ("Name\tx\n", "this is no GCT file"),
        ("#1.3\n2\t2\t0\t0\n", "GCT 1.3 has other columns"),
        ("#1.2\n2\n", "line 2 must hold two whole numbers"),
        ("#1.2\n2\t-2\n", "line 2 must hold two whole numbers"),
        ("#1.2\n2\t2\ngene\ta\tb\n", "line 3 begins with"),
        ("#1.2\n2\t3\nName\tDescription\ta\tb\n", "declares 3 samples, the header names 2"),
        ("#1.2\n2\t0\nName\tDescription\n", "declares no samples"),
        ("#1.2\n2\t2\nName\tDescription\ta\ta\n", r"1 names of samples occur more than once, for example \['a'\]"),
        ("#1.2\n2\t2\nName\tDescription\ta\t\n", "sample number 2 has an empty name"),
        (HEAD + "G1\t\t1\t2\n", "declares 2 genes, but 1 follow"),
        (HEAD + "G1\t\t1\t2\nG2\t\t1\t2\nG3\t\t1\t2\n", "declares 2 genes, but more follow"),
        (HEAD + "G1\t\t1\t2\nG2\t\t1\n", "line 5 has 3 fields, expected 4"),
        (HEAD + "G1\t\t1\t2\t3\nG2\t\t1\t2\n", "line 4 has 5 fields, expected 4"),
        (HEAD + "G1\t\t1\t2\nG2\t\t1\tx2\n", r"line 5 \(G2\), column 'b' holds 'x2', not a number"),
        (HEAD + "G1\t\t1\t2\nG2\t\t\t2\n", r"line 5 \(G2\), column 'a' holds no value"),
        (HEAD + "G1\t\t1\tNA\nG2\t\t1\t2\n", r"line 4 \(G1\), column 'b' holds no value"),
        (HEAD + "G1\t\t1\tnan\nG2\t\t1\t2\n", r"line 4 \(G1\), column 'b' holds no value"),
        ("#1.2\n99999999999\t2\nName\tDescription\ta\tb\nG1\t\t1\t2\n", "is not a shape"),
    ],
)
def test_bad_files(tmp_path: Path, contents: str, message: str) -> None:
    path = write_text(tmp_path / "x.gct", contents)
    with pytest.raises(ValueError, match=message) as error:
        GctSource(path)
    assert str(path) in str(error.value)
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_cut_gzip_is_no_shorter_file(tmp_path: Path) -> None:
    path = write_gct(tmp_path / "x.gct.gz", counts(50, 300))
    packed = path.read_bytes()
    for length in (20, len(packed) // 2, len(packed) - 9, len(packed) - 1):
        path.write_bytes(packed[:length])
        with pytest.raises(ValueError, match="gzip stream is cut or damaged"):
            GctSource(path)
    flipped = bytearray(gzip.compress(HEAD.encode() + b"G1\t\t1\t2\nG2\t\t1\t2\n"))
    flipped[-6] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(ValueError, match="gzip stream is cut or damaged"):
        GctSource(path)
    assert list((tmp_path / "tmp").iterdir()) == []


def test_no_file_and_missing_labels(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        GctSource(tmp_path / "x.gct")
    path = write_gct(tmp_path / "x.gct", counts(3, 3))
    with pytest.raises(ValueError, match="2 of 3 samples have no row"):
        GctSource(path, sample_table=write_text(tmp_path / "l.tsv", "s\tx\nGTEX-1\t1\n"))
    assert list((tmp_path / "tmp").iterdir()) == []
