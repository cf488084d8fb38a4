"""AnnData in Zarr as a source: every layout and label type against AnnData itself, both versions, and bad folders by name."""

import shutil
import tempfile

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr

from tests.zarr_files import write_zarr
from txfm_data.sources.anndata_zarr import AnnDataZarrSource
from txfm_data.sources.protocol import chunks

N, G = 40, 8


@pytest.fixture(autouse=True)
def own_tmp(tmp_path_factory, monkeypatch):
    """Temporary folders go to a folder of the test's own; none may be left at the end."""
    folder = tmp_path_factory.mktemp("tmp")
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield folder
    assert list(folder.iterdir()) == []


def counts() -> np.ndarray:
    """Numbers that tell their own row and column, with zeros sprinkled in."""
    numbers = np.arange(N * G).reshape(N, G)
    return ((numbers + 1) * (numbers % 3 > 0)).astype(np.float32)


def example() -> ad.AnnData:
    obs = pd.DataFrame(
        {
            "plate": pd.Categorical([f"p{i % 2}" for i in range(N)], categories=["p1", "p0", "none"], ordered=True),
            "text": [f"t{i}" for i in range(N)],
            "size": np.arange(N) / 4,
            "n": np.arange(N, dtype=np.int32),
            "maybe": pd.array([None if i % 5 == 0 else i for i in range(N)], dtype="Int64"),
            "flag": pd.array([None if i % 7 == 0 else i % 2 == 0 for i in range(N)], dtype="boolean"),
        },
        index=[f"s{i}" for i in range(N)],
    )
    var = pd.DataFrame({"name": [f"N{i}" for i in range(G)], "symbol": [f"S{i}" for i in range(G)]})
    var.index = pd.Index([f"ENSG{i:011d}.{i + 1}" for i in range(G)])
    return ad.AnnData(sp.csr_matrix(counts()), obs, var)


def write(folder, adata: ad.AnnData, version: int = 3):
    return write_zarr(adata, folder / "in.zarr", version)


def whole(source) -> np.ndarray:
    return sp.vstack([part for _, part in chunks(source, 16 * 30)]).toarray()


LAYOUTS = {
    "csr": sp.csr_matrix, "csc": sp.csc_matrix, "dense": lambda x: x, "csr of int64": lambda x: sp.csr_matrix(x.astype(np.int64)),
    "csc of uint16": lambda x: sp.csc_matrix(x.astype(np.uint16)), "dense of int32": lambda x: x.astype(np.int32),
}  # fmt: skip


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_rows_in_the_types_of_the_folder(tmp_path, layout, version):
    stored = LAYOUTS[layout](counts())
    adata = example()
    adata.X = stored
    adata.raw = adata.copy()
    adata.layers["counts"] = stored
    adata = adata[:, :3].copy()
    path = write(tmp_path, adata, version)
    for options, expected in (({}, counts()[:, :3]), ({"layer": "counts"}, counts()[:, :3]), ({"raw": True}, counts())):
        with AnnDataZarrSource(path, spool_bytes=64 * 20, **options) as source:
            assert (source.n_obs, len(source.gene_ids)) == (N, expected.shape[1])
            found = source.read(0, N)
            assert found.dtype == stored.dtype and found.has_sorted_indices
            np.testing.assert_array_equal(whole(source), expected)
            np.testing.assert_array_equal(source.read(7, 7).toarray(), expected[7:7])
            reopened = source.opener()()
            np.testing.assert_array_equal(whole(reopened), expected)


@pytest.mark.parametrize("version", [2, 3])
def test_labels_are_as_anndata_reads_them(tmp_path, version):
    path = write(tmp_path, example(), version)
    expected = ad.read_zarr(path).obs
    with AnnDataZarrSource(path) as source:
        pd.testing.assert_frame_equal(source.obs(0, N), expected)
        pd.testing.assert_frame_equal(source.obs(5, 11), expected.iloc[5:11])
        assert source.obs_columns == tuple(expected.columns)
        assert source.symbols == tuple(f"S{i}" for i in range(G))
        assert source.gene_ids[3] == "ENSG00000000003.4"
        assert "index (8 of 8)" in source.gene_hint()
        with pytest.raises(IndexError, match="rows 0 to 41 of 40"):
            source.obs(0, N + 1)
    with AnnDataZarrSource(path, gene_ids="name", symbols="symbol") as source:
        assert source.gene_ids[2] == "N2"


def test_the_hash_is_of_the_bytes(tmp_path):
    path = write(tmp_path, example())
    copy = shutil.copytree(path, tmp_path / "copy.zarr")
    assert AnnDataZarrSource(path).content_sha256() == AnnDataZarrSource(copy).content_sha256()
    zarr.open_group(copy)["X/data"][0] = 99
    assert AnnDataZarrSource(path).content_sha256() != AnnDataZarrSource(copy).content_sha256()


def test_what_is_not_there(tmp_path):
    path = write(tmp_path, example())
    for options, message in (
        ({"layer": "x"}, "has no layers/x; it holds X: True, layers: \\[\\], raw: False"), ({"raw": True}, "has no raw/X"),
        ({"gene_ids": "x"}, "--gene-ids: var has no column 'x'"), ({"layer": "x", "raw": True}, "both named"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            AnnDataZarrSource(path, **options)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        AnnDataZarrSource(tmp_path / "none.zarr")
    with pytest.raises(ValueError, match="read from a local disk"):
        AnnDataZarrSource("s3://bucket/x.zarr")
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="not a Zarr group"):
        AnnDataZarrSource(tmp_path / "mine")
    zarr.open_group(tmp_path / "other.zarr", mode="w")
    with pytest.raises(ValueError, match="has no obs, so it is no AnnData"):
        AnnDataZarrSource(tmp_path / "other.zarr")


def damaged(path, change) -> str:
    """What is said of a folder after a change to it, when it is opened or read."""
    change(zarr.open_group(path, mode="r+"))
    with pytest.raises(ValueError, match="in.zarr") as caught, AnnDataZarrSource(path) as source:
        source.read(0, N)
        source.obs(0, N)
    return str(caught.value)


def put(name, at, value):
    def change(root):
        root[name][at] = value

    return change


def resized(name, n):
    return lambda root: root[name].resize((n,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("X/indptr", 5, 10**6), "indptr that does not rise"),
        (put("X/indices", 3, 99), "names column 99"),
        (put("X/indices", 3, -1), "names column -1"),
        (resized("X/data", 5), "the folder is inconsistent|it is inconsistent"),
        (resized("X/indptr", 5), "indptr has 5 entries"),
        (resized("obs/text", 5), "column 'text' has 5 rows"),
        (lambda root: root["X"].attrs.update(shape=[3]), "gives its shape as"),
        (lambda root: root["X"].attrs.update({"encoding-type": "pickle"}), "stored as 'pickle'"),
        (lambda root: root["X"].attrs.update(shape=[N, G + 5]), "obs has 40 rows and var 8"),
        (lambda root: root["obs"].attrs.update({"column-order": ["ghost"]}), "does not hold"),
        (
            lambda root: root.store_path.store.root.joinpath("X/data/zarr.json").unlink(),
            "stored as 'csr_matrix', expected",
        ),
        (lambda root: root.store_path.store.root.joinpath("X/data/c/0").write_bytes(b"x"), "cannot be read"),
        (lambda root: root.store_path.store.root.joinpath("obs/zarr.json").write_text("{"), "cannot be read"),
    ],
)
def test_damage_is_named(tmp_path, change, message):
    import re

    assert re.search(message, damaged(write(tmp_path, example()), change))
