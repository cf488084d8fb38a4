"""AnnData files written in parts equal what AnnData itself would hold, labels of every kind included."""

import anndata as ad
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from txfm_data import anndata_out
from txfm_data.anndata_out import Matrix, output_format, write_anndata
from txfm_data.obs_columns import INDEX, frame_table, plan_columns

N = 23


def labels() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "kind": pd.Categorical(["b", "a", None] * 7 + ["a", "b"], categories=["b", "unused", "a"], ordered=True),
            "level": pd.Categorical([3, 1] * 11 + [3]),
            "text": [f"ü{i}" for i in range(N)],
            "gap": pd.array([None if i == 20 else f"t{i}" for i in range(N)], dtype="string"),
            "n": np.arange(N, dtype=np.uint16),
            "maybe": pd.array([None if i == 22 else i for i in range(N)], dtype="Int64"),
            "is_it": np.arange(N) % 2 == 0,
            "flag": pd.array([None if i == 3 else True for i in range(N)], dtype="boolean"),
            "size": np.where(np.arange(N) == 5, np.nan, 0.5),
        },
        index=[f"cell{i}" for i in range(N)],
    )


def parts_of(frame: pd.DataFrame, rows: int, order: list[int] | None = None):
    starts = list(range(0, len(frame), rows))

    def parts():
        for i in order or range(len(starts)):
            stop = min(starts[i] + rows, len(frame))
            yield np.arange(starts[i], stop), frame_table(frame.iloc[starts[i] : stop])

    return parts


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
@pytest.mark.parametrize("order", [None, [2, 0, 4, 3, 1]])
def test_labels_and_matrices_come_back(tmp_path, suffix, order, monkeypatch):
    monkeypatch.setattr(anndata_out, "_CHUNK_ROWS", 4)
    monkeypatch.setattr(anndata_out, "_CHUNK_BYTES", 40)
    frame, values = labels(), np.arange(N * 3, dtype=np.float32).reshape(N, 3)
    path = tmp_path / f"out.{suffix}"
    matrix = Matrix(
        element="obsm/X", width=3, dtype=np.dtype(np.float32), parts=iter([values[:1], values[1:1], values[1:]])
    )
    var = pd.DataFrame({"measured": [True, False]}, index=["g1", "g2"])
    uns = {"a": {"text": "x", "number": 3, "share": 0.5}}
    write_anndata(path, n_obs=N, obs=parts_of(frame, 5, order), var=var, matrices=[matrix], uns=uns)
    adata = ad.read_h5ad(path) if suffix == "h5ad" else ad.read_zarr(path)
    np.testing.assert_array_equal(adata.obsm["X"], values)
    pd.testing.assert_frame_equal(adata.var, var)
    assert {key: adata.uns["a"][key] for key in ("text", "number", "share")} == uns["a"]
    expected = frame.copy()
    pd.testing.assert_frame_equal(adata.obs.drop(columns="gap"), expected.drop(columns="gap"))
    found = adata.obs["gap"].astype(object)
    assert found.isna().tolist() == [i == 20 for i in range(N)]
    assert found.drop("cell20").tolist() == [f"t{i}" for i in range(N) if i != 20]


def test_too_few_rows_are_noticed(tmp_path):
    matrix = Matrix(element="obsm/X", width=2, dtype=np.dtype(np.float32), parts=iter([np.zeros((4, 2), np.float32)]))
    with pytest.raises(ValueError, match="4 rows were computed for 23 samples"):
        write_anndata(tmp_path / "x.h5ad", n_obs=N, obs=parts_of(labels(), 5), var=None, matrices=[matrix], uns={})


def test_types_that_change_from_part_to_part():
    tables = [
        pa.table(
            {INDEX: ["a"], "x": pa.array([None], pa.null()), "y": [1], "z": [1], "w": pa.array([None], pa.null())}
        ),
        pa.table({INDEX: ["b"], "x": ["t"], "y": [0.5], "z": ["u"], "w": pa.array([None], pa.null())}),
    ]
    columns = plan_columns(tables)
    assert [columns[name].kind for name in "xyzw"] == ["string", "float", "string", "float"]
    assert columns["z"].values(tables[0]["z"])[0].tolist() == ["1"]
    assert columns["x"].values(tables[0]["x"])[1].tolist() == [True]


def test_times_and_objects_are_kept_as_text():
    frame = pd.DataFrame({"when": pd.to_datetime(["2024-05-01"]), "what": [(1, "x")], "both": [b"raw"]}, index=["a"])
    table = frame_table(frame)
    columns = plan_columns([table])
    assert {name: columns[name].kind for name in frame.columns} == dict.fromkeys(frame.columns, "string")
    assert columns["when"].values(table["when"])[0][0].startswith("2024-05-01")


@pytest.mark.parametrize(("name", "expected"), [("a.h5ad", "h5ad"), ("b/c.zarr", "zarr")])
def test_the_name_says_the_format(name, expected):
    assert output_format(name) == expected


@pytest.mark.parametrize("name", ["a.h5", "zarr", "s3://bucket/a.zarr"])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="must end in .h5ad or .zarr|to a local disk"):
        output_format(name)
