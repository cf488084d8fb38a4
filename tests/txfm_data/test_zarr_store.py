"""The Zarr store: what AnnData reads from it, rows in any pieces, appends that change no file, damage that is noticed."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import anndata as ad
import numpy as np
import pyarrow as pa
import pytest
import scipy.sparse as sp
import zarr

from txfm_data.ragged import Ragged
from txfm_data.store import zarr_arrays, zarr_layout
from txfm_data.store.ledger import DatasetRecord
from txfm_data.store.protocol import Backend, Sink, Store, Tables
from txfm_data.store.zarr import ZarrBackend, ZarrStore
from txfm_data.vocabulary import Vocabulary

CATEGORY = pa.dictionary(pa.int32(), pa.large_string())
BACKEND: Backend = ZarrBackend()


def gene(number: int) -> str:
    return f"ENSG{number:011d}"


@dataclass
class Part:
    """One dataset to append: a dense matrix over genes, and obs."""

    name: str
    matrix: np.ndarray
    genes: list[int]
    obs: pa.Table


def labels(name: str, matrix: np.ndarray, **more: pa.Array) -> pa.Table:
    n = len(matrix)
    nnz = (matrix != 0).sum(axis=1)
    columns = {
        "dataset_id": pa.array([name] * n).cast(CATEGORY),
        "observation_joinid": pa.array([f"{name}-cell{i}" for i in range(n)], pa.large_string()),
        "batch": pa.array([f"{name}{i % 3}" for i in range(n)]).cast(CATEGORY),
        "cell_type": pa.array(["T cell" if i % 2 else "B cell" for i in range(n)]).cast(CATEGORY),
        "perturbation": pa.array(["na"] * n).cast(CATEGORY),
        "is_control": pa.array([i % 2 == 0 for i in range(n)]),
        "modality": pa.array(["sc"] * n).cast(CATEGORY),
        "is_primary_data": pa.array([True] * n),
        "raw_sum": pa.array(matrix.sum(axis=1).astype(np.float64)),
        "nnz": pa.array(nnz.astype(np.int64)),
        "raw_mean_nnz": pa.array(matrix.sum(axis=1) / np.maximum(nnz, 1)),
        "n_measured_vars": pa.array(np.full(n, matrix.shape[1], np.int64)),
    }
    return pa.table(columns | more)


def draw(seed: int, n: int, genes: int, *, dtype: str = "uint32") -> np.ndarray:
    """Sparse values; every seventh sample has none, and the last row is full."""
    rng = np.random.default_rng(seed)
    values = rng.integers(1, 100, (n, genes)) * (rng.random((n, genes)) < 0.3)
    values[::7] = 0
    values[-1] = 1
    return values.astype(dtype) if dtype == "uint32" else values * 0.37


def ragged(rows: np.ndarray, tokens: np.ndarray) -> Ragged:
    """Dense rows over tokens (in any order) as ragged samples."""
    order = np.argsort(tokens)
    csr = sp.csr_matrix(rows[:, order])
    return Ragged(csr.indptr.astype(np.int64), tokens[order][csr.indices].astype(np.uint16), csr.data)


def tables(store: Store, part: Part, *, piece: int = 40) -> tuple[Tables, np.ndarray]:
    """What a commit needs, and the token of each of the part's genes."""
    known = list(store.vocabulary.gene_ids)
    ids = [gene(g) for g in part.genes]
    vocabulary = known + [i for i in ids if i not in known]
    tokens = np.array([vocabulary.index(i) for i in ids], np.int64)
    order = np.argsort(tokens)
    record = DatasetRecord(
        dataset_index=len(store.datasets), name=part.name, obs_start=store.n_obs, obs_stop=store.n_obs + len(part.matrix),
        n_vars=len(vocabulary), n_panel=len(ids), nnz=int((part.matrix != 0).sum()), total=part.matrix.sum().item(),
        values="counts", modality="sc", source=f"{part.name}.h5ad", content_sha256=part.name * 8,
    )  # fmt: skip
    fields = {field.name: field for field in [*store.obs_schema(), *part.obs.schema]}
    schema = pa.schema([field for name, field in fields.items() if name != "soma_joinid"])
    columns = {
        f.name: part.obs[f.name] if f.name in part.obs.column_names else pa.nulls(len(part.obs), f.type) for f in schema
    }
    obs = pa.table(columns)
    return Tables(
        record=record, vocabulary=Vocabulary(tuple(vocabulary), tuple(f"S{i}" for i in vocabulary)), tokens=tokens[order],
        gene_nnz=(part.matrix != 0).sum(axis=0)[order].astype(np.int64), obs_schema=schema,
        obs=[obs.slice(low, piece) for low in range(0, len(obs), piece)],
    ), tokens  # fmt: skip


def append(folder: Path, part: Part, *, block: int = 16, order: int = 1, backend: Backend = BACKEND) -> None:
    """Append in blocks, written forwards (1) or backwards (-1)."""
    store = backend.open(str(folder))
    what, tokens = tables(store, part)
    sink = backend.sink(store, store.n_obs, what.record.obs_stop, what.record.n_vars)
    for low in range(0, len(part.matrix), block)[::order]:
        sink.write(what.record.obs_start + low, ragged(part.matrix[low : low + block], tokens))
    backend.commit(store, sink, what)


def make(folder: Path, parts: list[Part], *, dtype: str = "uint32", backend: Backend = BACKEND) -> Path:
    backend.create(str(folder), np.dtype(dtype))
    for part in parts:
        append(folder, part, backend=backend)
    return folder


def expected(parts: list[Part]) -> np.ndarray:
    """Dense matrix over the vocabulary of all parts."""
    vocabulary = list(dict.fromkeys(g for part in parts for g in part.genes))
    out = np.zeros((sum(len(p.matrix) for p in parts), len(vocabulary)))
    row = 0
    for part in parts:
        out[row : row + len(part.matrix), [vocabulary.index(g) for g in part.genes]] = part.matrix
        row += len(part.matrix)
    return out


def dense(samples: Ragged, n_genes: int) -> np.ndarray:
    return sp.csr_matrix((samples.counts, samples.gene_ids, samples.indptr), (len(samples), n_genes)).toarray()


def three_parts() -> list[Part]:
    """Panels that overlap, in no order; labels that come, go and have nulls; counts beyond 65,535."""
    first, second, third = draw(1, 50, 30), draw(2, 40, 40), draw(3, 33, 5)
    second[3, 4], second[3, 5] = 3_000_000_000, 65_536
    donor = pa.array([None if i == 2 else f"d{i % 4}" for i in range(40)], pa.large_string())
    age, ok = pa.array(np.arange(40)), pa.array([i % 2 == 0 for i in range(40)])
    tissue = pa.array([None if i % 5 == 0 else f"t{i % 3}" for i in range(40)]).cast(CATEGORY)
    score = pa.array([0.5 * i for i in range(33)])
    return [
        Part("first", first, list(range(29, -1, -1)), labels("first", first)),
        Part(
            "second", second, list(range(20, 60)), labels("second", second, donor=donor, age=age, tissue=tissue, ok=ok)
        ),
        Part("third", third, [70, 3, 50, 71, 0], labels("third", third, score=score)),
    ]


@pytest.fixture(scope="module")
def small() -> Iterator[None]:
    """Chunks of 32 and files of 256 elements, so that a tiny store has many of both."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zarr_layout, "CHUNK", 32)
        patch.setattr(zarr_layout, "SHARD", 256)
        yield


@pytest.fixture(scope="module")
def store_of_three(tmp_path_factory: pytest.TempPathFactory, small: None) -> Path:
    """Read it only."""
    return make(tmp_path_factory.mktemp("three") / "store.zarr", three_parts())


def reading(folder: Path) -> ZarrStore:
    return BACKEND.open(str(folder))


def test_anndata_reads_what_was_appended(store_of_three):
    parts = three_parts()
    adata = ad.read_zarr(store_of_three)
    assert adata.shape == (123, 62) and adata.X.dtype == np.uint32
    np.testing.assert_array_equal(adata.X.toarray(), expected(parts))
    np.testing.assert_array_equal(adata[[5, 90, 122]].X.toarray(), expected(parts)[[5, 90, 122]])
    order = [*range(29, -1, -1), *range(30, 60), 70, 71]
    assert adata.var_names.tolist() == adata.var["feature_id"].tolist() == [gene(g) for g in order]
    assert adata.var["feature_name"].tolist() == [f"S{gene(g)}" for g in order]
    np.testing.assert_array_equal(adata.var["nnz"], (expected(parts) > 0).sum(axis=0))
    measured = np.array([[g in part.genes for part in parts] for g in order])
    np.testing.assert_array_equal(adata.varm["measured_in"], measured)
    np.testing.assert_array_equal(adata.var["n_measured_obs"], measured @ [50, 40, 33])
    assert adata.uns["txfm_datasets"].tolist() == ["first", "second", "third"]
    obs = adata.obs
    assert adata.obs_names.tolist() == [str(i) for i in range(123)]
    for name in parts[0].obs.column_names:
        assert obs[name].tolist() == [v for p in parts for v in p.obs[name].to_pylist()], name
    assert obs["cell_type"].dtype == "category" and obs["nnz"].dtype == np.int64 and obs["is_control"].dtype == bool
    for name, part, low in (("donor", 1, 50), ("age", 1, 50), ("tissue", 1, 50), ("ok", 1, 50), ("score", 2, 90)):
        found = obs[name].astype(object).where(obs[name].notna(), None).tolist()
        values = parts[part].obs[name].to_pylist()
        assert found == [None] * low + values + [None] * (123 - low - len(values)), name


def test_obs_reads_back_with_types_nulls_and_filters(store_of_three):
    store, parts = reading(store_of_three), three_parts()
    obs = store.obs()
    assert obs["soma_joinid"].to_pylist() == list(range(123)) and obs.schema == store.obs_schema()
    types = {"donor": pa.large_string(), "age": pa.int64(), "tissue": CATEGORY, "ok": pa.bool_(), "score": pa.float64()}
    assert {name: obs.schema.field(name).type for name in types} == types
    for name in ("donor", "age", "tissue", "ok"):
        assert obs[name].to_pylist() == [None] * 50 + parts[1].obs[name].to_pylist() + [None] * 33
    assert (
        np.isnan(obs["score"].to_numpy()[:90]).all()
        and obs["score"].to_pylist()[90:] == parts[2].obs["score"].to_pylist()
    )
    assert store.obs(["batch", "soma_joinid"]).column_names == ["soma_joinid", "batch"]
    chosen = store.obs(["nnz"], "cell_type == 'B cell' and age > 30")
    assert chosen["soma_joinid"].to_pylist() == [50 + i for i in range(31, 40) if i % 2 == 0]
    assert chosen.column_names == ["soma_joinid", "nnz"]
    assert store.obs(["batch"], "dataset_id == 'nowhere'").num_rows == 0
    assert sum(len(p) for p in store.obs_parts()) == 123 and max(len(p) for p in store.obs_parts()) == 32
    with pytest.raises(ValueError, match=r"obs has no columns \['colour'\]; it has \['soma_joinid', 'dataset_id'"):
        store.obs(["colour"])
    with pytest.raises(ValueError, match="no column 'colour'"):
        store.obs(value_filter="colour == 'red'")


def test_tables_of_genes_and_datasets(store_of_three):
    store, parts = reading(store_of_three), three_parts()
    ids = store.vocabulary.gene_ids
    assert (store.backend, store.values, store.dtype, store.n_obs) == ("zarr", "counts", np.uint32, 123)
    for record, part in zip(store.datasets, parts, strict=True):
        assert store.dataset(part.name) == record
        assert [ids[t] for t in store.panel(record)] == sorted((gene(g) for g in part.genes), key=ids.index)
        nnz = dict(zip((gene(g) for g in part.genes), (part.matrix > 0).sum(axis=0), strict=True))
        np.testing.assert_array_equal(store.gene_nnz(record), [nnz.get(i, 0) for i in ids])
    with pytest.raises(ValueError, match=r"has no dataset 'x'; it has \['first', 'second', 'third'\]"):
        store.dataset("x")


@pytest.mark.parametrize("rows", [1, 7, 16, 1000])
@pytest.mark.parametrize(("start", "stop"), [(0, 123), (13, 100), (49, 51), (122, 123), (60, 60)])
def test_scans_give_the_rows_in_any_pieces(store_of_three, rows, start, stop):
    whole, low = expected(three_parts()), start
    for at, part in reading(store_of_three).scan(start, stop, rows=rows):
        assert at == low and len(part) == min(rows, stop - low)
        assert (part.gene_ids.dtype, part.counts.dtype, part.indptr.dtype) == (np.uint16, np.uint32, np.int64)
        np.testing.assert_array_equal(dense(part, 62), whole[low : low + len(part)])
        low += len(part)
    assert low == stop


def test_a_scan_decodes_each_chunk_once(store_of_three, monkeypatch):
    asked: dict[str, list[int]] = {}
    original = zarr_arrays.read_part

    def read_part(array, part):
        low, high = part[0].start, part[0].stop
        asked.setdefault(array.path, []).extend(range(low // 32, -(-high // 32)))
        return original(array, part)

    monkeypatch.setattr(zarr_arrays, "read_part", read_part)
    monkeypatch.setattr("txfm_data.store.zarr._AHEAD", 40)
    store = reading(store_of_three)
    assert sum(part.nnz for _, part in store.scan(0, 123, rows=3)) == (expected(three_parts()) > 0).sum()
    n_chunks = -(-sum(r.nnz for r in store.datasets) // 32)
    assert asked["X/data"] == asked["X/indices"] == list(range(n_chunks))
    assert len(asked["X/indptr"]) <= -(-124 // 32) + 1  # and the one that says where the last row ends


@pytest.mark.parametrize("ids", [[], [0], [122], [3, 4, 5, 60, 61, 99], [0, 7, 14, 21], list(range(123))])
def test_rows_by_id(store_of_three, ids):
    part = reading(store_of_three).read_rows(np.array(ids, np.int64))
    assert part.counts.dtype == np.uint32
    np.testing.assert_array_equal(dense(part, 62), expected(three_parts())[ids])


@pytest.mark.parametrize("ids", [[5, 4], [4, 4], [-1], [123]])
def test_wrong_ids_are_refused(store_of_three, ids):
    with pytest.raises(ValueError, match="strictly ascending"):
        reading(store_of_three).read_rows(np.array(ids))


def test_ranges_beyond_the_store_are_refused(store_of_three):
    with pytest.raises(ValueError, match="rows 100 to 200 asked for, but the store has 123"):
        next(reading(store_of_three).scan(100, 200))


@pytest.fixture
def usual_sizes() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zarr_layout, "CHUNK", 65_536)
        patch.setattr(zarr_layout, "SHARD", 64 * 65_536)
        yield


def test_the_usual_chunk_sizes_give_the_same(tmp_path, store_of_three, usual_sizes):
    folder = make(tmp_path / "s", three_parts())
    np.testing.assert_array_equal(ad.read_zarr(folder).X.toarray(), expected(three_parts()))
    left, right = (reading(path).obs().drop(["score"]).to_pydict() for path in (folder, store_of_three))
    assert left == right


def test_values_that_are_not_whole(tmp_path, small):
    matrix = draw(4, 30, 20, dtype="float64")
    folder = make(tmp_path / "s", [Part("a", matrix, list(range(20)), labels("a", matrix))], dtype="float64")
    adata = ad.read_zarr(folder)
    assert adata.X.dtype == np.float64 and 0 < adata.X.data.min() < 1
    np.testing.assert_array_equal(adata.X.toarray(), matrix)
    [(_, part)] = reading(folder).scan(0, 30)
    assert part.counts.dtype == np.float64
    np.testing.assert_array_equal(dense(part, 20), matrix)
    assert reading(folder).read_rows(np.array([], np.int64)).counts.dtype == np.float64


def test_whole_counts_only_in_a_store_of_counts(tmp_path, small):
    sink = empty_sink(tmp_path)
    with pytest.raises(TypeError, match="values of float64, but the store holds whole counts"):
        sink.write(0, ragged(np.full((2, 3), 0.5), np.arange(3)))
    with pytest.raises(ValueError, match="a count of 4294967296, the store holds at most 4294967295"):
        sink.write(0, ragged(np.full((2, 3), 2**32), np.arange(3)))
    with pytest.raises(TypeError, match="uint32 or float64, not int16"):
        BACKEND.create(str(tmp_path / "other"), np.dtype(np.int16))


def empty_sink(tmp_path: Path, n_obs: int = 10, n_vars: int = 3) -> Sink:
    BACKEND.create(str(tmp_path / "s"), np.dtype(np.uint32))
    return BACKEND.sink(reading(tmp_path / "s"), 0, n_obs, n_vars)


def test_blocks_that_cannot_be(tmp_path, small):
    sink = empty_sink(tmp_path)
    rows = np.ones((4, 3), np.uint32)
    with pytest.raises(ValueError, match="rows 7 to 11: outside rows 0 to 10"):
        sink.write(7, ragged(rows, np.arange(3)))
    with pytest.raises(ValueError, match="gene id 3 is outside the vocabulary of 3"):
        sink.write(0, ragged(rows, np.array([0, 1, 3])))
    sink.write(2, ragged(rows, np.arange(3)))
    with pytest.raises(ValueError, match="rows 2 to 6: written twice"):
        sink.write(2, ragged(rows, np.arange(3)))


def write_blocks(sink: Sink, matrix: np.ndarray, tokens: np.ndarray, lows: list[int]) -> None:
    for low in lows:
        sink.write(low, ragged(matrix[low : low + 10], tokens))


def test_blocks_from_several_processes_in_any_order_give_the_same_bytes(tmp_path, small):
    matrix = draw(5, 100, 25)
    part = Part("a", matrix, list(range(25)), labels("a", matrix))
    plain = make(tmp_path / "plain", [part])
    folder = tmp_path / "parallel"
    BACKEND.create(str(folder), np.dtype(np.uint32))
    store = reading(folder)
    what, tokens = tables(store, part)
    sink = BACKEND.sink(store, store.n_obs, 100, 25)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        lows = np.random.default_rng(0).permutation(10) * 10
        list(pool.map(write_blocks, [sink] * 2, [matrix] * 2, [tokens] * 2, [lows[::2].tolist(), lows[1::2].tolist()]))
    BACKEND.commit(store, sink, what)
    left, right = hashes(plain), hashes(folder)
    left.pop("zarr.json"), right.pop("zarr.json")  # they hold the time
    assert left == right and not (folder / zarr_layout.BLOCKS).exists()


@pytest.mark.parametrize(
    ("lows", "message"),
    [
        ([0, 20], "rows 10 to 20 were not written"),
        ([10, 20], "rows 0 to 10 were not written"),
        ([0, 10], "rows 20 to 30 were not written"),
        ([0, 10, 15, 20], "rows 15 to 20 were written twice"),
        ([], "rows 0 to 30 were not written"),
    ],
)
def test_missing_and_doubled_blocks_are_refused(tmp_path, small, lows, message):
    matrix = draw(6, 30, 10)
    BACKEND.create(str(tmp_path / "s"), np.dtype(np.uint32))
    store = reading(tmp_path / "s")
    what, tokens = tables(store, Part("a", matrix, list(range(10)), labels("a", matrix)))
    sink = BACKEND.sink(store, store.n_obs, 30, 10)
    write_blocks(sink, matrix, tokens, lows)
    with pytest.raises(ValueError, match=message):
        BACKEND.commit(store, sink, what)
    assert reading(tmp_path / "s").n_obs == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nnz": 5}, "values were written, the record says 5"),
        ({"obs_start": 1}, "its first row should be 0, found 1"),
        ({"dataset_index": 1}, "its number should be 0, found 1"),
        ({"n_vars": 11}, "genes of the vocabulary should be 10, found 11"),
        ({"n_panel": 11}, "genes of its panel should be 10, found 11"),
        ({"gene_nnz": np.zeros(10, np.int64)}, "as written, in 0 as announced"),
        ({"tokens": np.arange(10)[::-1]}, "must ascend within the 10 genes"),
        ({"obs": []}, "obs came with 0 rows, but the dataset has 30 samples"),
        ({"columns": "a/b"}, "cannot hold a column named 'a/b'"),
        ({"columns": "_index"}, "cannot hold a column named '_index'"),
    ],
)
def test_tables_that_do_not_agree_are_refused(tmp_path, small, change, message):
    matrix = draw(7, 30, 10)
    part = Part("a", matrix, list(range(10)), labels("a", matrix))
    if "columns" in change:
        part.obs = part.obs.append_column(change.pop("columns"), pa.array(np.arange(30)))
    BACKEND.create(str(tmp_path / "s"), np.dtype(np.uint32))
    store = reading(tmp_path / "s")
    what, tokens = tables(store, part)
    for name, value in change.items():
        object.__setattr__(what.record if name in what.record.__dict__ else what, name, value)
    sink = BACKEND.sink(store, store.n_obs, 30, 10)
    write_blocks(sink, matrix, tokens, [0, 10, 20])
    with pytest.raises(ValueError, match=message):
        BACKEND.commit(store, sink, what)
    assert reading(tmp_path / "s").n_obs == 0


def test_a_vocabulary_that_does_not_continue_the_stores_is_refused(tmp_path, small):
    parts = three_parts()[:2]
    folder = make(tmp_path / "s", parts[:1])
    store = reading(folder)
    what, _ = tables(store, parts[1])
    ids = what.vocabulary.gene_ids
    object.__setattr__(what, "vocabulary", Vocabulary(ids[::-1], ids))
    with pytest.raises(ValueError, match="does not begin with the store's"):
        BACKEND.commit(store, BACKEND.sink(store, store.n_obs, 90, len(ids)), what)


def test_labels_change_kind_and_nulls_come_late(tmp_path, small):
    """Whole numbers that become fractions, plain labels that get nulls in a third append, dates that are refused."""
    matrices = [draw(seed, 20, 4) for seed in (1, 2, 3)]
    ages = [pa.array(np.arange(20)), pa.array(np.arange(20) + 0.5), pa.array([None, *range(19)], pa.float64())]
    sites = [pa.array([f"s{i}" for i in range(20)], pa.large_string())] * 2 + [pa.array([None] * 20, pa.large_string())]
    parts = [
        Part(f"d{i}", m, [0, 1, 2, 3], labels(f"d{i}", m, age=age, site=site))
        for i, (m, age, site) in enumerate(zip(matrices, ages, sites, strict=True))
    ]
    folder = make(tmp_path / "s", parts)
    obs = reading(folder).obs()
    assert obs["age"].to_pylist()[:40] == [*map(float, range(20)), *(i + 0.5 for i in range(20))]
    assert np.isnan(obs["age"][40].as_py()) and obs["age"][41].as_py() == 0.0
    assert obs["site"].to_pylist() == [f"s{i}" for i in range(20)] * 2 + [None] * 20
    read = ad.read_zarr(folder).obs
    assert read["site"].isna().sum() == 20 and read["site"].iloc[39] == "s19" and read["age"].dtype == np.float64
    day = pa.array(np.arange(20), pa.int32()).cast(pa.date32())
    with pytest.raises(TypeError, match="not date32"):
        append(folder, Part("e", matrices[0], [0, 1, 2, 3], labels("e", matrices[0], day=day)))


# --- appends to a folder of hard links -----------------------------------------------------------------------------


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.parametrize("sizes", ["small", "usual_sizes"])
def test_an_append_to_hard_links_leaves_the_original_as_it_was(tmp_path, request, sizes):
    request.getfixturevalue(sizes)
    parts = three_parts()
    original = make(tmp_path / "original", parts[:1])
    before = hashes(original)
    clone = shutil.copytree(original, tmp_path / "clone", copy_function=os.link)
    for part in parts[1:]:
        append(clone, part)
    assert hashes(original) == before
    np.testing.assert_array_equal(ad.read_zarr(original).X.toarray(), expected(parts[:1]))
    np.testing.assert_array_equal(ad.read_zarr(clone).X.toarray(), expected(parts))
    if sizes == "small":
        kept = [name for name in before if os.path.samefile(original / name, clone / name)]
        full = len(expected(parts[:1]).nonzero()[0]) // 256
        assert full
        assert {f"X/data/c/{i}" for i in range(full)} <= set(kept)  # full files are shared, not written again


def test_an_append_over_damage_is_refused(tmp_path, store_of_three):
    """The last file of an array is written again by an append: what is damaged in it must not get a new checksum."""
    matrix = draw(9, 5, 4)
    part = Part("d", matrix, [0, 1, 2, 3], labels("d", matrix))
    for name in ("X/data", "X/indices", "X/indptr", "obs/nnz", "obs/batch/codes", "obs/observation_joinid"):
        folder = shutil.copytree(store_of_three, tmp_path / name.replace("/", "-"))
        last = max((folder / name / "c").iterdir(), key=lambda p: int(p.name))
        flip(last, 20 if "X/data" in name else -1)
        with pytest.raises(ValueError, match=f"{name}.*the store is damaged"):
            append(folder, part)
        last.unlink()
        with pytest.raises(ValueError, match="the file is missing"):
            append(folder, part)


# --- damage ---------------------------------------------------------------------------------------------------------


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 16
    path.write_bytes(bytes(data))


def read_part_of(folder: Path, path: Path) -> object:
    """Whatever needs the file at `path`."""
    store, (head, name, *_) = reading(folder), path.relative_to(folder).parts
    if head == "X":
        return np.concatenate([dense(part, 62) for _, part in store.scan(0, 123)])
    if head == "obs":
        return store.obs([name])
    if head == "varm":
        return [(store.panel(record), store.gene_nnz(record)) for record in store.datasets]
    return store.vocabulary if name.startswith("feature") else store._var(name, "i")


@pytest.fixture
def copy(tmp_path: Path, store_of_three: Path) -> Path:
    return Path(shutil.copytree(store_of_three, tmp_path / "copy"))


def data_files(folder: Path) -> list[Path]:
    """Every file of values but those that this package never reads: the row numbers as text, and dataset names."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and "c" in p.relative_to(folder).parts)
    return [p for p in files if "_index" not in p.parts and "uns" not in p.parts]


def test_flipped_bits_in_counts_are_noticed(copy):
    """In every file of X, at many places. What is in no element (the padding of a last file) may go unseen, never wrong."""
    files = [path for path in data_files(copy) if path.is_relative_to(copy / "X")]
    assert len(files) > 10
    truth = read_part_of(copy, files[0])
    for path in files:
        whole = path.read_bytes()
        is_last = path == max(path.parent.iterdir(), key=lambda p: int(p.name))
        n_seen = 0
        places = range(0, len(whole), max(1, len(whole) // 12))
        for at in places:
            flip(path, at)
            try:
                seen = read_part_of(copy, path)
            except ValueError as error:
                assert str(path.parent.parent.relative_to(copy)) in str(error)
                n_seen += 1
            else:
                assert is_last and np.array_equal(seen, truth)
            path.write_bytes(whole)
        assert n_seen == len(places) or (is_last and n_seen)


def test_flipped_bits_in_labels_and_panels_are_noticed(copy):
    files = [path for path in data_files(copy) if not path.is_relative_to(copy / "X")]
    assert {path.relative_to(copy).parts[0] for path in files} == {"obs", "var", "varm"} and len(files) > 60
    for path in files:
        whole = path.read_bytes()
        for at in (0, len(whole) // 2, -1):
            flip(path, at)
            with pytest.raises(ValueError, match="damaged"):
                read_part_of(copy, path)
            path.write_bytes(whole)


@pytest.mark.parametrize("how", ["missing", "empty", "half", "one byte"])
def test_missing_and_cut_files_are_noticed(copy, how):
    """Never read as zeros, and never as fewer rows."""
    for path in data_files(copy):
        whole = path.read_bytes()
        path.write_bytes(whole[: {"half": len(whole) // 2, "one byte": len(whole) - 1}.get(how, 0)])
        if how == "missing":
            path.unlink()
        with pytest.raises(ValueError, match="the store is damaged"):
            read_part_of(copy, path)
        path.write_bytes(whole)
        read_part_of(copy, path)


def test_flipped_bits_in_the_metadata_are_noticed(copy):
    path = copy / "zarr.json"
    whole = path.read_bytes()
    for at in range(0, len(whole), len(whole) // 200):
        flip(path, at)
        with pytest.raises(ValueError, match=r"damaged|not a TxFM store|format version"):
            reading(copy)
        path.write_bytes(whole)


def test_claims_that_do_not_fit_are_refused_though_the_checksum_fits(copy):
    """Anyone can compute a checksum: sizes are compared before anything is allocated."""
    attributes = zarr_layout.unseal(str(copy))
    for change, message in (
        ({"nnz": 10**15}, "its shape is"), ({"obs_stop": 124}, "its shape is"), ({"n_vars": 61}, "its shape is"),
        ({"obs_start": 0}, "does not follow"), ({"n_vars": 10**9}, "does not follow"), ({"colour": 1}, "cannot be read"),
    ):  # fmt: skip
        datasets = [*attributes["txfm_datasets"][:-1], attributes["txfm_datasets"][-1] | change]
        zarr_layout.seal(str(copy), attributes | {"txfm_datasets": datasets})
        with pytest.raises(ValueError, match=message):
            reading(copy)
    zarr_layout.seal(str(copy), attributes | {"txfm_dtype": "float64"})
    with pytest.raises(ValueError, match="expected kind 'f'"):
        reading(copy)
    metadata = json.loads((copy / "X/data/zarr.json").read_text())
    metadata["chunk_grid"]["configuration"]["chunk_shape"] = [2**40]
    (copy / "X/data/zarr.json").write_text(json.dumps(metadata))
    zarr_layout.seal(str(copy), attributes)
    with pytest.raises(ValueError, match="are not this format's"):
        reading(copy)


@pytest.mark.parametrize(
    ("path", "at", "value", "message"),
    [
        ("X/indptr", 9, 10**12, "indptr falls, or leaves"),
        ("X/indptr", 9, 0, "indptr falls, or leaves"),
        ("X/indices", 30, 62, "the vocabulary has 62 genes"),
        ("X/indices", 30, -1, "gene ids -1 to"),
        ("X/data", 30, 0, "is stored as a count"),
        ("obs/batch/codes", 3, 99, "a code is outside the categories"),
    ],
)
def test_values_that_cannot_be_are_refused_though_the_checksum_fits(copy, path, at, value, message):
    zarr.open_group(str(copy), mode="r+", use_consolidated=False)[path][at] = value
    with pytest.raises(ValueError, match=message):
        read_part_of(copy, copy / path)


def test_what_is_not_our_store_is_refused(tmp_path, store_of_three):
    with pytest.raises(FileNotFoundError, match="no store there; make one with: txfm ingest"):
        ZarrStore(tmp_path / "none")
    with pytest.raises(ValueError, match="read from a local disk"):
        ZarrStore("s3://bucket/store")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="not a TxFM store"):
        ZarrStore(tmp_path / "folder")
    zarr.create_group(tmp_path / "other")
    with pytest.raises(ValueError, match="a Zarr group, but not a TxFM store"):
        ZarrStore(tmp_path / "other")
    for text in ("[]", '{"attributes": 3}', "{", '{"a":' * 100_000):
        (tmp_path / "folder/zarr.json").write_text(text)
        with pytest.raises(ValueError, match="not a TxFM store"):
            ZarrStore(tmp_path / "folder")
    newer = shutil.copytree(store_of_three, tmp_path / "newer")
    zarr_layout.seal(str(newer), zarr_layout.unseal(str(newer)) | {"txfm_version": 99})
    with pytest.raises(ValueError, match="version 99, this release reads 1; upgrade"):
        ZarrStore(newer)
    with pytest.raises(ValueError, match="missing, so nothing says which files belong"):
        ZarrStore(store_of_three)  # made without a list of files, which readers insist on
    with pytest.raises(FileExistsError):
        BACKEND.create(str(tmp_path / "folder"), np.dtype(np.uint32))


def test_an_empty_store_reads_as_one(tmp_path, small):
    BACKEND.create(str(tmp_path / "s"), np.dtype(np.float64))
    store = reading(tmp_path / "s")
    assert (store.n_obs, store.datasets, store.values, store.dtype, len(store.vocabulary)) == (
        0,
        (),
        None,
        np.float64,
        0,
    )
    assert list(store.scan(0, 0)) == [] and store.obs().num_rows == 0 and store.obs().schema == store.obs_schema()
    assert store.obs(["nnz"], "cell_type == 'B cell'").num_rows == 0
    assert ad.read_zarr(tmp_path / "s").shape == (0, 0)


def test_bytes_a_sample(tmp_path, capsys, usual_sizes):
    """A simulated file of 2,000 x 20,000: about 2,300 non-zeros a cell, 69 % of them ones."""
    rng = np.random.default_rng(0)
    rate = np.exp(rng.normal(0, 1.9, 20_000))
    rows = [rng.multinomial(int(n), rate / rate.sum()) for n in rng.integers(3_000, 5_200, 2_000)]
    indptr = np.cumsum([0, *(int((r > 0).sum()) for r in rows)])
    genes = np.concatenate([np.flatnonzero(r) for r in rows]).astype(np.uint16)
    counts = np.concatenate([r[r > 0] for r in rows]).astype(np.uint32)
    folder = tmp_path / "s"
    BACKEND.create(str(folder), np.dtype(np.uint32))
    store = reading(folder)
    obs = labels("a", np.ones((2_000, 2), np.uint32))
    record = DatasetRecord(
        dataset_index=0, name="a", obs_start=0, obs_stop=2_000, n_vars=20_000, n_panel=20_000, nnz=len(genes),
        total=int(counts.sum()), values="counts", modality="sc", source="a", content_sha256="a",
    )  # fmt: skip
    ids = tuple(gene(i) for i in range(20_000))
    sink = BACKEND.sink(store, 0, 2_000, 20_000)
    sink.write(0, Ragged(indptr, genes, counts))
    gene_nnz = np.bincount(genes, minlength=20_000)
    BACKEND.commit(
        store,
        sink,
        Tables(
            record=record, vocabulary=Vocabulary(ids, ids), tokens=np.arange(20_000), gene_nnz=gene_nnz,
            obs_schema=obs.schema, obs=[obs],
        ),
    )  # fmt: skip
    of_x = sum(p.stat().st_size for p in (folder / "X").rglob("*") if p.is_file()) / 2_000
    everything = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 2_000
    nnz = len(genes) / 2_000
    with capsys.disabled():
        print(
            f"\n{nnz:.0f} non-zeros a cell, {(counts == 1).mean():.0%} ones: {of_x:.0f} B a cell, {everything:.0f} with tables"
        )
    assert everything < 5_539 * nnz / 2_383
    [(_, part)] = reading(folder).scan(0, 2_000, rows=2_000)
    assert np.array_equal(part.counts, counts) and np.array_equal(part.gene_ids, genes)
