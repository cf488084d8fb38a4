"""`txfm evaluate relationships`: a table, JSON, and errors that say what to do."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tools import evaluate
from txfm_data.vocabulary import Vocabulary


def write_lists(folder, n_groups=30, size=6):
    """Genes in groups; every pair within a group is related."""
    folder.mkdir()
    lines = [
        f"G{g * size + a},G{g * size + b}" for g in range(n_groups) for a in range(size) for b in range(a + 1, size)
    ]
    (folder / "GROUPS.txt").write_text("\n".join(["entity1,entity2", *lines]) + "\n")
    return folder


def write_genes(path, matrix, n_genes=180):
    """`txfm genes` with a random codebook and `matrix` as head."""
    noise = np.random.default_rng(0).normal(size=(n_genes, 9)).astype(np.float32)

    def column(values):
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])

    ids = [f"ENSG{90_000_000_000 + i}" for i in range(n_genes)]
    names = [f"G{i}" for i in range(n_genes)]
    table = {
        "gene_id": ids,
        "symbol": names,
        "codebook": column(noise),
        "head": column(matrix.astype(np.float32)),
    }
    pq.write_table(pa.table(table), path)
    return path


@pytest.fixture
def lists(tmp_path):
    return write_lists(tmp_path / "lists")


@pytest.fixture
def genes(tmp_path):
    rng = np.random.default_rng(1)
    groups = np.repeat(rng.normal(size=(30, 12)), 6, axis=0)
    return write_genes(tmp_path / "genes.parquet", groups + 0.05 * rng.normal(size=groups.shape))


def test_json_holds_recall_of_both_matrices_and_the_random_control(genes, lists, capsys):
    assert evaluate.main(["relationships", "--json", "--genes", str(genes), "--annotations", str(lists)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["universe"]["n_genes"] == 180
    assert result["databases"]["GROUPS"]["n_pairs"] == 450
    head, codebook = result["matrices"]["head"], result["matrices"]["codebook"]
    assert head["recall"]["combined"]["one_sided_percent"] > 99
    assert codebook["recall"]["combined"]["one_sided_percent"] < 12
    assert head["random"]["combined"]["one_sided_percent"] == pytest.approx(5, abs=3)
    assert (head["n_dims"], codebook["n_dims"]) == (12, 9)


def test_table_has_a_row_for_each_list(genes, lists, capsys):
    arguments = [
        "relationships",
        "--genes",
        str(genes),
        "--annotations",
        str(lists / "GROUPS.txt"),
        "--matrix",
        "head",
    ]
    assert evaluate.main(arguments) == 0
    shown = capsys.readouterr()
    assert "head (12 columns)" in shown.out
    assert "codebook (" not in shown.out
    rows = {line.split()[0]: line.split() for line in shown.out.splitlines() if line.startswith("  ")}
    assert {"GROUPS", "combined", "union"} <= set(rows)
    assert rows["GROUPS"][1] == "450"
    assert "GROUPS 450 of 450" in shown.out
    assert "GROUPS.txt" in shown.err


def test_a_saved_model_is_scored(tmp_path, lists, capsys):
    torch = pytest.importorskip("torch")
    from txfm_model.config import ModelConfig
    from txfm_model.model import TxFM

    torch.manual_seed(0)
    names = tuple(f"G{i}" for i in range(180))
    model = TxFM(
        ModelConfig(width=32, blocks=1, heads=2),
        Vocabulary(tuple(f"ENSG{i:011d}" for i in range(180)), names),
    )
    model.save_pretrained(tmp_path / "model")
    arguments = ["relationships", "--json", "--model", str(tmp_path / "model"), "--annotations", str(lists)]
    assert evaluate.main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["matrices"]) == {"codebook", "head"}
    assert result["matrices"]["head"]["n_dims"] == 32
    assert result["matrices"]["head"]["recall"]["GROUPS"]["one_sided_percent"] < 15


def test_nan_in_a_model_is_refused_by_gene(tmp_path, lists, capsys):
    matrix = np.random.default_rng(0).normal(size=(180, 4))
    matrix[17, 2] = np.nan
    path = write_genes(tmp_path / "broken.parquet", matrix)
    assert evaluate.main(["relationships", "--genes", str(path), "--annotations", str(lists)]) == 1
    shown = capsys.readouterr()
    assert "head: NaN or infinity in the vectors of 1 genes, for example ['G17']" in shown.err
    assert shown.out == ""


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--annotations", "{lists}"], 2, "either --model or --genes"),
        (["--annotations", "{lists}", "--model", "m", "--genes", "{genes}"], 2, "either --model or --genes"),
        (["--genes", "{genes}", "--annotations", "{lists}/none.txt"], 1, "no such annotation file"),
        (["--genes", "{lists}/none.parquet", "--annotations", "{lists}"], 1, "none.parquet"),
        (["--genes", "{lists}/GROUPS.txt", "--annotations", "{lists}"], 1, "not a readable parquet file"),
        (["--genes", "{genes}", "--annotations", "{lists}", "--control-draws", "1"], 2, "at least 2"),
        (["--genes", "{genes}", "--annotations", "{lists}", "--matrix", "both,head"], 2, "matrix"),
    ],
)
def test_refusals(genes, lists, capsys, arguments, code, message):
    filled = [a.format(lists=lists, genes=genes) for a in arguments]
    assert evaluate.main(["relationships", *filled]) == code
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.out == ""


def test_missing_annotations_say_how_to_get_them_and_name_licences(genes, capsys, monkeypatch):
    monkeypatch.setattr("txfm_eval.annotations._PACKAGE", "a_package_that_is_not_there")
    assert evaluate.main(["relationships", "--genes", str(genes)]) == 1
    shown = capsys.readouterr()
    assert "CORUM and SIGNOR are CC-BY-NC" in shown.err
    assert "pip install --no-deps efaar_benchmarking" in shown.err


def test_lists_of_other_genes_are_refused(genes, tmp_path, capsys):
    (tmp_path / "OTHER.txt").write_text("entity1,entity2\nTP53,MDM2\n")
    assert evaluate.main(["relationships", "--genes", str(genes), "--annotations", str(tmp_path / "OTHER.txt")]) == 1
    assert "0 of 180 genes" in capsys.readouterr().err


def test_file_without_the_columns_is_refused(tmp_path, lists, capsys):
    pq.write_table(pa.table({"symbol": ["A"]}), tmp_path / "t.parquet")
    assert evaluate.main(["relationships", "--genes", str(tmp_path / "t.parquet"), "--annotations", str(lists)]) == 1
    assert "has no column ['codebook', 'head']" in capsys.readouterr().err
