"""Labels of a store as arrays, of either backend, against what its obs says."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.shards.builds import make_store
from tests.txfm_data.stores import BACKENDS
from txfm_data import obs_filter
from txfm_data.curate import labels
from txfm_data.curate.labels import read_codes, read_controls, read_mask, read_nnz, values_among
from txfm_data.store.opening import open_store
from txfm_data.store.protocol import Store


@pytest.fixture(scope="module", params=BACKENDS)
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Three datasets with labels that some lack."""
    return open_store(make_store(tmp_path_factory.mktemp("labels"), request.param))


class Parts:
    """An obs that comes in the parts it is told to, in any order and with any dictionary."""

    path = "parts"

    def __init__(self, column: pa.ChunkedArray, cuts: list[int], order: list[int], name: str = "label") -> None:
        self._table = pa.table({"soma_joinid": pa.array(np.arange(len(column))), name: column})
        self.n_obs = len(column)
        self._spans = [(cuts[i], cuts[i + 1]) for i in order]

    def obs_schema(self) -> pa.Schema:
        return self._table.schema

    def obs_parts(self, columns: list[str], value_filter: str | None = None):
        yield self._table.slice(0, 0).select(["soma_joinid", *columns])
        for low, high in self._spans:
            part = self._table.slice(low, high - low).select(["soma_joinid", *columns])
            yield pa.concat_tables([part.slice(0, 1), part.slice(1)])  # two chunks


@pytest.mark.parametrize("column", ["batch", "cell_type", "tissue", "note", "is_control", "age", "nnz", "perturbation"])
def test_codes_name_the_value_of_each_sample(store, column):
    found, expected = read_codes(store, column), store.obs([column])[column].to_pylist()
    assert found.codes.dtype == np.int32 and len(found.codes) == store.n_obs
    assert [None if code < 0 else found.values[code] for code in found.codes] == expected
    assert list(found.values) == sorted(set(expected) - {None})


@settings(max_examples=60, deadline=None)
@given(data=st.data(), kind=st.sampled_from(["text", "category", "bool", "integer"]), n=st.integers(0, 40))
def test_codes_do_not_depend_on_how_obs_comes(data, kind, n):
    entries = {"bool": st.booleans(), "integer": st.integers(-(2**40), 2**40)}.get(kind, st.sampled_from("dcab"))
    values = data.draw(st.lists(st.none() | entries, min_size=n, max_size=n))
    types = {"bool": pa.bool_(), "integer": pa.int64()}
    column = pa.chunked_array([pa.array(values, types.get(kind, pa.large_string()))])
    if kind == "category":  # with an entry that nothing points at
        indices = pa.array([None if v is None else "zdcab".index(v) for v in values], pa.int32())
        column = pa.chunked_array([pa.DictionaryArray.from_arrays(indices, pa.array(list("zdcab"), pa.large_string()))])
    cuts = sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=5))})
    order = data.draw(st.permutations(range(len(cuts) - 1)))
    found = read_codes(Parts(column, cuts, list(order)), "label")
    assert found.values == tuple(sorted(set(values) - {None}))
    assert [None if code < 0 else found.values[code] for code in found.codes] == values


def test_numbers_of_genes_are_those_of_obs(store):
    assert read_nnz(store).dtype == np.int32
    assert read_nnz(store).tolist() == store.obs(["nnz"])["nnz"].to_pylist()


def test_numbers_of_genes_that_are_missing_are_below_zero():
    column = pa.chunked_array([pa.array([5, None, 0, 65_536], pa.int64())])
    assert read_nnz(Parts(column, [0, 1, 4], [1, 0], name="nnz")).tolist() == [5, -1, 0, 65_536]
    with pytest.raises(ValueError, match="nnz of obs is no number of genes .*the store is damaged"):
        read_nnz(Parts(pa.chunked_array([pa.array([2**40])]), [0, 1], [0], name="nnz"))


@pytest.mark.parametrize(
    "text",
    ["cell_type in ['T cell', 'B cell'] and raw_sum >= 30", "not (tissue == 'skin')", "age > 9", "is_control == True"],
)
def test_masks_are_those_of_the_store_s_own_filter(store, text):
    parsed = obs_filter.parse(text)
    expected = np.zeros(store.n_obs, bool)
    expected[store.obs(["nnz"], parsed.to_soma())["soma_joinid"].to_numpy()] = True
    mask = read_mask(store, parsed)
    assert np.array_equal(mask, expected) and 0 < mask.sum() < store.n_obs


def test_controls_are_those_of_obs(store):
    assert read_controls(store).tolist() == [bool(v) for v in store.obs(["is_control"])["is_control"].to_pylist()]
    assert read_controls(store).sum() == 10


def test_values_are_those_of_the_datasets_asked_about(store):
    first, second, third = store.datasets
    assert values_among(store, "batch", [second]) == {"second0", "second1", "second2"}
    assert values_among(store, "tissue", [first, third]) == set()
    assert values_among(store, "batch", [first, third], of=obs_filter.is_in("batch", ["third1", "second1"])) == {
        "third1"
    }
    assert len(values_among(store, "note", [first], most=40)) == 40
    assert values_among(store, "note", [first], most=39) is None


@pytest.mark.parametrize(
    ("read", "column", "message"),
    [
        (read_codes, "cel_type", "no column 'cel_type'; did you mean cell_type"),
        (read_codes, "raw_sum", "'raw_sum' of obs holds double; labels are text, whole numbers or booleans"),
    ],
)
def test_other_columns_are_refused(store, read, column, message):
    with pytest.raises(ValueError, match=message):
        read(store, column)


def test_identifiers_are_no_labels(store):
    assert len(read_codes(store, "note", most=40).values) == 40
    with pytest.raises(ValueError, match="more than 39 values, so it holds identifiers"):
        read_codes(store, "note", most=39)


def test_a_store_that_lacks_samples_is_refused():
    column = pa.chunked_array([pa.array(list("abcd"), pa.large_string())])
    with pytest.raises(ValueError, match="obs has 2 of 4 samples; the store is damaged"):
        read_codes(Parts(column, [0, 2, 4], [1]), "label")


def test_codes_of_many_samples_are_put_in_order_piece_by_piece(monkeypatch):
    monkeypatch.setattr(labels, "_PIECE", 3)
    column = pa.chunked_array([pa.array([*"dcbaabcd", None], pa.large_string())])
    assert read_codes(Parts(column, [0, 9], [0]), "label").codes.tolist() == [3, 2, 1, 0, 0, 1, 2, 3, -1]
