import gzip
import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.txfm_data.text_files import write_text
from txfm_data.sources.hashing import file_sha256, files_sha256
from txfm_data.sources.labels import read_sample_table

TABLE = "sample\tage\tbatch\tscore\tsex\na\t41\t007\t0.5\tF\nb\t39\t008\tNA\t\nc\t7\t1E2\t2\tM\n"


@pytest.mark.parametrize("name", ["t.tsv", "t.tsv.gz", "t.txt", "t.meta"])
def test_labels_come_in_the_order_of_the_names(tmp_path: Path, name: str) -> None:
    labels = read_sample_table(write_text(tmp_path / name, TABLE), ["c", "a", "b"])
    assert labels.index.tolist() == ["c", "a", "b"]
    assert labels["age"].tolist() == [7, 41, 39]
    assert labels["age"].dtype == np.int64


def test_only_plain_numbers_become_numbers_and_missing_stays_missing(tmp_path: Path) -> None:
    labels = read_sample_table(write_text(tmp_path / "t.tsv", TABLE), ["a", "b", "c"])
    assert labels["batch"].tolist() == ["007", "008", "1E2"]
    assert np.array_equal(labels["score"], [0.5, np.nan, 2.0], equal_nan=True)
    assert labels["sex"].tolist() == ["F", None, "M"]


def test_csv_with_quotes_crlf_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = write_text(tmp_path / "t.csv", '\ufeff"sample","note"\r\n"a","x, y"\r\n"b","z"\r\n')
    labels = read_sample_table(path, ["b", "a"])
    assert labels["note"].tolist() == ["z", "x, y"]


def test_a_header_of_r_has_no_name_for_the_samples(tmp_path: Path) -> None:
    labels = read_sample_table(write_text(tmp_path / "t.tsv", "age\tsex\na\t1\tF\nb\t2\tM\n"), ["b"])
    assert labels.to_dict("records") == [{"age": 2, "sex": "M"}]


def test_sample_names_that_look_like_numbers_stay_as_written(tmp_path: Path) -> None:
    assert read_sample_table(write_text(tmp_path / "t.tsv", "s\tx\n01\tp\n1\tq\n"), ["1", "01"])["x"].tolist() == [
        "q",
        "p",
    ]


def test_long_identifiers_are_not_rounded(tmp_path: Path) -> None:
    path = write_text(tmp_path / "t.tsv", "s\tx\ty\na\t12345678901234567890\t123456789012345678\n")
    assert read_sample_table(path, ["a"]).iloc[0].tolist() == ["12345678901234567890", 123456789012345678]


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("s\tx\na\t1\n", "t.tsv", r"1 of 2 samples have no row, for example \['b'\].*--sample-table"),
        ("s\tx\na\t1\na\t2\nb\t3\n", "t.tsv", r"1 sample names of the first column \('s'\) occur more than once"),
        ("s\tx\tx\na\t1\t2\nb\t1\t2\n", "t.tsv", r"columns \['x'\] more than once"),
        ("s\tx\na\t1\nb\n", "t.tsv", "not a whole table of text.*Expected 2 columns, got 1.*2 fields of the header"),
        ("s\tx\na\t1\nb\t2\t3\n", "t.tsv", "not a whole table of text"),
        ("s\na\t1\t2\nb\t1\t2\n", "t.tsv", "not a whole table.*Expected 1 columns, got 3"),
        ("", "t.tsv", "first line is empty"),
        ("s\tx\n", "t.tsv", "no lines below"),
        ("s\tx\na\t1\n", "t.csv", "ends in .csv, but its header .* is separated by tabs"),
        ("s,x\na,1\n", "t.tsv", "is separated by commas"),
        ("s,x\ty\na,1\t2\n", "t.txt", "both tabs and commas"),
        ("s\tx\na\t1\nb\t\x00\udcff\n", "t.tsv", "not a whole table of text"),
    ],
)
def test_bad_tables(tmp_path: Path, text: str, name: str, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=message) as error:
        read_sample_table(path, ["a", "b"])
    assert str(path) in str(error.value)


def test_a_cut_gzip_and_no_file(tmp_path: Path) -> None:
    path = tmp_path / "t.tsv.gz"
    path.write_bytes(gzip.compress(TABLE.encode())[:-12])
    with pytest.raises(ValueError, match="gzip stream is cut or damaged"):
        read_sample_table(path, ["a"])
    with pytest.raises(FileNotFoundError, match="--sample-table"):
        read_sample_table(tmp_path / "no.tsv", ["a"])


def test_samples_of_one_name_cannot_be_joined(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1 names of the matrix's samples .*\['a'\]"):
        read_sample_table(write_text(tmp_path / "t.tsv", TABLE), ["a", "b", "a"])


def test_hashes(tmp_path: Path) -> None:
    one, two = write_text(tmp_path / "x" / "one", "1"), write_text(tmp_path / "x" / "two", "2")
    assert file_sha256(one) == hashlib.sha256(b"1").hexdigest()
    whole = files_sha256([one, two], tmp_path)
    assert whole == files_sha256([two, one], tmp_path)
    assert whole != files_sha256([one, two], tmp_path / "x")
    one.write_text("2")
    assert whole != files_sha256([one, two], tmp_path)


@given(
    parts=st.lists(
        st.tuples(st.text("ab", min_size=1, max_size=3), st.binary(max_size=3)), min_size=1, unique_by=lambda p: p[0]
    )
)
def test_names_and_contents_decide_the_hash(
    tmp_path_factory: pytest.TempPathFactory, parts: list[tuple[str, bytes]]
) -> None:
    root = tmp_path_factory.mktemp("hash")
    for name, content in parts:
        (root / name).write_bytes(content)
    before = files_sha256([root / name for name, _ in parts], root)
    assert before == files_sha256([root / name for name, _ in reversed(parts)], root)
    name, content = parts[0]
    (root / name).write_bytes(content + b"x")
    assert before != files_sha256([root / name for name, _ in parts], root)
