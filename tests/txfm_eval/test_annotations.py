"""Annotation files: how they are found and read, and what is refused."""

import sys

import pytest

from txfm_eval.annotations import find_annotations, read_annotation


def test_pairs_are_unordered_unique_and_never_of_one_gene(tmp_path):
    path = tmp_path / "CORUM.txt"
    path.write_text("entity1,entity2\nB,A\nA,B\n C , C \nA,C\n\nB,A\n")
    annotation = read_annotation(path)
    assert annotation.name == "CORUM"
    assert annotation.pairs == (("A", "B"), ("A", "C"))
    assert annotation.n_rows == 5
    assert len(annotation.sha256) == 64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "first line is '', expected 'entity1,entity2'"),
        (b"a,b\nA,B\n", "first line is 'a,b', expected 'entity1,entity2'"),
        (b"entity1,entity2\nA,B\nA\n", "line 3: 'A', expected two gene symbols"),
        (b"entity1,entity2\nA,\n", "line 2: 'A,', expected two gene symbols"),
        (b"entity1,entity2\nA,B,C\n", "line 2: 'A,B,C', expected two gene symbols"),
        (b"entity1,entity2\nA,A\n", "holds no pair of different genes"),
        (b"entity1,entity2\n\xff\xfe,B\n", "not text in UTF-8"),
    ],
)
def test_broken_files_are_refused_by_name(tmp_path, text, message):
    path = tmp_path / "broken.txt"
    path.write_bytes(text)
    with pytest.raises(ValueError, match="broken.txt") as error:
        read_annotation(path)
    assert message in str(error.value)


def test_folders_and_files_are_found(tmp_path):
    for name in ("B.txt", "A.txt", "notes.md"):
        (tmp_path / name).write_text("entity1,entity2\nA,B\n")
    assert [p.name for p in find_annotations([tmp_path])] == ["A.txt", "B.txt"]
    assert [p.name for p in find_annotations([tmp_path / "notes.md", tmp_path / "A.txt"])] == [
        "A.txt",
        "notes.md",
    ]


def test_missing_and_double_files_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "none.txt", tmp_path / "empty"):
        with pytest.raises(FileNotFoundError, match="CORUM and SIGNOR are CC-BY-NC"):
            find_annotations([path])
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "A.txt").write_text("entity1,entity2\nA,B\n")
    with pytest.raises(ValueError, match=r"\['A'\] are given more than once"):
        find_annotations([tmp_path / "x", tmp_path / "y"])


def test_installed_package_is_found_and_not_imported(tmp_path, monkeypatch):
    package = tmp_path / "efaar_benchmarking"
    (package / "benchmark_annotations").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "benchmark_annotations" / "SIGNOR.txt").write_text("entity1,entity2\nA,B\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert [p.name for p in find_annotations()] == ["SIGNOR.txt"]
    assert "efaar_benchmarking" not in sys.modules


def test_neither_files_nor_package_says_how_to_get_them(monkeypatch):
    monkeypatch.setattr("txfm_eval.annotations._PACKAGE", "a_package_that_is_not_there")
    with pytest.raises(FileNotFoundError, match="is not installed") as error:
        find_annotations()
    assert "--annotations" in str(error.value)
    assert "CC-BY-NC" in str(error.value)
