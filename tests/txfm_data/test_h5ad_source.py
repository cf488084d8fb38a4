"""h5ad files as a source: every layout and label type against AnnData itself, addresses, and bad files by name."""

import hashlib
import multiprocessing
import tempfile
import tracemalloc

import anndata as ad
import fsspec
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata.io import write_elem

from tests.s3_server import BUCKET, environment, s3_server
from txfm_data.address import redact
from txfm_data.sources.h5ad import H5adSource
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


def counts(n_obs: int = N) -> np.ndarray:
    """Numbers that tell their own row and column, with zeros sprinkled in."""
    numbers = np.arange(n_obs * G).reshape(n_obs, G)
    return ((numbers + 1) * (numbers % 3 > 0)).astype(np.float32)


def example(n_obs: int = N) -> ad.AnnData:
    obs = pd.DataFrame({"plate": pd.Categorical([f"p{i % 2}" for i in range(n_obs)])})
    obs.index = pd.Index([f"s{i}" for i in range(n_obs)])
    var = pd.DataFrame({"name": [f"N{i}" for i in range(G)], "symbol": [f"S{i}" for i in range(G)]})
    var.index = pd.Index([f"ENSG{i:011d}.{i + 1}" for i in range(G)])
    return ad.AnnData(sp.csr_matrix(counts(n_obs)), obs, var)


def write(tmp_path, adata: ad.AnnData, name: str = "in.h5ad"):
    adata.write_h5ad(tmp_path / name)
    return tmp_path / name


def whole(source) -> np.ndarray:
    return sp.vstack([part for _, part in chunks(source, 16 * 30)]).toarray()


LAYOUTS = {
    "csr": sp.csr_matrix, "csc": sp.csc_matrix, "dense": lambda x: x,
    "csr of int64": lambda x: sp.csr_matrix(x.astype(np.int64)), "csc of uint16": lambda x: sp.csc_matrix(x.astype(np.uint16)),
    "dense of int32": lambda x: x.astype(np.int32), "csc of float64": lambda x: sp.csc_matrix(x.astype(np.float64)),
}  # fmt: skip


@pytest.mark.parametrize("place", ["X", "layer", "raw"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_rows_in_the_types_of_the_file(tmp_path, layout, place):
    adata = example()
    stored = LAYOUTS[layout](counts())
    if place == "raw":
        adata.X = stored
        adata.raw = adata.copy()
        adata = adata[:, :3].copy()
        adata.X = np.zeros((N, 3), np.float32)
    elif place == "layer":
        adata.layers["counts"] = stored
    else:
        adata.X = stored
    options = {"raw": {"raw": True}, "layer": {"layer": "counts"}, "X": {}}[place]
    with H5adSource(write(tmp_path, adata), spool_bytes=64 * 20, **options) as source:
        assert source.matrix_name == {"raw": "raw/X", "layer": "layers/counts", "X": "X"}[place]
        assert (source.n_obs, len(source.gene_ids)) == (N, G)
        cuts = source.cuts(16 * 30)
        assert len(cuts) > 5 and [b for _, b in cuts[:-1]] == [a for a, _ in cuts[1:]]
        np.testing.assert_array_equal(whole(source), counts())
        rows = source.read(7, 19)
        assert rows.dtype == stored.dtype and rows.has_canonical_format and rows.nnz == np.count_nonzero(counts()[7:19])
        assert source.read(5, 5).shape == (0, G)


def test_cuts_stay_within_their_size(tmp_path):
    with H5adSource(write(tmp_path, example(300))) as source:
        parts = list(chunks(source, 16 * 40))
        assert len(parts) > 20 and max(part.nnz for _, part in parts) <= 40
    path = write(tmp_path, example(300), "dense.h5ad")
    with h5py.File(path, "r+") as file:
        del file["X"]
        file.create_dataset("X", data=counts(300), chunks=(30, 3), compression="gzip")
    with H5adSource(path) as source:
        assert source.cuts(75 * G * 20) == [(start, start + 60) for start in range(0, 300, 60)]
        assert source.cuts(1) == [(row, row + 1) for row in range(300)]
        np.testing.assert_array_equal(source.read(0, 300).toarray(), counts(300))


def test_repeated_and_unsorted_entries_are_summed_and_sorted(tmp_path):
    for kind, name in ((sp.csr_matrix, "row"), (sp.csc_matrix, "column")):
        path = write(tmp_path, example(2), f"{name}.h5ad")
        by_row = ([4.0, 1, 2, 0, 5], [3, 1, 3, 2, 0], [0, 4, 5])
        by_column = ([5.0, 1, 0, 4, 2], [1, 0, 0, 0, 0], [0, 1, 2, 3, 5, 5, 5, 5, 5])
        with h5py.File(path, "r+") as file:
            del file["X"]
            write_elem(file, "X", kind(by_row if name == "row" else by_column, shape=(2, G)))
        with H5adSource(path) as source:
            rows = source.read(0, 2)
            assert rows.indices.tolist() == [1, 3, 0] and rows.data.tolist() == [1, 6, 5], kind


@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
def test_nan_and_negative_values_reach_the_reader(tmp_path, layout):
    adata, values = example(), counts()
    values[3, 4], values[5, 6], values[6, 6] = np.nan, -2, np.inf
    adata.X = LAYOUTS[layout](values)
    with H5adSource(write(tmp_path, adata)) as source:
        np.testing.assert_array_equal(whole(source), values)


def test_a_matrix_by_columns_is_turned_in_bounded_memory(tmp_path):
    """6.4 MB of values by columns, of which one pass through memory would take 13 MB or more."""
    rng = np.random.default_rng(0)
    matrix = sp.random(20_000, 40, density=0.5, format="csc", dtype=np.float64, random_state=rng)
    adata = ad.AnnData(matrix, var=pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(40)]))
    adata.obs_names = [f"s{i}" for i in range(20_000)]
    with H5adSource(write(tmp_path, adata), spool_bytes=1024**2) as source:
        tracemalloc.start()
        total = sum(part.sum() for _, part in chunks(source, 1024**2))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert total == pytest.approx(matrix.sum()) and peak < 4 * 1024**2


def labels(n: int) -> pd.DataFrame:
    """One column of every type that obs can hold, with missing values where the type has them."""
    number = np.arange(n)
    text = np.array([f"t{i}" for i in number], object)
    return pd.DataFrame(
        {
            "category": pd.Categorical.from_codes(number % 4 - 1, ["a", "b", "ü"]),
            "ordered": pd.Categorical.from_codes(number % 3 - 1, ["low", "high"], ordered=True),
            "numbers as categories": pd.Categorical.from_codes(number % 3 - 1, [10, 20]),
            "empty category": pd.Categorical([np.nan] * n),
            "text": text,
            "float": np.where(number % 5, number / 3, np.nan),
            "float32": number.astype(np.float32),
            "int": number - 3,
            "uint8": (number % 256).astype(np.uint8),
            "bool": number % 2 == 0,
            "nullable int": pd.array([None if i % 3 == 0 else i for i in number], dtype="Int64"),
            "nullable bool": pd.array([None if i % 3 == 0 else bool(i % 2) for i in number], dtype="boolean"),
            "nullable text": pd.array([None if i % 3 == 0 else f"v{i}" for i in number], dtype="string"),
            "column-order": number,
        },
        index=pd.Index([f"s{i}" for i in number]),
    )  # fmt: skip


@pytest.mark.parametrize("index_name", [None, "barcode"])
def test_obs_by_rows_is_that_of_anndata_for_every_type(tmp_path, index_name):
    frame = labels(N).rename_axis(index_name)
    with ad.settings.override(allow_write_nullable_strings=True):
        adata = ad.AnnData(sp.csr_matrix(counts()), frame)
        adata.strings_to_categoricals = lambda *_: None  # keep text as text
        path = tmp_path / "in.h5ad"
        ad.AnnData(sp.csr_matrix(counts())).write_h5ad(path)
        with h5py.File(path, "r+") as file:
            del file["obs"]
            write_elem(file, "obs", frame)
    expected = ad.read_h5ad(path).obs
    with H5adSource(path) as source:
        assert source.obs_columns == tuple(frame.columns)
        pd.testing.assert_frame_equal(source.obs(0, N), expected)
        parts = [source.obs(start, start + 9) for start in range(0, N - 9, 9)]
        pd.testing.assert_frame_equal(parts[2], expected.iloc[18:27])
        assert source.obs(4, 4).shape == (0, len(frame.columns))


def test_obs_without_columns_and_categories_by_an_older_anndata(tmp_path):
    path = write(tmp_path, ad.AnnData(sp.csr_matrix(counts())))
    with h5py.File(path, "r+") as file:
        del file["obs"]
        write_elem(file, "obs", pd.DataFrame(index=[f"s{i}" for i in range(N)]))
    with H5adSource(path) as source:
        assert source.obs_columns == ()
        pd.testing.assert_frame_equal(source.obs(3, 7), ad.read_h5ad(path).obs.iloc[3:7], check_column_type=False)
    with h5py.File(path, "r+") as file:
        del file["obs"]
        obs = file.create_group("obs")
        obs.attrs.update({"encoding-type": "dataframe", "encoding-version": "0.1.0", "_index": "index"})
        obs.attrs["column-order"] = ["plate", "n", "note"]
        text = h5py.string_dtype()
        obs.create_dataset("index", data=[f"s{i}" for i in range(N)], dtype=text)
        obs["plate"], obs["n"] = (np.arange(N) % 3 - 1).astype(np.int8), np.arange(N)
        obs.create_dataset("note", data=["é"] * N, dtype=text)
        kept = obs.create_dataset("__categories/plate", data=["p0", "p1"], dtype=text)
        kept.attrs["ordered"] = False
        obs["plate"].attrs["categories"] = kept.ref
    with pytest.warns(Warning):  # anndata says that such files are old
        expected = ad.read_h5ad(path).obs
    with H5adSource(path) as source:
        pd.testing.assert_frame_equal(source.obs(0, N), expected)
        pd.testing.assert_frame_equal(source.obs(9, 20), expected.iloc[9:20])


def test_only_the_rows_asked_for_are_in_memory(tmp_path):
    n = 200_000
    path = write(tmp_path, ad.AnnData(sp.csr_matrix((3, 2), dtype=np.float32)))
    frame = pd.DataFrame({"x": np.arange(n), "text": [f"t{i}" for i in range(n)]}, index=[f"s{i}" for i in range(n)])
    with h5py.File(path, "r+") as file:
        for name, value in (("obs", frame), ("X", sp.csr_matrix((n, 2), dtype=np.float32))):
            del file[name]
            write_elem(file, name, value)
    tracemalloc.start()
    with H5adSource(path) as source:
        opened = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        assert source.obs(150_000, 150_100)["text"].iloc[3] == "t150003"
        peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert opened < 8 * n + 4 * 1024**2 and peak < 8 * n + 4 * 1024**2  # the index pointers, and little more


def test_gene_ids_and_symbols_by_name_and_by_default(tmp_path):
    adata = example()
    adata.var["ensembl"] = pd.Categorical([*adata.var_names[:-1], None])
    path = write(tmp_path, adata)
    with H5adSource(path) as source:
        assert source.gene_ids == tuple(adata.var_names) and source.symbols == tuple(f"S{i}" for i in range(G))
        assert source.columns_with_ensembl_ids() == {"index": G, "ensembl": G - 1}
        held = "columns of var that hold Ensembl ids: index (8 of 8), ensembl (7 of 8)"
        assert source.gene_hint() == f"{held}; name the one to use with --gene-ids COLUMN"
    with H5adSource(path, gene_ids="ensembl", symbols="name") as source:
        assert source.gene_ids == (*adata.var_names[:-1], "") and source.symbols == tuple(f"N{i}" for i in range(G))
    adata.var = pd.DataFrame(index=[f"N{i}" for i in range(G)])
    with H5adSource(write(tmp_path, adata)) as source:
        assert source.symbols == ("",) * G and source.gene_hint() == "no column of var holds Ensembl ids"


def rows_in_another_process(opener, queue):
    source = opener()
    queue.put((source.read(3, 9).toarray(), source.gene_ids, source.obs(3, 9).index.tolist()))
    source.close()


@pytest.mark.parametrize("layout", ["csr", "csc"])
def test_another_process_opens_the_same_matrix(tmp_path, own_tmp, layout):
    adata = example()
    adata.layers["counts"] = LAYOUTS[layout](counts())
    adata.var_names = [f"N{i}" for i in range(G)]
    adata.var["ensembl"] = [f"ENSG{i:011d}" for i in range(G)]
    context = multiprocessing.get_context("spawn")
    with H5adSource(write(tmp_path, adata), layer="counts", gene_ids="ensembl") as source:
        opener, queue = source.opener(), context.Queue()
        process = context.Process(target=rows_in_another_process, args=(opener, queue))
        process.start()
        rows, gene_ids, names = queue.get(timeout=60)
        process.join()
        assert len(list(own_tmp.iterdir())) == (layout == "csc")
        np.testing.assert_array_equal(rows, counts()[3:9])
        assert gene_ids == source.gene_ids and names == [f"s{i}" for i in range(3, 9)]
        with opener() as again:
            again.read(0, 3)
        np.testing.assert_array_equal(source.read(3, 9).toarray(), rows)


@pytest.mark.parametrize("layout", ["csr", "csc"])
def test_an_address_is_read_as_a_file_is_and_its_credentials_are_not_told(tmp_path, layout):
    adata = example()
    adata.X = LAYOUTS[layout](counts())
    path = write(tmp_path, adata)
    address = "memory://me:secret@bucket/in.h5ad?token=hidden"
    with fsspec.open(address, "wb") as remote:
        remote.write(path.read_bytes())
    with H5adSource(address) as source, H5adSource(f"file://{path}") as local:
        assert (source.where, source.name, local.name) == (redact(address), "in.h5ad", "in.h5ad")
        np.testing.assert_array_equal(whole(source), counts())
        pd.testing.assert_frame_equal(source.obs(2, 5), local.obs(2, 5))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert source.content_sha256() == local.content_sha256() == digest
        with source.opener()() as again:
            np.testing.assert_array_equal(whole(again), counts())
        for options, message in (({"layer": "x"}, "has no layers/x"), ({"gene_ids": "x"}, "var has no column")):
            with pytest.raises(ValueError, match=message) as failure:
                H5adSource(address, **options)
            assert (
                "bucket" in str(failure.value)
                and "secret" not in str(failure.value)
                and "hidden" not in str(failure.value)
            )


def test_object_storage_is_read_by_another_process_too(tmp_path):
    adata = example()
    adata.X = sp.csc_matrix(counts())
    path = write(tmp_path, adata)
    context = multiprocessing.get_context("spawn")
    with s3_server() as server, environment(server.environment()):
        client = server.client()
        client.put_object(Bucket=BUCKET, Key="folder/in.h5ad", Body=path.read_bytes())
        client.close()
        with H5adSource(f"s3://{BUCKET}/folder/in.h5ad") as source:
            np.testing.assert_array_equal(whole(source), counts())
            assert source.content_sha256() == hashlib.sha256(path.read_bytes()).hexdigest()
            queue = context.Queue()
            process = context.Process(target=rows_in_another_process, args=(source.opener(), queue))
            process.start()
            np.testing.assert_array_equal(queue.get(timeout=60)[0], counts()[3:9])
            process.join()
        with pytest.raises(FileNotFoundError, match=f"s3://{BUCKET}/none.h5ad"):
            H5adSource(f"s3://{BUCKET}/none.h5ad")


def test_bad_addresses_are_named_without_credentials(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.h5ad") as failure:
        H5adSource("memory://me:secret@bucket/none.h5ad")
    assert "secret" not in str(failure.value)
    with pytest.raises(ValueError, match="no scheme nothing://") as failure:
        H5adSource("nothing://me:secret@b/x")
    assert "secret" not in str(failure.value)
    with fsspec.open("memory://bucket/text.h5ad", "wb") as remote:
        remote.write(b"hello" * 100)
    with pytest.raises(ValueError, match="not an HDF5 file"):
        H5adSource("memory://bucket/text.h5ad")
    path = write(tmp_path, example())
    with fsspec.open("memory://bucket/cut.h5ad", "wb") as remote:
        remote.write(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="truncated or damaged"):
        H5adSource("memory://bucket/cut.h5ad")


def test_what_is_no_h5ad_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.h5ad: no such file"):
        H5adSource(tmp_path / "none.h5ad")
    with pytest.raises(FileNotFoundError, match="no such file"):
        H5adSource(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        H5adSource(f"file://{tmp_path}/none.h5ad")
    (tmp_path / "text.h5ad").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.h5ad: not an HDF5 file"):
        H5adSource(tmp_path / "text.h5ad")
    with h5py.File(tmp_path / "other.h5ad", "w") as file:
        file["x"] = [1]
    with pytest.raises(ValueError, match="has no obs, so it is not an h5ad file"):
        H5adSource(tmp_path / "other.h5ad")
    with h5py.File(tmp_path / "old.h5ad", "w") as file:
        file["obs"], file["var"], file["X"] = (
            np.zeros(2, [("index", "S3")]),
            np.zeros(2, [("index", "S3")]),
            np.zeros((2, 2)),
        )
    with pytest.raises(ValueError, match=r"obs is not a data frame as AnnData 0\.7 or later stores it; open the file"):
        H5adSource(tmp_path / "old.h5ad")
    whole_file = write(tmp_path, example()).read_bytes()
    for size in (len(whole_file) - 1, len(whole_file) // 2, 600):
        (tmp_path / "cut.h5ad").write_bytes(whole_file[:size])
        with pytest.raises(ValueError, match=r"cut\.h5ad: .*truncated or damaged"):
            H5adSource(tmp_path / "cut.h5ad")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": "x"}, r"has no layers/x; it holds X: True, layers: \['counts'\], raw: False; name another with --layer"),
        ({"layer": ""}, "layers/ is stored as"), ({"raw": True}, "has no raw/X"),
        ({"layer": "x", "raw": True}, "a layer and raw are both named; choose one"),
        ({"gene_ids": "x"}, r"--gene-ids: var has no column 'x'; it has \['name', 'symbol'\] and its index"),
        ({"symbols": "x"}, "--symbols: var has no column 'x'"),
    ],
)  # fmt: skip
def test_bad_options_are_named(tmp_path, options, message):
    adata = example()
    adata.layers["counts"] = adata.X.copy()
    with pytest.raises(ValueError, match=message):
        H5adSource(write(tmp_path, adata), **options)


def replace(name: str, change):
    def spoil(file: h5py.File) -> None:
        values = change(file[name][()])
        del file[name]
        file[name] = values

    return spoil


def put(name: str, at: int, value):
    def spoil(file: h5py.File) -> None:
        file[name][at] = value

    return spoil


SPOILED = {
    "shape": (lambda f: f["X"].attrs.__setitem__("shape", [N - 1, G]), r"indptr has 41 entries \(expected 40\)"),
    "huge shape": (lambda f: f["X"].attrs.__setitem__("shape", [2**60, G]), "but indptr has 41 entries"),
    "wide": (lambda f: f["X"].attrs.__setitem__("shape", [N, G + 1]), "X is 40 x 9, but obs has 40 rows and var 8"),
    "no shape": (lambda f: f["X"].attrs.__delitem__("shape"), r"gives its shape as \[\], expected two sizes"),
    "short data": (replace("X/data", lambda x: x[:-1]), r"indices \d+ and data \d+; the file is inconsistent"),
    "short indptr": (replace("X/indptr", lambda x: x[:-1]), "indptr has 40 entries"),
    "falling indptr": (put("X/indptr", 4, 10_000), "indptr that does not rise from 0 to the"),
    "indptr end": (put("X/indptr", -1, 5), "indptr that does not rise"),
    "float indices": (replace("X/indices", lambda x: x.astype(float)), "indices that are not integers"),
    "text": (replace("X/data", lambda x: np.full(x.shape, b"a")), "expected numbers; choose another matrix"),
    "no data": (lambda f: f["X"].__delitem__("data"), "stored as 'cs[rc]_matrix', expected csr_matrix"),
    "other kind": (lambda f: f["X"].attrs.__setitem__("encoding-type", "coo_matrix"), "stored as 'coo_matrix'"),
    "short label": (replace("obs/plate/codes", lambda x: x[:-1]), "column 'plate' has 39 rows, the index 40"),
    "lost label": (lambda f: f["obs"].__delitem__("plate"), r"names columns that it does not hold: \['plate'\]"),
    "short obs": (lambda f: write_elem(f, "obs", pd.DataFrame(index=["a"])), "but obs has 1 rows"),
    "no var": (lambda f: write_elem(f, "var", {}), "var is not a data frame"),
}  # fmt: skip


@pytest.mark.parametrize("layout", ["csr", "csc"])
@pytest.mark.parametrize("how", SPOILED)
def test_sizes_that_disagree_are_found_when_the_file_is_opened(tmp_path, how, layout):
    adata = example()
    adata.X = LAYOUTS[layout](counts())
    path = write(tmp_path, adata)
    spoil, message = SPOILED[how]
    with h5py.File(path, "r+") as file:
        spoil(file)
    if layout == "csc":
        message = {"shape": "X is 39 x 8, but obs has 40 rows", "wide": "indptr has 9 entries",
                   "short indptr": "indptr has 8 entries",
                   "huge shape": "X is 1152921504606846976 x 8, but obs has 40"}.get(how, message)  # fmt: skip
    with pytest.raises(ValueError, match=rf"^{path}: .*{message}"):
        H5adSource(path)


@pytest.mark.parametrize("layout", ["csr", "csc"])
@pytest.mark.parametrize("value", [-1, N + G])
def test_an_index_out_of_range_is_found_when_its_rows_are_read(tmp_path, own_tmp, layout, value):
    adata = example()
    adata.X = LAYOUTS[layout](counts())
    path = write(tmp_path, adata)
    with h5py.File(path, "r+") as file:
        file["X/indices"][20] = value
    what = {"csr": f"names column {value}, expected 0 to 7", "csc": f"names row {value}, expected 0 to 39"}[layout]
    with H5adSource(path) as source, pytest.raises(ValueError, match=rf"^{path}: X {what}; the file is damaged"):
        whole(source)
    assert list(own_tmp.iterdir()) == []


def test_damaged_labels_and_values_are_named(tmp_path):
    path = tmp_path / "in.h5ad"
    example(400).write_h5ad(path, compression="gzip")
    with h5py.File(path) as file:
        at = file["X/data"].id.get_chunk_info(0)
    raw = bytearray(path.read_bytes())
    raw[at.byte_offset : at.byte_offset + at.size] = bytes(at.size)
    path.write_bytes(raw)
    with (
        H5adSource(path) as source,
        pytest.raises(ValueError, match=rf"^{path}: X cannot be read \(.*; the file is truncated"),
    ):
        source.read(0, 9)
    path = write(tmp_path, example(), "codes.h5ad")
    with h5py.File(path, "r+") as file:
        file["obs/plate/codes"][7] = 9
    with (
        H5adSource(path) as source,
        pytest.raises(ValueError, match=rf"^{path}: obs cannot be read \(codes need to be"),
    ):
        source.obs(0, 20)


def test_rows_outside_the_matrix_are_refused(tmp_path):
    with H5adSource(write(tmp_path, example())) as source:
        for call in (source.read, source.obs):
            for start, stop in ((-1, 3), (0, N + 1), (5, 4)):
                with pytest.raises(IndexError, match=f"rows {start} to {stop} of {N}"):
                    call(start, stop)


def test_closing_twice_is_no_error_and_a_failed_opening_closes_the_file(tmp_path):
    path = write(tmp_path, example())
    source = H5adSource(path)
    source.close()
    source.close()
    with pytest.raises(ValueError, match="has no raw"):
        H5adSource(path, raw=True)
    with h5py.File(path, "r+"):  # HDF5 refuses to write to a file that is open for reading
        pass


def test_published_files_are_read_as_anndata_reads_them(real_data):
    files = sorted(real_data.glob("*.h5ad"))
    assert files
    for path in files:
        adata = ad.read_h5ad(path, backed="r")
        with H5adSource(path) as source:
            middle = source.n_obs // 2
            for start, stop in ((0, min(500, source.n_obs)), (middle, min(middle + 500, source.n_obs))):
                pd.testing.assert_frame_equal(source.obs(start, stop), adata.obs.iloc[start:stop])
                difference = source.read(start, stop) - sp.csr_matrix(adata.X[start:stop])
                assert difference.nnz == 0
            assert source.gene_ids == tuple(adata.var_names)
            pd.testing.assert_frame_equal(source.obs(0, source.n_obs), adata.obs)
        adata.file.close()
