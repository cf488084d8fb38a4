import gzip
import pickle
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.txfm_data.text_files import (
    counts,
    ensembl,
    gdc_name,
    gdc_text,
    star_text,
    whole,
    write_gdc,
    write_text,
)
from txfm_data.sources.star import StarSource

MATRIX = counts(7, 40)


@pytest.fixture
def gdc(tmp_path: Path) -> tuple[Path, Path]:
    return write_gdc(tmp_path / "tcga", MATRIX, tmp_path / "sheet.tsv"), tmp_path / "sheet.tsv"


@pytest.mark.parametrize(("column", "times"), [("unstranded", 1), ("stranded_first", 2), ("stranded_second", 3)])
def test_a_folder_of_the_gdc_equals_what_pandas_reads(gdc: tuple[Path, Path], column: str, times: int) -> None:
    folder, sheet = gdc
    with StarSource(folder, sample_sheet=sheet, column=column) as source:
        found = whole(source)
        assert np.array_equal(found, MATRIX.toarray() * times)
        table = pd.read_csv(folder / "id-3" / gdc_name(3), sep="\t", comment="#").iloc[4:]
        assert np.array_equal(found[3], table[column])
        assert source.gene_ids == tuple(table["gene_id"])
        assert source.symbols == tuple(table["gene_name"])
        assert (source.where, source.name, source.matrix_name, source.n_obs) == (str(folder), "tcga", column, 7)
        assert source.read(0, 7).dtype == np.int64
        assert source.cuts(1) == [(i, i + 1) for i in range(7)]


def test_labels_are_those_of_the_sheet_and_what_no_gene_got(gdc: tuple[Path, Path]) -> None:
    with StarSource(gdc[0], sample_sheet=gdc[1], column="stranded_first") as source:
        labels = source.obs(2, 4)
        assert labels.index.tolist() == ["TCGA-2-01A", "TCGA-3-01A"]
        assert labels["file_id"].tolist() == ["id-2", "id-3"]
        assert labels["project_id"].tolist() == ["TCGA-BRCA"] * 2
        assert {"case_id", "sample_id", "sample_type"} <= set(source.obs_columns)
        sums = labels[["n_unmapped", "n_multimapping", "n_no_feature", "n_ambiguous"]]
        assert sums.to_numpy().tolist() == [[2, 12, 22, 32]] * 2


def test_the_order_of_the_sheet_and_rows_for_other_data_do_not_matter(gdc: tuple[Path, Path]) -> None:
    folder, sheet = gdc
    head, *rows = sheet.read_text().splitlines()
    other = "id-x\tx.methylation_array.sesame.level3betas.txt\tDNA Methylation\tx\tTCGA-BRCA\tTCGA-1\tTCGA-1-01A\tx"
    sheet.write_text("\n".join([head, *reversed(rows), other]) + "\n")
    with StarSource(folder, sample_sheet=sheet) as source:
        assert source.obs(0, 7)["case_id"].tolist() == [f"TCGA-{i}" for i in range(7)]
        assert np.array_equal(whole(source), MATRIX.toarray())


def test_without_a_sheet_the_file_names_the_sample(gdc: tuple[Path, Path], tmp_path: Path) -> None:
    table = write_text(tmp_path / "l.tsv", "s\tage\n" + "".join(f"0000-{i}\t{i}\n" for i in range(7)))
    with StarSource(gdc[0], sample_table=table) as source:
        assert source.obs(5, 6).index.tolist() == ["0000-5"]
        assert source.obs(5, 6)["age"].tolist() == [5]


@pytest.mark.parametrize("end", ["", ".gz"])
def test_stars_own_files(tmp_path: Path, end: str) -> None:
    for i, row in enumerate(MATRIX.toarray()):
        write_text(tmp_path / "runs" / f"s{i}.x.ReadsPerGene.out.tab{end}", star_text(row))
    with StarSource(tmp_path / "runs", column="stranded_second") as source:
        assert np.array_equal(whole(source), MATRIX.toarray() * 3)
        assert source.obs(0, 2).index.tolist() == ["s0.x", "s1.x"]
        assert source.obs(0, 1)["n_no_feature"].tolist() == [23]
        assert source.gene_ids == tuple(ensembl(40))
        assert source.symbols == ("",) * 40


def test_stars_own_files_without_a_prefix_are_named_by_their_folder(tmp_path: Path) -> None:
    for i in range(2):
        write_text(tmp_path / "runs" / f"s{i}" / "ReadsPerGene.out.tab", star_text(np.array([i, 5])))
    with pytest.raises(ValueError, match="1 names of count files occur more than once"):
        StarSource(tmp_path / "runs")
    with StarSource(tmp_path / "runs" / "s1") as source:
        assert source.obs(0, 1).index.tolist() == ["s1"]


def test_another_process_opens_the_same(gdc: tuple[Path, Path]) -> None:
    with StarSource(gdc[0], sample_sheet=gdc[1]) as source:
        gdc[1].unlink()
        with pickle.loads(pickle.dumps(source.opener()))() as other, other.opener()() as third:
            for same in (other, third):
                assert np.array_equal(whole(same), MATRIX.toarray())
                assert (same.gene_ids, same.symbols, same.name) == (source.gene_ids, source.symbols, source.name)
                pd.testing.assert_frame_equal(same.obs(1, 4), source.obs(1, 4))
                assert same.content_sha256() == source.content_sha256()


def test_the_hash_sees_every_file(gdc: tuple[Path, Path]) -> None:
    with StarSource(gdc[0]) as source:
        before = source.content_sha256()
    write_text(gdc[0] / "id-6" / gdc_name(6), gdc_text(MATRIX.toarray()[5]))
    with StarSource(gdc[0]) as source:
        assert source.content_sha256() != before


@pytest.mark.parametrize("column", ["tpm_unstranded", "fpkm_unstranded", "fpkm_uq_unstranded"])
def test_normalised_columns_are_refused(gdc: tuple[Path, Path], column: str) -> None:
    with pytest.raises(ValueError, match=f"--column {column}: these values are normalised .* expected raw counts"):
        StarSource(gdc[0], column=column)


def test_an_unknown_column(gdc: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match="--column x: no column of raw counts; choose one of unstranded"):
        StarSource(gdc[0], column="x")


def test_sheet_and_folder_must_fit(gdc: tuple[Path, Path]) -> None:
    folder, sheet = gdc
    shutil.rmtree(folder / "id-2")
    write_text(folder / "id-9" / gdc_name(9), gdc_text(MATRIX.toarray()[0]))
    with pytest.raises(ValueError, match="does not fit") as error:
        StarSource(folder, sample_sheet=sheet)
    assert f"1 of 7 files of the sheet are not there: ['{gdc_name(2)}']" in str(error.value)
    assert f"1 of 7 files there are not in the sheet: ['{gdc_name(9)}']" in str(error.value)
    assert "--sample-sheet" in str(error.value)


def test_two_files_of_one_sample_need_a_decision(gdc: tuple[Path, Path]) -> None:
    folder, sheet = gdc
    sheet.write_text(sheet.read_text().replace("TCGA-4-01A", "TCGA-3-01A"))
    with pytest.raises(ValueError, match="1 samples have more than one file .*TCGA-3-01A.*--sample-name file_id"):
        StarSource(folder, sample_sheet=sheet)
    with StarSource(folder, sample_sheet=sheet, sample_name="file_id") as source:
        assert source.obs(3, 5).index.tolist() == ["id-3", "id-4"]
        assert source.obs(3, 5)["sample_id"].tolist() == ["TCGA-3-01A"] * 2
    with pytest.raises(ValueError, match="--sample-name barcode: the sheet has"):
        StarSource(folder, sample_sheet=sheet, sample_name="barcode")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("File Name", "Name"), r"missing \['file_name'\]"),
        (lambda text: text + text.splitlines()[1] + "\n", "1 names of count files occur more than once"),
        (lambda text: text.replace("TCGA-4-01A", ""), r"1 files have no sample_id, for example \['0000-4\.rna_seq"),
    ],
)
def test_bad_sheets(gdc: tuple[Path, Path], change: object, message: str) -> None:
    gdc[1].write_text(change(gdc[1].read_text()))  # type: ignore[operator]
    with pytest.raises(ValueError, match=message):
        StarSource(gdc[0], sample_sheet=gdc[1])


ROW = 4001 + np.arange(40)
OTHER = [*ensembl(20, ".15"), *ensembl(41, ".15")[21:]]


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (
            gdc_text(ROW, ids=OTHER),
            r"lists 40 genes, .* lists 40; they first differ at gene 21: ENSG00000000021.15 here",
        ),
        (
            gdc_text(ROW[:39]),
            "lists 39 genes, .* lists 40; they first differ at gene 40: the end here, ENSG00000000039.15",
        ),
        (gdc_text(ROW).removesuffix("\n"), "ends in the middle of a line"),
        (gdc_text(ROW)[:-30] + "\n", "not a whole file of STAR counts"),
        (gdc_text(ROW).replace("\t4006\t", "\t4006.5\t"), "not a whole file of STAR counts.*4006.5"),
        (gdc_text(ROW).replace("\t4006\t", "\t\t"), "line 12 has no value in column unstranded"),
    ],
)
def test_bad_files_are_found_when_read(gdc: tuple[Path, Path], contents: str, message: str) -> None:
    bad = write_text(gdc[0] / "id-4" / gdc_name(4), contents)
    with StarSource(gdc[0]) as source:
        assert np.array_equal(source.read(0, 4).toarray(), MATRIX[:4].toarray())
        with pytest.raises(ValueError, match=message) as error:
            source.read(4, 5)
        assert str(bad) in str(error.value)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (gdc_text(ROW, model="# gene-model: GENCODE v22"), "counted against 'gene-model: GENCODE v22', but .* v36"),
        (gdc_text(ROW, model="x"), "begins with 'x', expected the comment"),
        (gdc_text(ROW).replace("unstranded", "counts"), "expected a header with gene_id, gene_name and unstranded"),
        (gdc_text(ROW).replace("N_noFeature", "N_x"), "expected the line N_noFeature"),
        ("", "begins with ''"),
    ],
)
def test_bad_heads_are_found_when_opened(gdc: tuple[Path, Path], contents: str, message: str) -> None:
    bad = write_text(gdc[0] / "id-4" / gdc_name(4), contents)
    with pytest.raises(ValueError, match=message) as error:
        StarSource(gdc[0])
    assert str(bad) in str(error.value)


def test_bad_folders(tmp_path: Path, gdc: tuple[Path, Path]) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        StarSource(tmp_path / "no")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no file named"):
        StarSource(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="--sample-sheet"):
        StarSource(gdc[0], sample_sheet=tmp_path / "no.tsv")
    write_text(gdc[0] / "a.ReadsPerGene.out.tab", star_text(ROW))
    with pytest.raises(ValueError, match="ingest the two kinds from folders of their own"):
        StarSource(gdc[0])


def test_a_cut_gzip(tmp_path: Path) -> None:
    path = tmp_path / "s.ReadsPerGene.out.tab.gz"
    path.write_bytes(gzip.compress(star_text(ROW).encode())[:-8])
    with pytest.raises(ValueError, match="gzip stream is cut or damaged"):
        StarSource(tmp_path)
