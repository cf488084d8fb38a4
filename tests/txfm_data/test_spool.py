"""The spool against scipy: any order, any size of memory, duplicates, bounds, and nothing left behind."""

import os
import pickle
import subprocess
import sys
import tempfile
import tracemalloc

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from txfm_data.sources.spool import Spool, SpooledMatrix


@pytest.fixture(autouse=True)
def own_tmp(tmp_path, monkeypatch):
    """Temporary folders of a test go below its own folder; none may be left at the end."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield folder
    assert list(folder.iterdir()) == []


def entries(matrix, seed: int = 0):
    """Rows, columns and values of a matrix in random order."""
    coo = sp.coo_matrix(matrix)
    order = np.random.default_rng(seed).permutation(coo.nnz)
    return coo.row[order], coo.col[order], coo.data[order]


def same(got: sp.csr_matrix, expected) -> None:
    expected = sp.csr_matrix(expected)
    expected.sum_duplicates()
    assert got.shape == expected.shape
    np.testing.assert_array_equal(got.indptr, expected.indptr)
    np.testing.assert_array_equal(got.indices, expected.indices)
    np.testing.assert_array_equal(got.data, expected.data)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 200), st.integers(1, 30), st.integers(1, 50), st.integers(1, 40), st.integers(0, 2**32 - 1),
    st.sampled_from(["float64", "int64", "uint32"]),
)  # fmt: skip
def test_any_order_and_any_memory_gives_the_matrix_of_scipy(n_obs, n_vars, capacity, part, seed, dtype):
    rng = np.random.default_rng(seed)
    dense = rng.integers(1, 1000, (n_obs, n_vars)) * (rng.random((n_obs, n_vars)) < rng.random())
    rows, columns, values = entries(dense, seed)
    with Spool(n_obs, n_vars, max_bytes=64 * capacity, dtype=dtype) as spool:
        for start in range(0, len(rows), part):
            piece = slice(start, start + part)
            spool.add(rows[piece], columns[piece], values[piece])
        matrix = spool.finish()
        assert matrix.shape == (n_obs, n_vars) and matrix.dtype == dtype and matrix.nnz == np.count_nonzero(dense)
        same(matrix.read(0, n_obs), dense)
        for start, stop in matrix.cuts(16 * 7):
            same(matrix.read(start, stop), dense[start:stop])


def test_rows_are_read_alone_and_cuts_cover_them(tmp_path):
    dense = np.random.default_rng(1).poisson(0.3, (500, 40))
    with Spool(500, 40, max_bytes=64 * 100) as spool:
        spool.add(*entries(dense))
        matrix = spool.finish()
        cuts = matrix.cuts(16 * 100)
        assert [a for a, _ in cuts[1:]] == [b for _, b in cuts[:-1]] and (cuts[0][0], cuts[-1][1]) == (0, 500)
        assert max(matrix.read(*cut).nnz for cut in cuts) <= 100
        same(matrix.read(137, 138), dense[137:138])
        assert matrix.read(4, 4).shape == (0, 40)
        with pytest.raises(IndexError, match="rows 400 to 501"):
            matrix.read(400, 501)
        same(pickle.loads(pickle.dumps(matrix)).read(3, 90), dense[3:90])
        other = SpooledMatrix(spool.folder)
        other.close()
        same(other.read(0, 500), dense)


def test_one_full_row_range_is_split(own_tmp):
    """All values in a few rows of one bucket: far more than one sort may hold."""
    dense = np.zeros((6400, 50))
    dense[100:110] = np.arange(1, 501).reshape(10, 50)
    with Spool(6400, 50, max_bytes=64 * 60) as spool:
        spool.add(*entries(dense))
        same(spool.finish().read(0, 6400), dense)
        assert sorted(p.name for p in spool.folder.iterdir()) == ["data", "header.json", "indices", "indptr"]


def test_duplicates_are_refused_by_name_or_summed():
    rows, columns, values = np.array([5, 2, 5, 2, 5]), np.array([1, 0, 1, 0, 2]), np.array([1.0, 4, 2, -4, 7])
    with Spool(8, 3) as spool:
        spool.add(rows, columns, values)
        same(spool.finish(duplicates="sum").read(0, 8), sp.csr_matrix(([3.0, 7], ([5, 5], [1, 2])), (8, 3)))
    spool = Spool(8, 3, where="made.mtx")
    spool.add(rows, columns, values)
    with pytest.raises(ValueError, match=r"made\.mtx: row 2 \(from 0\), column 0 occurs more than once"):
        spool.finish()
    assert not spool.folder.exists()
    with Spool(8, 3, max_bytes=64) as spool:  # a row of five values where one sort may hold one
        spool.add(rows, columns, values)
        assert spool.finish(duplicates="sum").read(5, 6).toarray().tolist() == [[0, 3, 7]]


def test_sums_that_do_not_fit_are_refused():
    for dtype, value in (("uint32", 2**31), ("int64", 2**62)):
        spool = Spool(1, 1, dtype=dtype)
        spool.add(np.array([0, 0]), np.array([0, 0]), np.array([value, value]))
        with pytest.raises(ValueError, match="a sum of duplicates passes"):
            spool.finish(duplicates="sum")
    with Spool(1, 1, dtype="uint32") as spool:
        spool.add(np.array([0, 0]), np.array([0, 0]), np.array([2**31, 2**31 - 2]))
        assert spool.finish(duplicates="sum").read(0, 1).data.tolist() == [2**32 - 2]


def test_nan_and_infinity_stay_and_zeros_go():
    with Spool(2, 3) as spool:
        spool.add(np.array([0, 1, 1, 0]), np.array([2, 0, 1, 0]), np.array([np.nan, 0.0, -np.inf, -0.0]))
        rows = spool.finish().read(0, 2)
    assert rows.indices.tolist() == [2, 1] and np.isnan(rows.data[0]) and rows.data[1] == -np.inf


@pytest.mark.parametrize(
    ("rows", "columns", "values", "dtype", "error", "message"),
    [
        ([3], [0], [1], "float64", ValueError, r"row 3 is not one of the 3 rows \(0 to 2\)"),
        ([-1], [0], [1], "float64", ValueError, "row -1 is not one of the 3 rows"),
        ([0], [2], [1], "float64", ValueError, "column 2 is not one of the 2 columns"),
        ([0], [-1], [1], "float64", ValueError, "column -1"),
        ([0.0], [0], [1], "float64", TypeError, "rows must be one-dimensional integers, got float64"),
        ([0, 1], [0], [1], "float64", ValueError, "2 rows, 1 columns, 1 values"),
        ([0], [0], ["x"], "float64", TypeError, "values must be numbers"),
        ([0], [0], [2**53 + 1], "float64", ValueError, "holds 9007199254740993, which float64 cannot hold"),
        ([0], [0], [1.5], "uint32", ValueError, "holds 1.5, which uint32"), ([0], [0], [-1], "uint32", ValueError, "holds -1"),
        ([0], [0], [np.nan], "int64", ValueError, "holds nan"), ([0], [0], [2.0**32], "uint32", ValueError, "holds 4294967296"),
        ([0], [0], [2**32], "uint32", ValueError, "holds 4294967296"),
        ([0], [0], np.array([2**63], np.uint64), "int64", ValueError, "holds 9223372036854775808"),
        ([0], [0], [2.0**63], "int64", ValueError, "holds 9.22"),
    ],
)  # fmt: skip
def test_bad_parts_are_named_and_close_the_spool(own_tmp, rows, columns, values, dtype, error, message):
    spool = Spool(3, 2, dtype=dtype, where="in.mtx")
    with pytest.raises(error, match=f"in.mtx: .*{message}"):
        spool.add(np.array(rows), np.array(columns), np.array(values))
    assert list(own_tmp.iterdir()) == []
    with pytest.raises(ValueError, match="the spool is closed"):
        spool.finish()


def test_bad_arguments_are_named():
    for arguments, message in (
        ({"n_obs": -1}, "-1 x 2 is not a shape"), ({"n_vars": 2**31}, "is not a shape"), ({"max_bytes": 10}, "at least 64"),
        ({"dtype": "float32"}, r"cannot be spooled as 'float32', choose one of \['float64'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Spool(**({"n_obs": 3, "n_vars": 2} | arguments))
    with Spool(3, 2) as spool, pytest.raises(ValueError, match="expected 'error' or 'sum'"):
        spool.finish(duplicates="first")  # type: ignore[arg-type]


def test_a_finished_spool_takes_no_parts_and_a_closed_one_is_gone(own_tmp):
    spool = Spool(2, 2)
    matrix = spool.finish()
    assert matrix.read(0, 2).nnz == 0
    with pytest.raises(ValueError, match="the spool is finished"):
        spool.add(np.array([0]), np.array([0]), np.array([1]))


def test_closing_the_matrix_closes_the_spool():
    spool = Spool(2, 2)
    matrix = spool.finish()
    matrix.close()
    assert not spool.folder.exists()
    with pytest.raises(FileNotFoundError, match="the source that made it was closed"):
        SpooledMatrix(spool.folder)


def test_the_matrix_keeps_its_folder_and_a_forked_child_does_not_remove_it(own_tmp):
    """In a process without threads, which may fork without a warning."""
    code = """
import os
from txfm_data.sources.spool import Spool
matrix = Spool(2, 2).finish()
pid = os.fork()
if pid == 0:
    matrix.close()
    os._exit(0)
os.waitpid(pid, 0)
print(matrix.read(0, 2).shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert done.stdout == "(2, 2)\n", done.stderr


@pytest.mark.parametrize("end", ["", "raise RuntimeError", "import sys; sys.exit(3)"])
def test_nothing_is_left_when_the_interpreter_ends(own_tmp, end):
    code = f"from txfm_data.sources.spool import Spool\ns = Spool(3, 3)\nprint(s.folder)\n{end}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert done.stdout.startswith(str(own_tmp)) and list(own_tmp.iterdir()) == []


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path):
    """A limit on the size of a file stands for a full disk: the write fails the same way."""
    code = """
import resource, signal, numpy as np
from txfm_data.sources.spool import Spool
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
spool = Spool(10, 5000, max_bytes=64000)
rows, columns = np.divmod(np.arange(50000), 5000)
spool.add(rows, columns, np.ones(50000))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "set TMPDIR to a larger disk" in done.stderr


def test_memory_stays_within_its_bound():
    """A matrix of 32 MB spooled, sorted and read within 2 MB beside what its 20,000 rows need."""
    n_obs, n_vars, max_bytes = 20_000, 100, 2 * 1024**2
    with Spool(n_obs, n_vars, max_bytes=max_bytes) as spool:
        tracemalloc.start()
        try:
            for column in range(n_vars):
                rows = np.arange(n_obs)
                spool.add(rows, np.full(n_obs, column), rows + column + 1)
            matrix = spool.finish()
            total = sum(matrix.read(*cut).sum() for cut in matrix.cuts(max_bytes))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert total == sum((np.arange(n_obs) + c + 1).sum() for c in range(n_vars))
    assert peak < max_bytes + 3 * 16 * n_obs + 3 * 8 * n_obs
