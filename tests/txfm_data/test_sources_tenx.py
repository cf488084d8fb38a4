import gzip
import pickle
import shutil
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scanpy
import scipy.io
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

from tests.txfm_data.text_files import (
    counts,
    ensembl,
    mtx_text,
    whole,
    write_h5,
    write_h5_v2,
    write_mtx,
    write_text,
)
from txfm_data.sources import text
from txfm_data.sources.tenx import TenxSource

MATRIX = counts(70, 30)
TYPES = ["Gene Expression"] * 12 + ["Antibody Capture"] * 8 + ["Gene Expression"] * 10
IS_GENE = np.array(TYPES) == "Gene Expression"
BARNYARD = ["GRCh38"] * 20 + ["mm10"] * 10
BARNYARD_IDS = [f"GRCh38_{gene}" for gene in ensembl(20)] + [f"mm10___ENSMUSG{i:011d}" for i in range(10)]


@pytest.fixture(autouse=True)
def no_temporary_folder_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send temporary folders to a place that the tests can look at."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))


def left_behind(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "tmp").iterdir())


def equals_scanpy(source: TenxSource, adata: anndata.AnnData) -> None:
    assert np.array_equal(whole(source), adata.X.toarray())
    assert source.gene_ids == tuple(adata.var["gene_ids"])
    assert source.symbols == tuple(adata.var_names)
    assert source.obs(0, source.n_obs).index.tolist() == adata.obs_names.tolist()


def test_an_h5_file_equals_what_scanpy_reads(tmp_path: Path) -> None:
    path = write_h5(tmp_path / "x.h5", MATRIX)
    with TenxSource(path) as source:
        equals_scanpy(source, scanpy.read_10x_h5(path))
        assert (source.where, source.name, source.matrix_name, source.n_obs) == (str(path), "x.h5", "matrix", 70)
        assert source.left_out == {}
        assert "--gene-map" in source.gene_hint()
        assert source.read(0, 70).dtype == np.int32
        assert source.read(0, 70).max() > 65_535


def test_version_2_equals_what_scanpy_reads(tmp_path: Path) -> None:
    path = write_h5_v2(tmp_path / "x.h5", {"GRCh38": MATRIX})
    with TenxSource(path) as source:
        equals_scanpy(source, scanpy.read_10x_h5(path))
        assert source.matrix_name == "GRCh38"
    with TenxSource(path, genome="GRCh38") as source:
        assert np.array_equal(whole(source), MATRIX.toarray())


@pytest.mark.parametrize("version", [2, 3])
def test_a_folder_equals_what_scanpy_reads(tmp_path: Path, version: int) -> None:
    folder = write_mtx(tmp_path / "filtered", MATRIX, version=version, end=".gz" if version == 3 else "")
    with TenxSource(folder) as source:
        equals_scanpy(source, scanpy.read_10x_mtx(folder))
        assert source.matrix_name == ("matrix.mtx.gz" if version == 3 else "matrix.mtx")
        assert (source.name, source.left_out) == ("filtered", {})
    assert left_behind(tmp_path) == []


def test_only_features_of_the_type_are_read(tmp_path: Path) -> None:
    path = write_h5(tmp_path / "x.h5", MATRIX, types=TYPES)
    folder = write_mtx(tmp_path / "f", MATRIX, types=TYPES)
    for place in (path, folder):
        with TenxSource(place) as source:
            assert source.left_out == {"Antibody Capture": 8}
            assert np.array_equal(whole(source), MATRIX.toarray()[:, IS_GENE])
            assert source.gene_ids == tuple(np.array(ensembl(30))[IS_GENE])
        with TenxSource(place, feature_type="Antibody Capture") as source:
            assert source.left_out == {"Gene Expression": 22}
            assert np.array_equal(whole(source), MATRIX.toarray()[:, ~IS_GENE])
        with pytest.raises(ValueError, match="no features of type 'Peaks'; .*'Antibody Capture': 8.*--feature-type"):
            TenxSource(place, feature_type="Peaks")
    with TenxSource(path) as source:
        equals_scanpy(source, scanpy.read_10x_h5(path))
    with pytest.raises(ValueError, match="no features of type 'Peaks'"):
        TenxSource(write_mtx(tmp_path / "v2", MATRIX, version=2), feature_type="Peaks")


@pytest.mark.parametrize("kind", ["h5", "folder"])
def test_several_genomes_need_a_choice(tmp_path: Path, kind: str) -> None:
    if kind == "h5":
        path = write_h5(tmp_path / "x.h5", MATRIX, genomes=BARNYARD, ids=BARNYARD_IDS)
    else:
        path = write_mtx(tmp_path / "f", MATRIX, ids=BARNYARD_IDS)
    with pytest.raises(ValueError, match=r"several genomes, \{'GRCh38': 20, 'mm10': 10\}; choose one with --genome"):
        TenxSource(path)
    with TenxSource(path, genome="GRCh38") as source:
        assert np.array_equal(whole(source), MATRIX.toarray()[:, :20])
        assert source.gene_ids == tuple(ensembl(20))
        assert source.left_out == {"Gene Expression (mm10)": 10}
    with TenxSource(path, genome="mm10") as source:
        assert source.gene_ids[0] == "ENSMUSG00000000000"
    with pytest.raises(ValueError, match=r"--genome hg19: the file has \['GRCh38', 'mm10'\]"):
        TenxSource(path, genome="hg19")
    assert left_behind(tmp_path) == []


def test_several_genomes_of_version_2(tmp_path: Path) -> None:
    path = write_h5_v2(tmp_path / "x.h5", {"hg19": MATRIX, "mm10": MATRIX[:, :9]})
    with pytest.raises(ValueError, match=r"several genomes, \['hg19', 'mm10'\]; choose one with --genome"):
        TenxSource(path)
    with TenxSource(path, genome="mm10") as source:
        assert np.array_equal(whole(source), MATRIX.toarray()[:, :9])
    with pytest.raises(ValueError, match="--genome x: the file has"):
        TenxSource(path, genome="x")


def test_a_prefix_of_the_three_files(tmp_path: Path) -> None:
    folder = write_mtx(tmp_path / "geo", MATRIX, prefix="GSM1_run.")
    with TenxSource(folder) as source:
        assert np.array_equal(whole(source), MATRIX.toarray())
    write_mtx(folder, MATRIX, prefix="GSM2_run.")
    with pytest.raises(ValueError, match=r"holds several: \['GSM1_run.matrix.mtx.gz', 'GSM2_run"):
        TenxSource(folder)


def test_entries_in_any_order_in_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text.LineReader.__init__, "__kwdefaults__", {"block_bytes": 500})
    matrix = counts(300, 90)
    order = np.random.default_rng(3).permutation(matrix.nnz)
    folder = write_mtx(tmp_path / "f", matrix, order=order, end="")
    with TenxSource(folder, _spool_bytes=4_096) as source:
        assert np.array_equal(whole(source), matrix.toarray())
        assert np.array_equal(whole(source), scanpy.read_mtx(folder / "matrix.mtx").X.toarray().T)
        assert source.cuts(1_000)[-1][1] == 300


def test_what_scipy_writes_and_blanks_of_any_width(tmp_path: Path) -> None:
    folder = write_mtx(tmp_path / "f", MATRIX, end="")
    scipy.io.mmwrite(folder / "matrix.mtx", sp.coo_matrix(MATRIX.T.astype(float) / 4))
    with TenxSource(folder) as source:
        assert np.array_equal(whole(source), MATRIX.toarray() / 4)
    head, *lines = mtx_text(MATRIX).splitlines()
    wide = [head, "", *(f"  {line.replace(' ', chr(9) + '  ')} " for line in lines[1:]), ""]
    (folder / "matrix.mtx").write_bytes("\r\n".join(wide).encode())
    with TenxSource(folder) as source:
        assert np.array_equal(whole(source), MATRIX.toarray())


@given(
    entries=st.dictionaries(st.tuples(st.integers(0, 5), st.integers(0, 3)), st.integers(0, 2**40)),
    block=st.integers(1, 50),
    seed=st.integers(0, 9),
)
def test_any_matrix(
    tmp_path_factory: pytest.TempPathFactory, entries: dict[tuple[int, int], int], block: int, seed: int
) -> None:
    dense = np.zeros((6, 4), np.int64)
    for place, value in entries.items():
        dense[place] = value
    matrix = sp.csr_matrix(dense)
    root = tmp_path_factory.mktemp("any")
    order = np.random.default_rng(seed).permutation(matrix.nnz)
    folder, path = write_mtx(root / "f", matrix, order=order), write_h5(root / "x.h5", counts(6, 4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text.LineReader.__init__, "__kwdefaults__", {"block_bytes": block})
        with TenxSource(folder) as source:
            assert np.array_equal(whole(source, 64), dense)
    with TenxSource(path) as source:
        assert np.array_equal(whole(source, 64), counts(6, 4).toarray())


@pytest.mark.parametrize("kind", ["h5", "folder"])
def test_another_process_opens_the_same(tmp_path: Path, kind: str) -> None:
    if kind == "h5":
        path = write_h5(tmp_path / "x.h5", MATRIX, types=TYPES)
    else:
        path = write_mtx(tmp_path / "f", MATRIX, types=TYPES)
    labels = write_text(tmp_path / "l.csv", "barcode,type\n" + "".join(f"CELL{i}-1,T{i}\n" for i in range(99)))
    with TenxSource(path, sample_table=labels) as source:
        opener = pickle.loads(pickle.dumps(source.opener()))
        if kind == "folder":
            source.content_sha256()
            shutil.rmtree(path)
        with opener() as other:
            assert np.array_equal(whole(other), MATRIX.toarray()[:, IS_GENE])
            assert (other.gene_ids, other.symbols, other.name) == (source.gene_ids, source.symbols, source.name)
            pd.testing.assert_frame_equal(other.obs(0, 70), source.obs(0, 70))
            assert other.obs_columns == ("type",)
        assert np.array_equal(whole(source), MATRIX.toarray()[:, IS_GENE])
    assert left_behind(tmp_path) == []


def test_unsorted_columns_and_stored_zeros_are_tidied(tmp_path: Path) -> None:
    path = write_h5(tmp_path / "x.h5", counts(2, 5, density=1.0))
    with h5py.File(path, "r+") as file:
        file["matrix/indices"][:5] = [4, 2, 0, 1, 3]
        file["matrix/data"][:5] = [40, 0, 10, 0, 30]
    with TenxSource(path) as source:
        assert source.read(0, 1).toarray().tolist() == [[10, 0, 0, 30, 40]]
        assert source.read(0, 1).nnz == 3


def test_the_hash_is_of_the_counts_and_not_of_the_labels(tmp_path: Path) -> None:
    path = write_h5(tmp_path / "x.h5", MATRIX)
    labels = write_text(tmp_path / "l.csv", "barcode,type\n" + "".join(f"CELL{i}-1,T{i}\n" for i in range(70)))
    with TenxSource(path) as one, TenxSource(path, sample_table=labels) as two:
        assert one.content_sha256() == two.content_sha256()
    folder = write_mtx(tmp_path / "f", MATRIX)
    with TenxSource(folder) as source:
        before = source.content_sha256()
    write_text(folder / "barcodes.tsv.gz", "".join(f"OTHER{i}-1\n" for i in range(70)))
    with TenxSource(folder) as source:
        assert source.content_sha256() != before


def replace(name: str, values: object) -> object:
    def change(group: h5py.Group) -> None:
        del group[name]
        if values is not None:
            group[name] = values

    return change


NNZ = MATRIX.nnz


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace("shape", np.array([30, 71])), "declares 30 x 71, but has 30 features and 70 barcodes"),
        (replace("barcodes", np.array(["a"] * 69, "S")), "declares 30 x 70, but has 30 features and 69 barcodes"),
        (replace("barcodes", np.arange(70)), "barcodes holds int64, expected text"),
        (replace("barcodes", np.array([b"\xff"] * 70)), "not UTF-8"),
        (replace("features/id", np.array(ensembl(29), "S")), "features have 29 ids, 30 names"),
        (replace("features/id", None), "has no list features/id"),
        (replace("data", None), "has no list data, so it is no matrix of 10x"),
        (replace("indptr", MATRIX.indptr[:-1]), "indptr has 70 entries, expected 71"),
        (replace("indptr", MATRIX.indptr + 1), f"indptr runs from 1 to {NNZ + 1}, with {NNZ} values"),
        (replace("indptr", np.r_[0, 9, 3, MATRIX.indptr[3:]]), "it must rise"),
        (replace("indptr", MATRIX.indptr.astype(float)), "indptr float64; expected"),
        (replace("shape", 30), "has no list shape"),
        (replace("data", MATRIX.data[:-5]), f"with {NNZ - 5} values and {NNZ} indices.*cut or damaged"),
        (replace("indices", MATRIX.indices[:-5]), f"with {NNZ} values and {NNZ - 5} indices"),
        (replace("indices", MATRIX.indices.astype(float)), "indices float64 and indptr int64; expected"),
    ],
)
def test_bad_h5_files(tmp_path: Path, change: object, message: str) -> None:
    path = write_h5(tmp_path / "x.h5", MATRIX)
    with h5py.File(path, "r+") as file:
        change(file["matrix"])  # type: ignore[operator]
    with pytest.raises(ValueError, match=message) as error:
        TenxSource(path)
    assert str(path) in str(error.value)
    path.rename(tmp_path / "closed.h5")


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [(7, 30, "name feature 30, but there are 30"), (7, -1, "name feature -1"), (1, None, "feature twice in a cell")],
)
def test_bad_indices_are_found_when_read(tmp_path: Path, at: int, value: int | None, message: str) -> None:
    path = write_h5(tmp_path / "x.h5", MATRIX)
    with h5py.File(path, "r+") as file:
        file["matrix/indices"][at] = file["matrix/indices"][0] if value is None else value
    with TenxSource(path) as source, pytest.raises(ValueError, match=message):
        whole(source)


def test_a_damaged_chunk_is_found_when_read(tmp_path: Path) -> None:
    path = write_h5(tmp_path / "x.h5", MATRIX)
    with h5py.File(path, "r+") as file:
        data = file["matrix/data"][:]
        del file["matrix/data"]
        chunked = file["matrix"].create_dataset("data", data=data, chunks=(200,), compression="gzip")
        offset = chunked.id.get_chunk_info(1).byte_offset
    whole_file = bytearray(path.read_bytes())
    whole_file[offset + 5 : offset + 15] = b"x" * 10
    path.write_bytes(whole_file)
    with (
        TenxSource(path) as source,
        pytest.raises(ValueError, match="cells 0 to 70 cannot be read .* get the file again"),
    ):
        source.read(0, 70)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        TenxSource(tmp_path / "x.h5")
    with pytest.raises(ValueError, match="not an HDF5 file"):
        TenxSource(write_text(tmp_path / "t.h5", "x"))
    with h5py.File(tmp_path / "molecules.h5", "w") as file:
        file["barcode_idx"] = [1]
    with pytest.raises(ValueError, match=r"holds \['barcode_idx'\], expected a group 'matrix'.*filtered_feature_bc"):
        TenxSource(tmp_path / "molecules.h5")
    path = write_h5(tmp_path / "x.h5", MATRIX)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match="cut or damaged"):
        TenxSource(path)
    folder = write_mtx(tmp_path / "f", MATRIX)
    with pytest.raises(ValueError, match="give the folder of matrix.mtx"):
        TenxSource(folder / "matrix.mtx.gz")


def test_folders_that_lack_files_or_have_too_many(tmp_path: Path) -> None:
    folder = write_mtx(tmp_path / "outs" / "filtered", MATRIX)
    with pytest.raises(FileNotFoundError, match=r"holds none, but \['filtered'\] below it do"):
        TenxSource(tmp_path / "outs")
    write_text(folder / "features.tsv", "x\n")
    with pytest.raises(ValueError, match=r"has \['features.tsv', 'features.tsv.gz'\]"):
        TenxSource(folder)
    for name in ("features.tsv", "features.tsv.gz"):
        (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match="expected one of .*genes.tsv.* beside matrix.mtx.gz"):
        TenxSource(folder)
    write_mtx(folder, MATRIX)
    (folder / "barcodes.tsv.gz").unlink()
    with pytest.raises(FileNotFoundError, match="expected one of .*barcodes.tsv"):
        TenxSource(folder)
    (folder / "matrix.mtx.gz").unlink()
    with pytest.raises(FileNotFoundError, match="expected one matrix.mtx or matrix.mtx.gz, holds none"):
        TenxSource(folder)


BANNER = "%%MatrixMarket matrix coordinate integer general\n"


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("", "begins with ''"),
        ("3 2 1\n1 1 1\n", "begins with '3 2 1', expected '%%MatrixMarket"),
        ("%%MatrixMarket matrix array integer general\n3 2\n", "of kind 'array integer general'"),
        ("%%MatrixMarket matrix coordinate pattern general\n3 2 1\n1 1\n", "of kind 'coordinate pattern general'"),
        ("%%MatrixMarket matrix coordinate integer symmetric\n3 2 1\n1 1 1\n", "integer symmetric'"),
        (BANNER + "3 2\n", "line 2 must hold rows, columns and entries"),
        (BANNER + "%\n3 2 -1\n", "line 3 must hold rows, columns and entries"),
        (BANNER + "3 3 1\n1 1 1\n", "declares 3 features x 3 barcodes, but features.tsv names 3 and barcodes.tsv 2"),
        (BANNER + "2 3 1\n1 1 1\n", "seems to be cells x genes, expected genes x cells"),
        (BANNER + "3 2 2\n1 1 1\n", "declares 2 entries, but only 1 follow"),
        (BANNER + "3 2 1\n1 1 1\n2 1 1\n", "declares 1 entries, but more follow"),
        (BANNER + "3 2 99999999999999\n1 1 1\n", "declares 99999999999999 entries, but only 1 follow"),
        (BANNER + "3 2 2\n1 1 1\n\n4 1 1\n", "line 5 names row 4, but there are 3"),
        (BANNER + "3 2 2\n1 1 1\n3 3 1\n", "line 4 names column 3, but there are 2"),
        (BANNER + "3 2 2\n1 1 1\n0 1 1\n", "line 4 names row 0"),
        (BANNER + "3 2 2\n1 1 1\n-1 1 1\n", "line 4 names row -1"),
        (BANNER + "3 2 2\n1 1 1\n2 1\n", "line 4 is '2 1', expected row, column and value"),
        (BANNER + "3 2 2\n1 1 1\n2 1 1 1\n", "line 4 is '2 1 1 1', expected"),
        (BANNER + "3 2 2\n1 1 1\n2 1 x\n", "line 4 is '2 1 x', expected"),
        (BANNER + "3 2 2\n1 1 1\n2.5 1 1\n", "line 4 is '2.5 1 1', expected"),
        (BANNER + "3 2 2\n1 1 1\n1 1 1\n", "occurs more than once"),
    ],
)
def test_bad_matrices(tmp_path: Path, contents: str, message: str) -> None:
    folder = write_mtx(tmp_path / "f", counts(2, 3), end="")
    write_text(folder / "matrix.mtx", contents)
    with pytest.raises(ValueError, match=message) as error:
        TenxSource(folder)
    assert str(folder / "matrix.mtx") in str(error.value)
    assert left_behind(tmp_path) == []


def test_bad_names(tmp_path: Path) -> None:
    folder = write_mtx(tmp_path / "f", counts(2, 3), end="")
    write_text(folder / "features.tsv", "a\tb\tGene Expression\nc\td\ne\tf\n")
    with pytest.raises(ValueError, match=r"has lines of \[2, 3\] fields, expected id, name and feature type"):
        TenxSource(folder)
    write_text(folder / "features.tsv", "")
    with pytest.raises(ValueError, match="has no lines, expected id"):
        TenxSource(folder)


@pytest.mark.parametrize("name", ["matrix.mtx.gz", "barcodes.tsv.gz", "features.tsv.gz"])
def test_a_cut_gzip_is_no_shorter_file(tmp_path: Path, name: str) -> None:
    folder = write_mtx(tmp_path / "f", MATRIX)
    packed = gzip.compress(gzip.decompress((folder / name).read_bytes()))
    for length in (len(packed) // 2, len(packed) - 8, len(packed) - 1):
        (folder / name).write_bytes(packed[:length])
        with pytest.raises(ValueError, match="gzip stream is cut or damaged") as error:
            TenxSource(folder)
        assert str(folder / name) in str(error.value)
    assert left_behind(tmp_path) == []


def test_an_empty_matrix_has_cells_without_counts(tmp_path: Path) -> None:
    folder = write_mtx(tmp_path / "f", sp.csr_matrix((4, 3), dtype=np.int64))
    with TenxSource(folder) as source:
        assert whole(source).tolist() == np.zeros((4, 3)).tolist()


def test_labels_need_barcodes_of_their_own(tmp_path: Path) -> None:
    folder = write_mtx(tmp_path / "f", counts(2, 3), end="")
    write_text(folder / "barcodes.tsv", "A\nA\n")
    labels = write_text(tmp_path / "l.csv", "barcode,type\nA,x\n")
    with TenxSource(folder) as source:
        assert source.obs(0, 2).index.tolist() == ["A", "A"]
    with pytest.raises(ValueError, match="1 names of the matrix's samples occur more than once"):
        TenxSource(folder, sample_table=labels)


def test_real_cells_come_back_from_both_layouts(tmp_path: Path, real_data: Path) -> None:
    adata = anndata.read_h5ad(real_data / "sc_pbmc3k.h5ad")[:500]
    matrix = sp.csr_matrix(adata.X).astype(np.int64)
    path, folder = write_h5(tmp_path / "x.h5", matrix), write_mtx(tmp_path / "f", matrix)
    with TenxSource(path) as one, TenxSource(folder, _spool_bytes=2**20) as two:
        for start, stop in one.cuts(2**20):
            assert (one.read(start, stop) != two.read(start, stop)).nnz == 0
            assert (one.read(start, stop) != matrix[start:stop]).nnz == 0
