"""The filter language: what is read, what is refused and how it is told, and that SOMA takes the same rows."""

import operator

import numpy as np
import pyarrow as pa
import pytest
import tiledbsoma
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from txfm_data.obs_filter import Both, Compare, Filter, Member, check, equals, expand_multivalued, is_in, nearest, parse
from txfm_data.store import layout

OPERATORS = {
    "==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip

ROWS = {
    "soma_joinid": list(range(8)),
    "kind": ["T cell", "B cell", None, "it's", 'a "b"', "é || ü", "T cell", ""],
    "name": ["x", "y", None, "", "it's", "x", "back\\slash", "é || ü"],
    "primary": [True, False, None, True, False, True, True, False],
    "n": [0, 1, None, -3, 5, 5, 1_000_000, 2],
    "small": [0, 1, 2, 3, None, 250, 6, 7],
    "x": [0.5, -1.25, None, 0.1, 3.0, 3.0, 1e6, 0.0],
}
TYPES = {
    "soma_joinid": pa.int64(), "kind": pa.dictionary(pa.int32(), pa.large_string()), "name": pa.large_string(),
    "primary": pa.bool_(), "n": pa.int64(), "small": pa.uint8(), "x": pa.float32(),
}  # fmt: skip
TABLE = pa.table(
    {
        name: pa.array(values, TYPES[name])
        if name != "kind"
        else pa.array(values).dictionary_encode().cast(TYPES[name])
        for name, values in ROWS.items()
    }
)


@pytest.fixture(scope="module")
def frame(tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("frame") / "frame.soma")
    tiledbsoma.DataFrame.create(
        uri, schema=TABLE.schema, index_column_names=["soma_joinid"], domain=[(0, 7)]
    ).close()  # fmt: skip
    with tiledbsoma.open(uri, "w") as writer:
        writer.write(TABLE)
    with tiledbsoma.open(uri, context=layout.context()) as reader:  # as stores are read
        yield reader


TEXTS = st.sampled_from(["T cell", "B cell", "it's", 'a "b"', "é || ü", "", "x", "y", "back\\slash", "absent", "'\""])
VALUES = {
    "kind": TEXTS,
    "name": TEXTS,
    "primary": st.booleans(),
    "n": st.integers(-4, 6) | st.sampled_from([1_000_000, 5.0]),
    "small": st.integers(0, 255),
    "x": st.sampled_from([0.5, -1.25, 0.1, 3.0, 1e6, 0, 3]),
}
ORDERED = ("n", "small", "x")


@st.composite
def leaves(draw):
    column = draw(st.sampled_from(sorted(VALUES)))
    if draw(st.booleans()):
        values = draw(st.lists(VALUES[column], min_size=1, max_size=4, unique=True))
        return Member(column, tuple(values), draw(st.booleans()))
    op = draw(st.sampled_from(sorted(OPERATORS) if column in ORDERED else ["==", "!="]))
    return Compare(column, op, draw(VALUES[column]))


NODES = st.recursive(
    leaves(),
    lambda inner: st.builds(Both, st.booleans(), st.lists(inner, min_size=2, max_size=3).map(tuple)),
    max_leaves=6,
)


def in_column_type(column, value):
    return float(np.float32(value)) if column == "x" else value


def passes(node, row) -> bool:
    """Plain reading of one row."""
    if isinstance(node, Both):
        return (all if node.is_and else any)(passes(part, row) for part in node.parts)
    value = ROWS[node.column][row]
    if value is None:
        return False
    value = in_column_type(node.column, value)
    if isinstance(node, Member):
        return (value in [in_column_type(node.column, v) for v in node.values]) != node.negated
    return OPERATORS[node.op](value, in_column_type(node.column, node.value))


@given(node=NODES)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_filter_takes_the_rows_that_plain_reading_and_soma_take(frame, node):
    chosen = Filter(node)
    expected = [passes(node, row) for row in range(8)]
    assert chosen.mask(TABLE).tolist() == expected
    text = chosen.to_soma()
    again = parse(text)
    assert again.to_soma() == text
    assert again.mask(TABLE).tolist() == expected
    found = frame.read(value_filter=text).concat()["soma_joinid"].to_pylist()
    assert found == np.flatnonzero(expected).tolist()


def test_masks_go_over_chunks_with_dictionaries_of_their_own():
    parts = [pa.array(["b", "a", None]).dictionary_encode(), pa.array([None, "a"]).dictionary_encode()]
    table = pa.table({"c": pa.chunked_array(parts)})
    assert parse("c == 'a'").mask(table).tolist() == [False, True, False, False, True]
    assert parse("c != 'a'").mask(table).tolist() == [True, False, False, False, False]
    assert parse("c == 'a'").mask(table.slice(0, 0)).tolist() == []
    nothing = pa.table(
        {"c": pa.DictionaryArray.from_arrays(pa.array([None, None], pa.int32()), pa.array([], pa.string()))}
    )
    assert parse("c not in ['a']").mask(nothing).tolist() == [False, False]
    with pytest.raises(ValueError, match=r"no column 'd'; nothing is near it; there are 1, such as \['c'\]"):
        parse("d == 1").mask(table)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("kind == 'T cell'", [0, 6]),
        ("'T cell' == kind", [0, 6]),
        ("0 < n <= 5", [1, 4, 5, 7]),
        ("not (n == 5 or kind == 'T cell')", [1, 3, 7]),
        ("not 0 < n <= 5", [0, 3, 6]),
        ("(n > 1) & (x == 3) | (soma_joinid == 0)", [0, 4, 5]),
        ("kind in ('T cell', 'B cell') and not primary == False", [0, 6]),
        ("attr('n') in {-3, 0}", [0, 3]),
        ("n == 1 or n == 2\n and x >= 0.0", [1, 7]),
        ("small == 250 and primary == 1", [5]),
    ],
)
def test_spellings(frame, text, expected):
    chosen = parse(text)
    assert np.flatnonzero(chosen.mask(TABLE)).tolist() == expected
    assert frame.read(value_filter=chosen.to_soma()).concat()["soma_joinid"].to_pylist() == expected


def test_long_lists_of_numbers_reach_soma(frame):
    chosen = parse(f"n in {list(range(2, 3_000))} and kind in {['T cell', *map(str, range(3_000))]}")
    assert frame.read(value_filter=chosen.to_soma()).concat()["soma_joinid"].to_pylist() == []
    chosen = parse(f"n in {list(range(2, 3_000))}")
    assert frame.read(value_filter=chosen.to_soma()).concat()["soma_joinid"].to_pylist() == [4, 5, 7]


def test_columns_and_literals():
    chosen = parse("b == 'x' and (a in ['u', 'v', 'u'] or b != 'y') and c < 3 and not a == 'w'")
    assert chosen.columns == ("b", "a", "c")
    assert chosen.literals == {"b": ["x", "y"], "a": ["u", "v", "w"]}
    assert parse("attr('orig.ident') == 'x'").to_soma() == "attr('orig.ident') == 'x'"
    both = equals("a", True).both(is_in("b", ["x"]))
    assert both.to_soma() == "(a == True) and (b in ['x'])"
    with pytest.raises(ValueError, match="no values to choose from"):
        is_in("b", [])


@pytest.mark.parametrize(
    ("text", "position", "told"),
    [
        ("cell_type = 'x'", 11, "write '=='"),
        ("é == 'ü = ü' and b = 1", 20, "write '=='"),
        ("a == 1 && b == 2", 8, "write 'and'"),
        ("a == 1 || b == 2", 8, "write 'or'"),
        ("a == 1 AND b == 2", 8, "write 'and'"),
        ("a IN ['x']", 3, "write 'in'"),
        ("a <> 1", 3, "write '!='"),
        ("a == T cell", 8, "this is no filter"),
        ("a == normal", 6, "put text in quotes: 'normal'"),
        ("a == true", 6, "write True"),
        ("a == “B cell”", 6, "straight quotes"),
        ("a in []", 6, "the list is empty; name at least one value"),
        ("a in 'x'", 6, "needs a list of values"),
        ("is_primary_data", 1, "write is_primary_data == True"),
        ("a.b == 1", 1, r"write attr\('a.b'\)"),
        ("f(x) == 1", 1, "functions are not part"),
        ("__import__('os').system('true') == 1", 1, "functions are not part"),
        ("a == 1 # note", 8, "no comments"),
        ("(a == 1", 1, "this is no filter"),
        ("a == 'x", 6, "this is no filter"),
        ("a == 1 and and b == 1", 12, "this is no filter"),
        ("a < 'x'", 1, "'<' compares numbers"),
        ("a is 1", 1, "write == or !="),
        ("a == None", 6, "None is no value"),
        ("a == b'x'", 6, "is no value"),
        ("a == 1e999", 6, "too large"),
        ("a == 99999999999999999999", 6, "too large"),
        ("a == x + 1", 6, "expected a value"),
        ("1 == 2", 6, "expected the name of a column"),
        ("a == (lambda: 1)", 7, "expected a value"),
        ("a == 1; b == 2", 7, "this is no filter"),
        (r"a == '\d'", 6, "backslash twice"),
        ("a == '\0'", 7, "NUL"),
        ("(" * 300 + "a == 1" + ")" * 300, 150, "this is no filter|nested too deep"),
    ],
)
def test_bad_filters_say_where_and_what_to_write(text, position, told):
    with pytest.raises(ValueError, match=told) as error:
        parse(text)
    assert str(error.value).startswith("--obs-filter: ")
    if len(text) < 100:
        assert f"character {position} (" in str(error.value)


def test_empty_and_endless_filters_are_refused():
    with pytest.raises(ValueError, match="--var-filter: the filter is empty"):
        parse(" \n ", "--var-filter")
    with pytest.raises(ValueError, match="nested too deep"):
        parse(" & ".join(["(a == 1)"] * 20_000))


KNOWN = {"kind": {"T cell", "B cell", "natural killer cell", "é || ü"}}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("knid == 'T cell'", r"--obs-filter: there is no column 'knid'; near it: \['kind'\] \(of 7\)"),
        ("kind == 'T cel'", r"kind has no value 'T cel' \(near it: \['T cell', 'B cell'\] \(of 4\)\)"),
        ("kind != 't_cell'", r"kind has no value 't_cell' \(near it: \['T cell'"),
        ("kind in ['T cell', 'killer']", r"no value 'killer' \(near it: \['natural killer cell'\]"),
        ("kind == 'zzz'", "nothing is near it; there are 4, such as"),
        ("kind in ['1', '2', '3', '4', '5']", r"'3' \(.*\) and 2 more"),
        ("n == 'x'", "n is compared with 'x', but the column is of type int64, so write it without quotes"),
        ("kind == 3", "kind is compared with 3, but the column is text, so put the value in quotes"),
        ("n < 1.5", "the column holds whole numbers"),
        ("small == 300", "does not fit type uint8"),
        ("primary == 2", "the column holds True and False"),
        ("primary == 'True'", "write it without quotes"),
    ],
)
def test_a_filter_that_cannot_be_meant_is_refused(text, told):
    with pytest.raises(ValueError, match=told):
        check(parse(text), TABLE.schema, KNOWN.get)


def test_a_good_filter_passes_the_check():
    check(parse("kind in ['T cell', 'B cell'] and n == 5.0 and primary == True"), TABLE.schema, KNOWN.get)
    check(parse("anything == 5"), ["anything"], KNOWN.get)
    with pytest.raises(ValueError, match="--var-filter: there is no column"):
        check(parse("nothing == 5"), ["anything"], KNOWN.get, "--var-filter")


def test_near_ones_ignore_capitals_and_underscores():
    assert nearest("Alveolar_Macrophage", ["alveolar macrophage", "neuron"]) == ["alveolar macrophage"]
    assert nearest("x", []) == []


DISEASES = ["normal", "A", "A || B", "B || C"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("disease == 'A'", "disease in ['A', 'A || B']"),
        ("disease == 'C'", "disease in ['B || C']"),
        ("disease in ['A', 'C']", "disease in ['A', 'A || B', 'B || C']"),
        ("disease != 'B'", "disease not in ['A || B', 'B || C']"),
        ("disease not in ['B', 'normal']", "disease not in ['A || B', 'B || C', 'normal']"),
        ("disease == 'A || B'", "disease == 'A || B'"),
        ("disease == 'normal'", "disease == 'normal'"),
        ("disease == 'unknown'", "disease == 'unknown'"),
        ("tissue == 'A'", "tissue == 'A'"),
        ("n < 3 and disease == 'C'", "(n < 3) and (disease in ['B || C'])"),
    ],
)
def test_a_term_finds_the_entries_that_join_it_with_others(text, expected):
    assert expand_multivalued(parse(text), "disease", DISEASES).to_soma() == expected


@given(text=st.text(alphabet="ab'\"=<>!&|()[], \t\n#.0x-\\T“é", max_size=30))
@settings(max_examples=300, deadline=None)
def test_any_text_is_a_filter_or_a_value_error(text):
    try:
        chosen = parse(text)
    except ValueError as error:
        assert str(error).startswith("--obs-filter: ")
    else:
        assert parse(chosen.to_soma()).to_soma() == chosen.to_soma()
